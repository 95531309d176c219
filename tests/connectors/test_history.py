"""Mode history: each version of a row that a run saw stays, and says from when to when."""

from contextlib import closing
from dataclasses import replace
from itertools import count
from typing import Any
from uuid import uuid4

import pytest
from psycopg.errors import CheckViolation, UniqueViolation
from pydantic import ValidationError

from connectors import registry
from connectors.postgres import history
from schemas.errors import ConfigError, ReadAgain, SyncwardError
from schemas.guards import DataGuardTripped, Finding, Guard
from schemas.records import (
    Cursor,
    Destination,
    LoadRequest,
    Ranges,
    Source,
    StreamClaim,
    StreamResult,
    WireFormat,
)
from schemas.runs import RunState
from schemas.streams import Deletes, StreamSpec
from tests.world import LOOSE, Pair

pytestmark = pytest.mark.integration

BY_XMIN = {"cursor": "xmin"}
_NUMBERS = count(1)
NOW = "_syncward_valid_to IS NULL"


class Kept:
    """One table at the source and its history at the destination."""

    def __init__(self, pair: Pair, name: str = "t") -> None:
        self.pair, self.name = pair, name
        self.connection_id = uuid4()
        self.fence = 0
        self.approvals: tuple[Finding, ...] = ()
        self.wire = WireFormat.PG_BINARY

    def make(self, columns: str = "id int PRIMARY KEY, v text", rows: int = 3) -> "Kept":
        self.pair.source(f"CREATE TABLE {self.name} ({columns})")
        if rows:
            self.write(f"INSERT INTO {{t}} (id, v) SELECT g, 'a' FROM generate_series(1, {rows}) g")
        return self

    def write(self, *statements: str) -> None:
        self.pair.source(*(s.replace("{t}", self.name) for s in statements))

    def there(self, *statements: str) -> None:
        for statement in statements:
            self.pair.session("destination").execute(statement.replace("{t}", f"acme.{self.name}"))

    def sync(self, **spec: Any) -> StreamResult:
        """Move the stream once, as workers/run_sync.py does."""
        said = {"mode": "history", "key": ("id",), **spec}
        stream = StreamSpec(name=f"public.{self.name}", **said)
        self.fence += 1
        request = LoadRequest(self.connection_id, uuid4(), 1, self.fence, stream, "acme")
        return self.moved(replace(request, approvals=self.approvals))

    def moved(self, request: LoadRequest) -> StreamResult:
        config, secret = self.pair.config, self.pair.secret
        with (
            closing(
                registry.open_source("postgres", config("source"), secret("source"), LOOSE)
            ) as source,
            closing(
                registry.open_destination(
                    "postgres", config("destination"), secret("destination"), LOOSE
                )
            ) as destination,
        ):
            known = destination.claim_stream(request)
            if known.result is not None:
                return known.result
            cursor = None if known.full_due else known.cursor
            try:
                result = self._read(source, destination, request, known, cursor)
            except ReadAgain:
                result = self._read(source, destination, request, known, None)
        assert result.rows_loaded == result.rows_extracted - result.rows_rejected
        return result

    def _read(
        self,
        source: Source,
        destination: Destination,
        request: LoadRequest,
        known: StreamClaim,
        cursor: Cursor | None,
    ) -> StreamResult:
        sweep = known.loaded_before and (cursor is None or known.sweep_due)
        ranges = Ranges(request.stream.range_rows, known.kept)
        with source.extract(
            request.stream, cursor, self.wire, sweep=sweep, ranges=ranges
        ) as batches:
            for batch in batches:
                if batch.part is None or batch.part.is_end:
                    return destination.load(request, batch)
                assert known.keep is not None
                known.keep(batch)
        raise AssertionError("a read without an end")

    def rows(self, what: str, where: str = "true") -> list[tuple[Any, ...]]:
        return self.pair.rows(
            "destination",
            f"SELECT {what} FROM acme.{self.name} WHERE {where} ORDER BY id, _syncward_valid_from",
        )

    def versions(self, what: str = "id, v") -> list[tuple[Any, ...]]:
        """Each version, and whether it is the current one of its key."""
        return self.rows(f"{what}, {NOW}")

    def same(self, columns: str = "id, v") -> bool:
        """Say whether the current versions are the source's rows."""
        here = self.pair.rows("source", f"SELECT {columns} FROM {self.name} ORDER BY id")
        return here == self.rows(columns, NOW)

    def sound(self) -> bool:
        """Say whether no two versions of a key overlap, or one ends before it begins."""
        (found,) = self.pair.rows(
            "destination",
            "SELECT count(*) FROM (SELECT _syncward_valid_from AS f, _syncward_valid_to AS t, "
            "lead(_syncward_valid_from) OVER (PARTITION BY id ORDER BY _syncward_valid_from) AS n "
            f"FROM acme.{self.name}) AS v WHERE f >= t OR n < t OR (n IS NOT NULL AND t IS NULL)",
        )
        return found == (0,)


