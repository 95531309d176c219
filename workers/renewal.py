"""Secrets that do not last, renewed by one run at a time. Start at `StoredRenewal.renewed`.

Whoever asks takes a lock: in this process first, so that its runs wait without a session each, then
on the resource's row, which all workers share. Behind it the newest secrets are read again, and if
somebody was faster, they are the answer. What an exchange brought is committed before it is used;
a commit that fails is tried again, because the other system has forgotten what was before.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic, sleep
from uuid import UUID

from sqlalchemy import Connection

from connectors import registry
from crypto import credentials
from crypto.canary import make_canary
from schemas.aid import Exchange
from schemas.errors import ReauthNeeded, SyncwardError, TransientError
from schemas.sealed_secret import SealedSecret
from schemas.secret import Secret
from storage import audit, renewals, tenancy, work
from storage.engine import ROLLED_BACK, transaction
from storage.keystore import RootOffer
from storage.work import SealedResource
from workers.attempt import Attempt
from workers.metrics import RENEWALS

logger = logging.getLogger(__name__)

#: How long a run waits for another one that renews the same login; longer than an exchange takes.
WAIT_S = 40.0
#: Seconds between two looks at the run's signal meanwhile.
_LOOK_S = 1.0
#: Data keys that are wrapped before an exchange, as many as one brings fields (a token, a refresh
#: token, a code that is used): a KMS that goes away during it costs no login.
_KEYS_AHEAD = 3
#: A new login is stored as often as this, so many seconds apart, before it is given up.
_STORE_TRIES, _STORE_EVERY_S = 5, 1.0

_DEAD = (
    "resource {0}: its login was refused and waits to be authorised again: syncward resource "
    "authorize {0}"
)

#: Opens what was read, and has it masked from then on.
Unseal = Callable[[SealedResource], dict[str, str]]


#: When an exchange ended that brought nothing, and why.
_Failed = tuple[float, SyncwardError]


@dataclass(slots=True)
class _Turn:
    """Runs of this process that want the same login: one at a time."""

    lock: Lock
    waiting: int = 0
    failed: _Failed | None = None


class _Turns:
    def __init__(self) -> None:
        self._lock = Lock()
        self._turns: dict[UUID, _Turn] = {}

    @contextmanager
    def of(self, resource_id: UUID) -> Iterator[_Turn]:
        """Yield the turn of a resource; forgotten when nobody wants it any more."""
        with self._lock:
            turn = self._turns.setdefault(resource_id, _Turn(Lock()))
            turn.waiting += 1
        try:
            yield turn
        finally:
            with self._lock:
                turn.waiting -= 1
                if not turn.waiting:
                    self._turns.pop(resource_id, None)


_TURNS = _Turns()


@dataclass(frozen=True, slots=True)
class _Fresh:
    """What an exchange brought, sealed, and the versions that it replaces."""

    versions: Mapping[str, int]
    sealed: Sequence[SealedSecret]


@dataclass(slots=True)
class _Done:
    """How far it has come; it outlives a transaction that fails."""

    secrets: Mapping[str, str] = field(default_factory=dict)
    fresh: _Fresh | None = None
    refused: ReauthNeeded | None = None
    failed: _Failed | None = None


class StoredRenewal:
    """The login of one resource of one attempt. Meets schemas.aid.Renewal."""

    def __init__(self, attempt: Attempt, resource: SealedResource, unseal: Unseal) -> None:
        self._attempt = attempt
        self._unseal = unseal
        self._known = resource  # the newest that this run was recorded to open

    def renewed(self, seen: Mapping[str, str], exchange: Exchange) -> Mapping[str, str]:
        """Return newer secrets than those `seen`; see schemas.aid.Renewal."""
        control, asked_at = self._attempt.control, monotonic()
        with _TURNS.of(self._known.resource_id) as turn:
            while not turn.lock.acquire(timeout=_LOOK_S):
                control.check()
                self._not_too_long(asked_at)
            try:
                if turn.failed is not None and turn.failed[0] >= asked_at:
                    raise turn.failed[1]  # we would be told the same
                return self._in_turn(turn, seen, exchange)
            finally:
                turn.lock.release()

    def _not_too_long(self, since: float) -> None:
        if monotonic() - since > WAIT_S:
            RENEWALS.labels("waited").inc()
            raise TransientError(
                f"resource {self._known.name}: another run has been renewing its login for "
                f"{WAIT_S:.0f} s; tried again"
            )

    def _in_turn(
        self, turn: _Turn, seen: Mapping[str, str], exchange: Exchange
    ) -> Mapping[str, str]:
        """Look behind the lock; exchange if nobody was faster; store, again if that fails."""
        since, tries = monotonic(), 0
        done = _Done()
        while True:
            inside = False
            try:
                with self._locked() as (tx, dead):
                    inside = True
                    self._step(tx, dead, done, seen, exchange)
                break
            except TransientError as error:
                if done.fresh is not None:
                    tries += 1
                    self._once_more(tries, error)
                elif inside or error.code != ROLLED_BACK:
                    turn.failed = done.failed
                    raise
                else:  # another process holds the row
                    self._attempt.control.check()
                    self._not_too_long(since)
            except SyncwardError:
                turn.failed = done.failed
                raise
        if done.refused is not None:  # that it is dead is committed, and only then told
            raise done.refused
        if done.fresh is not None:
            RENEWALS.labels("exchanged").inc()
            logger.info("login_renewed", extra={"resource": self._known.resource_id})
        return done.secrets

    @contextmanager
    def _locked(self) -> Iterator[tuple[Connection, Mapping[str, int] | None]]:
        """One transaction that holds the resource's row, with the versions that are dead."""
        attempt = self._attempt
        with transaction(attempt.deps.engine) as tx:
            tenancy.enter(tx, attempt.claim.account_id)
            held = renewals.lock(tx, attempt.claim, self._known.resource_id, wait_s=_LOOK_S)
            yield tx, held.dead

    def _step(
        self,
        tx: Connection,
        dead: Mapping[str, int] | None,
        done: _Done,
        seen: Mapping[str, str],
        exchange: Exchange,
    ) -> None:
        stored = self._newest(tx)
        versions = _versions(self._known)
        if done.fresh is None:
            if dead is not None and dict(dead) == versions:
                RENEWALS.labels("dead").inc()
                done.refused = ReauthNeeded(_DEAD.format(self._known.name))
                return
            done.secrets = stored
            if any(value != seen.get(field) for field, value in stored.items()):
                RENEWALS.labels("found").inc()
                return
            self._exchange(tx, done, versions, exchange)
        elif versions != done.fresh.versions:  # our commit was one after all, or a person's came
            done.secrets = stored
            return
        if done.fresh is not None:
            self._store(tx, done.fresh)

    def _exchange(
        self, tx: Connection, done: _Done, versions: Mapping[str, int], exchange: Exchange
    ) -> None:
        """Ask the other system. From its answer on, what was stored before may be worth nothing."""
        attempt, resource_id = self._attempt, self._known.resource_id
        account_id, keyring = attempt.claim.account_id, attempt.deps.keyring
        keys = [credentials.new_key(keyring, account_id) for _ in range(_KEYS_AHEAD)]
        try:
            brought = dict(exchange(done.secrets))
        except ReauthNeeded as refused:
            RENEWALS.labels("refused").inc()
            logger.warning("login_refused", extra={"resource": resource_id})
            renewals.died(tx, attempt.claim, resource_id, versions, attempt.deps.principal)
            done.refused = refused
            return
        except SyncwardError as error:
            RENEWALS.labels("failed").inc()
            done.failed = monotonic(), error
            raise
        known = {field: attempt.control.secrets.know(value) for field, value in brought.items()}
        changed = {f: value for f, value in known.items() if done.secrets.get(f) != value}
        keys += [credentials.new_key(keyring, account_id) for _ in range(len(changed) - len(keys))]
        sealed = [
            credentials.seal_with(
                key,
                resource_id=resource_id,
                field=field,
                version=versions.get(field, 0) + 1,
                secret=Secret(value),
            )
            for key, (field, value) in zip(keys, changed.items(), strict=False)
        ]
        done.secrets = {**done.secrets, **changed}
        if sealed:
            done.fresh = _Fresh(versions, sealed)

    def _store(self, tx: Connection, fresh: _Fresh) -> None:
        attempt, keyring = self._attempt, self._attempt.deps.keyring
        offer = RootOffer(
            fresh.sealed[0].root_id,
            "credentials",
            keyring.scheme,
            lambda: make_canary(keyring, "credentials"),
        )
        with attempt.deps.keystore.beside(tx) as keys:
            renewals.store(
                tx,
                keys,
                attempt.claim,
                self._known.resource_id,
                fresh.sealed,
                aim=registry.aim_digest(self._known.kind, self._known.config),
                offer=offer,
                principal=attempt.deps.principal,
            )

    def _once_more(self, tries: int, error: TransientError) -> None:
        """Wait a moment before a new login is stored once more; the last failure is raised."""
        if tries < _STORE_TRIES:
            sleep(_STORE_EVERY_S)
            return
        RENEWALS.labels("not_stored").inc()
        logger.error("login_not_stored", extra={"resource": self._known.resource_id})
        raise error

    def _newest(self, tx: Connection) -> dict[str, str]:
        """Read and open what is stored now. That a newer version is opened is recorded before."""
        attempt, deps = self._attempt, self._attempt.deps
        newest = work.newest(tx, attempt.claim, self._known, deps.keystore)
        if _versions(newest) != _versions(self._known):
            with transaction(deps.engine) as beside:
                audit.append(beside, work.unsealed_event(newest, attempt.claim, deps.principal))
        self._known = newest
        return self._unseal(newest)


def _versions(resource: SealedResource) -> dict[str, int]:
    return {sealed.field: sealed.version for sealed in resource.sealed}
