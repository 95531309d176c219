"""Backfill, reset, purge and schema on the whole way of a run, also where a worker dies."""

import json

import pytest

from cli.records import opened_output
from schemas.errors import Conflict
from schemas.records import Between, Purge
from schemas.runs import RunKind, RunOptions, RunState
from storage import audit_tail, connections, outputs, runs
from tests.faults.crash_points import Point
from tests.faults.dying import dies_at
from tests.world import OPERATOR

pytestmark = pytest.mark.integration

STREAMS = {
    "public.orders": "{mode: merge, key: [id], cursor: at, deletes: hard, key_sweep: 2, "
    "rejected_max: 5, mask: {mail: hmac}, columns: {exclude: [secret]}, where: \"kind = 'a'\"}",
    "public.log": "{mode: append, cursor: xmin}",
    "public.frozen": "{mode: merge, key: [id], cursor: v, drift: freeze}",
}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE orders (id int PRIMARY KEY, at timestamptz(3), kind varchar(3), v int, "
        "mail text, secret text)",
        "INSERT INTO orders SELECT g, timestamptz '2026-01-01 00:00Z' + g * interval '1 day', "
        "CASE WHEN g % 10 = 0 THEN 'b' ELSE 'a' END, 0, 'm' || g, 's' "
        "FROM generate_series(1, 60) g",
        "CREATE TABLE log (n bigserial, v text)",
        "INSERT INTO log (v) SELECT 'l' || g FROM generate_series(1, 20) g",
        "CREATE TABLE frozen (id int PRIMARY KEY, v varchar(5))",
        "INSERT INTO frozen SELECT g, 'v' || g FROM generate_series(1, 5) g",
    )
    world.apply(STREAMS)
    assert world.sync()[0].state is RunState.SUCCEEDED
    return world


def ask(shop, kind, *streams, **options):
    with shop.cli.inside() as (tx, _, _name):
        found = connections.get(tx, "shop-to-lake")
        wished = RunOptions(streams=tuple(f"public.{s}" for s in streams), **options)
        return runs.enqueue(tx, connections.subject(found), kind, wished, OPERATOR).run_id


def do(shop, kind, *streams, **options):
    run_id = ask(shop, kind, *streams, **options)
    shop.step()
    return shop.run(run_id), shop.streams(run_id)


def backfill(shop, lower, upper, stream="orders"):
    return do(shop, RunKind.BACKFILL, stream, window=Between(lower=lower, upper=upper))


def purge(shop, how, stream="orders"):
    return do(shop, RunKind.PURGE, stream, purge=how)


def dies(shop, run_id, when, function):
    """Let a process of its own execute a run and die at one place; then another worker goes on."""
    dies_at(shop, run_id, Point("execute", when, function, "by hand"))
    shop.step()
    return shop.run(run_id), shop.streams(run_id)


def state(shop, stream="orders"):
    ((found,),) = shop.pair.rows(
        "destination",
        "SELECT to_jsonb(s) - '{fence,claimed_by,run_id,result,updated_at}'::text[] "
        f"FROM _syncward.state s WHERE stream = 'public.{stream}'",
    )
    return found


def served(shop, query="SELECT count(*) FROM acme.orders"):
    return shop.pair.rows("destination", query)[0][0]


def events(shop, action):
    with shop.cli.transaction() as tx:
        found = audit_tail.newest(tx, audit_tail.Filters(), 10_000)
    return [json.loads(e.body) for e in found if e.action == action]


def copied(shop, stream="orders"):
    return shop.control.one(
        "SELECT cursor FROM cursors WHERE stream = :stream", stream=f"public.{stream}"
    )


# ── backfill ─────────────────────────────────────────────────────────────────────────────────


