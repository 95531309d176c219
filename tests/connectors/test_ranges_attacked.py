"""Ranges and least rights, tables that are rewritten, errors beside a wait, sessions that end."""

import threading

import psycopg
import pytest

from connectors import registry
from connectors.postgres import generations
from connectors.postgres.catalog import begin_at
from connectors.postgres.link import Line
from connectors.postgres.sessions import Sessions
from schemas.errors import ConfigError, TransientError
from schemas.records import Ranges, WireFormat
from schemas.runs import RunState
from schemas.streams import StreamSpec
from tests.connectors.test_ranges_beside import ROWS, Steps, make, nobody_is_left, until
from tests.world import LOOSE
from workers import run_sync

pytestmark = pytest.mark.integration

_PG = WireFormat.PG_BINARY


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def shop(world):
    make(world.pair, "keyed")
    make(world.pair, "plain", key="")
    spec = "mode: replace, range_rows: 100, ranges_at_once: 3"
    world.apply({
        "public.keyed": f"{{{spec}}}", "public.plain": f"{{{spec}, columns: {{include: [id]}}}}",
    })  # fmt: skip
    return world


def test_a_login_that_may_read_some_columns_reads_a_table_without_a_key_in_one_piece(shop):
    """Neither its lock nor the place of its rows is for such a login."""
    with shop.pair.connect("source") as db:
        db.execute("REVOKE ALL ON keyed, plain FROM reader")
        db.execute("GRANT SELECT (id, v) ON keyed TO reader")
        db.execute("GRANT SELECT (id) ON plain TO reader")
    run, streams = shop.sync()
    assert run.state is RunState.SUCCEEDED, run
    assert {r.rows_inserted for r in streams.values()} == {ROWS}
    assert "ranges of the places" not in shop.log(run.run_id)
    assert "ranges of (id)" in shop.log(run.run_id)


def written_anew_behind_the_snapshot(shop, monkeypatch, table: str) -> None:
    """Let the next read find its table truncated and filled again, once its snapshot is taken."""
    anew: list[str] = []

    def begun_early(conn, stream, relation) -> None:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        conn.execute("SELECT 1 FROM pg_class LIMIT 1")  # the snapshot is taken
        if not anew:
            anew.append(
                f"BEGIN; CREATE TEMP TABLE t AS TABLE {table}; TRUNCATE {table}; "
                f"INSERT INTO {table} TABLE t; COMMIT"
            )
            shop.pair.source(*anew)
        begin_at(conn, stream, relation)

    monkeypatch.setattr("connectors.sources.postgres.begin_at", begun_early)


def test_a_window_of_a_table_that_is_written_anew_is_not_read_as_empty(world, monkeypatch):
    """A small one in one piece: what it missed would lie below the next window for good."""
    world.pair.source(
        "CREATE TABLE timed (id int PRIMARY KEY, at timestamptz NOT NULL)",
        "INSERT INTO timed VALUES (1, '2020-01-01')",
    )
    world.apply({"public.timed": "{mode: merge, key: [id], cursor: at}"})
    _, streams = world.sync()
    at = streams["timed"].cursor_to["value"]  # so that it is in the next window
    world.pair.source(f"INSERT INTO timed VALUES (2, '{at}')")
    written_anew_behind_the_snapshot(world, monkeypatch, "timed")
    run, streams = world.sync()
    assert run.state is RunState.SUCCEEDED, run
    assert "rewritten just now; read once more" in world.log(run.run_id)
    assert streams["timed"].rows_inserted == 1
    assert world.pair.same("timed")


def test_a_table_that_is_written_anew_behind_the_snapshot_is_not_read_as_empty(
    shop, steps, monkeypatch
):
    """An attempt that goes on looks at the table late: all that the snapshot saw is gone then."""

    def kept(n: int) -> None:
        if n == 4:
            raise ConfigError("the destination has had enough", code="data_refused")

    steps.kept = kept
    wanted = ("public.keyed",)
    assert shop.sync(streams=wanted)[0].state is RunState.FAILED
    steps.kept = lambda _n: None
    written_anew_behind_the_snapshot(shop, monkeypatch, "keyed")
    run, streams = shop.sync(streams=wanted)
    assert run.state is RunState.SUCCEEDED, run
    assert "rewritten just now; read once more" in shop.log(run.run_id)
    assert "goes on: " in shop.log(run.run_id)
    assert streams["keyed"].rows_inserted == ROWS
    assert shop.pair.same("keyed")


