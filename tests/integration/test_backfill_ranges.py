"""A large backfill is read in ranges: resumed after a kill, visible as a whole, nothing doubled."""

import os
import signal
from typing import Literal

import pytest

from schemas.records import Between
from schemas.runs import RunKind, RunState
from storage import runs
from tests.connectors.test_ranges import Crash, Runs, _some_ranges
from tests.faults.crash_points import DESTINATION, Point
from tests.faults.dying import dies_at
from tests.faults.test_processes import Fleet
from tests.integration.test_by_hand import ask, copied, do, served, state
from tests.world import OPERATOR

pytestmark = pytest.mark.integration

ROWS = 1_000
SPEC = "mode: merge, key: [id], cursor: at, range_rows: 100"
AT = "timestamptz '2026-01-01 00:00Z' + n * interval '1 minute'"
ALL = Between(lower="2026-01-01", upper="2026-02-01")
TABLES = {
    "t": ("id int PRIMARY KEY", "n", SPEC),
    "place": (  # the names that the question for bounds could trip over
        'place text COLLATE "C", total int, PRIMARY KEY (place, total)',
        "CASE WHEN n % 10 = 0 THEN chr(65 + n % 26) ELSE 'é''\\' END, n",
        "mode: merge, key: [place, total], cursor: at, range_rows: 100, ranges_at_once: 3",
    ),
    "scattered": ("id uuid PRIMARY KEY", "gen_random_uuid()", SPEC),
    "masked": ("id int PRIMARY KEY", "n", f"{SPEC}, mask: {{v: hmac}}"),
    # its key may be NULL and is proved by nothing: the primary key says nothing about it
    "unproved": ("id int, pk int PRIMARY KEY", "n, n", SPEC),
}


@pytest.fixture
def shop(world):
    for name, (key, values, _) in TABLES.items():
        world.pair.source(
            f"CREATE TABLE {name} ({key}, at timestamptz, v text)",
            f"INSERT INTO {name} SELECT {values}, {AT}, 'old' FROM generate_series(1, {ROWS}) n",
            f"ANALYZE {name}",
        )
    world.apply({f"public.{name}": f"{{{spec}}}" for name, (_, _, spec) in TABLES.items()})
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED, run
    return world


def corrected(shop, table="t", value="new") -> None:
    """Change all rows behind the cursor's back."""
    shop.pair.source(f"UPDATE {table} SET v = '{value}'", f"ANALYZE {table}")


def backfill(shop, table="t", window=ALL):
    run, streams = do(shop, RunKind.BACKFILL, table, window=window)
    return run, streams.get(table), shop.log(run.run_id)


def until_synced(shop, query: str) -> None:
    """Sync until something is there: a bound lies a moment before now."""
    for _ in range(100):
        assert shop.sync(streams=("public.t",))[0].state is RunState.SUCCEEDED
        if served(shop, query):
            return
    raise AssertionError(query)


def left_behind(shop) -> tuple[int, int]:
    return (
        served(shop, "SELECT count(*) FROM _syncward.generations"),
        served(
            shop,
            "SELECT count(*) FROM pg_class WHERE relname ~ '^_syncward_' AND relkind = 'r'",
        ),
    )


def at(when: Literal["before", "after"], function: str, nth: int = 1) -> Point:
    return Point("execute", when, function, "backfill", nth)


def test_a_large_window_comes_in_ranges_and_a_small_one_in_one_piece(shop):
    before, cursor = state(shop, "t"), copied(shop, "t")
    for table, (said, key) in {
        "t": ("read in 9 ranges of (id)", True),
        "place": ("ranges of (place, total)", True),
        "scattered": ("ranges of (id)", True),
        "masked": ("ranges", False),  # bounds are kept at the destination
        "unproved": ("ranges", False),
    }.items():
        corrected(shop, table)
        shop.pair.source(f"DELETE FROM {table} WHERE at = (SELECT min(at) FROM {table})")
        run, result, log = backfill(shop, table)
        assert run.state is RunState.SUCCEEDED, (table, run)
        assert (said in log) is key, (table, log)
        counted = (result.rows_extracted, result.rows_updated, result.rows_inserted)
        assert counted == (ROWS - 1, ROWS - 1, 0), table
        assert served(shop, f"SELECT count(*) FROM acme.{table} WHERE v = 'old'") <= 1, table
        assert served(shop, f"SELECT count(*) FROM acme.{table}") == ROWS  # none is taken for gone
        assert result.cursor_from["value"] == "2026-01-01 00:00:00+00", table
        assert result.cursor_to["value"] == "2026-02-01 00:00:00+00", table
    assert (state(shop, "t"), copied(shop, "t")) == (before, cursor)
    assert left_behind(shop) == (0, 0)
    # a window of 300 rows of the 1000, of 150, of one and of none
    corrected(shop, value="third")
    for upper, rows, ranges in (
        ("05:01", 299, "in 2 ranges"),
        ("02:31", 149, ""),
        ("00:03", 1, ""),
        ("00:02", 0, ""),
    ):
        window = Between(lower="2026-01-01 00:00", upper=f"2026-01-01 {upper}Z")
        run, result, log = backfill(shop, window=window)
        assert (run.state, result.rows_extracted) == (RunState.SUCCEEDED, rows)
        assert ("ranges" in log) is bool(ranges), log
        assert ranges in log


