"""Ranges that are read and loaded at the same time, and ranges of tables without a key."""

import socket
import threading
import time
from uuid import uuid4

import pytest

from connectors import registry
from connectors.postgres import generations
from schemas.errors import ConfigError
from schemas.records import LoadRequest, Ranges
from schemas.runs import RunState
from schemas.streams import StreamSpec
from storage import runs
from tests.world import LOOSE, OPERATOR
from workers import run_sync

pytestmark = pytest.mark.integration

ROWS, AT_ONCE = 1_000, 3
SPEC = "mode: replace, range_rows: 100, ranges_at_once: 3"
SOURCES = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'syncward:source'
"""


def make(pair, table: str, key: str = "PRIMARY KEY") -> None:
    pair.source(
        f"CREATE TABLE {table} (id int {key}, v text)",
        f"INSERT INTO {table} SELECT n, repeat('v', 100) || n FROM generate_series(1, {ROWS}) n",
        f"VACUUM ANALYZE {table}",
    )


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Steps:
    """Runs something of the test's around what the engine does with ranges."""

    def __init__(self, monkeypatch) -> None:
        self.begun = self.kept = lambda *_: None
        begin, done = generations.begin, generations.done

        def after_begin(conn, request, new, before):
            begin(conn, request, new, before)
            self.begun(conn, new)

        def before_done(conn, request, of, part, counts):
            self.kept(part.n)
            done(conn, request, of, part, counts)

        monkeypatch.setattr(generations, "begin", after_begin)
        monkeypatch.setattr(generations, "done", before_done)


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def shop(world):
    """A world with two tables: one with a key, one without."""
    make(world.pair, "keyed")
    make(world.pair, "plain", key="")
    world.apply({f"public.{t}": f"{{{SPEC}}}" for t in ("keyed", "plain")})
    return world


def shop_sources(world) -> int:
    ((count,),) = world.pair.rows("source", SOURCES)
    return count


def nobody_is_left(world) -> None:
    until(lambda: shop_sources(world) == 0, "a session is left behind")


def test_ranges_are_loaded_at_the_same_time_and_are_the_same_rows(shop, steps):
    meeting = threading.Barrier(AT_ONCE)
    threads = set()

    def kept(n: int) -> None:
        threads.add(threading.get_ident())
        if n < AT_ONCE:  # none of the first ones ends before all of them are there
            meeting.wait(timeout=30)

    steps.kept = kept
    run, streams = shop.sync()
    assert run.state is RunState.SUCCEEDED, run
    assert len(threads) >= AT_ONCE
    log = shop.log(run.run_id)
    assert "3 ranges are read at the same time" in log
    assert "read in 10 ranges of (id)" in log
    assert "ranges of the places of its rows" in log
    for table in ("keyed", "plain"):
        assert streams[table].rows_inserted == ROWS
        assert shop.pair.same(table)
    nobody_is_left(shop)
    steps.kept = lambda _n: None
    _, streams = shop.sync()  # now beside rows that are there
    assert streams["keyed"].rows_unchanged == streams["plain"].rows_unchanged == ROWS


def test_the_next_stream_of_a_run_is_read_by_a_snapshot_of_its_own(shop, steps):
    """What is written while the first stream is read belongs to the second one."""
    begun: list[object] = []

    def after(_conn, new) -> None:
        if not begun:
            rows = "SELECT -n, 'n' FROM generate_series(1, 50) n"
            shop.pair.source(*(f"INSERT INTO {table} {rows}" for table in ("keyed", "plain")))
        begun.append(new)

    steps.begun = after
    run, streams = shop.sync()
    assert run.state is RunState.SUCCEEDED, run
    assert sorted(r.rows_inserted for r in streams.values()) == [ROWS, ROWS + 50]


@pytest.mark.parametrize("table", ["keyed", "plain"])
def test_what_is_written_meanwhile_is_in_none_of_the_ranges(shop, steps, table):
    """One snapshot: rows that move to another range come once, as they were."""
    was = shop.pair.content("source", table)

    def begun(_conn, _new) -> None:
        shop.pair.source(
            f"UPDATE {table} SET id = {ROWS * 10} - id, v = v || '!' WHERE id % 2 = 0",
            f"DELETE FROM {table} WHERE id % 10 = 1",
            f"INSERT INTO {table} SELECT -n, 'new' FROM generate_series(1, 50) n",
            f"VACUUM {table}",
        )

    steps.begun = begun
    run, _ = shop.sync(streams=(f"public.{table}",))
    assert run.state is RunState.SUCCEEDED, run
    assert shop.pair.content("destination", table) == was


def test_a_table_without_a_key_keeps_its_place_while_it_is_read(shop, steps):
    """What rewrites a table would move its rows: it waits for the snapshot."""
    found = []

    def kept(n: int) -> None:
        if n == 2:
            with shop.pair.connect("source") as db:
                db.execute("SET lock_timeout = '50ms'")
                for statement in ("VACUUM FULL plain", "TRUNCATE plain"):
                    try:
                        db.execute(statement)
                    except Exception as error:  # noqa: BLE001 - its name is what is looked at
                        found.append(type(error).__name__)

    steps.kept = kept
    run, _ = shop.sync(streams=("public.plain",))
    assert run.state is RunState.SUCCEEDED, run
    assert found == ["LockNotAvailable"] * 2
    assert shop.pair.same("plain")


