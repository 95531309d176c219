"""End a run, whoever ends it: out of the live table, into history, and the next one begins.

Lock order everywhere: schedules, leases, active_runs, account_queues.
"""

import json
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.limits import ERROR_TEXT_MAX, FAILURES_IN_A_ROW_MAX
from schemas.runs import Priority, RunState
from storage import audit

#: Into history, and let the dispatcher look at the account again: unconditionally, for a test of
#: its flags could miss a race. The account comes last in the order of locks.
_HISTORY = text(
    "WITH freed AS (UPDATE account_queues SET at_cap = false, has_work = has_work OR :again "
    "WHERE account_id = :account_id) "
    "INSERT INTO runs (run_id, account_id, kind, subject_id, state, trigger, scheduled_for, "
    "queued_at, started_at, attempt, fence, worker_id, error_code, error) VALUES (:run_id, "
    ":account_id, :kind, :subject_id, :state, :trigger, :scheduled_for, :queued_at, :started_at, "
    ":attempt, :fence, :worker_id, :error_code, :error)"
)
_KEPT = (
    *("run_id", "account_id", "kind", "subject_id", "trigger", "scheduled_for"),
    *("queued_at", "started_at", "attempt", "worker_id"),
)
_AGAIN = text(
    "INSERT INTO active_runs (subject_id, run_id, account_id, kind, source_id, destination_id, "
    "state, trigger, scheduled_for, priority, options) VALUES (:subject_id, :run_id, :account_id, "
    ":kind, :source_id, :destination_id, 'queued', :trigger, clock_timestamp(), :priority, "
    "coalesce(CAST(:options AS jsonb), '{}'))"
)
_ACTIONS = {
    RunState.SUCCEEDED: AuditAction.RUN_SUCCEEDED,
    RunState.FAILED: AuditAction.RUN_FAILED,
    RunState.CANCELLED: AuditAction.RUN_CANCELLED,
}


def lock_schedule(tx: Connection, subject_id: UUID) -> int:
    """Take the first lock in the order and return the connection's fence (0 for a resource)."""
    fence = tx.execute(
        text("SELECT fence FROM schedules WHERE connection_id = :id FOR NO KEY UPDATE"),
        {"id": subject_id},
    ).scalar()
    return int(fence or 0)


def run_event(
    action: AuditAction,
    run: Row[Any],
    principal: Principal,
    *,
    outcome: str = "success",
    reason: str | None = None,
    **detail: str | int | bool | None,
) -> AuditEvent:
    """Make the event of one run's change of state."""
    return AuditEvent(
        action,
        TargetKind.RUN,
        run.run_id,
        principal,
        account_id=run.account_id,
        outcome=outcome,
        reason=reason,
        run_id=run.run_id,
        detail={"attempt": run.attempt, "subject": str(run.subject_id), **detail},
    )


def end(
    tx: Connection,
    run: Row[Any],
    state: RunState,
    principal: Principal,
    *,
    fence: int | None = None,
    error_code: str | None = None,
    error: str | None = None,
    pause_reason: str | None = None,
) -> None:
    """Write history for a run whose live row the caller has just deleted and passes in.

    Counts failures in a row, pauses the connection where that is due, starts the run that was
    asked for meanwhile (under the id it was promised), and leaves events for all of it. `fence`
    comes from a caller that has locked the schedule already.
    """
    if fence is None:
        fence = lock_schedule(tx, run.subject_id)
    tx.execute(
        _HISTORY,
        {
            **{name: getattr(run, name) for name in _KEPT},
            "state": state.value,
            "fence": fence,
            "error_code": error_code,
            "error": error[:ERROR_TEXT_MAX] if error else None,
            "again": run.again_run_id is not None,
        },
    )
    events = [run_event(_ACTIONS[state], run, principal, reason=error_code)]
    if run.kind == "sync":
        events += _count(tx, run, state, principal, pause_reason)
    if run.again_run_id is not None:
        events.append(_start_again(tx, run, principal))
    audit.append(tx, *events)


def _count(
    tx: Connection, run: Row[Any], state: RunState, principal: Principal, pause_reason: str | None
) -> list[AuditEvent]:
    """Keep failures in a row; pause after too many, or at once for a reason that repeats."""
    if state is RunState.CANCELLED and pause_reason is None:
        return []
    succeeded = state is RunState.SUCCEEDED
    paused = tx.execute(
        text(
            "UPDATE schedules SET "
            "failures = CASE WHEN :succeeded THEN 0 ELSE failures + 1 END, "
            "last_success_at = CASE WHEN :succeeded THEN clock_timestamp() "
            "ELSE last_success_at END, "
            "state_reason = CASE WHEN state = 'active' AND NOT :succeeded THEN "
            "coalesce(:reason, CASE WHEN failures + 1 >= :max THEN 'failures' END) "
            "ELSE state_reason END, "
            "state = CASE WHEN state = 'active' AND NOT :succeeded AND "
            "(CAST(:reason AS text) IS NOT NULL OR failures + 1 >= :max) "
            "THEN 'paused' ELSE state END "
            "WHERE connection_id = :id RETURNING state, state_reason"
        ),
        {
            "id": run.subject_id,
            "succeeded": succeeded,
            "reason": pause_reason,
            "max": FAILURES_IN_A_ROW_MAX,
        },
    ).one_or_none()
    if paused is None or succeeded or paused.state != "paused":
        return []
    return [
        AuditEvent(
            AuditAction.CONNECTION_PAUSED,
            TargetKind.CONNECTION,
            run.subject_id,
            principal,
            account_id=run.account_id,
            reason=paused.state_reason,
            run_id=run.run_id,
        )
    ]


def _start_again(tx: Connection, run: Row[Any], principal: Principal) -> AuditEvent:
    manual = run.again_trigger == "manual"
    tx.execute(
        _AGAIN,
        {
            "subject_id": run.subject_id,
            "run_id": run.again_run_id,
            "account_id": run.account_id,
            "kind": run.kind,
            "source_id": run.source_id,
            "destination_id": run.destination_id,
            "trigger": run.again_trigger,
            "priority": Priority.MANUAL if manual else Priority.SCHEDULED,
            "options": None if run.again_options is None else json.dumps(run.again_options),
        },
    )
    return AuditEvent(
        AuditAction.RUN_QUEUED,
        TargetKind.RUN,
        run.again_run_id,
        principal,
        account_id=run.account_id,
        reason="asked_for_while_running",
        run_id=run.again_run_id,
        detail={"subject": str(run.subject_id), "after": str(run.run_id)},
    )


def free_account(tx: Connection, account_id: UUID, *, has_work: bool = False) -> None:
    """Let the dispatcher look at this account again, unconditionally: a test could miss a race."""
    tx.execute(
        text(
            "UPDATE account_queues SET at_cap = false, has_work = has_work OR :work "
            "WHERE account_id = :id"
        ),
        {"id": account_id, "work": has_work},
    )