def test_a_backfill_merges_the_rows_of_its_window_and_leaves_everything_else_alone(shop):
    shop.pair.source(
        "UPDATE orders SET v = 1",  # behind the cursor's back: `at` did not move
        "DELETE FROM orders WHERE id IN (12, 40)",
        "INSERT INTO orders VALUES (100, '2026-01-13', 'a', 2, 'new', 's')",
    )
    before, cursor = state(shop), copied(shop)
    run, streams = backfill(shop, "2026-01-11", "2026-01-16 00:00+00")
    assert (run.kind, run.state) == (RunKind.BACKFILL, RunState.SUCCEEDED)
    result = streams["orders"]
    # days 11 to 15 are ids 10 (filtered), 11, 13, 14 and the new one
    assert (result.rows_extracted, result.rows_inserted, result.rows_updated) == (4, 1, 3)
    assert result.cursor_from["value"] == "2026-01-11 00:00:00+00"
    assert result.cursor_to["value"] == "2026-01-16 00:00:00+00"
    assert served(shop, "SELECT array_agg(id ORDER BY id) FROM acme.orders WHERE v > 0") == [
        *(11, 13, 14, 100)
    ]
    assert served(shop, "SELECT count(*) FROM acme.orders WHERE id IN (12, 40)") == 1
    assert served(shop, "SELECT count(*) FROM acme.orders WHERE mail ~ '^(m|new)'") == 0
    assert (state(shop), copied(shop)) == (before, cursor)
    again = backfill(shop, "2026-01-11", "2026-01-16")[1]["orders"]
    assert (again.rows_unchanged, again.rows_inserted, again.rows_updated) == (4, 0, 0)
    assert shop.sync()[0].state is RunState.SUCCEEDED


def test_a_backfill_whose_worker_dies_is_told_or_repeated_and_doubles_nothing(shop):
    window = Between(lower="2026-01-01", upper="2027-01-01")
    for number, (when, function) in enumerate(
        [
            ("after", "psycopg:Copy.write"),
            ("after", "connectors.postgres.state:commit"),
            ("before", "storage.claims:finish"),
            ("after", "storage.claims:finish"),
        ],
        start=1,
    ):
        shop.pair.source(f"UPDATE orders SET v = {number}")
        run_id = ask(shop, RunKind.BACKFILL, "orders", window=window)
        run, streams = dies(shop, run_id, when, function)
        assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2)
        # also where the first attempt had committed: told as it was, not merged again
        told = 1 if "finish" in function else 2
        assert (streams["orders"].rows_updated, streams["orders"].attempt) == (54, told)
        assert served(shop, "SELECT count(*) || ' ' || sum(v) FROM acme.orders") == (
            f"54 {54 * number}"
        )


def test_a_backfill_leaves_out_what_the_target_refuses_and_takes_it_once_it_is_mended(shop):
    shop.pair.session("destination").execute("ALTER TABLE acme.orders ADD CHECK (v < 5)")
    shop.pair.source("UPDATE orders SET v = CASE id WHEN 7 THEN 9 ELSE 1 END")
    _, streams = backfill(shop, "2026-01-01", "2027-01-01")
    assert (streams["orders"].rows_updated, streams["orders"].rows_rejected) == (53, 1)
    assert served(shop, "SELECT count(*) FROM _syncward.rejected_rows") == 1
    shop.pair.source("UPDATE orders SET v = 1")
    _, streams = backfill(shop, "2026-01-08", "2026-01-09")
    assert (streams["orders"].rows_updated, streams["orders"].rows_rejected) == (1, 0)
    assert served(shop, "SELECT count(*) FROM _syncward.rejected_rows") == 0


@pytest.mark.parametrize("window", [
    ("yesterday-ish", "2026-02-01"), ("2026-02-01", "9'; DROP TABLE orders; --"),
])  # fmt: skip
def test_a_value_that_the_source_cannot_read_is_said_with_column_and_type(shop, window):
    run, _ = backfill(shop, *window)
    assert run.state is RunState.FAILED
    assert "timestamp with time zone, the type of its cursor column at" in run.error
    assert "DROP TABLE" not in run.error
    run, _ = backfill(shop, "2026-02-01", "2026-02-01")
    assert "--from is not below --to" in run.error


