"""Rows that are gone at the source: found by full read, key sweep or tombstone; deleted or stamped.

Rivals lose deletes, or let an empty source wipe the target (pains 3 and 8 of our list).
"""

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from pydantic import ValidationError

from connectors import registry
from schemas.errors import ConfigError, LeaseLost, ReadAgain, SyncwardError
from schemas.guards import DataGuardTripped, Finding, Guard
from schemas.records import LoadRequest, StreamResult, WireFormat
from schemas.streams import Deletes, Mode, StreamSpec
from tests.world import LOOSE

pytestmark = pytest.mark.integration

MERGE = {"mode": "merge", "key": ("id",)}
BY_XMIN = {**MERGE, "cursor": "xmin"}
BY_TIME = {**MERGE, "cursor": "at"}


def _moved(source, destination, request, cursor, *, sweep: bool = False) -> StreamResult:
    wire = WireFormat.PG_BINARY
    with source.extract(request.stream, cursor, wire, sweep=sweep) as batches:
        (batch,) = batches
        return destination.load(request, batch)


class Mover:
    """Both ends of a pair, and what a worker does with one stream."""

    def __init__(self, pair) -> None:
        self.pair = pair
        self.connection_id = uuid4()
        self.fence = 0
        self.approvals: tuple[Finding, ...] = ()

    def sync(self, name: str = "t", *, full_refresh: bool = False, **spec: Any) -> StreamResult:
        """Move one stream once, as workers/run_sync.py does."""
        stream = StreamSpec(name=f"public.{name}", **spec)
        source = registry.open_source(
            "postgres", self.pair.config("source"), self.pair.secret("source"), LOOSE
        )
        destination = registry.open_destination(
            "postgres", self.pair.config("destination"), self.pair.secret("destination"), LOOSE
        )
        self.fence += 1
        request = LoadRequest(self.connection_id, uuid4(), 1, self.fence, stream, "acme")
        request = replace(
            request,
            rewrite=full_refresh and stream.mode is Mode.APPEND,
            approvals=self.approvals,
        )
        try:
            known = destination.claim_stream(request)
            cursor = None if full_refresh or known.full_due else known.cursor
            sweep = known.loaded_before and (cursor is None or known.sweep_due)
            try:
                result = _moved(source, destination, request, cursor, sweep=sweep)
            except ReadAgain:
                result = _moved(source, destination, request, None, sweep=known.loaded_before)
        finally:
            source.close()
            destination.close()
        assert result.rows_loaded == result.rows_extracted - result.rows_rejected
        return result

    def stopped(self, guard: Guard, **spec: Any) -> Finding:
        """Expect a guard to stop the stream, with nothing changed; return what it found."""
        before = self.target()
        with pytest.raises(DataGuardTripped) as caught:
            self.sync(**spec)
        assert self.target() == before
        (preview,) = caught.value.previews
        assert preview.finding.guard is guard
        return preview.finding

    def target(self, table: str = "t") -> list[tuple[object, ...]]:
        with suppress(psycopg.errors.UndefinedTable):
            return self.pair.rows(
                "destination", sql.SQL("SELECT * FROM acme.{} ORDER BY 1").format(
                    sql.Identifier(table))
            )  # fmt: skip
        return []

    def ids(self, where: str = "true") -> list[int]:
        found = self.pair.rows("destination", f"SELECT id FROM acme.t WHERE {where} ORDER BY id")
        return [row[0] for row in found]


@pytest.fixture
def mover(pair):
    pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text, gone boolean, at timestamptz)",
        "INSERT INTO t SELECT g, 'x', false, now() - interval '1 h' FROM generate_series(1, 10) g",
    )
    return Mover(pair)


def fill(mover: Mover, last: int) -> None:
    mover.pair.source(
        "INSERT INTO t SELECT g, 'x', false, now() - interval '1 h' "
        f"FROM generate_series(11, {last}) g"
    )


# ── what a document may say ──────────────────────────────────────────────────────────────────────


def test_a_replaced_table_mirrors_its_source_and_a_merge_keeps_unless_told():
    assert StreamSpec(name="a.b", mode="replace").deletion is Deletes.HARD
    assert StreamSpec(name="a.b", **MERGE).deletion is Deletes.IGNORE
    assert StreamSpec(name="a.b", mode="append", cursor="xmin").deletion is Deletes.IGNORE


