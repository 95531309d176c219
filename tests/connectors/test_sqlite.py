"""SQLite as a source: values that do not fit, windows, hostile files. Pairs: conformance/."""

import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from connectors import registry
from connectors.sqlite.values import sql_type
from schemas.errors import ConfigError, SyncwardError, TransientError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.connectors.conformance.ends import policy


class File:
    """One SQLite file and the connector on it."""

    def __init__(self, root) -> None:
        self.root = root
        self.path = root / "shop.db"

    def act(self, *statements: str, **named: object) -> None:
        with closing(sqlite3.connect(self.path)) as db, db:
            for statement in statements:
                db.execute(statement, named)

    def open(self):
        return registry.open_source("sqlite", {"path": "shop.db"}, {}, policy(self.root))

    def read(self, table, since=None, **spec):
        """Return (rows, batch) of one read."""
        stream = StreamSpec(name=f"main.{table}", **{"mode": "replace", **spec})
        with (
            closing(self.open()) as source,
            source.extract(stream, since, WireFormat.ROWS) as batches,
        ):
            (batch,) = batches
            return [row for group in batch.groups for row in group.rows], batch


@pytest.fixture
def file(tmp_path):
    return File(tmp_path)


# ── values ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("declared", "type_"),
    [
        ("INTEGER", "bigint"), ("unsigned big int", "bigint"), ("VARCHAR(20)", "text"),
        ("NVARCHAR(5)", "text"), ("FLOAT", "double precision"), ("DECIMAL(10,5)", "numeric(10,5)"),
        ("DECIMAL", "numeric"), ("numeric ( 4 )", "numeric(4,0)"), ("BOOLEAN", "boolean"),
        ("DATETIME", "timestamp without time zone"),
        ("TIMESTAMP(3)", "timestamp without time zone"),
        ("timestamp  with time zone", "timestamp with time zone"), ("BLOB", "bytea"), ("", "text"),
        ("POINT", "bigint"), ("MONEY", "text"), ("DECIMAL(3,9)", "numeric"),
    ],
)  # fmt: skip
def test_declared_types_mean_what_sqlite_and_people_mean(declared, type_):
    assert sql_type(declared)[0] == type_


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INTEGER", "'abc'"), ("BOOLEAN", "2"), ("BOOLEAN", "'t'"), ("DATE", "'2026-02-30'"),
        ("DATE", "19000"), ("DATE", "'02/03/2026'"), ("TIME", "'25:00'"),
        ("DATETIME", "1700000000"),
        ("DATETIME", "'2026-01-01T00:00:00Z'"), ("DATETIME", "'2026-01-01 00:00:00.1234567'"),
        ("TIMESTAMPTZ", "'2026-01-01 00:00:00'"), ("TEXT", "x'ff'"), ("BLOB", "'text'"),
        ("DECIMAL(4,2)", "123.4"), ("DECIMAL(4,2)", "1.234"), ("DECIMAL", "'12a'"),
        ("DOUBLE", "'x'"), ("UUID", "'1234'"), ("JSON", "x'00'"), ("TEXT", "cast(x'ff' as text)"),
        ("BLOB", "cast(x'ff' as text)"), ("MONEY", "x'00'"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named_by_its_place_and_not_shown(file, declared, value):
    file.act(f"CREATE TABLE t (a INTEGER PRIMARY KEY, odd {declared})")
    file.act("INSERT INTO t VALUES (1, NULL)", f"INSERT INTO t VALUES (77, {value})")
    with pytest.raises(ConfigError) as caught:
        file.read("t")
    assert "main.t: column odd of the row with rowid 77 holds" in str(caught.value)
    assert caught.value.code == "data_refused"
    shown = value.strip("'x()")
    assert len(shown) < 4 or shown not in str(caught.value)


def test_values_of_the_common_forms_are_read(file):
    file.act(
        "CREATE TABLE t (d DECIMAL(10,2), n NUMERIC, r REAL, u UUID, z TIMESTAMPTZ, ts DATETIME, "
        "anything, j JSON)",
        "INSERT INTO t VALUES (10.1, 0.1, 3, x'00112233445566778899aabbccddeeff', "
        "'2026-01-01T01:00:00+01:00', '2026-01-01', 5, 5)",
    )
    ((d, n, r, u, z, ts, anything, j),), _ = file.read("t")
    assert (d, str(d), n, r) == (Decimal("10.10"), "10.10", Decimal("0.1"), 3.0)
    assert str(u) == "00112233-4455-6677-8899-aabbccddeeff"
    assert (z, ts) == (
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None),
    )
    assert (anything, j) == ("5", "5")


def test_a_row_of_a_view_or_without_a_rowid_is_named_by_its_number(file):
    file.act(
        "CREATE TABLE w (k TEXT PRIMARY KEY, n INTEGER) WITHOUT ROWID",
        "INSERT INTO w VALUES ('a', 1), ('b', 'x')",
        "CREATE VIEW v AS SELECT * FROM w",
    )
    for name in ("w", "v"):
        with pytest.raises(ConfigError, match=f"main.{name}: column n of row 2 of the read"):
            file.read(name)


