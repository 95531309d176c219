"""Runs as people ask for them and look at them: enqueue, show, list, cancel, approve, reject."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import Conflict, NotFound
from schemas.guards import Finding
from schemas.ids import new_id
from schemas.limits import WORKER_SILENT_AFTER
from schemas.runs import LIVE_STATES, Priority, Run, RunKind, RunOptions, RunState, Trigger
from storage import audit, bell
from storage.endings import (
    AGAIN_KIND,
    end,
    kind_of_again,
    lock_accounts,
    lock_schedule,
    run_event,
)

_INSERT = text(
    "INSERT INTO active_runs (subject_id, run_id, account_id, kind, source_id, destination_id, "
    "state, trigger, scheduled_for, priority, options, deadline_at) VALUES (:subject_id, :run_id, "
    ":account_id, :kind, :source_id, :destination_id, 'queued', :trigger, clock_timestamp(), "
    ":priority, CAST(:options AS jsonb), clock_timestamp() + :deadline) "
    "ON CONFLICT (subject_id) DO NOTHING RETURNING run_id"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run is about: a connection (both ends) or one resource (as source)."""

    subject_id: UUID
    account_id: UUID
    source_id: UUID
    destination_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Enqueued:
    """The run that will serve the request: new, one still waiting, or the next after this one."""

    run_id: UUID
    how: Literal["queued", "merged", "after_current"]


def enqueue(
    tx: Connection,
    subject: Subject,
    kind: RunKind,
    options: RunOptions,
    principal: Principal,
    *,
    deadline: timedelta | None = None,
) -> Enqueued:
    """Ask for a run by hand. Never lost: a live run makes it wait, a waiting run absorbs it.

    Conflict where it could be neither: of what waits for the end of a run there is one at most.
    """
    _require_workers_that_know(tx, kind, options)
    lock_schedule(tx, subject.subject_id)
    run_id = new_id()
    inserted = tx.execute(
        _INSERT,
        {
            "subject_id": subject.subject_id,
            "run_id": run_id,
            "account_id": subject.account_id,
            "kind": kind.value,
            "source_id": subject.source_id,
            "destination_id": subject.destination_id,
            "trigger": Trigger.MANUAL.value,
            "priority": Priority.asked_for(kind),
            "options": options.model_dump_json(),
            "deadline": deadline,
        },
    ).one_or_none()
    if inserted is None:
        return _join_live(tx, subject, kind, options, principal, new_run=run_id)
    wake_account(tx, subject.account_id)
    bell.ring(tx)
    audit.append(tx, _queued(subject, run_id, kind, principal))
    return Enqueued(run_id, "queued")


#: What any version of a worker executes.
_ALWAYS_KNOWN = frozenset({RunKind.SYNC, RunKind.TEST, RunKind.DISCOVER})


def _require_workers_that_know(tx: Connection, kind: RunKind, options: RunOptions) -> None:
    """Refuse what some worker of now would not take: it would be dispatched again and again."""
    if kind in _ALWAYS_KNOWN and not options.accept:
        return
    old = tx.execute(
        text(
            "SELECT min(worker_id) FROM workers WHERE NOT draining "
            "AND seen_at > clock_timestamp() - :silent AND NOT (:kind = ANY(kinds))"
        ),
        {"silent": WORKER_SILENT_AFTER, "kind": kind.value},
    ).scalar()
    if old is not None:
        raise Conflict(
            f"worker {old} is of a version before this one and cannot do that; upgrade or stop it, "
            "then ask again"
        )


def _queued(subject: Subject, run_id: UUID, kind: RunKind, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.RUN_QUEUED,
        TargetKind.RUN,
        run_id,
        principal,
        account_id=subject.account_id,
        reason="manual",
        run_id=run_id,
        detail={"kind": kind.value, "subject": str(subject.subject_id)},
    )


