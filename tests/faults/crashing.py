"""`python -m tests.faults.crashing`: a scheduler or a worker that dies where a test wants it to.

The test puts a file named by a point's number into the directory `CRASH_PLAN`; the first process
that reaches this point takes the file away and dies.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from schemas.start import start
from tests.faults.crash_points import POINTS, Point, arm, die

#: What stands for the stepped world's queue in a real process.
REAL = {"tests.world:Jobs.send": "workers.enqueue:JobQueue.send"}


def _mortal(point: Point, plan: Path) -> None:
    def taken_at_once() -> None:
        try:
            plan.unlink()
        except FileNotFoundError:
            return  # another process was faster
        die()

    real = replace(point, function=REAL.get(point.function, point.function))
    arm(real, taken_at_once, wanted=plan.exists)


def main() -> None:
    role, plans = os.environ["CRASH_ROLE"], Path(os.environ["CRASH_PLAN"])  # noqa: TID251 - a test's own process
    run: Callable[..., None]
    if role == "scheduler":
        from scheduler.main import run
    else:
        from workers.main import run
    for number, point in enumerate(POINTS):
        _mortal(point, plans / str(number))
    start(run, "worker")


if __name__ == "__main__":
    main()
