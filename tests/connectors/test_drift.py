"""The source's table changes: the target follows, refuses or looks away, as the stream says."""

import threading
import time
from contextlib import closing
from dataclasses import replace
from uuid import uuid4

import pytest

from connectors import registry
from connectors.shape_changes import widens
from schemas.records import Change, LoadRequest, WireFormat
from schemas.runs import RunState
from schemas.streams import StreamSpec
from storage import runs
from tests.world import LOOSE, OPERATOR

pytestmark = pytest.mark.integration

BY_TIME = "{mode: merge, key: [id], cursor: at%s}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("smallint", "integer"), ("integer", "bigint"), ("smallint", "bigint"),
        ("integer", "numeric"), ("integer", "numeric(12,2)"), ("bigint", "numeric(19,0)"),
        ("real", "double precision"), ("numeric(5,2)", "numeric(6,3)"), ("numeric(5,2)", "numeric"),
        ("character varying(5)", "character varying(6)"), ("character varying(5)", "text"),
        ("character varying(5)", "character varying"), ("character varying", "text"),
        ("timestamp(3) without time zone", "timestamp without time zone"),
        ("time(0) with time zone", "time(3) with time zone"), ("integer[]", "bigint[]"),
        ("bit varying(3)", "bit varying(4)"), ("numeric(3)", "numeric(5,2)"),
    ],
)  # fmt: skip
def test_a_type_that_holds_every_value_of_another_is_wider(old, new):
    assert widens(old, new)
    assert not widens(new, old)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("integer", "integer"), ("integer", "numeric(9,0)"), ("bigint", "numeric(18,0)"),
        ("numeric(5,2)", "numeric(5,3)"), ("numeric(5,2)", "numeric(6,1)"), ("numeric", "bigint"),
        ("text", "character varying(5)"), ("text", "integer"), ("integer", "text"),
        ("integer", "bigint[]"), ("integer[]", "bigint"), ("json", "jsonb"), ("date", "timestamp"),
        ("timestamp without time zone", "timestamp with time zone"),
        ("double precision", "numeric"),
        ("character(3)", "character(4)"), ("bit(3)", "bit(4)"), ("interval", "interval(3)"),
        ("public.mood", "text"), ("text", 'public."odd type"'), ("interval day to second(3)", "x"),
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_wider_is_not(old, new):
    assert not widens(old, new)


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, at timestamptz NOT NULL DEFAULT now(), "
        "n int NOT NULL DEFAULT 7, s varchar(5))",
        "INSERT INTO t (id) SELECT generate_series(1, 3)",
    )
    return world


def synced(world, spec: str = BY_TIME, drift: str = ""):
    world.apply({"public.t": spec % (f", drift: {drift}" if drift else "")})
    time.sleep(0.15)  # rows of this very moment are the next run's
    run, streams = world.sync()
    return run, streams["t"]


def said(result):
    return [(c.column, c.change, c.before, c.after) for c in result.schema_changes]


def test_a_column_with_a_default_reaches_rows_that_no_cursor_shows(shop):
    synced(shop)
    shop.pair.source("ALTER TABLE t ADD COLUMN extra text DEFAULT 'x'")
    run, result = synced(shop)
    assert run.state is RunState.SUCCEEDED
    assert said(result) == [("extra", Change.ADDED, None, "text")]
    assert (result.rows_extracted, result.rows_updated) == (3, 3)
    assert shop.pair.same("t")
    _, result = synced(shop)
    assert (said(result), result.rows_extracted) == ([], 0)


def test_wider_types_and_null_where_none_was_are_followed(shop):
    synced(shop)
    shop.pair.source(
        "ALTER TABLE t ALTER COLUMN n TYPE bigint, ALTER COLUMN n DROP NOT NULL, "
        "ALTER COLUMN s TYPE text",
        "INSERT INTO t VALUES (4, now(), NULL, 'longer than before'), (5, now(), 5000000000, '')",
    )
    run, result = synced(shop)
    assert run.state is RunState.SUCCEEDED
    assert said(result) == [
        ("n", Change.WIDENED, "integer", "bigint"),
        ("n", Change.NULLABLE, "integer NOT NULL", "bigint"),
        ("s", Change.WIDENED, "character varying(5)", "text"),
    ]
    assert shop.pair.same("t")


