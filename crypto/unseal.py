"""Unseal credentials. Only workers/ may import this module."""

from collections.abc import Sequence

from crypto.envelope import Context
from crypto.errors import CryptoError
from crypto.opening import open_all
from crypto.roots import Sealed, Unwraps, WrapContext, Wrapped


def unseal_credentials(keys: Unwraps, items: Sequence[Sealed]) -> list[bytes | CryptoError]:
    """Open stored credentials with one unwrapping; one that does not open stands as its error.

    `keys` is the keyring, or the KeyCache in front of it.
    """
    return open_all(keys, "credentials", items)


def unseal_credential(
    keys: Unwraps, wrapped: Wrapped, wrap: WrapContext, envelope: bytes, context: Context
) -> bytes:
    """Open one stored credential; UnsealError, or UnknownRoot if its root is not here yet."""
    (found,) = unseal_credentials(keys, [Sealed(wrapped, wrap, envelope, context)])
    if isinstance(found, CryptoError):
        raise found
    return found