@pytest.mark.parametrize(("spec", "match"), [
    ({"mode": "append", "cursor": "xmin", "deletes": "hard"}, "append only adds"),
    ({**MERGE, "deletes": "hard", "key_sweep": 2}, "remove key_sweep"),
    ({"mode": "replace", "key_sweep": 2}, "remove key_sweep"),
    ({**MERGE, "full_every": 2}, "remove full_every"),
    ({**BY_XMIN, "key_sweep": 2}, "say deletes"),
    ({**BY_XMIN, "tombstone": "gone"}, "say deletes"),
    ({**BY_XMIN, "deletes": "hard", "key_sweep": 0}, "greater than or equal"),
    ({**MERGE, "guards": {"delete_ratio": 2}}, "less than or equal"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused_with_what_to_do(spec, match):
    with pytest.raises(ValidationError, match=match):
        StreamSpec(name="a.b", **spec)


def test_settings_that_are_not_set_are_not_written_so_that_older_workers_read_the_stream():
    new = {"deletes", "key_sweep", "tombstone", "full_every", "guards"}
    assert not new & set(StreamSpec(name="a.b", **MERGE).model_dump(mode="json"))
    whole = StreamSpec(
        name="a.b", **BY_XMIN, deletes="soft", key_sweep=3, full_every=9, tombstone="x",
        guards={"delete_ratio": False, "future_cursor": False},
    )  # fmt: skip
    assert new <= set(whole.model_dump(mode="json"))
    assert StreamSpec.model_validate_json(whole.model_dump_json()) == whole
    assert (whole.guards.delete_ratio, whole.guards.future_cursor) == (1.0, None)
    assert StreamSpec(name="a.b", **MERGE).guards.future_cursor == timedelta(days=1)


# ── found by a full read ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("spec", [
    {"mode": "replace"}, {**MERGE, "deletes": "hard"},
    {**BY_XMIN, "deletes": "hard", "full_every": 1},
    {**BY_TIME, "deletes": "hard", "full_every": 1},
])  # fmt: skip
def test_a_full_read_deletes_what_is_gone_and_counts_it(mover, spec):
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id <= 3", "UPDATE t SET v = 'y' WHERE id = 4")
    assert mover.sync(**spec).rows_deleted == 3
    assert mover.ids() == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("spec", [
    {"mode": "replace", "deletes": "soft"}, {**MERGE, "deletes": "soft"},
    {**BY_XMIN, "deletes": "soft", "full_every": 1},
])  # fmt: skip
def test_soft_stamps_what_is_gone_once_and_clears_it_when_it_comes_back(mover, spec):
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id <= 3")
    assert mover.sync(**spec).rows_deleted == 3
    stamps = "SELECT id, _syncward_deleted_at, v FROM acme.t WHERE _syncward_deleted_at IS NOT NULL"
    first = sorted(mover.pair.rows("destination", stamps))
    assert [(i, v) for i, _, v in first] == [(1, "x"), (2, "x"), (3, "x")]
    again = mover.sync(**spec)
    assert (again.rows_deleted, again.rows_updated) == (0, 0)
    assert sorted(mover.pair.rows("destination", stamps)) == first, "the first time stands"

    mover.pair.source("INSERT INTO t VALUES (2, 'x', false, now())")
    mover.sync(**spec)
    assert mover.ids("_syncward_deleted_at IS NOT NULL") == [1, 3]
    assert len(mover.ids()) == 10


@pytest.mark.parametrize("spec", [{"mode": "replace", "deletes": "ignore"}, MERGE, BY_XMIN])
def test_ignore_keeps_what_is_gone(mover, spec):
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id <= 3")
    assert mover.sync(**spec).rows_deleted == 0
    assert mover.sync(full_refresh=True, **spec).rows_deleted == 0
    assert len(mover.ids()) == 10


def test_a_full_read_by_time_keeps_rows_that_changed_after_its_bound(mover):
    """They are not in the window of this run: only the keys of all rows say that they exist."""
    spec: dict[str, Any] = {**BY_TIME, "deletes": "hard", "full_every": 1}
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id = 1", "UPDATE t SET at = now() + interval '1 h'")
    assert mover.sync(**spec).rows_deleted == 1
    assert mover.ids() == list(range(2, 11))


def test_full_every_counts_runs_in_the_destination_and_reads_everything_then(mover):
    spec: dict[str, Any] = {**BY_XMIN, "full_every": 3}
    read = [mover.sync(**spec).rows_extracted for _ in range(7)]
    assert read == [10, 0, 0, 10, 0, 0, 10]


def test_a_full_refresh_of_append_is_a_rewrite_as_before(mover):
    spec: dict[str, Any] = {"mode": "append", "cursor": "xmin"}
    mover.sync(**spec)
    mover.pair.source("UPDATE t SET v = 'y' WHERE id = 1")
    assert mover.sync(**spec).rows_inserted == 1
    assert mover.sync(full_refresh=True, **spec).rows_deleted == 1
    assert mover.pair.same("t")


def test_a_replaced_table_without_a_key_says_that_soft_needs_one(mover):
    mover.pair.source("ALTER TABLE t DROP CONSTRAINT t_pkey")
    mover.sync(mode="replace")
    with pytest.raises(ConfigError, match="needs a key"):
        mover.sync(mode="replace", deletes="soft")


# ── found by the keys of all rows ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cursor", ["xmin", "at"])
def test_every_third_run_compares_all_keys(mover, cursor):
    spec: dict[str, Any] = {**MERGE, "cursor": cursor, "deletes": "hard", "key_sweep": 3}
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id <= 3")
    results = [mover.sync(**spec) for _ in range(3)]
    assert [r.rows_deleted for r in results] == [0, 0, 3]
    assert [r.rows_extracted for r in results] == [0, 0, 0], "only keys were read"
    mover.pair.source("DELETE FROM t WHERE id = 4")
    assert [mover.sync(**spec).rows_deleted for _ in range(3)] == [0, 0, 1]
    assert mover.ids() == [5, 6, 7, 8, 9, 10]


def test_a_sweep_takes_a_stamp_back_where_the_row_is_there_again_with_an_old_cursor(mover):
    spec: dict[str, Any] = {**BY_TIME, "deletes": "soft", "key_sweep": 1}
    mover.sync(**spec)
    mover.pair.source(
        "CREATE TABLE aside AS SELECT * FROM t WHERE id = 1", "DELETE FROM t WHERE id = 1"
    )
    assert mover.sync(**spec).rows_deleted == 1
    mover.pair.source("INSERT INTO t SELECT * FROM aside")
    assert mover.sync(**spec).rows_extracted == 0
    assert mover.ids("_syncward_deleted_at IS NOT NULL") == []


def test_the_counter_of_sweeps_moves_with_the_rows_or_not_at_all(mover):
    """A run that is stopped, or fenced off, has not swept: the next one does."""
    spec: dict[str, Any] = {**BY_XMIN, "deletes": "hard", "key_sweep": 2}
    fill(mover, 200)
    mover.sync(**spec)
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id > 100")
    finding = mover.stopped(Guard.DELETE_RATIO, **spec)
    assert mover.stopped(Guard.DELETE_RATIO, **spec) == finding, "still due"
    mover.approvals = (finding,)
    assert mover.sync(**spec).rows_deleted == 100
    assert mover.sync(**spec).rows_deleted == 0
    (row,) = mover.pair.rows("destination", "SELECT runs_since_sweep FROM _syncward.state")
    assert row == (1,)


def test_a_state_table_of_an_earlier_version_gets_its_counters(mover):
    spec: dict[str, Any] = {**BY_XMIN, "deletes": "soft", "key_sweep": 2}
    mover.sync(**BY_XMIN)
    lake = mover.pair.session("destination")
    lake.execute(
        "ALTER TABLE _syncward.state DROP COLUMN runs_since_full, DROP COLUMN runs_since_sweep, "
        "DROP COLUMN columns, DROP COLUMN target"
    )
    mover.pair.source("DELETE FROM t WHERE id = 1")
    assert [mover.sync(**spec).rows_deleted for _ in range(2)] == [0, 1]
    assert mover.ids("_syncward_deleted_at IS NOT NULL") == [1], "the table got the column, too"


def test_keys_that_travel_as_text_and_composite_keys_are_compared(pair):
    pair.source(
        "CREATE TABLE t (id int, kind regclass, n numeric(6,2), PRIMARY KEY (id, kind, n))",
        "INSERT INTO t VALUES (1, 'pg_class', 1.50), (1, 'pg_proc', 1.50), (2, 'pg_class', 2)",
    )
    mover = Mover(pair)
    by_three: dict[str, Any] = {"key": ("id", "kind", "n"), "deletes": "hard", "key_sweep": 1}
    spec = {"mode": "merge", "cursor": "xmin", **by_three}
    mover.sync(**spec)
    pair.source("DELETE FROM t WHERE kind = 'pg_proc'::regclass")
    assert mover.sync(**spec).rows_deleted == 1
    assert pair.same("t")


# ── found by a tombstone ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "says"), [
    ("boolean", "true"), ("timestamptz", "now()"), ("timestamp", "now()"), ("date", "now()"),
])  # fmt: skip
@pytest.mark.parametrize("cursor", ["xmin", None])
def test_a_tombstone_deletes_or_stamps(mover, kind, says, cursor):
    mover.pair.source("ALTER TABLE t DROP COLUMN gone", f"ALTER TABLE t ADD COLUMN gone {kind}")
    for deletes in ("hard", "soft"):
        mover.pair.session("destination").execute("DROP SCHEMA IF EXISTS acme CASCADE")
        mover.connection_id = uuid4()
        mover.pair.source(f"UPDATE t SET gone = CASE WHEN id = 1 THEN {says} END")
        spec = {**MERGE, "cursor": cursor, "deletes": deletes, "tombstone": "gone"}
        mover.sync(**spec)
        alive = list(range(2, 11))
        served = "true" if deletes == "hard" else "_syncward_deleted_at IS NULL"
        assert mover.ids(served) == alive, "one that was gone before the first load"
        mover.pair.source(f"UPDATE t SET gone = {says} WHERE id IN (2, 3)")
        result = mover.sync(**spec)
        assert result.rows_deleted == 2
        assert mover.ids(served) == alive[2:]
        mover.pair.source("UPDATE t SET gone = NULL WHERE id = 2")
        mover.sync(**spec)
        assert mover.ids(served) == [2, *alive[2:]], "it came back"