def test_a_range_that_fails_ends_the_others_and_the_next_run_goes_on(shop, steps):
    def kept(n: int) -> None:
        if n == 4:
            raise ConfigError("the destination has had enough", code="data_refused")

    steps.kept = kept
    run, _ = shop.sync(streams=("public.keyed",))
    assert run.state is RunState.FAILED
    assert "the destination has had enough" in str(run.error)
    nobody_is_left(shop)
    assert shop.pair.rows("destination", "SELECT to_regclass('acme.keyed')") == [(None,)]
    steps.kept = lambda _n: None
    run, streams = shop.sync(streams=("public.keyed",))
    assert "goes on: " in shop.log(run.run_id)
    assert streams["keyed"].rows_inserted == ROWS
    assert shop.pair.same("keyed")


def test_places_mean_nothing_to_another_attempt(shop, steps):
    def kept(n: int) -> None:
        if n == 4:
            raise ConfigError("the destination has had enough", code="data_refused")

    steps.kept = kept
    run, _ = shop.sync(streams=("public.plain",))
    assert run.state is RunState.FAILED
    # now there is a key whose values could be compared with the places that were kept
    shop.pair.source("ALTER TABLE plain ADD PRIMARY KEY (id)", "VACUUM FULL plain", "ANALYZE plain")
    steps.kept = lambda _n: None
    run, streams = shop.sync(streams=("public.plain",))
    assert "goes on" not in shop.log(run.run_id)
    assert streams["plain"].rows_inserted == ROWS
    assert shop.pair.same("plain")
    hidden = "SELECT count(*) FROM pg_class WHERE relname ~ '^_syncward_' AND relkind = 'r'"
    assert shop.pair.rows("destination", hidden) == [(0,)]


def test_cancel_reaches_all_of_them(shop, steps):
    """Every range waits for a lock at the destination that nobody gives up."""
    refused = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = %s"
    made, queued = [], threading.Event()
    steps.begun = lambda _conn, new: made.append(new)
    steps.kept = lambda _n: queued.wait(30)
    asked = shop.enqueue(streams=("public.keyed",))
    (job,) = shop.dispatch()
    worker = threading.Thread(target=run_sync.execute, args=(job, shop.deps))
    worker.start()
    holder = shop.pair.connect("destination", autocommit=False)

    def waiting(mode: str) -> int:
        return shop.control.all(refused.replace("%s", f"'{mode}'"))[0][0]

    def wanted() -> int:
        mode = f"mode = 'AccessExclusiveLock' AND pid = {holder.info.backend_pid}"
        return shop.control.all(f"SELECT count(*) FROM pg_locks WHERE {mode}")[0][0]

    def hold() -> None:
        (new,) = made
        holder.execute(f'LOCK TABLE "{new.schema}"."{new.hidden}" IN ACCESS EXCLUSIVE MODE')

    try:
        until(lambda: made, "no read was begun")
        until(lambda: shop.pair.rows("destination", "SELECT FROM _syncward.generations"), "begun")
        thread = threading.Thread(target=hold)
        thread.start()
        until(wanted, "the lock is not asked for")  # or held, if no range was there yet
        queued.set()
        thread.join()
        until(lambda: waiting("RowExclusiveLock") == AT_ONCE, "not every range waits")
        began = time.monotonic()
        with shop.cli.transaction() as tx:
            runs.cancel(tx, asked.run_id, OPERATOR)
        shop.deps.heartbeat.beat()
        worker.join(30)
        assert not worker.is_alive()
        assert time.monotonic() - began < 10
    finally:
        queued.set()
        holder.close()
        worker.join(30)
    assert shop.run(asked.run_id).state is RunState.CANCELLED
    nobody_is_left(shop)


def test_all_sessions_go_to_the_address_that_was_looked_up_first(shop, monkeypatch):
    """A name that leads elsewhere by now leads none of them there."""
    answers: dict[str, list[str]] = {}
    asked = socket.getaddrinfo

    def moving(host, port, *more, **named):
        if not str(host).endswith(".test"):
            return asked(host, port, *more, **named)
        address = "127.0.0.9" if host in answers else "127.0.0.1"
        answers.setdefault(host, []).append(address)
        return asked(address, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    ends = [
        getattr(registry, f"open_{role}")(
            "postgres", {**shop.pair.config(role), "host": f"{role}.test"},
            shop.pair.secret(role), LOOSE,
        )
        for role in ("source", "destination")
    ]  # fmt: skip
    source, destination = ends
    stream = StreamSpec.model_validate({"name": "public.keyed", "mode": "replace"})
    request = LoadRequest(uuid4(), uuid4(), 1, 1, stream, "acme")
    known = destination.claim_stream(request)
    try:
        with source.extract(stream, None, ranges=Ranges(100, at_once=2)) as batches:
            for batch in batches:
                if not batch.part.is_end:
                    assert batch.part.beside
                    known.keep(batch)
                else:
                    assert destination.load(request, batch).rows_inserted == ROWS
    finally:
        for end in ends:
            end.close()
    assert answers == {"source.test": ["127.0.0.1"], "destination.test": ["127.0.0.1"]}
