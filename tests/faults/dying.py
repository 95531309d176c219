"""A worker of one run that dies at one place, beside the test that watches the run."""

import os
from uuid import UUID

from scheduler import ticks
from schemas.runs import RunState
from tests.faults.crash_points import DIED, Point, arm, die
from tests.world import Control, World
from workers import run_sync


def dies_at(world: World, run_id: UUID, point: Point) -> None:
    """Let a process of its own execute a run and die at one place; its lease is taken from it."""
    jobs = world.dispatch()
    child = os.fork()
    if child == 0:
        try:
            old = world.control
            control = Control(old.cluster, old.database, old.password)
            worker_file = world.directory / "keys" / "worker.json"
            deps = World._deps(control, world.cli.settings, worker_file)
            arm(point, die)
            for job in jobs:
                run_sync.execute(job, deps)
        finally:
            os._exit(0)  # never reached: without this it would go on as a second test runner
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED, "the point was not reached"
    assert world.run(run_id).state is RunState.RUNNING
    world.expire_leases()
    ticks.reap_tick(world.scheduler)
