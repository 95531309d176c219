"""`syncward diff` and `syncward apply`: a document, and making the instance like it."""

from collections.abc import Sequence
from pathlib import Path

import click

from cli import changes, credentials
from cli.changes import Applying, Change
from cli.context import Cli, command
from cli.document import load
from cli.show import plain
from storage import accounts, connections


@click.group()
def _group() -> None:
    """Only here to register the two commands."""


commands = _group.commands


@command(_group)
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path))
def diff(cli: Cli, path: Path) -> None:
    """Show what `apply` would change, and what that means for the data."""
    _pass_over(cli, path, write=False)


@command(_group)
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path))
def apply(cli: Cli, path: Path) -> None:
    """Make resources and connections like the document. A second time changes nothing."""
    _pass_over(cli, path, write=True)


def _pass_over(cli: Cli, path: Path, *, write: bool) -> None:
    found = make_so(cli, path, write=write)
    cli.answer(found, lambda: _text(found, write=write))


def make_so(cli: Cli, path: Path, *, write: bool) -> list[Change]:
    """Compare a document with the instance; with `write` make the instance like it."""
    document, specs = load(path)
    keyring = credentials.open_keyring(cli)
    name = cli.account or document.account
    with cli.transaction() as tx:
        account = accounts.resolve(tx, name)
        applying = Applying(
            cli=cli,
            tx=tx,
            account=account,
            base=path.parent,
            now=connections.now(tx),
            write=write,
            keyring=keyring,
        )
        return changes.run(applying, document, specs)


_SIGN = {"create": "+", "update": "~", "unchanged": "="}
_DONE = {"create": "created", "update": "updated", "unchanged": "unchanged"}


def _text(found: Sequence[Change], *, write: bool) -> str:
    lines = []
    for change in found:
        verb = _DONE[change.verb] if write else change.verb
        lines.append(f"{_SIGN[change.verb]} {change.what}: {verb}")
        lines += [f"    {plain(detail)}" for detail in change.details]
    if all(change.verb == "unchanged" for change in found):
        lines.append("nothing to change" if not write else "nothing changed")
    return "\n".join(lines)
