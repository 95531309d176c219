"""The scheduler's first step in SQL: schedules that are due become queued runs, slots a ledger."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.ids import new_id
from schemas.limits import DUE_BATCH
from schemas.runs import Priority
from schemas.schedules import CatchUp, Overlap, Schedule
from storage import audit, metrics
from storage.rowset import rowset
from storage.runs import wake_account


@dataclass(frozen=True, slots=True)
class DueSchedule:
    """A schedule whose slot has come, locked until the caller's transaction ends."""

    connection_id: UUID
    account_id: UUID
    source_id: UUID
    destination_id: UUID
    schedule: Schedule
    anchor_at: datetime
    due_at: datetime


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of the slots of one due schedule, and when it is due next."""

    due: DueSchedule
    run_for: datetime | None  # the slot that gets a run
    skipped: tuple[datetime, ...]  # slots that passed without one, kept in the ledger
    next_due_at: datetime | None
    missed: int = 0  # slots before all of these, too many for a row each
    invalid: bool = False  # nobody can say when it is due: it is paused


_OTHER_PROMISED = (
    "a.again_run_id IS NOT NULL "
    "AND (coalesce(a.again_kind, 'sync') IN ('backfill', 'reset', 'purge') "
    "OR coalesce(a.again_options->'streams', '[]') <> '[]')"
)
#: The condition of a schedule whose slot waits: a run of another kind, or of some streams only,
#: waits for the live one to end, and only one can. The slot stays due until that one has begun,
#: unless it may be skipped.
HELD = (
    "(overlap <> 'skip' AND EXISTS (SELECT FROM active_runs a "
    f"WHERE a.subject_id = connection_id AND {_OTHER_PROMISED}))"
)


def claim_due(tx: Connection) -> tuple[datetime, Sequence[DueSchedule]]:
    """Lock a batch of due schedules that no other scheduler holds; return (database now, batch)."""
    rows = tx.execute(
        text(
            "SELECT n.at, s.* FROM (SELECT now() AS at) AS n LEFT JOIN (SELECT * FROM schedules "  # noqa: S608 - a constant
            f"WHERE state = 'active' AND next_due_at <= now() AND NOT {HELD} "
            "ORDER BY next_due_at LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED) AS s ON true"
        ),
        {"limit": DUE_BATCH},
    ).all()
    return rows[0].at, [_due(row) for row in rows if row.connection_id is not None]


def _due(row: Row[Any]) -> DueSchedule:
    return DueSchedule(
        connection_id=row.connection_id,
        account_id=row.account_id,
        source_id=row.source_id,
        destination_id=row.destination_id,
        schedule=Schedule.model_construct(  # checked when it was written
            every=timedelta(seconds=row.interval_s) if row.interval_s else None,
            cron=row.cron,
            zone=row.zone,
            jitter=timedelta(seconds=row.jitter_s),
            catch_up=CatchUp(row.catch_up),
            overlap=Overlap(row.overlap),
        ),
        anchor_at=row.anchor_at,
        due_at=row.next_due_at,
    )


#: A live sync absorbs the slot: waiting ones run it anyway, running ones are followed by one more,
#: and so are those that have begun and wait again, for their first streams may be loaded already.
#: A run of another kind, or of some streams only, is followed by a sync.
_QUEUE = """
INSERT INTO active_runs (subject_id, run_id, account_id, kind, source_id, destination_id, state,
                         trigger, scheduled_for, priority)
SELECT u.subject, u.run, u.account, 'sync', u.source, u.destination, 'queued', 'schedule', u.slot,
       :priority
FROM json_to_recordset(CAST(:rows AS json)) AS u
  (subject uuid, run uuid, account uuid, source uuid, destination uuid, slot timestamptz)
