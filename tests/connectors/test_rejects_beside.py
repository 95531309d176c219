"""Rejected rows together with all else: sweeps, guards, triggers, drift, kills, odd names."""

import sqlite3
from contextlib import closing
from uuid import uuid4

import pytest

from schemas.errors import ConfigError, LeaseLost, ReadAgain, SyncwardError, TransientError
from schemas.guards import DataGuardTripped
from schemas.records import LoadRequest, WireFormat
from schemas.streams import StreamSpec
from tests.connectors.conformance.ends import policy
from tests.connectors.test_rejects import MERGE, make, mover_of

pytestmark = pytest.mark.integration


@pytest.fixture
def ends(pair):
    with closing(mover_of(pair)) as made:
        yield made


def test_names_with_percent_signs(ends):
    make(
        ends,
        'CREATE TABLE "p%s" ("id%" int PRIMARY KEY, "v%(x)s" int)',
        'INSERT INTO "p%s" SELECT n, n FROM generate_series(1, 50) AS n',
    )
    spec = {
        "mode": "merge",
        "key": ("id%",),
        "cursor": "xmin",
        "rejected_max": 2,
        "key_sweep": 1,
        "deletes": "hard",
    }
    ends.sync("p%s", **spec)
    ends.run("destination", 'ALTER TABLE acme."p%s" ADD CONSTRAINT "sm%s" CHECK ("v%(x)s" < 5000)')
    make(ends, 'UPDATE "p%s" SET "v%(x)s" = 9999 WHERE "id%" = 7')
    assert ends.sync("p%s", **spec).rows_rejected == 1
    make(ends, 'UPDATE "p%s" SET "v%(x)s" = 9998 WHERE "id%" = 7')
    assert ends.sync("p%s", **spec).rows_rejected == 1
    make(ends, 'DELETE FROM "p%s" WHERE "id%" = 7')
    ends.sync("p%s", **spec)
    assert ends.kept() == []


def test_repeated_keys_with_percent_signs(ends):
    make(
        ends,
        'CREATE TABLE "q%" ("id%s" int, v int)',
        'INSERT INTO "q%" VALUES (1, 1), (1, 2), (2, 1), (NULL, 3)',
    )
    spec = {
        "mode": "merge",
        "key": ("id%s",),
        "rejected_max": 2,
        "guards": {"duplicate_keys": False},
    }
    assert ends.sync("q%", **spec).rows_rejected == 2


def test_a_trigger_of_a_table_without_a_key_that_is_replaced(ends):
    make(
        ends,
        "CREATE TABLE k (v int)",
        "INSERT INTO k SELECT n FROM generate_series(1, 50) AS n",
    )
    spec = {"mode": "replace", "rejected_max": 2}
    ends.sync("k", **spec)
    ends.run(
        "destination",
        "CREATE FUNCTION acme.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.v > 5000 THEN RAISE 'no %', NEW.v; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER no BEFORE INSERT OR UPDATE ON acme.k FOR EACH ROW "
        "EXECUTE FUNCTION acme.no()",
    )
    make(ends, "INSERT INTO k VALUES (60), (9999)")
    result = ends.sync("k", **spec)
    assert (result.rows_rejected, result.rows_inserted, result.rows_unchanged) == (1, 1, 50)
    result = ends.sync("k", **spec)
    assert (result.rows_rejected, result.rows_inserted, result.rows_unchanged) == (1, 0, 51)


def test_rows_that_are_taken_only_together(ends):
    make(
        ends,
        "CREATE TABLE w (id int PRIMARY KEY, u int, v int)",
        "INSERT INTO w SELECT n, n, 1 FROM generate_series(1, 9) AS n",
    )
    spec = {**MERGE, "rejected_max": 20}
    ends.sync("w", **spec)
    ends.run(
        "destination",
        "ALTER TABLE acme.w ADD UNIQUE (u) DEFERRABLE INITIALLY DEFERRED, ADD CHECK (v < 100)",
    )
    make(ends, "UPDATE w SET u = 10 - u", "UPDATE w SET v = 999 WHERE id IN (2, 5)")
    result = ends.sync("w", **spec)
    make(ends, "UPDATE w SET v = 1")
    result = ends.sync("w", **spec)
    assert result.rows_rejected == 0, ends.kept()
    assert ends.there("w", "id, u, v") == [(n, 10 - n, 1) for n in range(1, 10)]