def _join_live(
    tx: Connection,
    subject: Subject,
    kind: RunKind,
    options: RunOptions,
    principal: Principal,
    *,
    new_run: UUID,
) -> Enqueued:
    live = tx.execute(
        text("SELECT * FROM active_runs WHERE subject_id = :id FOR UPDATE"),
        {"id": subject.subject_id},
    ).one_or_none()
    if live is None:  # it ended between our two statements: now there is room
        return enqueue(tx, subject, kind, options, principal)
    if not kind.of_connection and live.kind != kind:
        raise Conflict(
            f"a {live.kind} of this resource is just running; try again when it has ended"
        )
    if kind is RunKind.SCHEMA:
        raise Conflict(
            f"run {live.run_id} ({live.kind}) of this connection is live; ask again when it has "
            f"ended: syncward run explain {live.run_id}"
        )
    waits = live.state == RunState.QUEUED and live.started_at is None  # it has read nothing yet
    joined = _joined(live.kind, live.options, kind, options) if waits else None
    if joined is not None:
        tx.execute(
            text(
                "UPDATE active_runs SET options = CAST(:options AS jsonb), "
                "priority = least(priority, :priority) WHERE run_id = :id"
            ),
            {
                "options": joined.model_dump_json(),
                "priority": Priority.asked_for(kind),
                "id": live.run_id,
            },
        )
        audit.append(tx, run_event(AuditAction.RUN_MERGED, live, principal, reason="manual"))
        return Enqueued(live.run_id, "merged")
    promised_id = _set_again(tx, live, kind, options, new_run)
    audit.append(tx, run_event(AuditAction.RUN_MERGED, live, principal, reason="manual"))
    return Enqueued(promised_id, "after_current")


def _joined(
    there: str, has: dict[str, Any] | None, kind: RunKind, wish: RunOptions
) -> RunOptions | None:
    """Return the options of one run for two wishes; None if one run cannot serve both."""
    if there != kind:
        return None
    options = RunOptions.model_validate(has or {})
    if kind in _ALWAYS_KNOWN:
        return options.merged(wish)
    return options if options == wish else None


def _set_again(
    tx: Connection, live: Row[Any], kind: RunKind, options: RunOptions, new_run: UUID
) -> UUID:
    """Promise a run for when the live one ends, or join the one that is promised."""
    wished: RunOptions | None = options
    if live.again_run_id is not None:
        there = kind_of_again(live.kind, live.again_kind)
        wished = _joined(there, live.again_options, kind, options)
        if wished is None:
            raise Conflict(
                f"run {live.again_run_id} ({there}) waits already for run {live.run_id} to end, "
                "and only one can; ask again when it has begun, or cancel it: "
                f"syncward run cancel {live.again_run_id}"
            )
    promised: UUID = tx.execute(
        text(
            "UPDATE active_runs SET again_run_id = coalesce(again_run_id, :new), "
            "again_trigger = 'manual', again_kind = :kind, "
            "again_options = CAST(:options AS jsonb) WHERE run_id = :id RETURNING again_run_id"
        ),
        {
            "new": new_run,
            "kind": kind.value,
            "options": (wished or options).model_dump_json(),
            "id": live.run_id,
        },
    ).scalar_one()
    return promised


def wake_account(tx: Connection, *account_ids: UUID) -> None:
    """Tell the dispatcher that accounts have work; an idle one does not bank credit for idling."""
    ids = sorted(set(account_ids))
    lock_accounts(tx, ids)
    tx.execute(
        text(
            "UPDATE account_queues q SET has_work = true, at_cap = false, "
            "woken = q.woken + 1, vtime = CASE "
            "WHEN q.has_work THEN q.vtime ELSE greatest(q.vtime, (SELECT coalesce(min(o.vtime), 0) "
            "FROM account_queues o WHERE o.has_work AND NOT o.at_cap AND NOT o.paused)) END "
            "WHERE account_id = ANY(:ids)"
        ),
        {"ids": ids},
    )


#: Live runs and history as one relation; names come from whatever account `tx` has entered.
_RUNS = """
WITH found AS (
  SELECT run_id, account_id, kind, subject_id, state, trigger, attempt, queued_at, started_at,
         worker_id, error_code, error, NULL::timestamptz AS finished_at, not_before,
         again_run_id IS NOT NULL AS run_again, options->'tripped' AS tripped
  FROM active_runs WHERE {where}
  UNION ALL
  (SELECT run_id, account_id, kind, subject_id, state, trigger, attempt, queued_at, started_at,
          worker_id, error_code, error, finished_at, NULL, false, NULL
   FROM runs WHERE {where} ORDER BY finished_at DESC LIMIT :limit)
)
SELECT f.*, coalesce(c.name, r.name, '(deleted)') AS subject_name
FROM found f
LEFT JOIN connections c ON c.id = f.subject_id
LEFT JOIN resources r ON r.id = f.subject_id
ORDER BY f.finished_at DESC NULLS FIRST, f.queued_at DESC LIMIT :limit
"""


def _select(tx: Connection, where: str, limit: int, **parameters: object) -> Sequence[Run]:
    rows = tx.execute(text(_RUNS.format(where=where)), {**parameters, "limit": limit})
    return [_run(row) for row in rows]


