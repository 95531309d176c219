"""What dropping old months of the audit log asks of the database; audit/prune.py decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from storage import audit_tail
from storage.audit_tail import Filters

#: Events that stand behind the first that is kept, and are older: more are refused.
ALSO_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What a prune takes: every index before `first_kept`, and these."""

    first_kept: int
    also: Sequence[int]
    unsealed: bool  # something older than the date is not sealed


@dataclass(frozen=True, slots=True)
class Request:
    """A row of audit.prune. Nothing of it is believed that events do not say."""

    id: UUID
    state: str
    before: datetime
    first_kept: int
    also: Sequence[int]
    sha256: str
    requested_by: str
    request_seq: int
    request_at: datetime
    approved_by: str | None
    approval_seq: int | None
    approval_at: datetime | None
    record_seq: int | None
    record_at: datetime | None
    partitions: Sequence[str] | None
    withdrawn_by: str | None


def plan(tx: Connection, before: datetime) -> Plan | None:
    """Return what would go; None if nothing that is sealed is as young as `before`.

    Events are sealed in the order of their transactions, which is not quite that of their times.
    """
    found = tx.execute(
        text(
            "SELECT size - cardinality(seqs) FROM audit.checkpoint WHERE latest >= :before "
            "ORDER BY size LIMIT 1"
        ),
        {"before": before},
    ).scalar_one_or_none()
    if found is None:
        return None
    page = audit_tail.following(tx, Filters(since=before), begin=found, limit=1)
    while not page.events and page.more:
        page = audit_tail.following(tx, Filters(since=before), begin=page.end, limit=1)
    if not page.events or page.events[0].index is None:
        return None
    first_kept = page.events[0].index
    late = tx.execute(
        text(
            "SELECT greatest(size - cardinality(seqs), :first) FROM audit.checkpoint "
            "WHERE size > :first AND earliest < :before ORDER BY size"
        ),
        {"first": first_kept, "before": before},
    ).scalars()
    also: list[int] = []
    for begin in late.all():
        older = audit_tail.following(
            tx, Filters(until=before), begin=begin, limit=ALSO_MAX + 1, page=1
        )
        also += [event.index for event in older.events if event.index is not None]
        if len(also) > ALSO_MAX:
            break
    return Plan(first_kept, also, _unsealed(tx, before))


def _unsealed(tx: Connection, before: datetime) -> bool:
    return bool(
        tx.execute(
            text(
                "SELECT l.left_over OR EXISTS (SELECT FROM audit.event e WHERE e.at < :before "
                "AND e.seq > l.floor_seq AND e.xid >= l.last_xid "
                "AND (e.xid > l.last_xid OR e.seq > l.last_seq)) FROM audit.log l"
            ),
            {"before": before},
        ).scalar_one()
    )


_REQUESTS = (
    "SELECT id, state, before, first_kept, also, sha256, requested_by, request_seq, request_at, "
    "approved_by, approval_seq, approval_at, record_seq, record_at, partitions, withdrawn_by "
    "FROM audit.prune "
)


def requests(tx: Connection) -> list[Request]:
    """Return all requests, the newest first."""
    rows = tx.execute(text(_REQUESTS + "ORDER BY request_at DESC"))
    return [Request(*row) for row in rows]


def get(tx: Connection, request_id: UUID) -> Request | None:
    """Return one request."""
    row = tx.execute(text(_REQUESTS + "WHERE id = :id"), {"id": request_id}).one_or_none()
    return None if row is None else Request(*row)


def to_carry_out(tx: Connection) -> Request | None:
    """Return the request that waits for the sealer."""
    row = tx.execute(text(_REQUESTS + "WHERE state IN ('approved', 'recorded')")).one_or_none()
    return None if row is None else Request(*row)


def request(tx: Connection, request_id: UUID, before: datetime, wanted: Plan, sha256: str) -> None:
    """Write a request, after its event; it takes the place of one that nobody has approved."""
    tx.execute(
        text("SELECT audit.request_prune(:id, :before, :first, CAST(:also AS bigint[]), :sha256)"),
        {
            "id": request_id,
            "before": before,
            "first": wanted.first_kept,
            "also": list(wanted.also),
            "sha256": sha256,
        },
    )


class StepDenied(Exception):  # noqa: N818 - it undoes the transaction
    """The database does not let this login do it: unknown, not_open or same_login."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def approve(tx: Connection, request_id: UUID) -> None:
    """Approve a request, after its event; StepDenied if the database refuses."""
    _ask(tx, "SELECT audit.approve_prune(:id)", request_id)


def withdraw(tx: Connection, request_id: UUID) -> None:
    """Take a request back, after the event; StepDenied if it is not open."""
    _ask(tx, "SELECT audit.withdraw_prune(:id)", request_id)


def _ask(tx: Connection, function: str, request_id: UUID) -> None:
    reason = tx.execute(text(function), {"id": request_id}).scalar_one_or_none()
    if reason is not None:
        raise StepDenied(reason)


def is_withdrawn(tx: Connection, asked: Request) -> bool:
    """Say whether an event takes it back, whatever the row says."""
    return bool(
        tx.execute(
            text(
                "SELECT EXISTS (SELECT FROM audit.event WHERE at >= :since "
                "AND action = 'audit.prune_withdrawn' "
                "AND body::jsonb #>> '{detail,request}' = :id "
                "AND body::jsonb ->> 'outcome' = 'success')"
            ),
            {"since": asked.request_at, "id": str(asked.id)},
        ).scalar_one()
    )


def record(tx: Connection, request_id: UUID) -> None:
    """Note that the record was written, after its event."""
    tx.execute(text("SELECT audit.record_prune(:id)"), {"id": request_id})


def carry_out(tx: Connection, request_id: UUID) -> list[str]:
    """Drop the months of a recorded request, if the database agrees; return their names."""
    return list(tx.execute(text("SELECT audit.carry_out_prune(:id)"), {"id": request_id}).scalars())


def months(tx: Connection, before: datetime) -> list[str]:
    """Return the names of the partitions that would go."""
    found = tx.execute(
        text(
            "SELECT c.relname FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid "
            "JOIN pg_class p ON p.oid = i.inhparent JOIN pg_namespace n ON n.oid = p.relnamespace "
            "WHERE n.nspname = 'audit' AND p.relname = 'event' AND c.relname ~ '^event_[0-9]{6}$' "
            "AND right(c.relname, 6) < to_char(:before AT TIME ZONE 'UTC', 'YYYYMM') "
            "ORDER BY c.relname"
        ),
        {"before": before},
    )
    return list(found.scalars())


def old_enough(tx: Connection, before: datetime, days: int) -> bool:
    """Say whether a date is so many days ago, by the database's clock, which judges it too."""
    return bool(
        tx.execute(
            text("SELECT :before <= now() - make_interval(days => :days)"),
            {"before": before, "days": days},
        ).scalar_one()
    )
