"""Every type arrives exactly, changed or not, in arrays of every form, with a key and without."""

import secrets

import pytest
from psycopg import sql

from schemas.errors import ConfigError
from tests.connectors.type_cases import BUILT_IN, EXTENSIONS, MAKE_OWN, NAMES, OWN
from tests.connectors.typed import Ends
from tests.world import Pair

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ends(cluster, admin, logins):
    """One pair of databases for the whole module: a database for each type would take minutes."""
    suffix = secrets.token_hex(4)
    names = {"source": f"types_{suffix}", "destination": f"typed_{suffix}"}
    for name in names.values():
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    admin.execute(
        sql.SQL("GRANT CREATE ON DATABASE {} TO writer").format(
            sql.Identifier(names["destination"])
        )
    )
    pair = Pair(cluster, names["source"], names["destination"], logins)
    made = Ends(
        {role: pair.connect(role) for role in names},
        {role: pair.config(role) for role in names},
        {role: pair.secret(role) for role in names},
    )
    made.run("source", MAKE_OWN.replace("{s}", '"both"'), MAKE_OWN.replace("{s}", "here"))
    made.run("destination", MAKE_OWN.replace("{s}", '"both"'))
    made.run("destination", 'GRANT USAGE ON SCHEMA "both" TO writer')
    made.run("source", "CREATE SCHEMA ext")
    made.run("destination", "CREATE SCHEMA ext", "CREATE SCHEMA elsewhere")
    made.run("destination", "GRANT USAGE ON SCHEMA ext, elsewhere TO writer")
    yield made
    made.close()
    for name in names.values():
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(BUILT_IN)
def test_a_built_in_type(ends, case):
    ends.check(case, type_=_exact(ends, case))
    assert not ends.notes


def _exact(ends, case) -> str:
    ((name,),) = ends.rows("source", sql.SQL("SELECT format_type(to_regtype({0}), -1)").format(
        sql.Literal(case.type)))  # fmt: skip
    return "" if "(" in case.type or case.name.startswith("interval_") else name


@named(NAMES)
def test_names_of_objects_are_text_at_the_destination(ends, case):
    """They mean something else there, or nothing."""
    case = case.inside("here")
    ends.check(case, type_="text")
    assert ends.type_of(case.name, "a") == "text[]"


@named(OWN)
def test_a_type_of_ones_own_is_itself_where_the_destination_has_it(ends, case):
    case = case.inside('"both"')
    ends.check(case, name=f"both {case.name}", type_=case.type)
    assert case.type in " ".join(ends.notes)


@named(OWN)
def test_a_type_of_ones_own_is_what_every_server_has_where_it_is_missing(ends, case):
    case = case.inside("here")
    ends.check(case, name=f"here {case.name}", type_=case.otherwise)


# ── types of extensions ──────────────────────────────────────────────────────────────────────


@named(EXTENSIONS)
def test_a_type_of_an_extension(ends, case):
    """Missing: an error that says what to type. There: itself, also from another schema."""
    here = case.inside("ext")
    _extension(ends, case.extension, source="ext", destination=None)
    ends.make(here, f"no {case.name}")
    with pytest.raises(ConfigError) as refused:
        ends.sync(f"no {case.name}", mode="replace")
    for word in ("column v", f"ext.{case.name}", f"CREATE EXTENSION {case.extension};", "typed_"):
        assert word in str(refused.value)
    _extension(ends, case.extension, source="ext", destination="ext")
    ends.check(here, name=f"ext {case.name}", type_=here.type)
    _extension(ends, case.extension, source="ext", destination="elsewhere")
    ends.check(here, name=f"else {case.name}", type_=case.inside("elsewhere").type)
    for place in ("ext", "else"):
        for bag in ("", " bag"):
            ends.run("destination", f'DROP TABLE acme."{place} {case.name}{bag}"')


def _extension(ends, name: str, *, source: str, destination: str | None) -> None:
    """Have an extension in a schema of the source, and in one of the destination or not at all."""
    ends.run("source", f"CREATE EXTENSION IF NOT EXISTS {name} SCHEMA {source} CASCADE")
    if destination is None:
        ends.run("destination", f"DROP EXTENSION IF EXISTS {name}")
        return
    ends.run("destination", f"CREATE EXTENSION IF NOT EXISTS {name} SCHEMA {destination}")
    ends.run("destination", f"ALTER EXTENSION {name} SET SCHEMA {destination}")