def test_a_text_as_cursor_is_not_cut_to_the_size_of_its_column(shop):
    shop.pair.source("UPDATE frozen SET v = 'v2' WHERE id = 5")
    run, streams = backfill(shop, "v2", "v2xxxxxxxx", "frozen")
    assert run.state is RunState.SUCCEEDED, run.error
    assert streams["frozen"].rows_extracted == 2


def test_a_backfill_follows_no_drift_and_needs_a_stream_that_is_read(shop):
    run, _ = backfill(shop, "1", "9", "log")
    assert "a backfill merges rows by their key" in run.error
    shop.pair.source("ALTER TABLE orders ADD COLUMN extra int DEFAULT 5")
    run, _ = backfill(shop, "2026-01-01", "2027-01-01")
    assert (run.state, "let a run do that first" in run.error) == (RunState.FAILED, True)
    assert shop.sync(streams=("public.orders",))[0].state is RunState.SUCCEEDED
    assert backfill(shop, "2026-01-01", "2027-01-01")[0].state is RunState.SUCCEEDED
    do(shop, RunKind.RESET, "orders")
    run, _ = backfill(shop, "2026-01-01", "2027-01-01")
    assert "no run has read it as it is defined now" in run.error
    shop.sync(streams=("public.orders",))
    shop.pair.session("destination").execute("DROP TABLE acme.orders")
    run, _ = backfill(shop, "2026-01-01", "2027-01-01")
    assert (run.state, "acme.orders is gone" in run.error) == (RunState.FAILED, True)
    assert served(shop, "SELECT to_regclass('acme.orders')") is None


# ── reset ────────────────────────────────────────────────────────────────────────────────────


def test_a_reset_stream_is_read_from_its_beginning_and_its_rows_stay_meanwhile(shop):
    run_id = ask(shop, RunKind.RESET)
    run, streams = dies(shop, run_id, "before", "storage.claims:finish")
    assert run.state is RunState.SUCCEEDED
    assert set(streams) == {"orders", "log", "frozen"}
    assert streams["orders"].cursor_from is not None
    assert {e["detail"]["stream"] for e in events(shop, "stream.reset")} == set(STREAMS)
    assert len(events(shop, "stream.reset")) == 3
    assert (copied(shop), copied(shop, "log")) == (None, None)
    assert state(shop)["cursor"] is None
    assert served(shop) == 54
    _, streams = shop.sync()
    assert {name: r.rows_extracted for name, r in streams.items()} == {
        "orders": 54, "log": 20, "frozen": 5,
    }  # fmt: skip
    assert shop.pair.same("log")  # an append that is read again is not doubled
    assert copied(shop)


def test_a_reset_drops_a_read_that_did_not_come_to_its_end(shop):
    session = shop.pair.session("destination")
    session.execute(
        "INSERT INTO _syncward.generations (connection_id, stream, generation, run_id, reads, "
        "shape, target_schema, hidden) SELECT connection_id, stream, 2, run_id, 'x', 'x', 'acme', "
        "'_syncward_hidden' FROM _syncward.state WHERE stream = 'public.orders'"
    )
    session.execute("CREATE TABLE acme._syncward_hidden (); "
                    "ALTER TABLE acme._syncward_hidden OWNER TO writer")  # fmt: skip
    assert do(shop, RunKind.RESET, "orders")[0].state is RunState.SUCCEEDED
    assert served(shop, "SELECT count(*) FROM _syncward.generations") == 0
    assert served(shop, "SELECT to_regclass('acme._syncward_hidden')") is None


# ── purge ────────────────────────────────────────────────────────────────────────────────────


