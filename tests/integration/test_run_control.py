"""Run control on real Postgres: claims, fences, retries, losses, triggers, caps."""

import threading
import time
from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from scheduler import ticks
from schemas.errors import Conflict, LeaseLost
from schemas.jobs import Job
from schemas.records import StreamResult
from schemas.runs import Claim, Outcome, OutcomeKind, RunKind, RunOptions, RunState
from storage import claims, connections, dispatch, resources, runs
from storage.claims import ClaimRefusal
from storage.endings import lock_schedule
from storage.engine import transaction
from storage.runs import Subject
from tests.world import OPERATOR
from workers import run_sync

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 50) g",
    )
    world.apply(STREAMS)
    return world


def claimed(shop) -> Claim:
    shop.enqueue()
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    return claim


def finish(shop, claim: Claim, outcome: Outcome) -> None:
    with transaction(shop.deps.engine) as tx:
        claims.finish(tx, claim, outcome, shop.deps.principal)


def state(shop, run_id: UUID) -> RunState:
    return shop.run(run_id).state


def test_a_job_delivered_twice_is_executed_once(shop):
    shop.enqueue()
    (job,) = shop.dispatch()
    assert isinstance(shop.claim(job), Claim)
    assert shop.claim(job) is ClaimRefusal.STALE


def test_two_workers_racing_for_one_job_never_both_win(shop):
    shop.enqueue()
    (job,) = shop.dispatch()
    barrier, answers = threading.Barrier(2), []

    def race() -> None:
        barrier.wait()
        answers.append(shop.claim(job))

    threads = [threading.Thread(target=race) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(a, Claim) for a in answers) == [False, True]


def test_a_job_nobody_asked_for_is_an_error_and_not_acknowledged(shop):
    assert shop.claim(Job(run_id=uuid4(), dispatch=1)) is ClaimRefusal.UNKNOWN
    with pytest.raises(run_sync.UnknownRun):
        run_sync.execute(Job(run_id=uuid4(), dispatch=1), shop.deps)


def test_an_older_dispatch_of_a_run_is_stale(shop):
    shop.enqueue()
    (first,) = shop.dispatch()
    shop.control.act("UPDATE active_runs SET dispatch_deadline = now() - interval '1 s'")
    ticks.reap_tick(shop.scheduler)
    (second,) = shop.dispatch()
    assert second.dispatch == first.dispatch + 1
    assert shop.claim(first) is ClaimRefusal.STALE
    assert isinstance(shop.claim(second), Claim)


def test_the_fence_grows_with_every_claim_and_is_never_reset(shop):
    fences = []
    for _ in range(3):
        claim = claimed(shop)
        fences.append(claim.fence)
        finish(shop, claim, Outcome(OutcomeKind.SUCCEEDED))
    assert fences == [1, 2, 3]


def test_a_trigger_during_a_run_starts_the_next_run_with_its_options(shop):
    claim = claimed(shop)
    asked = shop.enqueue(full_refresh=True)
    assert asked.how == "after_current"
    with shop.cli.inside() as (tx, _, _name):
        assert runs.promised(tx, asked.run_id)
    finish(shop, claim, Outcome(OutcomeKind.SUCCEEDED))
    assert state(shop, asked.run_id) is RunState.QUEUED
    (options,) = shop.control.all("SELECT options FROM active_runs")[0]
    assert options["full_refresh"] is True


def test_a_run_that_is_only_promised_can_be_cancelled(shop, shell):
    claim = claimed(shop)
    promised = shop.enqueue().run_id
    code, out, _ = shell("run", "cancel", str(promised))
    assert (code, out.strip()) == (0, f"run {promised} cancelled")
    assert state(shop, promised) is RunState.CANCELLED
    finish(shop, claim, Outcome(OutcomeKind.SUCCEEDED))
    assert shop.control.one("SELECT count(*) FROM active_runs") == 0
    assert shop.events(promised)[-1] == "run.cancelled"


def test_a_trigger_is_kept_even_when_the_running_run_fails(shop):
    claim = claimed(shop)
    asked = shop.enqueue()
    finish(shop, claim, Outcome(OutcomeKind.FAILED, "config", "no"))
    assert state(shop, asked.run_id) is RunState.QUEUED