@pytest.mark.parametrize("place", ["ext", "elsewhere"])
def test_a_key_of_citext_is_the_key_of_citext(ends, place):
    """Compared as text, a key that changed its case would be a new row, and then refused."""
    _extension(ends, "citext", source="ext", destination=place)
    name = f"ci {place}"
    ends.run(
        "source",
        f'CREATE TABLE public."{name}" (k ext.citext PRIMARY KEY, n int)',
        f"INSERT INTO public.\"{name}\" VALUES ('Ab', 1), ('c', 2)",
        f'GRANT SELECT ON public."{name}" TO reader',
    )
    spec = {"mode": "merge", "key": ("k",)}
    assert ends.sync(name, **spec).rows_inserted == 2
    assert ends.sync(name, **spec).rows_unchanged == 2
    ends.run("source", f"UPDATE public.\"{name}\" SET k = 'aB' WHERE n = 1")
    result = ends.sync(name, **spec)
    assert (result.rows_updated, result.rows_inserted, result.rows_unchanged) == (1, 0, 1)
    assert set(ends.rows("destination", f'SELECT k::text, n FROM acme."{name}"')) == {
        ("aB", 1), ("c", 2)}  # fmt: skip


KEYS = [
    ("enum", '"both".mood', ["'sad'", "'o''k'"]),
    ("enum missing", "here.mood", ["'sad'", "'o''k'"]),
    ("domain", '"both".smallest', ["1", "2"]),
    ("composite", '"both".as_row', ["ROW(1, 'x')", "ROW(1, 'y')"]),
    ("composite missing", "here.as_row", ["ROW(1, 'x')", "ROW(1, 'y')"]),
    ("array", "int[]", ["'{1,2}'", "'[0:1]={1,2}'"]),
    ("array of enums", '"both".mood[]', ["'{sad}'", "'{}'"]),
    ("range", '"both".floats', ["'[1,2)'", "'empty'"]),
    ("numeric", "numeric", ["1.0", "'NaN'"]),
    ("bytea", "bytea", ["''", r"'\x00'"]),
    ("jsonb", "jsonb", ["'{}'", "'[]'"]),
    ("timestamp", "timestamp", ["'infinity'", "'-infinity'"]),
    ("inet", "inet", ["'10.0.0.1'", "'10.0.0.1/8'"]),
    ("tsvector", "tsvector", ["''", "'a'"]),
    ("oidvector", "oidvector", ["''", "'1'"]),
    ("names", "regclass", ["'pg_class'", "'pg_type'"]),
]


@pytest.mark.parametrize(("name", "type_", "values"), KEYS, ids=[key[0] for key in KEYS])
def test_a_key_of_any_type_that_has_order(ends, name, type_, values):
    table = f'public."key {name}"'
    ends.run(
        "source",
        f"CREATE TABLE {table} (k {type_} PRIMARY KEY, n int)",
        f"INSERT INTO {table} VALUES ({values[0]}, 1), ({values[1]}, 2)",
        f"GRANT SELECT ON {table} TO reader",
    )
    spec = {"mode": "merge", "key": ("k",)}
    assert ends.sync(f"key {name}", **spec).rows_inserted == 2
    ends.run("source", f"UPDATE {table} SET n = 3 WHERE n = 2")
    result = ends.sync(f"key {name}", **spec)
    assert (result.rows_updated, result.rows_inserted, result.rows_unchanged) == (1, 0, 1)
    replaced = ends.sync(f"key {name}", mode="replace")
    assert replaced.rows_unchanged == 2


@pytest.mark.parametrize("type_", ["json", "point", "xid", "polygon"])
def test_a_key_of_a_type_without_order_is_refused_with_its_name(ends, type_):
    table = f"unordered_{type_}"
    ends.run(
        "source", f"CREATE TABLE public.{table} (k {type_})",
        f"GRANT SELECT ON public.{table} TO reader",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"public\.{table}: key \(k {type_}\) .* without order"):
        ends.sync(table, mode="merge", key=("k",))
    with pytest.raises(ConfigError, match="key nope is no column"):
        ends.sync(table, mode="merge", key=("nope",))
    assert ends.sync(table, mode="replace").rows_loaded == 0


