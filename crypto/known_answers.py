"""Answers that everybody agrees on: what the primitives below us must say on this machine.

The tests run whole published collections; these few run at every start.
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from crypto.errors import SelfTestError

#: NIST CAVP gcmEncryptExtIV256: key, nonce, plaintext, further data, ciphertext with tag.
_GCM = (
    (
        "b52c505a37d78eda5dd34f20c22540ea1b58963cf8e5bf8ffa85f9f2492505b4",
        "516c33929df5a3284ff463d7",
        "",
        "",
        "bdc1ac884d332457a1d2664f168c76f0",
    ),
    (
        "31bdadd96698c204aa9ce1448ea94ae1fb4a9a0b3c9d773b51bb1822666b8f22",
        "0d18e06c7c725ac9e362e1ce",
        "2db5168e932556f8089a0622981d017d",
        "",
        "fa4362189661d163fcd6a56d8bf0405ad636ac1bbedd5cc3ee727dc2ab4a9489",
    ),
    (
        "463b412911767d57a0b33969e674ffe7845d313b88c6fe312f3d724be68e1fca",
        "611ce6f9a6880750de7da6cb",
        (
            "e7d1dcf668e2876861940e012fe52a98dacbd78ab63c08842cc9801ea581682a"
            "d54af0c34d0d7f6f59e8ee0bf4900e0fd85042"
        ),
        (
            "0a682fbc6192e1b47a5e0868787ffdafe5a50cead3575849990cdd2ea9b35977"
            "49403efb4a56684f0c6bde352d4aeec5"
        ),
        (
            "8886e196010cb3849d9c1a182abe1eeab0a5f3ca423c3669a4a8703c0f146e8e"
            "956fb122e0d721b869d2b6fcd4216d7d4d37582469cecd70fd98fec9264f71df1aee9a"
        ),
    ),
)
#: RFC 5869, test case 1: key material, salt, info, output.
_HKDF = (
    "0b" * 22,
    "000102030405060708090a0b0c",
    "f0f1f2f3f4f5f6f7f8f9",
    "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
)
#: RFC 8032, section 7.1, test 2: private key, message, signature.
_ED25519 = (
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
    "72",
    (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    ),
)


def check() -> None:
    """Raise SelfTestError unless AES-256-GCM, HKDF and Ed25519 answer as published."""
    for key, nonce, plain, further, sealed in (map(bytes.fromhex, answer) for answer in _GCM):
        cipher = AESGCM(key)
        if cipher.encrypt(nonce, plain, further) != sealed or (
            cipher.decrypt(nonce, sealed, further) != plain
        ):
            raise _wrong("AES-256-GCM")
    material, salt, info, output = map(bytes.fromhex, _HKDF)
    if HKDF(hashes.SHA256(), len(output), salt, info).derive(material) != output:
        raise _wrong("HKDF")
    private, message, signature = map(bytes.fromhex, _ED25519)
    signer = Ed25519PrivateKey.from_private_bytes(private)
    if signer.sign(message) != signature:
        raise _wrong("Ed25519")
    try:
        signer.public_key().verify(signature, message + b"x")
    except InvalidSignature:
        return
    raise _wrong("Ed25519")


def _wrong(name: str) -> SelfTestError:
    return SelfTestError(
        f"self-test: a known answer of {name} is wrong on this machine; reinstall Syncward"
    )
