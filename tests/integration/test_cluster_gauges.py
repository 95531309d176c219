"""The cluster's gauges: one exporter, a constant number of series, bounded cost."""

from collections import Counter
from dataclasses import replace
from time import clock_gettime

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from sqlalchemy import text

from scheduler import cluster, ticks
from scheduler.cluster import ClusterGauges
from storage import gauges
from storage.engine import transaction

pytestmark = pytest.mark.integration

#: Accounts on three plans (one of them gone), each with a connection in some state, some with runs.
SEED = """
INSERT INTO accounts (id, name, plan) SELECT md5('a' || g)::uuid, 'account-' || g,
  (ARRAY['standard', 'unlimited', 'gold-2019'])[1 + g % 3] FROM generate_series(1, :n) g;
INSERT INTO account_queues (account_id, runs_max, has_work, at_cap)
  SELECT md5('a' || g)::uuid, 1, g % 2 = 0, g % 4 = 0 FROM generate_series(1, :n) g;
INSERT INTO schedules (connection_id, account_id, source_id, destination_id, kind, interval_s,
    state, state_reason, last_success_at, anchor_at, next_due_at)
  SELECT md5('c' || g)::uuid, md5('a' || g)::uuid, md5('s')::uuid, md5('d')::uuid, 'interval', 3600,
    CASE WHEN g % 5 = 0 THEN 'paused' ELSE 'active' END,
    CASE WHEN g % 10 = 0 THEN 'reason of account ' || g WHEN g % 5 = 0 THEN 'failures' END,
    CASE WHEN g % 7 > 0 THEN now() - g * interval '1 min' END, now() - interval '3 days',
    now() + interval '1 hour' FROM generate_series(1, :n) g;
INSERT INTO active_runs (subject_id, run_id, account_id, kind, state, trigger, scheduled_for,
    priority, not_before, dispatch_deadline, error_code)
  SELECT md5('c' || g)::uuid, md5('r' || g)::uuid, md5('a' || g)::uuid, 'sync',
    CASE WHEN g % 3 = 0 THEN 'dispatched' ELSE 'queued' END, 'schedule', now(), 5,
    now() + (g % 2) * interval '1 hour', CASE WHEN g % 3 = 0 THEN now() END, 'code-' || g
    FROM generate_series(1, :n) g
"""


def seed(control, accounts: int) -> None:
    with control.admin_engine().begin() as tx:
        tx.execute(text("SET LOCAL session_replication_role = replica"))
        for statement in SEED.split(";"):
            tx.execute(text(statement), {"n": accounts})


@pytest.fixture
def scheduler(world):
    return world.scheduler


def look(scheduler) -> Counter[str]:
    """Take a reading as the elected scheduler; return each exported series with its copies."""
    scheduler.cluster._scanned_at = float("-inf")
    ticks.presence_tick(scheduler)
    return shown(scheduler)


