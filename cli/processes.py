"""`syncward scheduler`, `syncward worker` and `syncward sealer`: become that process."""

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


@click.command()
@click.option(
    "--accept-loss", metavar="REASON",
    help="Once, after a restore: go on although signed events are gone.",
)  # fmt: skip
def sealer(accept_loss: str | None) -> None:
    """Run a sealer in the foreground. Any number may run, one at a time seals."""
    _become("audit.process", *(["--accept-loss", accept_loss] if accept_loss is not None else []))


commands = {"scheduler": scheduler, "worker": worker, "sealer": sealer}


def _become(module: str, *words: str) -> None:
    """Replace this process, so that a supervisor's signals arrive where they belong."""
    root = Path(__file__).parent.parent
    os.chdir(root) if not Path.cwd().exists() else None
    os.execv(sys.executable, [sys.executable, "-m", module, *words])  # noqa: S606 - our own interpreter and module
