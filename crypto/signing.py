"""The key that signs the audit log, and signed notes (C2SP signed-note, Ed25519). Start at `load`.

The signing key is no data key: it lives in a file of its own on the sealer's host, where neither
the database's administrator nor workers nor operators reach it. What it signs anybody can verify
with the public key, a line `name+hash+key`.
"""

import json
import os
import re
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal, NoReturn, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from crypto.errors import KeyringError
from crypto.kms import private

_FORMAT = "syncward-signer/1"
_ED25519 = b"\x01"
_VKEY = re.compile(r"(?P<name>[^\s+]+)\+(?P<hash>[0-9a-f]{8})\+(?P<key>[A-Za-z0-9+/]+={0,2})")
_SIGNATURE = re.compile(r"— (?P<name>[^\s+]+) (?P<bytes>[A-Za-z0-9+/]+={0,2})")

#: `retiring` still signs beside the active one, until a checkpoint with both was published.
KeyState = Literal["active", "retiring"]


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Half of a signing key, for everybody."""

    name: str
    raw: bytes

    @property
    def hash(self) -> bytes:
        """The four bytes by which a signature names its key."""
        return sha256(self.name.encode() + b"\n" + _ED25519 + self.raw).digest()[:4]

    @property
    def line(self) -> str:
        """The key as it stands in a file."""
        return f"{self.name}+{self.hash.hex()}+{b64encode(_ED25519 + self.raw).decode()}"

    @classmethod
    def parse(cls, line: str) -> "PublicKey":
        """Read a key's line; ValueError if it is none."""
        match = _VKEY.fullmatch(line.strip())
        if match is None:
            raise ValueError("not a line name+hash+key")
        raw = b64decode(match["key"], validate=True)
        if raw[:1] != _ED25519 or len(raw) != 33:  # noqa: PLR2004 - the type and 32 bytes
            raise ValueError("not an Ed25519 key")
        key = cls(match["name"], raw[1:])
        if key.hash.hex() != match["hash"]:
            raise ValueError("the hash is not that of the key")
        return key


@dataclass(frozen=True, slots=True, repr=False)
class _SigningKey:
    public: PublicKey
    private: Ed25519PrivateKey
    state: KeyState


class Signer:
    """The keys of one file: signs with the active one and with one that is being replaced."""

    def __init__(self, keys: Sequence[_SigningKey]) -> None:
        self._keys = tuple(keys)

    def __repr__(self) -> str:
        return f"Signer({', '.join(key.line for key in self.public)})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Signer cannot be pickled")

    @property
    def public(self) -> tuple[PublicKey, ...]:
        """The public halves, the active one first."""
        return tuple(key.public for key in self._keys)

    def sign(self, text: str) -> str:
        """Return the signature lines that belong below a note's text (which ends in a newline)."""
        return "".join(_signature(key, text) for key in self._keys)


def note(text: str, signatures: str) -> str:
    """Join text and signature lines to a signed note."""
    return f"{text}\n{signatures}"


def parse_note(signed: str) -> tuple[str, str]:
    """Return (text, signature lines) of a signed note; ValueError if it is none."""
    text, between, signatures = signed.rpartition("\n\n")
    if not between or not signatures.endswith("\n"):
        raise ValueError("not a signed note")
    if any(_SIGNATURE.fullmatch(line) is None for line in signatures.splitlines()):
        raise ValueError("not a signed note: a signature line is malformed")
    return f"{text}\n", signatures


def signed_by(text: str, signatures: str, keys: Iterable[PublicKey]) -> list[PublicKey]:
    """Return the keys among `keys` that signed the text.

    A signature that names one of the keys and is not its own makes ValueError: somebody forged.
    """
    known = {(key.name, key.hash): key for key in keys}
    found = []
    for line in signatures.splitlines():
        match = _SIGNATURE.fullmatch(line)
        if match is None:
            raise ValueError("a signature line is malformed")
        raw = b64decode(match["bytes"], validate=True)
        key = known.get((match["name"], raw[:4]))
        if key is None:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(key.raw).verify(raw[4:], text.encode())
        except InvalidSignature:
            raise ValueError(f"the signature of {key.name} is forged") from None
        found.append(key)
    return found