def test_a_replaced_table_leaves_tombstones_out(mover):
    mover.pair.source("UPDATE t SET gone = true WHERE id < 3")
    assert mover.sync(mode="replace", tombstone="gone").rows_unchanged == 2
    mover.pair.source("UPDATE t SET gone = true WHERE id = 3")
    assert mover.sync(mode="replace", tombstone="gone").rows_deleted == 1
    assert mover.ids() == list(range(4, 11))


def test_a_tombstone_named_later_is_applied_to_rows_that_are_there(mover):
    mover.pair.source("UPDATE t SET gone = true WHERE id = 1")
    mover.sync(**BY_XMIN)
    mover.sync(**BY_XMIN, deletes="hard", tombstone="gone")
    assert mover.ids() == list(range(2, 11))


@pytest.mark.parametrize(("column", "match"), [("nope", "no tombstone column"), ("v", "v is text")])
def test_a_tombstone_that_is_none_is_refused(mover, column, match):
    mover.sync(**BY_XMIN)
    with pytest.raises(ConfigError, match=match):
        mover.sync(**BY_XMIN, deletes="soft", tombstone=column)


# ── guards ───────────────────────────────────────────────────────────────────────────────────────

SWEEPING = {**BY_XMIN, "deletes": "hard", "key_sweep": 1}
DELETING = [
    {"mode": "replace"}, {**MERGE, "deletes": "hard"}, {**MERGE, "deletes": "soft"}, SWEEPING,
    {**SWEEPING, "deletes": "soft"}, {**BY_TIME, "deletes": "hard", "key_sweep": 1},
    {**BY_XMIN, "deletes": "hard", "tombstone": "gone"},
]  # fmt: skip


