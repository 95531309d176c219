"""A worker of the version before gets a run of a kind that it does not know: it changes nothing."""

import subprocess
import sys

import pytest

from schemas.records import Between
from schemas.runs import RunKind, RunOptions, RunState
from storage import connections, runs
from tests.upgrade.versions import unpack_previous
from tests.world import OPERATOR
from workers import run_sync

pytestmark = pytest.mark.integration

#: What the worker of then does with a message, up to where it would begin to work.
CLAIM = """
import os, sys
from datetime import timedelta
from uuid import UUID
from schemas.audit import Principal
from schemas.jobs import Job
from storage import claims
from storage.engine import open_engine, transaction

with transaction(open_engine(os.environ["CONTROL"], "worker")) as tx:
    job = Job(run_id=UUID(sys.argv[1]), dispatch=int(sys.argv[2]))
    claims.claim(tx, job, "old", timedelta(seconds=30), Principal("worker", "old"))
"""


def test_it_is_left_as_it_was_and_a_worker_of_now_takes_it(world, tmp_path):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v int)",
        "INSERT INTO t SELECT g, g FROM generate_series(1, 9) g",
    )
    world.apply({"public.t": "{mode: merge, key: [id], cursor: v}"})
    world.sync()
    options = RunOptions(streams=("public.t",), window=Between(lower="2", upper="4"))
    with world.cli.inside() as (tx, _, _name):
        subject = connections.subject(connections.get(tx, "shop-to-lake"))
        asked = runs.enqueue(tx, subject, RunKind.BACKFILL, options, OPERATOR)
    (job,) = world.dispatch()
    before = world.control.all("SELECT * FROM active_runs")
    done = subprocess.run(
        [sys.executable, "-c", CLAIM, str(job.run_id), str(job.dispatch)],
        cwd=unpack_previous(tmp_path / "previous"),
        env={"CONTROL": world.control.url, "PYTHONPATH": "."},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "'backfill' is not a valid RunKind" in done.stderr) == (1, True)
    assert world.control.all("SELECT * FROM active_runs") == before
    run_sync.execute(job, world.deps)
    run = world.run(asked.run_id)
    assert (run.state, run.attempt) == (RunState.SUCCEEDED, 1)