@pytest.fixture
def kept(shared_pair):
    return Kept(shared_pair, f"t{next(_NUMBERS)}")


def counts(result: StreamResult) -> tuple[int, int, int, int]:
    return (
        result.rows_inserted, result.rows_updated, result.rows_unchanged, result.rows_deleted
    )  # fmt: skip


def test_a_changed_row_ends_one_version_and_begins_another(kept):
    kept.make()
    assert counts(kept.sync()) == (3, 0, 0, 0)
    ((began,),) = set(kept.rows("_syncward_valid_from"))
    kept.write("UPDATE {t} SET v = 'b' WHERE id = 2", "INSERT INTO {t} VALUES (4, 'a')")
    assert counts(kept.sync()) == (1, 1, 2, 0)
    assert kept.versions() == [
        (1, "a", True), (2, "a", False), (2, "b", True), (3, "a", True), (4, "a", True)
    ]  # fmt: skip
    assert kept.same()
    assert kept.sound()
    ((first, ended), (second, still)) = kept.rows(
        "_syncward_valid_from, _syncward_valid_to", "id = 2"
    )
    ((newest,),) = kept.rows("_syncward_valid_from", "id = 4")
    assert first == began < ended == second == newest
    assert still is None
    assert counts(kept.sync()) == (0, 0, 4, 0)


def test_what_a_document_may_say():
    spec: dict[str, Any] = {"name": "a.b", "mode": "history", "key": ("id",)}
    assert StreamSpec(**spec).deletion is Deletes.IGNORE
    whole = StreamSpec(**spec, cursor="xmin", deletes="soft", key_sweep=3, tombstone="gone")
    assert whole.deletion is Deletes.SOFT
    for wrong, match in (
        ({"key": ()}, "history needs a key"),
        ({"deletes": "hard"}, "history never removes a row"),
        ({"cursor": "xmin", "tombstone": "gone"}, r"say deletes: soft \["),
        ({"key_sweep": 2, "deletes": "soft"}, "remove key_sweep"),
    ):
        with pytest.raises(ValidationError, match=match):
            StreamSpec(**{**spec, **wrong})


# ── rows that are gone, and come back ────────────────────────────────────────────────────────────


def test_a_row_that_is_gone_ends_its_version_and_one_that_comes_back_begins_another(kept):
    kept.make()
    soft = {"deletes": "soft"}
    kept.sync(**soft)
    kept.write("DELETE FROM {t} WHERE id = 2")
    assert counts(kept.sync(**soft)) == (0, 0, 2, 1)
    assert kept.versions() == [(1, "a", True), (2, "a", False), (3, "a", True)]
    kept.sync(**soft)
    kept.write("INSERT INTO {t} VALUES (2, 'a')")
    assert counts(kept.sync(**soft)) == (1, 0, 2, 0)
    assert kept.versions("id") == [(1, True), (2, False), (2, True), (3, True)]
    assert kept.sound()
    ((_, ended), (began, _)) = kept.rows("_syncward_valid_from, _syncward_valid_to", "id = 2")
    assert ended < began, "there was a time without the row"


def test_unless_told_a_row_that_is_gone_stays_current(kept):
    kept.make()
    kept.sync()
    kept.write("DELETE FROM {t} WHERE id = 2")
    assert counts(kept.sync()) == (0, 0, 2, 0)
    assert [row[1] for row in kept.versions("id")] == [True] * 3