def lose(mover: Mover, spec: dict[str, Any], condition: str) -> None:
    tombstone = spec.get("tombstone")
    mover.pair.source(
        f"UPDATE t SET {tombstone} = true WHERE {condition}"
        if tombstone
        else f"DELETE FROM t WHERE {condition}"
    )


@pytest.mark.parametrize("spec", DELETING)
def test_more_than_a_fifth_deleted_waits_for_a_person_who_approves_so_much_and_no_more(mover, spec):
    fill(mover, 200)
    mover.sync(**spec)
    lose(mover, spec, "id <= 40")
    assert mover.sync(**spec).rows_deleted == 40, "a fifth is allowed"
    lose(mover, spec, "id <= 100")
    finding = mover.stopped(Guard.DELETE_RATIO, **spec)
    assert (finding.before, finding.to_delete) == (160, 60)
    mover.approvals = (finding,)
    lose(mover, spec, "id <= 101")
    assert mover.stopped(Guard.DELETE_RATIO, **spec).to_delete == 61, "worse than approved"
    mover.pair.source(
        "UPDATE t SET gone = false WHERE id = 100"
        if "tombstone" in spec
        else "INSERT INTO t VALUES (100, 'x', false, now())"
    )
    assert mover.sync(**spec).rows_deleted == 60
    served = "_syncward_deleted_at IS NULL" if spec.get("deletes") == "soft" else "true"
    assert len(mover.ids(served)) == 100


