"""What was found by looking for ways to break the rejection of rows."""

import pytest

from tests.connectors.test_rejects import MERGE, ends, make  # noqa: F401 - a fixture

pytestmark = pytest.mark.integration


def test_names_with_percent_signs(ends):
    make(
        ends,
        'CREATE TABLE "p%s" ("id%" int PRIMARY KEY, "v%(x)s" int)',
        'INSERT INTO "p%s" SELECT n, n FROM generate_series(1, 50) AS n',
    )
    spec = {"mode": "merge", "key": ("id%",), "cursor": "xmin", "rejected_max": 2,
            "key_sweep": 1, "deletes": "hard"}
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
    spec = {"mode": "merge", "key": ("id%s",), "rejected_max": 2,
            "guards": {"duplicate_keys": False}}
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
        "CREATE TRIGGER no BEFORE INSERT OR UPDATE ON acme.k FOR EACH ROW EXECUTE FUNCTION acme.no()",
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
    print(result, ends.kept())
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
    from schemas.errors import ConfigError
    with pytest.raises(ConfigError) as failed:
        ends.sync("fk", **spec)
    print(failed.value.public, failed.value.code)
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
    ends.run("destination", "DROP TYPE IF EXISTS public.mood CASCADE", "CREATE TYPE public.mood AS ENUM ('a', 'b')")
    spec = {"mode": mode, "key": ("id",), "cursor": "xmin", "key_sweep": 1, "rejected_max": 2,
            "deletes": "soft"}
    ends.sync(f"e_{mode}", **spec)
    make(ends, f"INSERT INTO e_{mode} VALUES ('c', 1)", f"DELETE FROM e_{mode} WHERE id = 'b'")
    result = ends.sync(f"e_{mode}", **spec)
    assert (result.rows_rejected, result.rows_deleted) == (1, 1)
    result = ends.sync(f"e_{mode}", **spec)
    assert (result.rows_rejected, result.rows_deleted) == (0, 0)
    assert len(ends.kept()) == 1
    make(ends, f"DELETE FROM e_{mode} WHERE id = 'c'")
    ends.sync(f"e_{mode}", **spec)
    print(ends.kept())


def test_a_history_of_a_table_with_percent_signs_that_was_forgotten(ends):
    make(ends, 'CREATE TABLE "h%s" ("id%s" int PRIMARY KEY, v int)', 'INSERT INTO "h%s" VALUES (1, 1)')
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
    spec = {**MERGE, "cursor": "xmin", "deletes": "soft", "tombstone": "gone", "key_sweep": 1,
            "rejected_max": 10, "full_every": 3}
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
        result = ends.sync("s", **spec)
        there = dict(ends.there("s", "id, _syncward_deleted_at IS NULL"))
        assert there[5] and there[6], result
        assert not there[20 + turn] and not there[30 + turn]
        print(turn, result.rows_rejected, result.rows_deleted, there[10 + turn], len(ends.kept()))
    make(ends, "UPDATE s SET v = 1")
    assert ends.sync("s", **spec).rows_rejected == 0
    assert ends.kept() == []


def test_guards_and_rejected_rows(ends):
    from schemas.guards import DataGuardTripped
    make(
        ends,
        "CREATE TABLE g (id int PRIMARY KEY, v int)",
        "INSERT INTO g SELECT n, n FROM generate_series(1, 300) AS n",
    )
    spec = {**MERGE, "deletes": "hard", "rejected_max": 10}
    ends.sync("g", **spec)
    ends.run("destination", "ALTER TABLE acme.g ADD CHECK (v < 5000)")
    make(ends, "DELETE FROM g WHERE id > 20", "UPDATE g SET v = 9999 WHERE id IN (1, 2)")
    with pytest.raises(DataGuardTripped) as tripped:
        ends.sync("g", **spec)
    print(tripped.value.previews)
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
    make(ends, f"UPDATE {t} SET v = 9999 WHERE id = 4", f"INSERT INTO {t} VALUES (70, 8000), (71, 1)")
    result = ends.sync(t, **spec)
    assert (result.rows_rejected, result.rows_inserted, result.rows_unchanged) == (2, 1, 29)
    make(ends, f"UPDATE {t} SET v = 777 WHERE id = 6")
    from schemas.errors import SyncwardError
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
    from schemas.errors import TransientError
    spec = {"mode": mode, "key": ("id",), "rejected_max": 6, "range_rows": 500, "deletes": "soft"}
    ends.sync(t, **spec)
    ends.run("destination", f"ALTER TABLE acme.{t} ADD CHECK (v < 5000)")
    make(ends, f"UPDATE {t} SET v = 9999 WHERE id IN (3, 1500, 2999)",
         f"UPDATE {t} SET v = 1 WHERE id % 7 = 0", f"DELETE FROM {t} WHERE id = 2000")
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
