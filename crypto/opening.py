"""The one place where envelopes are opened. Only the modules that say whose may import it.

crypto/unseal.py opens credentials (for workers), crypto/records.py opens records (for operators).
"""

import hmac
from collections.abc import Sequence
from uuid import UUID

from cryptography.exceptions import InvalidTag

from crypto.envelope import CHUNK, TAG, Context, MessageKeys, derive, take_apart
from crypto.errors import CryptoError, UnsealError
from crypto.roots import Purpose, Sealed, Unwraps

SEALED_CHUNK = CHUNK + TAG


def open_all(keys: Unwraps, purpose: Purpose, items: Sequence[Sealed]) -> list[bytes | CryptoError]:
    """Open envelopes with one unwrapping of all their keys; an item that fails is its error.

    Refuses keys of another purpose or account before anything is unwrapped.
    """
    right = [
        item.wrap.purpose == purpose and item.wrap.account_id == item.context.account_id
        for item in items
    ]
    wanted = [(i.wrapped, i.wrap) for i, fits in zip(items, right, strict=True) if fits]
    deks = iter(keys.unwrap_many(wanted) if wanted else ())
    return [
        _opened(next(deks), item) if fits else UnsealError()
        for item, fits in zip(items, right, strict=True)
    ]


def _opened(dek: bytes | CryptoError, item: Sealed) -> bytes | CryptoError:
    if isinstance(dek, CryptoError):
        return dek
    try:
        return open_envelope(dek, item.wrap.dek_id, item.envelope, item.context)
    except UnsealError as error:
        return error


def open_envelope(dek: bytes, dek_id: UUID, envelope: bytes, context: Context) -> bytes:
    """Open an envelope in its context; UnsealError and no partial plaintext otherwise."""
    parts = take_apart(envelope)
    if parts.dek_id != dek_id:
        raise UnsealError
    return open_body(derive(dek, dek_id, parts.salt, context), parts.commitment, parts.body)


def open_body(keys: MessageKeys, commitment: bytes, body: bytes) -> bytes:
    """Open the chunks of a message after the commitment to its key and context."""
    check_commitment(keys, commitment)
    full, last = divmod(len(body), SEALED_CHUNK)
    if last < TAG:
        raise UnsealError
    return b"".join(
        open_chunk(keys, n, body[n * SEALED_CHUNK : (n + 1) * SEALED_CHUNK])
        for n in range(full + 1)
    )


def check_commitment(keys: MessageKeys, commitment: bytes) -> None:
    """Raise UnsealError unless the message was sealed with this key in this context."""
    if not hmac.compare_digest(keys.commitment, commitment):
        raise UnsealError


def open_chunk(keys: MessageKeys, number: int, chunk: bytes | memoryview) -> bytes:
    """Open one chunk in its place; UnsealError otherwise."""
    try:
        return keys.cipher.decrypt(keys.nonce(number), chunk, None)
    except InvalidTag:
        raise UnsealError from None