@pytest.mark.parametrize("spec", [
    {"mode": "replace"}, MERGE, SWEEPING, {**MERGE, "deletes": "soft"},
    {"mode": "append", "cursor": "xmin", "full_every": 1},
])  # fmt: skip
def test_an_empty_source_does_not_wipe_the_target(mover, spec):
    fill(mover, 100)
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t")
    finding = mover.stopped(Guard.ZERO_ROWS, **spec)
    assert (finding.before, finding.after) == (100, 0)
    mover.approvals = (finding,)
    kept = spec is MERGE or spec.get("deletes") == "soft"
    assert mover.sync(**spec).rows_deleted == (0 if spec is MERGE else 100)
    assert len(mover.ids()) == (100 if kept else 0)


def test_an_approval_of_most_deletes_does_not_cover_all_of_them(mover):
    fill(mover, 200)
    mover.sync(mode="replace")
    mover.pair.source("DELETE FROM t WHERE id <= 180")
    mover.approvals = (mover.stopped(Guard.DELETE_RATIO, mode="replace"),)
    mover.pair.source("DELETE FROM t")
    mover.stopped(Guard.ZERO_ROWS, mode="replace")
    off = {"zero_rows": False}
    assert mover.stopped(Guard.DELETE_RATIO, mode="replace", guards=off).to_delete == 200


def test_few_rows_do_not_trip_and_the_floor_is_a_setting(mover):
    mover.sync(mode="replace")
    mover.pair.source("DELETE FROM t WHERE id <= 9")
    mover.stopped(Guard.DELETE_RATIO, mode="replace", guards={"floor": 10})
    assert mover.sync(mode="replace").rows_deleted == 9
    mover.pair.source("DELETE FROM t")
    mover.stopped(Guard.ZERO_ROWS, mode="replace", guards={"floor": 0})
    assert mover.sync(mode="replace").rows_deleted == 1


def test_guards_that_are_off_let_everything_pass(mover):
    fill(mover, 200)
    mover.sync(mode="replace")
    mover.pair.source("DELETE FROM t")
    off = {"zero_rows": False, "delete_ratio": False}
    assert mover.sync(mode="replace", guards=off).rows_deleted == 200


def test_a_keyless_table_whose_rows_all_changed_has_lost_none(mover):
    fill(mover, 200)
    mover.pair.source("ALTER TABLE t DROP CONSTRAINT t_pkey")
    mover.sync(mode="replace")
    mover.pair.source("UPDATE t SET v = 'y'")
    assert mover.sync(mode="replace").rows_deleted == 200
    mover.pair.source("DELETE FROM t WHERE id > 100")
    assert mover.stopped(Guard.DELETE_RATIO, mode="replace").to_delete == 100


