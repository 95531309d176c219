"""Whether runs can start and end, as `syncward doctor schedule` sees it."""

from datetime import UTC, datetime

from cli.checks.base import Area, Check
from cli.checks.database import DATABASE
from cli.context import Cli
from schemas.health import ScheduleHealth
from storage import health

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