def test_a_column_that_is_gone_stays_here_and_is_told_once(shop):
    synced(shop)
    shop.pair.source("ALTER TABLE t DROP COLUMN n", "INSERT INTO t (id) VALUES (4)")
    run, result = synced(shop)
    assert run.state is RunState.SUCCEEDED
    assert said(result) == [("n", Change.REMOVED, "integer", None)]
    kept = shop.pair.rows("destination", "SELECT id, n FROM acme.t ORDER BY id")
    assert kept == [(1, 7), (2, 7), (3, 7), (4, None)]
    shop.pair.source("INSERT INTO t (id) VALUES (5)")
    _, result = synced(shop)
    assert (said(result), result.rows_inserted) == ([], 1)


def test_a_rename_is_called_what_it_may_be(shop):
    synced(shop)
    shop.pair.source("ALTER TABLE t RENAME COLUMN s TO title")
    run, result = synced(shop)
    assert {c.change for c in result.schema_changes} == {Change.ADDED, Change.REMOVED}
    assert "if s was renamed to title" in shop.log(run.run_id)


def test_each_change_is_an_event_once(shop):
    synced(shop)
    shop.pair.source("ALTER TABLE t ADD COLUMN extra numeric(9,2)")
    run, _ = synced(shop)
    found = shop.control.all(
        "SELECT body::jsonb -> 'detail' FROM audit.event WHERE action = 'stream.schema_changed' "
        "AND target_id = :target",
        target=run.subject_id,
    )
    assert found == [
        (
            {
                "stream": "public.t", "column": "extra", "change": "added", "before": None,
                "after": "numeric(9,2)",
            },
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        "ADD COLUMN extra text",
        "ALTER COLUMN n TYPE bigint",
        "ALTER COLUMN n DROP NOT NULL",
        "DROP COLUMN n",
    ],
)
def test_frozen_the_stream_fails_and_nothing_changes(shop, change):
    synced(shop, drift="freeze")
    shape = (
        "SELECT attname, atttypid, attnotnull FROM pg_attribute WHERE attrelid = 'acme.t'::regclass"
    )
    before = shop.pair.rows("destination", shape), shop.pair.content("destination", "t")
    shop.pair.source(f"ALTER TABLE t {change}", "UPDATE t SET at = now()")
    run, result = synced(shop, drift="freeze")
    assert run.state is RunState.FAILED
    assert "drift: freeze" in (result.error or "")
    columns = "id, at, n, s"
    now = shop.pair.rows("destination", shape), shop.pair.content("destination", "t", columns)
    assert now == before
    run, _ = synced(shop, drift="evolve")
    assert run.state is RunState.SUCCEEDED


def test_ignored_columns_are_left_out_and_values_that_do_not_fit_fail(shop):
    synced(shop, drift="ignore")
    shop.pair.source(
        "ALTER TABLE t ADD COLUMN extra text DEFAULT 'x', ALTER COLUMN n TYPE bigint",
        "INSERT INTO t VALUES (4, now(), 8, 'new', 'y')",
    )
    run, _ = synced(shop, drift="ignore")
    assert run.state is RunState.SUCCEEDED
    assert shop.pair.content("destination", "t", "id, at, n, s") == shop.pair.content(
        "source", "t", "id, at, n, s"
    )
    shop.pair.source("INSERT INTO t VALUES (5, now(), 5000000000)")
    run, result = synced(shop, drift="ignore")
    assert run.state is RunState.FAILED
    assert "5000000000" not in (result.error or "")


