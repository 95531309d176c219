"""Cluster-wide values for metrics, each one cheap query over run control."""

from dataclasses import dataclass

from sqlalchemy import Connection, text

from schemas.limits import WORKER_SILENT_AFTER


@dataclass(frozen=True, slots=True)
class Gauges:
    """One reading. Seconds are by the database's clock; None where there is nothing to measure."""

    queue_depth: dict[str, int]
    queue_oldest_seconds: float
    schedule_lateness_seconds: float
    worker_slots: dict[str, int]
    stream_freshness_seconds_max: dict[str, float]  # by plan
    connections: dict[str, int]  # by state
    audit_last_event: int


def read(tx: Connection) -> Gauges:
    """Take one reading in the caller's transaction."""
    return Gauges(
        queue_depth=_counts(tx, "SELECT state, count(*) FROM active_runs GROUP BY state"),
        queue_oldest_seconds=_seconds(
            tx,
            "SELECT max(clock_timestamp() - greatest(queued_at, not_before)) FROM active_runs "
            "WHERE state = 'queued' AND not_before <= clock_timestamp()",
        ),
        schedule_lateness_seconds=_seconds(
            tx,
            "SELECT clock_timestamp() - min(next_due_at) FROM schedules "
            "WHERE state = 'active' AND next_due_at <= clock_timestamp()",
        ),
        worker_slots=_worker_slots(tx),
        stream_freshness_seconds_max={
            row[0]: float(row[1])
            for row in tx.execute(
                text(
                    "SELECT a.plan, extract(epoch FROM max(clock_timestamp() - s.last_success_at)) "
                    "FROM schedules s JOIN accounts a ON a.id = s.account_id "
                    "WHERE s.state = 'active' AND s.last_success_at IS NOT NULL GROUP BY a.plan"
                )
            )
        },
        connections=_counts(tx, "SELECT state, count(*) FROM schedules GROUP BY state"),
        audit_last_event=int(
            tx.execute(text("SELECT coalesce(max(seq), 0) FROM audit.event")).scalar_one()
        ),
    )


def _counts(tx: Connection, query: str) -> dict[str, int]:
    return {row[0]: int(row[1]) for row in tx.execute(text(query))}


def _seconds(tx: Connection, query: str) -> float:
    value = tx.execute(text(query)).scalar()
    return max(0.0, value.total_seconds()) if value is not None else 0.0


def _worker_slots(tx: Connection) -> dict[str, int]:
    row = tx.execute(
        text(
            "SELECT coalesce(sum(slots), 0), (SELECT count(*) FROM leases) FROM workers "
            "WHERE NOT draining AND seen_at > clock_timestamp() - CAST(:silent AS interval)"
        ),
        {"silent": WORKER_SILENT_AFTER},
    ).one()
    used = int(row[1])
    return {"used": used, "free": max(0, int(row[0]) - used)}
