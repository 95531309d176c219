"""Seal: anyone may store a secret. Opening one is another module (crypto/unseal.py)."""

import os
from uuid import UUID

from crypto.envelope import CHUNK, SALT, Context, MessageKeys, derive, header
from schemas.ids import new_id


def new_dek() -> tuple[UUID, bytes]:
    """Return a new data key and its id. One data key per stored credential version."""
    return new_id(), os.urandom(32)


def seal(dek: bytes, dek_id: UUID, plaintext: bytes, context: Context) -> bytes:
    """Return the envelope of `plaintext`: it opens with this key in this context, nowhere else."""
    salt = os.urandom(SALT)
    return seal_with_salt(dek, dek_id, plaintext, context, salt=salt)


def seal_with_salt(
    dek: bytes, dek_id: UUID, plaintext: bytes, context: Context, *, salt: bytes
) -> bytes:
    """Seal with a given salt: only for known answers. A repeated salt breaks the encryption."""
    keys = derive(dek, dek_id, salt, context)
    return header(dek_id) + salt + keys.commitment + seal_body(keys, plaintext)


def seal_body(keys: MessageKeys, plaintext: bytes) -> bytes:
    """Return the chunks of a message, each with its tag."""
    # One more chunk than full ones: the short last chunk makes a cut envelope detectable.
    return b"".join(
        keys.cipher.encrypt(keys.nonce(n), plaintext[n * CHUNK : (n + 1) * CHUNK], None)
        for n in range(len(plaintext) // CHUNK + 1)
    )
