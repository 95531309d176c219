"""Cluster-wide values for metrics and `top`. Every label is from a closed set, always all of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Connection, Row, text

from schemas.failures import PAUSING
from schemas.labels import OTHER, closed
from schemas.limits import WORKER_SILENT_AFTER
from schemas.plans import PLANS
from schemas.runs import LIVE_STATES
from storage import instance, seal_watch
from storage.due import HELD

#: Upper bounds of the freshness buckets, in seconds.
FRESHNESS_BUCKETS = (60, 300, 900, 3_600, 21_600, 86_400, 604_800)

#: `queued` is ready; `delayed` waits for a time of its own (a retry).
QUEUE_STATES = frozenset({"delayed", *(state.value for state in LIVE_STATES)})
CONNECTION_STATES = frozenset({"active", "paused"})
PAUSE_REASONS = PAUSING | {"operator", "failures", "schedule_invalid"}

#: How long one reading may take: it must never become the load that it measures.
READ_TIMEOUT_MS = 10_000
#: The scan over all schedules takes longest; a connection pool waits no longer than this for it.
SCAN_TIMEOUT_MS = 30_000


@dataclass(frozen=True, slots=True)
class Freshness:
    """How long ago active connections of one plan last succeeded."""

    oldest: float = 0.0
    #: connections per bound of FRESHNESS_BUCKETS, then those beyond
    buckets: tuple[int, ...] = (0,) * (len(FRESHNESS_BUCKETS) + 1)
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class ConnectionGauges:
    """What takes a scan over all schedules: once a minute is enough."""

    states: dict[str, int] = field(default_factory=dict)
    pauses: dict[str, int] = field(default_factory=dict)  # by reason
    freshness: dict[str, Freshness] = field(default_factory=dict)  # by plan
    never_succeeded: int = 0


@dataclass(frozen=True, slots=True)
class Gauges:
    """One reading. Seconds are by the database's clock; 0 where there is nothing to measure."""

    queue_depth: dict[str, int]
    queue_oldest_seconds: float
    schedule_lateness_seconds: float
    workers: dict[str, int]
    worker_slots: dict[str, int]
    schedulers: int
    instance_paused: int
    accounts_at_cap: int
    stuck_runs: int
    queue_up: int
    invariant_violations: dict[str, int]
    active_runs_dead_rows: int
    audit_last_event: int
    audit_seal_lag_seconds: float
    audit_publish_lag_seconds: float
    audit_log_size: int
    audit_sealers: int


def read(tx: Connection) -> Gauges:
    """Take one reading in the caller's transaction: run control, not the schedules."""
    _bound(tx, READ_TIMEOUT_MS)
    depth, oldest = queue(tx)
    living = instance.schedulers(tx)
    workers, slots = _workers(tx)
    behind = seal_watch.lag(tx)
    return Gauges(
        queue_depth=depth,
        queue_oldest_seconds=oldest,
        schedule_lateness_seconds=lateness(tx),
        workers=workers,
        worker_slots=slots,
        schedulers=living.alive,
        instance_paused=_count(tx, "SELECT count(*) FROM instance WHERE state = 'paused'"),
        accounts_at_cap=_count(tx, "SELECT count(*) FROM account_queues WHERE has_work AND at_cap"),
        stuck_runs=_count(
            tx,
            "SELECT count(*) FROM leases WHERE progress_at < clock_timestamp() - interval '15 min'",
        ),
        queue_up=int(living.queue_down_since is None),
        invariant_violations={name: _count(tx, query) for name, query in INVARIANTS.items()},
        active_runs_dead_rows=_count(
            tx,
            "SELECT n_dead_tup FROM pg_stat_all_tables WHERE relid = 'active_runs'::regclass",
        ),
        audit_last_event=_count(tx, "SELECT last_value FROM audit.event_seq_seq"),
        audit_seal_lag_seconds=behind.seal,
        audit_publish_lag_seconds=behind.publish,
        audit_log_size=behind.size,
        audit_sealers=behind.sealers,
    )


def _bound(tx: Connection, timeout_ms: int) -> None:
    """Limit what follows in time; some of it does read tables whole, unlike all else."""
    tx.execute(text(f"SET LOCAL statement_timeout = {timeout_ms}"))
    tx.execute(text("SET LOCAL enable_seqscan = on"))


def queue(tx: Connection) -> tuple[dict[str, int], float]:
    """Return live runs by state and the wait of the oldest ready one; one pass over live runs."""
    rows = tx.execute(
        text(
            "SELECT CASE WHEN state = 'queued' AND not_before > clock_timestamp() THEN 'delayed' "
            "ELSE state END AS key, count(*) AS n, CAST(extract(epoch FROM clock_timestamp() "
            "- min(greatest(queued_at, not_before))) AS float8) AS oldest "
            "FROM active_runs GROUP BY 1"
        )
    ).all()
    ready = next((row.oldest for row in rows if row.key == "queued"), 0.0)
    return _filled(rows, QUEUE_STATES), max(0.0, ready)


