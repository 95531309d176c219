"""Columns that are left out never leave the source; what a later choice does to the target."""

import pytest
from psycopg import sql
from pydantic import ValidationError

from schemas.streams import StreamSpec

ODD = 'O"dd; DROP TABLE t; --'
BY_XMIN = "{mode: merge, key: [id], cursor: xmin"


@pytest.mark.parametrize(("spec", "match"), [
    ({"columns": {"exclude": ["id"]}}, "id is a key, cursor or tombstone"),
    ({"columns": {"include": ["v"]}}, "id is a key, cursor or tombstone"),
    ({"columns": {"exclude": ["at"]}, "cursor": "at"}, "at is a key, cursor or tombstone"),
    ({"columns": {"exclude": ["gone"]}, "tombstone": "gone", "deletes": "hard"}, "gone is a key"),
    ({"columns": {}}, "either include or exclude"),
    ({"columns": {"include": ["id"], "exclude": ["v"]}}, "either include or exclude"),
    ({"columns": {"only": ["id"]}}, "Extra inputs"),
])  # fmt: skip
def test_choices_that_cannot_work_are_refused(spec, match):
    with pytest.raises(ValidationError, match=match):
        StreamSpec(name="a.b", mode="merge", key=("id",), **spec)


@pytest.fixture
def table(world):
    world.pair.source(
        sql.SQL("CREATE TABLE t (id int PRIMARY KEY, v text, w text NOT NULL, {} text)").format(
            sql.Identifier(ODD)
        ),
        "INSERT INTO t VALUES (1, 'a', 'hidden', 'odd'), (2, 'b', 'hidden', NULL)",
    )
    return world


def columns(world) -> list[str]:
    found = world.pair.rows(
        "destination",
        "SELECT attname::text FROM pg_attribute WHERE attrelid = 'acme.t'::regclass "
        "AND attnum > 0 AND NOT attisdropped AND attname <> '_syncward_synced_at' ORDER BY attnum",
    )
    return [name for (name,) in found]


@pytest.mark.integration
@pytest.mark.parametrize("choice", [
    "{exclude: [w]}", "{include: [id, v, " + repr(ODD) + "]}",
])  # fmt: skip
@pytest.mark.parametrize("begin", ["{mode: replace", "{mode: merge, key: [id]"])
def test_only_the_chosen_columns_are_selected(table, begin, choice):
    # the login may not even read the other one: it is not in the SELECT
    table.apply({"public.t": f"{begin}, columns: {choice}" + "}"})
    session = table.pair.session("source")
    session.execute("REVOKE SELECT ON t FROM reader")
    session.execute(sql.SQL("GRANT SELECT (id, v, {}) ON t TO reader").format(sql.Identifier(ODD)))
    run, _ = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    assert columns(table) == ["id", "v", ODD]
    assert len(table.pair.rows("destination", "SELECT FROM acme.t")) == 2


@pytest.mark.integration
@pytest.mark.parametrize("setting", [
    "columns: {exclude: [nope]}", "columns: {include: [id, nope]}", "mask: {nope: redact}",
    "where: nope = 1",
])  # fmt: skip
def test_a_name_that_is_no_column_is_refused_with_those_there_are(table, setting):
    table.apply({"public.t": f"{BY_XMIN}, {setting}" + "}"})
    run, streams = table.sync()
    assert run.state == "failed"
    assert "no column nope" in streams["t"].error
    assert "there are id, v, w" in streams["t"].error


@pytest.mark.integration
@pytest.mark.parametrize(("drift", "state"), [
    ("evolve", "succeeded"), ("ignore", "failed"), ("freeze", "failed"),
])  # fmt: skip
def test_a_column_that_is_left_out_later_is_as_one_that_is_gone(table, drift, state):
    table.apply({"public.t": f"{BY_XMIN}, drift: {drift}" + "}"})
    table.sync()
    table.apply({"public.t": f"{BY_XMIN}, drift: {drift}, columns: " + "{exclude: [w]}}"})
    table.pair.source("INSERT INTO t VALUES (3, 'c', 'never')")
    run, _ = table.sync()
    assert run.state == state, table.log(run.run_id)
    assert "w" in columns(table)
    rows = dict(table.pair.rows("destination", "SELECT id, w FROM acme.t"))
    assert rows[1] == "hidden"
    assert rows.get(3) is None


@pytest.mark.integration
def test_a_column_that_is_chosen_later_is_filled_for_older_rows(table):
    table.apply({"public.t": BY_XMIN + ", columns: {exclude: [w]}}"})
    table.sync()
    table.apply({"public.t": BY_XMIN + "}"})
    run, _ = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    found = table.pair.rows("destination", "SELECT id, w FROM acme.t ORDER BY id")
    assert found == [(1, "hidden"), (2, "hidden")]


@pytest.mark.integration
def test_with_include_a_new_column_at_the_source_stays_there(table):
    table.apply({"public.t": BY_XMIN + ", columns: {include: [id, v]}}"})
    table.sync()
    table.pair.source("ALTER TABLE t ADD COLUMN ssn text DEFAULT 'secret'")
    table.pair.source("UPDATE t SET v = 'z'")
    run, streams = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    assert streams["t"].rows_updated == 2
    assert columns(table) == ["id", "v"]


@pytest.mark.integration
def test_a_replaced_table_without_its_own_key_is_told_apart_by_its_rows(table):
    table.apply({"public.t": "{mode: replace, columns: {exclude: [id]}}"})
    table.sync()
    table.pair.source("UPDATE t SET v = 'z' WHERE id = 1")
    run, streams = table.sync()
    assert run.state == "succeeded", table.log(run.run_id)
    assert (streams["t"].rows_inserted, streams["t"].rows_unchanged) == (1, 1)
    assert sorted(table.pair.rows("destination", "SELECT v FROM acme.t")) == [("b",), ("z",)]
