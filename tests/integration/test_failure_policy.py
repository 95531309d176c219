"""Deferrals, pauses, and that success is never assumed: on a real control database."""

from datetime import timedelta

import pytest
from psycopg import sql

from cli.apply import make_so
from scheduler import ticks
from schemas.errors import ConfigError
from schemas.limits import DEFERRED_MAX
from schemas.records import StreamResult
from schemas.runs import Claim, Outcome, OutcomeKind, Rule, RunState
from storage import claims, explain
from storage.engine import transaction

pytestmark = pytest.mark.integration

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}
HOUR = timedelta(hours=1)


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' FROM generate_series(1, 25) g",
    )
    world.apply(STREAMS)
    world.deps.heartbeat.beat()
    return world


def claimed(shop) -> Claim:
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    return claim


def finish(shop, claim: Claim, outcome: Outcome) -> None:
    with transaction(shop.deps.engine) as tx:
        claims.finish(tx, claim, outcome, shop.deps.principal)


def time_passes(shop) -> None:
    shop.control.act("UPDATE active_runs SET not_before = now()")
    ticks.reap_tick(shop.scheduler)


DEFERRED = Outcome(OutcomeKind.DEFERRED, "deferred", "shop: come back later", retry_after=HOUR)


def test_a_deferral_is_no_attempt_and_everybody_can_see_it(shop):
    asked = shop.enqueue()
    finish(shop, claimed(shop), DEFERRED)
    run = shop.run(asked.run_id)
    assert (run.state, run.attempt, run.error_code) == (RunState.QUEUED, 0, "deferred")
    ticks.presence_tick(shop.scheduler)
    with shop.cli.inside() as (tx, _, _name):
        why = explain.explain(tx, asked.run_id, runs_max=10)
    assert (why.rule, "after deferred until" in why.sentence) == (Rule.NOT_BEFORE, True)
    assert shop.events(asked.run_id)[-1] == "run.requeued"
    assert shop.dispatch() == []
    time_passes(shop)
    again = claimed(shop)
    assert (again.attempt, again.attempts_without_progress, again.deferred_for) == (1, 1, HOUR)


def test_a_stream_that_is_done_forgets_the_deferrals_before_it(shop):
    shop.enqueue()
    finish(shop, claimed(shop), DEFERRED)
    time_passes(shop)
    claim = claimed(shop)
    done = StreamResult(stream="public.t", state="succeeded", mode="merge")
    with transaction(shop.deps.engine) as tx:
        claims.record_stream(tx, claim, done, 0, shop.deps.principal)
    assert shop.control.one("SELECT deferred_for FROM active_runs") == timedelta(0)
    assert DEFERRED_MAX > HOUR


# ── failures in a row ───────────────────────────────────────────────────────────────────────────


def with_pause_after(shop, value: str) -> None:
    path = shop.document(STREAMS)
    path.write_text(path.read_text().replace("schedule:", f"pause_after: {value}\n    schedule:"))
    make_so(shop.cli, path, write=True)


def fail(shop) -> None:
    shop.enqueue()
    finish(shop, claimed(shop), Outcome(OutcomeKind.FAILED, "config", "no"))


def state(shop) -> tuple[object, ...]:
    (row,) = shop.control.all("SELECT state, state_reason, failures FROM schedules")
    return row


def test_failures_in_a_row_pause_after_the_number_of_the_document(shop, shell):
    with_pause_after(shop, "2")
    fail(shop)
    shop.sync()
    assert state(shop) == ("active", None, 0)  # a success starts anew
    fail(shop)
    fail(shop)
    assert state(shop) == ("paused", "failures", 2)
    assert shop.events().count("connection.paused") == 1
    assert (
        "2 failures in a row (2 would pause it)" in shell("connection", "show", "shop-to-lake")[1]
    )
    assert shell("connection", "resume", "shop-to-lake")[0] == 0
    assert state(shop) == ("active", None, 0)


def test_never_is_never_and_the_default_is_ten(shop):
    for _ in range(9):
        fail(shop)
    assert state(shop) == ("active", None, 9)
    with_pause_after(shop, "never")
    fail(shop)
    fail(shop)
    assert state(shop) == ("active", None, 11)
    with_pause_after(shop, "10")
    fail(shop)
    assert state(shop) == ("paused", "failures", 12)
    with pytest.raises(ConfigError, match="pause_after"):
        with_pause_after(shop, "0")


def test_a_failure_of_a_run_that_an_operator_has_paused_meanwhile_is_no_second_pause(shop, shell):
    with_pause_after(shop, "1")
    shop.enqueue()
    claim = claimed(shop)
    shell("connection", "pause", "shop-to-lake")
    finish(shop, claim, Outcome(OutcomeKind.FAILED, "credentials", "no"))
    assert state(shop) == ("paused", "operator", 1)
    assert shop.events().count("connection.paused") == 1