@pytest.mark.parametrize("wire", list(WireFormat))
def test_key_sweeps_and_tombstones_end_versions(kept, wire):
    kept.wire = wire
    kept.make("id int PRIMARY KEY, v text, gone boolean", rows=5)
    kept.write("INSERT INTO {t} VALUES (6, 'dead from the beginning', true)")
    spec = {**BY_XMIN, "deletes": "soft", "key_sweep": 2, "tombstone": "gone"}
    assert counts(kept.sync(**spec)) == (5, 0, 1, 0)
    kept.write(
        "DELETE FROM {t} WHERE id = 1",
        "UPDATE {t} SET gone = true, v = 'last' WHERE id = 2",
        "UPDATE {t} SET v = 'b' WHERE id = 3",
    )
    assert counts(kept.sync(**spec)) == (0, 1, 1, 1), "no sweep in this run"
    assert counts(kept.sync(**spec)) == (0, 0, 0, 1)
    kept.write("UPDATE {t} SET gone = false, v = 'back' WHERE id = 2")
    assert counts(kept.sync(**spec)) == (1, 0, 0, 0)
    assert kept.versions() == [
        (1, "a", False), (2, "a", False), (2, "back", True), (3, "a", False), (3, "b", True),
        (4, "a", True), (5, "a", True),
    ]  # fmt: skip
    assert kept.sound()


# ── time ─────────────────────────────────────────────────────────────────────────────────────────


def test_versions_follow_each_other_although_the_clock_was_set_back(kept):
    kept.make(rows=1)
    kept.sync()
    ahead = "+ interval '1 hour'"  # as if the clock had been an hour ahead when it was loaded
    mine = f"WHERE stream = 'public.{kept.name}'"
    kept.there(
        f"UPDATE {{t}} SET _syncward_valid_from = _syncward_valid_from {ahead}",
        f"UPDATE _syncward.state SET updated_at = updated_at {ahead} {mine}",
    )
    for value in ("b", "c"):
        kept.write(f"UPDATE {{t}} SET v = '{value}'")
        assert counts(kept.sync()) == (0, 1, 0, 0)
    assert kept.versions() == [(1, "a", False), (1, "b", False), (1, "c", True)]
    # What was remembered of the stream is gone, and its clock is still behind.
    kept.there(f"DELETE FROM _syncward.state {mine}")
    kept.write("UPDATE {t} SET v = 'd'")
    kept.sync()
    assert kept.versions()[-1] == (1, "d", True)
    assert kept.sound()
    assert kept.rows("id", "_syncward_valid_from < now() + interval '50 min'") == []


def test_the_table_itself_refuses_a_second_current_version_and_an_end_before_the_beginning(kept):
    kept.make(rows=1)
    kept.sync()
    for statement, error in (
        ("INSERT INTO {t} (id, _syncward_valid_from) VALUES (1, '2100-01-01')", UniqueViolation),
        ("UPDATE {t} SET _syncward_valid_to = _syncward_valid_from", CheckViolation),
    ):
        with pytest.raises(error):
            kept.there(statement)


def test_the_attempt_that_follows_a_killed_one_makes_no_second_version(kept):
    kept.make()
    kept.sync()
    kept.write("UPDATE {t} SET v = 'b'")
    kept.fence += 1
    request = LoadRequest(
        kept.connection_id, uuid4(), 1, kept.fence,
        StreamSpec(name=f"public.{kept.name}", mode="history", key=("id",)), "acme",
    )  # fmt: skip
    first = kept.moved(request)
    assert kept.moved(replace(request, attempt=2, fence=kept.fence + 1)) == first
    kept.fence += 1
    assert counts(kept.sync()) == (0, 0, 3, 0)
    assert len(kept.versions()) == 6


def test_as_of_gives_what_each_run_saw(kept):
    kept.make()
    seen = []
    for change in ("UPDATE {t} SET v = 'b' WHERE id < 3", "DELETE FROM {t} WHERE id = 1",
                   "INSERT INTO {t} VALUES (1, 'again'), (9, 'new')"):  # fmt: skip
        kept.sync(deletes="soft")
        ((now,),) = kept.pair.rows("destination", "SELECT clock_timestamp()")
        seen.append((now, kept.pair.rows("source", f"SELECT id, v FROM {kept.name} ORDER BY id")))
        kept.write(change)
    kept.sync(deletes="soft")
    for at, rows in seen:
        as_of = (
            f"_syncward_valid_from <= '{at}' "
            f"AND (_syncward_valid_to IS NULL OR '{at}' < _syncward_valid_to)"
        )
        assert kept.rows("id, v", as_of) == rows
    assert kept.same()


