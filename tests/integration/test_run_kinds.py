"""Runs of other kinds on a connection: nobody's slot or wish is lost, and each keeps its kind."""

import pytest

from scheduler import ticks
from schemas.errors import Conflict
from schemas.records import Between
from schemas.runs import Priority, RunKind, RunOptions, RunState
from storage import connections, due, gauges, runs
from storage import explain as explanations
from storage.engine import transaction
from tests.world import OPERATOR

pytestmark = pytest.mark.integration

MAY = RunOptions(streams=("public.t",), window=Between(lower="1", upper="5"))
JUNE = RunOptions(streams=("public.t",), window=Between(lower="5", upper="9"))


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL)",
        "INSERT INTO t SELECT g, g FROM generate_series(1, 10) g",
    )
    world.apply({"public.t": "{mode: merge, key: [id], cursor: v}"}, schedule="{every: 1h}")
    assert world.sync()[0].state is RunState.SUCCEEDED
    return world


def ask(shop, kind, options=None):
    with shop.cli.inside() as (tx, _, _name):
        found = connections.get(tx, "shop-to-lake")
        return runs.enqueue(tx, connections.subject(found), kind, options or RunOptions(), OPERATOR)


def make_due(shop):
    shop.control.act("UPDATE schedules SET next_due_at = now() - interval '1 min'")
    ticks.due_tick(shop.scheduler)


def is_due(shop):
    return shop.control.one("SELECT next_due_at <= now() FROM schedules")


def live(shop):
    return shop.control.all("SELECT run_id, kind, state, priority FROM active_runs")


def claimed(shop, kind, options=None):
    """Have a run of this kind running, in nobody's hands."""
    asked = ask(shop, kind, options)
    (job,) = shop.dispatch()
    assert shop.claim(job).kind is kind
    return asked.run_id


def end(shop, run_id):
    """Let the run that nobody executes end: asked to stop, its worker gone."""
    with shop.cli.inside() as (tx, _, _name):
        runs.cancel(tx, run_id, OPERATOR)
    shop.expire_leases()
    ticks.reap_tick(shop.scheduler)


@pytest.mark.parametrize("running", [False, True])
def test_a_slot_that_meets_a_backfill_becomes_a_sync_after_it(shop, running):
    backfill = claimed(shop, RunKind.BACKFILL, MAY) if running else None
    backfill = backfill or ask(shop, RunKind.BACKFILL, MAY).run_id
    make_due(shop)
    slot = shop.control.one("SELECT run_id FROM slots ORDER BY scheduled_for DESC LIMIT 1")
    assert slot != backfill
    end(shop, backfill)
    assert live(shop) == [(slot, "sync", "queued", Priority.SCHEDULED)]
    assert shop.run(backfill).kind is RunKind.BACKFILL
    shop.step()
    assert shop.run(slot).state is RunState.SUCCEEDED


@pytest.mark.parametrize(("overlap", "outcome"), [("cancel_other", "merged"), ("skip", "skipped")])
def test_an_overlapping_slot_cancels_no_backfill(shop, overlap, outcome):
    claimed(shop, RunKind.BACKFILL, MAY)
    shop.control.act("UPDATE schedules SET overlap = :overlap", overlap=overlap)
    make_due(shop)
    assert shop.control.all("SELECT outcome FROM slots") == [(outcome,)]
    assert shop.control.all(
        "SELECT cancel_requested_at, cancel_by, again_kind FROM active_runs"
    ) == [(None, None, "sync" if outcome == "merged" else None)]


def test_a_backfill_asked_for_during_a_sync_keeps_its_kind_and_window_and_the_slot_waits(shop):
    sync = claimed(shop, RunKind.SYNC)
    promised = ask(shop, RunKind.BACKFILL, MAY)
    assert promised.how == "after_current"
    make_due(shop)
    assert is_due(shop)  # one run can be promised, and the slot is not lost
    with transaction(shop.scheduler.engine) as tx:
        assert gauges.lateness(tx) == 0  # nor is any scheduler late
    with pytest.raises(Conflict, match=rf"run {promised.run_id} \(backfill\) waits already"):
        ask(shop, RunKind.SYNC)
    with pytest.raises(Conflict, match="syncward run cancel"):
        ask(shop, RunKind.BACKFILL, JUNE)
    assert ask(shop, RunKind.BACKFILL, MAY).run_id == promised.run_id
    end(shop, sync)
    assert live(shop) == [(promised.run_id, "backfill", "queued", Priority.BACKFILL)]
    options = shop.control.one("SELECT options FROM active_runs")
    assert RunOptions.model_validate(options) == MAY
    ticks.due_tick(shop.scheduler)
    assert not is_due(shop)
    assert shop.control.all("SELECT again_kind, again_trigger FROM active_runs") == [
        ("sync", "again")
    ]


