"""What happens right now, for `top`: queue, workers and runs in a handful of cheap statements."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.runs import Rule
from storage import explain, gauges
from storage.explain import Situation


@dataclass(frozen=True, slots=True)
class WorkerLine:
    worker_id: str
    version: str
    slots: int
    used: int
    draining: bool
    seen_seconds: float


@dataclass(frozen=True, slots=True)
class RunningLine:
    """A run that a worker executes, as of its last heartbeat."""

    run_id: UUID
    account: str
    subject: str
    kind: str
    attempt: int
    worker_id: str
    stream: str | None
    rows: int  # of the stream
    bytes: int  # of the stream
    rows_before: int  # of streams that are complete
    seconds: float  # since the first attempt began
    moved_at: datetime  # the last heartbeat that had moved a row
    cancelling: bool


@dataclass(frozen=True, slots=True)
class WaitingLine:
    """A run that is queued, and the first rule that holds it back."""

    run_id: UUID
    account: str
    subject: str
    kind: str
    attempt: int
    waits_seconds: float
    rule: Rule
    sentence: str


@dataclass(frozen=True, slots=True)
class Overview:
    """One moment, by the database's clock."""

    at: datetime
    queue_depth: dict[str, int]
    oldest_seconds: float
    lateness_seconds: float
    redis_up: bool
    schedulers: int
    paused: bool
    paused_reason: str | None
    slots: int
    workers: Sequence[WorkerLine]
    running: Sequence[RunningLine]
    waiting: Sequence[WaitingLine]


def read(tx: Connection, *, account_id: UUID | None, limit: int, runs_max: int) -> Overview:
    """Take one look. Names come from what `tx` may see: one account, or all (tenancy.across)."""
    now = explain.situation(tx)
    depth, oldest = gauges.queue(tx)
    values = {"account": account_id, "limit": limit}
    at: datetime = tx.execute(text("SELECT clock_timestamp()")).scalar_one()
    return Overview(
        at=at,
        queue_depth=depth,
        oldest_seconds=oldest,
        lateness_seconds=gauges.lateness(tx),
        redis_up=now.schedulers.queue_down_since is None,
        schedulers=now.schedulers.alive,
        paused=now.instance.paused,
        paused_reason=now.instance.reason,
        slots=now.slots,
        workers=[WorkerLine(**row) for row in tx.execute(_WORKERS).mappings()],
        running=[RunningLine(**row) for row in tx.execute(_RUNNING, values).mappings()],
        waiting=[_waiting(row, now, runs_max) for row in tx.execute(_WAITING, values)],
    )


_WORKERS = text(
    "SELECT worker_id, version, slots, draining, (SELECT count(*) FROM leases l "
    "WHERE l.worker_id = w.worker_id) AS used, CAST(extract(epoch FROM "
    "clock_timestamp() - seen_at) AS float8) AS seen_seconds FROM workers w "
    "WHERE seen_at > clock_timestamp() - interval '1 min' ORDER BY started_at, worker_id"
)

_RUNNING = text(
    "SELECT a.run_id, c.name AS account, coalesce(n.name, r.name, '(deleted)') AS subject, a.kind, "
    "a.attempt, l.worker_id, l.stream, l.rows, l.bytes, CAST((SELECT coalesce(sum(t.rows_loaded), "
    "0) FROM run_streams t WHERE t.run_id = a.run_id AND t.stream IS DISTINCT FROM l.stream) "
    "AS bigint) AS rows_before, CAST(extract(epoch FROM clock_timestamp() - a.started_at) "
    "AS float8) AS seconds, l.progress_at AS moved_at, "
    "a.cancel_requested_at IS NOT NULL AS cancelling "
    "FROM leases l JOIN active_runs a ON a.run_id = l.run_id "
    "JOIN accounts c ON c.id = a.account_id "
    "LEFT JOIN connections n ON n.id = a.subject_id LEFT JOIN resources r ON r.id = a.subject_id "
    "WHERE CAST(:account AS uuid) IS NULL OR a.account_id = :account "
    "ORDER BY a.started_at, a.run_id LIMIT :limit"
)

#: The longest waiting first, by an index; names only for those.
_WAITING = text(
    f"SELECT w.*, c.name AS account, coalesce(n.name, r.name, '(deleted)') AS subject, "  # noqa: S608 - a constant
    "CAST(extract(epoch FROM w.at - greatest(w.queued_at, w.not_before)) AS float8) AS waits "
    f"FROM ({explain.LIVE} WHERE a.run_id IN (SELECT run_id FROM active_runs "
    "WHERE state = 'queued' AND (CAST(:account AS uuid) IS NULL OR account_id = :account) "
    "ORDER BY not_before LIMIT :limit)) AS w JOIN accounts c ON c.id = w.account_id "
    "LEFT JOIN connections n ON n.id = w.subject_id LEFT JOIN resources r ON r.id = w.subject_id "
    "ORDER BY w.not_before, w.run_id"
)


def _waiting(row: Row[Any], now: Situation, runs_max: int) -> WaitingLine:
    rule, sentence = explain.held_back_by(row, now, runs_max)
    return WaitingLine(
        run_id=row.run_id,
        account=row.account,
        subject=row.subject,
        kind=row.kind,
        attempt=row.attempt,
        waits_seconds=row.waits,
        rule=rule,
        sentence=sentence or "others go first, or a slot is about to be free",
    )
