"""Guards on the whole way of a run: it awaits a person, the old data stays served, counts are kept.

Rivals let an empty source wipe the target, and report it as a success (pains 2, 3 and 4 of ours).
"""

import json
from typing import Any

import pytest

from cli.records import opened_output
from scheduler import ticks
from schemas.guards import Finding, Guard
from schemas.runs import RunOptions, RunState
from storage import audit_tail, connections, outputs, runs
from tests.world import OPERATOR

pytestmark = pytest.mark.integration

STREAMS = {
    "public.orders": "{mode: replace}",
    "public.other": "{mode: merge, key: [id], cursor: xmin}",
}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE orders (id text PRIMARY KEY, v int)",
        "INSERT INTO orders SELECT 'secret-' || g, g FROM generate_series(1, 200) g",
        "CREATE TABLE other (id int PRIMARY KEY, v int)",
        "INSERT INTO other SELECT g, g FROM generate_series(1, 10) g",
    )
    world.apply(STREAMS)
    assert world.sync()[0].state is RunState.SUCCEEDED
    return world


def served(shop, table: str = "orders") -> int:
    return shop.pair.rows("destination", f"SELECT count(*) FROM acme.{table}")[0][0]


def decide(shop, run, how) -> None:
    with shop.cli.inside() as (tx, _, _name):
        how(tx, run.run_id, OPERATOR)


def approve(shop, run):
    decide(shop, run, runs.approve)
    shop.step()
    return shop.run(run.run_id)


def document(shop, run) -> dict[str, Any]:
    with shop.cli.inside() as (tx, _, _name):
        stored = outputs.stored(tx, run.run_id)
    return opened_output(shop.cli, run, stored)


def test_a_source_that_lost_its_rows_leaves_the_target_as_it_was_and_the_run_waits(shop):
    shop.pair.source("DELETE FROM orders WHERE v > 20", "INSERT INTO other VALUES (11, 11)")
    run, streams = shop.sync()
    assert (run.state, run.error_code) == (RunState.AWAITING_APPROVAL, "delete_ratio")
    assert "180 of 200 rows would be deleted (90 %, allowed are 20 %)" in run.error
    assert served(shop) == 200
    assert served(shop, "other") == 11, "one stopped stream does not stop the others"
    assert set(streams) == {"other"}
    (finding,) = run.findings
    assert finding == Finding(
        guard=Guard.DELETE_RATIO, stream="public.orders", amount=180,
        before=200, after=20, to_delete=180,
    )  # fmt: skip
    assert "run.awaiting_approval" in shop.events(run.run_id)
    assert "180 of 200 rows would be deleted" in shop.log(run.run_id)


def test_approve_runs_it_again_with_a_higher_fence_and_only_what_was_stopped(shop):
    fences = "SELECT max(fence) FROM _syncward.state"
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, _ = shop.sync()
    before = shop.pair.rows("destination", fences)
    ended = approve(shop, run)
    assert (ended.state, ended.run_id, ended.findings) == (RunState.SUCCEEDED, run.run_id, ())
    assert served(shop) == 20
    assert shop.streams(run.run_id)["orders"].rows_deleted == 180
    assert "180 deleted" in shop.log(run.run_id)
    assert "already loaded by attempt 1; not read again" in shop.log(run.run_id)
    assert shop.pair.rows("destination", fences) > before
    assert shop.events(run.run_id).count("run.approved") == 1
    with shop.cli.transaction() as tx:
        filters = audit_tail.Filters(actions=("run.approved",))
        (event,) = audit_tail.newest(tx, filters, 5)
    assert '"found":"public.orders delete_ratio 180"' in event.body


def test_an_approval_covers_what_was_seen_and_nothing_worse(shop):
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, _ = shop.sync()
    shop.pair.source("DELETE FROM orders WHERE v > 19")
    again = approve(shop, run)
    assert (again.state, again.findings[0].to_delete) == (RunState.AWAITING_APPROVAL, 181)
    shop.pair.source("DELETE FROM orders")
    empty = approve(shop, run)
    assert (empty.state, empty.error_code) == (RunState.AWAITING_APPROVAL, "zero_rows")
    assert served(shop) == 200
    assert approve(shop, run).state is RunState.SUCCEEDED
    assert served(shop) == 0


def test_an_approval_is_of_one_run_and_one_stream(shop):
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, _ = shop.sync()
    approve(shop, run)
    shop.pair.source("INSERT INTO orders SELECT 'b' || g, g FROM generate_series(1, 180) g")
    assert shop.sync()[0].state is RunState.SUCCEEDED
    shop.pair.source("DELETE FROM orders WHERE id LIKE 'b%'")
    assert shop.sync()[0].error_code == "delete_ratio"


def test_reject_ends_the_run_and_the_next_one_waits_again(shop):
    shop.apply(STREAMS, schedule="{every: 10s}")
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, _ = shop.sync()
    decide(shop, run, runs.reject)
    ended = shop.run(run.run_id)
    assert (ended.state, ended.error_code) == (RunState.CANCELLED, "rejected")
    assert "180 of 200" in ended.error
    shop.control.act("UPDATE schedules SET next_due_at = now() - interval '1 s'")
    assert ticks.due_tick(shop.scheduler) == 1
    shop.step()
    (state, code, run_id) = shop.control.all("SELECT state, error_code, run_id FROM active_runs")[0]
    assert (state, code) == ("awaiting_approval", "delete_ratio")
    assert run_id != run.run_id
    assert served(shop) == 200
    with shop.cli.inside() as (tx, _, _name):
        assert connections.get(tx, "shop-to-lake").state == "active", "it is not paused for it"


