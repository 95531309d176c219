"""Step 1: decide what is due. Pure: a schedule and the database's time in, decisions out."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from schemas.errors import ConfigError
from schemas.limits import CATCH_UP_COUNTED, CATCH_UP_MAX, CATCH_UP_WINDOW
from schemas.schedules import CatchUp, Schedule
from storage.due import Decision, DueSchedule

_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
}
_CRON_LENGTH_MAX = 100


def next_time(schedule: Schedule, anchor: datetime, after: datetime) -> datetime | None:
    """Return the first slot after `after`; None for manual schedules.

    Intervals count elapsed time from the anchor, so that they neither drift nor pile up; cron
    follows the wall clock of its zone (Debian's rules at daylight-saving changes).
    """
    if schedule.every is not None:
        passed = (after - anchor) // schedule.every
        return anchor + (passed + 1) * schedule.every
    if schedule.cron is not None:
        return next(_cron_times(schedule, after))
    return None


def _cron_times(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    local = after.astimezone(ZoneInfo(schedule.zone))
    for fire in CronSim(_ALIASES.get(schedule.cron or "", schedule.cron or ""), local):
        yield fire.astimezone(UTC)


def _cron_times_back(due: DueSchedule, now: datetime) -> Iterator[datetime]:
    """Yield slots in (due_at, now], the newest first: a long outage must not cost its length."""
    local = (now + timedelta(minutes=1)).astimezone(ZoneInfo(due.schedule.zone))
    text = _ALIASES.get(due.schedule.cron or "", due.schedule.cron or "")
    for fire in CronSim(text, local, reverse=True):
        slot = fire.astimezone(UTC)
        if slot <= due.due_at:
            return
        if slot <= now:
            yield slot


def shortest_gap(schedule: Schedule, now: datetime) -> timedelta | None:
    """Return the shortest distance of the next 100 slots; ConfigError if the cron is unusable."""
    if schedule.cron is None:
        return schedule.every
    text = _ALIASES.get(schedule.cron, schedule.cron)
    if len(text) > _CRON_LENGTH_MAX or len(text.split()) != 5:  # noqa: PLR2004 - cron has 5 fields
        raise ConfigError(f"cron {schedule.cron!r}: write five fields, e.g. 15 * * * *")
    try:
        times = list(islice(_cron_times(schedule, now), 100))
    except (CronSimError, StopIteration):
        times = []
    if len(times) < 2:  # noqa: PLR2004 - a gap has two ends
        raise ConfigError(f"cron {schedule.cron!r}: not a cron expression that ever fires")
    return min(b - a for a, b in pairwise(times))


def decide(due: DueSchedule, now: datetime) -> Decision:
    """Choose which of the passed slots gets a run, and when the schedule is due next.

    A schedule that cannot be followed (its zone is gone, another version wrote it) is an answer,
    too: one bad row must not stop the schedules of everybody else.
    """
    late = due.schedule.offset(due.connection_id)
    try:
        decision = _decide(replace(due, due_at=due.due_at - late), now - late)
    except (CronSimError, ArithmeticError, LookupError, StopIteration, TypeError, ValueError):
        return Decision(due, None, (), None, invalid=True)
    following = decision.next_due_at
    return replace(decision, next_due_at=None if following is None else following + late)


def _decide(due: DueSchedule, now: datetime) -> Decision:
    missed, slots = _passed_slots(due, now)
    following = next_time(due.schedule, due.anchor_at, now)
    latest = slots[-1]
    match due.schedule.catch_up:
        case CatchUp.SKIP if now - latest > CATCH_UP_WINDOW:
            return Decision(due, None, tuple(slots), following, missed)
        case CatchUp.ALL:
            # One slot per tick: the next one is due at once and waits for this run to end.
            rest = slots[1] if len(slots) > 1 else following
            return Decision(due, slots[0], (), rest, missed)
        case _:
            return Decision(due, latest, tuple(slots[:-1]), following, missed)


def _passed_slots(due: DueSchedule, now: datetime) -> tuple[int, list[datetime]]:
    """List the newest slots up to now, and count those before them, beginning with the claimed."""
    every = due.schedule.every
    if every is not None:
        later = max(0, (now - due.due_at) // every)
        kept = min(later, CATCH_UP_MAX - 1)
        return later - kept, [due.due_at + n * every for n in range(later - kept, later + 1)]
    passed = list(islice(_cron_times_back(due, now), CATCH_UP_COUNTED))
    slots = sorted([*passed[: CATCH_UP_MAX - 1], due.due_at])
    if len(passed) >= CATCH_UP_MAX:
        slots = sorted(passed[:CATCH_UP_MAX])
    return len(passed) + 1 - len(slots), slots