def test_an_enum_with_a_new_label_arrives_where_it_is_text(ends):
    ends.run(
        "source",
        "CREATE TYPE here.grows AS ENUM ('a')",
        "CREATE TABLE public.grown (id int PRIMARY KEY, v here.grows)",
        "INSERT INTO public.grown VALUES (1, 'a')",
        "GRANT SELECT ON public.grown TO reader",
    )
    ends.sync("grown", mode="replace")
    ends.run("source", "ALTER TYPE here.grows ADD VALUE 'b' BEFORE 'a'")
    ends.run("source", "UPDATE public.grown SET v = 'b'")
    assert ends.sync("grown", mode="replace").rows_updated == 1
    # made afterwards, the type changes nothing for a table that is there
    ends.run("destination", "CREATE SCHEMA here", "CREATE TYPE here.grows AS ENUM ('a', 'b')")
    ends.run("destination", "GRANT USAGE ON SCHEMA here TO writer")
    try:
        assert ends.sync("grown", mode="replace").rows_unchanged == 1
        assert ends.type_of("grown", "v") == "text"
    finally:
        ends.run("destination", "DROP SCHEMA here CASCADE")


def test_xml_is_refused_where_the_server_was_built_without_it(ends):
    ends.run("source", "CREATE TABLE public.papers (x xml)",
             "GRANT SELECT ON public.papers TO reader")  # fmt: skip
    with pytest.raises(ConfigError, match=r"public\.papers: .*typed_.* built without libxml"):
        ends.sync("papers", mode="replace")


@pytest.mark.parametrize("type_", ['"both".older', '"both".older[]', '"both".oldest'])
@pytest.mark.parametrize("mode", [{"mode": "replace"}, {"mode": "merge", "key": ("id",)}])
def test_a_label_that_the_destination_lacks_is_named_with_what_to_type(ends, type_, mode):
    drop = 'DROP TYPE IF EXISTS "both".older CASCADE'
    for role, labels in (("source", "'a', 'it''s new'"), ("destination", "'a'")):
        ends.run(role, drop, f'CREATE TYPE "both".older AS ENUM ({labels})')
        ends.run(role, 'CREATE DOMAIN "both".oldest AS "both".older')
    name = f"labels {type_} {mode['mode']}".replace('"', "")
    table = f'public."{name}"'
    value = "'{a,it''s new}'" if "[]" in type_ else "'it''s new'"
    ends.run(
        "source",
        f"CREATE TABLE {table} (id int PRIMARY KEY, v {type_})",
        f"INSERT INTO {table} VALUES (1, NULL)",
        f"GRANT SELECT ON {table} TO reader",
    )
    assert ends.sync(name, **mode).rows_inserted == 1
    ends.run("source", f"INSERT INTO {table} VALUES (2, {value})")
    with pytest.raises(ConfigError, match=r"column v has a label that .* lacks") as refused:
        ends.sync(name, **mode)
    ends.run("destination", str(refused.value).split("run there: ")[1])
    assert ends.sync(name, **mode).rows_inserted == 1
    ends.run("source", f"DROP TABLE {table}")


