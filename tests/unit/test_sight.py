"""A reaper that was cut off from the database does not take runs from healthy workers."""

from datetime import timedelta

import pytest

from scheduler import ticks

LEASE = timedelta(seconds=30)


@pytest.fixture
def clock(monkeypatch):
    now = [1_000.0]
    monkeypatch.setattr(ticks, "clock_gettime", lambda _clock: now[0])
    return now


def test_one_that_sees_the_database_regularly_is_never_blind(clock):
    sight = ticks.Sight()
    for _ in range(100):
        assert not sight.was_blind(LEASE)
        clock[0] += 29


def test_one_that_was_cut_off_for_a_lease_waits_a_lease(clock):
    sight = ticks.Sight()
    assert not sight.was_blind(LEASE)
    clock[0] += 31
    assert sight.was_blind(LEASE)
    clock[0] += 29
    assert sight.was_blind(LEASE)
    clock[0] += 2
    assert not sight.was_blind(LEASE)
