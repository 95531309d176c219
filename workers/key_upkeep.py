"""What workers do for the keys, beside runs: follow new roots, wrap again, seal again, forget.

What is to be done stands in the rows, so that any number of workers share it, each may be killed at
any moment, and nothing has to be resumed. docs/rotation.md tells the operator's side.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from threading import Event, Thread
from time import monotonic
from uuid import UUID

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
from storage import audit, keystore, reseal, rewrap
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
#: Keys in one batch.
RESEAL_BATCH = 50
FORGET_BATCH = 10_000
#: Seconds to breathe between two batches, so that runs do not wait for them.
BREATHE_S = 0.005


@dataclass(slots=True)
class KeyUpkeep:
    """One thread of a worker process. `look()` is one round, for tests and for the thread."""

    keyring: Keyring
    store: Keystore
    settings: Settings
    principal: Principal
    #: the roots that this host has; what heartbeats report, who must not wait for a KMS
    held: tuple[UUID, ...] = ()
    _stop: Event = field(default_factory=Event)
    _unopened: set[UUID] = field(default_factory=set)
    _forgot_at: float | None = None
    _counted_at: float | None = None
    _thread: Thread | None = None

    def begin(self) -> None:
        """Know what this host has and what is active, before anything is wrapped."""
        self._reload()
        self.follow()

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
        self._reload()
        roots = self.follow()
        self._rewrap(roots)
        self._reseal()
        self._count(roots)
        self._forget()

    def _reload(self) -> None:
        try:
            if self.keyring.reload():
                self._unopened.clear()
                logger.info("keyring_reloaded")
        except KeyringError as error:  # the roots of before go on
            logger.warning("keyring_not_reloaded", extra={"reason": error.public})
        self.held = tuple(one.root_id for one in self.keyring.status())

    def follow(self) -> Sequence[Root]:
        """Wrap by the roots that the keystore calls active, and return all."""
        with self.store.transaction() as keys:
            keystore.follow(keys, self.keyring.prefer)
            return keystore.roots(keys)

    # ── roots: data keys are wrapped again ───────────────────────────────────────────────────

    def _rewrap(self, roots: Sequence[Root]) -> None:
        """Wrap by the active root of credentials what others wrap, if this host has them all."""
        active = _active(roots, "credentials")
        if active is None or not self.keyring.holds(active.root_id):
            return
        for former in roots:
            if (
                former.purpose == "credentials"
                and former.state == "decrypt_only"
                and self.keyring.holds(former.root_id)
            ):
                self._rewrap_all(former, active)

    def _rewrap_all(self, former: Root, active: Root) -> None:
        done, bad = 0, set[UUID]()
        while not self._stop.is_set():
            count = rewrap.wrap_batch(self.store, former, self._rewrapped, bad, self.principal)
            if count is None:
                break
            done += count
            self._stop.wait(BREATHE_S)
        if bad:
            logger.error("keys_not_rewrapped", extra={"root": former.root_id, "keys": len(bad)})
        if done:
            logger.info("keys_rewrapped", extra={"keys": done, "root": active.root_id})

    def _rewrapped(self, found: Sequence[StoredKey]) -> list[StoredKey | None]:
        wrapped = self.keyring.rewrap_many([_item(key) for key in found])
        return [
            replace(key, root_id=new.root_id, wrapped=new.blob)
            if isinstance(new, Wrapped)
            else None
            for key, new in zip(found, wrapped, strict=True)
        ]

    # ── data keys: what they sealed is sealed again ──────────────────────────────────────────

    def _reseal(self) -> None:
        done, waiting = 0, set[UUID]()
        while not self._stop.is_set():
            count = self._reseal_batch(waiting)
            if count is None:
                break
            done += count
            self._stop.wait(BREATHE_S)
        if done:
            logger.info("credentials_resealed", extra={"credentials": done})

    def _reseal_batch(self, waiting: set[UUID]) -> int | None:
        """Seal again what one batch of keys sealed; None if nothing was left.

        One transaction at a time: the databases may be behind a pooler with one connection.
        """
        with self.store.transaction() as keys:
            found = keystore.to_replace(keys, but=[*self._unopened, *waiting], batch=RESEAL_BATCH)
        if not found:
            return None
        with transaction(self.store.control) as tx:  # committed before anything is opened
            sealed = reseal.take(tx, [one.key.dek_id for one in found], self.principal)
        opened = self._opened([one.key for one in found], sealed)
        done = sum(self._seal_again(one, plaintext) for one, plaintext in opened)
        left = {one.dek_id for one in sealed} - {one.dek_id for one, _ in opened}
        # one that nothing is sealed with may be ahead of its credential's commit
        left |= {one.key.dek_id for one in found if one.young} - {s.dek_id for s in sealed}
        waiting |= left
        with self.store.transaction() as keys:
            keystore.mark_unused(keys, [o.key.dek_id for o in found if o.key.dek_id not in left])
        return done

    def _opened(
        self, found: Sequence[StoredKey], sealed: Sequence[SealedCredential]
    ) -> list[tuple[SealedCredential, bytes]]:
        """Open what opens; what does not leaves an event and stays as it is."""
        by_id = {key.dek_id: key for key in found}
        answers = unseal_credentials(
            self.keyring,
            [Sealed(*_item(by_id[one.dek_id]), one.envelope, _context(one)) for one in sealed],
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
        if isinstance(error, UnsealError):  # else its root is not here yet
            self._unopened.add(one.dek_id)
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
        changed = suppress(_ChangedMeanwhile)
        with changed, transaction(self.store.control) as tx, self.store.beside(tx) as keys:
            keystore.keep(tx, keys, key, offer, self.principal)
            if not reseal.put(tx, one, envelope, self.principal):
                raise _ChangedMeanwhile
            return True
        with transaction(self.store.control) as tx:
            reseal.let_go(tx, one, self.principal)
        return False

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
        """Delete keys that nothing and no backup needs. The control database has the last word."""
        if not _due(self._forgot_at, FORGET_EVERY_S):
            return
        self._forgot_at = monotonic()
        longest = timedelta(days=max(plan.retention_days for plan in PLANS.values()))
        backups = max(
            self.settings.backup_keep,
            self.settings.keystore_backup_keep if self.store.separate else timedelta(0),
        )
        with self.store.transaction() as keys:
            unused = keystore.forgettable(keys, backups=backups, batch=FORGET_BATCH)
        with transaction(self.store.control) as tx:
            used = reseal.in_use(tx, unused)
        with self.store.transaction() as keys:
            if used:  # a control database of before their replacement was restored
                keystore.used_again(keys, list(used))
            gone = keystore.forget(
                keys, [one for one in unused if one not in used],
                records=longest + timedelta(days=62),
            )  # fmt: skip
            if gone:
                self.store.record(keys, _forgotten(gone, self.principal))


class _ChangedMeanwhile(Exception):  # noqa: N818 - an event more than an error
    """Somebody else replaced the credential: what was made for it is undone."""


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


def _item(key: StoredKey) -> tuple[Wrapped, WrapContext]:
    wrap = WrapContext(key.account_id, "credentials", key.dek_id)
    return Wrapped(key.root_id, key.wrapped), wrap


def _context(one: SealedCredential) -> Context:
    return Context(one.account_id, "resource", one.resource_id, one.field, one.version)


def _no_first_root() -> bytes:
    raise RuntimeError("a credential that exists was sealed by a root that is known")


def _due(at: float | None, every: float) -> bool:
    return at is None or monotonic() - at >= every


def _forgotten(count: int, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.KEYS_FORGOTTEN,
        TargetKind.INSTANCE,
        audit.INSTANCE_ID,
        principal,
        detail={"keys": count},
    )
