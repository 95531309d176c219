"""`syncward drain` and `syncward retention`: the whole installation."""

import sys
import time
from datetime import timedelta

import click

from cli.context import Cli, command
from cli.main import EXIT_FAILED
from cli.parameters import DurationType
from cli.show import table
from storage import instance, retention
from storage.retention import Forgotten

_POLL_S = 0.5


@click.group()
def _group() -> None:
    """Only here to register the commands."""


commands = _group.commands


@command(_group)
@click.option("--reason", default="maintenance", help="Shown by `run explain`, kept in the event.")
@click.option(
    "--timeout", type=DurationType(), default="10m", show_default=True, help="Wait at most so long."
)
@click.option("--end", is_flag=True, help="Start runs again.")
def drain(cli: Cli, *, reason: str, timeout: timedelta, end: bool) -> None:
    """Start nothing any more and wait until nothing runs; what is due is kept and waits."""
    if end:
        _end(cli)
        return
    with cli.transaction() as tx:
        instance.pause(tx, reason, cli.principal)
    deadline = time.monotonic() + timeout.total_seconds()
    busy, told = -1, -1
    while busy != 0 and time.monotonic() < deadline:
        time.sleep(_POLL_S if busy > 0 else 0)
        with cli.transaction() as tx:
            busy = instance.read(tx).busy
        if busy and busy != told:
            cli.note(f"{busy} runs are busy")
            told = busy
    cli.answer(
        {"drained": busy == 0, "busy": busy},
        lambda: (
            "drained: nothing runs, nothing starts; go on with: syncward drain --end"
            if busy == 0
            else f"{busy} runs are still busy; nothing new starts. Wait again: syncward drain; "
            "or stop them: syncward run cancel RUN"
        ),
    )
    if busy:
        sys.exit(EXIT_FAILED)


def _end(cli: Cli) -> None:
    with cli.transaction() as tx:
        moved = instance.resume(tx, cli.principal)
    cli.answer(
        {"drained": False, "changed": moved},
        lambda: "runs start again" if moved else "nothing to end: the instance was not drained",
    )


@command(_group, "retention")
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
def apply_retention(cli: Cli, *, dry_run: bool) -> None:
    """Remove runs with their logs and outputs that are older than the plans keep.

    Schedulers do this every hour by themselves; the audit stream is not touched by it.
    """
    with cli.transaction() as tx:
        found = retention.expired(tx)
    if dry_run:
        rows = [(one.account, f"{one.days} days", f"{one.runs:,}") for one in found]
        cli.answer(found, lambda: table(("ACCOUNT", "KEPT", "RUNS TO REMOVE"), rows))
        return
    gone = Forgotten()
    for one in found:
        batch = Forgotten(runs=1)
        while batch.runs:
            with cli.transaction() as tx:
                batch = retention.forget(tx, one, cli.principal)
            gone += batch
    with cli.transaction() as tx:
        months = retention.drop_months(tx, cli.principal)
    cli.answer(
        {"removed": gone, "partitions_dropped": months},
        lambda: (
            f"removed {gone.runs:,} runs, {gone.log_lines:,} log lines, "
            f"{gone.outputs:,} outputs, {len(months)} partitions"
        ),
    )