def test_a_waiting_run_absorbs_a_second_request(shop):
    first, second = shop.enqueue(), shop.enqueue(full_refresh=True)
    assert second.run_id == first.run_id
    assert second.how == "merged"
    assert shop.control.one("SELECT options ->> 'full_refresh' FROM active_runs") == "true"


def test_a_run_that_has_begun_does_not_absorb_a_request_when_it_waits_again(shop):
    claim = claimed(shop)
    finish(shop, claim, Outcome(OutcomeKind.HANDED_BACK, "draining"))
    assert shop.control.one("SELECT attempt FROM active_runs") == 0
    asked = shop.enqueue(full_refresh=True)
    assert asked.how == "after_current", "a stream that it has loaded would not be read again"


def test_a_slot_is_not_absorbed_by_a_run_that_has_begun(shop):
    shop.apply(STREAMS, schedule="{every: 10s}")
    claim = claimed(shop)
    finish(shop, claim, Outcome(OutcomeKind.HANDED_BACK, "draining"))
    shop.control.act("UPDATE schedules SET next_due_at = clock_timestamp()")
    assert ticks.due_tick(shop.scheduler) == 1
    (promised,) = shop.control.all("SELECT again_run_id FROM active_runs")[0]
    assert shop.control.all("SELECT outcome, run_id FROM slots") == [("merged", promised)]


@pytest.mark.parametrize(
    "kind", [OutcomeKind.RETRY, OutcomeKind.HANDED_BACK, OutcomeKind.AWAITING_APPROVAL]
)
def test_a_run_that_was_asked_to_stop_ends_when_its_attempt_is_put_back(shop, kind):
    claim = claimed(shop)
    again = shop.enqueue()
    with shop.cli.inside() as (tx, _, _name):
        runs.cancel(tx, claim.run_id, OPERATOR)
    after = timedelta(0) if kind is OutcomeKind.RETRY else None
    finish(shop, claim, Outcome(kind, "x", "x", after))
    assert state(shop, claim.run_id) is RunState.CANCELLED
    assert shop.control.one("SELECT count(*) FROM leases") == 0
    assert state(shop, again.run_id) is RunState.QUEUED


def test_a_lost_lease_goes_back_to_the_queue_and_the_zombie_cannot_write(shop):
    claim = claimed(shop)
    shop.expire_leases()
    assert ticks.reap_tick(shop.scheduler) == 1
    assert state(shop, claim.run_id) is RunState.QUEUED
    with pytest.raises(LeaseLost):
        finish(shop, claim, Outcome(OutcomeKind.SUCCEEDED))
    result = StreamResult(stream="public.t", state="succeeded", mode="merge")
    with pytest.raises(LeaseLost), transaction(shop.deps.engine) as tx:
        claims.record_stream(tx, claim, result, 0, shop.deps.principal)
    assert shop.control.one("SELECT count(*) FROM run_streams") == 0


def test_three_lost_leases_without_progress_pause_the_connection(shop):
    asked = shop.enqueue()
    for _ in range(3):
        shop.control.act("UPDATE active_runs SET not_before = now()")
        (job,) = shop.dispatch()
        assert isinstance(shop.claim(job), Claim)
        shop.expire_leases()
        ticks.reap_tick(shop.scheduler)
    run = shop.run(asked.run_id)
    assert (run.state, run.error_code) == (RunState.FAILED, "lost_leases")
    assert shop.control.all("SELECT state, state_reason FROM schedules") == [
        ("paused", "lost_leases")
    ]
    assert "connection.paused" in shop.events()


def test_a_frozen_transaction_does_not_keep_others_from_being_recovered(shop):
    """A worker stopped between two statements holds its rows; the other runs go on meanwhile."""
    frozen, lost = claimed(shop), unscheduled(shop)
    shop.expire_leases()
    with transaction(shop.deps.engine) as tx:
        lock_schedule(tx, frozen.subject_id)
        assert ticks.reap_tick(shop.scheduler) == 1
        assert state(shop, lost.run_id) is RunState.QUEUED
        assert state(shop, frozen.run_id) is RunState.RUNNING
    assert ticks.reap_tick(shop.scheduler) == 1
    assert state(shop, frozen.run_id) is RunState.QUEUED


