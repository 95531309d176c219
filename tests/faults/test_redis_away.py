"""Redis that is silent, loses answers, or is gone for long: runs come later, none is lost."""

import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

import pytest

from embedded.valkey import Server
from scheduler import ticks
from schemas.errors import TransientError
from schemas.limits import DISPATCH_DEADLINE
from schemas.runs import Rule, RunKind, RunOptions, RunState
from storage import explain, resources, runs
from storage.runs import Subject
from tests.faults.proxy import Proxy
from tests.faults.test_processes import Fleet
from tests.integration.test_queue import Consumer, until
from tests.world import OPERATOR
from workers import run_sync
from workers.enqueue import JobQueue, open_client

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]

BUSY = "SELECT count(*) FROM active_runs WHERE state IN ('dispatched', 'running')"
STREAMS = {"public.log": "{mode: append, cursor: xmin}"}
#: What one command to Redis may take (workers/enqueue.py), and as much again for a busy machine.
TIMEOUT_S, SLACK_S = 5.0, 4.0


@pytest.fixture
def redis(tmp_path_factory):
    """A Valkey that may be stopped and started."""
    with Server(tmp_path_factory.mktemp("away"), durable=False, guard_parent=True) as started:
        yield started


@pytest.fixture
def proxy(redis):
    with Proxy(redis.host, redis.port) as made:
        yield made


@pytest.fixture
def shop(world, redis, proxy):
    """A stepped world whose scheduler sends to Redis through the proxy."""
    world.pair.source(
        "CREATE TABLE log (n bigserial, v text)",
        "INSERT INTO log (v) SELECT 'v' FROM generate_series(1, 100) g",
    )
    world.apply(STREAMS, schedule="{every: 1h}")
    queue = JobQueue(open_client(far_url(redis, proxy)))
    world.scheduler = replace(world.scheduler, queue=queue)
    world.deps.heartbeat.beat()
    yield world
    queue.close()


def far_url(redis: Server, proxy: Proxy) -> str:
    return redis.url.replace(f":{redis.port}/", f":{proxy.port}/")


def seconds(tick, scheduler) -> float:
    began = time.monotonic()
    tick(scheduler)
    return time.monotonic() - began


def why(world, run_id) -> Rule:
    with world.cli.inside() as (tx, _, _name):
        return explain.explain(tx, run_id, runs_max=100).rule


def ask(world, resource: str) -> None:
    """One run more: a test of a resource."""
    with world.cli.inside() as (tx, account, _name):
        found = resources.get(tx, resource).resource_id
        subject = Subject(found, account.account_id, found)
        runs.enqueue(
            tx, subject, RunKind.TEST, RunOptions(), OPERATOR, deadline=timedelta(minutes=5)
        )


def test_a_silent_redis_costs_a_tick_one_timeout_however_many_jobs_wait(shop, proxy):
    shop.enqueue()
    ask(shop, "shop")
    ask(shop, "lake")
    assert shop.scheduler.queue.alive()
    proxy.set("hole")
    assert seconds(ticks.dispatch_tick, shop.scheduler) < TIMEOUT_S + SLACK_S, "three jobs waited"
    marked = "SELECT count(*) FROM active_runs WHERE state = 'dispatched'"
    assert shop.control.one(marked) == 3
    assert seconds(ticks.due_tick, shop.scheduler) < SLACK_S
    assert seconds(ticks.reap_tick, shop.scheduler) < SLACK_S


def test_a_job_whose_send_got_no_answer_comes_twice_and_is_executed_once(shop, proxy, redis):
    ask(shop, "shop")
    ticks.dispatch_tick(shop.scheduler)  # Redis knows Dramatiq's script now: a send is one command
    with Consumer(open_client(redis.url), lambda job: run_sync.execute(job, shop.deps)):
        until(lambda: not shop.control.all("SELECT 1 FROM active_runs"), "it did not run")
    asked = shop.enqueue()
    assert shop.scheduler.queue.alive()
    proxy.after("mute", str(asked.run_id).encode())
    ticks.dispatch_tick(shop.scheduler)
    proxy.heal()
    deadline = "dispatch_deadline = dispatch_deadline - CAST(:d AS interval)"
    shop.control.act(f"UPDATE active_runs SET {deadline}", d=DISPATCH_DEADLINE)
    ticks.reap_tick(shop.scheduler)
    until(shop.scheduler.queue.alive, "it answers again")
    shop.deps.heartbeat.beat()
    assert ticks.dispatch_tick(shop.scheduler) == 1
    seen = []

    def execute(job):
        seen.append(job.dispatch)
        run_sync.execute(job, shop.deps)

    with Consumer(open_client(redis.url), execute) as consumer:
        until(lambda: shop.run(asked.run_id).state is RunState.SUCCEEDED, "it did not run")
        until(lambda: len(seen) == 2, "both messages were delivered")
        assert consumer.dead() == 0
    assert sorted(seen) == [1, 2]
    assert shop.run(asked.run_id).attempt == 1
    assert shop.pair.same("log")