def test_a_row_that_goes_and_is_referred_to(ends):
    make(
        ends,
        "CREATE TABLE fk (id int PRIMARY KEY, v int)",
        "INSERT INTO fk SELECT n, n FROM generate_series(1, 20) AS n",
    )
    spec = {**MERGE, "deletes": "hard", "rejected_max": 2}
    ends.sync("fk", **spec)
    ends.run(
        "destination",
        "CREATE TABLE acme.child (id int REFERENCES acme.fk DEFERRABLE INITIALLY DEFERRED)",
        "INSERT INTO acme.child VALUES (3)",
    )
    make(ends, "DELETE FROM fk WHERE id = 3", "UPDATE fk SET v = v + 1")
    with pytest.raises(ConfigError) as failed:
        ends.sync("fk", **spec)
    assert failed.value.code == "constraint"
    assert len(ends.there("fk")) == 20


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_a_key_that_cannot_be_read_here_and_a_sweep(ends, mode):
    make(
        ends,
        "DROP TYPE IF EXISTS mood CASCADE",
        "CREATE TYPE mood AS ENUM ('a', 'b', 'c')",
        f"CREATE TABLE e_{mode} (id mood PRIMARY KEY, v int)",
        f"INSERT INTO e_{mode} VALUES ('a', 1), ('b', 1)",
    )
    ends.run(
        "destination",
        "DROP TYPE IF EXISTS public.mood CASCADE",
        "CREATE TYPE public.mood AS ENUM ('a', 'b')",
    )
    spec = {
        "mode": mode,
        "key": ("id",),
        "cursor": "xmin",
        "key_sweep": 1,
        "rejected_max": 2,
        "deletes": "soft",
    }
    ends.sync(f"e_{mode}", **spec)
    make(ends, f"INSERT INTO e_{mode} VALUES ('c', 1)", f"DELETE FROM e_{mode} WHERE id = 'b'")
    result = ends.sync(f"e_{mode}", **spec)
    assert (result.rows_rejected, result.rows_deleted) == (1, 1)
    result = ends.sync(f"e_{mode}", **spec)
    assert (result.rows_rejected, result.rows_deleted) == (0, 0)
    assert len(ends.kept()) == 1
    make(ends, f"DELETE FROM e_{mode} WHERE id = 'c'")
    ends.sync(f"e_{mode}", **spec)


def test_a_history_of_a_table_with_percent_signs_that_was_forgotten(ends):
    make(
        ends,
        'CREATE TABLE "h%s" ("id%s" int PRIMARY KEY, v int)',
        'INSERT INTO "h%s" VALUES (1, 1)',
    )
    spec = {"mode": "history", "key": ("id%s",)}
    ends.sync("h%s", **spec)
    ends.run("destination", "DELETE FROM _syncward.state")
    make(ends, 'UPDATE "h%s" SET v = 2')
    assert ends.sync("h%s", **spec).rows_updated == 1


def test_a_sweep_with_soft_deletes_and_tombstones_takes_no_refused_row_for_gone(ends):
    make(
        ends,
        "CREATE TABLE s (id int PRIMARY KEY, v int, gone boolean)",
        "INSERT INTO s SELECT n, n, false FROM generate_series(1, 60) AS n",
    )
    spec = {
        **MERGE,
        "cursor": "xmin",
        "deletes": "soft",
        "tombstone": "gone",
        "key_sweep": 1,
        "rejected_max": 10,
        "full_every": 3,
    }
    ends.sync("s", **spec)
    ends.run("destination", "ALTER TABLE acme.s ADD CHECK (v < 5000)")
    for turn in range(4):
        make(
            ends,
            f"UPDATE s SET v = 9000 + {turn} WHERE id IN (5, 6)",
            f"UPDATE s SET v = 9000, gone = true WHERE id = 10 + {turn}",
            f"UPDATE s SET gone = true WHERE id = 20 + {turn}",
            f"DELETE FROM s WHERE id = 30 + {turn}",
        )
        ends.sync("s", **spec)
        there = dict(ends.there("s", "id, _syncward_deleted_at IS NULL"))
        assert (there[5], there[6]) == (True, True)
        assert (there[20 + turn], there[30 + turn]) == (False, False)
    make(ends, "UPDATE s SET v = 1")
    assert ends.sync("s", **spec).rows_rejected == 0
    assert ends.kept() == []


