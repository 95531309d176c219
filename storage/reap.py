"""The scheduler's third step in SQL: leases that expired, jobs that vanished, runs out of time."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, Principal
from schemas.limits import (
    LOST_LEASES_MAX,
    PROMOTE_AFTER,
    PROMOTE_BATCH,
    REAP_BATCH,
    RETRY_FIRST,
    WAKE_LOOKBACK,
    WORKER_SILENT_AFTER,
)
from schemas.runs import Priority, RunState
from storage import audit
from storage.endings import end, free_account, run_event
from storage.runs import wake_account


def amnesty(tx: Connection, lease: timedelta) -> bool:
    """Say whether the database has just come back, so that no worker could renew in time."""
    return bool(
        tx.execute(
            text(
                "SELECT clock_timestamp() - pg_postmaster_start_time() < 1.5 * CAST(:l AS interval)"
            ),
            {"l": lease},
        ).scalar_one()
    )


def expired_leases(
    tx: Connection, principal: Principal, lost_leases_max: int = LOST_LEASES_MAX
) -> int:
    """Take runs from workers that went silent: back to the queue, or failed after too many.

    A run whose schedule somebody holds is left for the next tick: a process that froze inside a
    transaction must not keep the runs of all others from being recovered.
    """
    leases = tx.execute(
        text(
            "SELECT l.run_id, l.token, a.subject_id, s.connection_id IS NOT NULL AS scheduled "
            "FROM leases l JOIN active_runs a ON a.run_id = l.run_id "
            "LEFT JOIN schedules s ON s.connection_id = a.subject_id "
            "WHERE l.expires_at < clock_timestamp() LIMIT :limit"
        ),
        {"limit": REAP_BATCH},
    ).all()
    locked = _lock_schedules(tx, [lease.subject_id for lease in leases if lease.scheduled])
    ours = [lease for lease in leases if not lease.scheduled or lease.subject_id in locked]
    return sum(_take(tx, lease, principal, lost_leases_max) for lease in ours)


def _lock_schedules(tx: Connection, subjects: Sequence[UUID]) -> set[UUID]:
    """Take the first locks of all runs before the later ones of any; return those not held."""
    found = tx.execute(
        text(
            "SELECT connection_id FROM schedules WHERE connection_id = ANY(:ids) "
            "ORDER BY connection_id FOR NO KEY UPDATE SKIP LOCKED"
        ),
        {"ids": subjects},
    )
    return set(found.scalars())


_AFTER_LOSSES = (
    "The connection is paused. Look at the workers' memory and logs, then: syncward connection "
    "resume"
)
_AFTER_LOSSES_OF_OTHERS = "Look at the workers' memory and logs, then ask again"


def _take(tx: Connection, lease: Row[Any], principal: Principal, lost_leases_max: int) -> bool:
    gone = tx.execute(
        text("DELETE FROM leases WHERE token = :token AND expires_at < clock_timestamp()"),
        {"token": lease.token},
    ).rowcount
    if not gone:  # renewed or finished between our two statements
        return False
    run = tx.execute(
        text("SELECT * FROM active_runs WHERE run_id = :run AND lease_token = :token FOR UPDATE"),
        {"run": lease.run_id, "token": lease.token},
    ).one_or_none()
    if run is None:
        return False
    if run.cancel_requested_at is not None:
        _end(tx, run, RunState.CANCELLED, principal, code="cancelled", error="Cancelled.")
    elif run.lost_leases + 1 >= lost_leases_max:
        text_ = f"The worker was lost {run.lost_leases + 1} times without progress. "
        text_ += _AFTER_LOSSES if run.kind == "sync" else _AFTER_LOSSES_OF_OTHERS
        _end(tx, run, RunState.FAILED, principal, code="lost_leases", error=text_)
    else:
        _requeue_lost(tx, run, principal)
    return True


def _requeue_lost(tx: Connection, run: Row[Any], principal: Principal) -> None:
    """Queue it again; at once the first time, for a crash is likely not this run's doing."""
    tx.execute(
        text(
            "UPDATE active_runs SET state = 'queued', lease_token = NULL, worker_id = NULL, "
            "lost_leases = lost_leases + 1, "
            "not_before = clock_timestamp() + lost_leases * CAST(:delay AS interval), "
            "error_code = 'lost_lease', error = 'The worker went silent; another one goes on.' "
            "WHERE run_id = :run"
        ),
        {"run": run.run_id, "delay": RETRY_FIRST},
    )
    free_account(tx, run.account_id, has_work=True)
    audit.append(
        tx,
        run_event(
            AuditAction.RUN_REQUEUED, run, principal, reason="lost_lease", worker=run.worker_id
        ),
    )


def _end(
    tx: Connection,
    run: Row[Any],
    state: RunState,
    principal: Principal,
    *,
    code: str,
    error: str,
) -> None:
    pause = code if state is RunState.FAILED else None
    end(tx, run.run_id, state, principal, error_code=code, error=error, pause_reason=pause)