def unscheduled(shop) -> Claim:
    """A second claimed run: a discovery of the source."""
    with shop.cli.inside() as (tx, account, _name):
        found = resources.get(tx, "shop")
        subject = Subject(found.resource_id, account.account_id, found.resource_id)
        runs.enqueue(tx, subject, RunKind.DISCOVER, RunOptions(), OPERATOR)
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    return claim


def test_the_number_of_lost_leases_that_pause_is_a_setting(shop):
    more = shop.scheduler.settings.model_copy(update={"lost_leases_max": 5})
    scheduler = replace(shop.scheduler, settings=more)
    asked = shop.enqueue()
    for lost in range(5):
        assert state(shop, asked.run_id) is RunState.QUEUED, f"after {lost} lost leases"
        shop.control.act("UPDATE active_runs SET not_before = now()")
        (job,) = shop.dispatch()
        assert isinstance(shop.claim(job), Claim)
        shop.expire_leases()
        ticks.reap_tick(scheduler)
    assert shop.run(asked.run_id).error_code == "lost_leases"


def test_progress_resets_the_count_of_lost_leases(shop):
    claim = claimed(shop)
    shop.control.act("UPDATE active_runs SET lost_leases = 2, attempts_without_progress = 4")
    result = StreamResult(stream="public.t", state="succeeded", mode="merge")
    with transaction(shop.deps.engine) as tx:
        claims.record_stream(tx, claim, result, 0, shop.deps.principal)
    assert shop.control.all("SELECT lost_leases, attempts_without_progress FROM active_runs") == [
        (0, 0)
    ]


def test_a_retry_waits_and_counts_an_attempt_a_drain_does_not(shop):
    claim = claimed(shop)
    finish(shop, claim, Outcome(OutcomeKind.RETRY, "transient", "x", timedelta(seconds=60)))
    assert shop.dispatch() == []
    wait = shop.control.one("SELECT not_before - clock_timestamp() FROM active_runs")
    assert timedelta(seconds=50) < wait <= timedelta(seconds=60)
    shop.control.act("UPDATE active_runs SET not_before = now()")
    ticks.reap_tick(shop.scheduler)  # notices that the wait is over
    (job,) = shop.dispatch()
    again = shop.claim(job)
    assert isinstance(again, Claim)
    assert again.attempt == 2
    finish(shop, again, Outcome(OutcomeKind.HANDED_BACK, "draining"))
    assert shop.control.one("SELECT attempt FROM active_runs") == 1
    assert len(shop.dispatch()) == 1


def test_ten_failures_in_a_row_pause_and_resume_clears_them(shop):
    for _ in range(10):
        finish(shop, claimed(shop), Outcome(OutcomeKind.FAILED, "config", "no"))
    assert shop.control.all("SELECT state, state_reason, failures FROM schedules") == [
        ("paused", "failures", 10)
    ]
    with shop.cli.inside() as (tx, account, _name):
        found = connections.get(tx, "shop-to-lake")
        assert connections.resume(tx, account, found, next_due_at=None, principal=OPERATOR)
    assert shop.control.all("SELECT state, failures FROM schedules") == [("active", 0)]


def test_dead_credentials_pause_at_once(shop):
    shop.control.cluster  # noqa: B018 - the cluster stays, only the password changes
    shop.pair.session("source").execute("ALTER ROLE reader PASSWORD 'changed-meanwhile'")
    try:
        run, _ = shop.sync()
    finally:
        password = shop.pair.logins["reader"]
        shop.pair.session("source").execute(f"ALTER ROLE reader PASSWORD '{password}'")
    assert (run.state, run.error_code) == (RunState.FAILED, "credentials")
    assert "reader was refused" in (run.error or "")
    assert shop.control.all("SELECT state, state_reason FROM schedules") == [
        ("paused", "credentials")
    ]


def test_cancel_of_a_waiting_run_is_immediate_and_of_a_running_one_is_asked(shop):
    asked = shop.enqueue()
    with shop.cli.inside() as (tx, _, _name):
        assert runs.cancel(tx, asked.run_id, OPERATOR) is RunState.CANCELLED
    assert state(shop, asked.run_id) is RunState.CANCELLED
    claim = claimed(shop)
    with shop.cli.inside() as (tx, _, _name):
        assert runs.cancel(tx, claim.run_id, OPERATOR) is RunState.RUNNING
    with shop.deps.heartbeat.hold(claim) as control:
        shop.deps.heartbeat.beat()
        assert control.signalled
    with shop.cli.inside() as (tx, _, _name), pytest.raises(Conflict, match="has ended"):
        runs.cancel(tx, asked.run_id, OPERATOR)