def test_the_preview_names_a_few_keys(mover):
    fill(mover, 200)
    mover.sync(**SWEEPING)
    mover.pair.source("DELETE FROM t WHERE id > 100")
    with pytest.raises(DataGuardTripped) as caught:
        mover.sync(**SWEEPING)
    (preview,) = caught.value.previews
    assert len(preview.keys) == 5
    assert all(100 < int(key.strip("()")) <= 200 for key in preview.keys)
    assert not any(key in caught.value.public for key in preview.keys), "keys are data"
    assert "100 of 200 rows would be deleted (50 %, allowed are 20 %)" in caught.value.public


@pytest.mark.parametrize("later", [False, True])
def test_keys_that_repeat_wait_for_a_person_and_then_the_newest_row_is_kept(pair, later):
    mover = Mover(pair)
    pair.source("CREATE TABLE t (id int, v text, at timestamptz)")
    spec: dict[str, Any] = {**BY_TIME, "overlap": "1h"}
    if later:
        pair.source("INSERT INTO t VALUES (9, 'i', now() - interval '2 h')")
        mover.sync(**spec)
    pair.source(
        "INSERT INTO t VALUES (1, 'new', now() - interval '1 m'), "
        "(1, 'old', now() - interval '9 m'), (2, 'only', now() - interval '1 m')"
    )
    finding = mover.stopped(Guard.DUPLICATE_KEYS, **spec)
    assert finding.amount == 1
    mover.approvals = (finding,)
    result = mover.sync(**spec)
    assert (result.rows_rejected, result.rows_inserted) == (1, 2)
    kept = pair.rows("destination", "SELECT id, v FROM acme.t WHERE id < 9 ORDER BY id")
    assert kept == [(1, "new"), (2, "only")]
    mover.approvals = ()
    pair.source("INSERT INTO t VALUES (3, 'a', now() - interval '1 m'), (3, 'b', NULL)")
    assert mover.sync(**spec, guards={"duplicate_keys": False}).rows_rejected >= 1


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("kind", ["timestamptz", "timestamp", "date"])
def test_a_cursor_in_the_future_waits_for_a_person(mover, indexed, kind):
    mover.pair.source(f"ALTER TABLE t ALTER COLUMN at TYPE {kind}")
    if indexed:
        mover.pair.source("CREATE INDEX ON t (at)")
    mover.sync(**BY_TIME)
    mover.pair.source("UPDATE t SET at = now() + interval '5 days' WHERE id = 1")
    result, far = far_cursor(mover, full=not indexed)
    assert result is not None
    assert far is not None
    assert far.text.startswith(result)
    assert far_cursor(mover, full=not indexed, guards={"future_cursor": "30d"})[1] is None
    assert far_cursor(mover, full=not indexed, guards={"future_cursor": False})[1] is None
    if not indexed:
        assert far_cursor(mover, full=False)[1] is None, "no scan of the table for it"
    mover.pair.source("UPDATE t SET at = 'infinity' WHERE id = 1")
    assert far_cursor(mover, full=True)[1] is None, "no point in time"


def far_cursor(mover: Mover, *, full: bool, **spec: Any):
    """Return (the largest cursor's day, what the source says of it)."""
    stream = StreamSpec(name="public.t", **BY_TIME, **spec)
    source = registry.open_source(
        "postgres", mover.pair.config("source"), mover.pair.secret("source"), LOOSE
    )
    (row,) = mover.pair.rows("destination", "SELECT cursor FROM _syncward.state")
    try:
        with source.extract(stream, None if full else row[0], WireFormat.PG_BINARY) as batches:
            (batch,) = batches
            return str(mover.pair.rows("source", "SELECT max(at)::text FROM t")[0][0])[
                :10
            ], batch.beyond
    finally:
        source.close()


@pytest.mark.parametrize("spec", [
    {"mode": "replace"}, BY_XMIN, {"mode": "append", "cursor": "xmin"},
])  # fmt: skip
def test_a_narrowed_type_waits_and_is_then_loaded_into_the_wider_column(pair, spec):
    mover = Mover(pair)
    pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, n bigint, v text, d numeric)",
        "INSERT INTO t VALUES (1, 5, 'five', 1.50)",
    )
    mover.sync(**spec)
    pair.source(
        "ALTER TABLE t ALTER COLUMN n TYPE int, ALTER COLUMN v TYPE varchar(5), "
        "ALTER COLUMN d TYPE numeric(6,2)",
        "INSERT INTO t VALUES (2, 6, 'six', 2.25)",
    )
    finding = mover.stopped(Guard.NARROWED_TYPE, **spec)
    assert "n bigint -> integer" in finding.what
    mover.approvals = (finding,)
    mover.sync(**spec)
    rows = set(pair.rows("destination", "SELECT id, n, v, d::text FROM acme.t"))
    assert rows == {(1, 5, "five", "1.50"), (2, 6, "six", "2.25")}
    mover.approvals = ()
    mover.sync(**spec)  # what was approved once is known from then on
    pair.source("ALTER TABLE t ALTER COLUMN n TYPE smallint")
    mover.approvals = (finding,)
    mover.stopped(Guard.NARROWED_TYPE, **spec)