def init(path: Path) -> PublicKey:
    """Make a signing key in a new file (mode 0600) and return its public half."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry = _new_entry(f"syncward-{token_hex(4)}")
    _create(path, [entry])
    _settle(path.parent)
    return _signing_key(entry).public


def rotate(path: Path) -> PublicKey:
    """Make a new key the active one; the one before signs beside it until `retire`."""
    entries = _read(path)
    if len(entries) > 1:
        raise KeyringError(
            f"signing key {path}: a rotation is not finished; let the sealer publish a checkpoint "
            "with both keys, then: syncward audit key retire"
        )
    fresh = _new_entry(entries[0]["name"].partition("~")[0] + f"~{token_hex(4)}")
    _replace(path, [fresh, {**entries[0], "state": "retiring"}])
    return _signing_key(fresh).public


def retire(path: Path) -> PublicKey:
    """Forget the key that was replaced and return its public half."""
    entries = _read(path)
    if len(entries) == 1:
        raise KeyringError(f"signing key {path}: no key is being replaced; nothing to retire")
    _replace(path, entries[:1])
    return _signing_key(entries[1]).public


def load(path: Path) -> Signer:
    """Open a signing key's file, which only its owner may read; KeyringError says what is wrong."""
    return Signer([_signing_key(entry) for entry in _read(path)])


def read_public(path: Path) -> list[PublicKey]:
    """Read public keys, one a line; KeyringError if the file holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        keys = [PublicKey.parse(ln) for ln in lines if ln.strip() and not ln.startswith("#")]
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise KeyringError(
            f"public key {path}: {why}; the sealer's host shows it: syncward audit key show"
        ) from None
    if not keys:
        raise KeyringError(
            f"public key {path}: no key in it; the sealer's host shows it: syncward audit key show"
        )
    return keys


def _signature(key: _SigningKey, text: str) -> str:
    raw = key.public.hash + key.private.sign(text.encode())
    return f"— {key.public.name} {b64encode(raw).decode()}\n"


def _new_entry(name: str) -> dict[str, Any]:
    raw = Ed25519PrivateKey.generate().private_bytes_raw()
    return {
        "name": name,
        "state": "active",
        "created_at": datetime.now(UTC).isoformat(),
        "private": b64encode(raw).decode(),
    }


def _read(path: Path) -> list[dict[str, Any]]:
    content = private.read(path, "signing key", "make one with: syncward audit key init")
    try:
        document = json.loads(content)
        entries: list[dict[str, Any]] = document["keys"]
        known = document["format"] == _FORMAT
        keys = [_signing_key(entry) for entry in entries]
    except (ValueError, KeyError, TypeError):
        known, keys, entries = False, [], []
    if not known or len(keys) not in {1, 2}:  # two while one is being replaced
        raise KeyringError(
            f"signing key {path}: not a signing key's file; restore it from its backup"
        )
    return entries


def _signing_key(entry: dict[str, Any]) -> _SigningKey:
    key = Ed25519PrivateKey.from_private_bytes(b64decode(entry["private"], validate=True))
    if not isinstance(entry["name"], str):
        raise TypeError("not a name")
    public = PublicKey(entry["name"], key.public_key().public_bytes_raw())
    if PublicKey.parse(public.line) != public or entry["state"] not in get_args(KeyState):
        raise ValueError("not a name that a note can hold, or a state of the future")
    return _SigningKey(public, key, entry["state"])


def _create(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise KeyringError(
            f"signing key {path}: exists already; keys are never overwritten"
        ) from None
    except OSError as error:
        raise KeyringError(f"signing key {path}: cannot be written: {error.strerror}") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask is
        json.dump({"format": _FORMAT, "keys": list(entries)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    fresh = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        _create(fresh, entries)
        fresh.replace(path)
        _settle(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def _settle(directory: Path) -> None:
    """Make what was created or renamed survive a power failure: it may have signed by then."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
