"""The envelope a second time, written from docs/envelope.md with HMAC and the bare cipher only."""

import hmac
import struct
from uuid import UUID

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

PIECE = 16 * 1024
Place = tuple[UUID, str, UUID, str, int]


def _derive(dek: bytes, front: bytes, salt: bytes, place: Place) -> tuple[bytes, bytes, bytes]:
    account, kind, resource, field, version = place
    parts = [account.bytes, kind.encode(), resource.bytes, field.encode(), b"%d" % version]
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + front
    info += b"".join(struct.pack(">H", len(part)) + part for part in parts)
    output, block = b"", b""
    for counter in (1, 2):
        block = hmac.digest(dek, block + info + bytes([counter]), "sha512")
        output += block
    return output[:32], output[32:44], output[44:76]


def _iv(nonce: bytes, number: int) -> bytes:
    return (int.from_bytes(nonce, "big") ^ number).to_bytes(12, "big")


def seal(dek: bytes, dek_id: UUID, salt: bytes, place: Place, plaintext: bytes) -> bytes:
    """Return an envelope; the salt is the caller's."""
    front = b"SY\x01\x01" + dek_id.bytes + b"\x01"
    key, nonce, commitment = _derive(dek, front, salt, place)
    envelope, number = front + salt + commitment, 0
    while True:
        piece, plaintext = plaintext[:PIECE], plaintext[PIECE:]
        encryptor = Cipher(AES(key), GCM(_iv(nonce, number))).encryptor()
        envelope += encryptor.update(piece) + encryptor.finalize() + encryptor.tag
        number += 1
        if len(piece) < PIECE:
            return envelope


def opened(dek: bytes, envelope: bytes, place: Place) -> bytes:
    """Return the plaintext of a good envelope; AssertionError or InvalidTag otherwise."""
    assert envelope[:4] == b"SY\x01\x01"
    key, nonce, commitment = _derive(dek, envelope[:21], envelope[21:45], place)
    assert commitment == envelope[45:77]
    plaintext, body, number = b"", envelope[77:], 0
    while True:
        chunk, body = body[: PIECE + 16], body[PIECE + 16 :]
        decryptor = Cipher(AES(key), GCM(_iv(nonce, number), chunk[-16:])).decryptor()
        plaintext += decryptor.update(chunk[:-16]) + decryptor.finalize()
        number += 1
        if len(chunk) < PIECE + 16:
            assert not body
            return plaintext
