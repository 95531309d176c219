"""Local files as a destination: manifest, merge by files, names, drift. Pairs: conformance/."""

import hashlib
import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from connectors.files import merge
from connectors.files import parts as files_parts
from connectors.files.manifest import directory_name
from schemas.errors import ConfigError
from tests.connectors.conformance.conftest import Engine
from tests.connectors.conformance.ends import DESTINATIONS, PostgresSource, SqliteSource

ORDERS = (("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"))
NOW = datetime.now(UTC)


@pytest.fixture(params=["files-jsonl", "files-parquet"])
def engine(request, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    made = Engine(SqliteSource(None, root), DESTINATIONS[request.param](None, root), root)
    made.source.create("orders", ORDERS)
    made.source.insert("orders", [(i, NOW, f"n{i}") for i in range(1, 101)])
    return made


def files(engine) -> dict[str, int]:
    """Name and inode of each file that counts."""
    folder = engine.destination.root / "acme" / "orders"
    parts = engine.destination.manifest("orders")["files"]
    return {p["name"]: (folder / p["name"]).stat().st_ino for p in parts}


@pytest.fixture
def small(monkeypatch):
    """Files and sorted runs of a few rows, as large tables have them."""
    monkeypatch.setattr(files_parts, "ROWS_MAX", 10)
    monkeypatch.setattr("connectors.row_groups.ROWS_MAX", 5)
    monkeypatch.setattr(merge, "_RUN_ROWS", 10)
    monkeypatch.setattr(merge, "_FAN_IN", 3)


def test_a_merge_rewrites_only_the_files_that_it_has_rows_for(engine, small):
    del small
    spec = engine.spec("orders", "merge", cursor=None)
    engine.sync(spec)
    before = files(engine)
    assert len(before) == 10
    assert engine.sync(spec).rows_unchanged == 100
    assert files(engine) == before
    engine.source.update("orders", 55, "note", "new")
    engine.source.insert("orders", [(101, NOW, "last")])
    result = engine.sync(spec)
    assert (result.rows_updated, result.rows_inserted, result.rows_unchanged) == (1, 1, 99)
    assert len(set(before) & set(files(engine))) == 8
    assert engine.same("orders")
    parts = engine.destination.manifest("orders")["files"]
    edges = [edge for part in parts for edge in (part["first"][0], part["last"][0])]
    assert edges == sorted(edges)


def test_a_replace_by_key_counts_and_keeps_what_did_not_change(engine, small):
    del small
    spec = engine.spec("orders", "replace")
    engine.sync(spec)
    before = files(engine)
    for i in (1, 42, 100):
        engine.source.delete("orders", i)
    result = engine.sync(spec)
    assert (result.rows_deleted, result.rows_unchanged, result.rows_inserted) == (3, 97, 0)
    assert len(set(before) & set(files(engine))) == 7
    assert engine.same("orders")


def test_rows_in_any_order_are_sorted_in_little_memory(engine, small):
    del small
    engine.source.create("mixed", ORDERS)
    engine.source.insert("mixed", [(i * 7_919 % 1_009, NOW, "x") for i in range(1_009)])
    engine.sync(engine.spec("mixed", "merge", cursor=None))
    assert engine.same("mixed")
    assert engine.destination.left_over() == []


def test_a_merge_reads_what_earlier_runs_wrote_exactly(engine):
    engine.source.create("typed", (*ORDERS, ("price", "numeric(12,2)"), ("any", "numeric")))
    rows = [(i, NOW, "x", Decimal("1.10"), Decimal("1.10")) for i in range(1, 4)]
    engine.source.insert("typed", rows)
    spec = engine.spec("typed", "merge", cursor=None)
    engine.sync(spec)
    assert engine.sync(spec).rows_unchanged == 3
    engine.source.update("typed", 2, "price", Decimal("2.20"))
    result = engine.sync(spec)
    assert (result.rows_updated, result.rows_unchanged) == (1, 2)
    assert engine.same("typed")


def test_the_manifest_names_every_file_with_its_digest_and_all_that_is_remembered(engine):
    spec = engine.spec("orders", "append")
    result = engine.sync(spec)
    manifest = engine.destination.manifest("orders")
    (part,) = manifest["files"]
    content = (engine.destination.root / "acme" / "orders" / part["name"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == part["sha256"]
    assert len(content) == part["bytes"]
    assert (
        manifest["cursor"] == result.cursor_to == {"kind": "column", "column": "id", "value": "100"}
    )
    assert (manifest["fence"], manifest["generation"]) == (1, 1)
    assert manifest["result"]["rows_inserted"] == 100
    assert manifest["schema_hash"] == result.schema_hash
    columns = [(c["name"], c["type"]) for c in manifest["columns"]]
    assert columns[0] == ("id", "bigint")
    assert columns[-1] == ("_syncward_synced_at", "timestamp with time zone")


def test_files_that_no_longer_count_stay_for_the_grace(engine):
    engine.destination.config["grace"] = "1h"
    engine.source.create("bag", (("a", "bigint"),), key=None)
    engine.source.insert("bag", [(1,)])
    for _ in range(3):
        engine.sync(engine.spec("bag", "replace"))
    manifest = engine.destination.manifest("bag")
    assert (len(manifest["files"]), len(manifest["retired"])) == (1, 2)
    folder = engine.destination.root / "acme" / "bag"
    assert all((folder / old["name"]).exists() for old in manifest["retired"])
    engine.destination.config["grace"] = "0s"
    engine.sync(engine.spec("bag", "replace"))
    assert engine.destination.left_over() == []


def test_what_others_put_into_the_directory_stays(engine):
    engine.sync(engine.spec("orders", "replace"))
    folder = engine.destination.root / "acme" / "orders"
    for name in ("notes.txt", "part-0.parquet", "g1.jsonl", ".hidden"):
        (folder / name).write_text("mine")
    engine.sync(engine.spec("orders", "replace"))
    assert {"notes.txt", "part-0.parquet", "g1.jsonl", ".hidden"} <= {
        p.name for p in folder.iterdir()
    }


def test_a_file_that_somebody_touched_ends_a_merge(engine):
    spec = engine.spec("orders", "merge", cursor=None)
    engine.sync(spec)
    (name,) = files(engine)
    path = engine.destination.root / "acme" / "orders" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="is not the one that the manifest names"):
        engine.sync(spec)
    path.unlink()
    with pytest.raises(ConfigError, match="is not the one that the manifest names"):
        engine.sync(spec)


def test_a_broken_manifest_is_not_taken_for_none(engine):
    engine.sync(engine.spec("orders", "append"))
    path = engine.destination.root / "acme" / "orders" / "manifest.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read"):
        engine.sync(engine.spec("orders", "append"))


def test_another_connection_does_not_get_the_directory(engine):
    engine.sync(engine.spec("orders", "append"))
    other = Engine(engine.source, engine.destination, engine.root)
    with pytest.raises(ConfigError, match="this connection has not loaded"):
        other.sync(other.spec("orders", "append"))


def test_a_key_that_is_none_is_refused_and_nothing_is_kept(engine):
    engine.source.create("bad", (("k", "bigint"), ("note", "text")), key=None)
    spec = engine.spec("bad", "merge", key=("k",), cursor=None)
    for rows, why in (([(1, "a"), (1, "b")], "values repeat"), ([(None, "c")], "NULL or NaN")):
        engine.source.insert("bad", rows)
        with pytest.raises(ConfigError, match=rf"key \(k\) is no key: .*{why}"):
            engine.sync(spec)
        assert engine.destination.rows("bad") is None
        assert engine.destination.left_over() == []


def test_another_format_writes_everything_again(engine):
    spec = engine.spec("orders", "merge")
    engine.sync(spec)
    other = {"jsonl": "files-parquet", "parquet": "files-jsonl"}[engine.destination.format]
    engine.destination = DESTINATIONS[other](None, engine.root)
    assert engine.sync(spec).rows_inserted == 100
    assert engine.same("orders")
    assert engine.destination.left_over() == []


def test_directories_and_files_are_closed_to_others(engine):
    engine.sync(engine.spec("orders", "append"))
    paths = list(engine.destination.root.rglob("*"))
    assert any(path.is_file() for path in paths)
    for path in paths:
        assert path.stat().st_mode & 0o027 == 0, path


# ── names ────────────────────────────────────────────────────────────────────────────────────


def test_names_become_names_of_directories_one_to_one():
    names = ["orders", "Orders", "ORDERS", "a b", "a%20b", "..", ".", "/", "a/b", "a.b", "a\\b"]
    names += ["con", "CON", "nul", "com1", "%", "-", "_", "é", "e\u0301", "x" * 300, "x" * 301]
    made = [directory_name(name) for name in names]
    assert len({one.casefold() for one in made}) == len(names)
    for one in made:
        assert len(one) <= 255
        assert not set(one) & set("./\\ ")
        assert one.lower() not in {"con", "nul", "com1"}


def test_no_name_of_a_table_leads_out_of_the_directory(engine):
    table = "../../../up"
    engine.source.create(table, ORDERS)
    engine.sync(engine.spec(table, "replace"))
    made = list(engine.root.rglob("manifest.json"))
    assert made == [engine.destination.root / "acme" / directory_name(table) / "manifest.json"]
    assert sorted(p.name for p in engine.root.iterdir()) == ["lake", "shop"]


# ── from Postgres ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def from_postgres(pair, tmp_path):
    (tmp_path / "files").mkdir()
    root = tmp_path / "files"
    return Engine(PostgresSource(pair, root), DESTINATIONS["files-parquet"](None, root), root)


@pytest.mark.integration
def test_types_without_a_portable_form_arrive_as_their_text(from_postgres):
    engine = from_postgres
    columns = {
        "a": ("inet", "192.168.0.1/24"), "b": ("interval", "1 year 02:03:04"),
        "c": ("int[]", "{1,NULL,3}"), "d": ("jsonb", '{"a": [1, 2]}'), "e": ("numeric", "1.500"),
        "f": ("int4range", "[1,5)"), "g": ("money", "-$12.34"), "h": ("bit(3)", "101"),
        "i": ("numeric(50,2)", "1.50"), "j": ("char(4)", "ab  "),
        "k": ("time with time zone", "10:00:00+02"),
        "l": ("real", "0.1"), "m": ("mood", "ok"),
    }  # fmt: skip
    engine.source.alter("CREATE TYPE mood AS ENUM ('sad', 'ok')")
    engine.source.create("odd", [("id", "bigint"), *((n, t) for n, (t, _) in columns.items())])
    engine.source.insert("odd", [(1, *(value for _, value in columns.values()))])
    engine.sync(engine.spec("odd", "merge"))
    ((_, *found),) = engine.destination.rows("odd")
    wanted = [value for _, value in columns.values()]
    wanted[11] = repr(0.10000000149011612)  # the double that a real is
    assert found == wanted
    kept = {c["name"]: c for c in engine.destination.manifest("odd")["columns"]}
    assert (kept["a"]["type"], kept["a"]["as_text"]) == ("inet", True)
    assert (kept["c"]["type"], kept["c"]["as_text"]) == ("integer[]", True)
    assert (kept["i"]["type"], kept["i"]["as_text"]) == ("numeric(50,2)", False)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("type_", "value"),
    [
        ("timestamptz", "infinity"),
        ("date", "0044-03-15 BC"),
        ("time", "24:00"),
        ("date", "-infinity"),
    ],
)
def test_a_time_that_no_file_can_hold_names_its_column_and_not_its_value(
    from_postgres, type_, value
):
    from_postgres.source.create("late", (("id", "bigint"), ("until", type_)))
    from_postgres.source.insert("late", [(1, value)])
    with pytest.raises(ConfigError, match=r"row 1 of the read .* in until; read a view") as caught:
        from_postgres.sync(from_postgres.spec("late", "replace"))
    assert caught.value.code == "data_refused"
    assert from_postgres.destination.rows("late") is None


