"""Kinds of tables, names and sizes: what is read is what SELECT * gives, and arrives as it is."""

import os
import secrets

import pytest
from psycopg import sql

from connectors.postgres import column_types
from schemas.errors import ConfigError, GuardTripped, SyncwardError
from tests.connectors.typed import Ends
from tests.world import Pair

pytestmark = pytest.mark.integration


@pytest.fixture
def ends(pair):
    made = Ends(
        {role: pair.connect(role) for role in ("source", "destination")},
        {role: pair.config(role) for role in ("source", "destination")},
        {role: pair.secret(role) for role in ("source", "destination")},
    )
    yield made
    made.close()


def make(ends, *statements: str) -> None:
    ends.run("source", "SET search_path = public", *statements, "SET search_path = pg_catalog")
    ends.run("source", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")


def same(ends, table: str) -> bool:
    here = ends.rows("source", f"SELECT * FROM public.{table}")
    names = ", ".join(
        row[0]
        for row in ends.rows(
            "destination",
            "SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = "
            f"'acme.{table}'::regclass AND attnum > 0 AND attname <> '_syncward_synced_at' "
            "ORDER BY attnum",
        )
    )
    return sorted(map(repr, here)) == sorted(
        map(repr, ends.rows("destination", f"SELECT {names} FROM acme.{table}"))
    )


MERGE = {"mode": "merge", "key": ("id",)}


def test_generated_identity_serial_and_dropped_columns_are_columns(ends):
    make(
        ends,
        "CREATE TABLE made (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, gone text, s serial, "
        "n int DEFAULT 7, stored int GENERATED ALWAYS AS (n * 2) STORED, "
        "virtual int GENERATED ALWAYS AS (n * 3) VIRTUAL)",
        "ALTER TABLE made DROP COLUMN gone",
        "INSERT INTO made (n) VALUES (1), (NULL)",
    )
    assert ends.sync("made", **MERGE).rows_inserted == 2
    make(ends, "UPDATE made SET n = 5 WHERE id = 1")
    assert ends.sync("made", **MERGE).rows_updated == 1
    assert ends.sync("made", **MERGE).rows_unchanged == 2
    assert same(ends, "made")


@pytest.mark.parametrize("tolerated", [0, 5])
def test_rows_of_a_partitioned_target_without_a_key_are_replaced_alone(ends, tolerated):
    """Rows of two partitions may lie at the same place in theirs."""
    make(
        ends,
        "CREATE TABLE bag (p int, v text)",
        "INSERT INTO bag SELECT n % 4, 'v' || n FROM generate_series(1, 200) AS n",
    )
    parts = [
        f"CREATE TABLE acme.bag_{n} PARTITION OF acme.bag FOR VALUES IN ({n})" for n in (0, 1, 2)
    ]
    ends.sync("bag", mode="replace")
    ends.run(
        "destination",
        "ALTER TABLE acme.bag RENAME TO old",
        "CREATE TABLE acme.bag (LIKE acme.old INCLUDING DEFAULTS) PARTITION BY LIST (p)",
        *parts,
        "CREATE TABLE acme.bag_rest PARTITION OF acme.bag DEFAULT",
        "INSERT INTO acme.bag SELECT * FROM acme.old",
        "ALTER TABLE acme.bag OWNER TO writer",
        *(f"ALTER TABLE acme.bag_{n} OWNER TO writer" for n in (0, 1, 2, "rest")),
    )
    make(ends, "DELETE FROM bag WHERE v IN ('v1', 'v100')", "INSERT INTO bag VALUES (2, 'new')")
    result = ends.sync("bag", mode="replace", rejected_max=tolerated)
    counted = (result.rows_deleted, result.rows_inserted, result.rows_unchanged)
    assert counted == (2, 1, 198)
    assert same(ends, "bag")


@pytest.mark.parametrize("event", ["INSERT", "UPDATE", "DELETE"])
def test_a_trigger_of_one_partition_of_a_target_swallows_nothing(ends, event):
    """It is no trigger of the table, and what it keeps from being written is not unchanged."""
    make(
        ends,
        "CREATE TABLE cut (id int PRIMARY KEY, v int)",
        "INSERT INTO cut VALUES (1, 1), (2, 2)",
    )
    spec = {**MERGE, "deletes": "hard"}
    ends.sync("cut", **spec)
    ends.run(
        "destination",
        "ALTER TABLE acme.cut RENAME TO old",
        "CREATE TABLE acme.cut (LIKE acme.old INCLUDING ALL) PARTITION BY RANGE (id)",
        "CREATE TABLE acme.cut_all PARTITION OF acme.cut DEFAULT",
        "INSERT INTO acme.cut SELECT * FROM acme.old",
        "GRANT ALL ON acme.cut TO writer",
        "CREATE FUNCTION acme.no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        f"CREATE TRIGGER no BEFORE {event} ON acme.cut_all FOR EACH ROW EXECUTE FUNCTION acme.no()",
    )
    make(
        ends,
        "DELETE FROM cut WHERE id = 1",
        "UPDATE cut SET v = 3",
        "INSERT INTO cut VALUES (3, 3)",
    )
    with pytest.raises(SyncwardError) as caught:
        ends.sync("cut", **spec)
    assert caught.value.code == "rows_missing"
    ends.run("destination", "DROP FUNCTION acme.no() CASCADE")
    ends.sync("cut", **spec)
    assert same(ends, "cut")


@pytest.mark.parametrize("spec", [{"mode": "append", "cursor": "xmin"}, MERGE], ids=str)
def test_a_target_with_policies_takes_rows_into_an_empty_table_and_behind_others(ends, spec):
    """There is no COPY into such a table."""
    name = f"guarded_{spec['mode']}"
    make(ends, f"CREATE TABLE {name} (id int PRIMARY KEY)", f"INSERT INTO {name} VALUES (1)")
    ends.sync(name, **spec)
    ends.run(
        "destination",
        f"DELETE FROM acme.{name}" if spec == MERGE else "SELECT 1",
        f"ALTER TABLE acme.{name} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE acme.{name} FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY p ON acme.{name} USING (true) WITH CHECK (id < 10)",
    )
    make(ends, f"INSERT INTO {name} VALUES (2)")
    ends.sync(name, **spec)
    assert same(ends, name)
    make(ends, f"INSERT INTO {name} VALUES (10)")
    with pytest.raises(ConfigError, match="permission denied"):
        ends.sync(name, **spec)


def test_a_partitioned_table_is_one_table(ends):
    make(
        ends,
        "CREATE TABLE parts (id int, region text, v text, PRIMARY KEY (id, region)) "
        "PARTITION BY LIST (region)",
        "CREATE TABLE parts_eu PARTITION OF parts FOR VALUES IN ('eu')",
        # columns in another order, with one dropped: rows are converted
        "CREATE TABLE parts_us (gone int, v text, region text NOT NULL, id int NOT NULL)",
        "ALTER TABLE parts_us DROP COLUMN gone",
        "ALTER TABLE parts ATTACH PARTITION parts_us FOR VALUES IN ('us')",
        "INSERT INTO parts VALUES (1, 'eu', 'a'), (1, 'us', NULL)",
    )
    spec = {"mode": "merge", "key": ("id", "region"), "cursor": "xmin"}
    assert ends.sync("parts", **spec).rows_inserted == 2
    make(ends, "UPDATE parts SET v = '' WHERE region = 'us'")
    assert ends.sync("parts", **spec).rows_updated == 1
    assert same(ends, "parts")
    assert ends.sync("parts", mode="replace").rows_unchanged == 2


def test_a_parent_is_read_with_its_children_and_its_key_proves_nothing(ends):
    """As SELECT reads it; children may hold the key again, which no constraint forbids."""
    make(
        ends,
        "CREATE TABLE parent (id int PRIMARY KEY, v text)",
        "CREATE TABLE child (extra text) INHERITS (parent)",
        "INSERT INTO parent VALUES (1, 'parent')",
        "INSERT INTO child VALUES (2, 'child', 'x')",
    )
    assert ends.sync("parent", **MERGE).rows_inserted == 2
    assert ends.sync("child", mode="replace").rows_inserted == 1
    assert same(ends, "parent")
    assert same(ends, "child")
    make(ends, "INSERT INTO child VALUES (1, 'again', 'y')")
    with pytest.raises(
        GuardTripped, match=r"public\.parent: key \(id\) is no key: 1 values repeat"
    ):
        ends.sync("parent", **MERGE)
    ends.run("destination", "DROP TABLE acme.parent")
    assert ends.sync("parent", mode="replace").rows_inserted == 3  # without a key it is a bag
    assert ends.sync("parent", mode="replace").rows_unchanged == 3
    assert same(ends, "parent")


def test_views_materialized_views_and_foreign_tables_are_read(ends):
    make(
        ends,
        "CREATE TABLE base (id int, v json)",
        """INSERT INTO base VALUES (1, '{"a":1}'), (1, '{"a":1}'), (2, NULL)""",
        "CREATE VIEW seen AS SELECT v, id FROM base",
        "CREATE MATERIALIZED VIEW kept AS SELECT * FROM base",
    )
    for name in ("seen", "kept"):
        assert ends.sync(name, mode="replace").rows_inserted == 3
        assert ends.sync(name, mode="replace").rows_unchanged == 3
        assert same(ends, name)


def test_nothing_is_not_an_empty_string_nor_the_word_null(ends):
    make(
        ends,
        "CREATE TABLE nothing (id int PRIMARY KEY, t text, c char(3), b bytea, a text[], j jsonb)",
        "INSERT INTO nothing VALUES (1, NULL, NULL, NULL, NULL, NULL), "
        """(2, '', '', '', '{}', 'null'), (3, 'NULL', '\\N', '\\\\N', '{NULL,"NULL",""}', '""')""",
    )
    ends.sync("nothing", **MERGE)
    assert same(ends, "nothing")
    make(ends, "UPDATE nothing SET t = '' WHERE id = 1", "UPDATE nothing SET t = NULL WHERE id = 2")
    result = ends.sync("nothing", **MERGE)
    assert (result.rows_updated, result.rows_unchanged) == (2, 1)
    assert same(ends, "nothing")


NAMES = [
    "select",
    "a b",
    'quo"te',
    "Ünïcode ☃",
    "é" * 31 + "x",
    "%s",
    "{}",
    "it's",
    "tab\there",
    " ",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name_of_table_column_and_key(ends, name):
    table, column = sql.Identifier("public", name), sql.Identifier(name)
    ends.run(
        "source",
        sql.SQL("CREATE TYPE {} AS ENUM ({})").format(
            sql.Identifier("public", f"{name}"[:20] + "'T"), sql.Literal(name[:20])
        ),
        sql.SQL("CREATE TABLE {} ({} int PRIMARY KEY, v {})").format(
            table, column, sql.Identifier("public", f"{name}"[:20] + "'T")
        ),
        sql.SQL("INSERT INTO {} VALUES (1, {})").format(table, sql.Literal(name[:20])),
        sql.SQL("GRANT SELECT ON {} TO reader").format(table),
    )
    spec = {"mode": "merge", "key": (name,), "cursor": name}
    assert ends.sync(name, **spec).rows_inserted == 1
    assert ends.sync(name, **spec).rows_unchanged == 1
    there = ends.rows(
        "destination", sql.SQL("SELECT {}, v FROM {}").format(column, sql.Identifier("acme", name))
    )
    assert there == [(1, name[:20])]


def test_a_table_without_columns_is_refused(ends):
    make(ends, "CREATE TABLE none ()")
    with pytest.raises(ConfigError, match=r"public\.none: has no columns"):
        ends.sync("none", mode="replace")


def test_as_many_columns_as_a_table_can_have_less_ours(ends):
    columns = ", ".join(f"c{n} int" for n in range(1598))
    make(ends, f"CREATE TABLE wide (id int PRIMARY KEY, {columns})")
    make(ends, "INSERT INTO wide (id, c7) VALUES (1, 7)")
    assert ends.sync("wide", **MERGE).rows_inserted == 1
    make(ends, "UPDATE wide SET c7 = 8")
    assert ends.sync("wide", **MERGE).rows_updated == 1


@pytest.mark.parametrize("type_", ["timestamptz", "timestamp", "date", "moment"])
def test_a_cursor_at_infinity_is_read_with_every_window(ends, type_):
    """It lies behind every bound: without this the row would never arrive."""
    make(
        ends,
        "CREATE DOMAIN moment AS timestamptz",
        f"CREATE TABLE t (id int PRIMARY KEY, at {type_}, v int)",
        "INSERT INTO t VALUES (1, 'infinity'), (2, '-infinity'), (3, NULL), (4, '0044-03-15 BC')",
    )
    spec = {**MERGE, "cursor": "at"}
    assert ends.sync("t", **spec).rows_inserted == 4
    make(ends, "UPDATE t SET v = 1 WHERE id = 1", "INSERT INTO t VALUES (5, 'infinity')")
    result = ends.sync("t", **spec)
    assert (result.rows_inserted, result.rows_updated) == (1, 1)
    text = [
        sorted(ends.rows(role, f"SELECT id, at::text, v FROM {schema}.t"), key=repr)
        for role, schema in (("source", "public"), ("destination", "acme"))
    ]
    assert text[0] == text[1]


@pytest.mark.parametrize("type_", ["numeric", "real", "double precision", "amount"])
@pytest.mark.parametrize("last", ["NaN", "Infinity"])
def test_a_number_behind_all_others_does_not_end_the_stream(ends, type_, last):
    """As the bound of a window, nothing would ever lie above it."""
    make(
        ends,
        "CREATE DOMAIN amount AS numeric",
        f"CREATE TABLE n (id int PRIMARY KEY, at {type_})",
        f"INSERT INTO n VALUES (1, 1.5), (2, '{last}'), (3, '-Infinity'), (4, NULL)",
    )
    spec = {**MERGE, "cursor": "at"}
    assert ends.sync("n", **spec).rows_inserted == 4
    make(ends, "INSERT INTO n VALUES (5, 2.5)", f"INSERT INTO n VALUES (6, '{last}')")
    assert ends.sync("n", **spec).rows_inserted == 2
    make(ends, "INSERT INTO n VALUES (7, 2.5)")
    assert ends.sync("n", **spec).rows_inserted == 1


ORDERED = [
    ("uuid", "'0190163d-8694-739b-aea5-966c26f8ad91'", "'0190163d-8695-739b-aea5-966c26f8ad91'"),
    ("text", "'a'", "'b'"),
    ("varchar(3)", "''", "'é'"),
    ("oid", "1", "4294967295"),
    ("money", "'1.10'", "'2.20'"),
    ("smallint", "-1", "1"),
]


@pytest.mark.parametrize(("type_", "first", "second"), ORDERED, ids=[row[0] for row in ORDERED])
def test_a_cursor_of_any_type_that_has_order(ends, type_, first, second):
    make(
        ends,
        f"CREATE TABLE o (id int PRIMARY KEY, at {type_})",
        f"INSERT INTO o VALUES (1, {first})",
    )
    spec = {**MERGE, "cursor": "at"}
    assert ends.sync("o", **spec).rows_inserted == 1
    make(ends, f"INSERT INTO o VALUES (2, {second}), (3, {first})")
    assert ends.sync("o", **spec).rows_inserted == 2
    result = ends.sync("o", **spec)
    assert (result.rows_extracted, result.rows_unchanged) == (1, 1)


@pytest.fixture
def latin(cluster, admin, logins, pair):
    """A source whose characters are stored in another encoding."""
    name = f"latin_{secrets.token_hex(4)}"
    admin.execute(
        f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"
    )  # fmt: skip
    other = Pair(cluster, name, pair.names["destination"], logins)
    made = Ends(
        {"source": other.connect("source"), "destination": pair.connect("destination")},
        {role: other.config(role) for role in ("source", "destination")},
        {role: other.secret(role) for role in ("source", "destination")},
    )
    made.run("source", "SET client_encoding = 'UTF8'")
    yield made
    made.close()
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_characters_arrive_from_another_encoding(latin):
    make(
        latin,
        "CREATE TYPE odd AS ENUM ('ä', 'ÿ')",
        "CREATE TYPE two AS (a text, b odd)",
        "CREATE TABLE chars (id int PRIMARY KEY, t text, c char(3), n name, j json, e odd, "
        "es odd[], r two, b bytea, v tsvector)",
        """INSERT INTO chars VALUES (1, 'äÿ', 'é', 'ñ', '{"ß": "ø"}', 'ä', '{ÿ,NULL}', """
        r"""ROW('å', 'ÿ'), '\xe4ff', 'ü:1A')""",
    )
    assert latin.sync("chars", **MERGE).rows_inserted == 1
    assert latin.sync("chars", **MERGE).rows_unchanged == 1
    shown = "SELECT t, c, n, j::text, e::text, es::text, r::text, b::text, v::text FROM {}.chars"
    assert latin.rows("source", shown.format("public")) == latin.rows(
        "destination", shown.format("acme")
    )


# ── sizes ────────────────────────────────────────────────────────────────────────────────────


def test_a_value_of_many_megabytes_arrives_as_it_is(ends):
    make(
        ends,
        "CREATE TABLE big (id int PRIMARY KEY, b bytea, t text)",
        "ALTER TABLE big ALTER b SET STORAGE EXTERNAL",
        "INSERT INTO big SELECT 1, decode(repeat('00ff10', 8000000), 'hex'), repeat('ä', 8000000)",
    )
    assert ends.sync("big", **MERGE).rows_inserted == 1
    assert ends.sync("big", **MERGE).rows_unchanged == 1
    digest = "SELECT md5(b), md5(t), octet_length(b), octet_length(t) FROM {}.big"
    assert ends.rows("source", digest.format("public")) == ends.rows(
        "destination", digest.format("acme")
    )


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * 2**30, reason="needs 8 GB"
)
@pytest.mark.parametrize("mode", [{"mode": "replace"}, {**MERGE, "cursor": "xmin"}])
def test_a_row_longer_than_a_server_can_send_is_refused_by_name(ends, mode):
    make(
        ends,
        "CREATE TABLE huge (id int PRIMARY KEY, small text, one text, other text)",
        "INSERT INTO huge SELECT 1, 'x', repeat('x', 500000000)",
        "UPDATE huge SET other = repeat('y', 600000000)",
    )
    with pytest.raises(ConfigError) as refused:
        ends.sync("huge", **mode)
    assert refused.value.code == "row_too_large"
    for word in (
        "public.huge",
        "column other",
        f"{column_types.MAX_ROW_BYTES:,}",
        "view without that",
    ):
        assert word in str(refused.value)
    make(ends, "UPDATE huge SET other = 'y'")  # the session goes on
    assert ends.sync("huge", **mode).rows_inserted == 1
    size = "SELECT octet_length(one) FROM {}.huge"
    assert ends.rows("destination", size.format("acme")) == [(500_000_000,)]