def lateness(tx: Connection) -> float:
    """Return how late the oldest slot is that a scheduler could have claimed, and none has."""
    seconds = tx.execute(
        text(
            "SELECT CAST(extract(epoch FROM now() - min(next_due_at)) AS float8) "  # noqa: S608 - a constant
            f"FROM schedules WHERE state = 'active' AND next_due_at <= now() AND NOT {HELD}"
        )
    ).scalar()
    return max(0.0, seconds or 0.0)


#: What must never be; each is 0 unless there is a bug or somebody changed rows by hand.
INVARIANTS = {
    "running_without_lease": "SELECT count(*) FROM active_runs a WHERE state = 'running' "
    "AND NOT EXISTS (SELECT FROM leases l WHERE l.run_id = a.run_id AND l.token = a.lease_token)",
    "lease_without_run": "SELECT count(*) FROM leases l WHERE NOT EXISTS "
    "(SELECT FROM active_runs a WHERE a.run_id = l.run_id AND a.lease_token = l.token)",
    "account_over_cap": "SELECT count(*) FROM (SELECT account_id, count(*) AS n FROM active_runs "
    "WHERE state IN ('dispatched', 'running') GROUP BY account_id) AS b "
    "JOIN account_queues q ON q.account_id = b.account_id WHERE b.n > q.runs_max",
    "slot_unclaimed": "SELECT count(*) FROM (SELECT FROM schedules WHERE state = 'active' "  # noqa: S608 - a constant
    f"AND next_due_at < now() - interval '5 min' AND NOT {HELD} LIMIT 1000) AS late",
}


def read_connections(tx: Connection) -> ConnectionGauges:
    """Count connections and their freshness; a connection without success counts from its start.

    One pass over the schedules: a second or two per million of them.
    """
    _bound(tx, SCAN_TIMEOUT_MS)
    rows = tx.execute(
        _SCAN, {"bounds": [0.0, *map(float, FRESHNESS_BUCKETS)], "plans": list(PLANS)}
    ).all()
    states = dict.fromkeys(sorted(CONNECTION_STATES), 0)
    pauses = dict.fromkeys((*sorted(PAUSE_REASONS), OTHER), 0)
    for row in rows:
        states[row.state] = states.get(row.state, 0) + row.n
        if row.state == "paused":
            pauses[closed(row.reason, PAUSE_REASONS)] += row.n
    return ConnectionGauges(
        states=states,
        pauses=pauses,
        freshness={plan: _freshness(rows, plan) for plan in (*PLANS, OTHER)},
        never_succeeded=sum(row.never for row in rows),
    )


_SCAN = text(
    "SELECT s.state, CASE WHEN s.state = 'paused' THEN coalesce(s.state_reason, 'operator') END "
    "AS reason, CASE WHEN fresh.age IS NULL THEN NULL WHEN a.plan = ANY(:plans) THEN a.plan "
    "ELSE 'other' END AS plan, width_bucket(fresh.age, CAST(:bounds AS float8[])) AS bucket, "
    "count(*) AS n, max(fresh.age) AS oldest, sum(fresh.age) AS total, "
    "count(*) FILTER (WHERE fresh.age IS NOT NULL AND s.last_success_at IS NULL) AS never "
    "FROM schedules s JOIN accounts a ON a.id = s.account_id CROSS JOIN LATERAL ("
    "SELECT CASE WHEN s.state = 'active' AND s.kind <> 'manual' THEN greatest(0, CAST(extract("
    "epoch FROM now() - coalesce(s.last_success_at, s.anchor_at)) AS float8)) END AS age) AS fresh "
    "GROUP BY 1, 2, 3, 4"
)


def _freshness(rows: Iterable[Row[tuple[object, ...]]], plan: str) -> Freshness:
    counts = [0] * (len(FRESHNESS_BUCKETS) + 1)
    oldest = total = 0.0
    for row in rows:
        if row.plan == plan:
            counts[row.bucket - 1] += row.n
            oldest, total = max(oldest, row.oldest), total + row.total
    return Freshness(oldest, tuple(counts), total)


def _filled(rows: Iterable[Row[tuple[object, ...]]], known: frozenset[str]) -> dict[str, int]:
    return {**dict.fromkeys(sorted(known), 0), **{row.key: int(row.n) for row in rows}}


def _count(tx: Connection, query: str) -> int:
    return int(tx.execute(text(query)).scalar() or 0)


def _workers(tx: Connection) -> tuple[dict[str, int], dict[str, int]]:
    """Return living workers by state, and slots of those that take runs, by use."""
    row = tx.execute(
        text(
            "SELECT count(*) FILTER (WHERE NOT draining) AS active, "
            "count(*) FILTER (WHERE draining) AS draining, "
            "coalesce(sum(slots) FILTER (WHERE NOT draining), 0) AS slots, "
            "(SELECT count(*) FROM leases) AS used FROM workers "
            "WHERE seen_at > clock_timestamp() - CAST(:silent AS interval)"
        ),
        {"silent": WORKER_SILENT_AFTER},
    ).one()
    free = max(0, int(row.slots) - int(row.used))
    return (
        {"active": int(row.active), "draining": int(row.draining)},
        {"used": int(row.used), "free": free},
    )
