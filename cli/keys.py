"""`syncward keys`: the keyring files."""

from pathlib import Path

import click

from cli import credentials
from cli.context import Cli, command
from cli.show import ago, table
from crypto import keyring as keyrings


@click.group()
def keys() -> None:
    """Keyrings: init, status."""


commands = {"keys": keys}


@command(keys)
@click.argument("directory", type=click.Path(path_type=Path))
def init(cli: Cli, directory: Path) -> None:
    """Make a keyring: one file for operators, one for workers."""
    operator_file, worker_file = keyrings.init(directory)
    cli.answer(
        {"operator": str(operator_file), "worker": str(worker_file)},
        lambda: (
            f"{operator_file}: for the CLI and the scheduler; it seals and cannot open\n"
            f"{worker_file}: for workers only; move it to their hosts and delete it here"
        ),
    )


@command(keys)
def status(cli: Cli) -> None:
    """Show the keyring in use: purposes, age, and what this host can do with them."""
    found = credentials.open_keyring(cli).status()
    rows = [
        (
            s.purpose,
            str(s.root_id),
            s.state,
            ago(s.created_at),
            "yes" if s.can_wrap else "no",
            "yes" if s.can_unwrap else "no",
        )
        for s in found
    ]
    cli.answer(
        list(found), lambda: table(("PURPOSE", "ROOT", "STATE", "MADE", "SEALS", "OPENS"), rows)
    )