@pytest.mark.parametrize("running", [False, True])
def test_a_slot_is_not_served_by_a_run_of_some_streams(shop, running):
    if running:
        claimed(shop, RunKind.SYNC)
    some = ask(shop, RunKind.SYNC, RunOptions(streams=("public.t",), accept=("public.t",))).run_id
    make_due(shop)
    assert is_due(shop) == running  # what is promised is one run, and the slot waits for it
    served = shop.control.all("SELECT run_id FROM slots")
    assert (some,) not in served
    if not running:
        assert shop.control.all("SELECT run_id, again_run_id, again_kind FROM active_runs") == [
            (some, *served[0], "sync")
        ]
        end(shop, some)
        assert [run_id for run_id, *_ in live(shop)] == [*served[0]]
        assert not shop.control.one("SELECT options->'streams' FROM active_runs")


def test_a_promised_run_of_another_kind_is_explained_and_can_be_withdrawn(shop):
    claimed(shop, RunKind.SYNC)
    promised = ask(shop, RunKind.RESET, RunOptions(streams=("public.t",)))
    with shop.cli.inside() as (tx, _, _name):
        assert "starts when run" in explanations.explain(tx, promised.run_id, runs_max=10).sentence
        assert runs.cancel(tx, promised.run_id, OPERATOR) is RunState.CANCELLED
    gone = shop.run(promised.run_id)
    assert (gone.kind, gone.state) == (RunKind.RESET, RunState.CANCELLED)
    assert ask(shop, RunKind.SYNC).how == "after_current"


def test_a_slot_between_the_look_and_the_lock_stays_due(shop):
    """Somebody promises a backfill after the scheduler saw the slot."""
    claimed(shop, RunKind.SYNC)
    shop.control.act("UPDATE schedules SET next_due_at = now() - interval '1 min'")
    with transaction(shop.scheduler.engine) as tx:
        _, found = due.claim_due(tx)
    promised = ask(shop, RunKind.BACKFILL, MAY)
    with transaction(shop.scheduler.engine) as tx:
        decision = due.Decision(found[0], found[0].due_at, (), None)
        assert due.apply(tx, [decision], shop.scheduler.principal) == 0
    assert is_due(shop)
    assert shop.control.one("SELECT again_run_id FROM active_runs") == promised.run_id
    assert not shop.control.all("SELECT 1 FROM slots")


def test_what_the_version_before_promises_behind_a_backfill_is_a_sync(shop):
    backfill = claimed(shop, RunKind.BACKFILL, MAY)
    slot = shop.control.one("SELECT gen_random_uuid()")
    shop.control.act("UPDATE active_runs SET again_run_id = :id, again_trigger = 'again'", id=slot)
    end(shop, backfill)
    assert live(shop) == [(slot, "sync", "queued", Priority.SCHEDULED)]


def test_nobody_gets_a_kind_that_some_worker_does_not_know(shop):
    shop.control.act("UPDATE workers SET kinds = '{}'")
    with pytest.raises(Conflict, match="worker w1 is of a version before"):
        ask(shop, RunKind.BACKFILL, MAY)
    assert ask(shop, RunKind.SYNC).how == "queued"


def test_a_failed_run_of_another_kind_does_not_count_towards_a_pause(shop):
    backfill = claimed(shop, RunKind.BACKFILL, MAY)
    shop.control.act("UPDATE active_runs SET lost_leases = 2")
    shop.expire_leases()
    ticks.reap_tick(shop.scheduler)
    ended = shop.run(backfill)
    assert (ended.state, ended.error_code) == (RunState.FAILED, "lost_leases")
    assert "paused" not in (ended.error or "")
    assert shop.control.all("SELECT failures, state FROM schedules") == [(0, "active")]


def test_options_of_today_are_written_as_the_version_before_reads_them():
    assert set(RunOptions(streams=("a.b",)).model_dump()) == {"full_refresh", "streams", "approved"}
    wide = MAY.merged(RunOptions(full_refresh=True))
    assert (wide.window, wide.full_refresh) == (None, True)
    accepting = RunOptions(accept=("a.b",)).merged(RunOptions(accept=("a.c",)))
    assert accepting.accept == ("a.b", "a.c")
