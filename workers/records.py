"""Seal what runs say and leave: one data key per account, month and worker process.

A worker can seal records and cannot open any, so it cannot use a key that another process made:
each makes its own, stores it wrapped before anything is sealed with it, and forgets it at its end.
docs/records.md says who opens them.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from threading import Lock
from time import monotonic
from uuid import UUID

from sqlalchemy import Engine

from crypto.canary import make_canary
from crypto.envelope import Context
from crypto.errors import KmsUnavailable
from crypto.roots import Keyring, WrapContext
from crypto.seal import new_dek, seal
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import SyncwardError, TransientError
from schemas.sealed_lines import SEALED_MARK, line_context, output_context, packed
from storage import audit, logs
from storage.engine import transaction
from storage.keystore import Keystore, RootOffer, StoredKey, follow, keep
from storage.logs import LogLine, SealedLine
from storage.outputs import SealedOutput
from workers.metrics import SEALS

#: Accounts whose keys of this process are remembered; another one costs one key more.
ACCOUNTS_MAX = 10_000
#: After a failure nobody asks for the same again for so long: for the same account and month, or at
#: all where the KMS or the keystore is away.
ASK_AGAIN_S = 2.0
_STRIPES = 64

_Id = tuple[UUID, date]


@dataclass(frozen=True, slots=True, repr=False)
class _Key:
    dek_id: UUID
    dek: bytes


class RecordSealer:
    """Seals for all runs of a worker process. Any thread may call it."""

    def __init__(
        self, engine: Engine, keyring: Keyring, keystore: Keystore, principal: Principal
    ) -> None:
        self._engine = engine
        self._keyring = keyring
        self._keystore = keystore
        self._principal = principal
        self._lock = Lock()
        self._making = [Lock() for _ in range(_STRIPES)]
        self._keys: OrderedDict[_Id, _Key] = OrderedDict()
        self._away: tuple[float, SyncwardError] | None = None
        self._refused: OrderedDict[_Id, tuple[float, SyncwardError]] = OrderedDict()

    def __repr__(self) -> str:
        return f"RecordSealer({len(self._keys)} keys)"

    def ready(self, account_id: UUID) -> None:
        """Make sure that an account's lines of now can be sealed; SyncwardError if not."""
        self._key(account_id, datetime.now(UTC))

    def lines(self, lines: Sequence[LogLine]) -> tuple[list[SealedLine], list[LogLine]]:
        """Return lines sealed, and those that cannot be sealed now."""
        sealed: list[SealedLine] = []
        left: list[LogLine] = []
        for line in lines:
            try:
                key = self._key(line.account_id, line.at)
            except SyncwardError:
                left.append(line)
            else:
                sealed.append(_sealed(key, line))
        SEALS.labels("run_log").inc(len(sealed))
        return sealed, left

    def output(
        self, account_id: UUID, run_id: UUID, document: Mapping[str, object]
    ) -> SealedOutput:
        """Return a run's document sealed; SyncwardError if that is impossible now."""
        key = self._key(account_id, datetime.now(UTC))
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        context = Context(*output_context(account_id, run_id))
        SEALS.labels("run_output").inc()
        return SealedOutput(seal(key.dek, key.dek_id, text.encode(), context), _counts(document))

    def _key(self, account_id: UUID, at: datetime) -> _Key:
        identity = (account_id, at.astimezone(UTC).date().replace(day=1))
        found = self._remembered(identity)
        if found is not None:
            return found
        with self._making[hash(identity) % _STRIPES]:
            found = self._remembered(identity)
            if found is None:
                found = self._make(*identity)
                with self._lock:
                    self._keys[identity] = found
                    while len(self._keys) > ACCOUNTS_MAX:
                        self._keys.popitem(last=False)
        return found

    def _remembered(self, identity: _Id) -> _Key | None:
        with self._lock:
            found = self._keys.get(identity)
            if found is not None:
                self._keys.move_to_end(identity)
            return found

    def _make(self, account_id: UUID, month: date) -> _Key:
        identity = (account_id, month)
        self._raise_if_just_asked(identity)
        try:
            made = self._store_new(account_id, month)
        except SyncwardError as error:
            with self._lock:
                if _is_everybodys(error):
                    self._away = monotonic(), error
                else:  # this account's own: the others are asked for as before
                    self._refused[identity] = monotonic(), error
                    while len(self._refused) > ACCOUNTS_MAX:
                        self._refused.popitem(last=False)
            raise
        self._away = None
        return made

    def _raise_if_just_asked(self, identity: _Id) -> None:
        with self._lock:
            own = self._refused.pop(identity, None)
            if own is not None and monotonic() - own[0] < ASK_AGAIN_S:
                self._refused[identity] = own
                raise own[1]
            away = self._away
        if away is not None and monotonic() - away[0] < ASK_AGAIN_S:
            raise away[1]

    def _store_new(self, account_id: UUID, month: date) -> _Key:
        dek_id, dek = new_dek()
        with self._keystore.transaction() as keys:  # by the root of now, not of the last look
            follow(keys, self._keyring.prefer)
        wrapped = self._keyring.wrap("records", dek, WrapContext(account_id, "records", dek_id))
        offer = RootOffer(
            wrapped.root_id, "records", self._keyring.scheme,
            lambda: make_canary(self._keyring, "records"),
        )  # fmt: skip
        stored = StoredKey(dek_id, account_id, wrapped.root_id, wrapped.blob)
        event = AuditEvent(
            AuditAction.KEYS_CREATED, TargetKind.ACCOUNT, account_id, self._principal,
            account_id=account_id,
            detail={"purpose": "records", "month": f"{month:%Y-%m}", "key": str(dek_id)},
        )  # fmt: skip
        with transaction(self._engine) as tx, self._keystore.beside(tx) as keys:
            keep(tx, keys, stored, offer, self._principal, month=month)
            audit.append(tx, event)
        return _Key(dek_id, dek)


def _is_everybodys(error: SyncwardError) -> bool:
    """Say whether the KMS or the keystore is away, which is so for every account."""
    away = type(error) is TransientError and error.code == TransientError.code
    return away or isinstance(error, KmsUnavailable)


def write_sealed(
    engine: Engine, records: RecordSealer, lines: Sequence[LogLine]
) -> Sequence[LogLine]:
    """Store lines sealed; return those that could not be sealed now."""
    sealed, left = records.lines(lines)
    if sealed:
        with transaction(engine) as tx:
            logs.append(tx, sealed)
    return left


def _sealed(key: _Key, line: LogLine) -> SealedLine:
    context = Context(*line_context(line.account_id, line.run_id, line.at, line.level, line.stream))
    envelope = seal(key.dek, key.dek_id, packed(line), context)
    return SealedLine(line.run_id, line.account_id, line.at, line.level, line.stream, envelope)


def _counts(document: Mapping[str, object]) -> dict[str, object] | None:
    """Return what stays clear of a discovery: how many rows a stream has, for progress bars."""
    streams = document.get("streams")
    if not isinstance(streams, list):
        return None
    kept = ("name", "rows_estimated")
    return {SEALED_MARK: True, "streams": [{name: s.get(name) for name in kept} for s in streams]}
