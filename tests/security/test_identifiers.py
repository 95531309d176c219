"""Names of schemas, tables and columns are names: exact at the destination, or refused (T30)."""

import json

import pytest
from psycopg import sql
from psycopg.sql import Identifier
from pydantic import ValidationError

from connectors import registry
from schemas.errors import ConfigError
from schemas.records import WireFormat
from schemas.runs import RunState
from schemas.streams import StreamSpec
from tests.world import LOOSE

LONGEST = "x" * 63

NAMES = [
    'quo"te', '""', "quo'te", "a;--", 'a"; DROP TABLE canary; --', "a'); DROP TABLE canary; --",
    "/* a", "a\\", "\\", "%", "%s", "%(a)s", "{}", "{0}", "$1", "$$", ":a", "?", "a b", " a ",
    "a\tb", "a\nb", "a\rb", "a\x1bb", "a\x7fb", "select", "SELECT", "Ünïcode", "\u202etxt.exe",
    "مرحبا", "a\u200bb", "e\u0301", "é", "🔑", "👩\u200d👩\u200d👧", "pg_catalog.x", "a.b.c", "*",
    LONGEST, "y" * 62 + "1", "y" * 62 + "2", "é" * 31, "🔑" * 15, "CON", "-1", "1", "true", "null",
]  # fmt: skip


def put(world, name: str, n: int) -> None:
    """Make a table of this name with key and column of this name; row n."""
    world.pair.source(
        sql.SQL("CREATE TABLE public.{0} ({0} int PRIMARY KEY, v text)").format(Identifier(name)),
        sql.SQL("INSERT INTO public.{} VALUES ({}, {})").format(Identifier(name), n, name),
    )


def quoted(name: str) -> str:
    """Write a name as YAML reads it back: a pair of escapes is no character there."""
    return "".join(c if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in name).join('""')


def stream(name: str) -> str:
    return quoted(f"public.{name}")


def synced(world):
    asked = world.enqueue()
    world.step()
    return world.run(asked.run_id)


def there(world) -> dict[str, list[str]]:
    """Every table of the target schema by its true name, with the names of its columns."""
    found = world.pair.rows(
        "destination",
        "SELECT c.relname::text, array_agg(a.attname::text ORDER BY a.attnum) FROM pg_class c "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 "
        "WHERE c.relnamespace = 'acme'::regnamespace AND c.relkind = 'r' GROUP BY c.relname",
    )
    return dict(found)


@pytest.mark.integration
def test_every_legal_name_arrives_as_it_is(world):
    world.pair.source("CREATE TABLE canary (id int)")
    world.pair.session("destination").execute("CREATE TABLE canary (id int)")
    for n, name in enumerate(NAMES):
        put(world, name, n)
    streams = {stream(name): f"{{mode: merge, key: [{quoted(name)}]}}" for name in NAMES}
    world.apply(streams)
    for _ in range(2):  # into new tables, then into what is there
        run = synced(world)
        assert (run.state, run.error) == (RunState.SUCCEEDED, None)
        assert there(world) == {n: [n, "v", "_syncward_synced_at"] for n in NAMES}
        for n, name in enumerate(NAMES):
            query = sql.SQL("SELECT {0}, v FROM acme.{0}").format(Identifier(name))
            assert world.pair.rows("destination", query) == [(n, name)]
    for role in ("source", "destination"):
        assert world.pair.rows(role, "SELECT to_regclass('public.canary')::text") == [("canary",)]


@pytest.mark.integration
def test_a_legal_name_of_the_target_schema_arrives_as_it_is(world, engine_of):
    for schema in ('quo"te; --', "\u202etxt", "🔑" * 15, "SELECT", "a.b"):
        engine_of(schema)
        found = world.pair.rows(
            "destination",
            sql.SQL("SELECT count(*) FROM {}.t").format(Identifier(schema)),
        )
        assert found == [(1,)]


@pytest.fixture
def engine_of(world):
    """Load the table t into a target schema of some name."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.account()

    def load(schema: str):
        path = world.document({"public.t": "{mode: merge, key: [id]}"})
        path.write_text(path.read_text().replace("schema: acme", f"schema: {quoted(schema)}"))
        world.apply_file(path)
        return synced(world)

    return load


@pytest.mark.integration
def test_a_target_schema_that_would_be_another_is_refused(world, engine_of):
    with pytest.raises(ConfigError, match="at most 63 characters"):
        engine_of("z" * 64)  # where it is written down
    schemas = "SELECT array_agg(nspname::text ORDER BY 1) FROM pg_namespace"
    before = world.pair.rows("destination", schemas)
    for schema, why in [
        ("é" * 32, "would cut it off"),
        ("pg_catalog", "choose another"),
        ("pg_evil", "choose another"),
        ("_syncward", "choose another"),
        ("information_schema", "choose another"),
    ]:
        run = engine_of(schema)
        assert (run.state, run.error_code) == (RunState.FAILED, "streams")
        assert why in (run.error or "")
        assert world.pair.rows("destination", schemas) == before


@pytest.mark.integration
def test_a_name_that_is_too_long_never_becomes_its_first_63_bytes(world):
    put(world, LONGEST, 1)
    put(world, "é" * 31, 2)
    too_long = [LONGEST + "x", "é" * 32, LONGEST + "'; --"]
    world.apply({stream(n): "{mode: replace}" for n in (LONGEST, "é" * 31, *too_long)})
    run = synced(world)
    assert (run.state, run.error_code) == (RunState.FAILED, "streams")
    failed = world.control.all(
        "SELECT stream, error FROM run_streams WHERE state = 'failed' ORDER BY stream"
    )
    assert sorted(name for name, _ in failed) == sorted(f"public.{n}" for n in too_long)
    assert all("would cut it off" in error for _, error in failed)
    assert set(there(world)) == {LONGEST, "é" * 31}


@pytest.mark.integration
def test_the_source_compares_whole_names_too(world):
    put(world, LONGEST, 1)
    source = registry.open_source(
        "postgres", world.pair.config("source"), world.pair.secret("source"), LOOSE
    )
    for name, found in ((LONGEST, True), (LONGEST + "x", False)):
        spec = StreamSpec(name=f"public.{name}", mode="replace")
        if found:
            with source.extract(spec, None, WireFormat.PG_BINARY) as batches:
                assert sum(1 for b in batches for _ in b.chunks) > 0
        else:
            with (
                pytest.raises(ConfigError, match="no table"),
                source.extract(spec, None, WireFormat.PG_BINARY),
            ):
                pass
    source.close()


@pytest.mark.parametrize("field", ["database", "user"])
@pytest.mark.parametrize("name", ["x" * 64, "é" * 32, "a\x00b", ""])
def test_a_database_or_login_that_would_be_cut_off_is_refused(field, name):
    config = {"host": "db.example", "database": "shop", "user": "reader", field: name}
    with pytest.raises(ConfigError, match=field):
        registry.validate_config("postgres", config, LOOSE)


@pytest.mark.parametrize("name", ["public.a\x00b", "pub\x00lic.a", "nodot", ".a", "public."])
def test_a_stream_is_a_schema_and_a_table(name):
    with pytest.raises(ValidationError):
        StreamSpec(name=name, mode="replace")


@pytest.mark.integration
def test_a_control_character_in_a_document_is_a_mistake_and_no_crash(world):
    world.account()
    path = world.document({"public.t": "{mode: replace}"})
    path.write_text(path.read_text() + "# \x7f")
    with pytest.raises(ConfigError, match="control character"):
        world.apply_file(path)
