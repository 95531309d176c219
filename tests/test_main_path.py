"""The whole way of a run: document, schedule, queue, worker, tables, output, logs, audit."""

import pytest

from scheduler import ticks
from schemas.runs import RunState, Trigger
from storage import connections

pytestmark = pytest.mark.integration

STREAMS = {
    "public.orders": "{mode: merge, key: [id], cursor: updated_at}",
    "public.events": "{mode: append, cursor: xmin}",
    "public.regions": "{mode: replace}",
}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE orders (id bigint PRIMARY KEY, updated_at timestamptz NOT NULL, note text)",
        "INSERT INTO orders SELECT g, now() - interval '1 h', 'note ' || g "
        "FROM generate_series(1, 500) g",
        "CREATE TABLE events (at timestamptz, what json)",
        'INSERT INTO events SELECT now(), \'{"b": 1, "a": 2}\' FROM generate_series(1, 40)',
        "CREATE TABLE regions (code text PRIMARY KEY, name text)",
        "INSERT INTO regions VALUES ('eu', 'Europe'), ('us', 'US')",
    )
    return world


def test_a_schedule_leads_to_equal_tables_with_output_logs_and_audit(shop):
    shop.apply(STREAMS, schedule="{every: 10s}")
    shop.control.act("UPDATE schedules SET next_due_at = now() - interval '1 s'")

    assert ticks.due_tick(shop.scheduler) == 1
    shop.step()

    (run_id,) = shop.control.all("SELECT run_id FROM runs")[0]
    run, streams = shop.run(run_id), shop.streams(run_id)
    assert run.state is RunState.SUCCEEDED
    assert run.trigger is Trigger.SCHEDULE
    assert {n: (s.rows_extracted, s.rows_inserted) for n, s in streams.items()} == {
        "orders": (500, 500),
        "events": (40, 40),
        "regions": (2, 2),
    }
    assert all(shop.pair.same(table) for table in ("orders", "events", "regions"))
    assert "500 rows extracted" in shop.log(run_id)
    assert shop.events(run_id) == [
        "run.queued",
        "run.dispatched",
        "run.started",
        "credential.unsealed",
        "credential.unsealed",
        "credential.used",
        "run.succeeded",
    ]


def test_a_second_run_with_nothing_changed_reads_and_writes_nothing(shop):
    shop.apply(STREAMS)
    shop.sync()
    run, streams = shop.sync()
    assert run.state is RunState.SUCCEEDED
    assert [(s.rows_inserted, s.rows_updated) for s in streams.values()] == [(0, 0)] * 3
    assert streams["orders"].rows_extracted == streams["events"].rows_extracted == 0
    assert streams["regions"].rows_unchanged == 2


def test_ten_thousand_changed_rows_are_ten_thousand_updates(shop):
    shop.pair.source(
        "INSERT INTO orders SELECT g, now() - interval '1 h', 'x' "
        "FROM generate_series(1000, 30000) g"
    )
    shop.apply(STREAMS)
    shop.sync()
    shop.pair.source("UPDATE orders SET note = 'new', updated_at = now() WHERE id % 2 = 0")
    shop.pair.source("SELECT pg_sleep(0.2)")  # the window ends 100 ms behind now
    changed = shop.pair.rows("source", "SELECT count(*) FROM orders WHERE note = 'new'")[0][0]
    _, streams = shop.sync()
    assert changed > 10_000
    assert streams["orders"].rows_updated == streams["orders"].rows_extracted == changed
    assert shop.pair.same("orders")


@pytest.mark.parametrize("cursor", ["updated_at", "xmin"])
def test_a_transaction_held_open_across_two_runs_arrives_once(shop, cursor):
    shop.pair.source("CREATE TABLE late (id bigint PRIMARY KEY, updated_at timestamptz NOT NULL)")
    shop.apply({"public.late": f"{{mode: merge, key: [id], cursor: {cursor}}}",
                "public.events": "{mode: append, cursor: xmin}"})  # fmt: skip
    shop.sync()
    with shop.pair.connect("source", autocommit=False) as slow:
        slow.execute("INSERT INTO late VALUES (1, now())")
        slow.execute("INSERT INTO events VALUES (now(), '\"slow\"')")
        shop.pair.source("INSERT INTO late VALUES (2, now())", "SELECT pg_sleep(0.15)")
        shop.sync()
        _, second = shop.sync()
        assert second["late"].rows_inserted <= 1
        slow.commit()
    shop.sync()
    shop.pair.source("SELECT pg_sleep(0.15)")
    shop.sync()
    assert shop.pair.same("late")
    assert shop.pair.same("events")


def test_a_full_refresh_of_an_append_does_not_double_rows(shop):
    shop.apply(STREAMS)
    shop.sync()
    shop.pair.source("INSERT INTO events VALUES (now(), '1')")
    run, streams = shop.sync(full_refresh=True)
    assert run.state is RunState.SUCCEEDED
    assert streams["events"].rows_extracted == 41
    assert streams["events"].rows_inserted == 1
    assert shop.pair.same("events")


def test_one_bad_stream_does_not_stop_the_others(shop):
    shop.apply({"public.missing": "{mode: replace}", **STREAMS})
    run, streams = shop.sync()
    assert run.state is RunState.FAILED
    assert "public.missing" in (run.error or "")
    assert streams["missing"].state == "failed"
    assert all(shop.pair.same(table) for table in ("orders", "events", "regions"))


def test_a_changed_definition_reads_the_stream_from_the_beginning(shop):
    shop.apply(STREAMS)
    shop.sync()
    shop.apply({**STREAMS, "public.orders": "{mode: merge, key: [id], cursor: xmin}"})
    _, streams = shop.sync()
    assert streams["orders"].rows_extracted == 500
    assert streams["orders"].rows_unchanged == 500


def test_the_cursor_is_copied_to_the_control_database(shop):
    shop.apply(STREAMS)
    shop.sync()
    with shop.cli.inside() as (tx, _, _name):
        found = connections.get(tx, "shop-to-lake")
        cursors = connections.cursors(tx, found.connection_id)
    theirs = dict(shop.pair.rows("destination", "SELECT stream, cursor FROM _syncward.state"))
    assert cursors == theirs
    assert (cursors["public.events"] or {})["kind"] == "xmin"
