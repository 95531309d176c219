"""Large full reads in ranges: resumed after crashes, visible as a whole, the same to the row."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from uuid import uuid4

import psycopg
import pytest

from connectors import registry
from connectors.postgres import state as pg_state
from schemas.errors import LeaseLost
from schemas.guards import DataGuardTripped
from schemas.records import LoadRequest, Ranges
from schemas.runs import RunState
from schemas.streams import StreamSpec
from storage import claims
from storage.engine import transaction
from tests.faults.test_processes import Fleet
from tests.world import LOOSE

pytestmark = pytest.mark.integration

ROWS, EACH, RANGES = 1_000, 100, 10
MERGE = {"mode": "merge", "key": ("id",)}
BY_TIME = {**MERGE, "cursor": "at"}
BY_XMIN = {**MERGE, "cursor": "xmin"}
REPLACE = {"mode": "replace"}
APPEND = {"mode": "append", "cursor": "xmin"}


class Crash(Exception):  # noqa: N818 - what a kill is to the code
    """The worker is gone."""


class Runs:
    """Both ends of a pair, opened anew for each attempt, as after a kill."""

    def __init__(self, pair) -> None:
        self.pair, self.connection_id, self.fence = pair, uuid4(), 0
        self.asked: list[int] = []  # ranges that the source was asked for, over all attempts
        self.notes: list[str] = []

    def request(self, run_id, **spec) -> LoadRequest:
        self.fence += 1
        stream = StreamSpec(name="public.t", range_rows=EACH, **spec)
        return LoadRequest(self.connection_id, run_id, 1, self.fence, stream, "acme")

    def open(self):
        return tuple(
            getattr(registry, f"open_{role}")(
                "postgres", self.pair.config(role), self.pair.secret(role), LOOSE
            )
            for role in ("source", "destination")
        )

    def attempt(self, run_id=None, *, crash=None, approvals=(), full=False, **spec):
        """One attempt as a worker makes it; `crash(place, n)` says where it ends."""
        request = replace(self.request(run_id or uuid4(), **spec), approvals=approvals)
        step = crash or (lambda _place, _n: False)
        source, destination = self.open()
        try:
            known = destination.claim_stream(request)
            cursor = None if full else known.cursor
            sweep = known.loaded_before and cursor is None
            ranges = Ranges(request.stream.range_rows, known.kept)
            with source.extract(request.stream, cursor, sweep=sweep, ranges=ranges) as batches:
                for batch in batches:
                    self.notes += batch.notes
                    n = batch.part.n if batch.part else -1
                    batch.chunks = self._stepping(batch.chunks, step, n)
                    if batch.part is not None and not batch.part.is_end:
                        self.asked.append(n)
                        known.keep(batch)
                        self._at(step, "kept", n)
                        continue
                    self._at(step, "end", n)
                    return destination.load(request, batch)
        finally:
            source.close()
            destination.close()

    def _stepping(self, chunks, step, n):
        for chunk in chunks:
            self._at(step, "within", n)
            yield chunk
        self._at(step, "read", n)

    @staticmethod
    def _at(step, place, n) -> None:
        if step(place, n):
            raise Crash(place, n)

    def same(self) -> bool:
        return self.pair.same("t")

    def left_behind(self) -> tuple[int, ...]:
        ((found,),) = self.pair.rows(
            "destination",
            "SELECT ROW((SELECT count(*) FROM _syncward.generations), "
            "(SELECT count(*) FROM _syncward.ranges), (SELECT count(*) FROM pg_class "
            "WHERE relname ~ '^_syncward_' AND relkind = 'r'))::text",
        )
        return tuple(int(n) for n in found.strip("()").split(","))


def make(pair, key: str = "id int", keys: str = "n", *, analyze: bool = True) -> None:
    pair.source(
        f"CREATE TABLE t ({key} PRIMARY KEY, v text, "
        # settled: a time bound lies a moment before now
        "at timestamptz NOT NULL DEFAULT now() - interval '1 m')",
        f"INSERT INTO t (id, v) SELECT {keys}, 'v' || n FROM generate_series(1, {ROWS}) AS n",
        "ANALYZE t" if analyze else "SELECT 1",
    )


@pytest.fixture
def ends(pair):
    return Runs(pair)


# ── one attempt ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", [MERGE, BY_TIME, BY_XMIN, REPLACE, APPEND], ids=str)
def test_a_large_table_comes_in_ranges_and_is_the_same(ends, spec):
    make(ends.pair)
    result = ends.attempt(**spec)
    assert ends.asked == list(range(RANGES))
    assert (result.rows_extracted, result.rows_inserted, result.bytes > 0) == (ROWS, ROWS, True)
    assert ends.same()
    assert ends.left_behind() == (0, 0, 0)
    keyed = "SELECT count(*) FROM pg_index WHERE indrelid = 'acme.t'::regclass AND indisprimary"
    assert ends.pair.rows("destination", keyed) == [(0 if spec is APPEND else 1,)]


@pytest.mark.parametrize("spec", [BY_TIME, REPLACE, {**MERGE, "deletes": "soft"}], ids=str)
def test_a_second_full_read_touches_what_differs_only(ends, spec):
    make(ends.pair)
    ends.attempt(**spec)
    ends.pair.source("UPDATE t SET v = 'new' WHERE id = 500", "DELETE FROM t WHERE id = 7")
    ends.asked.clear()
    result = ends.attempt(**spec, full=True)
    assert ends.asked == list(range(RANGES))
    deleted = 0 if spec is BY_TIME else 1
    assert (result.rows_updated, result.rows_unchanged) == (1, ROWS - 2)
    assert result.rows_deleted == deleted
    assert ends.left_behind() == (0, 0, 0)


def test_a_small_table_and_what_has_no_places_come_in_one_piece(ends):
    """A table that others inherit from has rows of several, at the same places."""
    ends.pair.source(
        "CREATE TABLE above (id int, v text)", "CREATE TABLE t () INHERITS (above)",
        "ALTER TABLE above RENAME TO x", "ALTER TABLE t RENAME TO below",
        "ALTER TABLE x RENAME TO t",
        f"INSERT INTO below SELECT n, 'v' FROM generate_series(1, {ROWS}) AS n",
        f"INSERT INTO t SELECT n, 'v' FROM generate_series(1, {ROWS}) AS n", "ANALYZE",
    )  # fmt: skip
    assert ends.attempt(**REPLACE).rows_inserted == 2 * ROWS
    assert ends.asked == []
    ends.pair.source("DROP TABLE below", "DELETE FROM t WHERE id > 500")
    ends.pair.source("DELETE FROM t WHERE id > 190", "ALTER TABLE t ADD PRIMARY KEY (id)")
    ends.pair.source("VACUUM FULL t", "ANALYZE t")
    ends.attempt(**REPLACE, guards={"delete_ratio": False})
    assert ends.asked == []
    assert ends.same()


# ── keys ─────────────────────────────────────────────────────────────────────────────────────

KEYS = {
    "text": ("id text", "chr(65 + n % 26) || 'é''\\' || n"),
    "collated": ('id text COLLATE "C"', "chr(CASE n % 2 WHEN 0 THEN 65 ELSE 97 END) || n"),
    "uuid": ("id uuid", "gen_random_uuid()"),
    "numeric": ("id numeric", "n::numeric / 7 - 50"),
    "numeric with NaN": ("id numeric", "CASE n WHEN 9 THEN 'NaN' ELSE n % 7 * 1e30 + n END"),
    "skewed": ("id bigint", "CASE WHEN n < 900 THEN n ELSE n * 1000000000::bigint END"),
    "bpchar": ("id char(9)", "'k' || n"),
    "varchar": ("id varchar(9)", "n::text"),
    "bytea": ("id bytea", "sha256(n::text::bytea)"),
    "timestamptz": ("id timestamptz", "'2026-03-29 00:00+01'::timestamptz + n * interval '7 s'"),
    "BC": ("id date", "'0001-06-01 BC'::date + n"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_every_key_is_cut_into_ranges_that_are_all_rows_once(ends, kind):
    make(ends.pair, *KEYS[kind])
    result = ends.attempt(**REPLACE)
    assert len(ends.asked) in range(5, RANGES + 1)
    assert result.rows_inserted == ROWS
    assert ends.same()


@pytest.mark.parametrize("columns", ["a, b", "b, a"])
def test_a_composite_key_is_cut_within_one_value_of_its_first_column(ends, columns):
    ends.pair.source(
        f"CREATE TABLE t (a int, b text, PRIMARY KEY ({columns}))",
        # nine of ten rows have one and the same value
        f"INSERT INTO t SELECT CASE WHEN n % 10 = 0 THEN n ELSE 5 END, 'b' || n "
        f"FROM generate_series(1, {ROWS}) AS n",
        "ANALYZE t",
    )
    assert ends.attempt(mode="merge", key=("a", "b")).rows_inserted == ROWS
    assert len(ends.asked) in range(5, RANGES + 1)
    assert ends.same()


def test_partitions_and_a_table_that_nobody_has_analyzed_are_cut_too(ends):
    ends.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text) PARTITION BY RANGE (id)",
        "CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (600)",
        "CREATE TABLE t_2 PARTITION OF t FOR VALUES FROM (600) TO (2000)",
        f"INSERT INTO t SELECT n, repeat('x', 200) FROM generate_series(1, {ROWS}) AS n",
    )
    assert ends.attempt(**REPLACE).rows_inserted == ROWS
    assert len(ends.asked) > 5
    assert ends.same()


def test_a_range_whose_rows_are_gone_is_empty(ends):
    make(ends.pair)
    run = uuid4()
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda place, n: (place, n) == ("kept", 2), **MERGE)
    ends.pair.source("DELETE FROM t WHERE id BETWEEN 350 AND 650")
    result = ends.attempt(run, **MERGE)
    assert result.rows_inserted == ROWS - 301
    assert ends.same()


# ── crashes ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("same_run", [True, False])
@pytest.mark.parametrize("spec", [BY_XMIN, REPLACE, APPEND], ids=str)
@pytest.mark.parametrize("place", ["within", "read", "kept"])
@pytest.mark.parametrize("n", [0, 4, RANGES - 1])
def test_an_attempt_goes_on_where_the_last_one_ended(ends, spec, place, n, same_run):
    make(ends.pair)
    run = uuid4()
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda *at: at == (place, n), **spec)
    there = n + 1 if place == "kept" else n
    assert ends.pair.rows("destination", "SELECT to_regclass('acme.t')") == [(None,)]
    ends.asked.clear()
    result = ends.attempt(run if same_run else None, **spec)
    # all is there and was not made visible: another run looks for itself
    from_anew = there == RANGES and not same_run
    assert ends.asked == list(range(0 if from_anew else there, RANGES))
    assert (result.rows_extracted, result.rows_loaded) == (ROWS, ROWS)
    assert ends.same()
    assert ends.left_behind() == (0, 0, 0)


def test_crash_after_crash_reads_every_range_once(ends):
    make(ends.pair)
    run = uuid4()
    for stop in range(RANGES):
        with pytest.raises(Crash):
            ends.attempt(run, crash=lambda place, n, at=stop: place == "kept" and n == at, **MERGE)
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda place, _n: place == "end", **MERGE)
    assert ends.attempt(run, **MERGE).rows_extracted == ROWS
    assert ends.asked == list(range(RANGES))
    assert ends.same()


def test_a_zombie_cannot_keep_a_range_nor_end_the_read(ends):
    make(ends.pair)
    run = uuid4()

    def overtaken(place, n):
        if (place, n) == ("read", 3):  # its rows are on their way in
            with pytest.raises(Crash):
                ends.attempt(run, crash=lambda place, _n: place == "end", **MERGE)
        return False

    with pytest.raises(LeaseLost):
        ends.attempt(run, crash=overtaken, **MERGE)
    assert ends.asked == [0, 1, 2, 3, *range(3, RANGES)]
    assert ends.attempt(run, **MERGE).rows_extracted == ROWS
    assert ends.asked == [0, 1, 2, 3, *range(3, RANGES)]
    assert ends.same()


def test_a_zombie_cannot_begin_a_read(ends):
    make(ends.pair)
    request = ends.request(uuid4(), **MERGE)
    source, destination = ends.open()
    known = destination.claim_stream(request)
    ends.attempt(**MERGE)
    ranges = Ranges(EACH, known.kept)
    with source.extract(request.stream, None, ranges=ranges) as batches:
        with pytest.raises(LeaseLost):
            known.keep(next(batches))
        for _ in batches:
            pass
    source.close()
    destination.close()
    assert ends.left_behind() == (0, 0, 0)


# ── changes between two attempts ─────────────────────────────────────────────────────────────

CHANGES = (
    "UPDATE t SET v = 'changed', at = clock_timestamp() WHERE id IN (10, 900)",
    "DELETE FROM t WHERE id IN (20, 910)",
    "INSERT INTO t VALUES (0, 'new', clock_timestamp()), (2000, 'new', clock_timestamp())",
    "UPDATE t SET id = 2001, at = clock_timestamp() WHERE id = 30",  # to a range not yet read
    "UPDATE t SET id = -1, at = clock_timestamp() WHERE id = 920",  # to one that was
)


@pytest.mark.parametrize("spec", [
    {**BY_TIME, "deletes": "hard", "key_sweep": 1}, {**BY_XMIN, "deletes": "hard", "key_sweep": 1},
    {**MERGE, "deletes": "hard"}, REPLACE,
], ids=str)  # fmt: skip
def test_what_changes_between_attempts_is_there_after_the_next_run(ends, spec):
    make(ends.pair)
    run = uuid4()
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda *at: at == ("kept", 4), **spec)
    ends.pair.source(*CHANGES)
    ends.pair.session("source").execute("SELECT pg_sleep(0.2)")  # past the margin of a time bound
    ends.attempt(run, **spec)
    request = ends.request(uuid4(), **spec)
    source, destination = ends.open()
    known = destination.claim_stream(request)
    with source.extract(request.stream, known.cursor, sweep=True) as batches:
        (batch,) = batches
        destination.load(request, batch)
    source.close()
    destination.close()
    assert ends.same()


def test_the_bound_of_the_first_attempt_is_the_next_lower_bound(ends):
    make(ends.pair)
    run = uuid4()
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda *at: at == ("kept", 4), **BY_XMIN)
    stored = ends.pair.rows("destination", "SELECT upper FROM _syncward.generations")
    ends.pair.source(*CHANGES)
    assert stored == [(ends.attempt(run, **BY_XMIN).cursor_to,)]


@pytest.mark.parametrize("change", ["ALTER TABLE t ADD COLUMN w int DEFAULT 1", None])
def test_another_shape_or_definition_begins_anew(ends, change):
    make(ends.pair)
    run = uuid4()
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda *at: at == ("kept", 4), **MERGE)
    ends.asked.clear()
    if change:
        ends.pair.source(change)
    ends.attempt(run, **(MERGE if change else {**MERGE, "deletes": "hard"}))
    assert ends.asked == list(range(RANGES))
    assert ends.same()
    assert ends.left_behind() == (0, 0, 0)


@pytest.mark.parametrize("change", [
    ("ALTER TABLE t DROP COLUMN at", "ALTER TABLE t ADD COLUMN at timestamptz DEFAULT now()"),
    ("ALTER TABLE t RENAME TO t_old", "ALTER TABLE t_new RENAME TO t"),
], ids=["column", "table"])  # fmt: skip
def test_another_column_or_table_of_the_name_begins_anew(ends, change):
    """No cursor shows what it has in the rows of ranges that are there already."""
    make(ends.pair)
    ends.pair.source(
        "ALTER TABLE t ALTER at DROP NOT NULL",
        "CREATE TABLE t_new (LIKE t INCLUDING ALL)",
        "INSERT INTO t_new SELECT id, 'new', at FROM t",
        "ANALYZE t_new",
    )
    with pytest.raises(Crash):
        ends.attempt(crash=lambda place, n: (place, n) == ("kept", 4), **BY_XMIN)
    ends.pair.source(*change)
    ends.attempt(**BY_XMIN)
    assert ends.asked == [*range(5), *range(RANGES)]
    assert ends.same()


def test_a_forgotten_stream_begins_anew_and_leaves_nothing_behind(ends):
    make(ends.pair)
    with pytest.raises(Crash):
        ends.attempt(crash=lambda *at: at == ("kept", 4), **MERGE)
    pg_state.forget(ends.pair.session("destination"), ends.connection_id, "public.t")
    ends.asked.clear()
    ends.attempt(**MERGE)
    assert ends.asked == list(range(RANGES))
    assert ends.left_behind() == (0, 0, 0)


def test_a_read_that_another_one_made_needless_is_dropped(ends):
    make(ends.pair)
    ends.attempt(**BY_TIME)
    with pytest.raises(Crash):
        ends.attempt(crash=lambda *at: at == ("kept", 4), full=True, **BY_TIME)
    assert ends.left_behind() == (1, RANGES, 1)
    ends.attempt(**BY_TIME)
    assert ends.left_behind() == (0, 0, 0)


# ── what readers see ─────────────────────────────────────────────────────────────────────────


def test_a_replaced_table_is_never_a_fragment_and_keeps_views_and_grants(ends):
    make(ends.pair)
    ends.attempt(**REPLACE)
    lake = ends.pair.session("destination")
    lake.execute("CREATE VIEW acme.seen AS SELECT id, v FROM acme.t")
    lake.execute("GRANT SELECT ON acme.t TO reader")
    before = ends.pair.rows("destination", "SELECT 'acme.t'::regclass::oid")
    ends.pair.source("UPDATE t SET v = 'second'")
    seen, over = set(), threading.Event()

    def look() -> None:
        with ends.pair.connect("destination") as session:
            while not over.is_set():
                seen.update(session.execute(
                    "SELECT count(*), count(*) FILTER (WHERE v = 'second') FROM acme.seen"
                ).fetchall())  # fmt: skip

    reader = threading.Thread(target=look)
    reader.start()
    run = uuid4()
    try:
        with pytest.raises(Crash):
            ends.attempt(run, crash=lambda *at: at == ("kept", 6), **REPLACE)
        assert ends.attempt(run, **REPLACE).rows_updated == ROWS
    finally:
        over.set()
        reader.join()
    assert seen <= {(ROWS, 0), (ROWS, ROWS)}
    assert ends.pair.rows("destination", "SELECT 'acme.t'::regclass::oid") == before
    assert ends.pair.rows(
        "destination", "SELECT has_table_privilege('reader', 'acme.t', 'SELECT')"
    ) == [(True,)]
    assert ends.same()


def test_columns_that_come_as_text_are_what_they_were(ends):
    ends.pair.source(
        "CREATE TYPE mood AS ENUM ('ok', 'sad')",
        "CREATE TABLE t (id int PRIMARY KEY, m mood, q tsquery, c regclass, j json)",
        f"INSERT INTO t SELECT n, 'sad', 'a & b', 'pg_class', '{{\"b\":1, \"a\":2}}' "
        f"FROM generate_series(1, {ROWS}) AS n",
        "ANALYZE t",
    )
    ends.pair.session("destination").execute("CREATE TYPE mood AS ENUM ('ok', 'sad')")
    ends.attempt(**REPLACE)
    assert ends.same()
    assert ends.attempt(**REPLACE).rows_unchanged == ROWS
    assert ends.same()
    assert ends.asked == [*range(RANGES), *range(RANGES)]


def test_a_guard_keeps_a_complete_read_for_its_own_run_only(ends):
    make(ends.pair)
    ends.attempt(**REPLACE)
    ends.pair.source("DELETE FROM t WHERE id > 700")
    run = uuid4()
    with pytest.raises(DataGuardTripped) as tripped:
        ends.attempt(run, **REPLACE)
    assert ends.pair.rows("destination", "SELECT count(*) FROM acme.t") == [(ROWS,)]
    ends.asked.clear()
    with pytest.raises(DataGuardTripped):  # the one that was not approved reads for itself
        ends.attempt(**REPLACE)
    assert ends.asked
    found = tuple(preview.finding for preview in tripped.value.previews)
    result = ends.attempt(approvals=found, **REPLACE)
    assert result.rows_deleted == 300
    assert ends.same()


def test_rows_that_went_missing_in_between_are_noticed(ends):
    make(ends.pair)
    run = uuid4()
    with pytest.raises(Crash):
        ends.attempt(run, crash=lambda *at: at == ("kept", 4), **MERGE)
    ((hidden,),) = ends.pair.rows("destination", "SELECT hidden FROM _syncward.generations")
    ends.pair.session("destination").execute(
        psycopg.sql.SQL("DELETE FROM {} WHERE id = 5").format(
            psycopg.sql.Identifier("acme", hidden)
        )
    )
    with pytest.raises(Exception, match="999 are there; nothing was kept"):
        ends.attempt(run, **MERGE)


# ── whole runs ───────────────────────────────────────────────────────────────────────────────


def test_a_full_refresh_does_not_go_on_with_what_another_run_read(world):
    make(world.pair)
    world.apply({"public.t": "{mode: merge, key: [id], cursor: xmin, range_rows: 100}"})
    first = world.enqueue()
    world.step()
    assert "read in 10 ranges of (id)" in world.log(first.run_id)
    ((connection, fence),) = world.control.all("SELECT connection_id, fence FROM schedules")
    ends = Runs(world.pair)
    ends.connection_id, ends.fence = connection, fence
    with pytest.raises(Crash):
        ends.attempt(crash=lambda *at: at == ("kept", 4), full=True, **BY_XMIN)
    assert ends.left_behind() == (1, RANGES, 1)
    world.control.act("UPDATE schedules SET fence = fence + 5")
    asked = world.enqueue(full_refresh=True)
    world.step()
    assert world.streams(asked.run_id)["t"].rows_unchanged == ROWS
    assert "goes on" not in world.log(asked.run_id)
    assert ends.left_behind() == (0, 0, 0)


def test_a_kept_range_is_progress_under_the_lease_only(world):
    make(world.pair)
    world.apply({"public.t": "{mode: replace}"})
    world.enqueue()
    claim = world.claim(world.dispatch()[0])
    world.control.act("UPDATE active_runs SET attempts_without_progress = 4, lost_leases = 2")
    with transaction(world.deps.engine) as tx:
        claims.progressed(tx, claim)
    counted = "SELECT attempts_without_progress, lost_leases FROM active_runs"
    assert world.control.all(counted) == [(0, 0)]
    with pytest.raises(LeaseLost), transaction(world.deps.engine) as tx:
        claims.progressed(tx, replace(claim, token=uuid4()))


@pytest.mark.full  # 12 s; the conformance suite crashes at each step
@pytest.mark.parametrize("at_once", [1, 4])
def test_kill_9_in_the_middle_and_the_next_attempt_reads_what_is_left(world, at_once):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT n, repeat(md5(n::text), 8) FROM generate_series(1, 400000) AS n",
        "ANALYZE t",
    )
    spec = f"mode: replace, range_rows: 10000, ranges_at_once: {at_once}"
    world.apply({"public.t": f"{{{spec}}}"})
    asked = world.enqueue()
    fleet = Fleet(world, 1)
    try:
        there = _some_ranges(world.pair, at_least=3)
        for pid in fleet.worker_pids():
            os.kill(pid, signal.SIGKILL)
        run = fleet.wait(asked.run_id)
    finally:
        fleet.stop()
    assert run.state is RunState.SUCCEEDED, run
    result = world.streams(asked.run_id)["t"]
    assert (result.attempt, result.rows_extracted, result.rows_inserted) == (2, 400_000, 400_000)
    log = world.log(asked.run_id)
    (said,) = [line for line in log.splitlines() if line.startswith("goes on: ")]
    kept = int(said.split()[2])
    assert there <= kept < 40
    assert world.pair.same("t")
    assert world.pair.rows("destination", "SELECT count(*) FROM _syncward.ranges") == [(0,)]


def _some_ranges(pair, at_least: int) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ((table,),) = pair.rows("destination", "SELECT to_regclass('_syncward.ranges')")
        query = "SELECT count(*) FROM _syncward.ranges WHERE done"
        ((there,),) = pair.rows("destination", query) if table else [(0,)]
        if there >= at_least:
            return int(there)
        time.sleep(0.01)
    raise AssertionError("no range was kept within a minute")


_MEASURED = """
import json, resource, sys
from uuid import uuid4
from connectors import registry
from schemas.records import LoadRequest, Ranges
from schemas.streams import StreamSpec
from tests.world import LOOSE
configs, secrets = json.loads(sys.argv[1])
spec = StreamSpec(name="public.t", mode="replace", range_rows=100_000)
source = registry.open_source("postgres", configs["source"], secrets["source"], LOOSE)
lake = registry.open_destination("postgres", configs["destination"], secrets["destination"], LOOSE)
request = LoadRequest(uuid4(), uuid4(), 1, 1, spec, "acme")
known = lake.claim_stream(request)
with source.extract(spec, None, ranges=Ranges(spec.range_rows)) as batches:
    for batch in batches:
        if not batch.part.is_end:
            known.keep(batch)
            continue
        rows = lake.load(request, batch).rows_loaded
print(json.dumps([rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.full
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_table(pair):
    roles = ("source", "destination")
    given = json.dumps(
        [{role: pair.config(role) for role in roles}, {role: pair.secret(role) for role in roles}]
    )
    largest = {}
    for rows in (200_000, 2_000_000):
        pair.source(
            "DROP TABLE IF EXISTS t",
            "CREATE TABLE t (id int PRIMARY KEY, v text)",
            f"INSERT INTO t SELECT n, repeat(md5(n::text), 4) FROM generate_series(1, {rows}) n",
            "ANALYZE t",
        )
        pair.session("destination").execute("DROP TABLE IF EXISTS acme.t")
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, given], check=True, capture_output=True, text=True
        )
        moved, largest[rows] = json.loads(done.stdout)
        assert moved == rows
    assert largest[2_000_000] - largest[200_000] < 10 * 1024, largest
