"""The primitives below us, and our construction, answer as NIST, IETF and C2SP published."""

import hashlib

import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from crypto.envelope import COMMITMENT, SALT, message_keys
from crypto.errors import UnsealError
from crypto.opening import open_body
from crypto.seal import seal_body
from tests import vectors


def test_nists_decryptions_come_out_or_fail_as_published():
    right = wrong = 0
    for case in vectors.nist_gcm("gcmDecrypt256.rsp"):
        sealed = case["CT"] + case["Tag"]
        if len(case["Tag"]) != 16:
            continue
        if case["PT"] is None:
            with pytest.raises(InvalidTag):
                AESGCM(case["Key"]).decrypt(case["IV"], sealed, case["AAD"])
            wrong += 1
        else:
            assert AESGCM(case["Key"]).decrypt(case["IV"], sealed, case["AAD"]) == case["PT"]
            right += 1
    assert right > 150
    assert wrong > 150


def test_nists_encryptions_come_out_as_published():
    cases = [c for c in vectors.nist_gcm("gcmEncryptExtIV256.rsp") if len(c["Tag"]) == 16]
    for case in cases:
        found = AESGCM(case["Key"]).encrypt(case["IV"], case["PT"], case["AAD"])
        assert found == case["CT"] + case["Tag"]
    assert len(cases) > 300


def test_wycheproofs_aes_gcm_is_accepted_and_refused_as_published():
    counts = {"valid": 0, "invalid": 0}
    for group, test in vectors.wycheproof("Cipher/wycheproof/aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 96, 128):
            continue
        key, iv, aad, plain, sealed, tag = (
            bytes.fromhex(test[k]) for k in ("key", "iv", "aad", "msg", "ct", "tag")
        )
        if test["result"] == "valid":
            assert AESGCM(key).decrypt(iv, sealed + tag, aad) == plain
        else:
            with pytest.raises(InvalidTag):
                AESGCM(key).decrypt(iv, sealed + tag, aad)
        counts[test["result"]] += 1
    assert counts["valid"] >= 39
    assert counts["invalid"] >= 20


def test_rfc_5869_is_kept():
    cases = list(vectors.rfc_5869())
    for case in cases:
        found = HKDF(hashes.SHA256(), len(case["OKM"]), case["salt"], case["info"])
        assert found.derive(case["IKM"]) == case["OKM"]
    assert len(cases) >= 2


@pytest.mark.parametrize(
    ("name", "algorithm"), [("sha256", hashes.SHA256()), ("sha512", hashes.SHA512())]
)
def test_wycheproofs_hkdf_is_kept(name, algorithm):
    counts = {"valid": 0, "invalid": 0}
    for _, test in vectors.wycheproof(f"Protocol/wycheproof/hkdf_{name}_test.json"):
        material, salt, info, okm = (bytes.fromhex(test[k]) for k in ("ikm", "salt", "info", "okm"))
        if test["result"] == "valid":
            assert HKDF(algorithm, test["size"], salt, info).derive(material) == okm
        else:
            with pytest.raises(ValueError, match=r"[Ll]ength|derive"):
                HKDF(algorithm, test["size"], salt, info)
        counts[test["result"]] += 1
    assert counts["valid"] >= 80
    assert counts["invalid"] >= 3


def test_ed25519_signs_as_its_authors_published():
    cases = list(vectors.ed25519())[::8]
    for private, message, signature in cases:
        assert Ed25519PrivateKey.from_private_bytes(private).sign(message) == signature
    assert len(cases) >= 100


def test_wycheproofs_ed25519_is_accepted_and_refused_as_published():
    counts = {"valid": 0, "invalid": 0}
    for group, test in vectors.wycheproof("Signature/wycheproof/ed25519_test.json"):
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(group["publicKey"]["pk"]))
        message, signature = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
        if test["result"] == "invalid":
            with pytest.raises(InvalidSignature):
                public.verify(signature, message)
        else:
            public.verify(signature, message)
        counts[test["result"] if test["result"] == "invalid" else "valid"] += 1
    assert counts["valid"] >= 80
    assert counts["invalid"] >= 60


def theirs(key, salt, bound):
    return message_keys(bytes.fromhex(key), salt, bound, hashes.SHA256())


CHUNKED = list(vectors.chunked_encryption())


@pytest.mark.parametrize("vector", CHUNKED, ids=lambda v: v["name"])
def test_c2sps_vectors_of_our_construction(vector):
    """Ours puts a header in front and binds it; below that the bytes are theirs."""
    raw, bound = vector["raw"], vector["context"].encode()
    salt, commitment, body = (
        raw[:SALT], raw[SALT : SALT + COMMITMENT], raw[SALT + COMMITMENT :]
    )  # fmt: skip
    if vector["expect"] == "failure":
        with pytest.raises(UnsealError):
            open_body(theirs(vector["key"], salt, bound), commitment, body)
        return
    keys = theirs(vector["key"], salt, bound)
    assert keys.base_nonce.hex() == vector["base_nonce"]
    plaintext = open_body(keys, commitment, body)
    assert len(plaintext) == vector["payload_length"]
    assert hashlib.sha256(plaintext).hexdigest() == vector["payload_sha256"]
    assert keys.commitment + seal_body(keys, plaintext) == commitment + body


def test_there_are_c2sp_vectors_of_both_kinds():
    assert sum(v["expect"] == "success" for v in CHUNKED) >= 8
    assert sum(v["expect"] == "failure" for v in CHUNKED) >= 15
