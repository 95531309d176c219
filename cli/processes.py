"""`syncward scheduler` and `syncward worker`: become that process."""

import os
import sys
from pathlib import Path

import click


@click.command()
def scheduler() -> None:
    """Run a scheduler in the foreground. Any number may run."""
    _become("scheduler.process")


@click.command()
def worker() -> None:
    """Run a worker in the foreground. SIGTERM drains it."""
    _become("workers.process")


commands = {"scheduler": scheduler, "worker": worker}


def _become(module: str) -> None:
    """Replace this process, so that a supervisor's signals arrive where they belong."""
    root = Path(__file__).parent.parent
    os.chdir(root) if not Path.cwd().exists() else None
    os.execv(sys.executable, [sys.executable, "-m", module])  # noqa: S606 - our own interpreter and module