def test_purged_rows_go_out_of_sight_and_come_back_with_their_cursor(shop):
    session = shop.pair.session("destination")
    session.execute("CREATE VIEW acme.seen AS SELECT id FROM acme.orders")
    session.execute("CREATE ROLE public_reader; GRANT USAGE ON SCHEMA acme TO public_reader; "
                    "GRANT SELECT ON acme.seen, acme.orders TO public_reader")  # fmt: skip
    try:
        before, cursor = state(shop), copied(shop)
        with shop.pair.connect("destination", autocommit=False) as reader:
            reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            reader.execute("SELECT count(*) FROM acme.log")
            run, streams = purge(shop, Purge.KEEP)  # does not wait for who reads
            assert run.state is RunState.SUCCEEDED, run.error
            assert reader.execute("SELECT count(*) FROM acme.orders").fetchone() == (54,)
        assert streams["orders"].rows_deleted == 54
        assert served(shop, "SELECT count(*) FROM acme.seen") == 0
        kept = served(shop, "SELECT kept FROM _syncward.purged")
        assert (
            served(
                shop, f"SELECT has_table_privilege('public_reader', '_syncward.{kept}', 'SELECT')"
            )
            is False
        )
        assert (state(shop)["cursor"], copied(shop)) == (None, None)
        assert events(shop, "stream.purged")[0]["detail"] == {
            "stream": "public.orders", "rows": 54, "for_good": False,
        }  # fmt: skip
        assert "are kept until" in purge(shop, Purge.KEEP)[0].error
        run, streams = purge(shop, Purge.UNDO)
        assert run.state is RunState.SUCCEEDED, run.error
        assert "54 rows are back; the stream goes on where it was" in shop.log(run.run_id)
        assert (served(shop, "SELECT count(*) FROM acme.seen"), state(shop)) == (54, before)
        assert (copied(shop), streams["orders"].rows_inserted) == (cursor, 54)
        assert events(shop, "stream.purge_undone")[0]["detail"]["rows"] == 54
        assert served(shop, f"SELECT to_regclass('_syncward.{kept}')") is None
        assert "no purged rows are kept" in purge(shop, Purge.UNDO)[0].error
        assert shop.sync()[1]["orders"].rows_inserted == 0
    finally:
        session.execute("DROP OWNED BY public_reader; DROP ROLE public_reader")


def test_a_history_is_purged_and_brought_back_with_all_its_versions(shop):
    shop.apply({**STREAMS, "public.past": "{mode: history, key: [id], cursor: xmin}"})
    shop.pair.source(
        "CREATE TABLE past (id int PRIMARY KEY, v int)",
        "INSERT INTO past SELECT g, 0 FROM generate_series(1, 5) g",
    )
    shop.sync()
    shop.pair.source("UPDATE past SET v = 1 WHERE id = 3")
    shop.sync()
    versions = "SELECT * FROM acme.past ORDER BY id, _syncward_valid_from"
    before = shop.pair.rows("destination", versions)
    assert len(before) == 6
    run, _ = backfill(shop, "1", "3", "past")
    assert "a backfill merges rows by their key" in run.error
    assert purge(shop, Purge.KEEP, "past")[0].state is RunState.SUCCEEDED
    assert purge(shop, Purge.UNDO, "past")[0].state is RunState.SUCCEEDED
    assert shop.pair.rows("destination", versions) == before
    shop.pair.source("UPDATE past SET v = 2 WHERE id = 3")
    _, streams = shop.sync()
    assert (streams["past"].rows_extracted, streams["past"].rows_updated) == (1, 1)


def test_what_was_loaded_since_a_purge_is_not_undone_and_what_is_kept_expires(shop):
    assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
    kept = served(shop, "SELECT kept FROM _syncward.purged")
    _, streams = shop.sync()
    assert (streams["orders"].rows_inserted, served(shop)) == (54, 54)
    run, _ = purge(shop, Purge.UNDO)
    assert (run.state, "a run has loaded it since" in run.error) == (RunState.FAILED, True)
    shop.sync()
    assert served(shop, f"SELECT count(*) FROM _syncward.{kept}") == 54
    shop.pair.session("destination").execute("UPDATE _syncward.purged SET until = now()")
    shop.sync()
    assert served(shop, f"SELECT to_regclass('_syncward.{kept}')") is None
    assert served(shop, "SELECT count(*) FROM _syncward.purged") == 0
    assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
    run, streams = purge(shop, Purge.NOW)
    assert run.state is RunState.SUCCEEDED, run.error
    assert served(shop, "SELECT count(*) FROM _syncward.purged") == 0
    assert [e["detail"]["for_good"] for e in events(shop, "stream.purged")].count(True) == 1