def test_a_cancelled_run_whose_worker_died_ends_cancelled(shop):
    claim = claimed(shop)
    with shop.cli.inside() as (tx, _, _name):
        runs.cancel(tx, claim.run_id, OPERATOR)
    shop.expire_leases()
    ticks.reap_tick(shop.scheduler)
    assert state(shop, claim.run_id) is RunState.CANCELLED


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(OutcomeKind.HANDED_BACK, "draining"),
        Outcome(OutcomeKind.RETRY, "transient", "x", timedelta(seconds=0)),
        Outcome(OutcomeKind.AWAITING_APPROVAL, "guard", "too many deletes"),
    ],
    ids=lambda outcome: str(outcome.kind),
)
def test_a_cancel_that_an_attempt_did_not_hear_still_ends_the_run(shop, outcome):
    claim = claimed(shop)
    again = shop.enqueue()
    with shop.cli.inside() as (tx, _, _name):
        runs.cancel(tx, claim.run_id, OPERATOR)
    finish(shop, claim, outcome)
    assert state(shop, claim.run_id) is RunState.CANCELLED
    assert state(shop, again.run_id) is RunState.QUEUED, "what was asked for meanwhile begins"
    assert len(shop.dispatch()) == 1


def test_a_test_run_that_no_worker_takes_fails_with_a_next_step(shop):
    with shop.cli.inside() as (tx, account, _name):
        found = resources.get(tx, "shop")
        asked = runs.enqueue(
            tx,
            Subject(found.resource_id, account.account_id, found.resource_id),
            RunKind.TEST,
            RunOptions(),
            OPERATOR,
            deadline=timedelta(seconds=-1),
        )
    ticks.reap_tick(shop.scheduler)
    run = shop.run(asked.run_id)
    assert run.state is RunState.FAILED
    assert "syncward worker" in (run.error or "")


def test_nothing_is_dispatched_while_redis_is_away_or_no_worker_is_heard(shop):
    asked = shop.enqueue()
    shop.jobs.up = False
    assert shop.dispatch() == []
    assert state(shop, asked.run_id) is RunState.QUEUED
    shop.jobs.up = True
    shop.control.act("UPDATE workers SET seen_at = now() - interval '1 h'")
    ticks.dispatch_tick(shop.scheduler)
    assert shop.jobs.take() == []
    assert len(shop.dispatch()) == 1


def test_a_paused_connection_is_neither_scheduled_nor_dispatched(shop):
    shop.enqueue()
    with shop.cli.inside() as (tx, account, _name):
        found = connections.get(tx, "shop-to-lake")
        connections.pause(tx, account, found, OPERATOR)
    shop.control.act("UPDATE schedules SET next_due_at = now() - interval '1 s'")
    assert ticks.due_tick(shop.scheduler) == 0
    assert shop.dispatch() == []


def test_a_guard_makes_the_run_wait_for_a_person(shop):
    claim = claimed(shop)
    finish(shop, claim, Outcome(OutcomeKind.AWAITING_APPROVAL, "guard", "too many deletes"))
    assert state(shop, claim.run_id) is RunState.AWAITING_APPROVAL
    with shop.cli.inside() as (tx, _, _name):
        runs.approve(tx, claim.run_id, OPERATOR)
    (job,) = shop.dispatch()
    again = shop.claim(job)
    assert isinstance(again, Claim)
    assert again.options.approved == "guard"
    finish(shop, again, Outcome(OutcomeKind.AWAITING_APPROVAL, "guard", "too many deletes"))
    with shop.cli.inside() as (tx, _, _name):
        runs.reject(tx, claim.run_id, OPERATOR)
    assert state(shop, claim.run_id) is RunState.CANCELLED


def test_credentials_come_only_with_a_live_lease(shop):
    claim = claimed(shop)
    query = "SELECT count(*) FROM sealed_credentials(:run, :token)"
    assert shop.control.one(query, run=claim.run_id, token=claim.token) == 2
    assert shop.control.one(query, run=claim.run_id, token=uuid4()) == 0
    shop.expire_leases()
    assert shop.control.one(query, run=claim.run_id, token=claim.token) == 0


