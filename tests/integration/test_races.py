"""Two sessions at the worst moment: each step comes when the other is seen to wait for a lock."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection

from scheduler import ticks
from scheduler.dispatch import pick
from scheduler.due import decide
from schemas.errors import Conflict, LeaseLost
from schemas.jobs import Job
from schemas.limits import DISPATCH_DEADLINE
from schemas.records import StreamResult
from schemas.runs import Claim, Outcome, OutcomeKind, RunKind, RunOptions, RunState
from storage import claims, connections, dispatch, due, reap, runs
from storage.claims import ClaimRefusal
from storage.engine import transaction
from storage.runs import Enqueued
from tests.integration.test_state_machine import NAMES, several_connections
from tests.world import OPERATOR, World

pytestmark = pytest.mark.integration

RESULT = StreamResult(stream="public.t", state="succeeded", mode="merge")
LOCKED = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND wait_event_type = 'Lock'"
)


class Other:
    """The other session: a function in a thread, with a way to see that it waits for a lock."""

    def __init__(self, world: World, act: Callable[[], Any]) -> None:
        self._world = world
        self._act = act
        self.answer: Any = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.answer = self._act()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.answer = error

    def waits(self) -> None:
        """Return once the other session waits for a lock; fail if it never does."""
        deadline = time.monotonic() + 20
        while self._world.control.one(LOCKED) == 0:
            assert self._thread.is_alive(), f"it did not wait: {self.answer!r}"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def done(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive(), "it waits for ever"
        return self.answer


@pytest.fixture
def shop(world):
    several_connections(world)
    world.deps.heartbeat.beat()
    return world


def as_worker(world: World) -> AbstractContextManager[Connection]:
    return transaction(world.deps.engine)


def as_scheduler(world: World) -> AbstractContextManager[Connection]:
    return transaction(world.scheduler.engine)


def ask(world: World, name: str = NAMES[0]) -> Enqueued:
    with world.cli.inside() as (tx, _, _name):
        found = connections.subject(connections.get(tx, name))
        return runs.enqueue(tx, found, RunKind.SYNC, RunOptions(), OPERATOR)


def claimed(world: World, name: str = NAMES[0]) -> Claim:
    ask(world, name)
    (job,) = world.dispatch()
    claim = world.claim(job)
    assert isinstance(claim, Claim)
    return claim


def finish(world: World, claim: Claim) -> None:
    with as_worker(world) as tx:
        claims.finish(tx, claim, Outcome(OutcomeKind.SUCCEEDED), world.deps.principal)


def record(world: World, claim: Claim) -> None:
    with as_worker(world) as tx:
        claims.record_stream(tx, claim, RESULT, 0, world.deps.principal)


def cancel(world: World, run_id: UUID) -> RunState:
    with world.cli.inside() as (tx, _, _name):
        return runs.cancel(tx, run_id, OPERATOR)


def pause(world: World, name: str = NAMES[0]) -> bool:
    with world.cli.inside() as (tx, account, _name):
        return connections.pause(tx, account, connections.get(tx, name), OPERATOR)


def marked(tx: Connection, world: World) -> list[Job]:
    """What a dispatcher does in its transaction."""
    assert dispatch.lock(tx)
    wanted = dispatch.room(tx, world.scheduler.settings.runs_max)
    seen = dispatch.waiting(tx, wanted)
    return dispatch.mark(tx, pick(seen, wanted), seen, DISPATCH_DEADLINE, world.scheduler.principal)


# ── caps ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cap", "table"),
    [(1, "account_queues"), (2, "account_queues"), (1, "resource_queues"), (2, "resource_queues")],
)
def test_a_second_dispatcher_never_fills_a_slot_that_the_first_has_taken(shop, cap, table):
    shop.control.act(f"UPDATE {table} SET runs_max = :cap", cap=cap)
    for name in NAMES:
        ask(shop, name)
    with as_scheduler(shop) as tx:
        first = marked(tx, shop)
        assert len(first) == cap
        assert ticks.dispatch_tick(shop.scheduler) == 0, "it does not wait, and takes nothing"
    assert ticks.dispatch_tick(shop.scheduler) == 0
    assert shop.control.one("SELECT count(*) FROM active_runs WHERE state = 'dispatched'") == cap


def test_the_global_cap_holds_whatever_number_of_dispatchers_races(shop):
    settings = shop.scheduler.settings.model_copy(update={"runs_max": 2})
    schedulers = [
        ticks.Scheduler(shop.scheduler.engine, shop.jobs, settings, shop.scheduler.principal)
        for _ in range(4)
    ]
    for _ in range(5):
        for name in NAMES:
            ask(shop, name)
        barrier = threading.Barrier(len(schedulers))

        def race(one, barrier=barrier):
            barrier.wait()
            for _ in range(3):
                ticks.dispatch_tick(one)

        threads = [threading.Thread(target=race, args=(one,)) for one in schedulers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        busy = "SELECT count(*) FROM active_runs WHERE state IN ('dispatched', 'running')"
        assert shop.control.one(busy) == 2
        jobs = shop.jobs.take()
        assert len(jobs) == len(set(jobs)) == 2, "no run is sent twice"
        for job in jobs:
            claim = shop.claim(job)
            assert isinstance(claim, Claim)
            finish(shop, claim)


# ── wake-ups ────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_comes_while_the_dispatcher_finds_nothing_is_not_left_asleep(shop):
    shop.control.act("UPDATE account_queues SET has_work = true")
    with as_scheduler(shop) as tx:
        assert marked(tx, shop) == []  # about to write down that this account has no work
        asking = Other(shop, lambda: ask(shop))
        asking.waits()
    assert asking.done().how == "queued"
    assert len(shop.dispatch()) == 1


def test_a_run_that_ends_while_the_dispatcher_finds_the_cap_full_makes_room(shop):
    shop.control.act("UPDATE account_queues SET runs_max = 1")
    claim = claimed(shop)
    shop.control.act("UPDATE account_queues SET at_cap = false")
    waiting = ask(shop, NAMES[1])
    with as_scheduler(shop) as tx:
        assert marked(tx, shop) == []  # about to write down that this account is at its cap
        finish(shop, claim)  # does not wait for the dispatcher, and does not see what it writes
    ticks.reap_tick(shop.scheduler)  # looks again
    assert [job.run_id for job in shop.dispatch()] == [waiting.run_id]


def test_a_wait_that_ends_while_the_dispatcher_looks_is_noticed_by_the_reaper(shop):
    asked = ask(shop)
    shop.control.act("UPDATE active_runs SET not_before = now() + interval '1 min'")
    with as_scheduler(shop) as tx:
        assert marked(tx, shop) == []
        shop.control.act("UPDATE active_runs SET not_before = now()")
        ticks.reap_tick(shop.scheduler)  # the account is busy: this look may miss it
    assert shop.control.one("SELECT has_work FROM account_queues") is False
    ticks.reap_tick(shop.scheduler)
    assert [job.run_id for job in shop.dispatch()] == [asked.run_id]


# ── the reaper ──────────────────────────────────────────────────────────────────────────────────


def test_a_checkpoint_that_came_first_is_kept_and_its_lease_is_taken_after_it(shop):
    claim = claimed(shop)
    shop.control.act("UPDATE active_runs SET lost_leases = 2")
    shop.expire_leases()
    with as_worker(shop) as tx:
        claims.record_stream(tx, claim, RESULT, 0, shop.deps.principal)
        reaping = Other(shop, lambda: ticks.reap_tick(shop.scheduler))
        reaping.waits()
    assert reaping.done() == 1
    assert shop.control.all("SELECT state, lost_leases FROM active_runs") == [("queued", 1)]
    assert shop.control.one("SELECT count(*) FROM run_streams") == 1


def test_a_checkpoint_that_came_second_leaves_nothing(shop):
    claim = claimed(shop)
    shop.expire_leases()
    with as_scheduler(shop) as tx:
        assert reap.expired_leases(tx, shop.scheduler.principal) == 1
        recording = Other(shop, lambda: record(shop, claim))
        recording.waits()
    assert isinstance(recording.done(), LeaseLost)
    assert shop.control.one("SELECT count(*) FROM run_streams") == 0
    assert shop.control.one("SELECT count(*) FROM cursors") == 0


def test_the_reaper_leaves_a_run_that_is_just_being_finished(shop):
    claim = claimed(shop)
    shop.expire_leases()
    with as_worker(shop) as tx:
        claims.finish(tx, claim, Outcome(OutcomeKind.SUCCEEDED), shop.deps.principal)
        assert ticks.reap_tick(shop.scheduler) == 0, "it does not wait"
    assert ticks.reap_tick(shop.scheduler) == 0
    assert shop.run(claim.run_id).state is RunState.SUCCEEDED


def test_a_finish_that_meets_the_reaper_is_a_lost_lease(shop):
    claim = claimed(shop)
    shop.expire_leases()
    with as_scheduler(shop) as tx:
        assert reap.expired_leases(tx, shop.scheduler.principal) == 1
        finishing = Other(shop, lambda: finish(shop, claim))
        finishing.waits()
    assert isinstance(finishing.done(), LeaseLost)
    assert shop.run(claim.run_id).state is RunState.QUEUED


def test_the_reaper_and_a_due_tick_over_the_same_connections_do_not_wait_in_a_circle(shop):
    for name in NAMES[:2]:
        claimed(shop, name)
    shop.expire_leases()
    shop.control.act(
        "UPDATE schedules SET next_due_at = now() WHERE connection_id = "
        "(SELECT subject_id FROM active_runs JOIN leases USING (run_id) "
        "ORDER BY leases.ctid DESC LIMIT 1)"
    )
    with as_scheduler(shop) as tx:
        now, batch = due.claim_due(tx)
        assert len(batch) == 1  # the schedule of the lease that the reaper comes to last
        with as_scheduler(shop) as other:
            assert reap.expired_leases(other, shop.scheduler.principal) == 1, "the other one"
            applying = Other(shop, lambda: apply_due(shop, tx, now, batch))
            applying.waits()  # for the account; but the reaper wants nothing of ours
        assert applying.done() is None
    sighted = replace(shop.scheduler, sight=ticks.Sight())
    assert ticks.reap_tick(sighted) == 1


def apply_due(world: World, tx: Connection, now, batch) -> None:
    due.apply(tx, [decide(one, now) for one in batch], world.scheduler.principal)


# ── triggers ────────────────────────────────────────────────────────────────────────────────────


def test_a_request_that_meets_the_end_of_the_run_becomes_the_next_run(shop):
    claim = claimed(shop)
    with as_worker(shop) as tx:
        claims.finish(tx, claim, Outcome(OutcomeKind.SUCCEEDED), shop.deps.principal)
        asking = Other(shop, lambda: ask(shop))
        asking.waits()
    answer = asking.done()
    assert answer.how == "queued"
    assert shop.run(answer.run_id).state is RunState.QUEUED


def test_the_end_of_a_run_that_meets_a_request_starts_what_was_promised(shop):
    claim = claimed(shop)
    with shop.cli.inside() as (tx, _, _name):
        found = connections.subject(connections.get(tx, NAMES[0]))
        promised = runs.enqueue(tx, found, RunKind.SYNC, RunOptions(), OPERATOR)
        ending = Other(shop, lambda: finish(shop, claim))
        ending.waits()
    assert ending.done() is None
    assert promised.how == "after_current"
    assert shop.run(promised.run_id).state is RunState.QUEUED


def test_a_slot_that_meets_the_end_of_the_run_is_taken_by_the_next_tick(shop):
    claim = claimed(shop)
    shop.control.act("UPDATE schedules SET next_due_at = now() WHERE fence > 0")
    with as_worker(shop) as tx:
        claims.finish(tx, claim, Outcome(OutcomeKind.SUCCEEDED), shop.deps.principal)
        assert ticks.due_tick(shop.scheduler) == 0, "it does not wait"
    assert ticks.due_tick(shop.scheduler) == 1
    assert shop.control.all("SELECT outcome FROM slots") == [("queued",)]


def test_a_connection_of_which_a_run_is_just_being_queued_is_not_deleted(shop):
    def delete() -> None:
        with shop.cli.inside() as (tx, account, _name):
            found = connections.get(tx, NAMES[0])
            connections.delete(tx, account, found, OPERATOR)

    with shop.cli.inside() as (tx, _, _name):
        found = connections.subject(connections.get(tx, NAMES[0]))
        runs.enqueue(tx, found, RunKind.SYNC, RunOptions(), OPERATOR)
        deleting = Other(shop, delete)
        deleting.waits()
    assert isinstance(deleting.done(), Conflict)


# ── operators ───────────────────────────────────────────────────────────────────────────────────


def test_a_cancel_that_meets_a_claim_asks_the_worker_to_stop(shop):
    asked = ask(shop)
    (job,) = shop.dispatch()
    with as_worker(shop) as tx:
        claim = claims.claim(tx, job, "w1", timedelta(seconds=30), shop.deps.principal)
        assert isinstance(claim, Claim)
        cancelling = Other(shop, lambda: cancel(shop, asked.run_id))
        cancelling.waits()
    assert cancelling.done() is RunState.RUNNING
    assert shop.control.one("SELECT cancel_requested_at IS NOT NULL FROM active_runs") is True


def test_a_claim_that_meets_a_cancel_is_stale_and_raises_no_fence(shop):
    asked = ask(shop)
    (job,) = shop.dispatch()
    with shop.cli.inside() as (tx, _, _name):
        assert runs.cancel(tx, asked.run_id, OPERATOR) is RunState.CANCELLED
        claiming = Other(shop, lambda: shop.claim(job))
        claiming.waits()
    assert claiming.done() is ClaimRefusal.STALE
    assert shop.control.one("SELECT max(fence) FROM schedules") == 0
    assert shop.control.one("SELECT count(*) FROM leases") == 0


def test_a_claim_that_meets_a_pause_keeps_both_the_pause_and_its_fence(shop):
    ask(shop)
    (job,) = shop.dispatch()
    with shop.cli.inside() as (tx, account, _name):
        connections.pause(tx, account, connections.get(tx, NAMES[0]), OPERATOR)
        claiming = Other(shop, lambda: shop.claim(job))
        claiming.waits()
    claim = claiming.done()
    assert isinstance(claim, Claim)
    assert claim.fence == 1
    assert shop.control.all("SELECT state, fence FROM schedules WHERE fence > 0") == [("paused", 1)]


@pytest.mark.parametrize("pause_first", [True, False])
def test_a_pause_and_a_dispatch_come_one_after_the_other(shop, pause_first):
    """Whoever has not seen the other goes first; afterwards nothing more of it is sent."""
    ask(shop)
    with ExitStack() as stack:
        if pause_first:
            tx, account, _ = stack.enter_context(shop.cli.inside())
            connections.pause(tx, account, connections.get(tx, NAMES[0]), OPERATOR)
            jobs = shop.dispatch()
        else:
            tx = stack.enter_context(as_scheduler(shop))
            jobs = marked(tx, shop)
            assert pause(shop)
    (job,) = jobs
    assert isinstance(shop.claim(job), Claim), "a run that was sent goes on"
    ask(shop)
    assert shop.dispatch() == []