def _run(row: Row[Any]) -> Run:
    return Run(
        run_id=row.run_id,
        account_id=row.account_id,
        kind=RunKind(row.kind),
        subject_id=row.subject_id,
        subject_name=row.subject_name,
        state=RunState(row.state),
        trigger=Trigger(row.trigger),
        attempt=row.attempt,
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        not_before=row.not_before,
        worker_id=row.worker_id,
        error_code=row.error_code,
        error=row.error,
        run_again=row.run_again,
        findings=tuple(Finding.model_validate(found) for found in row.tripped or ()),
    )


@dataclass(frozen=True, slots=True)
class Filter:
    """Which runs a listing shows; everything unset means all."""

    subject_id: UUID | None = None
    states: tuple[RunState, ...] = ()
    kinds: tuple[RunKind, ...] = ()
    error_code: str | None = None
    since: timedelta | None = None  # asked for within so long


_FILTERS = {
    "subject_id": "subject_id = :subject_id",
    "states": "state = ANY(:states)",
    "kinds": "kind = ANY(:kinds)",
    "error_code": "error_code = :error_code",
    "since": "queued_at > clock_timestamp() - :since",
}


def listing(
    tx: Connection, account_id: UUID, wanted: Filter | None = None, *, limit: int = 20
) -> Sequence[Run]:
    """Return an account's runs, live ones first, then the newest; `tx` has entered the account."""
    chosen = wanted or Filter()
    values: dict[str, object] = {
        "subject_id": chosen.subject_id,
        "states": [state.value for state in chosen.states],
        "kinds": [kind.value for kind in chosen.kinds],
        "error_code": chosen.error_code,
        "since": chosen.since,
    }
    used = {name: value for name, value in values.items() if value}
    where = " AND ".join(["account_id = :account", *(_FILTERS[name] for name in used)])
    return _select(tx, where, limit, account=account_id, **used)


def get(tx: Connection, run_id: UUID) -> Run:
    """Return one run, live or ended; NotFound otherwise. `tx` has entered its account."""
    found = _select(tx, "run_id = :id", 1, id=run_id)
    if not found:
        raise NotFound(f"run {run_id}: no such run; see: syncward run list")
    return found[0]


def beginning(tx: Connection, account_id: UUID, start: str) -> Sequence[Run]:
    """Return up to two of an account's runs whose ids begin so (digits and dashes of a UUID)."""
    digits = start.replace("-", "")
    low, high = UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))
    where = "account_id = :account AND run_id BETWEEN :low AND :high"
    return _select(tx, where, 2, account=account_id, low=low, high=high)


def promised(tx: Connection, run_id: UUID) -> bool:
    """Say whether a run of this id starts when the live run of its subject ends."""
    return (
        tx.execute(
            text("SELECT FROM active_runs WHERE again_run_id = :id"), {"id": run_id}
        ).one_or_none()
        is not None
    )


def progress(tx: Connection, run_id: UUID) -> tuple[str | None, int, int]:
    """Return (stream, rows, bytes) of a running run as of its last heartbeat."""
    row = tx.execute(
        text("SELECT stream, rows, bytes FROM leases WHERE run_id = :id"), {"id": run_id}
    ).one_or_none()
    return (None, 0, 0) if row is None else (row.stream, row.rows, row.bytes)


def _lock(tx: Connection, run_id: UUID) -> Row[Any]:
    subject = tx.execute(
        text("SELECT subject_id FROM active_runs WHERE run_id = :id"), {"id": run_id}
    ).scalar()
    if subject is not None:
        lock_schedule(tx, subject)
    live = tx.execute(
        text("SELECT * FROM active_runs WHERE run_id = :id FOR UPDATE"), {"id": run_id}
    ).one_or_none()
    if live is None:
        state = get(tx, run_id).state
        raise Conflict(f"run {run_id} has ended ({state}); nothing to do")
    return live


def cancel(tx: Connection, run_id: UUID, principal: Principal) -> RunState:
    """Ask a run to stop. One that no worker holds ends at once; others hear by heartbeat.

    One that is only promised, for when the live run of its subject ends, will not begin.
    """
    if _withdrawn(tx, run_id, principal):
        return RunState.CANCELLED
    live = _lock(tx, run_id)
    assert RunState(live.state) in LIVE_STATES  # noqa: S101 - the table's CHECK says so
    if live.state == RunState.RUNNING:
        tx.execute(
            text(
                "UPDATE active_runs SET cancel_by = coalesce(cancel_by, :by), "
                "cancel_requested_at = coalesce(cancel_requested_at, clock_timestamp()) "
                "WHERE run_id = :id"
            ),
            {"id": run_id, "by": str(principal)},
        )
        audit.append(tx, run_event(AuditAction.RUN_CANCEL_REQUESTED, live, principal))
        return RunState.RUNNING
    end(tx, run_id, RunState.CANCELLED, principal, error_code="cancelled", error="Cancelled.")
    return RunState.CANCELLED