def test_guards_and_rejected_rows(ends):
    make(
        ends,
        "CREATE TABLE g (id int PRIMARY KEY, v int)",
        "INSERT INTO g SELECT n, n FROM generate_series(1, 300) AS n",
    )
    spec = {**MERGE, "deletes": "hard", "rejected_max": 10}
    ends.sync("g", **spec)
    ends.run("destination", "ALTER TABLE acme.g ADD CHECK (v < 5000)")
    make(ends, "DELETE FROM g WHERE id > 20", "UPDATE g SET v = 9999 WHERE id IN (1, 2)")
    with pytest.raises(DataGuardTripped):
        ends.sync("g", **spec)
    assert len(ends.there("g")) == 300
    assert ends.kept() == []
    result = ends.sync("g", **spec, guards={"delete_ratio": 1})
    assert (result.rows_rejected, result.rows_deleted) == (2, 280)


@pytest.mark.parametrize("mode", ["merge", "history", "replace"])
def test_a_trigger_that_skips_rows_and_a_row_that_is_refused(ends, mode):
    make(
        ends,
        f"CREATE TABLE sk_{mode} (id int PRIMARY KEY, v int)",
        f"INSERT INTO sk_{mode} SELECT n, n FROM generate_series(1, 30) AS n",
    )
    spec = {"mode": mode, "rejected_max": 3, **({} if mode == "replace" else {"key": ("id",)})}
    t = f"sk_{mode}"
    ends.sync(t, **spec)
    ends.run(
        "destination",
        f"CREATE FUNCTION acme.f_{mode}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.v = 777 THEN RETURN NULL; END IF; IF NEW.v > 5000 THEN RAISE 'no %', NEW.v; END IF;"
        " RETURN NEW; END $$",
        f"CREATE TRIGGER no BEFORE INSERT OR UPDATE ON acme.{t} FOR EACH ROW "
        f"EXECUTE FUNCTION acme.f_{mode}()",
    )
    make(
        ends, f"UPDATE {t} SET v = 9999 WHERE id = 4", f"INSERT INTO {t} VALUES (70, 8000), (71, 1)"
    )
    result = ends.sync(t, **spec)
    assert (result.rows_rejected, result.rows_inserted, result.rows_unchanged) == (2, 1, 29)
    make(ends, f"UPDATE {t} SET v = 777 WHERE id = 6")
    with pytest.raises(SyncwardError) as failed:
        ends.sync(t, **spec)
    assert failed.value.code == "rows_missing"
    make(ends, f"UPDATE {t} SET v = 6")
    result = ends.sync(t, **spec)
    assert result.rows_rejected == 0
    assert ends.kept() == []


@pytest.mark.parametrize("mode", ["merge", "history"])
def test_ranges_with_kills_repeats_and_refusals(ends, mode):
    ends.ranges = True
    t = f"r_{mode}"
    make(
        ends,
        f"CREATE TABLE {t} (id int PRIMARY KEY, v int)",
        f"INSERT INTO {t} SELECT n, n FROM generate_series(1, 3000) AS n",
        f"ANALYZE {t}",
    )
    spec = {"mode": mode, "key": ("id",), "rejected_max": 6, "range_rows": 500, "deletes": "soft"}
    ends.sync(t, **spec)
    ends.run("destination", f"ALTER TABLE acme.{t} ADD CHECK (v < 5000)")
    make(
        ends,
        f"UPDATE {t} SET v = 9999 WHERE id IN (3, 1500, 2999)",
        f"UPDATE {t} SET v = 1 WHERE id % 7 = 0",
        f"DELETE FROM {t} WHERE id = 2000",
    )
    ends.stops_before = 3
    with pytest.raises(TransientError):
        ends.sync(t, **spec)
    ends.stops_before = None
    result = ends.attempt()
    assert (result.rows_rejected, result.rows_deleted, result.rows_extracted) == (3, 1, 2999)
    result = ends.sync(t, **spec)
    assert (result.rows_rejected, result.rows_deleted, result.rows_updated) == (3, 0, 0)
    make(ends, f"UPDATE {t} SET v = 2 WHERE id = 3", f"DELETE FROM {t} WHERE id = 1500")
    result = ends.sync(t, **spec)
    assert (result.rows_rejected, result.rows_deleted) == (1, 1)
    assert [row[0] for row in ends.kept()] == [{"id": "2999"}]