def test_refused_credentials_pause_at_the_first_failure_without_a_retry(shop, admin):
    admin.execute("ALTER ROLE reader PASSWORD 'another-word'")
    try:
        run, _ = shop.sync()
    finally:
        word = sql.Literal(shop.pair.logins["reader"])
        admin.execute(sql.SQL("ALTER ROLE reader PASSWORD {}").format(word))
    assert (run.state, run.error_code, run.attempt) == (RunState.FAILED, "credentials", 1)
    assert state(shop) == ("paused", "credentials", 1)


# ── one bad stream ──────────────────────────────────────────────────────────────────────────────


def test_a_stream_that_waits_for_a_lock_does_not_keep_the_others_waiting(world):
    for name in "abc":
        world.pair.source(
            f"CREATE TABLE {name} (id int PRIMARY KEY)", f"INSERT INTO {name} VALUES (1)"
        )
    world.apply({f"public.{name}": "{mode: replace}" for name in "abc"})
    assert world.sync()[0].state is RunState.SUCCEEDED
    for name in "abc":
        world.pair.source(f"INSERT INTO {name} VALUES (2)")
    raised = "RAISE EXCEPTION 'no' USING ERRCODE = '55P03'"
    lake = world.pair.session("destination")
    lake.execute(
        f"CREATE FUNCTION acme.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {raised}; END $$"
    )
    lake.execute(
        "CREATE TRIGGER no BEFORE INSERT ON acme.a FOR EACH ROW EXECUTE FUNCTION acme.no()"
    )
    run, streams = world.sync()
    assert (run.state, run.error_code) == (RunState.QUEUED, "lock_timeout")
    assert {name: one.rows_inserted for name, one in streams.items()} == {"b": 1, "c": 1}
    assert world.pair.same("b")
    lake.execute("DROP FUNCTION acme.no() CASCADE")
    time_passes(world)
    world.step()
    again = world.run(run.run_id)
    assert (again.state, again.attempt) == (RunState.SUCCEEDED, 2)
    assert all(world.pair.same(name) for name in "abc")
    assert {n: one.attempt for n, one in world.streams(run.run_id).items()} == {
        "a": 2,
        "b": 1,
        "c": 1,
    }


# ── success is never assumed ────────────────────────────────────────────────────────────────────

SWALLOW = (
    "CREATE FUNCTION acme.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {} THEN "
    "RETURN NULL; END IF; IF TG_OP = 'DELETE' THEN RETURN OLD; END IF; RETURN NEW; END $$; "
    "CREATE TRIGGER no BEFORE {} ON acme.t FOR EACH ROW EXECUTE FUNCTION acme.no()"
)


@pytest.mark.parametrize(
    ("spec", "operation", "what"),
    [
        ("{mode: merge, key: [id], cursor: xmin}", "INSERT", "NEW.id = 30"),
        ("{mode: merge, key: [id], cursor: xmin}", "UPDATE", "NEW.id = 1"),
        ("{mode: replace}", "DELETE", "OLD.id = 2"),
        ("{mode: append, cursor: xmin}", "INSERT", "NEW.id = 30"),
    ],
)
def test_a_destination_that_swallows_a_row_is_never_a_success(world, spec, operation, what):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v regclass)",
        "INSERT INTO t SELECT g, 'pg_class' FROM generate_series(1, 25) g",
    )
    world.apply({"public.t": spec})
    assert world.sync()[0].state is RunState.SUCCEEDED
    before = world.pair.content("destination", "t")
    world.pair.source(
        "UPDATE t SET v = 'pg_proc' WHERE id = 1",
        "DELETE FROM t WHERE id = 2",
        "INSERT INTO t VALUES (30, 'pg_class')",
    )
    lake = world.pair.session("destination")
    lake.execute(SWALLOW.format(what, operation))
    run, _ = world.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "rows_missing"), run.error
    assert "nothing was kept" in run.error
    assert world.pair.content("destination", "t") == before
    lake.execute("DROP FUNCTION acme.no() CASCADE")
    assert world.sync()[0].state is RunState.SUCCEEDED


def test_a_trigger_that_lets_everything_through_changes_nothing(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)", "INSERT INTO t VALUES (1, 'v')"
    )
    world.apply(STREAMS)
    world.sync()
    lake = world.pair.session("destination")
    lake.execute(SWALLOW.format("false", "INSERT OR UPDATE OR DELETE"))
    world.pair.source("UPDATE t SET v = 'w'", "INSERT INTO t VALUES (2, 'v')")
    run, streams = world.sync()
    assert (run.state, streams["t"].rows_updated, streams["t"].rows_inserted) == (
        RunState.SUCCEEDED, 1, 1,
    )  # fmt: skip
    assert world.pair.same("t")


def test_a_lost_lease_or_a_cancel_is_never_a_success(shop):
    asked = shop.enqueue()
    claim = claimed(shop)
    shop.control.act("UPDATE leases SET token = gen_random_uuid()")
    shop.control.act("UPDATE active_runs SET lease_token = gen_random_uuid()")
    with pytest.raises(Exception, match="another worker owns it"):
        finish(shop, claim, Outcome(OutcomeKind.SUCCEEDED))
    assert shop.run(asked.run_id).state is RunState.RUNNING