ORDER BY u.subject
ON CONFLICT (subject_id) DO {on_conflict}
RETURNING subject_id, run_id, again_run_id, (xmax = 0) AS inserted
"""
_SERVES = (
    "active_runs.kind = 'sync' AND active_runs.state = 'queued' AND active_runs.started_at IS NULL "
    "AND coalesce(active_runs.options->'streams', '[]') = '[]'"
)
_ABSORB = f"""UPDATE SET
  again_run_id = CASE WHEN {_SERVES}
    THEN active_runs.again_run_id ELSE coalesce(active_runs.again_run_id, excluded.run_id) END,
  again_trigger = CASE WHEN {_SERVES}
    THEN active_runs.again_trigger ELSE coalesce(active_runs.again_trigger, 'again') END,
  again_kind = CASE WHEN {_SERVES} THEN active_runs.again_kind ELSE 'sync' END"""
#: Somebody promised another run between our look and our lock: the slot stays due.
_UNLESS_PROMISED = f" WHERE NOT ({_OTHER_PROMISED.replace('a.', 'active_runs.')})"
_ON_CONFLICT = {
    Overlap.BUFFER_ONE: _ABSORB + _UNLESS_PROMISED,
    Overlap.CANCEL_OTHER: _ABSORB
    + """, cancel_requested_at = CASE WHEN active_runs.state = 'running'
    AND active_runs.kind = 'sync'
    THEN coalesce(active_runs.cancel_requested_at, clock_timestamp())
    ELSE active_runs.cancel_requested_at END,
  cancel_by = CASE WHEN active_runs.kind = 'sync'
    THEN coalesce(active_runs.cancel_by, 'overlap') ELSE active_runs.cancel_by END"""
    + _UNLESS_PROMISED,
    Overlap.SKIP: "NOTHING",
}


def apply(tx: Connection, decisions: Sequence[Decision], principal: Principal) -> int:
    """Queue runs, write the ledger and the next due times; return how many runs were queued."""
    if not decisions:
        return 0
    queued = 0
    left: set[UUID] = set()  # they stay due
    for overlap in Overlap:
        chosen = [d for d in decisions if d.run_for and d.due.schedule.overlap is overlap]
        if chosen:
            queued += _queue(tx, chosen, overlap, principal, left)
    decisions = [d for d in decisions if d.due.connection_id not in left]
    _ledger(tx, [row for decision in decisions for row in _skipped(decision)])
    _pause(tx, [d.due for d in decisions if d.invalid], principal)
    tx.execute(
        text(
            "UPDATE schedules s SET next_due_at = u.next "
            "FROM json_to_recordset(CAST(:rows AS json)) AS u (id uuid, next timestamptz) "
            "WHERE s.connection_id = u.id"
        ),
        {"rows": rowset([{"id": d.due.connection_id, "next": d.next_due_at} for d in decisions])},
    )
    return queued


@dataclass(frozen=True, slots=True)
class _Slot:
    """One row of the ledger."""

    at: datetime
    connection_id: UUID
    outcome: str
    run_id: UUID | None = None
    missed: int = 0


def _skipped(decision: Decision) -> Iterator[_Slot]:
    """Return rows for the slots without a run; the oldest tells of those before it."""
    connection_id, missed = decision.due.connection_id, decision.missed
    for slot in decision.skipped:
        yield _Slot(slot, connection_id, "skipped", missed=missed)
        missed = 0


def _pause(tx: Connection, unreadable: Sequence[DueSchedule], principal: Principal) -> None:
    """Take schedules that nobody can follow out of the way of all others, and say so."""
    if not unreadable:
        return
    tx.execute(
        text(
            "UPDATE schedules SET state = 'paused', state_reason = 'schedule_invalid' "
            "WHERE connection_id = ANY(:ids)"
        ),
        {"ids": [one.connection_id for one in unreadable]},
    )
    audit.append(
        tx,
        *(
            AuditEvent(
                AuditAction.CONNECTION_PAUSED,
                TargetKind.CONNECTION,
                one.connection_id,
                principal,
                account_id=one.account_id,
                reason="schedule_invalid",
            )
            for one in unreadable
        ),
    )


def _queue(
    tx: Connection,
    chosen: Sequence[Decision],
    overlap: Overlap,
    principal: Principal,
    left: set[UUID],
) -> int:
    rows = tx.execute(
        text(_QUEUE.format(on_conflict=_ON_CONFLICT[overlap])),
        {
            "priority": Priority.SCHEDULED,
            "rows": rowset([_run_row(decision) for decision in chosen]),
        },
    ).all()
    answers = {row.subject_id: row for row in rows}
    ledger: list[_Slot] = []
    events: list[AuditEvent] = []
    for decision in chosen:
        row = answers.get(decision.due.connection_id)
        if row is None and overlap is not Overlap.SKIP:
            left.add(decision.due.connection_id)
            continue
        slot = decision.run_for or decision.due.due_at
        outcome = "skipped" if row is None else "queued" if row.inserted else "merged"
        serving = None if row is None else row.run_id if row.inserted else row.again_run_id
        served_by = serving or getattr(row, "run_id", None)
        missed = 0 if decision.skipped else decision.missed
        ledger.append(_Slot(slot, decision.due.connection_id, outcome, served_by, missed))
        if row is not None:
            events.append(_event(decision, row, principal))
    _ledger(tx, ledger)
    wake_account(tx, *(d.due.account_id for d in chosen))
    audit.append(tx, *events)
    return sum(1 for row in rows if row.inserted)


def _run_row(decision: Decision) -> dict[str, object]:
    due = decision.due
    return {
        "subject": due.connection_id,
        "run": new_id(),
        "account": due.account_id,
        "source": due.source_id,
        "destination": due.destination_id,
        "slot": decision.run_for,
    }


def _event(decision: Decision, row: Row[Any], principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.RUN_QUEUED if row.inserted else AuditAction.RUN_MERGED,
        TargetKind.RUN,
        row.run_id,
        principal,
        account_id=decision.due.account_id,
        reason="schedule",
        run_id=row.run_id,
        detail={
            "subject": str(decision.due.connection_id),
            "slot": decision.run_for.isoformat() if decision.run_for else None,
        },
    )


def _ledger(tx: Connection, slots: Sequence[_Slot]) -> None:
    if not slots:
        return
    tx.execute(
        text(
            "INSERT INTO slots (scheduled_for, connection_id, outcome, run_id, missed) SELECT u.* "
            "FROM json_to_recordset(CAST(:rows AS json)) AS u (at timestamptz, connection uuid, "
            "outcome text, run uuid, missed int) ON CONFLICT DO NOTHING"
        ),
        {
            "rows": rowset(
                [
                    {
                        "at": slot.at,
                        "connection": slot.connection_id,
                        "outcome": slot.outcome,
                        "run": slot.run_id,
                        "missed": slot.missed,
                    }
                    for slot in slots
                ]
            )
        },
    )
    for slot in slots:
        metrics.SLOTS.labels(slot.outcome).inc()
        metrics.SLOTS.labels("skipped").inc(slot.missed)