def undelivered(tx: Connection, principal: Principal) -> int:
    """Put back runs whose job nobody claimed in time; their next dispatch has a new number."""
    rows = tx.execute(
        text(
            "UPDATE active_runs SET state = 'queued', dispatch_deadline = NULL WHERE run_id IN ("
            "SELECT run_id FROM active_runs WHERE state = 'dispatched' "
            "AND dispatch_deadline < clock_timestamp() LIMIT :limit FOR UPDATE SKIP LOCKED) "
            "RETURNING *"
        ),
        {"limit": REAP_BATCH},
    ).all()
    for account in sorted({row.account_id for row in rows}):
        free_account(tx, account, has_work=True)
    audit.append(
        tx,
        *(
            run_event(AuditAction.RUN_REQUEUED, row, principal, reason="undelivered")
            for row in rows
        ),
    )
    return len(rows)


def overdue(tx: Connection, principal: Principal) -> int:
    """End tests and discoveries that nobody answered in time; somebody waits at a prompt."""
    ids: Sequence[UUID] = (
        tx.execute(
            text(
                "SELECT run_id FROM active_runs WHERE deadline_at < clock_timestamp() "
                "AND state IN ('queued', 'dispatched') LIMIT :limit FOR UPDATE SKIP LOCKED"
            ),
            {"limit": REAP_BATCH},
        )
        .scalars()
        .all()
    )
    for run_id in ids:
        error = (
            "No worker took this in time. Is one running? Start it with: syncward worker "
            "(development: syncward up --dev)"
        )
        end(tx, run_id, RunState.FAILED, principal, error_code="no_worker", error=error)
    return len(ids)


def cancel_stuck(tx: Connection, stuck_after: timedelta, principal: Principal) -> int:
    """Ask runs to stop that have moved no row for twice the allowed time."""
    rows = tx.execute(
        text(
            "UPDATE active_runs SET cancel_requested_at = clock_timestamp(), cancel_by = 'stuck' "
            "WHERE run_id IN (SELECT a.run_id FROM active_runs a JOIN leases l USING (run_id) "
            "WHERE a.cancel_requested_at IS NULL "
            "AND l.progress_at < clock_timestamp() - 2 * CAST(:stuck AS interval) "
            "FOR UPDATE OF a SKIP LOCKED) RETURNING *"
        ),
        {"stuck": stuck_after},
    ).all()
    audit.append(
        tx,
        *(
            run_event(AuditAction.RUN_CANCEL_REQUESTED, row, principal, reason="stuck")
            for row in rows
        ),
    )
    return len(rows)


def wake_ready(tx: Connection) -> int:
    """Wake accounts with runs that have waited long enough; looks back a little, not far."""
    return _wake(
        tx,
        "SELECT account_id FROM account_queues WHERE (at_cap OR NOT has_work) "
        "AND account_id IN (SELECT account_id FROM active_runs WHERE state = 'queued' "
        "AND not_before BETWEEN clock_timestamp() - CAST(:back AS interval) "
        "AND clock_timestamp())",
        back=WAKE_LOOKBACK,
    )


def wake_capped(tx: Connection) -> int:
    """Wake accounts of which a run ended while the dispatcher was marking them as being at a cap.

    The end of a run does not touch an account that it does not see marked; this looks again.
    """
    return _wake(
        tx,
        "SELECT account_id FROM account_queues q WHERE at_cap "
        "AND looked_at > clock_timestamp() - CAST(:back AS interval) "
        "AND busy_seen > (SELECT count(*) FROM active_runs b "
        "WHERE b.account_id = q.account_id AND b.state IN ('dispatched', 'running'))",
        back=WAKE_LOOKBACK,
    )


def _wake(tx: Connection, which: str, **values: object) -> int:
    ids = tx.execute(text(which), values).scalars().all()
    if ids:
        wake_account(tx, *ids)
    return len(ids)


def promote(tx: Connection) -> int:
    """Raise the priority of runs that have waited long, so that none starves within its account."""
    return tx.execute(
        text(
            "UPDATE active_runs SET priority = priority - 1, promotions = promotions + 1 "
            "WHERE run_id IN (SELECT run_id FROM active_runs WHERE state = 'queued' "
            "AND priority > :highest AND not_before < clock_timestamp() "
            "- (promotions + 1) * CAST(:after AS interval) LIMIT :limit FOR UPDATE SKIP LOCKED)"
        ),
        {"highest": Priority.INTERACTIVE + 1, "after": PROMOTE_AFTER, "limit": PROMOTE_BATCH},
    ).rowcount


def forget_workers(tx: Connection) -> int:
    """Remove workers not heard of for long, and wake accounts whose flags a crash left behind."""
    _wake(
        tx,
        "SELECT account_id FROM account_queues q WHERE EXISTS (SELECT FROM active_runs r "
        "WHERE r.account_id = q.account_id AND r.state = 'queued') "
        "AND (NOT q.has_work OR (q.at_cap AND q.runs_max > (SELECT count(*) FROM active_runs b "
        "WHERE b.account_id = q.account_id AND b.state IN ('dispatched', 'running'))))",
    )
    return tx.execute(
        text("DELETE FROM workers WHERE seen_at < clock_timestamp() - 20 * CAST(:s AS interval)"),
        {"s": WORKER_SILENT_AFTER},
    ).rowcount
