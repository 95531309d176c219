"""The key of an account's pseudonyms: found in the keystore and opened, or made at its first use.

An account has one for as long as it lives: tokens of different runs and workers must match. It is
wrapped by the root of credentials, which workers unwrap, and goes when the account is shredded.
"""

from dataclasses import dataclass
from typing import Self
from uuid import UUID

from sqlalchemy import Engine

from crypto.canary import make_canary
from crypto.errors import CryptoError, UnknownRoot, UnsealError
from crypto.pseudonyms import Pseudonyms
from crypto.roots import Keyring, WrapContext, Wrapped
from crypto.seal import new_dek
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError
from storage import audit, keystore
from storage.engine import transaction
from storage.keystore import Keystore, RootOffer, StoredKey
from workers.attempt import Dependencies
from workers.metrics import DECRYPTS


@dataclass(frozen=True, slots=True)
class PseudonymKeys:
    """Gives a run what makes the tokens of its account."""

    engine: Engine
    keyring: Keyring
    keystore: Keystore
    principal: Principal

    @classmethod
    def of_worker(cls, deps: Dependencies) -> Self:
        """Return those of a worker process."""
        return cls(deps.engine, deps.keyring, deps.keystore, deps.principal)

    def of(self, account_id: UUID) -> Pseudonyms:
        """Return the account's pseudonyms; SyncwardError while keystore or KMS are away.

        A key that does not open is never replaced: new tokens would match no old ones.
        """
        with self.keystore.transaction() as keys:
            stored = keystore.pseudonym_key(keys, account_id)
        if stored is None:
            stored = self._make(account_id)
        return Pseudonyms(self._opened(stored), str(stored.dek_id))

    def _opened(self, stored: StoredKey) -> bytes:
        answer = self._unwrapped(stored)
        if isinstance(answer, UnknownRoot) and self.keyring.reload():
            answer = self._unwrapped(stored)  # its root has just been brought
        if isinstance(answer, UnsealError):
            DECRYPTS.labels("pseudonyms", "refused").inc()
            raise ConfigError(
                "the account's key of pseudonyms cannot be opened with this worker's keyring; "
                "restore the keyring, or the keystore, from its backup (docs/keys.md)",
                code="wrong_keyring",
            )
        if isinstance(answer, CryptoError):
            raise answer
        DECRYPTS.labels("pseudonyms", "opened").inc()
        return answer

    def _unwrapped(self, stored: StoredKey) -> bytes | CryptoError:
        wrapped = Wrapped(stored.root_id, stored.wrapped)
        (answer,) = self.keyring.unwrap_many(
            [(wrapped, _context(stored.account_id, stored.dek_id))]
        )
        return answer

    def _make(self, account_id: UUID) -> StoredKey:
        """Keep a new key; return the account's, which another worker may have kept just before."""
        dek_id, dek = new_dek()
        with self.keystore.transaction() as keys:
            keystore.follow(keys, self.keyring.prefer)
        wrapped = self.keyring.wrap("credentials", dek, _context(account_id, dek_id))
        made = StoredKey(dek_id, account_id, wrapped.root_id, wrapped.blob)
        offer = RootOffer(
            wrapped.root_id, "credentials", self.keyring.scheme,
            lambda: make_canary(self.keyring, "credentials"),
        )  # fmt: skip
        with transaction(self.engine) as tx, self.keystore.beside(tx) as keys:
            keystore.keep(tx, keys, made, offer, self.principal, purpose="pseudonyms")
            stored = keystore.pseudonym_key(keys, account_id)
            if stored is None:
                raise RuntimeError("a key that was kept is there")
            if stored.dek_id == dek_id:
                audit.append(tx, _created(stored, self.principal))
        return stored


def _context(account_id: UUID, dek_id: UUID) -> WrapContext:
    return WrapContext(account_id, "credentials", dek_id)


def _created(stored: StoredKey, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.KEYS_CREATED,
        TargetKind.ACCOUNT,
        stored.account_id,
        principal,
        account_id=stored.account_id,
        detail={"purpose": "pseudonyms", "key": str(stored.dek_id)},
    )
