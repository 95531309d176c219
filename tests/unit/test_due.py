"""When a schedule is due: pure functions over the wall clock and elapsed time."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.due import decide, next_time, shortest_gap
from schemas.errors import ConfigError
from schemas.schedules import Schedule
from storage.due import DueSchedule

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "America/St_Johns"]
moments = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1)).map(  # noqa: DTZ001 - made aware here
    lambda d: d.replace(tzinfo=UTC)
)


def due(schedule: Schedule, due_at: datetime, anchor: datetime | None = None) -> DueSchedule:
    nobody = UUID(int=0)
    return DueSchedule(nobody, nobody, nobody, nobody, schedule, anchor or due_at, due_at)


@given(moments, moments, st.integers(1, 10**6))
def test_an_interval_is_the_first_multiple_after_now(anchor, after, seconds):
    every = timedelta(seconds=seconds)
    following = next_time(Schedule(every=every), anchor, after)
    assert following is not None
    assert after < following <= after + every
    assert (following - anchor) % every == timedelta(0)


@given(moments, st.sampled_from(ZONES), st.integers(0, 59), st.integers(0, 23))
def test_a_daily_cron_fires_after_now_and_at_its_wall_clock_time(after, zone, minute, hour):
    schedule = Schedule(cron=f"{minute} {hour} * * *", zone=zone)
    first = next_time(schedule, after, after)
    assert first is not None
    assert first > after
    assert first - after <= timedelta(hours=25)
    local = first.astimezone(ZoneInfo(zone))
    shifted = local.utcoffset() != (local - timedelta(hours=3)).utcoffset()
    assert (local.hour, local.minute) == (hour, minute) or shifted


def following(schedule: Schedule, anchor: datetime, after: datetime) -> datetime:
    time = next_time(schedule, anchor, after)
    assert time is not None
    return time


def test_a_time_that_daylight_saving_skips_fires_once_that_day():
    schedule = Schedule(cron="30 2 * * *", zone="Europe/Berlin")
    before = datetime(2026, 3, 28, 12, tzinfo=UTC)
    times = [before]
    for _ in range(3):
        times.append(following(schedule, before, times[-1]))
    days = [t.astimezone(ZoneInfo("Europe/Berlin")).date() for t in times[1:]]
    assert len(set(days)) == 3


def test_a_time_that_daylight_saving_repeats_fires_once_that_day():
    schedule = Schedule(cron="30 2 * * *", zone="Europe/Berlin")
    times = [datetime(2026, 10, 24, 12, tzinfo=UTC)]
    for _ in range(3):
        times.append(following(schedule, times[0], times[-1]))
    gaps = [b - a for a, b in pairwise(times[1:])]
    assert all(timedelta(hours=23) <= gap <= timedelta(hours=25) for gap in gaps)


def test_manual_is_never_due():
    assert next_time(Schedule(), NOW, NOW) is None


@pytest.mark.parametrize("cron", ["* * * *", "0 0 30 2 *", "61 * * * *", "x", "0 0 * * * *"])
def test_a_cron_that_cannot_fire_is_refused(cron):
    with pytest.raises(ConfigError, match="cron"):
        shortest_gap(Schedule(cron=cron), NOW)


def test_the_shortest_gap_sees_uneven_crons():
    assert shortest_gap(Schedule(cron="0,5 * * * *"), NOW) == timedelta(minutes=5)
    assert shortest_gap(Schedule(cron="@hourly"), NOW) == timedelta(hours=1)


def test_missed_slots_become_one_run_and_the_rest_is_kept_in_the_ledger():
    schedule = Schedule(every=timedelta(minutes=1))
    decision = decide(due(schedule, NOW - timedelta(minutes=3)), NOW)
    assert decision.run_for == NOW
    assert decision.skipped == tuple(NOW - timedelta(minutes=m) for m in (3, 2, 1))
    assert decision.next_due_at == NOW + timedelta(minutes=1)


def test_skip_drops_slots_that_are_too_old():
    schedule = Schedule(every=timedelta(days=2), catch_up="skip")
    decision = decide(due(schedule, NOW - timedelta(hours=30)), NOW)
    assert decision.run_for is None
    assert decision.skipped


def test_all_runs_the_oldest_slot_and_comes_back_for_the_next():
    schedule = Schedule(every=timedelta(minutes=1), catch_up="all")
    decision = decide(due(schedule, NOW - timedelta(minutes=2)), NOW)
    assert decision.run_for == NOW - timedelta(minutes=2)
    assert decision.next_due_at == NOW - timedelta(minutes=1)


@given(moments, st.integers(1, 5_000), st.integers(0, 10**6))
def test_a_decision_always_moves_forward(anchor, every, late):
    schedule = Schedule(every=timedelta(seconds=every))
    now = anchor + timedelta(seconds=late)
    decision = decide(due(schedule, anchor, anchor), now)
    assert decision.next_due_at is not None
    assert decision.next_due_at > now
    assert decision.run_for is not None
    assert now - timedelta(seconds=every) < decision.run_for <= now
