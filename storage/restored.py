"""When a destination is ahead of the control database: what we know of its runs, and catching up.

That happens after the control database was restored from a backup (docs/backup.md).
"""

from dataclasses import replace
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, Principal
from schemas.errors import LeaseLost
from schemas.runs import Claim
from storage import audit
from storage.endings import lock_schedule, run_event


def knows(tx: Connection, run_id: UUID) -> bool:
    """Say whether this database has ever heard of a run (that retention has not removed since)."""
    return bool(
        tx.execute(
            text(
                "SELECT EXISTS (SELECT FROM active_runs WHERE run_id = :run) "
                "OR EXISTS (SELECT FROM runs WHERE run_id = :run)"
            ),
            {"run": run_id},
        ).scalar_one()
    )


def adopt(tx: Connection, held: Claim, above: int, principal: Principal) -> Claim:
    """Raise the connection's fence over what the destination has seen; return the claim with it.

    LeaseLost if the run is not ours any more. The fence grows here as it does there.
    """
    lock_schedule(tx, held.subject_id)
    row = tx.execute(
        text(
            "UPDATE schedules s SET fence = greatest(s.fence, :above) + 1 FROM active_runs a "
            "WHERE a.run_id = :run AND a.lease_token = :token AND a.state = 'running' "
            "AND s.connection_id = a.subject_id "
            "RETURNING s.fence, a.run_id, a.account_id, a.subject_id, a.attempt"
        ),
        {"above": above, "run": held.run_id, "token": held.token},
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"run {held.run_id}: another worker owns it")
    raised = run_event(
        AuditAction.RUN_FENCE_RAISED, row, principal, before=held.fence, after=row.fence
    )
    audit.append(tx, raised)
    return replace(held, fence=row.fence)
