"""`python -m tests.apis.worker JOB`: a worker's process for one job, which may be killed."""

import sys

from schemas.jobs import Job
from schemas.settings import Settings
from workers import run_sync
from workers.main import _build


def main() -> None:
    deps = _build(Settings()).deps
    deps.heartbeat.start()
    run_sync.execute(Job.model_validate_json(sys.argv[1]), deps)


if __name__ == "__main__":
    main()
