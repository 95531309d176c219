"""Rejected rows on the whole way of a run: told in counts, shown from its sealed document."""

import json
import logging

import pytest

from schemas.runs import RunState

pytestmark = pytest.mark.integration


def test_a_run_with_rejected_rows_succeeds_and_its_output_shows_some(world, caplog, shell):
    world.pair.source(
        "CREATE TABLE orders (id text PRIMARY KEY, v int)",
        "INSERT INTO orders SELECT 'secret-' || g, g FROM generate_series(1, 100) g",
    )
    world.apply({"public.orders": "{mode: merge, key: [id], cursor: xmin, rejected_max: 25%}"})
    assert world.sync()[0].state is RunState.SUCCEEDED
    lake = world.pair.session("destination")
    lake.execute("ALTER TABLE acme.orders ADD CONSTRAINT small CHECK (v <= 1000)")
    world.pair.source("UPDATE orders SET v = v + 980")
    with caplog.at_level(logging.WARNING):
        run, streams = world.sync()
    assert run.state is RunState.FAILED
    assert "more rows were refused than rejected_max allows (25%): a check refuses it" in run.error
    assert lake.execute("SELECT max(v) FROM acme.orders").fetchone() == (100,)

    world.pair.source("UPDATE orders SET v = v - 60")
    with caplog.at_level(logging.WARNING):
        run, streams = world.sync()
    assert run.state is RunState.SUCCEEDED
    assert (streams["orders"].rows_rejected, streams["orders"].rows_updated) == (20, 80)
    assert "20 rows were rejected; run output shows some of them" in world.log(run.run_id)
    assert "read once more" in world.log(run.run_id)
    (record,) = [r for r in caplog.records if r.getMessage() == "rows_rejected"]
    assert record.rows == 20
    assert "secret" not in caplog.text

    code, out, _ = shell("run", "output", "shop-to-lake")
    assert code == 0
    assert "public.orders: 20 rows rejected" in out
    assert out.count('{"id": "secret-') == 20
    code, out, _ = shell("run", "output", "shop-to-lake", "--json")
    (rejected,) = json.loads(out)["document"]["rejected"]
    assert (rejected["stream"], rejected["rows"]) == ("public.orders", 20)
    assert rejected["sample"][0]["reason"] == "a check refuses it"
    for table in ("run_streams", "run_outputs", "run_logs", "runs", "cursors", "audit.event"):
        assert not world.control.one(
            f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%secret-%'"
        ), table