def test_a_purge_whose_worker_dies_is_done_once(shop):
    finish = "storage.claims:finish"
    for when, function, how in (
        ("after", "connectors.postgres.purge:put_away", Purge.KEEP),
        ("after", "connectors.postgres.purge:bring_back", Purge.UNDO),
        ("after", "connectors.postgres.state:rewind", Purge.KEEP),
        ("before", finish, Purge.UNDO),
        ("before", finish, Purge.NOW),
    ):
        run_id = ask(shop, RunKind.PURGE, "orders", purge=how)
        run, streams = dies(shop, run_id, when, function)
        result = streams["orders"]
        assert run.state is RunState.SUCCEEDED, (function, how, run.error)
        assert result.rows_deleted + result.rows_inserted == 54
        assert served(shop) == (54 if how is Purge.UNDO else 0)
    assert len(events(shop, "stream.purged")) == 3
    assert len(events(shop, "stream.purge_undone")) == 2


def test_a_table_that_swallows_the_delete_is_left_as_it_was(shop):
    shop.pair.session("destination").execute(
        "CREATE FUNCTION acme.keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RETURN CASE WHEN old.id = 7 THEN NULL ELSE old END; END $$; "
        "CREATE TRIGGER keep BEFORE DELETE ON acme.orders "
        "FOR EACH ROW EXECUTE FUNCTION acme.keep()"
    )
    before = state(shop)
    for how in (Purge.KEEP, Purge.NOW):
        run, _ = purge(shop, how)
        assert run.error_code == "rows_missing"
        assert (served(shop), state(shop)) == (54, before)
    assert served(shop, "SELECT count(*) FROM _syncward.purged") == 0


def test_a_table_with_columns_of_its_own_gets_its_rows_back_and_one_that_is_needed_keeps_them(shop):
    session = shop.pair.session("destination")
    session.execute(
        "ALTER TABLE acme.orders ADD COLUMN twice int GENERATED ALWAYS AS (id * 2) STORED, "
        "ADD COLUMN place int GENERATED ALWAYS AS IDENTITY"
    )
    before = shop.pair.rows("destination", "SELECT * FROM acme.orders ORDER BY id")
    assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
    run, _ = purge(shop, Purge.UNDO)
    assert run.state is RunState.SUCCEEDED, run.error
    assert shop.pair.rows("destination", "SELECT * FROM acme.orders ORDER BY id") == before
    session.execute("CREATE TABLE acme.needs (id int REFERENCES acme.orders); "
                    "INSERT INTO acme.needs VALUES (1)")  # fmt: skip
    run, _ = purge(shop, Purge.NOW)
    assert (run.state, "foreign key" in run.error) == (RunState.FAILED, True)
    session.execute("DROP TABLE acme.needs; ALTER TABLE acme.orders ENABLE ROW LEVEL SECURITY, "
                    "FORCE ROW LEVEL SECURITY")  # fmt: skip
    assert purge(shop, Purge.NOW)[0].error_code == "rows_missing"
    assert served(shop) == 54