def test_columns_named_like_the_rowid_hide_nothing(file):
    file.act(
        "CREATE TABLE t (rowid TEXT, oid TEXT, n INTEGER)", "INSERT INTO t VALUES ('a', 'b', 'x')"
    )
    with pytest.raises(ConfigError, match="rowid 1"):
        file.read("t")
    file.act('CREATE TABLE q ("a""b; --" TEXT, "select" TEXT)', "INSERT INTO q VALUES ('1', '2')")
    assert file.read("q")[0] == [("1", "2")]


def test_generated_columns_and_strict_tables_are_read(file):
    file.act(
        "CREATE TABLE s (id INTEGER PRIMARY KEY, a TEXT, b TEXT AS (upper(a)), c ANY) STRICT",
        "INSERT INTO s (id, a, c) VALUES (1, 'x', 2.5)",
    )
    assert file.read("s")[0] == [(1, "x", "X", "2.5")]


def test_only_proven_keys_are_taken_for_proven(file):
    file.act(
        "CREATE TABLE a (k TEXT PRIMARY KEY)",  # may hold NULL, and twice
        "CREATE TABLE b (k TEXT NOT NULL UNIQUE, n INTEGER)",
        "CREATE TABLE c (k TEXT PRIMARY KEY) WITHOUT ROWID",
        "CREATE TABLE d (k INTEGER NOT NULL)",
        "CREATE UNIQUE INDEX half ON d (k) WHERE k > 0",
        "CREATE UNIQUE INDEX lowered ON b (lower(k))",
    )
    proven = {t: file.read(t, key=("k",))[1].shape.key_is_unique for t in "abcd"}
    assert proven == {"a": False, "b": True, "c": True, "d": False}


# ── windows ──────────────────────────────────────────────────────────────────────────────────


def test_append_by_the_primary_key_brings_what_is_new(file):
    file.act("CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, v TEXT)")
    spec = {"mode": "append", "cursor": "id"}
    rows, batch = file.read("t", **spec)
    assert (rows, batch.upper, batch.full) == ([], None, True)
    file.act("INSERT INTO t (v) VALUES ('a'), ('b')")
    rows, batch = file.read("t", **spec)
    assert [r[0] for r in rows] == [1, 2]
    assert batch.notes == ()
    file.act("DELETE FROM t WHERE id = 2", "INSERT INTO t (v) VALUES ('c')")
    rows, batch = file.read("t", batch.upper, **spec)
    assert [r[0] for r in rows] == [3]
    assert not batch.full


def test_numbers_that_are_given_out_again_are_said_to_be(file):
    file.act("CREATE TABLE t (id INTEGER PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    assert "inexact" in file.read("t", mode="append", cursor="id")[1].notes[0]


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S.%fZ", "%Y-%m-%d %H:%M:%S+02:00"]
)
def test_a_merge_begins_a_little_before_the_newest_time(file, form):
    declared = "TIMESTAMPTZ" if form[-1] in "Z0" else "DATETIME"
    file.act(f"CREATE TABLE t (id INTEGER PRIMARY KEY, changed {declared})")
    then = datetime.now(UTC) - timedelta(days=2)

    def add(row_id, at):
        shown = at + timedelta(hours=2) if "+02" in form else at
        file.act("INSERT INTO t VALUES (:i, :c)", i=row_id, c=shown.strftime(form))

    for i in range(5):
        add(i, then - timedelta(hours=i))
    spec = {"mode": "merge", "key": ("id",), "cursor": "changed"}
    rows, batch = file.read("t", **spec)
    assert (len(rows), batch.full) == (5, True)
    add(10, then - timedelta(seconds=30))  # committed late
    add(11, datetime.now(UTC) + timedelta(days=300))  # a clock that is ahead
    rows, batch = file.read("t", batch.upper, **spec)
    assert sorted(r[0] for r in rows) == [0, 10, 11]
    add(12, datetime.now(UTC))
    assert 12 in [r[0] for r in file.read("t", batch.upper, **spec)[0]]


def test_an_append_by_time_ends_a_little_before_now(file):
    file.act("CREATE TABLE t (id INTEGER, at TIMESTAMPTZ)")
    spec = {"mode": "append", "cursor": "at", "settle": "1s"}
    file.act("INSERT INTO t VALUES (1, :c)", c=datetime.now(UTC).isoformat())
    rows, batch = file.read("t", **spec)
    assert rows == []
    time.sleep(1.1)
    rows, batch = file.read("t", batch.upper, **spec)
    assert [r[0] for r in rows] == [1]
    assert file.read("t", batch.upper, **spec)[0] == []


@pytest.mark.parametrize(("declared", "value"), [
    ("DATETIME", "'2026-01-01'"), ("INTEGER", "7"), ("TEXT", "'m'"),
])  # fmt: skip
def test_rows_without_a_cursor_value_come_with_every_window(file, declared, value):
    file.act(
        f"CREATE TABLE t (id INTEGER PRIMARY KEY, at {declared})",
        f"INSERT INTO t VALUES (1, {value})",
    )
    spec = {"mode": "merge", "key": ("id",), "cursor": "at"}
    _, batch = file.read("t", **spec)
    file.act("INSERT INTO t VALUES (2, NULL)")
    assert 2 in [row[0] for row in file.read("t", batch.upper, **spec)[0]]


