"""What `syncward doctor` checks, as data: an area gathers facts once, its checks look at them.

A later part of the system adds an `Area` here; docs/operations.md lists every check (tested).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from cli.context import Cli
from schemas.errors import ConfigError, TransientError
from schemas.health import DatabaseHealth, QueueHealth, ScheduleHealth
from storage import health
from workers.enqueue import JobQueue, open_client

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Check(Generic[F]):
    """One thing that may be wrong: how it is found, why it matters, what to do about it."""

    name: str
    why: str
    do: str
    wrong: Callable[[F], str | None]  # what is wrong, in a sentence; None: nothing


@dataclass(frozen=True, slots=True)
class Area(Generic[F]):
    """`gather` may raise one of our errors: then the area cannot be reached, and that is wrong."""

    name: str
    gather: Callable[[Cli], F]
    unreachable: Check[Any]
    checks: tuple[Check[F], ...]


# ── redis ────────────────────────────────────────────────────────────────────────────────────

_SLOW_S = 0.05


def _queue(cli: Cli) -> QueueHealth:
    if cli.settings.redis_url is None:
        raise ConfigError("SYNCWARD_REDIS_URL is not set, so Redis cannot be asked from here")
    queue = JobQueue(open_client(cli.settings.redis_url.get_secret_value()))
    try:
        found = queue.health()
    finally:
        queue.close()
    if found.problem is not None:
        raise TransientError(found.problem)
    return found


def _policy(redis: QueueHealth) -> str | None:
    if redis.maxmemory_policy is None:
        return "this login may not ask for the memory policy (INFO is refused)"
    if redis.maxmemory_policy == "noeviction":
        return None
    return f"maxmemory-policy is {redis.maxmemory_policy}: it may drop jobs without an error"


def _append_only(redis: QueueHealth) -> str | None:
    return (
        "the append-only file is off: a restart forgets all jobs"
        if (redis.append_only is False)
        else None
    )


def _dedicated(redis: QueueHealth) -> str | None:
    if not redis.foreign_keys:
        return None
    return f"{redis.foreign_keys} keys in this database are not Syncward's"


def _redis_latency(redis: QueueHealth) -> str | None:
    return _slow(redis.latency_s)


def _slow(seconds: float) -> str | None:
    return f"a round trip takes {seconds * 1000:.0f} ms" if seconds > _SLOW_S else None


REDIS = Area(
    "redis",
    _queue,
    Check(
        "reachable",
        "jobs wait in Postgres while Redis is away: nothing is lost, nothing starts",
        "start Redis, or correct SYNCWARD_REDIS_URL; runs start again by themselves",
        lambda _: None,
    ),
    (
        Check(
            "memory_policy",
            "a dropped job is sent again only after its deadline, and a full Redis should say so",
            "redis-cli CONFIG SET maxmemory-policy noeviction",
            _policy,
        ),
        Check(
            "append_only",
            "after a restart of Redis every job that was on its way waits for its deadline",
            "redis-cli CONFIG SET appendonly yes",
            _append_only,
        ),
        Check(
            "dedicated",
            "the queue's upkeep walks over all keys of its database and stalls it for seconds",
            "give Syncward a Redis of its own, or at least a database number of its own",
            _dedicated,
        ),
        Check(
            "latency",
            "each job costs round trips to Redis",
            "move Redis nearer to the schedulers and workers",
            _redis_latency,
        ),
    ),
)


# ── control database ─────────────────────────────────────────────────────────────────────────

_CLOCK_OFF_S = 2.0
_TRANSACTION_OLD_S = 900.0


def _database(cli: Cli) -> DatabaseHealth:
    with cli.transaction() as tx:
        return health.database(tx)


def _migrated(db: DatabaseHealth) -> str | None:
    if db.revision == db.wanted:
        return None
    return f"it is at revision {db.revision or 'none'}, this version wants {db.wanted}"


def _clock(db: DatabaseHealth) -> str | None:
    if abs(db.clock_offset_s) <= _CLOCK_OFF_S:
        return None
    way = "ahead of" if db.clock_offset_s > 0 else "behind"
    return f"the database's clock is {abs(db.clock_offset_s):.0f} s {way} this host's"


def _transactions(db: DatabaseHealth) -> str | None:
    if db.oldest is None or db.oldest.seconds <= _TRANSACTION_OLD_S:
        return None
    return f"{db.oldest.what} is open for {db.oldest.seconds / 60:.0f} min"


def _partitions(db: DatabaseHealth) -> str | None:
    return f"missing: {', '.join(db.partitions_missing)}" if db.partitions_missing else None


def _defaults(db: DatabaseHealth) -> str | None:
    return f"rows went into {', '.join(db.defaults_used)}" if db.defaults_used else None


def _db_latency(db: DatabaseHealth) -> str | None:
    return _slow(db.latency_s)


DATABASE = Area(
    "db",
    _database,
    Check(
        "reachable",
        "the control database decides everything; without it nothing starts and nothing ends",
        "start it, or correct SYNCWARD_DATABASE_URL",
        lambda _: None,
    ),
    (
        Check(
            "migrated",
            "processes of this version need this version's tables",
            "syncward db upgrade",
            _migrated,
        ),
        Check(
            "latency",
            "each run costs about ten round trips to the control database",
            "move the control database nearer to the schedulers and workers",
            _db_latency,
        ),
        Check(
            "clock",
            "only the database's clock decides, but logs of workers carry their hosts' time",
            "run a time service (chrony, systemd-timesyncd) on both",
            _clock,
        ),
        Check(
            "old_transactions",
            "vacuum cannot clean the hot tables behind it; claims get slower by the hour",
            "SELECT pg_terminate_backend(PID), or ROLLBACK PREPARED, in the control database",
            _transactions,
        ),
        Check(
            "partitions",
            "rows of a month without a partition go into the DEFAULT one, which is never dropped",
            "start a scheduler: it makes them within 30 s; see its log if it does not",
            _partitions,
        ),
        Check(
            "default_partitions",
            "retention cannot drop them, and a partition for their month cannot be made any more",
            "move the rows: see docs/operations.md, Partitions",
            _defaults,
        ),
    ),
)


# ── schedule ─────────────────────────────────────────────────────────────────────────────────

_LATE_S = 60.0
_DEAD_ROWS = 100_000
#: Somebody wanted these pauses; every other reason asks for somebody.
_WANTED_PAUSES = frozenset({"operator"})


def _schedule(cli: Cli) -> ScheduleHealth:
    with cli.transaction() as tx:
        return health.schedule(tx)


def _instance(schedule: ScheduleHealth) -> str | None:
    return f"drained: {schedule.paused}" if schedule.paused is not None else None


def _schedulers(schedule: ScheduleHealth) -> str | None:
    return None if schedule.schedulers else "no scheduler was heard of within 15 s"


def _queue_up(schedule: ScheduleHealth) -> str | None:
    since = schedule.queue_down_since
    if since is None:
        return None
    away = (datetime.now(UTC) - since).total_seconds()
    return f"no scheduler reaches Redis since {since:%Y-%m-%d %H:%M:%S} UTC ({away / 60:.0f} min)"


def _workers(schedule: ScheduleHealth) -> str | None:
    if not schedule.workers:
        return "no worker was heard of within 15 s"
    if not schedule.slots:
        return f"all {schedule.draining} workers are draining"
    return None


def _late(schedule: ScheduleHealth) -> str | None:
    late = schedule.late_s
    return f"the oldest due schedule waits for {late:.0f} s" if late > _LATE_S else None


def _stuck(schedule: ScheduleHealth) -> str | None:
    return f"{schedule.stuck} runs moved no row for 15 min" if schedule.stuck else None


def _deferred(schedule: ScheduleHealth) -> str | None:
    if not schedule.deferred:
        return None
    return f"{schedule.deferred} runs were told to wait for more than an hour in all"


def _invariants(schedule: ScheduleHealth) -> str | None:
    found = ", ".join(f"{name} {count}" for name, count in sorted(schedule.invariants.items()))
    return f"rows contradict each other: {found}" if found else None


def _pauses(schedule: ScheduleHealth) -> str | None:
    unwanted = {r: n for r, n in sorted(schedule.pauses.items()) if r not in _WANTED_PAUSES}
    found = ", ".join(f"{reason} {count}" for reason, count in unwanted.items())
    return f"{sum(unwanted.values())} connections are paused: {found}" if found else None


def _dead_rows(schedule: ScheduleHealth) -> str | None:
    dead = schedule.dead_rows
    return f"the table of live runs holds {dead:,} dead rows" if dead > _DEAD_ROWS else None


SCHEDULE = Area(
    "schedule",
    _schedule,
    DATABASE.unreachable,
    (
        Check(
            "instance",
            "nothing is started for anybody; what is due is kept",
            "syncward drain --end",
            _instance,
        ),
        Check(
            "schedulers",
            "nothing becomes due, nothing is recovered",
            "syncward scheduler",
            _schedulers,
        ),
        Check(
            "queue_up",
            "runs stay queued; nothing is lost, everything starts when Redis is back",
            "start Redis, then: syncward doctor redis",
            _queue_up,
        ),
        Check("workers", "nothing runs", "syncward worker", _workers),
        Check(
            "lateness",
            "runs start late for everybody",
            "look at syncward_scheduler_ticks_failed_total and the schedulers' logs; start another",
            _late,
        ),
        Check(
            "stuck_runs",
            "a slot and the connection's turn are held by something that does not move",
            "syncward run list --state running; then: syncward run cancel RUN",
            _stuck,
        ),
        Check(
            "deferred_runs",
            "another system limits its rate; after 24 h such a run fails",
            "syncward run list --error deferred; ask for a higher limit, or schedule less often",
            _deferred,
        ),
        Check(
            "invariants",
            "a bug, or somebody changed rows by hand",
            "report it with the output of: syncward doctor --json",
            _invariants,
        ),
        Check(
            "paused_connections",
            "their data gets older until somebody acts",
            "syncward connection list; mend the reason (docs/errors.md), then: connection resume",
            _pauses,
        ),
        Check(
            "dead_rows",
            "claims and dispatch read over them",
            "syncward doctor db shows what holds vacuum back",
            _dead_rows,
        ),
    ),
)

#: In the order in which they are looked at.
AREAS: dict[str, Area[Any]] = {area.name: area for area in (DATABASE, REDIS, SCHEDULE)}