def test_rows_of_other_tables_do_not_go_with_a_purge(shop):
    session = shop.pair.session("destination")
    session.execute("CREATE TABLE acme.notes (id int, of int REFERENCES acme.orders "
                    "ON DELETE CASCADE); INSERT INTO acme.notes VALUES (1, 7)")  # fmt: skip
    for action in ("ON DELETE CASCADE", "ON DELETE SET NULL", "DEFERRABLE INITIALLY DEFERRED"):
        session.execute("ALTER TABLE acme.notes DROP CONSTRAINT notes_of_fkey, "
                        f"ADD FOREIGN KEY (of) REFERENCES acme.orders {action}")  # fmt: skip
        for how in (Purge.KEEP, Purge.NOW):
            run, _ = purge(shop, how)
            assert (run.state, "foreign key" in (run.error or "")) == (RunState.FAILED, True)
            assert served(shop, "SELECT id || ' ' || of FROM acme.notes") == "1 7"
            assert served(shop) == 54


def test_a_table_of_other_types_does_not_take_the_kept_rows(shop):
    session = shop.pair.session("destination")
    for change, back in (
        ("ALTER TABLE acme.orders ALTER v TYPE date USING NULL", "int USING 0"),
        ("ALTER TABLE acme.orders ALTER mail TYPE varchar(2)", None),
    ):
        assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
        session.execute(change)
        run, _ = purge(shop, Purge.UNDO)
        assert run.state is RunState.FAILED
        assert "the table was changed since it was purged" in run.error
        column = change.split()[4]
        session.execute(f"ALTER TABLE acme.orders ALTER {column} TYPE {back or 'text'}")
        assert purge(shop, Purge.UNDO)[0].state is RunState.SUCCEEDED
        assert served(shop) == 54


def test_a_purge_for_good_says_where_kept_rows_cannot_go(shop):
    assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
    kept = served(shop, "SELECT kept FROM _syncward.purged")
    shop.pair.session("destination").execute(
        f"CREATE VIEW acme.look AS SELECT id FROM _syncward.{kept}"
    )
    run, _ = purge(shop, Purge.NOW)
    assert run.state is RunState.FAILED, "rows are there that were said to be deleted for good"
    assert f"_syncward.{kept}" in run.error
    shop.pair.session("destination").execute("DROP VIEW acme.look")
    assert purge(shop, Purge.NOW)[0].state is RunState.SUCCEEDED
    assert served(shop, f"SELECT to_regclass('_syncward.{kept}') IS NULL")


def test_a_domain_or_a_collation_of_the_cursor_does_not_move_the_window(shop):
    shop.pair.source(
        "CREATE DOMAIN short AS varchar(3) COLLATE \"C\" CHECK (VALUE < 'w')",
        "CREATE TABLE coded (id int PRIMARY KEY, v short)",
        "INSERT INTO coded VALUES (1, 'B'), (2, 'a'), (3, 'v2'), (4, 'v2x')",
    )
    shop.apply({**STREAMS, "public.coded": "{mode: merge, key: [id], cursor: v}"})
    assert shop.sync()[0].state is RunState.SUCCEEDED
    for lower, upper, rows in (("v2", "v2xx", 2), ("B", "a", 1), ("v2", "zz", 2)):
        run, streams = backfill(shop, lower, upper, "coded")
        assert run.state is RunState.SUCCEEDED, (lower, upper, run.error)
        assert streams["coded"].rows_extracted == rows, (lower, upper)


def test_a_reset_after_a_purge_is_not_taken_back_by_its_undo(shop):
    assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
    assert do(shop, RunKind.RESET, "orders")[0].state is RunState.SUCCEEDED
    run, _ = purge(shop, Purge.UNDO)
    assert run.state is RunState.SUCCEEDED
    assert "54 rows are back; the next run reads everything" in shop.log(run.run_id)
    assert (served(shop), state(shop)["cursor"]) == (54, None)
    assert shop.sync()[0].state is RunState.SUCCEEDED
    assert served(shop) == 54