#: What was asked for meanwhile is dropped, but not forgotten: it gets its line of history.
_WITHDRAW = text(
    f"WITH live AS (SELECT subject_id, again_run_id, again_trigger, {AGAIN_KIND} AS kind "  # noqa: S608 - a constant
    "FROM active_runs WHERE again_run_id = :id FOR UPDATE), "
    "dropped AS (UPDATE active_runs a SET again_run_id = NULL, again_trigger = NULL, "
    "again_kind = NULL, again_options = NULL FROM live WHERE a.subject_id = live.subject_id "
    "RETURNING a.account_id, a.subject_id) "
    "INSERT INTO runs (run_id, account_id, kind, subject_id, state, trigger, scheduled_for, "
    "queued_at, attempt, fence, error_code, error) SELECT live.again_run_id, d.account_id, "
    "live.kind, d.subject_id, 'cancelled', live.again_trigger, clock_timestamp(), "
    "clock_timestamp(), 0, 0, 'cancelled', 'Cancelled.' FROM live "
    "JOIN dropped d ON d.subject_id = live.subject_id "
    "RETURNING run_id, account_id, subject_id, attempt"
)


def _withdrawn(tx: Connection, run_id: UUID, principal: Principal) -> bool:
    subject = tx.execute(
        text("SELECT subject_id FROM active_runs WHERE again_run_id = :id"), {"id": run_id}
    ).scalar()
    if subject is None:
        return False
    lock_schedule(tx, subject)
    row = tx.execute(_WITHDRAW, {"id": run_id}).one_or_none()
    if row is None:  # the live run ended between our two statements: the promised one is live now
        return False
    audit.append(tx, run_event(AuditAction.RUN_CANCELLED, row, principal, reason="cancelled"))
    return True


def busy(tx: Connection, *, account_id: UUID, subject_id: UUID | None = None) -> Sequence[UUID]:
    """Return the runs of an account, or of one connection in it, that a worker has or will take."""
    return (
        tx.execute(
            text(
                "SELECT run_id FROM active_runs WHERE account_id = :account "
                "AND (CAST(:subject AS uuid) IS NULL OR subject_id = :subject) "
                "AND state IN ('dispatched', 'running') ORDER BY run_id"
            ),
            {"account": account_id, "subject": subject_id},
        )
        .scalars()
        .all()
    )


def approve(tx: Connection, run_id: UUID, principal: Principal) -> None:
    """Let a run that a guard stopped go on; it is queued again with the approval noted."""
    live = _awaiting(tx, run_id)
    before = RunOptions.model_validate(live.options)
    options = before.model_copy(
        update={
            "approved": before.approved if before.tripped else live.error_code,
            "tripped": (),
            "approvals": (*before.approvals, *before.tripped),
        }
    )
    tx.execute(
        text(
            "UPDATE active_runs SET state = 'queued', not_before = clock_timestamp(), "
            "options = CAST(:options AS jsonb) WHERE run_id = :id"
        ),
        {"id": run_id, "options": options.model_dump_json()},
    )
    wake_account(tx, live.account_id)
    bell.ring(tx)
    audit.append(tx, _decision(AuditAction.RUN_APPROVED, live, principal))


def reject(tx: Connection, run_id: UUID, principal: Principal) -> None:
    """End a run that a guard stopped; the previous data stays served."""
    live = _awaiting(tx, run_id)
    audit.append(tx, _decision(AuditAction.RUN_REJECTED, live, principal))
    end(tx, run_id, RunState.CANCELLED, principal, error_code="rejected", error=live.error)


def _decision(action: AuditAction, live: Row[Any], principal: Principal) -> AuditEvent:
    """Make the event of a decision; it says of how much, as that is all that an approval covers."""
    tripped = RunOptions.model_validate(live.options).tripped
    found = "; ".join(f"{f.stream} {f.guard} {f.amount}" for f in tripped) or None
    return run_event(action, live, principal, reason=live.error_code, found=found)


def _awaiting(tx: Connection, run_id: UUID) -> Row[Any]:
    live = _lock(tx, run_id)
    if live.state != RunState.AWAITING_APPROVAL:
        raise Conflict(f"run {run_id} is {live.state}; only a run awaiting approval can be decided")
    return live