_FINER = (
    ("numeric(10,2)", "numeric(14,4)", "1.2345", "1.2300"), ("int", "numeric", "1.5", "1.0"),
    ("real", "double precision", "0.1", "0.5"), ("time(0)", "time", "00:00:00.7", "00:00:07"),
    ("timestamp(0)", "timestamp", "2020-01-01 00:00:00.7", "2020-01-01"),
    ("timestamptz(3)", "timestamptz", "2020-01-01 00:00:00.0007+00", "2020-01-01"),
    ("numeric(10,2)[]", "numeric(14,4)[]", "{1.2345}", "{1.2300,NULL}"),
)  # fmt: skip


def test_an_ignored_finer_type_rounds_nothing(shop):
    """A value that the narrower column would round does not fit it."""
    names = [f"c{n}" for n in range(len(_FINER))]
    columns = ", ".join(f"{n} {old}" for n, (old, *_) in zip(names, _FINER, strict=True))
    shop.pair.source(f"CREATE TABLE fine (id int PRIMARY KEY, {columns})")
    stream = {"public.fine": "{mode: merge, key: [id], drift: ignore, rejected_max: 100}"}
    shop.apply(stream)
    shop.sync()
    for number, (name, (_, new, value, fits)) in enumerate(zip(names, _FINER, strict=True)):
        shop.pair.source(
            f"ALTER TABLE fine ALTER COLUMN {name} TYPE {new}",
            f"INSERT INTO fine (id, {name}) VALUES ({number}, '{value}'), "
            f"({100 + number}, '{fits}'), ({200 + number}, NULL)",
        )
    run, streams = shop.sync()
    assert run.state is RunState.SUCCEEDED, shop.log(run.run_id)
    assert streams["fine"].rows_rejected == len(_FINER)
    rows = f"SELECT {', '.join(names)} FROM %s.fine WHERE id >= 100 ORDER BY id"
    assert shop.pair.rows("destination", rows % "acme") == shop.pair.rows("source", rows % "public")
    shop.apply({"public.fine": "{mode: merge, key: [id], drift: ignore}"})
    run, streams = shop.sync()
    assert run.state is RunState.FAILED
    assert "1.2345" not in (streams["fine"].error or "")


@pytest.mark.parametrize("policy", ["evolve", "freeze", "ignore"])
def test_a_type_that_is_another_one_is_refused_with_what_to_do(shop, policy):
    synced(shop, drift=policy)
    shop.pair.source("ALTER TABLE t ALTER COLUMN s TYPE int USING 1")
    run, result = synced(shop, drift=policy)
    assert run.state is RunState.FAILED
    assert "column s is integer at the source and character varying(5) here" in (result.error or "")


def test_a_view_on_the_column_is_named_as_what_keeps_its_type(shop):
    synced(shop)
    shop.pair.session("destination").execute("CREATE VIEW acme.v AS SELECT n FROM acme.t")
    shop.pair.source("ALTER TABLE t ALTER COLUMN n TYPE bigint")
    run, result = synced(shop)
    assert run.state is RunState.FAILED
    assert "a view, rule, trigger or policy here depends on that column" in (result.error or "")


@pytest.mark.parametrize("spec", ["{mode: replace%s}", "{mode: append, cursor: xmin%s}"])
def test_other_modes_follow_too(shop, spec):
    synced(shop, spec)
    shop.pair.source(
        "ALTER TABLE t ADD COLUMN extra int DEFAULT 1, DROP COLUMN s",
        "INSERT INTO t (id) VALUES (4)",
    )
    run, result = synced(shop, spec)
    assert run.state is RunState.SUCCEEDED
    assert said(result) == [
        ("extra", Change.ADDED, None, "integer"),
        ("s", Change.REMOVED, "character varying(5)", None),
    ]
    newest = shop.pair.rows("destination", "SELECT n, extra, s FROM acme.t WHERE id = 4")
    assert newest == [(7, 1, None)]


