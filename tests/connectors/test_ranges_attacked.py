"""Ranges against least rights, rewritten tables, errors beside a lock, and a link that is silent."""

import threading
import time

import pytest

from connectors import pg_ranges
from connectors.pg_sessions import Sessions
from connectors.sources import postgres
from schemas.errors import ConfigError, TransientError
from schemas.runs import RunState
from tests.connectors.test_ranges_beside import ROWS, Steps, make, nobody_is_left, until

pytestmark = pytest.mark.integration


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


@pytest.fixture
def shop(world):
    make(world.pair, "keyed")
    make(world.pair, "plain", key="")
    spec = "{mode: replace, range_rows: 100, ranges_at_once: 3, columns: {include: [id]}}"
    world.apply({f"public.{t}": spec for t in ("keyed", "plain")})
    return world


def test_a_login_that_may_read_some_columns_reads_a_table_without_a_key_in_one_piece(shop):
    """Neither its lock nor the place of its rows is for such a login."""
    with shop.pair.connect("source") as db:
        db.execute("REVOKE ALL ON keyed, plain FROM reader")
        db.execute("GRANT SELECT (id) ON keyed, plain TO reader")
    run, streams = shop.sync()
    assert run.state is RunState.SUCCEEDED, run
    assert {r.rows_inserted for r in streams.values()} == {ROWS}
    assert "ranges of the places" not in shop.log(run.run_id)
    assert "ranges of (id)" in shop.log(run.run_id)
