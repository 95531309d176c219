"""`backfill`, `connection reset` and `connection purge`: what a person has done to streams.

Each is a run: a worker does it, for nobody else may unseal credentials. docs/by-hand.md tells more.
"""

import click

from cli.context import Cli, command, interactive
from cli.runs import answer_asked, runnable
from schemas.errors import ConfigError
from schemas.limits import PURGE_UNDO_FOR
from schemas.records import Between, Purge
from schemas.runs import RunKind, RunOptions
from schemas.streams import Mode, StreamSpec
from storage import connections, runs


@click.group()
def _by_hand() -> None:
    """Hold the commands below until `syncward` and `syncward connection` take them."""


_WAIT = click.option("--wait", is_flag=True, help="Wait for the end; exit 0 only if it succeeded.")


@command(_by_hand)
@click.argument("connection")
@click.option("--stream", required=True, metavar="S", help="The stream: mode merge, by a column.")
@click.option("--from", "lower", required=True, metavar="A", help="The first cursor value.")
@click.option("--to", "upper", required=True, metavar="B", help="The value before which it ends.")
@_WAIT
def backfill(cli: Cli, connection: str, *, stream: str, lower: str, upper: str, wait: bool) -> None:
    """Read a stream's rows from A to below B again and merge them; its cursor stays where it is."""
    if not lower or not upper:
        raise ConfigError("--from and --to: both want a value of the stream's cursor column")
    options = RunOptions(streams=(stream,), window=Between(lower=lower, upper=upper))
    with cli.inside(connection) as (tx, account, short):
        found = runnable(tx, short, (stream,))
        _check_backfill(next(s for s in found.spec.streams if s.name == stream), short)
        subject = connections.subject(found)
        asked = runs.enqueue(tx, subject, RunKind.BACKFILL, options, cli.principal)
    answer_asked(cli, account, short, asked, wait=wait)


def _check_backfill(stream: StreamSpec, connection: str) -> None:
    """Refuse at once what a worker would refuse: it merges by a key what a column bounds."""
    if stream.mode is Mode.MERGE and stream.cursor not in {None, "xmin"}:
        return
    by = stream.cursor or "no cursor"
    raise ConfigError(
        f"{stream.name}: a backfill needs mode: merge and a cursor that is a column; this stream "
        f"is {stream.mode} by {by}. Read everything again with: syncward run enqueue {connection} "
        f"--full-refresh --stream {stream.name}"
    )


@command(_by_hand)
@click.argument("connection")
@click.option("--stream", "streams", multiple=True, metavar="S", help="Only this stream.")
@_WAIT
def reset(cli: Cli, connection: str, *, streams: tuple[str, ...], wait: bool) -> None:
    """Forget where streams are read: the next run reads everything. Rows stay as they are."""
    with cli.inside(connection) as (tx, account, short):
        subject = connections.subject(runnable(tx, short, streams))
        options = RunOptions(streams=streams)
        asked = runs.enqueue(tx, subject, RunKind.RESET, options, cli.principal)
    answer_asked(cli, account, short, asked, wait=wait)


@command(_by_hand)
@click.argument("connection")
@click.option("--stream", required=True, metavar="S", help="The stream whose rows go.")
@click.option("--undo", is_flag=True, help="Bring back what was purged.")
@click.option("--now", is_flag=True, help="Delete for good, also what is kept of a purge before.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_WAIT
def purge(
    cli: Cli, connection: str, *, stream: str, undo: bool, now: bool, yes: bool, wait: bool
) -> None:
    """Take all rows of a stream out of its table; they can be brought back for some days."""
    if undo and now:
        raise ConfigError("--undo and --now: choose one")
    how = Purge.UNDO if undo else Purge.NOW if now else Purge.KEEP
    with cli.inside(connection) as (tx, _, short):
        target = runnable(tx, short, (stream,)).spec.target.schema_name
    if how is not Purge.UNDO and not yes:
        _confirm(f"{target}.{stream.split('.', 1)[1]}", how)
    options = RunOptions(streams=(stream,), purge=how)
    with cli.inside(connection) as (tx, account, short):
        subject = connections.subject(runnable(tx, short, (stream,)))
        asked = runs.enqueue(tx, subject, RunKind.PURGE, options, cli.principal)
    answer_asked(cli, account, short, asked, wait=wait)


def _confirm(table: str, how: Purge) -> None:
    """Ask a person; where nobody sits at a terminal, `--yes` must have been said."""
    then = (
        "They are deleted for good, with those of an earlier purge"
        if how is Purge.NOW
        else f"They can be brought back for {PURGE_UNDO_FOR.days} days with --undo"
    )
    sentence = (
        f"all rows of {table} go at the destination. {then}. The next run of the connection reads "
        "everything and loads it again; to keep the table empty, take the stream out of the "
        "connection afterwards"
    )
    if not interactive():
        raise ConfigError(f"{sentence}. Nothing was changed: say --yes")
    click.confirm(f"{sentence}. Go on?", abort=True, err=True)


commands = {"backfill": _by_hand.commands["backfill"]}
of_connection = (_by_hand.commands["reset"], _by_hand.commands["purge"])