def test_uuids_keys_time_zones_and_arrays_are_not_garbled(ends):
    """What others lose of just such a table: types, the key, zones, whole columns."""
    types = {
        "id": "bigint", "event_uuid": "uuid", "title": "text", "qty": "integer",
        "amount": "numeric(12,2)", "is_active": "boolean", "updated_at": "timestamp with time zone",
        "event_date": "date", "payload": "jsonb", "note": "text", "score": "double precision",
        "tags": "text[]",
    }  # fmt: skip
    columns = ", ".join(f"{name} {type_}" for name, type_ in types.items())
    ends.run(
        "source",
        f"CREATE TABLE public.events ({columns}, PRIMARY KEY (id))",
        "INSERT INTO public.events SELECT g, md5(g::text)::uuid, 'event ' || g, g * 2, g * 1.10, "
        "g % 3 = 0, timestamptz '2026-03-29 02:30:00+02' + g * interval '1 hour', "
        "date '2020-01-01' + g, jsonb_build_object('b', g, 'a', 1.10), "
        "CASE WHEN g % 3 = 0 THEN '' END, 0.1 * g, ARRAY['t' || g, NULL, ''] "
        "FROM generate_series(1, 500) g",
        "GRANT SELECT ON public.events TO reader",
    )
    ends.sync("events", mode="merge", key=("id",), cursor="updated_at")
    images = "SELECT id, record_send(ROW({0})), ({1})::text FROM {2}.events ORDER BY id"
    names = ", ".join(types)
    assert ends.rows("source", images.format(names, f"ROW({names})", "public")) == ends.rows(
        "destination", images.format(names, f"ROW({names})", "acme")
    )
    assert {name: ends.type_of("events", name) for name in types} == types
    keys = (
        "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = 'acme.events'::regclass"
    )
    ((key,),) = ends.rows("destination", keys)
    assert "UNIQUE" in key
    assert key.endswith("(id)")


def test_a_new_column_of_a_type_that_is_missing_there_follows(ends):
    ends.run(
        "source",
        "CREATE TABLE public.grows (id int PRIMARY KEY)",
        "INSERT INTO public.grows VALUES (1)",
        "GRANT SELECT ON public.grows TO reader",
    )
    spec = {"mode": "merge", "key": ("id",)}
    ends.sync("grows", **spec)
    ends.run(
        "source",
        "ALTER TABLE public.grows ADD v here.mood[], ADD p here.posint, ADD r regclass",
        "INSERT INTO public.grows VALUES (2, '{sad,NULL}', 7, 'pg_class')",
    )
    result = ends.sync("grows", **spec)
    assert (result.rows_inserted, result.rows_unchanged) == (1, 1)
    assert [ends.type_of("grows", name) for name in "vpr"] == ["text[]", "integer", "text"]
    again = ends.sync("grows", **spec)
    assert (again.rows_unchanged, again.schema_changes) == (2, ())


def test_a_run_says_what_may_arrive_as_something_else(world):
    world.pair.source(
        "CREATE TYPE mood AS ENUM ('sad')",
        "CREATE TABLE t (id int PRIMARY KEY, v mood)",
        "INSERT INTO t VALUES (1, 'sad')",
    )
    world.apply({"public.t": "{mode: merge, key: [id], cursor: xmin}"})
    run, streams = world.sync()
    assert streams["t"].rows_inserted == 1, run.error
    said = "column v is public.mood, or text where the destination has no such type"
    assert said in world.log(run.run_id)
    world.pair.source("INSERT INTO t VALUES (2, 'sad')")
    run, streams = world.sync()
    assert streams["t"].rows_inserted == 1
    assert said not in world.log(run.run_id)  # once, with what is read in full


def test_a_tsquery_finds_the_same_and_stays_unchanged_though_it_is_grouped_anew(ends):
    """Postgres writes both groupings as one text, and refuses its own binary form of the empty."""
    ends.run(
        "source",
        "CREATE TABLE public.queries (id int PRIMARY KEY, q tsquery)",
        "INSERT INTO public.queries VALUES (1, 'a'::tsquery && ('b'::tsquery && 'c'::tsquery)), "
        "(2, ''), (3, 'a | (b & !c)'), (4, 'a'::tsquery <-> 'b <-> c'::tsquery)",
        "GRANT SELECT ON public.queries TO reader",
    )
    spec = {"mode": "merge", "key": ("id",)}
    ends.sync("queries", **spec)
    assert ends.sync("queries", **spec).rows_unchanged == 4
    found = (
        "SELECT id, q::text, array(SELECT v @@ q FROM unnest('{a b c,b:1 a:2 c:3,a:1 b:2 c:3,a:1}'"
        "::tsvector[]) v) FROM {}.queries ORDER BY id"
    )
    assert ends.rows("source", found.replace("{}", "public")) == ends.rows(
        "destination", found.replace("{}", "acme")
    )
