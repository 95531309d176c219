"""What workers do for the keys, beside runs: follow new roots, wrap again, seal again, forget.

What is to be done stands in the rows, so that any number of workers share it, each may be killed at
any moment, and nothing has to be resumed. docs/rotation.md tells the operator's side.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Event, Thread
from time import monotonic
from uuid import UUID

from sqlalchemy import Connection

from crypto.canary import check_canary
from crypto.envelope import Context
from crypto.errors import CryptoError, KeyringError, UnsealError
from crypto.keyring import PURPOSES, Keyring, Purpose, WrapContext, Wrapped
from crypto.roots import Sealed
from crypto.seal import new_dek, seal
from crypto.unseal import unseal_credential, unseal_credentials
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import StartRefused, SyncwardError
from schemas.plans import PLANS
from schemas.settings import Settings
from storage import audit, keystore, reseal
from storage.engine import transaction
from storage.keystore import Keystore, Root, RootOffer, StoredKey
from storage.reseal import SealedCredential
from workers.metrics import KEYS_AGE, KEYS_PENDING

logger = logging.getLogger(__name__)

#: Seconds between two looks at the keyring and the keystore.
LOOK_EVERY_S = 5.0
#: Seconds between two looks at what may be forgotten, and at all counts.
FORGET_EVERY_S = 3_600.0
COUNT_EVERY_S = 60.0
#: Keys in one transaction: wrapped again by calculation, sealed again with rows behind each.
REWRAP_BATCH = 500
RESEAL_BATCH = 50
#: Seconds to breathe between two batches, so that runs do not wait for them.
BREATHE_S = 0.005


@dataclass(slots=True)
class KeyUpkeep:
    """One thread of a worker process. `look()` is one round, for tests and for the thread."""

    keyring: Keyring
    store: Keystore
    settings: Settings
    principal: Principal
    _stop: Event = field(default_factory=Event)
    _unopened: list[UUID] = field(default_factory=list)
    _forgot_at: float | None = None
    _counted_at: float | None = None
    _thread: Thread | None = None

    def start(self) -> None:
        """Go on in a thread until `stop`."""
        self._thread = Thread(target=self._loop, name="key-upkeep", daemon=True)
        self._thread.start()

    def ask_to_stop(self) -> None:
        """End the thread after the batch that it is at; whatever is left, others go on with."""
        self._stop.set()

    def _loop(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            try:
                self.look()
            except SyncwardError as error:  # a database or a KMS that is away: the next round
                logger.warning("key_upkeep_failed", extra={"reason": error.public})

    def look(self) -> None:
        """Do what there is to do now, all of it."""
        try:
            if self.keyring.reload():
                logger.info("keyring_reloaded")
        except KeyringError as error:  # the roots of before go on
            logger.warning("keyring_not_reloaded", extra={"reason": error.public})
        with self.store.transaction() as keys:
            roots = keystore.roots(keys)
        for root in roots:
            if root.state == "active":
                self.keyring.prefer(root.root_id)
        self._rewrap(roots)
        self._reseal()
        self._count(roots)
        self._forget()

    # ── roots: data keys are wrapped again ───────────────────────────────────────────────────

    def _rewrap(self, roots: Sequence[Root]) -> None:
        """Wrap by the active root of credentials what others wrap, if this host has them all."""
        active = _active(roots, "credentials")
        if active is None or not self.keyring.holds(active.root_id):
            return
        if self.keyring.active_root("credentials") != active.root_id:
            return
        for former in roots:
            if former.purpose == "credentials" and former.state == "decrypt_only":
                self._rewrap_all(former, active)

    def _rewrap_all(self, former: Root, active: Root) -> None:
        if former.unused_since is not None or not self.keyring.holds(former.root_id):
            return
        done = 0
        while not self._stop.is_set():
            count = self._rewrap_batch(former, active)
            if count is None:
                break
            done += count
            self._stop.wait(BREATHE_S)
        if done:
            logger.info("keys_rewrapped", extra={"keys": done, "root": str(active.root_id)})

    def _rewrap_batch(self, former: Root, active: Root) -> int | None:
        """Wrap one batch again; None if nothing was left, or nothing could be."""
        with self.store.transaction() as keys:
            found = keystore.stale(keys, "credentials", [former.root_id], REWRAP_BATCH)
            if not found:
                keystore.note_unused(keys, former.root_id)
                return None
            wrapped = self.keyring.rewrap_many([_item(key, "credentials") for key in found])
            changed = [
                (key, new.blob)
                for key, new in zip(found, wrapped, strict=True)
                if isinstance(new, Wrapped) and new.root_id == active.root_id
            ]
            if not changed:
                logger.error("keys_not_rewrapped", extra={"root": str(former.root_id)})
                return None
            count = keystore.rewrap(keys, changed, active.root_id)
            self._record(keys, _rewrapped(active.root_id, count, self.principal))
            return count

    def _record(self, keys: Connection, event: AuditEvent) -> None:
        """Append in the same transaction; before it, where the keystore is another database."""
        if self.store.separate:
            with transaction(self.store.control) as tx:
                audit.append(tx, event)
        else:
            audit.append(keys, event)

    # ── data keys: what they sealed is sealed again ──────────────────────────────────────────

    def _reseal(self) -> None:
        done = 0
        while not self._stop.is_set():
            count = self._reseal_batch()
            if count is None:
                break
            done += count
            self._stop.wait(BREATHE_S)
        if done:
            logger.info("credentials_resealed", extra={"credentials": done})

    def _reseal_batch(self) -> int | None:
        """Seal again what one batch of keys sealed; None if nothing was left.

        The keys' rows stay locked meanwhile, so that no other worker takes the same ones.
        """
        with self.store.transaction() as keys:
            found = keystore.to_replace(keys, but=self._unopened, batch=RESEAL_BATCH)
            if not found:
                return None
            with transaction(self.store.control) as tx:  # committed before anything is opened
                sealed = reseal.take(tx, [key.dek_id for key in found], self.principal)
            opened = self._opened(found, sealed)
            done = sum(self._seal_again(one, plaintext) for one, plaintext in opened)
            refused = {one.dek_id for one in sealed} - {one.dek_id for one, _ in opened}
            self._unopened.extend(refused)
            keystore.mark_unused(keys, [k.dek_id for k in found if k.dek_id not in refused])
            return done

    def _opened(
        self, found: Sequence[StoredKey], sealed: Sequence[SealedCredential]
    ) -> list[tuple[SealedCredential, bytes]]:
        """Open what opens; what does not leaves an event and stays as it is."""
        by_id = {key.dek_id: key for key in found}
        answers = unseal_credentials(
            self.keyring,
            [
                Sealed(*_item(by_id[one.dek_id], "credentials"), one.envelope, _context(one))
                for one in sealed
            ],
        )
        opened = []
        for one, answer in zip(sealed, answers, strict=True):
            if isinstance(answer, CryptoError):
                self._refuse(one, answer)
            else:
                opened.append((one, answer))
        return opened

    def _refuse(self, one: SealedCredential, error: CryptoError) -> None:
        logger.error("credential_not_resealed", extra={"resource": str(one.resource_id)})
        if isinstance(error, UnsealError):
            with transaction(self.store.control) as tx:
                reseal.refused(tx, one, self.principal)

    def _seal_again(self, one: SealedCredential, plaintext: bytes) -> bool:
        """Give a credential a new data key; whoever changed it meanwhile has won."""
        dek_id, dek = new_dek()
        context = WrapContext(one.account_id, "credentials", dek_id)
        wrapped = self.keyring.wrap("credentials", dek, context)
        envelope = seal(dek, dek_id, plaintext, _context(one))
        if unseal_credential(self.keyring, wrapped, context, envelope, _context(one)) != plaintext:
            raise RuntimeError("what was just sealed does not open")
        key = StoredKey(dek_id, one.account_id, wrapped.root_id, wrapped.blob)
        offer = RootOffer(wrapped.root_id, "credentials", self.keyring.scheme, _no_first_root)
        with transaction(self.store.control) as tx, self.store.beside(tx) as keys:
            keystore.keep(tx, keys, key, offer, self.principal)
            if not reseal.put(tx, one, envelope, self.principal):
                keystore.shred(keys, [dek_id])
                return False
        return True

    # ── counts, and what nobody needs any more ───────────────────────────────────────────────

    def _count(self, roots: Sequence[Root]) -> None:
        if not _due(self._counted_at, COUNT_EVERY_S):
            return
        self._counted_at = monotonic()
        former = [
            r.root_id for r in roots if r.purpose == "credentials" and r.state == "decrypt_only"
        ]
        with self.store.transaction() as keys:
            left = keystore.pending(keys, former)
        KEYS_PENDING.labels("rewrap").set(left.rewrap)
        KEYS_PENDING.labels("reseal").set(left.replace)
        for purpose in PURPOSES:
            active = _active(roots, purpose)
            since = active and (active.activated_at or active.created_at)
            age = (datetime.now(UTC) - since).total_seconds() if since else 0.0
            KEYS_AGE.labels(purpose).set(max(0.0, age))

    def _forget(self) -> None:
        if not _due(self._forgot_at, FORGET_EVERY_S):
            return
        self._forgot_at = monotonic()
        backups = (
            self.settings.keystore_backup_keep if self.store.separate else self.settings.backup_keep
        )
        longest = timedelta(days=max(plan.retention_days for plan in PLANS.values()))
        with self.store.transaction() as keys:
            gone = keystore.forget(
                keys,
                backups=max(self.settings.backup_keep, backups),
                records=longest + timedelta(days=62),
            )
            if gone:
                self._record(keys, _forgotten(gone, self.principal))


def check_roots(keyring: Keyring, store: Keystore) -> None:
    """Refuse to start with the keyring of another installation, or one that lacks the active root.

    A root's canary opens only where the root is. Raises what a database that is away raises.
    """
    with store.transaction() as keys:
        roots = keystore.roots(keys)
    known = {status.root_id for status in keyring.status()}
    wrong = []
    for root in roots:
        if root.state == "active" and root.root_id not in known:
            wrong.append(
                f"keyring: it lacks the active {root.purpose} root {root.root_id} of this "
                "installation; copy the keyring file that is in use (docs/rotation.md)"
            )
        purpose: Purpose = "credentials" if root.purpose == "credentials" else "records"
        if (
            root.state != "retired"
            and keyring.holds(root.root_id)
            and not check_canary(keyring, purpose, root.root_id, root.canary)
        ):
            wrong.append(
                f"keyring: it does not open what root {root.root_id} sealed in this keystore; "
                "restore the keyring file, or the keystore, from its backup"
            )
    if wrong:
        raise StartRefused(wrong)


def _active(roots: Sequence[Root], purpose: str) -> Root | None:
    return next((r for r in roots if r.purpose == purpose and r.state == "active"), None)


def _item(key: StoredKey, purpose: str) -> tuple[Wrapped, WrapContext]:
    return Wrapped(key.root_id, key.wrapped), WrapContext(key.account_id, purpose, key.dek_id)


def _context(one: SealedCredential) -> Context:
    return Context(one.account_id, "resource", one.resource_id, one.field, one.version)


def _no_first_root() -> bytes:
    raise RuntimeError("a credential that exists was sealed by a root that is known")


def _due(at: float | None, every: float) -> bool:
    return at is None or monotonic() - at >= every


def _rewrapped(root_id: UUID, count: int, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.KEYS_REWRAPPED, TargetKind.ROOT, root_id, principal, detail={"keys": count}
    )


def _forgotten(count: int, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.KEYS_FORGOTTEN,
        TargetKind.INSTANCE,
        audit.INSTANCE_ID,
        principal,
        detail={"keys": count},
    )
