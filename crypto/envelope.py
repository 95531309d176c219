"""The envelope's bytes: header, context, and the keys derived from both. docs/envelope.md draws it.

Construction: C2SP chunked encryption (HKDF-Expand-SHA-512 per message into key, nonce and a
32-byte commitment; AES-256-GCM in 16 KiB chunks, the last one short), with our header in front.
"""

import struct
from dataclasses import dataclass
from uuid import UUID

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from crypto.errors import UnsealError

MAGIC = b"SY"
FORMAT = 1
SUITE = 1  # HKDF-SHA-512, AES-256-GCM
CONTEXT_LAYOUT = 1

KEY = 32
CHUNK = 16 * 1024
TAG = 16
SALT = 24
COMMITMENT = 32
HEADER = len(MAGIC) + 2 + 16 + 1
BODY = HEADER + SALT + COMMITMENT
SHORTEST = BODY + TAG

_DIGEST = hashes.SHA512()
_LABEL = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\x00"


@dataclass(frozen=True, slots=True)
class Context:
    """Where an envelope belongs. The reader builds it from where it found the row."""

    account_id: UUID
    kind: str
    resource_id: UUID
    field: str
    version: int

    def encoded(self) -> bytes:
        """Return the unambiguous bytes that go into the key derivation."""
        parts = (
            self.account_id.bytes,
            self.kind.encode(),
            self.resource_id.bytes,
            self.field.encode(),
            str(self.version).encode(),
        )
        return b"".join(map(length_prefixed, parts))


@dataclass(frozen=True, slots=True)
class Parts:
    """An envelope taken apart, nothing of it trusted yet."""

    dek_id: UUID
    salt: bytes
    commitment: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class MessageKeys:
    """What one message is encrypted with; never used for a second one."""

    cipher: AESGCM
    base_nonce: bytes
    commitment: bytes

    def nonce(self, chunk: int) -> bytes:
        """Return the nonce of a chunk: the base XOR its number."""
        return (int.from_bytes(self.base_nonce, "big") ^ chunk).to_bytes(12, "big")


def length_prefixed(part: bytes) -> bytes:
    """Return the part behind its length as an unsigned 16-bit number."""
    return struct.pack(">H", len(part)) + part


def header(dek_id: UUID) -> bytes:
    """Return the 21 clear bytes in front of every envelope."""
    return MAGIC + bytes((FORMAT, SUITE)) + dek_id.bytes + bytes((CONTEXT_LAYOUT,))


def derive(dek: bytes, dek_id: UUID, salt: bytes, context: Context) -> MessageKeys:
    """Derive a message's keys from the data key, the salt and where the envelope belongs."""
    return message_keys(dek, salt, header(dek_id) + context.encoded())


def message_keys(
    dek: bytes, salt: bytes, bound: bytes, digest: hashes.HashAlgorithm = _DIGEST
) -> MessageKeys:
    """Derive key, nonce and commitment of one message (RFC 5869 expand), bound to these bytes.

    Another digest is for C2SP's published vectors only, which are of the SHA-256 form.
    """
    if len(dek) != KEY:
        raise UnsealError
    info = _LABEL + salt + bound
    output = HKDFExpand(digest, KEY + 12 + COMMITMENT, info).derive(dek)
    return MessageKeys(AESGCM(output[:KEY]), output[KEY : KEY + 12], output[KEY + 12 :])


def take_apart(envelope: bytes) -> Parts:
    """Split an envelope; UnsealError for anything that is not exactly our format.

    There is no other format: whatever does not begin like an envelope is refused, not passed on.
    """
    if len(envelope) < SHORTEST or envelope[:4] != MAGIC + bytes((FORMAT, SUITE)):
        raise UnsealError
    dek_id = UUID(bytes=envelope[4:20])
    if envelope[20] != CONTEXT_LAYOUT:
        raise UnsealError
    return Parts(
        dek_id=dek_id,
        salt=envelope[HEADER : HEADER + SALT],
        commitment=envelope[HEADER + SALT : BODY],
        body=envelope[BODY:],
    )
