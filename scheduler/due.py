"""Step 1: decide what is due. Pure: a schedule and the database's time in, decisions out."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from schemas.errors import ConfigError
from schemas.limits import CATCH_UP_MAX, CATCH_UP_WINDOW
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
    """Choose which of the passed slots gets a run, and when the schedule is due next."""
    slots = _passed_slots(due, now)
    following = next_time(due.schedule, due.anchor_at, now)
    latest = slots[-1]
    match due.schedule.catch_up:
        case CatchUp.SKIP if now - latest > CATCH_UP_WINDOW:
            return Decision(due, None, tuple(slots), following)
        case CatchUp.ALL:
            # One slot per tick: the next one is due at once and waits for this run to end.
            rest = slots[1] if len(slots) > 1 else following
            return Decision(due, slots[0], (), rest)
        case _:
            return Decision(due, latest, tuple(slots[:-1]), following)


def _passed_slots(due: DueSchedule, now: datetime) -> list[datetime]:
    """List the newest slots in (…, now], the claimed one first if nothing was left out."""
    slots = [due.due_at]
    if due.schedule.every is not None:
        last = now - (now - due.anchor_at) % due.schedule.every
        first = max(due.due_at, last - (CATCH_UP_MAX - 1) * due.schedule.every)
        count = (last - first) // due.schedule.every
        return [first + n * due.schedule.every for n in range(count + 1)] or slots
    for slot in _cron_times(due.schedule, due.due_at):
        if slot > now:
            return slots
        slots = [*slots, slot][-CATCH_UP_MAX:]
    return slots
