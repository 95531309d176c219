"""`syncward doctor`: what is wrong with the installation, why it matters, what to type."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

import click

from cli.checks import AREAS, Area, Check
from cli.context import Cli, command
from cli.main import EXIT_FAILED
from cli.show import plain
from schemas.errors import SyncwardError


@click.group()
def _group() -> None:
    """Only here to register the command."""


commands = _group.commands


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's answer; `wrong` None: nothing is."""

    area: str
    name: str
    wrong: str | None
    why: str
    do: str
    note: str | None = None


@command(_group)
@click.argument("areas", nargs=-1, type=click.Choice(sorted(AREAS)), metavar="[AREA]...")
def doctor(cli: Cli, areas: tuple[str, ...]) -> None:
    """Check the installation, or some areas of it; exit 1 if something is wrong."""
    found = [one for name in AREAS if not areas or name in areas for one in _look(cli, AREAS[name])]
    wrong = [one for one in found if one.wrong is not None]
    cli.answer(
        {"ok": not wrong, "checks": [asdict(one) for one in found]},
        lambda: "\n".join([*map(_text, found), "", _summary(len(found), len(wrong))]),
    )
    if wrong:
        sys.exit(EXIT_FAILED)


def _look(cli: Cli, area: Area[Any]) -> list[Finding]:
    """Ask one area. One that cannot be asked is the only finding of its area."""
    try:
        facts = area.gather(cli)
    except SyncwardError as error:
        return [_finding(area, area.unreachable, error.public)]
    found = [_finding(area, area.unreachable, None)]
    for check in area.checks:
        note = check.note(facts) if check.note is not None else None
        found.append(_finding(area, check, check.wrong(facts), note))
    return found


def _finding(
    area: Area[Any], check: Check[Any], wrong: str | None, note: str | None = None
) -> Finding:
    return Finding(area.name, check.name, wrong, check.why, check.do, note)


def _text(one: Finding) -> str:
    if one.wrong is None:
        note = f" ({plain(one.note)})" if one.note else ""
        return f"ok     {one.area}.{one.name}{note}"
    return "\n".join(
        [
            f"WRONG  {one.area}.{one.name}: {plain(one.wrong)}",
            f"       why  {one.why}",
            f"       do   {one.do}",
        ]
    )


def _summary(total: int, wrong: int) -> str:
    return f"{total} checks, {wrong} wrong" if wrong else f"{total} checks, nothing is wrong"
