"""What rivals' users suffer from with their data, one test each; the issue stands in its docstring.

In depth they are shown where the feature is tested: test_deletes.py, test_drift.py, and the deaths
and zombies of tests/faults.
"""

import tracemalloc

import pytest

from scheduler import ticks
from schemas.runs import RunState
from tests.connectors.test_model import Died, ending
from tests.faults.crash_points import POINTS

pytestmark = pytest.mark.integration

MERGE = "{mode: merge, key: [id], cursor: xmin}"
LOADED = next(str(p) for p in POINTS if p.means == "rows loaded, cursor not stored")


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text, at timestamptz DEFAULT clock_timestamp())",
        "INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 200) g",
    )
    return world


def recovered(shop) -> None:
    """Another worker takes over what a dead one left."""
    shop.expire_leases()
    ticks.reap_tick(shop.scheduler)
    shop.control.act("UPDATE active_runs SET not_before = now() - interval '1 s'")
    shop.step()


def death(shop) -> None:
    shop.enqueue()
    with pytest.raises(Died), ending(LOADED):
        shop.step()


def ids(shop, where: str = "true") -> list[int]:
    found = shop.pair.rows("destination", f"SELECT id FROM acme.t WHERE {where} ORDER BY id")
    return [row[0] for row in found]


def test_pain_2_a_failure_is_never_a_success(shop):
    """A source that cannot be read any more was stored as succeeded (airbyte#85355, #32914)."""
    shop.apply({"public.t": MERGE})
    shop.sync()
    shop.pair.session("source").execute("REVOKE SELECT ON t FROM reader")
    assert shop.sync()[0].state is RunState.FAILED
    assert len(ids(shop)) == 200


def test_pain_3_a_full_refresh_that_is_resumed_never_serves_a_fragment(shop):
    """The second attempt's 7 of 45 million rows replaced everything (airbyte#44378)."""
    shop.apply({"public.t": "{mode: replace}"})
    shop.sync()
    shop.pair.source("UPDATE t SET v = 'new'")
    death(shop)
    assert ids(shop, "v <> 'new'") == list(range(1, 201)), "the old rows, all of them"
    recovered(shop)
    assert ids(shop, "v = 'new'") == list(range(1, 201))


def test_pain_4_a_connection_that_is_paused_and_resumed_keeps_its_rows_and_cursor(shop, shell):
    """Enabling paused connections again cleared every stream (airbyte#55770)."""
    shop.apply({"public.t": MERGE})
    shop.sync()
    assert shell("connection", "pause", "shop-to-lake")[0] == 0
    assert shell("connection", "resume", "shop-to-lake")[0] == 0
    assert len(ids(shop)) == 200
    assert shop.sync()[1]["t"].rows_extracted == 0


def test_pain_5_the_cursor_is_not_lost_without_the_rows(shop):
    """The cursor was not saved after the rows were, and they came twice (airbyte#44369)."""
    shop.apply({"public.t": "{mode: append, cursor: xmin}"})
    death(shop)
    recovered(shop)
    assert ids(shop) == list(range(1, 201))


def test_pain_6_the_cursor_does_not_move_before_the_rows_are_committed(shop):
    """A stop in the middle stored a bookmark without its rows: they were lost (sdk#3775)."""
    shop.apply({"public.t": MERGE})
    shop.sync()
    cursor = "SELECT cursor FROM _syncward.state"
    before = shop.pair.rows("destination", cursor)
    shop.pair.source("INSERT INTO t VALUES (201, 'late')")
    death(shop)
    assert shop.pair.rows("destination", cursor) == before
    recovered(shop)
    assert ids(shop)[-1] == 201


@pytest.mark.parametrize("mode", ["append", "merge"])
def test_pain_7_rows_at_the_bound_are_neither_lost_nor_doubled(shop, mode):
    """Rows with the time of the last bookmark were lost, or came again (airbyte#14732, #15158)."""
    shop.pair.source("UPDATE t SET at = date_trunc('second', now()) - interval '1 h'")
    key = ", key: [id]" if mode == "merge" else ""
    shop.apply({"public.t": f"{{mode: {mode}, cursor: at{key}}}"})
    assert [shop.sync()[1]["t"].rows_inserted for _ in range(3)] == [200, 0, 0]
    assert ids(shop) == list(range(1, 201))


def test_pain_8_a_deleted_row_goes_without_a_full_read(shop):
    """Deletes at the source never arrived (airbyte#10140); in depth in test_deletes.py."""
    shop.apply({"public.t": "{mode: merge, key: [id], cursor: xmin, deletes: hard, key_sweep: 1}"})
    shop.sync()
    shop.pair.source("DELETE FROM t WHERE id = 7")
    result = shop.sync()[1]["t"]
    assert (result.rows_extracted, result.rows_deleted) == (0, 1)
    assert 7 not in ids(shop)


def test_pain_9_a_new_column_needs_no_click_and_a_new_stream_no_reset(shop):
    """A new column broke the sync, a new stream forced a reset (airbyte#26399, #3520)."""
    shop.apply({"public.t": MERGE})
    shop.sync()
    shop.pair.source("ALTER TABLE t ADD COLUMN w int DEFAULT 5", "CREATE TABLE u (id int)")
    shop.apply({"public.t": MERGE, "public.u": "{mode: replace}"})
    shop.sync()
    assert shop.pair.same("t")
    assert shop.sync()[1]["t"].rows_extracted == 0, "it was not started over"


def test_pain_10_one_stream_is_read_again_without_the_others(shop):
    """To mend one table everything had to be read again (airbyte#23067, peerdb#3853)."""
    shop.pair.source("CREATE TABLE u (id int PRIMARY KEY)", "INSERT INTO u VALUES (1)")
    shop.apply({"public.t": MERGE, "public.u": MERGE})
    shop.sync()
    shop.pair.session("destination").execute("UPDATE acme.t SET v = 'broken' WHERE id = 3")
    _, streams = shop.sync(full_refresh=True, streams=("public.t",))
    assert set(streams) == {"t"}
    assert streams["t"].rows_updated == 1
    assert shop.sync()[1]["u"].rows_extracted == 0, "its cursor stands where it stood"


def test_pain_18_a_large_table_does_not_pass_through_memory_as_a_whole(shop):
    """Big syncs ended for want of memory (airbyte#21406, sling#351)."""
    shop.pair.source("INSERT INTO t SELECT g, repeat('x', 2000) FROM generate_series(201, 30000) g")
    shop.apply({"public.t": "{mode: replace}"})
    tracemalloc.start()
    try:
        result = shop.sync()[1]["t"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.bytes > 50e6
    assert peak < 12e6, "a few blocks, however large the table is"


def test_pain_25_a_changed_target_is_loaded_whole_and_the_old_one_stays(shop):
    """State that was kept redirected the writes: half here, half there (dlt#3680)."""
    shop.apply({"public.t": MERGE})
    shop.sync()
    path = shop.document({"public.t": MERGE})
    path.write_text(path.read_text().replace("schema: acme}", "schema: other}"))
    shop.apply_file(path)
    shop.pair.source("UPDATE t SET v = 'new' WHERE id = 1")
    shop.sync()
    found = "SELECT count(*), count(*) FILTER (WHERE v = 'new') FROM {}.t"
    assert shop.pair.rows("destination", found.format("other")) == [(200, 1)]
    assert shop.pair.rows("destination", found.format("acme")) == [(200, 0)]