def test_a_history_from_another_kind_of_source_with_rows_that_are_refused(ends, tmp_path):
    where = tmp_path / "shop.db"
    with closing(sqlite3.connect(where)) as db:
        db.executescript("CREATE TABLE x (id integer PRIMARY KEY, v integer NOT NULL, n text);")
        db.executemany("INSERT INTO x VALUES (?, ?, ?)", [(n, n, "t") for n in range(1, 3001)])
        db.commit()
        ends.wire = WireFormat.ROWS
        ends.open_source("sqlite", {"path": "shop.db"}, policy(tmp_path))
        spec = {"mode": "history", "key": ("id",), "deletes": "soft", "rejected_max": 5}
        ends.sync("x", schema="main", **spec)
        ends.run("destination", "ALTER TABLE acme.x ADD CHECK (v < 5000)")
        db.execute("UPDATE x SET v = 9999 WHERE id IN (1, 3000)")
        db.execute("UPDATE x SET n = 'nul' || char(0) || 'b' WHERE id = 77")
        db.execute("UPDATE x SET n = 'other' WHERE id % 10 = 0 AND id < 3000")
        db.execute("DELETE FROM x WHERE id = 9")
        db.commit()
        result = ends.sync("x", schema="main", **spec)
        assert (result.rows_rejected, result.rows_deleted, result.rows_updated) == (3, 1, 299)
        db.execute("DELETE FROM x WHERE id = 3000")
        db.execute("UPDATE x SET v = 1, n = 't' WHERE id IN (1, 77)")
        db.commit()
        result = ends.sync("x", schema="main", **spec)
        assert (result.rows_rejected, result.rows_deleted, result.rows_updated) == (0, 1, 1)
    assert ends.kept() == []
    times = "tstzrange({0}._syncward_valid_from, {0}._syncward_valid_to)"
    (bad,) = ends.rows(
        "destination",
        "SELECT count(*) FROM acme.x a JOIN acme.x b USING (id) WHERE a.ctid <> b.ctid AND "
        f"{times.format('a')} && {times.format('b')}",
    )
    assert bad == (0,)


def test_secrets_in_errors_and_state(ends):
    make(
        ends,
        "CREATE TABLE sec (id text PRIMARY KEY, v text, w int)",
        "INSERT INTO sec SELECT 'k' || n, 'SECRET' || n, n FROM generate_series(1, 30) AS n",
    )
    spec = {"mode": "merge", "key": ("id",), "mask": {"id": "hmac", "v": "hmac"}, "rejected_max": 5}
    ends.sync("sec", **spec)
    ends.run(
        "destination",
        "ALTER TABLE acme.sec ADD CONSTRAINT c1 CHECK (w < 500)",
        "CREATE FUNCTION acme.tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF NEW.w = 400 THEN RAISE EXCEPTION USING ERRCODE = '23514', "
        "CONSTRAINT = 'SECRET ' || NEW.w, COLUMN = 'SECRET' || NEW.w, MESSAGE = 'SECRET'; END IF; "
        "IF NEW.w = 401 THEN EXECUTE 'SELECT ''SECRET' || NEW.w || '''::int'; END IF; "
        "RETURN NEW; END $$",
        "CREATE TRIGGER tell AFTER INSERT OR UPDATE ON acme.sec FOR EACH ROW "
        "EXECUTE FUNCTION acme.tell()",
    )
    make(
        ends,
        "UPDATE sec SET w = 999 WHERE id = 'k1'",
        "UPDATE sec SET w = 400 WHERE id = 'k2'",
        "UPDATE sec SET w = 401 WHERE id = 'k3'",
    )
    result = ends.sync("sec", **spec)
    assert result.rows_rejected == 3
    everything = (
        repr(ends.rows("destination", "SELECT r::text FROM _syncward.rejected_rows r"))
        + repr(ends.rows("destination", "SELECT s::text FROM _syncward.state s"))
        + repr(result)
    )
    assert "SECRET" not in everything
    assert '"k1"' not in everything
    with pytest.raises(ConfigError) as failed:
        ends.sync("sec", **{**spec, "rejected_max": 1})
    assert "SECRET" not in failed.value.public


def test_a_drift_and_a_refused_row(ends):
    make(
        ends,
        "CREATE TABLE d (id int PRIMARY KEY, v int, o text)",
        "INSERT INTO d SELECT n, n, 'x' FROM generate_series(1, 30) AS n",
    )
    make(ends, "CREATE TABLE d2 AS SELECT * FROM d", "ALTER TABLE d2 ADD PRIMARY KEY (id)")
    for mode in ("merge", "history"):
        spec = {"mode": mode, "key": ("id",), "cursor": "xmin", "rejected_max": 5}
        t = "d" if mode == "merge" else "d2"
        ends.sync(t, **spec)
        ends.run("destination", f"ALTER TABLE acme.{t} ADD CHECK (v < 5000)")
        make(
            ends,
            f"ALTER TABLE {t} ADD n text, ALTER v TYPE bigint, DROP o",
            f"UPDATE {t} SET n = 'new', v = 9999 WHERE id = 3",
            f"UPDATE {t} SET n = 'y' WHERE id = 5",
        )
        try:
            result = ends.sync(t, **spec)
        except ReadAgain:
            result = ends.sync(t, **{**spec, "cursor": None})
        assert (result.rows_rejected, result.rows_extracted) == (1, 30), mode
        make(ends, f"UPDATE {t} SET v = 3 WHERE id = 3")
        ends.sync(t, **{**spec, "cursor": None})
        got = ends.rows(
            "destination",
            f"SELECT n FROM acme.{t} WHERE id = 3"
            + (" AND _syncward_valid_to IS NULL" if mode == "history" else ""),
        )
        assert got == [("new",)]
    assert ends.kept() == []


