"""What holds for the whole installation: whether anything may start."""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from storage import audit


@dataclass(frozen=True, slots=True)
class InstanceState:
    """`reason` is what the operator said when pausing."""

    paused: bool
    reason: str | None
    running: int  # runs that a worker holds or is about to


def read(tx: Connection) -> InstanceState:
    """Return the state, and how much still runs."""
    row = tx.execute(
        text(
            "SELECT state = 'paused' AS paused, state_reason, (SELECT count(*) FROM active_runs "
            "WHERE state IN ('dispatched', 'running')) AS running FROM instance"
        )
    ).one()
    return InstanceState(row.paused, row.state_reason, int(row.running))


def pause(tx: Connection, reason: str, principal: Principal) -> bool:
    """Start nothing any more, for anybody; what runs goes on. False if it was paused already."""
    return _move(tx, "paused", reason, AuditAction.INSTANCE_PAUSED, principal)


def resume(tx: Connection, principal: Principal) -> bool:
    """Start runs again; False if it was active."""
    return _move(tx, "active", None, AuditAction.INSTANCE_RESUMED, principal)


def _move(
    tx: Connection, state: str, reason: str | None, action: AuditAction, principal: Principal
) -> bool:
    moved = tx.execute(
        text(
            "UPDATE instance SET state = :state, state_reason = :reason, "
            "changed_at = clock_timestamp() WHERE state <> :state"
        ),
        {"state": state, "reason": reason},
    ).rowcount
    if moved:
        event = AuditEvent(action, TargetKind.INSTANCE, audit.INSTANCE_ID, principal, reason=reason)
        audit.append(tx, event)
    return bool(moved)