# ── large tables, guards ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("empty", [False, True])
def test_a_large_read_in_ranges_makes_one_version_of_each_row_at_one_time(kept, empty):
    kept.make(rows=0)
    if empty:
        kept.sync(range_rows=100)
    kept.write("INSERT INTO {t} SELECT g, 'a' FROM generate_series(1, 1000) g", "ANALYZE {t}")
    assert counts(kept.sync(range_rows=100, deletes="soft")) == (1000, 0, 0, 0)
    assert len(set(kept.rows("_syncward_valid_from"))) == 1
    kept.write("UPDATE {t} SET v = 'b' WHERE id % 10 = 0", "DELETE FROM {t} WHERE id < 10")
    assert counts(kept.sync(range_rows=100, deletes="soft")) == (0, 100, 891, 9)
    assert kept.same()
    assert kept.sound()
    assert len(kept.versions("id")) == 1100
    left = kept.pair.rows(
        "destination", "SELECT FROM pg_class WHERE relname LIKE '\\_syncward\\_%'"
    )
    assert left == []


def test_guards_look_at_current_versions_only(kept):
    kept.make(rows=10)
    spec = {"deletes": "soft", "guards": {"floor": 5}}
    kept.sync(**spec)
    kept.write("UPDATE {t} SET v = 'b'")
    kept.sync(**spec)
    before, found = kept.versions(), list[Finding]()
    for change, guard in (
        ("DELETE FROM {t} WHERE id > 7", Guard.DELETE_RATIO), ("DELETE FROM {t}", Guard.ZERO_ROWS)
    ):  # fmt: skip
        kept.write(change)
        with pytest.raises(DataGuardTripped) as caught:
            kept.sync(**spec)
        (preview,) = caught.value.previews
        assert (preview.finding.guard, preview.finding.before) == (guard, 10)
        assert "rows would end" in str(caught.value)
        found = [preview.finding]
        assert kept.versions() == before
    kept.approvals = tuple(found)
    assert counts(kept.sync(**spec)) == (0, 0, 0, 10)
    assert [row[1] for row in kept.versions("id")] == [False] * 20


def test_keys_that_repeat_wait_for_a_person(kept):
    kept.make("id int, v text", rows=0)
    kept.write("INSERT INTO {t} VALUES (1, 'a'), (1, 'b'), (2, 'c')")
    for versions in (2, 3):  # into a new table, and into a history
        with pytest.raises(DataGuardTripped) as caught:
            kept.sync()
        kept.approvals = tuple(p.finding for p in caught.value.previews)
        result = kept.sync()
        assert result.rows_rejected == 1
        assert len(kept.versions()) == versions
        kept.approvals = ()
        kept.write("UPDATE {t} SET v = 'd' WHERE id = 2")
    assert kept.versions() == [(1, "b", True), (2, "c", False), (2, "d", True)]


# ── other tables ─────────────────────────────────────────────────────────────────────────────────


def test_a_new_column_makes_versions_where_it_has_a_value(kept):
    kept.make()
    kept.sync(**BY_XMIN)
    kept.write("ALTER TABLE {t} ADD COLUMN w int", "UPDATE {t} SET w = 5 WHERE id = 2")
    assert counts(kept.sync(**BY_XMIN)) == (0, 1, 2, 0)
    assert kept.versions("id, w") == [
        (1, None, True), (2, None, False), (2, 5, True), (3, None, True)
    ]  # fmt: skip
    kept.write("ALTER TABLE {t} DROP COLUMN v", "UPDATE {t} SET w = 6 WHERE id = 2")
    assert counts(kept.sync(**BY_XMIN)) == (0, 1, 2, 0)
    assert kept.rows("v", f"id = 2 AND {NOW}") == [(None,)]
    assert kept.rows("v", f"id = 1 AND {NOW}") == [("a",)]
    kept.write("ALTER TABLE {t} ALTER COLUMN w TYPE bigint, ALTER COLUMN id TYPE bigint")
    assert counts(kept.sync(**BY_XMIN)) == (0, 0, 3, 0), "a wider type is no other value"
    assert kept.sound()


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_a_target_that_was_dropped_is_loaded_whole_and_not_from_the_cursor_on(kept, mode):
    kept.make()
    kept.sync(mode=mode, **BY_XMIN)
    kept.there("DROP TABLE {t}")
    kept.write("INSERT INTO {t} VALUES (4, 'x')")
    assert counts(kept.sync(mode=mode, **BY_XMIN)) == (4, 0, 0, 0)
    assert kept.pair.same(kept.name)


