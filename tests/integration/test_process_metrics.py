"""What schedulers and workers count: once per event, under the reason that it has."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import psycopg
import pytest
from prometheus_client import REGISTRY

from scheduler import ticks
from schemas.errors import LeaseLost, TransientError
from schemas.runs import Claim
from tests.world import Jobs
from workers import run_sync
from workers.control import RunControl
from workers.heartbeat import Heartbeat

pytestmark = pytest.mark.integration


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE a (id int PRIMARY KEY)",
        "CREATE TABLE b (id int PRIMARY KEY)",
        "INSERT INTO b SELECT generate_series(1, 5)",
    )
    spec = "{mode: merge, key: [id], cursor: xmin}"
    world.apply({"public.a": spec, "public.b": spec}, schedule="{every: 1h}")
    return world


@contextmanager
def grows(by: float, name: str, **labels: str):
    """The sample grows by so much in the block."""

    def value() -> float:
        found = REGISTRY.get_sample_value(f"syncward_{name}", labels)
        assert found is not None, f"{name}{labels} does not exist from the start"
        return found

    before = value()
    yield
    assert value() - before == by


def test_a_run_counts_its_wait_its_steps_and_its_end(shop):
    with (
        grows(1, "run_queue_wait_seconds_count", trigger="manual"),
        grows(1, "run_control_duration_seconds_count", step="claim"),
        grows(1, "run_control_duration_seconds_count", step="checkpoint"),  # the last is in finish
        grows(1, "run_control_duration_seconds_count", step="finish"),
        grows(1, "runs_total", connector="postgres", state="succeeded"),
        grows(1, "run_attempts_total", reason="succeeded"),
        grows(5, "rows_total", connector="postgres", direction="loaded"),
        grows(1, "dispatches_total", result="sent"),
    ):
        shop.sync()


def test_the_wait_is_from_when_the_run_was_ready(shop):
    shop.enqueue()
    (job,) = shop.dispatch()
    shop.control.act(
        "UPDATE active_runs SET queued_at = now() - interval '1 h', "
        "not_before = now() - interval '100 s'"
    )
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    assert claim.waited_s == pytest.approx(100, abs=20)


def test_slots_count_by_what_became_of_them(shop):
    def due(ago: str) -> None:
        shop.control.act(
            "UPDATE schedules SET anchor_at = now() - interval '10 h 1 s', "
            f"next_due_at = now() - interval '{ago}'"
        )

    due("1 s")
    with grows(1, "slots_total", outcome="queued"), grows(0, "slots_total", outcome="skipped"):
        ticks.due_tick(shop.scheduler)
    due("3 h 1 s")
    with grows(1, "slots_total", outcome="merged"), grows(3, "slots_total", outcome="skipped"):
        ticks.due_tick(shop.scheduler)


class Full(Jobs):
    """A queue that answers and takes nothing."""

    def send(self, job) -> bool:
        del job
        return False


def test_jobs_that_redis_did_not_take_and_runs_that_were_put_back_are_counted(shop):
    shop.enqueue()
    shop.deps.heartbeat.beat()
    with grows(1, "dispatches_total", result="error"), grows(0, "dispatches_total", result="sent"):
        ticks.dispatch_tick(replace(shop.scheduler, queue=Full()))
    shop.control.act("UPDATE active_runs SET dispatch_deadline = now() - interval '1 s'")
    with grows(1, "runs_recovered_total", reason="undelivered"), grows(0, "leases_expired_total"):
        ticks.reap_tick(shop.scheduler)
    (job,) = shop.dispatch()
    shop.claim(job)
    shop.expire_leases()
    with grows(1, "runs_recovered_total", reason="lease"), grows(1, "leases_expired_total"):
        ticks.reap_tick(shop.scheduler)


@contextmanager
def held(shop, heartbeat: Heartbeat):
    """A claimed run that this heartbeat renews."""
    shop.enqueue()
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    with heartbeat.hold(claim) as control:
        yield control


def stopped(control: RunControl) -> bool:
    try:
        control.check()
    except LeaseLost:
        return True
    return False


def test_a_lease_that_went_elsewhere_counts_once_however_often_it_is_noticed(shop):
    heartbeat = shop.deps.heartbeat
    with held(shop, heartbeat) as control:
        with grows(1, "lease_renewals_total", result="renewed"):
            heartbeat.beat()
        shop.control.act("UPDATE active_runs SET lease_token = gen_random_uuid()")
        with (
            grows(1, "leases_lost_total", reason="taken"),
            grows(0, "leases_lost_total", reason="no_heartbeat"),
            grows(0, "leases_lost_total", reason="at_finish"),
            grows(3, "lease_renewals_total", result="lost"),
        ):
            for _ in range(3):
                heartbeat.beat()
            assert stopped(control)
            control.lost("at_finish")


def test_a_worker_that_cannot_renew_stops_by_itself_and_says_so(shop, monkeypatch):
    def away() -> psycopg.Connection[tuple[object, ...]]:
        raise TransientError("control database: not reachable")

    healthy = shop.deps.heartbeat
    heartbeat = Heartbeat(away, healthy._worker, 1.0)
    with held(shop, heartbeat) as control:
        with grows(1, "lease_renewals_total", result="failed"):
            heartbeat.beat()
        assert not stopped(control)
        later = control._renewed_at + 25
        monkeypatch.setattr("workers.control.clock", lambda: later)
        with grows(1, "leases_lost_total", reason="no_heartbeat"):
            assert stopped(control)
            assert stopped(control)


def test_a_lease_that_is_found_lost_at_the_end_counts_as_that(shop, monkeypatch):
    shop.enqueue()
    (job,) = shop.dispatch()
    work: Callable[..., object] = run_sync._work

    def stolen(attempt):
        outcome = work(attempt)
        shop.control.act("UPDATE active_runs SET lease_token = gen_random_uuid()")
        return outcome

    monkeypatch.setattr(run_sync, "_work", stolen)
    with (
        grows(1, "leases_lost_total", reason="at_finish"),
        grows(0, "runs_total", connector="postgres", state="succeeded"),
    ):
        run_sync.execute(job, shop.deps)
