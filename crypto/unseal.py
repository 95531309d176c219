"""Unseal credentials. Only workers/ (and the self-test) may import this module."""

import hmac
from uuid import UUID

from cryptography.exceptions import InvalidTag

from crypto.envelope import CHUNK, TAG, Context, derive, take_apart
from crypto.errors import CryptoError, UnsealError
from crypto.roots import Keyring, WrapContext, Wrapped


def unseal_credential(
    keyring: Keyring, wrapped: Wrapped, wrap: WrapContext, envelope: bytes, context: Context
) -> bytes:
    """Open a stored credential with this host's keyring; UnsealError if anything does not fit."""
    return unseal(unwrap(keyring, wrapped, wrap), wrap.dek_id, envelope, context)


def unwrap(keyring: Keyring, wrapped: Wrapped, context: WrapContext) -> bytes:
    """Open one wrapped data key; UnsealError, or UnknownRoot if its root is not here yet."""
    (found,) = keyring.unwrap_many([(wrapped, context)])
    if isinstance(found, CryptoError):
        raise found
    return found


def unseal(dek: bytes, dek_id: UUID, envelope: bytes, context: Context) -> bytes:
    """Open an envelope in its context; UnsealError and no partial plaintext otherwise."""
    parts = take_apart(envelope)
    full, last = divmod(len(parts.body), CHUNK + TAG)
    if last < TAG or parts.dek_id != dek_id:
        raise UnsealError
    keys = derive(dek, dek_id, parts.salt, context)
    if not hmac.compare_digest(keys.commitment, parts.commitment):
        raise UnsealError
    size = CHUNK + TAG
    try:
        return b"".join(
            keys.cipher.decrypt(keys.nonce(n), parts.body[n * size : (n + 1) * size], None)
            for n in range(full + 1)
        )
    except InvalidTag:
        raise UnsealError from None
