"""Cluster-wide values for metrics, each one cheap query over run control."""

from dataclasses import dataclass, field

from sqlalchemy import Connection, text

from schemas.limits import WORKER_SILENT_AFTER
from storage import instance

#: Upper bounds of the freshness buckets, in seconds.
FRESHNESS_BUCKETS = (60, 300, 900, 3_600, 21_600, 86_400, 604_800)


@dataclass(frozen=True, slots=True)
class Freshness:
    """How long ago active connections of one plan last succeeded."""

    oldest: float
    buckets: tuple[int, ...]  # connections per bound of FRESHNESS_BUCKETS, then those beyond
    total: float


@dataclass(frozen=True, slots=True)
class ConnectionGauges:
    """What takes a scan over all schedules: once a minute is enough."""

    states: dict[str, int] = field(default_factory=dict)
    pauses: dict[str, int] = field(default_factory=dict)  # by reason
    freshness: dict[str, Freshness] = field(default_factory=dict)  # by plan


@dataclass(frozen=True, slots=True)
class Gauges:
    """One reading. Seconds are by the database's clock; 0 where there is nothing to measure."""

    queue_depth: dict[str, int]
    queue_oldest_seconds: float
    schedule_lateness_seconds: float
    worker_slots: dict[str, int]
    accounts_at_cap: int
    stuck_runs: int
    queue_up: int
    invariant_violations: dict[str, int]
    active_runs_dead_rows: int
    audit_last_event: int
    connections: ConnectionGauges


def read(tx: Connection, connections: ConnectionGauges | None = None) -> Gauges:
    """Take one reading in the caller's transaction; `connections` is one taken shortly before."""
    return Gauges(
        queue_depth=_counts(tx, "SELECT state, count(*) FROM active_runs GROUP BY state"),
        queue_oldest_seconds=_seconds(
            tx,
            "SELECT max(clock_timestamp() - greatest(queued_at, not_before)) FROM active_runs "
            "WHERE state = 'queued' AND not_before <= clock_timestamp()",
        ),
        schedule_lateness_seconds=_seconds(
            tx,
            "SELECT now() - min(next_due_at) FROM schedules "
            "WHERE state = 'active' AND next_due_at <= now()",
        ),
        worker_slots=_worker_slots(tx),
        accounts_at_cap=_count(tx, "SELECT count(*) FROM account_queues WHERE has_work AND at_cap"),
        stuck_runs=_count(
            tx,
            "SELECT count(*) FROM leases WHERE progress_at < clock_timestamp() - interval '15 min'",
        ),
        queue_up=int(instance.schedulers(tx).queue_down_since is None),
        invariant_violations={name: _count(tx, query) for name, query in _INVARIANTS.items()},
        active_runs_dead_rows=_count(
            tx,
            "SELECT n_dead_tup FROM pg_stat_all_tables WHERE relid = 'active_runs'::regclass",
        ),
        audit_last_event=_count(tx, "SELECT last_value FROM audit.event_seq_seq"),
        connections=connections or read_connections(tx),
    )


#: What must never be; each is 0 unless there is a bug or somebody changed rows by hand.
_INVARIANTS = {
    "running_without_lease": "SELECT count(*) FROM active_runs a WHERE state = 'running' "
    "AND NOT EXISTS (SELECT FROM leases l WHERE l.run_id = a.run_id AND l.token = a.lease_token)",
    "lease_without_run": "SELECT count(*) FROM leases l WHERE NOT EXISTS "
    "(SELECT FROM active_runs a WHERE a.run_id = l.run_id AND a.lease_token = l.token)",
    "account_over_cap": "SELECT count(*) FROM account_queues q WHERE q.runs_max < (SELECT "
    "count(*) FROM active_runs b WHERE b.account_id = q.account_id "
    "AND b.state IN ('dispatched', 'running'))",
    "slot_unclaimed": "SELECT count(*) FROM (SELECT FROM schedules WHERE state = 'active' "
    "AND next_due_at < now() - interval '5 min' LIMIT 1000) AS late",
}


def read_connections(tx: Connection) -> ConnectionGauges:
    """Count connections and their freshness; one pass over the schedules."""
    tx.execute(text("SET LOCAL enable_seqscan = on"))  # this does read them whole
    return ConnectionGauges(
        states=_counts(tx, "SELECT state, count(*) FROM schedules GROUP BY state"),
        pauses=_counts(
            tx,
            "SELECT coalesce(state_reason, 'operator'), count(*) FROM schedules "
            "WHERE state = 'paused' GROUP BY 1",
        ),
        freshness=_freshness(tx),
    )


def _freshness(tx: Connection) -> dict[str, Freshness]:
    rows = tx.execute(
        text(
            "SELECT plan, width_bucket(age, CAST(:bounds AS float8[])) AS bucket, count(*) AS n, "
            "max(age) AS oldest, sum(age) AS total FROM (SELECT a.plan, CAST(extract(epoch FROM "
            "clock_timestamp() - s.last_success_at) AS float8) AS age FROM schedules s "
            "JOIN accounts a ON a.id = s.account_id WHERE s.state = 'active' "
            "AND s.kind <> 'manual' AND s.last_success_at IS NOT NULL) AS ages GROUP BY 1, 2"
        ),
        {"bounds": [0.0, *map(float, FRESHNESS_BUCKETS)]},
    ).all()
    found = {}
    for plan in {row.plan for row in rows}:
        mine = {row.bucket: row for row in rows if row.plan == plan}
        counts = [mine[n].n if n in mine else 0 for n in range(1, len(FRESHNESS_BUCKETS) + 2)]
        found[plan] = Freshness(
            oldest=max(row.oldest for row in mine.values()),
            buckets=tuple(counts),
            total=sum(row.total for row in mine.values()),
        )
    return found


def _counts(tx: Connection, query: str) -> dict[str, int]:
    return {row[0]: int(row[1]) for row in tx.execute(text(query))}


def _count(tx: Connection, query: str) -> int:
    return int(tx.execute(text(query)).scalar() or 0)


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