@pytest.mark.parametrize("in_two", [False, True])
def test_any_names_and_types_of_columns(kept, in_two, monkeypatch):
    if in_two:  # as on servers before Postgres 17
        monkeypatch.setattr(history, "_MERGE_RETURNS", 1_000_000)
    kept.make(
        'id int PRIMARY KEY, v json, s tsquery, t point, f numeric, "row" text[], '
        '"odd ""name""; --" int2vector, "to" int',
        rows=0,
    )
    values = "'{\"a\":1, \"a\":2}', 'a & b', '(1,2)', 'NaN', '[0:0]={x}', '1 2', 3"
    kept.write(f"INSERT INTO {{t}} SELECT g, {values} FROM generate_series(1, 3) g")
    texts = 'id, v::text, s::text, t::text, f::text, "row"::text, "odd ""name""; --"::text, "to"'
    assert counts(kept.sync()) == (3, 0, 0, 0)
    assert counts(kept.sync()) == (0, 0, 3, 0)
    for change in ("v = '{}'", "s = 'c'", "t = '(3,4)'", "f = 1.0", "f = 1.00", "\"row\" = '{}'",
                   "\"odd \"\"name\"\"; --\" = '3'", '"to" = 4'):  # fmt: skip
        kept.write(f"UPDATE {{t}} SET {change} WHERE id = 2")
        assert counts(kept.sync()) == (0, 1, 2, 0)
        assert kept.same(texts)
    assert len(kept.versions("id")) == 3 + 8
    assert kept.sound()


def test_columns_masks_and_conditions_hold(kept):
    kept.make("id int PRIMARY KEY, v text, secret text", rows=0)
    kept.write("INSERT INTO {t} VALUES (1, 'a', 'x'), (2, 'b', 'x')")
    spec = {"columns": {"exclude": ("secret",)}, "where": "v <> 'b'", "deletes": "soft"}
    kept.sync(**spec)
    kept.write("UPDATE {t} SET secret = 'y'")
    assert counts(kept.sync(**spec)) == (0, 0, 1, 0)
    kept.write("UPDATE {t} SET v = 'b' WHERE id = 1")
    assert counts(kept.sync(**spec)) == (0, 0, 0, 1), "it left the condition"
    assert kept.versions() == [(1, "a", False)]


def test_another_mode_and_its_tables_are_refused_whole(kept):
    kept.make()
    kept.sync(mode="merge")
    with pytest.raises(ConfigError, match="holds one row for each key, and the stream says mode:"):
        kept.sync()
    kept.there("DROP TABLE {t}")
    kept.sync()
    kept.write("UPDATE {t} SET v = 'b'")
    kept.sync()
    before = kept.versions()
    for other in (
        {"mode": "merge"}, {"mode": "replace", "key": ()},
        {"mode": "append", "key": (), "cursor": "xmin"},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"holds all versions of its rows|has not loaded"):
            kept.sync(**other)
        assert kept.versions() == before
    assert counts(kept.sync()) == (0, 0, 3, 0)


def test_a_history_without_its_indexes_is_refused(kept):
    kept.make()
    kept.sync()
    kept.there(f"DROP INDEX acme.{kept.name}_id_idx")
    with pytest.raises(ConfigError, match=r"is no history by key \(id\)"):
        kept.sync()
    kept.there("CREATE UNIQUE INDEX ON {t} (id) WHERE _syncward_valid_to IS NULL")
    assert counts(kept.sync()) == (0, 0, 3, 0)