def test_a_not_null_that_somebody_set_here_stays(shop):
    shop.pair.source("ALTER TABLE t ALTER COLUMN s SET DEFAULT 'x'", "UPDATE t SET s = 'x'")
    synced(shop)
    lake = shop.pair.session("destination")
    lake.execute("ALTER TABLE acme.t ALTER COLUMN s SET NOT NULL")
    shop.pair.source("INSERT INTO t (id, s) VALUES (4, NULL)")
    run, result = synced(shop)
    assert run.state is RunState.FAILED
    assert "acme.t.s would be NULL" in (result.error or "")


def test_a_table_of_somebody_else_is_changed_by_its_owner_only(shop):
    synced(shop)
    lake = shop.pair.session("destination")
    lake.execute("ALTER TABLE acme.t OWNER TO postgres")
    lake.execute("GRANT ALL ON acme.t TO writer")
    shop.pair.source("ALTER TABLE t ADD COLUMN extra int")
    run, result = synced(shop)
    assert run.state is RunState.FAILED
    assert "only the table's owner may change it here" in (result.error or "")


@pytest.mark.parametrize("between", [True, False])
def test_a_column_that_is_dropped_and_added_again_is_read_again(shop, between):
    synced(shop)
    shop.pair.source("ALTER TABLE t DROP COLUMN n")
    if between:
        synced(shop)
    shop.pair.source("ALTER TABLE t ADD COLUMN n int NOT NULL DEFAULT 42")
    run, result = synced(shop)
    assert (run.state, result.rows_updated) == (RunState.SUCCEEDED, 3)
    assert shop.pair.rows("destination", "SELECT DISTINCT n FROM acme.t") == [(42,)]


@pytest.mark.parametrize("change", ["RENAME COLUMN id TO ident", "DROP COLUMN id"])
def test_a_key_that_is_gone_is_named_with_what_to_do(shop, change):
    synced(shop, "{mode: replace%s}")
    shop.pair.source(f"ALTER TABLE t {change}")
    run, result = synced(shop, "{mode: replace%s}")
    assert run.state is RunState.FAILED
    assert "column id integer is gone, and it is part of the key here" in (result.error or "")


def test_readers_wait_for_the_change_of_a_table_not_for_the_rows(shop):
    synced(shop)
    shop.pair.source(
        "ALTER TABLE t ADD COLUMN extra text DEFAULT 'x'",
        "CREATE FUNCTION slow(t) RETURNS text LANGUAGE sql AS 'SELECT pg_sleep(0.4)::text'",
    )
    shop.pair.source("ALTER TABLE t RENAME TO kept", (
        "CREATE VIEW t AS SELECT id, at, n, s, extra || coalesce(slow(kept), '') AS extra FROM kept"
    ))  # fmt: skip
    waited, done = [0.0], threading.Event()

    def read() -> None:
        with shop.pair.connect("destination") as lake:
            while not done.is_set():
                started = time.monotonic()
                lake.execute("SELECT count(*) FROM acme.t")
                waited.append(time.monotonic() - started)
                time.sleep(0.01)

    reader = threading.Thread(target=read)
    reader.start()
    run, _ = synced(shop)
    done.set()
    reader.join()
    assert run.state is RunState.SUCCEEDED
    assert max(waited) < 0.8, "the rows took 1.2 s"