def test_an_hour_or_a_zone_that_the_column_would_drop_is_refused(shop):
    shop.pair.source(
        "CREATE TABLE days (id int PRIMARY KEY, d date, w timestamp)",
        "INSERT INTO days SELECT g, date '2026-01-01' + g, timestamp '2026-01-01' + g * "
        "interval '1 day' FROM generate_series(1, 9) g",
    )
    for column, wrong in (("d", "2026-01-04 12:00"), ("w", "2026-01-04 00:00+02")):
        shop.apply({"public.days": f"{{mode: merge, key: [id], cursor: {column}}}"})
        assert shop.sync()[0].state is RunState.SUCCEEDED
        run, _ = backfill(shop, "2026-01-02", wrong, "days")
        assert "drops a part of --to" in (run.error or "")
        assert wrong not in run.error
        run, streams = backfill(shop, "2026-01-02", "2026-01-04 00:00Z", "days")
        assert streams["days"].rows_extracted == 2, run.error


# ── schema ───────────────────────────────────────────────────────────────────────────────────


def compared(shop, *streams):
    run, _ = do(shop, RunKind.SCHEMA, *streams)
    assert run.state is RunState.SUCCEEDED, run.error
    with shop.cli.inside() as (tx, _, _name):
        stored = outputs.stored(tx, run.run_id)
    return {t["stream"].split(".")[1]: t for t in opened_output(shop.cli, run, stored)["tables"]}


def test_what_differs_is_what_the_next_run_follows_or_waits_for(shop):
    tables = compared(shop)
    assert [c["name"] for c in tables["orders"]["columns"]] == ["id", "at", "kind", "v", "mail"]
    assert all(t["changes"] == [] for t in tables.values())
    shop.pair.source(
        "ALTER TABLE frozen ADD COLUMN extra int",
        "ALTER TABLE orders ADD COLUMN extra int",
        "DROP TABLE log",
    )
    tables = compared(shop)
    assert [c["says"] for c in tables["frozen"]["changes"]] == ["column extra integer is new"]
    assert [c["says"] for c in tables["orders"]["changes"]] == ["column extra integer is new"]
    assert "public.log" in tables["log"]["error"]
    assert state(shop, "frozen")["generation"] == 1
    run, _ = shop.sync(streams=("public.frozen",))
    assert (run.state, "drift: freeze" in run.error) == (RunState.FAILED, True)
    run, streams = shop.sync(streams=("public.frozen",), accept=("public.frozen",))
    assert run.state is RunState.SUCCEEDED, run.error
    assert [str(c) for c in streams["frozen"].schema_changes] == ["column extra integer is new"]
    assert compared(shop, "frozen")["frozen"]["changes"] == []
    shop.pair.source("ALTER TABLE frozen ADD COLUMN once_more int")
    assert shop.sync(streams=("public.frozen",))[0].state is RunState.FAILED  # accepted once


def test_a_comparison_does_not_wait_behind_a_run(shop):
    shop.enqueue()
    with pytest.raises(Conflict, match="ask again when it has ended"):
        ask(shop, RunKind.SCHEMA)


# ── commands ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def working(shop):
    with shop.working():
        yield shop


def test_the_commands_answer_like_their_neighbours(working, shell):
    shop = working
    code, out, _ = shell(
        "backfill", "shop-to-lake", "--stream", "public.orders", "--from", "2026-01-03",
        "--to", "2026-01-05", "--wait", "--json",
    )  # fmt: skip
    document = json.loads(out)
    assert (code, document["state"], document["streams"][0]["rows_extracted"]) == (
        0,
        "succeeded",
        2,
    )
    assert document["streams"][0]["cursor_from"] == "2026-01-03 00:00:00+00"
    shown = shell("run", "show", "shop-to-lake")[1]
    assert "connection  shop-to-lake" in shown
    window = "window      at from 2026-01-03 00:00:00+00 to below 2026-01-05 00:00:00+00"
    assert window in shown
    assert window in shell("run", "output", "shop-to-lake")[1]
    assert "rows_extracted" in shell("run", "output", "shop-to-lake", "--json")[1]
    assert "backfill" in shell("run", "list", "--kind", "backfill")[1]
    purge = ("connection", "purge", "shop-to-lake", "--stream")
    for words, said in (
        (("backfill", "shop-to-lake", "--stream", "public.log", "--from", "1", "--to", "2"),
         "a backfill needs mode: merge and a cursor that is a column"),
        (("backfill", "shop-to-lake", "--stream", "public.x", "--from", "1", "--to", "2"),
         "has no stream public.x"),
        ((*purge, "public.orders"), "Nothing was changed: say --yes"),
        (("connection", "schema", "accept", "shop-to-lake", "--stream", "public.log"),
         "public.log is drift: freeze; only"),
    ):  # fmt: skip
        code, _, err = shell(*words)
        assert (code, said in err) == (1, True), err
    assert served(shop) == 54
    code, out, _ = shell(
        "connection", "purge", "shop-to-lake", "--stream", "public.orders", "--yes", "--wait"
    )
    assert (code, served(shop)) == (0, 0)
    code, out, _ = shell(
        "connection", "purge", "shop-to-lake", "--stream", "public.orders", "--undo", "--wait"
    )
    assert (code, served(shop)) == (0, 54)
    assert shell("connection", "reset", "shop-to-lake", "--stream", "public.log", "--wait")[0] == 0
    assert copied(shop, "log") is None