def queue_up(world) -> float:
    world.scheduler.cluster.wait()
    (value,) = [
        sample.value
        for family in world.scheduler.cluster.collect()
        for sample in family.samples
        if sample.name == "syncward_queue_up"
    ]
    return value


def an_hour_of_schedule_passes(world) -> None:
    """The hourly slot comes; deadlines and waits of before are over."""
    world.control.act("UPDATE schedules SET next_due_at = clock_timestamp()")
    world.control.act(
        "UPDATE active_runs SET not_before = not_before - interval '1 h', "
        "dispatch_deadline = dispatch_deadline - interval '1 h'"
    )
    for tick in (ticks.due_tick, ticks.reap_tick, ticks.presence_tick, ticks.dispatch_tick):
        with suppress(TransientError):
            tick(world.scheduler)


def test_redis_gone_for_hours_loses_nothing_says_so_and_drains_when_it_is_back(shop, redis):
    asked = shop.enqueue()
    ticks.presence_tick(shop.scheduler)
    assert queue_up(shop) == 1
    ticks.dispatch_tick(shop.scheduler)  # its job is in Redis when that goes
    redis.kill()
    redis.root.joinpath("appendonlydir").rename(redis.root / "lost")
    for hour in range(4):
        shop.pair.source(f"INSERT INTO log (v) VALUES ('hour {hour}')")
        time.sleep(1.1)  # how long the scheduler believes an answer of Redis
        an_hour_of_schedule_passes(shop)
        assert shop.run(asked.run_id).state is RunState.QUEUED, "nothing pretends to be on its way"
        assert why(shop, asked.run_id) is Rule.REDIS_DOWN
        assert queue_up(shop) == 0
    assert shop.control.all("SELECT outcome FROM slots") == [("merged",)] * 4, "all in the ledger"
    redis.start(redis.port)
    with Consumer(open_client(redis.url), lambda job: run_sync.execute(job, shop.deps)):
        until(shop.scheduler.queue.alive, "it answers again")
        ticks.presence_tick(shop.scheduler)
        assert queue_up(shop) == 1
        shop.deps.heartbeat.beat()
        for _ in range(2):  # the slot that came while its job was in Redis has a run of its own
            assert ticks.dispatch_tick(shop.scheduler) == 1
            until(lambda: not shop.control.one(BUSY), "it did not run")
    assert shop.control.all("SELECT 1 FROM active_runs") == []
    assert shop.control.all("SELECT DISTINCT state FROM runs") == [("succeeded",)]
    unserved = "SELECT 1 FROM slots WHERE run_id NOT IN (SELECT run_id FROM runs)"
    assert shop.control.all(unserved) == []
    assert shop.pair.same("log")


@pytest.mark.full
@pytest.mark.parametrize("mode", ["hole", "mute", "half_open", "trickle", "cut"])
def test_real_processes_get_over_a_redis_that_misbehaves(world, redis, proxy, mode):
    world.close()
    world.control.act("DELETE FROM workers")
    world.pair.source("CREATE TABLE log (n bigserial, v text)", "INSERT INTO log (v) VALUES ('v')")
    world.apply(STREAMS)
    near = world.cli.settings
    world.cli.__dict__["settings"] = near.model_copy(
        update={"redis_url": type(near.redis_url)(far_url(redis, proxy))}
    )
    fleet = Fleet(world, workers=2)
    try:
        fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
        proxy.cut() if mode == "cut" else proxy.set(mode)
        world.pair.source("INSERT INTO log (v) VALUES ('w')")
        asked = world.enqueue()
        time.sleep(8)
        proxy.heal()
        run = fleet.wait(asked.run_id, RunState.SUCCEEDED, seconds=60)
    finally:
        fleet.stop()
    assert run.attempt == 1
    assert world.pair.same("log")