# ── and all of it together ───────────────────────────────────────────────────────────────────────


def test_a_run_that_was_fenced_off_deletes_nothing(mover):
    spec: dict[str, Any] = {**MERGE, "deletes": "hard"}
    mover.sync(**spec)
    mover.pair.source("DELETE FROM t WHERE id = 1")
    lake = mover.pair.session("destination")
    before = mover.target()
    lake.execute(
        "CREATE FUNCTION zombie() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN UPDATE _syncward.state SET fence = fence + 1; RETURN NULL; END $$"
    )
    lake.execute("CREATE TRIGGER z AFTER DELETE ON acme.t EXECUTE FUNCTION zombie()")
    with pytest.raises(LeaseLost):
        mover.sync(**spec)
    assert mover.target() == before


@pytest.mark.parametrize("spec", [{"mode": "replace"}, {**MERGE, "deletes": "hard"}])
def test_a_trigger_that_swallows_a_delete_is_found_out(mover, spec):
    mover.sync(**spec)
    lake = mover.pair.session("destination")
    lake.execute("CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
                 "$$ BEGIN RETURN NULL; END $$")  # fmt: skip
    lake.execute("CREATE TRIGGER k BEFORE DELETE ON acme.t FOR EACH ROW EXECUTE FUNCTION keep()")
    mover.pair.source("DELETE FROM t WHERE id = 1")
    with pytest.raises(SyncwardError, match="interferes"):
        mover.sync(**spec)


_STEP = st.tuples(
    st.sampled_from(["insert", "update", "delete", "back", "bury", "sync", "sync"]),
    st.integers(1, 8),
)


@pytest.mark.parametrize("spec", [
    {**MERGE, "deletes": "hard"}, {**MERGE, "deletes": "soft", "tombstone": "gone"},
    {**BY_XMIN, "deletes": "hard", "key_sweep": 1, "tombstone": "gone"},
    {**BY_XMIN, "deletes": "soft", "key_sweep": 1},
    {**BY_XMIN, "deletes": "soft", "key_sweep": 2, "full_every": 3, "tombstone": "gone"},
])  # fmt: skip
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(_STEP, min_size=3, max_size=12))
def test_whatever_happens_the_served_rows_are_those_of_the_source(mover, spec, steps):
    pair = mover.pair
    pair.source("TRUNCATE t")
    pair.session("destination").execute("DROP SCHEMA IF EXISTS acme CASCADE")
    mover.connection_id = uuid4()
    for step, number in steps:
        match step:
            case "insert" | "back":
                pair.source(
                    f"INSERT INTO t VALUES ({number}, '{step}', false, now()) "
                    "ON CONFLICT DO NOTHING"
                )
            case "update":
                pair.source(f"UPDATE t SET v = v || 'u', gone = false WHERE id = {number}")
            case "delete":
                pair.source(f"DELETE FROM t WHERE id = {number}")
            case "bury":
                pair.source(f"UPDATE t SET gone = true WHERE id = {number}")
            case _:
                mover.sync(**spec)
    for _ in range(spec.get("key_sweep", 1) + 1):
        mover.sync(**spec)
    alive = "WHERE gone IS NOT TRUE" if "tombstone" in spec else ""
    served = "WHERE _syncward_deleted_at IS NULL" if spec["deletes"] == "soft" else ""
    columns = "SELECT ROW(id, v, gone, at)::text FROM {} {} ORDER BY id"
    assert pair.rows("source", columns.format("public.t", alive)) == pair.rows(
        "destination", columns.format("acme.t", served)
    )