@pytest.mark.integration
def test_a_number_that_parquet_cannot_hold_names_its_column(from_postgres):
    from_postgres.source.create("nan", (("id", "bigint"), ("n", "numeric(8,2)")))
    from_postgres.source.insert("nan", [(1, Decimal("NaN"))])
    with pytest.raises(ConfigError, match="column n holds what a numeric"):
        from_postgres.sync(from_postgres.spec("nan", "replace"))
    assert from_postgres.destination.left_over() == []


@pytest.mark.integration
def test_a_wider_type_rewrites_what_is_there(from_postgres):
    engine = from_postgres
    engine.source.create("w", (("id", "integer"), ("n", "integer"), ("v", "varchar(3)")))
    engine.source.insert("w", [(1, 7, "abc"), (2, None, None)])
    spec = engine.spec("w", "merge")
    engine.sync(spec)
    engine.source.alter("ALTER TABLE w ALTER n TYPE numeric(20,2), ALTER v TYPE text")
    engine.source.insert("w", [(3, Decimal("1.25"), "abcdef")])
    result = engine.sync(spec)
    assert {c.column for c in result.schema_changes} == {"n", "v"}
    assert engine.same("w")
    (part,) = engine.destination.manifest("w")["files"]
    path = Path(engine.destination.root / "acme" / "w" / part["name"])
    from pyarrow import parquet

    assert str(parquet.read_schema(path).field("n").type) == "decimal128(20, 2)"