def test_a_kill_in_the_middle_is_followed_by_what_is_left(shop):
    for value, (point, there) in {
        "a": (at("after", "psycopg:Copy.write"), 0),
        "b": (at("after", "connectors.postgres.generations:done", 4), 3),
        "c": (at("after", f"{DESTINATION}._keep", 4), 4),
        "d": (at("before", "connectors.postgres.state:commit"), 10),
    }.items():
        corrected(shop, value=value)
        run_id = ask(shop, RunKind.BACKFILL, "t", window=ALL)
        dies_at(shop, run_id, point)
        # nothing is there in part
        assert served(shop, f"SELECT count(*) FROM acme.t WHERE v = '{value}'") == 0
        # rows that move to a range that is there, to one that is left, and out of the window
        shop.pair.source(
            "UPDATE t SET id = id - 2000 WHERE id = 990",
            "UPDATE t SET id = id + 2000 WHERE id = 10",
            "UPDATE t SET at = now() WHERE id = 500",
        )
        shop.step()
        run = shop.run(run_id)
        assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2), run
        assert f"goes on: {there} of 10 ranges" in shop.log(run_id)
        result = shop.streams(run_id)["t"]
        assert result.rows_loaded == result.rows_extracted
        assert result.rows_loaded in range(ROWS - 2, ROWS + 2)
        assert served(shop, "SELECT count(*) - count(DISTINCT id) FROM acme.t") == 0
        stale = f"SELECT array_agg(id) FROM acme.t WHERE v <> '{value}' AND id BETWEEN 1 AND {ROWS}"
        assert set(served(shop, stale) or ()) <= {10, 500, 990}
        assert left_behind(shop) == (0, 0)
        until_synced(shop, f"SELECT v = '{value}' FROM acme.t WHERE id = 500")
        shop.pair.source(
            "UPDATE t SET id = 990 WHERE id = -1010",
            "UPDATE t SET id = 10 WHERE id = 2010",
            "UPDATE t SET at = timestamptz '2026-01-01 08:20Z' WHERE id = 500",
        )


def test_what_a_backfill_leaves_is_no_part_of_a_sync_nor_of_another_backfill(shop):
    corrected(shop)
    run_id = ask(shop, RunKind.BACKFILL, "t", window=ALL)
    dies_at(shop, run_id, at("after", f"{DESTINATION}._keep", 4))
    shop.pair.source("ALTER TABLE t ADD COLUMN extra int")
    shop.step()
    run = shop.run(run_id)
    assert run.state is RunState.FAILED
    assert "a backfill follows no change" in run.error
    shop.pair.source("ALTER TABLE t DROP COLUMN extra")
    corrected(shop, value="newer")
    assert left_behind(shop) == (1, 1)
    run, result, log = backfill(shop)
    assert run.state is RunState.SUCCEEDED, run
    assert "goes on" not in log
    assert result.rows_updated == ROWS
    assert left_behind(shop) == (0, 0)
    corrected(shop, value="newest")
    run_id = ask(shop, RunKind.BACKFILL, "t", window=ALL)
    dies_at(shop, run_id, at("after", f"{DESTINATION}._keep", 4))
    with shop.cli.transaction() as tx:
        runs.cancel(tx, run_id, OPERATOR)
    shop.step()
    assert shop.run(run_id).state is RunState.CANCELLED
    asked = shop.enqueue(full_refresh=True, streams=("public.t",))
    shop.step()
    assert "goes on" not in shop.log(asked.run_id)
    assert shop.streams(asked.run_id)["t"].rows_updated == ROWS
    assert left_behind(shop) == (0, 0)
    # and rows of a full read that was begun before would be as they were before the correction
    ((connection, fence),) = shop.control.all("SELECT connection_id, fence FROM schedules")
    ends = Runs(shop.pair)
    ends.connection_id, ends.fence = connection, fence
    spec = {"mode": "merge", "key": ("id",), "cursor": "at"}
    with pytest.raises(Crash):
        ends.attempt(crash=lambda *place: place == ("kept", 4), full=True, **spec)
    assert left_behind(shop) == (1, 1)
    shop.control.act("UPDATE schedules SET fence = fence + 5")
    corrected(shop, value="after that")
    window = Between(lower="2026-01-01", upper="2026-01-01 00:31Z")
    run, result, _ = backfill(shop, window=window)
    assert (run.state, result.rows_updated) == (RunState.SUCCEEDED, 30), run
    assert left_behind(shop) == (0, 0)


@pytest.mark.full  # 15 s; the cases above die at each step
def test_kill_9_in_the_middle_of_a_backfill(world):
    make = "INSERT INTO t SELECT n, {}, repeat(md5(n::text), 8) FROM generate_series(1, 400000) n"
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, at timestamptz, v text)",
        make.format("timestamptz '2026-01-01Z' + n * interval '1 s'"),
        "ANALYZE t",
    )
    world.apply({"public.t": "{mode: merge, key: [id], cursor: at, range_rows: 10000}"})
    assert world.sync()[0].state is RunState.SUCCEEDED
    world.pair.source("UPDATE t SET v = 'new' || v", "ANALYZE t")
    run_id = ask(world, RunKind.BACKFILL, "t", window=ALL)
    fleet = Fleet(world, 1)
    try:
        there = _some_ranges(world.pair, at_least=3)
        for pid in fleet.worker_pids():
            os.kill(pid, signal.SIGKILL)
        run = fleet.wait(run_id)
    finally:
        fleet.stop()
    assert run.state is RunState.SUCCEEDED, run
    result = world.streams(run_id)["t"]
    assert (result.attempt, result.rows_extracted, result.rows_updated) == (2, 400_000, 400_000)
    (said,) = [x for x in world.log(run_id).splitlines() if x.startswith("goes on: ")]
    assert there <= int(said.split()[2]) < 40
    assert world.pair.same("t")
    assert left_behind(world) == (0, 0)