def test_two_stopped_streams_are_decided_together(shop):
    shop.apply({**STREAMS, "public.other": "{mode: merge, key: [id], deletes: soft}"})
    shop.pair.source("INSERT INTO other SELECT g, g FROM generate_series(11, 150) g")
    shop.sync()
    shop.pair.source("DELETE FROM orders WHERE v > 20", "DELETE FROM other")
    run, _ = shop.sync()
    assert [f.guard for f in run.findings] == [Guard.DELETE_RATIO, Guard.ZERO_ROWS]
    assert "(and 1 more: run output)" in run.error
    assert approve(shop, run).state is RunState.SUCCEEDED
    assert (served(shop), served(shop, "other")) == (20, 150)


def test_a_stream_that_failed_and_one_that_was_stopped_is_a_run_that_waits(shop):
    shop.apply({"public.missing": "{mode: replace}", **STREAMS})
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, streams = shop.sync()
    assert run.state is RunState.AWAITING_APPROVAL
    assert streams["missing"].state == "failed"
    ended = approve(shop, run)
    assert (ended.state, ended.error_code) == (RunState.FAILED, "streams")
    assert served(shop) == 20


def test_a_cursor_in_the_future_stops_its_stream_and_approval_loads_the_other_rows(shop):
    shop.pair.source(
        "CREATE TABLE timed (id int PRIMARY KEY, at timestamptz)",
        "INSERT INTO timed VALUES (1, now() - interval '1 h'), (2, now() + interval '9 days')",
    )
    shop.apply({"public.timed": "{mode: merge, key: [id], cursor: at}"})
    run, _ = shop.sync()
    assert run.error_code == "future_cursor"
    assert approve(shop, run).state is RunState.SUCCEEDED
    assert shop.pair.rows("destination", "SELECT id FROM acme.timed") == [(1,)]


def test_the_counter_of_sweeps_survives_the_worker(shop):
    shop.apply({"public.other": "{mode: merge, key: [id], cursor: xmin, deletes: hard, "
                                "key_sweep: 3}"})  # fmt: skip
    shop.pair.source("DELETE FROM other WHERE id = 1")
    deleted = [shop.sync()[1]["other"].rows_deleted for _ in range(3)]
    assert deleted == [0, 0, 1]


# ── what people see, and who may see the keys ────────────────────────────────────────────────────


def test_show_explain_and_output_preview_what_was_found(shop, shell):
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, _ = shop.sync()
    for words in ("show", "explain"):
        code, out, _ = shell("run", words, "shop-to-lake")
        assert code == 0
        assert "delete_ratio, public.orders: served 200, at the source 20, to delete 180" in out
        assert "secret-" not in out, "keys are data"
        found = json.loads(shell("run", words, "shop-to-lake", "--json")[1])["findings"]
        assert found[0]["to_delete"] == 180
    code, out, _ = shell("run", "output", "shop-to-lake")
    assert code == 0
    assert out.count("key (secret-") == 5
    assert "output.read" in shop.events(run.run_id)
    assert shell("run", "approve", "shop-to-lake")[0] == 0
    shop.step()
    assert shop.run(run.run_id).state is RunState.SUCCEEDED
    assert "delete_ratio" in shell("run", "output", str(run.run_id))[1], "what was approved stays"


def test_the_keys_of_a_preview_are_sealed_and_stand_nowhere_else(shop):
    shop.pair.source("DELETE FROM orders WHERE v > 20")
    run, _ = shop.sync()
    shop.deps.logs.flush()
    (preview,) = document(shop, run)["guards"]
    assert len(preview["sample_keys"]) == 5
    tables = shop.control.all(
        "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables "
        "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    assert len(tables) > 20
    for (table,) in tables:
        found = shop.control.one(f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%secret-%'")
        assert found == 0, table
    assert shop.control.one("SELECT count(*) FROM active_runs t WHERE t::text LIKE '%180%'") == 1


def test_options_without_findings_are_written_as_an_older_version_reads_them():
    assert set(RunOptions(full_refresh=True).model_dump(mode="json")) == {
        "full_refresh", "streams", "approved",
    }  # fmt: skip
    finding = Finding(guard=Guard.ZERO_ROWS, stream="a.b", amount=1, before=1, to_delete=1)
    whole = RunOptions(approvals=(finding,))
    assert RunOptions.model_validate_json(whole.model_dump_json()) == whole
    merged = RunOptions(full_refresh=True).merged(whole)
    assert merged.approvals == (), "an approval is of its run only"


@pytest.mark.parametrize(("change", "covers"), [
    ({}, True), ({"amount": 9, "to_delete": 9}, True), ({"amount": 11, "to_delete": 11}, False),
    ({"before": 15}, False), ({"guard": Guard.ZERO_ROWS}, False), ({"stream": "a.c"}, False),
    ({"what": "n bigint -> integer"}, False),
])  # fmt: skip
def test_what_an_approval_covers(change, covers):
    approved = Finding(
        guard=Guard.DELETE_RATIO, stream="a.b", amount=10, before=20, after=10, to_delete=10
    )
    assert approved.model_copy(update=change).covered_by(approved) is covers