def test_a_time_that_is_none_ends_every_read(file):
    file.act("CREATE TABLE t (id INTEGER, at DATETIME)", "INSERT INTO t VALUES (1, '2026-01-01')")
    spec = {"mode": "merge", "key": ("id",), "cursor": "at"}
    _, batch = file.read("t", **spec)
    file.act("INSERT INTO t VALUES (2, 'yesterday')")
    with pytest.raises(ConfigError, match="rowid 2"):
        file.read("t", batch.upper, **spec)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ({"mode": "append", "cursor": "xmin"}, "SQLite has no xmin"),
        ({"mode": "append", "cursor": "v"}, "append by v could miss rows"),
        ({"mode": "append", "cursor": "day"}, "miss the rest of the day"),
        ({"mode": "merge", "key": ("id",), "cursor": "raw"}, "has no order here"),
        ({"mode": "merge", "key": ("nope",)}, "no key column nope"),
    ],
)
def test_what_cannot_be_read_by_is_refused(file, spec, match):
    file.act("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT, day DATE, raw BLOB)")
    with pytest.raises(ConfigError, match=match):
        file.read("t", **spec)


def test_text_and_number_cursors_read_the_largest_again(file):
    file.act(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT COLLATE NOCASE, n INTEGER)",
        "INSERT INTO t VALUES (1, 'B', 9), (2, 'a', 10)",
    )
    for cursor, largest in (("v", "a"), ("n", "10")):
        spec = {"mode": "merge", "key": ("id",), "cursor": cursor}
        _, batch = file.read("t", **spec)
        assert batch.upper["value"] == largest
        assert [r[0] for r in file.read("t", batch.upper, **spec)[0]] == [2]


# ── files ────────────────────────────────────────────────────────────────────────────────────


def test_the_session_can_do_nothing_but_read(file):
    file.act("CREATE TABLE t (id INTEGER)")
    with closing(file.open()) as source:
        for statement in (
            "INSERT INTO t VALUES (1)",
            "ATTACH '/tmp/other.db' AS other",
            "SELECT load_extension('x')",
            "PRAGMA query_only = OFF",
            "PRAGMA writable_schema = ON",
            "VACUUM INTO '/tmp/copy.db'",
        ):
            with pytest.raises(sqlite3.DatabaseError):
                source._conn.execute(statement).fetchall()
    assert file.read("t")[0] == []


def test_what_is_no_database_is_said_to_be(file):
    file.path.write_bytes(b"PRIVATE" * 1_000)
    with pytest.raises(ConfigError, match="is no SQLite database") as caught:
        file.read("t")
    assert str(file.root) not in str(caught.value)
    file.path.unlink()
    with pytest.raises(ConfigError, match="no such file") as caught:
        file.read("t")
    assert str(file.root) not in str(caught.value)


def test_a_writer_that_holds_the_file_is_waited_for_later(file):
    file.act("CREATE TABLE t (id INTEGER)")
    with closing(sqlite3.connect(file.path, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        with pytest.raises(TransientError) as caught:
            file.read("t")
        assert time.monotonic() - began < 2
    assert caught.value.code == "lock_timeout"


def test_a_read_sees_one_state_while_others_write(file):
    file.act("PRAGMA journal_mode = WAL", "CREATE TABLE t (id INTEGER)", "INSERT INTO t VALUES (1)")
    with (
        closing(file.open()) as source,
        source.extract(StreamSpec(name="main.t", mode="replace"), None, WireFormat.ROWS) as batches,
    ):
        (batch,) = batches
        file.act("INSERT INTO t VALUES (2)")
        assert [row for group in batch.groups for row in group.rows] == [(1,)]


def test_a_missing_table_is_named_with_how_to_find_the_others(file):
    file.act("CREATE TABLE t (id INTEGER)")
    for name in ("main.nope", "public.t", "main.T"):
        stream = StreamSpec(name=name, mode="replace")
        with (
            closing(file.open()) as source,
            pytest.raises(SyncwardError, match="discover"),
            source.extract(stream, None, WireFormat.ROWS),
        ):
            pass


def test_test_and_discover_answer_what_people_need(file):
    file.act(
        "CREATE TABLE orders (id INTEGER PRIMARY KEY, updated_at TIMESTAMP NOT NULL, x MONEY)",
        "INSERT INTO orders VALUES (7, '2026-01-01', 1)",
        "CREATE VIEW few AS SELECT * FROM orders",
    )
    with closing(file.open()) as source:
        report = source.test()
        found = {s.name: s for s in source.discover()}
    assert report.server_version.startswith("SQLite 3.")
    assert "journal_mode = WAL" in report.missing[0]
    assert list(found) == ["main.few", "main.orders"]
    orders = found["main.orders"]
    assert orders.suggestion == "{mode: merge, key: [id], cursor: updated_at}"
    assert orders.cursors == ("updated_at", "id")
    assert orders.rows_estimated == 7
