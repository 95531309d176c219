"""A credential, sealed: by an operator's command, or by the worker that has renewed it."""

from dataclasses import dataclass
from uuid import UUID

from crypto.envelope import Context
from crypto.fingerprint import fingerprint
from crypto.roots import Keyring, WrapContext, Wrapped
from crypto.seal import new_dek, seal
from schemas.sealed_secret import SealedSecret
from schemas.secret import SHORTEST_KNOWN, Secret


@dataclass(frozen=True, slots=True, repr=False)
class WrappedKey:
    """A data key that nothing is sealed with yet, wrapped for workers only."""

    account_id: UUID
    dek_id: UUID
    dek: bytes
    wrapped: Wrapped


def new_key(keyring: Keyring, account_id: UUID) -> WrappedKey:
    """Make a data key for one credential: the KMS is asked now, so it may be away afterwards."""
    dek_id, dek = new_dek()
    context = WrapContext(account_id=account_id, purpose="credentials", dek_id=dek_id)
    return WrappedKey(account_id, dek_id, dek, keyring.wrap("credentials", dek, context))


def seal_with(
    key: WrappedKey, *, resource_id: UUID, field: str, version: int, secret: Secret
) -> SealedSecret:
    """Seal one version of one field. A key seals one of them."""
    context = Context(
        account_id=key.account_id,
        kind="resource",
        resource_id=resource_id,
        field=field,
        version=version,
    )
    plaintext = secret.reveal().encode()
    return SealedSecret(
        field=field,
        version=version,
        envelope=seal(key.dek, key.dek_id, plaintext, context),
        fingerprint=fingerprint(plaintext),
        dek_id=key.dek_id,
        root_id=key.wrapped.root_id,
        wrapped=key.wrapped.blob,
        short=len(secret.reveal()) < SHORTEST_KNOWN,
    )