def test_two_schedulers_share_due_schedules_without_doubling(shop):
    shop.apply(STREAMS, schedule="{every: 10s}")
    shop.control.act("UPDATE schedules SET next_due_at = now() - interval '35 s'")
    barrier, counts = threading.Barrier(4), []

    def tick() -> None:
        barrier.wait()
        counts.append(ticks.due_tick(shop.scheduler))

    threads = [threading.Thread(target=tick) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 1
    outcomes = dict(shop.control.all("SELECT outcome, count(*) FROM slots GROUP BY outcome"))
    assert outcomes["queued"] == 1
    assert outcomes["skipped"] >= 2, "slots that passed stay in the ledger"
    assert shop.control.one("SELECT next_due_at > now() FROM schedules") is True


def test_a_schedule_that_nobody_can_follow_is_paused_and_stops_nobody_else(shop):
    shop.apply(STREAMS, schedule="{cron: '* * * * *'}")
    shop.control.act("UPDATE schedules SET zone = 'Gone/Away', next_due_at = now()")
    assert ticks.due_tick(shop.scheduler) == 1
    assert shop.control.all("SELECT state, state_reason FROM schedules") == [
        ("paused", "schedule_invalid")
    ]
    assert shop.control.one("SELECT count(*) FROM active_runs") == 0
    assert shop.events()[-1] == "connection.paused"
    assert ticks.due_tick(shop.scheduler) == 0


def test_a_run_that_ends_while_the_dispatcher_looks_is_not_forgotten(shop):
    """The flags that say "nobody need look" must not outlive what they were decided on."""
    claim = claimed(shop)
    shop.control.act("UPDATE account_queues SET runs_max = 1, has_work = true, at_cap = false")
    with transaction(shop.scheduler.engine) as tx:
        assert dispatch.lock(tx)
        seen = dispatch.waiting(tx, 1)
        finish(shop, claim, Outcome(OutcomeKind.SUCCEEDED))  # does not wait for the dispatcher
        dispatch.mark(tx, [], seen, timedelta(seconds=10), shop.scheduler.principal)
    assert shop.control.all("SELECT at_cap FROM account_queues") == [(True,)], "as it was seen"
    ticks.reap_tick(shop.scheduler)
    assert shop.control.all("SELECT at_cap, has_work FROM account_queues") == [(False, True)]


def test_slots_stand_on_the_databases_clock_from_the_first_one_on(shop):
    """The first slot from one clock and the next from another come twice, or an hour late."""
    shop.apply(STREAMS, schedule="{every: 10s}")
    grid = "SELECT mod(extract(epoch FROM next_due_at - anchor_at)::numeric, 10) FROM schedules"
    assert shop.control.one(grid) == 0
    with shop.cli.inside() as (tx, account, _name):
        found = connections.get(tx, "shop-to-lake")
        connections.pause(tx, account, found, OPERATOR)
        at = connections.now(tx) + timedelta(seconds=10)
        assert connections.resume(tx, account, found, next_due_at=at, principal=OPERATOR)
    assert shop.control.one(grid) == 0


def test_two_first_loads_into_one_new_schema_both_succeed(shop):
    with shop.pair.connect("destination", autocommit=False) as other:  # as another first load would
        other.execute("SELECT pg_advisory_xact_lock(hashtext('_syncward.schema'))")
        other.execute("CREATE SCHEMA acme AUTHORIZATION writer")
        asked = shop.enqueue()
        worker = threading.Thread(target=shop.step)
        worker.start()
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'syncward:destination' "
            "AND datname = current_database() AND wait_event_type = 'Lock'"
        )
        deadline = time.monotonic() + 30
        while not shop.pair.rows("destination", waiting):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    worker.join()
    run = shop.run(asked.run_id)
    assert (run.state, run.error) == (RunState.SUCCEEDED, None)


def test_a_stuck_run_is_asked_to_stop(shop):
    claim = claimed(shop)
    shop.control.act("UPDATE leases SET progress_at = now() - interval '31 min'")
    ticks.reap_tick(shop.scheduler)
    assert shop.control.one("SELECT cancel_by FROM active_runs") == "stuck"
    assert state(shop, claim.run_id) is RunState.RUNNING