def test_a_trigger_that_swallows_rows_keeps_nothing(kept):
    kept.make()
    kept.sync()
    kept.there(
        "CREATE FUNCTION acme.swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; "
        "END'",
    )
    kept.write("UPDATE {t} SET v = 'b' WHERE id = 1")
    before = kept.versions()
    for event in ("INSERT", "UPDATE"):
        kept.there(
            f"CREATE TRIGGER s BEFORE {event} ON {{t}} FOR EACH ROW EXECUTE FUNCTION acme.swallow()"
        )
        with pytest.raises(SyncwardError) as caught:
            kept.sync()
        assert caught.value.code == "rows_missing"
        assert kept.versions() == before
        kept.there("DROP TRIGGER s ON {t}")
    assert counts(kept.sync()) == (0, 1, 2, 0)


def test_a_trigger_of_the_table_sees_each_version_begin_and_end(kept):
    kept.make()
    kept.sync()
    kept.there(
        "CREATE OR REPLACE FUNCTION acme.upper() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN IF TG_OP = ''INSERT'' THEN NEW.v := upper(NEW.v); END IF; RETURN NEW; END'",
        "CREATE TRIGGER u BEFORE INSERT OR UPDATE ON {t} FOR EACH ROW "
        "EXECUTE FUNCTION acme.upper()",
    )
    kept.write("UPDATE {t} SET v = 'b' WHERE id = 1", "INSERT INTO {t} VALUES (4, 'd')")
    assert counts(kept.sync()) == (1, 1, 2, 0)
    assert kept.versions()[:2] == [(1, "a", False), (1, "B", True)]
    assert kept.versions()[-1] == (4, "D", True)
    assert kept.sound()


# ── as a run ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_of_a_newer_version_is_left_to_a_newer_worker(world):
    kept = Kept(world.pair).make()
    world.apply({"public.t": "{mode: history, key: [id]}"})
    run, results = world.sync()
    assert (run.state, counts(results["t"])) == (RunState.SUCCEEDED, (3, 0, 0, 0))
    assert "history: 3 rows extracted; 3 inserted" in world.log(run.run_id)
    before = kept.versions()
    kept.write("UPDATE {t} SET v = 'b'")
    for written in ("""'{"mode": "of later"}'""", """'{"of_later": true}'"""):
        asked = world.enqueue()
        world.control.act(f"UPDATE streams SET spec = spec || {written}")
        world.step()
        assert kept.versions() == before
        world.control.act(
            """UPDATE streams SET spec = spec - 'of_later' || '{"mode": "history"}'"""
        )
        run = world.run(asked.run_id)
        assert (run.state, run.error_code) == (RunState.QUEUED, "transient")
        assert "this worker's version cannot read" in world.log(run.run_id)
        assert "credential.unsealed" not in world.events(run.run_id)
        world.control.act("UPDATE active_runs SET not_before = now() - interval '1 s'")
        world.step()
        assert world.run(asked.run_id).state is RunState.SUCCEEDED
        before = kept.versions()
    assert len(before) == 6


def test_a_row_that_is_refused_keeps_its_version_and_the_others_get_theirs(world):
    kept = Kept(world.pair).make(rows=5)
    world.apply(
        {
            "public.t": "{mode: history, key: [id], deletes: soft, rejected_max: 10, "
            "guards: {delete_ratio: 1}}"
        }
    )
    world.sync()
    kept.there("ALTER TABLE {t} ADD CHECK (v <> 'bad')")
    kept.write(
        "UPDATE {t} SET v = CASE id WHEN 2 THEN 'bad' ELSE 'b' END WHERE id < 4",
        "INSERT INTO {t} VALUES (6, 'bad'), (7, 'new')",
        "DELETE FROM {t} WHERE id = 5",
    )
    run, results = world.sync()
    assert run.state is RunState.SUCCEEDED, run.error
    assert (counts(results["t"]), results["t"].rows_rejected) == ((1, 2, 1, 1), 2)
    assert kept.versions() == [
        (1, "a", False), (1, "b", True), (2, "a", True), (3, "a", False), (3, "b", True),
        (4, "a", True), (5, "a", False), (7, "new", True),
    ]  # fmt: skip
    assert kept.sound()
    kept.write("UPDATE {t} SET v = 'good' WHERE v = 'bad'")
    _, results = world.sync()
    assert counts(results["t"]) == (1, 1, 4, 0)
    assert kept.same()