def shown(scheduler) -> Counter[str]:
    scheduler.cluster.wait()
    registry = CollectorRegistry()
    registry.register(scheduler.cluster)
    lines = generate_latest(registry).decode().splitlines()
    return Counter(line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#"))


def test_ten_thousand_accounts_make_no_new_series(world, scheduler):
    for tick in (ticks.due_tick, ticks.dispatch_tick, ticks.reap_tick, ticks.upkeep_tick):
        tick(scheduler)
    before, own = look(scheduler), len(list_samples())
    assert len(before) == 70
    assert max(before.values()) == 1
    seed(world.control, 10_000)
    world.control.act("UPDATE schedules SET next_due_at = now() WHERE state = 'active'")
    for tick in (ticks.due_tick, ticks.dispatch_tick, ticks.reap_tick, ticks.upkeep_tick):
        tick(scheduler)
    after = look(scheduler)
    assert set(after) == set(before)
    assert len(list_samples()) == own


def list_samples() -> list[str]:
    return [str((s.name, s.labels)) for family in REGISTRY.collect() for s in family.samples]


def test_what_is_exported_is_what_is_there(world, scheduler):
    seed(world.control, 1_000)
    with transaction(scheduler.engine) as tx:
        found, connections = gauges.read(tx), gauges.read_connections(tx)
    assert found.queue_depth == {
        "awaiting_approval": 0, "delayed": 333, "dispatched": 333, "queued": 334, "running": 0,
    }  # fmt: skip
    assert connections.states == {"active": 800, "paused": 200}
    assert connections.pauses["failures"] == 100
    assert connections.pauses["other"] == 100
    active = [g for g in range(1, 1_001) if g % 5]
    assert connections.never_succeeded == sum(1 for g in active if g % 7 == 0)
    assert sum(sum(f.buckets) for f in connections.freshness.values()) == 800
    ages = {
        plan: max(g if g % 7 else 3 * 1_440 for g in active if g % 3 == rest) * 60
        for plan, rest in (("standard", 0), ("unlimited", 1), ("other", 2))
    }
    assert {p: pytest.approx(f.oldest, abs=60) for p, f in connections.freshness.items()} == ages


def test_an_account_over_its_cap_is_found(world, scheduler):
    seed(world.control, 9)
    with transaction(scheduler.engine) as tx:
        assert gauges.read(tx).invariant_violations["account_over_cap"] == 0
    world.control.act("UPDATE active_runs SET account_id = md5('a3')::uuid")
    with transaction(scheduler.engine) as tx:
        assert gauges.read(tx).invariant_violations["account_over_cap"] == 1


# ── one exporter ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def clock(monkeypatch):
    """Seconds that have passed for the exporters; the database's own clock goes on."""
    ahead = [0.0]
    monkeypatch.setattr(cluster, "clock_gettime", lambda which: clock_gettime(which) + ahead[0])
    return ahead


def test_a_killed_exporter_falls_silent_before_the_next_one_speaks(world, scheduler, clock):
    second = replace(scheduler, scheduler_id="second", cluster=ClusterGauges())
    assert (ticks.presence_tick(scheduler), ticks.presence_tick(second)) == (1, 0)
    assert (bool(shown(scheduler)), bool(shown(second))) == (True, False)

    def pass_time(seconds: float) -> None:  # the first is stopped: its ticks come no more
        clock[0] += seconds
        world.control.act(
            "UPDATE schedulers SET seen_at = seen_at - make_interval(secs => :s) "
            "WHERE scheduler_id = 'scheduler'",
            s=seconds,
        )

    pass_time(14)
    assert ticks.presence_tick(second) == 0
    assert (bool(shown(scheduler)), bool(shown(second))) == (True, False)
    pass_time(2)
    assert not shown(scheduler)
    assert ticks.presence_tick(second) == 1
    assert shown(second)
    assert ticks.presence_tick(scheduler) == 1  # it lived longest: it takes over when it is back
    assert ticks.presence_tick(second) == 0
    assert (bool(shown(scheduler)), bool(shown(second))) == (True, False)


def test_one_that_leaves_in_order_hands_over_at_once(scheduler):
    second = replace(scheduler, scheduler_id="second", cluster=ClusterGauges())
    assert (ticks.presence_tick(scheduler), ticks.presence_tick(second)) == (1, 0)
    ticks.leave(scheduler)
    assert ticks.presence_tick(second) == 1
    assert (bool(shown(scheduler)), bool(shown(second))) == (False, True)


def test_old_values_are_not_shown(world, scheduler, clock):
    assert look(scheduler)
    world.control.act("ALTER TABLE leases RENAME TO leases_away")  # readings fail from now on
    failed = REGISTRY.get_sample_value("syncward_scheduler_ticks_failed_total", {"tick": "gauges"})
    clock[0] += 61
    ticks.presence_tick(scheduler)
    assert not shown(scheduler)
    assert failed is not None
    after = REGISTRY.get_sample_value("syncward_scheduler_ticks_failed_total", {"tick": "gauges"})
    assert after == failed + 1


def test_the_schedules_are_scanned_once_a_minute_also_when_the_scan_fails(
    world, scheduler, clock, monkeypatch
):
    scans = []
    real = gauges.read_connections

    def counted(tx):
        scans.append(clock[0])
        return real(tx)

    monkeypatch.setattr(gauges, "SCAN_TIMEOUT_MS", 1)
    monkeypatch.setattr(gauges, "read_connections", counted)
    seed(world.control, 10_000)
    for _ in range(3):
        ticks.presence_tick(scheduler)
        shown(scheduler)
        clock[0] += 5
    assert len(scans) == 1
    assert "syncward_connections_never_succeeded" not in shown(scheduler)
    clock[0] += 60
    monkeypatch.setattr(gauges, "SCAN_TIMEOUT_MS", 30_000)
    ticks.presence_tick(scheduler)
    assert "syncward_connections_never_succeeded" in shown(scheduler)
    assert len(scans) == 2