def test_the_schema_commands_show_compare_and_accept(working, shell):
    shop = working
    show = ("connection", "schema", "show", "shop-to-lake")
    code, out, err = shell(*show, "--stream", "public.frozen")
    assert code == 0, err
    assert "like this since at least" in out
    assert "character varying(5)" in out
    shop.pair.source("ALTER TABLE frozen ADD COLUMN extra int")
    code, out, _ = shell("connection", "schema", "diff", "shop-to-lake")
    assert "public.orders: no change" in out
    assert "public.frozen: column extra integer is new" in out
    assert "syncward connection schema accept shop-to-lake --stream public.frozen" in out
    shop.pair.source("ALTER TABLE orders ALTER COLUMN v TYPE text, ALTER COLUMN kind TYPE text")
    _, orders, _ = shell(
        "connection", "schema", "diff", "shop-to-lake", "--stream", "public.orders"
    )
    assert "column v was integer and is text" in orders
    assert "no policy follows another type" in orders
    code, out, _ = shell("connection", "schema", "accept", "shop-to-lake", "--wait", "--json")
    assert (code, json.loads(out)["state"]) == (0, "succeeded")
    (event,) = events(shop, "stream.drift_accepted")
    assert event["detail"] == {"stream": "public.frozen", "run": json.loads(out)["run_id"]}
    code, out, _ = shell(*show, "--json")
    (frozen,) = [s for s in json.loads(out)["streams"] if s["stream"] == "public.frozen"]
    assert not frozen["since_at_least"]
    assert [c["says"] for c in frozen["changed_before"]] == ["column extra integer is new"]
    assert [c["name"] for c in frozen["columns"]] == ["id", "v", "extra"]
    shell("connection", "pause", "shop-to-lake")
    code, _, err = shell("connection", "reset", "shop-to-lake")
    assert (code, "resume it first" in err) == (1, True)


def test_an_undo_into_a_table_that_was_dropped_says_how_to_make_it_again(shop):
    session = shop.pair.session("destination")
    assert purge(shop, Purge.KEEP)[0].state is RunState.SUCCEEDED
    session.execute("DROP TABLE acme.orders")
    run, _ = purge(shop, Purge.UNDO)
    kept = served(shop, "SELECT kept FROM _syncward.purged")
    assert run.state is RunState.FAILED
    assert f"CREATE TABLE (LIKE _syncward.{kept})" in run.error
    assert "run enqueue" in run.error
    session.execute(
        f"CREATE TABLE acme.orders (LIKE _syncward.{kept}, PRIMARY KEY (id)); "
        "ALTER TABLE acme.orders OWNER TO writer"
    )
    assert purge(shop, Purge.UNDO)[0].state is RunState.SUCCEEDED
    assert served(shop) == 54
    assert shop.sync()[1]["orders"].rows_inserted == 0
