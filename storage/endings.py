"""End a run, whoever ends it: out of the live table, into history, and the next one begins.

Lock order everywhere: schedules, leases, active_runs, account_queues.
"""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.limits import ERROR_TEXT_MAX
from schemas.runs import Claim, Priority, RunKind, RunState
from storage import audit

#: The live row goes: one that nobody holds, or a worker's own together with its lease.
_GONE = "gone AS (DELETE FROM active_runs WHERE run_id = :run RETURNING *)"
_GONE_HELD = (
    "unleased AS (DELETE FROM leases WHERE token = :token RETURNING 1), "
    "gone AS (DELETE FROM active_runs USING (SELECT count(*) FROM unleased) AS first "
    "WHERE run_id = :run AND lease_token = :token RETURNING active_runs.*)"
)
#: One statement, one round trip: history, the count of failures in a row and the account follow
#: from the row that went. An account that is not at its cap is not touched, so that its runs do not
#: wait for each other here; one that is just being marked is looked at again (reap.wake_capped).
_FOLLOWS = (
    ", kept AS (INSERT INTO runs (run_id, account_id, kind, subject_id, state, trigger, "
    "scheduled_for, queued_at, started_at, attempt, fence, worker_id, error_code, error) "
    "SELECT g.run_id, g.account_id, g.kind, g.subject_id, :state, g.trigger, g.scheduled_for, "
    "g.queued_at, g.started_at, g.attempt, coalesce((SELECT fence FROM schedules "
    "WHERE connection_id = g.subject_id), 0), g.worker_id, :code, :error FROM gone g), "
    "counted AS (UPDATE schedules s SET "
    "failures = CASE WHEN :succeeded THEN 0 ELSE failures + 1 END, "
    "last_success_at = CASE WHEN :succeeded THEN clock_timestamp() ELSE last_success_at END, "
    "(state, state_reason) = (SELECT 'paused', p.reason FROM (SELECT CASE WHEN NOT :succeeded "
    "THEN coalesce(:pause, CASE WHEN s.failures + 1 >= s.pause_after THEN 'failures' END) END "
    "AS reason) AS p WHERE s.state = 'active' AND p.reason IS NOT NULL "
    "UNION ALL SELECT s.state, s.state_reason LIMIT 1) "
    "FROM gone g WHERE s.connection_id = g.subject_id AND g.kind = 'sync' AND :counts "
    "RETURNING s.connection_id, s.state, s.state_reason), "
    "freed AS (UPDATE account_queues q SET at_cap = false, woken = q.woken + 1, "
    "has_work = q.has_work OR g.again_run_id IS NOT NULL FROM gone g "
    "WHERE q.account_id = g.account_id AND (q.at_cap OR g.again_run_id IS NOT NULL)) "
    "SELECT g.*, c.state_reason AS pause_reason, c.state = 'paused' AND was.state = 'active' "
    "AS paused FROM gone g LEFT JOIN counted c ON c.connection_id = g.subject_id "
    "LEFT JOIN schedules was ON was.connection_id = g.subject_id"  # as it was before
)
_END = text(f"WITH {_GONE}{_FOLLOWS}")
_END_HELD = text(f"WITH {_GONE_HELD}{_FOLLOWS}")
#: The kind of the promised run. The version before names none: it promises a resource's question
#: once more, or the sync of a slot.
AGAIN_KIND = (
    "coalesce(again_kind, CASE WHEN kind IN ('test', 'discover') THEN kind ELSE 'sync' END)"
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


def kind_of_again(kind: str, again_kind: str | None) -> str:
    """Say what AGAIN_KIND says, of a row at hand."""
    return again_kind or (kind if kind in {"test", "discover"} else RunKind.SYNC.value)


def lock_schedule(tx: Connection, subject_id: UUID) -> None:
    """Take the first lock in the order; a resource has no schedule and needs none."""
    tx.execute(
        text("SELECT FROM schedules WHERE connection_id = :id FOR NO KEY UPDATE"),
        {"id": subject_id},
    )


def run_event(
    action: AuditAction,
    run: Row[Any] | Claim,
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
    run_id: UUID,
    state: RunState,
    principal: Principal,
    *,
    token: UUID | None = None,
    error_code: str | None = None,
    error: str | None = None,
    pause_reason: str | None = None,
    also: Sequence[AuditEvent] = (),
) -> Row[Any] | None:
    """Move a live run into history and return its live row; None if `token` no longer owns it.

    Counts failures in a row, pauses the connection where that is due, starts the run that was
    asked for meanwhile (under the id it was promised), and leaves events for all of it, after those
    of `also`. The caller has locked the schedule.
    """
    run = tx.execute(
        _END if token is None else _END_HELD,
        {
            "run": run_id,
            **({} if token is None else {"token": token}),
            "state": state.value,
            "succeeded": state is RunState.SUCCEEDED,
            "counts": state is not RunState.CANCELLED or pause_reason is not None,
            "code": error_code,
            "error": error[:ERROR_TEXT_MAX] if error else None,
            "pause": pause_reason,
        },
    ).one_or_none()
    if run is None:
        return None
    events = [*also, run_event(_ACTIONS[state], run, principal, reason=error_code)]
    if run.paused:
        events.append(_paused(run, principal))
    if run.again_run_id is not None:
        events.append(_start_again(tx, run, principal))
    audit.append(tx, *events)
    return run


def _paused(run: Row[Any], principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.CONNECTION_PAUSED,
        TargetKind.CONNECTION,
        run.subject_id,
        principal,
        account_id=run.account_id,
        reason=run.pause_reason,
        run_id=run.run_id,
    )


def _start_again(tx: Connection, run: Row[Any], principal: Principal) -> AuditEvent:
    manual = run.again_trigger == "manual"
    kind = kind_of_again(run.kind, run.again_kind)
    tx.execute(
        _AGAIN,
        {
            "subject_id": run.subject_id,
            "run_id": run.again_run_id,
            "account_id": run.account_id,
            "kind": kind,
            "source_id": run.source_id,
            "destination_id": run.destination_id,
            "trigger": run.again_trigger,
            "priority": Priority.asked_for(RunKind(kind)) if manual else Priority.SCHEDULED,
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
        detail={"kind": kind, "subject": str(run.subject_id), "after": str(run.run_id)},
    )


def lock_accounts(tx: Connection, account_ids: Sequence[UUID]) -> None:
    """Take the last locks in the order; several of them in the order of their ids."""
    tx.execute(
        text(
            "SELECT FROM account_queues WHERE account_id = ANY(:ids) "
            "ORDER BY account_id FOR NO KEY UPDATE"
        ),
        {"ids": list(account_ids)},
    )


def free_account(tx: Connection, account_id: UUID, *, has_work: bool = False) -> None:
    """Let the dispatcher look at this account again, unconditionally: a test could miss a race."""
    tx.execute(
        text(
            "UPDATE account_queues SET at_cap = false, woken = woken + 1, "
            "has_work = has_work OR :work WHERE account_id = :id"
        ),
        {"id": account_id, "work": has_work},
    )