#: A row that is read slowly, once somebody holds a lock.
SLOW = """
CREATE POLICY slow ON keyed TO reader USING (id <> 150
  OR NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objid = 7)
  OR pg_sleep(300) IS NOT NULL)
"""
SLEEPS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event IN ('PgSleep', 'advisory')"


@pytest.mark.parametrize("role", ["source", "destination"])
def test_an_error_ends_ranges_that_wait_for_a_server(shop, steps, monkeypatch, role):
    """One range waits longer than the test does; the error of another one ends it."""
    if role == "source":
        shop.pair.source(SLOW, "ALTER TABLE keyed ENABLE ROW LEVEL SECURITY")
    done, holder = generations.done, shop.pair.connect(role)
    steps.begun = lambda *_: holder.execute("SELECT pg_advisory_lock(7)")
    ended = threading.Event()

    def patched(conn, request, of, part, counts) -> None:
        if role == "destination" and part.n == 1:
            conn.execute("SET lock_timeout = 0")
            conn.execute("SELECT pg_advisory_lock(7)")
        if part.n == 2:
            until(lambda: shop.control.all(SLEEPS) == [(1,)], "no range waits")
            raise ConfigError("the destination has had enough", code="data_refused")
        done(conn, request, of, part, counts)

    monkeypatch.setattr(generations, "done", patched)
    asked = shop.enqueue(streams=("public.keyed",))
    (job,) = shop.dispatch()

    def work() -> None:
        run_sync.execute(job, shop.deps)
        ended.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        assert ended.wait(60), "it waits for what nobody wants any more"
    finally:
        holder.close()
        for (pid,) in shop.pair.rows(role, SLEEPS.replace("count(*)", "pid")):
            shop.pair.source(f"SELECT pg_terminate_backend({pid})")
        worker.join(30)
    run = shop.run(asked.run_id)
    assert run.state is RunState.FAILED
    assert "the destination has had enough" in str(run.error)
    nobody_is_left(shop)


def test_a_session_that_is_opened_too_late_ends_alone(world):
    """Whoever waits for it is told at once; those beside it are not closed under their threads."""
    opened: list[psycopg.Connection] = []
    may = threading.Event()

    def connect() -> psycopg.Connection:
        if opened:
            may.wait(30)
        opened.append(world.pair.connect("source"))
        return opened[-1]

    first = world.pair.connect("source")
    sessions, told, line = Sessions(connect), [], Line(first)

    def borrow() -> None:
        try:
            with sessions.one():
                told.append("lent")
        except TransientError as error:
            told.append(error.code)

    with sessions.one() as lent:
        thread = threading.Thread(target=borrow)
        thread.start()
        sessions.cancel(line)
        thread.join(20)
        assert told == ["cancelled_there"]
        may.set()
        until(lambda: len(opened) == 2 and opened[1].closed, "the late one stays open")
        assert lent.execute("SELECT 1").fetchone() == (1,)
    sessions.close()
    line.close()
    assert lent.closed


def test_stop_ends_what_is_lent_and_the_sessions_serve_again(world):
    sessions = Sessions(lambda: world.pair.connect("source"))
    cancelled = pytest.raises(psycopg.errors.QueryCanceled)

    def stop() -> None:
        until(lambda: world.control.all(SLEEPS) == [(1,)], "nobody sleeps")
        sessions.stop()

    with sessions.one() as idle, cancelled, sessions.one() as conn:
        asleep = threading.Thread(target=stop)
        asleep.start()
        conn.execute("SELECT pg_sleep(300)")
    asleep.join(30)
    assert conn.closed
    with sessions.one() as again:
        assert again.execute("SELECT 1").fetchone() == (1,)
    sessions.close()
    assert idle.closed


def test_a_snapshot_that_is_not_lent_any_more_is_tried_again_and_says_why(shop):
    """A standby ends the session that lends it where it is in the way of what comes."""
    config, secret = shop.pair.config("source"), shop.pair.secret("source")
    source = registry.open_source("postgres", config, secret, LOOSE)
    stream = StreamSpec.model_validate({"name": "public.keyed", "mode": "replace"})
    ended = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE usename = 'reader' AND datname = current_database()"
    )

    def read() -> None:
        with source.extract(stream, None, _PG, ranges=Ranges(100, at_once=2)) as batches:
            batch = next(batches)
            assert shop.pair.rows("source", ended) == [(True,)]
            nobody_is_left(shop)
            list(batch.chunks)

    try:
        with pytest.raises(TransientError, match="something ended that session") as told:
            read()
    finally:
        source.close()
    assert told.value.code == "cancelled_there"
