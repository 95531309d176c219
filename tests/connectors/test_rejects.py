"""Rows that the destination refuses: the others are loaded, these are kept with key and reason."""

import sqlite3
import threading
from contextlib import closing
from hashlib import sha256
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from connectors import masking, registry
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, ReadAgain, TransientError
from schemas.records import LoadRequest, Ranges, StreamClaim, StreamResult, WireFormat
from schemas.streams import StreamSpec
from tests.connectors.conformance.ends import policy
from tests.connectors.typed import Ends
from tests.world import Pair

pytestmark = pytest.mark.integration

MERGE = {"mode": "merge", "key": ("id",)}


class Mover(Ends):
    """Moves a stream as a run does: reads once more where it is told to."""

    wire = WireFormat.PG_BINARY
    ranges = False
    stops_before: int | None = None

    def open_source(self, kind: str, config: dict[str, str], links: LinkPolicy) -> None:
        """Read from something else from now on."""
        self._source.close()
        self._source = registry.open_source(kind, config, {}, links)

    def sync(self, table: str, *, schema: str = "public", **spec) -> StreamResult:
        stream = StreamSpec(name=f"{schema}.{table}", **spec)
        self.fence += 1
        self.reads = self.kept_ranges = 0
        self.request = LoadRequest(self.connection_id, uuid4(), 1, self.fence, stream, "acme")
        return self.attempt()

    def attempt(self) -> StreamResult:
        while True:
            known = self.claimed()
            self.reads += 1
            try:
                return self._move(known)
            except ReadAgain as reason:
                if not reason.same:
                    raise

    def _move(self, known: StreamClaim) -> StreamResult:
        stream = self.request.stream
        sweep = known.loaded_before and (known.cursor is None or known.sweep_due)
        ranges = Ranges(stream.range_rows, known.kept) if self.ranges else None
        with self._source.extract(
            stream, known.cursor, self.wire, sweep=sweep, ranges=ranges
        ) as batches:
            for batch in batches:
                masked = masking.masked(
                    batch, stream, lambda v: sha256(v).hexdigest()[:32].encode()
                )
                if batch.part is None or batch.part.is_end:
                    return self._destination.load(self.request, masked)
                if batch.part.n == self.stops_before:
                    raise TransientError("the link was lost")
                assert known.keep is not None
                known.keep(masked)
                self.kept_ranges += 1
        raise AssertionError("no batch")

    def claimed(self) -> StreamClaim:
        return self._destination.claim_stream(self.request)

    def cancel(self) -> None:
        self._destination.cancel()

    def kept(self) -> list[tuple[Any, ...]]:
        return self.rows(
            "destination",
            "SELECT key, sqlstate, reason, constraint_name, column_name, rows, loads "
            "FROM _syncward.rejected_rows ORDER BY stream, key",
        )

    def there(self, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
        return sorted(self.rows("destination", f"SELECT {columns} FROM acme.{table}"))


def mover_of(pair: Pair) -> Mover:
    roles = ("source", "destination")
    return Mover(
        {role: pair.connect(role) for role in roles},
        {role: pair.config(role) for role in roles},
        {role: pair.secret(role) for role in roles},
    )


@pytest.fixture
def ends(pair):
    with closing(mover_of(pair)) as made:
        yield made


def make(ends, *statements: str) -> None:
    ends.run("source", "SET search_path = public", *statements, "SET search_path = pg_catalog")
    ends.run("source", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")


def test_a_row_that_a_check_refuses_is_kept_and_the_others_are_loaded(ends):
    make(
        ends,
        "CREATE TABLE t (id int PRIMARY KEY, v int)",
        "INSERT INTO t SELECT n, n FROM generate_series(1, 2000) AS n",
    )
    spec = {**MERGE, "cursor": "xmin", "rejected_max": 2}
    ends.sync("t", **spec)
    ends.run("destination", "ALTER TABLE acme.t ADD CONSTRAINT small CHECK (v < 5000)")
    make(ends, "UPDATE t SET v = v + 1", "UPDATE t SET v = 9999 WHERE id IN (7, 1500)")
    result = ends.sync("t", **spec)
    assert (result.rows_extracted, result.rows_rejected, result.rows_updated) == (2000, 2, 1998)
    assert ends.reads == 2
    assert [(row.key, row.reason) for row in result.rejected] == [
        ('{"id": "1500"}', "a check refuses it"),
        ('{"id": "7"}', "a check refuses it"),
    ]
    assert ends.kept() == [
        ({"id": "1500"}, "23514", "a check refuses it", "small", None, 1, 1),
        ({"id": "7"}, "23514", "a check refuses it", "small", None, 1, 1),
    ]
    told = ends.claimed().result  # an attempt whose worker died then: the next one tells it
    assert told is not None
    assert told.rejected == result.rejected
    assert ends.there("t", "v")[-1] == (2001,)
    assert (7, 7) in ends.there("t", "id, v"), "the older version stays"

    make(ends, "UPDATE t SET v = 8 WHERE id = 7")  # its source row changes: it is tried again
    result = ends.sync("t", **spec)
    assert (result.rows_updated, result.rows_rejected, ends.reads) == (1, 0, 1)
    assert [key for key, *_ in ends.kept()] == [{"id": "1500"}]


def test_more_than_are_allowed_fail_the_stream_and_nothing_is_kept(ends):
    make(ends, "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (1, 1)")
    ends.sync("t", **MERGE)
    ends.run("destination", "ALTER TABLE acme.t ADD CONSTRAINT small CHECK (v < 5000)")
    make(ends, "INSERT INTO t SELECT n, n * 1000 FROM generate_series(2, 9) AS n")
    with pytest.raises(ConfigError, match=r"constraint acme\.t \(small\) refuses") as caught:
        ends.sync("t", **MERGE)
    assert caught.value.code == "constraint"
    with pytest.raises(ConfigError, match=r"allows \(4\): a check refuses it") as caught:
        ends.sync("t", **MERGE, rejected_max=4)
    assert caught.value.code == "rows_rejected"
    assert ends.there("t", "id") == [(1,)]
    assert ends.kept() == []
    assert ends.sync("t", **MERGE, rejected_max=5).rows_rejected == 5


def test_what_copy_refuses_is_left_out_also_of_a_first_load(ends):
    """A domain of the destination's own, in the binary relay: named by its line."""
    make(
        ends,
        "CREATE DOMAIN public.small AS int",
        "CREATE TABLE t (id int, part text, v public.small, PRIMARY KEY (id, part))",
        "INSERT INTO t SELECT n, 'p', n FROM generate_series(1, 5000) AS n",
        "UPDATE t SET v = 100000 WHERE id IN (1, 1000, 1001, 5000)",
    )
    ends.run("destination", "CREATE DOMAIN public.small AS int CHECK (VALUE < 99999)")
    spec = {"mode": "replace", "rejected_max": "0.1%"}
    result = ends.sync("t", **spec)
    assert (result.rows_inserted, result.rows_rejected) == (4996, 4)
    assert (ends.reads, len(ends.there("t"))) == (2, 4996)
    assert ends.kept()[0] == (
        {"id": "1", "part": "p"},
        "23514",
        "a check refuses it",
        "small_check",
        "v",
        1,
        1,
    )
    make(
        ends, "UPDATE t SET v = 2 WHERE id IN (1000, 1001)", "UPDATE t SET v = 100000 WHERE id = 3"
    )
    make(ends, "DELETE FROM t WHERE id = 5000")
    result = ends.sync("t", **spec)
    assert (result.rows_inserted, result.rows_rejected, result.rows_deleted) == (2, 2, 0)
    assert ends.reads == 1, "one that had rejected rows is read carefully at once"
    assert (3, "p", 3) in ends.there("t", "id, part, v"), "its older version is not gone"
    assert [(key["id"], loads) for key, *_, loads in ends.kept()] == [("1", 2), ("3", 1)]
    with pytest.raises(ConfigError, match=r"allows \(0\.01%\): a check refuses it \(column v, "):
        ends.sync("t", mode="replace", rejected_max="0.01%")


def test_a_table_without_a_key_and_an_append_leave_out_what_is_refused(ends):
    make(
        ends,
        "CREATE TABLE bag (v int, w text)",
        "INSERT INTO bag VALUES (1, 'a'), (1, 'a'), (2, 'b')",
    )
    for mode in ({"mode": "replace"}, {"mode": "append", "cursor": "xmin"}):
        ends.sync("bag", **mode)
        ends.run("destination", "ALTER TABLE acme.bag ADD CONSTRAINT small CHECK (v < 9)")
        make(ends, "INSERT INTO bag VALUES (10, 'c'), (10, 'c'), (11, 'd'), (3, 'e')")
        result = ends.sync("bag", **mode, rejected_max=3)
        assert (result.rows_inserted, result.rows_rejected) == (1, 3)
        assert ends.there("bag", "v")[-1] == (3,)
        assert sorted((key, rows) for key, *_, rows, _ in ends.kept()) == [(None, 1), (None, 2)]
        make(ends, "DELETE FROM bag WHERE v >= 10")
        assert ends.sync("bag", **mode, rejected_max=3).rows_rejected == 0
        ends.run("destination", "DROP TABLE acme.bag", "TRUNCATE _syncward.state CASCADE")
        make(ends, "DELETE FROM bag WHERE v = 3")


def test_rows_that_depend_on_each_other_are_not_taken_for_bad_ones(ends):
    """A reference to a row that comes later in the batch, and a unique value that moves."""
    make(
        ends,
        "CREATE TABLE t (id int PRIMARY KEY, parent int, v int, w text)",
        # the longest chain: each row refers to the one that comes after it
        "INSERT INTO t SELECT n, n + 1, n, repeat('x', 900) FROM generate_series(1, 299) AS n",
        "INSERT INTO t VALUES (300, NULL, 300, '')",
    )
    ends.sync("t", **MERGE)
    ends.run(
        "destination",
        "TRUNCATE acme.t",
        "ALTER TABLE acme.t ADD FOREIGN KEY (parent) REFERENCES acme.t "
        "DEFERRABLE INITIALLY DEFERRED, ADD CHECK (v <> 150)",
    )
    # 150 is refused, so 149 and all that lead to it lack their parent
    with pytest.raises(ConfigError, match="the row that it refers to is not there"):
        ends.sync("t", **MERGE, rejected_max=20)
    result = ends.sync("t", **MERGE, rejected_max=150)
    assert (result.rows_inserted, result.rows_rejected) == (150, 150)
    make(ends, "UPDATE t SET v = 151 WHERE id = 150")
    assert ends.sync("t", **MERGE, rejected_max=150).rows_inserted == 150
    assert ends.kept() == []


def test_a_trigger_that_refuses_every_row_is_asked_no_more_often_than_needed(ends):
    make(
        ends,
        "CREATE TABLE t (id int PRIMARY KEY)",
        "INSERT INTO t SELECT n FROM generate_series(1, 3000) AS n",
    )
    ends.sync("t", **MERGE)
    ends.run(
        "destination",
        "TRUNCATE acme.t",
        "CREATE SEQUENCE public.asked",
        "GRANT ALL ON SEQUENCE public.asked TO writer",
        "CREATE FUNCTION public.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM nextval('public.asked'); RAISE 'no % here', NEW.id USING ERRCODE = 'SY999', "
        "CONSTRAINT = NEW.id::text, COLUMN = 'secret'; END $$",
        "CREATE TRIGGER no BEFORE INSERT ON acme.t FOR EACH ROW EXECUTE FUNCTION public.no()",
    )
    with pytest.raises(ConfigError, match="a trigger or function refuses it") as caught:
        ends.sync("t", **MERGE, rejected_max=10)
    assert caught.value.code == "rows_rejected"
    assert "secret" not in caught.value.public
    ((asked,),) = ends.rows("destination", "SELECT last_value FROM public.asked")
    assert asked < 60


@pytest.mark.parametrize("wire", WireFormat)
def test_what_cannot_be_read_here_is_left_out_by_every_wire(ends, wire):
    """A label that the destination lacks, and text that is no value of a type of its own."""
    for role in ("source", "destination"):
        labels = "'a', 'b', 'new'" if role == "source" else "'a', 'b'"
        low = "numeric" if role == "source" else "smallint"
        ends.run(
            role,
            f"CREATE TYPE public.mood AS ENUM ({labels})",
            f"CREATE TYPE public.pair AS (low {low}, high text)",
        )
    make(
        ends,
        "CREATE TABLE t (id int PRIMARY KEY, m public.mood, p public.pair)",
        "INSERT INTO t VALUES (1, 'a', NULL), (2, 'new', NULL), (3, 'b', (70000, 'x')), "
        "(4, NULL, (7, 'y'))",
        "CREATE TABLE k (m public.mood PRIMARY KEY, v int)",
        "INSERT INTO k VALUES ('a', 1), ('new', 2)",
        "CREATE TABLE c (p public.pair PRIMARY KEY, v int)",
        "INSERT INTO c VALUES ((1, 'x'), 1), ((70000, 'y'), 2)",
    )
    ends.wire = wire
    spec = {**MERGE, "deletes": "hard", "rejected_max": 2}
    for _ in range(2):
        result = ends.sync("t", **spec)
        assert (result.rows_loaded, result.rows_rejected, result.rows_deleted) == (2, 2, 0)
        assert ends.there("t", "id") == [(1,), (4,)]
    assert [(key, state) for key, state, *_ in ends.kept()] == [
        ({"id": "2"}, "22P02"),
        ({"id": "3"}, "22003"),
    ]
    make(ends, "UPDATE t SET p = (1, 'z') WHERE id = 3", "UPDATE t SET m = 'new' WHERE id = 1")
    result = ends.sync("t", **spec)
    assert (result.rows_inserted, result.rows_rejected, result.rows_deleted) == (1, 2, 0)
    assert ends.there("t", "id, m") == [(1, "a"), (3, "b"), (4, None)], "the older 1 is kept"
    # a key that cannot be read is shown as it came
    for table, key in (("k", {"m": "new"}), ("c", {"p": "(70000,y)"})):
        ends.run("destination", "DELETE FROM _syncward.rejected_rows")
        assert ends.sync(table, mode="replace", rejected_max=1).rows_rejected == 1
        assert [row[0] for row in ends.kept()] == [key]
        assert ends.sync(table, mode="replace", rejected_max=1).rows_deleted == 0


def test_rows_that_are_gone_or_deleted_do_not_stay_rejected(ends):
    """By a sweep of the keys, and by a tombstone; a rejected row is not taken for a gone one."""
    make(
        ends,
        "CREATE TABLE t (id int PRIMARY KEY, v int, dead bool)",
        "INSERT INTO t SELECT n, n, false FROM generate_series(1, 9) AS n",
    )
    spec = {**MERGE, "cursor": "xmin", "tombstone": "dead", "key_sweep": 1, "rejected_max": 4}
    for deletes in ("soft", "hard"):
        ends.sync("t", **spec, deletes=deletes)
        ends.run("destination", "ALTER TABLE acme.t ADD CHECK (v < 100)")
        make(
            ends,
            "UPDATE t SET v = 100 + id WHERE id IN (1, 2, 3)",
            "INSERT INTO t VALUES (10, 999)",
        )
        result = ends.sync("t", **spec, deletes=deletes)
        assert (result.rows_rejected, result.rows_deleted) == (4, 0)
        assert ends.sync("t", **spec, deletes=deletes).rows_deleted == 0
        assert ends.there("t", "id, v")[:3] == [(1, 1), (2, 2), (3, 3)]
        # one is gone, one says so, one is mended
        make(ends, "DELETE FROM t WHERE id = 1", "UPDATE t SET v = 2, dead = true WHERE id = 2")
        make(ends, "UPDATE t SET v = 3 WHERE id = 3")
        result = ends.sync("t", **spec, deletes=deletes)
        assert (result.rows_deleted, result.rows_rejected) == (2, 0)
        assert [row[0] for row in ends.kept()] == [{"id": "10"}]
        ends.run("destination", "DROP TABLE acme.t", "TRUNCATE _syncward.state CASCADE")
        make(ends, "UPDATE t SET dead = false", "DELETE FROM t WHERE id = 10")
        make(ends, "INSERT INTO t VALUES (1, 1)")


def test_keys_too_long_for_an_index_and_text_that_is_none(ends):
    make(
        ends,
        "CREATE TABLE t (id text, n int)",
        "INSERT INTO t SELECT n::text, n FROM generate_series(1, 50) AS n",
        "INSERT INTO t SELECT string_agg(sha512(n::text::bytea)::text, ''), 51 "
        "FROM generate_series(1, 90) AS n",
    )
    result = ends.sync("t", mode="merge", key=("id",), rejected_max=1)
    assert (result.rows_inserted, result.rows_rejected) == (50, 1)
    ((key, state, reason, *_),) = ends.kept()
    assert (len(key["id"]), state, reason) == (90 * 130, "54000", "it is too long for an index")
    assert len(result.rejected[0].key) == 200
    assert ends.sync("t", mode="merge", key=("id",), rejected_max=1).rows_unchanged == 50


def test_keys_are_masked_there_too(ends):
    make(
        ends,
        "CREATE TABLE t (mail text PRIMARY KEY, name text, v int)",
        "INSERT INTO t VALUES ('ann@x', 'Ann', 1), ('bob@x', 'Bob', 2)",
    )
    spec = {
        "mode": "merge",
        "key": ("mail",),
        "mask": {"mail": "hmac", "name": "redact"},
        "rejected_max": 1,
    }
    ends.sync("t", **spec)
    ends.run("destination", "ALTER TABLE acme.t ADD CHECK (v < 9)")
    make(ends, "UPDATE t SET v = 10 WHERE mail = 'ann@x'")
    (row,) = ends.sync("t", **spec).rejected
    token = sha256(b"ann@x").hexdigest()[:32]
    assert row.key == f'{{"mail": "{token}"}}'
    ((whole,),) = ends.rows("destination", "SELECT r::text FROM _syncward.rejected_rows r")
    assert "ann" not in whole.lower()


def test_rows_that_repeat_a_key_are_kept_with_the_rejected_ones(ends):
    make(
        ends,
        "CREATE TABLE t (id int, v int)",
        "INSERT INTO t VALUES (1, 1), (1, 2), (1, 3), (2, 4)",
    )
    spec = {**MERGE, "guards": {"duplicate_keys": False}}
    for loads in (1, 2):
        result = ends.sync("t", **spec)
        assert (result.rows_rejected, result.rows_loaded) == (2, 2)
        repeats = "another row of the batch has the same key"
        assert ends.kept() == [({"id": "1"}, "23505", repeats, None, None, 2, loads)]
    make(ends, "DELETE FROM t WHERE v < 3")
    assert ends.sync("t", **spec).rows_rejected == 0
    assert ends.kept() == []


def test_rows_without_a_key_are_rejected(ends):
    make(
        ends,
        "CREATE TABLE t (a int, b text, v int)",
        "INSERT INTO t VALUES (1, 'x', 1), (NULL, 'x', 2), (NULL, 'x', 3), (2, NULL, 4)",
    )
    spec = {"mode": "merge", "key": ("a", "b"), "deletes": "hard"}
    for said in ("a column would be NULL", r"key \(a, b\) is no key: 1 values repeat, 3 rows"):
        with pytest.raises(ConfigError, match=said):
            ends.sync("t", **spec)
        with pytest.raises(ConfigError, match=r"allows \(2\): its key may not be NULL"):
            ends.sync("t", **spec, rejected_max=2)
        result = ends.sync("t", **spec, rejected_max=3)
        assert (result.rows_loaded, result.rows_rejected, result.rows_deleted) == (1, 3, 0)
        assert [(row[0], row[5]) for row in ends.kept()] == [
            ({"a": None, "b": "x"}, 2),
            ({"a": "2", "b": None}, 1),
        ]
    make(ends, "DELETE FROM t WHERE a IS NULL", "UPDATE t SET b = 'y' WHERE a = 2")
    assert ends.sync("t", **spec).rows_inserted == 1
    assert ends.kept() == []


def test_rejected_rows_of_all_ranges_of_a_large_read_count_together(ends):
    ends.run("destination", "CREATE DOMAIN public.small AS int CHECK (VALUE < 9999)")
    make(
        ends,
        "CREATE DOMAIN public.small AS int",
        "CREATE TABLE t (id int PRIMARY KEY, v public.small)",
        "INSERT INTO t SELECT n, n FROM generate_series(1, 1000) AS n",
        "ANALYZE t",
    )
    ends.ranges = True
    spec = {**MERGE, "deletes": "hard", "range_rows": 100}
    ends.sync("t", **spec, rejected_max=3)
    make(ends, "UPDATE t SET v = 10000 WHERE id IN (5, 6, 900, 901)", "VACUUM ANALYZE t")
    ends.stops_before = 7
    with pytest.raises(TransientError):
        ends.sync("t", **spec, rejected_max=4)
    assert len(ends.kept()) == 2
    assert ends.there("t", "max(v)") == [(1000,)]
    ends.stops_before = None
    result = ends.attempt()
    assert (result.rows_extracted, result.rows_rejected, result.rows_deleted) == (1000, 4, 0)
    assert (ends.reads, ends.kept_ranges) == (3, 10), "only the range that was refused came twice"
    assert {row.key for row in result.rejected} == {f'{{"id": "{n}"}}' for n in (5, 6, 900, 901)}
    assert ends.there("t", "count(*), max(v)") == [(1000, 1000)]
    with pytest.raises(ConfigError, match=r"allows \(3\)"):
        ends.sync("t", **spec, rejected_max=3)
    assert ends.sync("t", **spec, rejected_max=4).rows_rejected == 4
    assert [loads for *_, loads in ends.kept()] == [2, 2, 2, 2]
    # a first load, with a key that is too long for some: the hidden table cannot become it
    make(ends, "UPDATE t SET v = 7 WHERE id > 5")
    ends.run("destination", "DROP TABLE acme.t")
    result = ends.sync("t", **spec, rejected_max=4)
    assert (result.rows_inserted, result.rows_rejected) == (999, 1)
    assert [row[0] for row in ends.kept()] == [{"id": "5"}]
    assert ends.rows(
        "destination", "SELECT tablename FROM pg_tables WHERE schemaname = 'acme'"
    ) == [("t",)]


def test_characters_that_the_destination_lacks_and_columns_that_are_narrower_here(pair, admin):
    name = f"latin_{pair.names['destination']}"
    admin.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    admin.execute(f"GRANT CREATE ON DATABASE {name} TO writer")
    pair.names["destination"] = name
    with closing(mover_of(pair)) as ends:
        make(
            ends,
            "CREATE TABLE t (id text PRIMARY KEY, v varchar(9))",
            "INSERT INTO t VALUES ('good', 'é'), ('bad', '5 €'), ('k€y', 'c')",
        )
        spec: dict[str, Any] = {"mode": "merge", "key": ("id",), "rejected_max": 3}
        result = ends.sync("t", **spec)
        assert (result.rows_inserted, result.rows_rejected) == (1, 2)
        why = "a value does not fit its column"
        assert ends.kept() == [
            ({"id": "bad"}, "22P05", why, None, "v", 1, 1),
            ({"id": r"k\u20acy"}, "22P05", why, None, "id", 1, 1),
        ]
        ends.run("destination", "ALTER TABLE acme.t ALTER v TYPE varchar(2)")
        make(ends, "INSERT INTO t VALUES ('long', 'abc')")
        result = ends.sync("t", **spec, drift="ignore", guards={"narrowed_type": False})
        assert (result.rows_unchanged, result.rows_rejected) == (1, 3)
        assert [row[1] for row in ends.kept()] == ["22P05", "22P05", "22001"]
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_values_of_another_kind_of_source_are_left_out(ends, tmp_path):
    """Of a SQLite file: a text with a NUL is none here."""
    path = tmp_path / "shop.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)")
        db.executemany("INSERT INTO t VALUES (?, ?)", [(n, f"v{n}") for n in range(1, 2000)])
        db.execute("UPDATE t SET v = 'a' || char(0) || 'b' WHERE id IN (3, 1500)")
    ends.open_source("sqlite", {"path": "shop.db"}, policy(tmp_path))
    ends.wire = WireFormat.ROWS
    for loads in (1, 2):
        result = ends.sync("t", **MERGE, schema="main", deletes="hard", rejected_max=2)
        assert (result.rows_loaded, result.rows_rejected, result.rows_deleted) == (1997, 2, 0)
        why = "a value does not fit its column"
        assert ends.kept() == [
            ({"id": str(n)}, "22021", why, None, "v", 1, loads) for n in (1500, 3)
        ]
        assert ends.reads == 3 - loads


def test_a_stream_that_no_longer_tolerates_fails_and_says_why(ends):
    make(ends, "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (1, 1), (2, 99)")
    ends.run("destination", "CREATE SCHEMA acme AUTHORIZATION writer")
    ends.sync("t", **MERGE)
    ends.run("destination", "ALTER TABLE acme.t ADD CONSTRAINT small CHECK (v < 100)")
    make(ends, "UPDATE t SET v = 100 WHERE id = 2")
    assert ends.sync("t", **MERGE, rejected_max=1).rows_rejected == 1
    with pytest.raises(
        ConfigError, match=r"constraint acme\.t \(small\) refuses the rows"
    ) as caught:
        ends.sync("t", **MERGE)
    assert caught.value.code == "constraint"
    make(ends, "UPDATE t SET v = 3 WHERE id = 2")
    assert ends.sync("t", **MERGE).rows_updated == 1
    assert ends.kept() == []


def test_what_is_wrong_with_the_table_is_not_taken_for_a_bad_row(ends):
    make(ends, "CREATE TABLE t (id int PRIMARY KEY, v int)", "INSERT INTO t VALUES (1, 1)")
    ends.sync("t", **MERGE)
    ends.run("destination", "REVOKE INSERT, UPDATE ON acme.t FROM writer")
    make(ends, "INSERT INTO t VALUES (2, 2)")
    with pytest.raises(ConfigError) as caught:
        ends.sync("t", **MERGE, rejected_max=10)
    assert (caught.value.code, ends.reads) == ("permission", 1)
    ends.run(
        "destination",
        "GRANT ALL ON acme.t TO writer",
        "ALTER TABLE acme.t ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE acme.t FORCE ROW LEVEL SECURITY",
        "CREATE POLICY low ON acme.t USING (true) WITH CHECK (v < 5)",
    )
    make(ends, "INSERT INTO t VALUES (9, 9)")
    result = ends.sync("t", **MERGE, rejected_max=10)
    assert (result.rows_inserted, result.rows_rejected) == (1, 1)
    assert [row[2] for row in ends.kept()] == ["a policy of the table refuses it"]


@pytest.mark.parametrize("said", [-1, 10_001, "101%", "1", "x%", True, None, 1.5])
def test_a_tolerance_is_a_number_or_a_share(said):
    with pytest.raises(ValidationError, match=r"how many rows \(0 to 10000\) nor e\.g\. 0\.1%"):
        StreamSpec(name="a.b", mode="replace", rejected_max=said)


def test_shares_are_of_what_is_read_and_capped():
    spec = StreamSpec(name="a.b", mode="replace", rejected_max="0.5 %")
    assert [spec.rejects_allowed(n) for n in (199, 200, 10**9)] == [0, 1, 10_000]
    assert '"rejected_max":"0.5%"' in spec.model_dump_json()
    assert "rejected_max" not in StreamSpec(name="a.b", mode="replace").model_dump_json()


@pytest.mark.parametrize(
    ("rows", "most"), [(5_000, 150), pytest.param(1_000_000, 500, marks=pytest.mark.full)]
)
def test_bad_rows_are_found_in_few_statements(ends, rows, most):
    """As many as the logarithm of the rows, for each; counted by the table itself."""
    make(
        ends,
        "CREATE TABLE t (id int PRIMARY KEY, v int)",
        f"INSERT INTO t SELECT n, n FROM generate_series(1, {rows}) AS n",
    )
    ends.sync("t", **MERGE)
    ends.run(
        "destination",
        "ALTER TABLE acme.t ADD CHECK (v > 0)",
        "CREATE SEQUENCE public.asked",
        "GRANT ALL ON SEQUENCE public.asked TO writer",
        "CREATE FUNCTION public.ask() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM nextval('public.asked'); RETURN NULL; END $$",
        "CREATE TRIGGER ask BEFORE UPDATE ON acme.t FOR EACH STATEMENT "
        "EXECUTE FUNCTION public.ask()",
    )
    step = rows // 5
    make(ends, f"UPDATE t SET v = CASE WHEN id % {step} = 7 THEN -v ELSE v + 1 END")
    result = ends.sync("t", **MERGE, rejected_max=5)
    assert (result.rows_updated, result.rows_rejected) == (rows - 5, 5)
    ((asked,),) = ends.rows("destination", "SELECT last_value FROM public.asked")
    assert asked < most
    make(ends, "UPDATE t SET v = v + 1 WHERE v > 0")
    assert ends.sync("t", **MERGE, rejected_max=5).rows_rejected == 5
    ((again,),) = ends.rows("destination", "SELECT last_value FROM public.asked")
    assert again - asked == 6, "those refused before are done one by one"


@pytest.mark.parametrize("wire", WireFormat)
def test_whatever_is_refused_the_target_has_the_rest_and_the_table_says_the_others(ends, wire):
    """By chance: rows that a check, a type or a reference refuses, mended and broken again."""
    chance = Random(f"rejects {wire}")
    ends.wire = wire
    ends.run("destination", "CREATE DOMAIN public.even AS int CHECK (VALUE % 2 = 0)")
    make(
        ends,
        "CREATE DOMAIN public.even AS int",
        "CREATE TABLE t (id int PRIMARY KEY, v int, e public.even, parent int)",
        "INSERT INTO t VALUES (1, 0, 0, NULL)",
    )
    spec: dict[str, Any] = {**MERGE, "deletes": "hard", "guards": {"delete_ratio": False}}
    ends.sync("t", **spec)
    ends.run(
        "destination",
        "ALTER TABLE acme.t ADD CHECK (v < 90), ADD FOREIGN KEY (parent) REFERENCES acme.t "
        "ON DELETE SET NULL",
    )
    served: dict[int, tuple[int, int, int | None]] = {1: (0, 0, None)}
    for _ in range(12):
        rows: dict[int, tuple[int, int, int | None]] = {}
        for n in chance.sample(range(1, 40), chance.randint(0, 35)):
            parent = chance.choice([*rows, None, None]) if chance.random() < 0.5 else None
            rows[n] = chance.randint(0, 99), 2 * chance.randint(0, 9) + (n % 9 == 0), parent
        make(ends, "TRUNCATE t")
        with ends.sessions["source"].cursor() as cursor:
            cursor.executemany(
                "INSERT INTO public.t VALUES (%s, %s, %s, %s)", [(n, *v) for n, v in rows.items()]
            )
        result = ends.sync("t", **spec, rejected_max=100)
        good = taken(rows, served)
        bad = set(rows) - set(good)
        served = {n: good.get(n) or served[n] for n in rows if n in good or n in served}
        # what a refused row refers to may be gone by now
        served = {n: (v, e, p if p in served else None) for n, (v, e, p) in served.items()}
        found = {n: (v, e, p) for n, v, e, p in ends.there("t", "id, v, e, parent")}
        assert found == served
        assert {int(key["id"]) for key, *_ in ends.kept()} == bad
        assert (result.rows_rejected, result.rows_loaded) == (len(bad), len(good))


def taken(
    rows: dict[int, tuple[int, int, int | None]], served: dict[int, tuple[int, int, int | None]]
) -> dict[int, tuple[int, int, int | None]]:
    """Return the rows that fit, but for those whose parent neither fits nor was served before."""
    good = {n: row for n, row in rows.items() if row[0] < 90 and row[1] % 2 == 0}
    while True:
        lost = [
            n
            for n, (_, _, parent) in good.items()
            if parent is not None
            and parent not in good
            and not (parent in served and parent in rows)
        ]
        if not lost:
            return good
        for n in lost:
            del good[n]


def test_cancelling_ends_the_search_for_bad_rows_and_nothing_is_kept(ends, pair):
    make(ends, "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (0)")
    ends.sync("t", **MERGE)
    ends.run(
        "destination",
        "CREATE SEQUENCE public.bad",
        "GRANT ALL ON SEQUENCE public.bad TO writer",
        # the first row is bad; the last one hangs, as soon as somebody has met the first
        "CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.id = 1 THEN PERFORM nextval('public.bad'); RAISE 'bad'; END IF; "
        "IF NEW.id = 9 THEN PERFORM pg_sleep(60) FROM public.bad WHERE is_called; END IF; "
        "RETURN NEW; END $$",
        "CREATE TRIGGER slow BEFORE INSERT ON acme.t FOR EACH ROW EXECUTE FUNCTION public.slow()",
    )
    make(ends, "INSERT INTO t SELECT n FROM generate_series(1, 9) AS n")

    def cancel() -> None:
        sleeps = "SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query ~ 'acme'"
        with closing(pair.connect("destination")) as look:
            while not look.execute(sleeps).fetchall():
                pass
        ends.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(TransientError) as caught:
        ends.sync("t", **MERGE, rejected_max=3)
    canceller.join()
    assert (caught.value.code, ends.reads) == ("cancelled_there", 2)
    assert ends.there("t", "id") == [(0,)]
    assert ends.kept() == []