def test_rows_of_two_streams_that_refer_to_each_other(ends):
    make(
        ends,
        "CREATE TABLE parent (id int PRIMARY KEY, v int)",
        "CREATE TABLE kid (id int PRIMARY KEY, p int)",
        "INSERT INTO parent SELECT n, n FROM generate_series(1, 10) AS n",
        "INSERT INTO kid SELECT n, n FROM generate_series(1, 10) AS n",
    )
    spec = {**MERGE, "deletes": "hard", "rejected_max": 3}
    ends.sync("parent", **spec)
    ends.sync("kid", **spec)
    ends.run(
        "destination",
        "ALTER TABLE acme.kid ADD FOREIGN KEY (p) REFERENCES acme.parent",
        "ALTER TABLE acme.parent ADD CHECK (v < 100)",
    )
    make(
        ends,
        "INSERT INTO parent VALUES (11, 999), (12, 1)",
        "INSERT INTO kid VALUES (11, 11), (12, 12)",
    )
    assert ends.sync("parent", **spec).rows_rejected == 1
    assert ends.sync("kid", **spec).rows_rejected == 1
    make(ends, "UPDATE parent SET v = 1")
    assert ends.sync("parent", **spec).rows_rejected == 0
    assert ends.sync("kid", **spec).rows_rejected == 0
    assert ends.kept() == []


def test_append_tries_again_and_counts_once(ends):
    make(
        ends,
        "CREATE TABLE ap (id int PRIMARY KEY, v int)",
        "INSERT INTO ap SELECT n, n FROM generate_series(1, 30) AS n",
    )
    spec = {"mode": "append", "cursor": "xmin", "rejected_max": 3}
    ends.sync("ap", **spec)
    ends.run("destination", "ALTER TABLE acme.ap ADD CHECK (v < 500)")
    make(ends, "INSERT INTO ap VALUES (40, 40), (41, 999)")
    assert ends.sync("ap", **spec).rows_rejected == 1
    assert ends.sync("ap", **spec).rows_rejected == 0
    assert len(ends.kept()) == 1
    make(ends, "UPDATE ap SET v = 1 WHERE id = 41")
    assert ends.sync("ap", **spec).rows_rejected == 0
    assert ends.kept() == []
    assert len(ends.there("ap")) == 32


def test_an_attempt_that_was_replaced_notes_no_refused_row(ends, pair):
    ends.ranges = True
    make(
        ends,
        "CREATE TABLE z (id int PRIMARY KEY, v int)",
        "INSERT INTO z SELECT n, n FROM generate_series(1, 3000) AS n",
        "ANALYZE z",
    )
    spec = {**MERGE, "rejected_max": 6, "range_rows": 500}
    ends.sync("z", **spec)
    ends.run("destination", "ALTER TABLE acme.z ADD CHECK (v < 5000)")
    make(ends, "UPDATE z SET v = 9999 WHERE id IN (3, 1500, 2999)")
    stream = StreamSpec(name="public.z", **spec)
    for ranged in (False, True):
        ends.ranges = ranged
        ends.fence += 1
        ends.request = LoadRequest(ends.connection_id, uuid4(), 1, ends.fence, stream, "acme")
        zombie, known = ends.request, ends.claimed()
        with pytest.raises(ReadAgain):
            ends._move(known)
        known = ends.claimed()
        with closing(mover_of(pair)) as other:
            other.connection_id, other.fence = ends.connection_id, ends.fence + 1
            other.request = LoadRequest(ends.connection_id, uuid4(), 2, other.fence, stream, "acme")
            other.claimed()
        ends.fence += 1
        assert ends.request is zombie
        with pytest.raises(LeaseLost):
            ends._move(known)
        assert ends.kept() == []
    assert ends.sync("z", **spec).rows_rejected == 3
