"""When a schedule is due: pure functions over the wall clock and elapsed time."""

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.due import decide, next_time, shortest_gap
from schemas.errors import ConfigError
from schemas.schedules import Schedule
from storage.due import DueSchedule

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "America/St_Johns"]
CRONS = ["*/7 * * * *", "30 2 * * *", "15 1,2,3 * * *", "0 0 * * 0", "59 23 L * *"]
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


def test_slots_of_a_long_outage_are_counted_where_they_are_too_many_for_a_row_each():
    schedule = Schedule(every=timedelta(minutes=1))
    decision = decide(due(schedule, NOW - timedelta(minutes=100)), NOW)
    assert decision.run_for == NOW
    assert decision.missed + len(decision.skipped) + 1 == 101


@settings(deadline=None)  # a cron that fires once a month is looked for day by day
@given(moments, st.sampled_from(ZONES), st.sampled_from(CRONS), st.integers(0, 6_000))
def test_passed_cron_slots_are_those_that_lay_ahead_before(then, zone, cron, minutes):
    schedule = Schedule(cron=cron, zone=zone)
    now = then + timedelta(minutes=minutes)
    first = following(schedule, then, then)
    ahead, slot = [first], following(schedule, then, first)
    while slot <= now:
        ahead, slot = [*ahead, slot], following(schedule, then, slot)
    decision = decide(due(schedule, first), max(now, first))
    assert [*decision.skipped, decision.run_for] == ahead[-10:]
    assert decision.missed == len(ahead[:-10])
    assert decision.next_due_at == slot


def test_a_cron_that_nobody_claimed_for_years_is_decided_at_once():
    schedule = Schedule(cron="* * * * *")
    started = time.process_time()
    decision = decide(due(schedule, NOW - timedelta(days=3_000)), NOW)
    assert time.process_time() - started < 2
    assert decision.run_for == NOW
    assert decision.missed >= 900


@given(st.uuids(version=4), st.integers(1, 3_600))
def test_jitter_delays_a_connection_always_by_the_same_and_its_slot_stays(connection_id, seconds):
    schedule = Schedule(cron="0 * * * *", jitter=timedelta(seconds=seconds))
    late = schedule.offset(connection_id)
    assert timedelta(0) <= late < timedelta(seconds=seconds)
    one = replace(due(schedule, NOW + late, NOW), connection_id=connection_id)
    decision = decide(one, NOW + late)
    assert decision.run_for == NOW
    assert decision.next_due_at == NOW + timedelta(hours=1) + late


@pytest.mark.parametrize("broken", [{"cron": "61 * * * *"}, {"cron": "0 0 30 2 *"}, {"zone": "No"}])
def test_a_schedule_that_cannot_be_followed_is_an_answer(broken):
    schedule = Schedule.model_construct(**{"cron": "0 * * * *", **broken})
    decision = decide(due(schedule, NOW), NOW + timedelta(seconds=1))
    assert decision.invalid
    assert decision.run_for is None


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