def test_keys_are_here_before_readers_wait_for_the_change(shop):
    """The keys of all rows take long, too; and the source's session would wait for the change."""
    pair, stream = shop.pair, StreamSpec(
        name="public.t", mode="merge", key=("id",), cursor="at", deletes="hard"
    )  # fmt: skip
    connection, held = uuid4(), []
    locks = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'acme.t'::regclass AND "
        "mode = 'AccessExclusiveLock'"
    )

    def watched(chunks):
        held.extend(pair.rows("destination", locks))
        yield from chunks

    for fence in (1, 2):
        with (
            closing(registry.open_source("postgres", *_end(pair, "source"))) as source,
            closing(registry.open_destination("postgres", *_end(pair, "destination"))) as there,
        ):
            request = LoadRequest(connection, uuid4(), 1, fence, stream, "acme")
            there.claim_stream(request)
            with source.extract(stream, None, WireFormat.PG_BINARY, sweep=fence > 1) as batches:
                (batch,) = batches
                if batch.keys is not None:
                    batch.keys = replace(batch.keys, chunks=watched(batch.keys.chunks))
                there.load(request, batch)
        if fence == 1:
            pair.source("ALTER TABLE t ADD COLUMN extra text DEFAULT 'x'")
    assert held == [(0,)]


def _end(pair, role: str):
    return pair.config(role), pair.secret(role), LOOSE


@pytest.mark.parametrize("policy", ["evolve", "ignore"])
@pytest.mark.parametrize("seen_without", [True, False])
def test_the_last_column_dropped_and_added_again_is_read_in_every_row(shop, policy, seen_without):
    """Names, types and their order are those of before: only its number at the source is not."""
    shop.pair.source(
        "CREATE TABLE again (id int PRIMARY KEY, v int)", "INSERT INTO again VALUES (1, 1), (2, 2)"
    )
    shop.apply({"public.again": f"{{mode: merge, key: [id], cursor: xmin, drift: {policy}}}"})
    shop.sync()
    shop.pair.source("ALTER TABLE again DROP COLUMN v")
    if seen_without:
        shop.sync()
    shop.pair.source("ALTER TABLE again ADD COLUMN v int DEFAULT 7")
    run, streams = shop.sync()
    assert streams["again"].rows_updated == 2
    assert "bears the name v; everything is read" in shop.log(run.run_id)
    assert shop.pair.same("again")
    assert shop.sync()[1]["again"].rows_extracted == 0


def test_a_narrowed_type_that_was_approved_is_not_asked_again_by_the_next_change(shop):
    shop.pair.source(
        "CREATE TABLE less (id int PRIMARY KEY, v bigint)", "INSERT INTO less VALUES (1, 1)"
    )
    shop.apply({"public.less": "{mode: merge, key: [id], cursor: xmin}"})
    shop.sync()
    shop.pair.source("ALTER TABLE less ALTER COLUMN v TYPE int")
    run, _ = shop.sync()
    assert run.error_code == "narrowed_type"
    with shop.cli.inside() as (tx, _, _name):
        runs.approve(tx, run.run_id, OPERATOR)
    shop.step()
    shop.pair.source("ALTER TABLE less ADD COLUMN w text DEFAULT 'w'")
    run, _ = shop.sync()
    assert run.state is RunState.SUCCEEDED, run.error
    assert shop.pair.same("less")


@pytest.mark.parametrize("cursor", ["xmin", "at"])
def test_an_append_follows_although_no_row_came(shop, cursor):
    spec = "{mode: append, cursor: " + cursor + "%s}"
    synced(shop, spec)
    # Neither of them writes a row, so none is in the window.
    shop.pair.source("ALTER TABLE t ADD COLUMN extra int, ALTER COLUMN n DROP NOT NULL")
    run, result = synced(shop, spec)
    assert (run.state, result.rows_extracted) == (RunState.SUCCEEDED, 0)
    assert {c.change for c in result.schema_changes} == {Change.ADDED, Change.NULLABLE}
    there = shop.pair.rows("destination", (
        "SELECT attname, attnotnull FROM pg_attribute WHERE attrelid = 'acme.t'::regclass "
        "AND attname IN ('extra', 'n') ORDER BY attname"
    ))  # fmt: skip
    assert there == [("extra", False), ("n", False)]
    shop.pair.source("INSERT INTO t (id, n, extra) VALUES (4, NULL, 1)")
    run, result = synced(shop, spec)
    assert (run.state, result.rows_inserted) == (RunState.SUCCEEDED, 1)
