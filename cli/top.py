"""`syncward top`: queue, workers and runs, live on a terminal, once elsewhere."""

import sys
from collections.abc import Callable
from uuid import UUID

import click
from sqlalchemy import Connection

from cli import top_frame
from cli.context import Cli, command
from cli.top_frame import Rates
from schemas.audit import AuditAction, AuditEvent, TargetKind
from schemas.errors import TransientError
from storage import accounts, audit, overview, tenancy
from storage.overview import Overview

#: Lines of a frame that has no terminal around it, beside those of runs.
_LINES = 40


@click.group()
def _group() -> None:
    """Only here to register the command."""


commands = _group.commands


@command(_group)
@click.option("--once", is_flag=True, help="One plain frame; also what happens without a terminal.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 200), help="Runs of each kind."
)
def top(cli: Cli, *, once: bool, limit: int) -> None:
    """Show queue, workers and runs of all accounts (or of `-A`), every second; q quits."""
    account_id = _account(cli)
    rates = Rates()

    def look() -> Overview:
        with cli.transaction() as tx:
            _enter(tx, account_id)
            return overview.read(
                tx, account_id=account_id, limit=limit, runs_max=cli.settings.runs_max
            )

    first = look()
    rates.note(first)
    lines = 2 * limit + _LINES
    if cli.json or once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        document = top_frame.document(first, rates)
        cli.answer(
            document, lambda: "\n".join(t for t, _ in top_frame.lines(first, rates, 80, lines))
        )
        return
    from cli.progress import live  # noqa: PLC0415 - rich costs a tenth of a second to import

    frame = _frames(look, first, rates)
    live(frame)


def _account(cli: Cli) -> UUID | None:
    """Return the account asked for; a look at all of them is an event, once per invocation."""
    with cli.transaction() as tx:
        name = cli.account or cli.settings.account
        if name is not None:
            return accounts.get(tx, name).account_id
        audit.append(
            tx,
            AuditEvent(
                AuditAction.INSTANCE_READ,
                TargetKind.INSTANCE,
                audit.INSTANCE_ID,
                cli.principal,
                reason="top",
            ),
        )
    return None


def _enter(tx: Connection, account_id: UUID | None) -> None:
    if account_id is None:
        tenancy.across(tx)
    else:
        tenancy.enter(tx, account_id)


def _frames(
    look: Callable[[], Overview], first: Overview, rates: Rates
) -> Callable[[int, int], list[top_frame.Line]]:
    """Return what draws the next frame; a database that is away leaves the last one standing."""
    last = [first]

    def frame(width: int, height: int) -> list[top_frame.Line]:
        trouble: list[top_frame.Line] = []
        try:
            last[0] = look()
            rates.note(last[0])
        except TransientError as error:
            trouble = [(f"as of {last[0].at:%H:%M:%S}: {error.public}"[:width], "bad")]
        return [*trouble, *top_frame.lines(last[0], rates, width, height - len(trouble))]

    return frame