@pytest.mark.integration
def test_a_text_that_postgres_refuses_is_named_by_its_column(pair, tmp_path):
    engine = Engine(SqliteSource(None, tmp_path), DESTINATIONS["postgres"](pair, None), tmp_path)
    engine.source.create("orders", ORDERS)
    engine.source.insert("orders", [(1, NOW, "PRIVATE\x00text")])
    with pytest.raises(ConfigError, match="does not fit its column") as caught:
        engine.sync(engine.spec("orders", "replace"))
    assert "PRIVATE" not in str(caught.value)
    assert json.dumps(engine.destination.rows("orders")) == "null"


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["files-jsonl", "files-parquet"])
@pytest.mark.parametrize("case", [
    ("int", "numeric", "2.0", "1.5"), ("real", "double precision", "0.5", "0.1"),
], ids=lambda case: case[0])  # fmt: skip
def test_an_ignored_finer_type_rounds_nothing(shared_pair, tmp_path, kind, case):
    old, new, fits, rounded = case
    root = tmp_path / "root"
    root.mkdir()
    engine = Engine(PostgresSource(shared_pair, root), DESTINATIONS[kind](None, root), root)
    table = f"{old}_{kind.removeprefix('files-')}"
    shared_pair.source(f"CREATE TABLE {table} (id int PRIMARY KEY, v {old})")
    spec = engine.spec(table, "merge", cursor=None, drift="ignore")
    engine.sync(spec)
    shared_pair.source(
        f"ALTER TABLE {table} ALTER v TYPE {new}",
        f"INSERT INTO {table} VALUES (1, {fits}), (2, NULL), (3, 'NaN')"
        if old == "real"
        else f"INSERT INTO {table} VALUES (1, {fits}), (2, NULL)",
    )
    engine.sync(spec)
    before = engine.destination.rows(table)
    assert float(dict(before)["1"]) == float(fits)
    shared_pair.source(f"INSERT INTO {table} VALUES (4, {rounded})")
    with pytest.raises(ConfigError, match="of the files would round"):
        engine.sync(spec)
    assert engine.destination.rows(table) == before
