"""What holds for the whole installation: whether anything may start, and which schedulers live."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.limits import SCHEDULER_SILENT_AFTER
from storage import audit


@dataclass(frozen=True, slots=True)
class InstanceState:
    """`reason` is what the operator said when pausing."""

    paused: bool
    reason: str | None
    busy: int  # runs that a worker holds or is about to


def read(tx: Connection) -> InstanceState:
    """Return the state, and how much still runs."""
    row = tx.execute(
        text(
            "SELECT state = 'paused' AS paused, state_reason, (SELECT count(*) FROM active_runs "
            "WHERE state IN ('dispatched', 'running')) AS busy FROM instance"
        )
    ).one()
    return InstanceState(row.paused, row.state_reason, int(row.busy))


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


def scheduler_seen(tx: Connection, scheduler_id: str, version: str, *, queue_alive: bool) -> bool:
    """Note that a scheduler lives and whether Redis answers it; forget those long silent.

    Returns whether it is the one that exports the cluster's gauges: the oldest of the living.
    """
    tx.execute(
        text(
            "INSERT INTO schedulers (scheduler_id, version, queue_down_since) VALUES (:id, "
            ":version, CASE WHEN :alive THEN NULL ELSE clock_timestamp() END) "
            "ON CONFLICT (scheduler_id) DO UPDATE SET seen_at = clock_timestamp(), "
            "queue_down_since = CASE WHEN :alive THEN NULL "
            "ELSE coalesce(schedulers.queue_down_since, clock_timestamp()) END"
        ),
        {"id": scheduler_id, "version": version, "alive": queue_alive},
    )
    tx.execute(
        text(
            "DELETE FROM schedulers WHERE seen_at < clock_timestamp() - 20 * CAST(:s AS interval)"
        ),
        {"s": SCHEDULER_SILENT_AFTER},
    )
    oldest = tx.execute(
        text(
            "SELECT scheduler_id FROM schedulers WHERE seen_at > clock_timestamp() - :silent "
            "ORDER BY started_at, scheduler_id LIMIT 1"
        ),
        {"silent": SCHEDULER_SILENT_AFTER},
    ).scalar()
    return bool(oldest == scheduler_id)


def scheduler_left(tx: Connection, scheduler_id: str) -> None:
    """Forget a scheduler that stops in order."""
    tx.execute(text("DELETE FROM schedulers WHERE scheduler_id = :id"), {"id": scheduler_id})


@dataclass(frozen=True, slots=True)
class Schedulers:
    """Those heard of lately; `queue_down_since` only if Redis answers none of them."""

    alive: int
    queue_down_since: datetime | None


def schedulers(tx: Connection) -> Schedulers:
    """Count the living schedulers, and say since when none of them reaches Redis."""
    row = tx.execute(
        text(
            "SELECT count(*) AS alive, CASE WHEN count(*) = count(queue_down_since) "
            "THEN min(queue_down_since) END AS down FROM schedulers "
            "WHERE seen_at > clock_timestamp() - :silent"
        ),
        {"silent": SCHEDULER_SILENT_AFTER},
    ).one()
    return Schedulers(int(row.alive), row.down)
