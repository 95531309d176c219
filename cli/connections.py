"""`syncward connection`: what moves from where to where, and when."""

from pathlib import Path

import click

from cli import by_hand
from cli.changes import next_slot
from cli.connection_schema import schema
from cli.context import Cli, Group, command
from cli.document import connection_from_file
from cli.show import ago, cursor_text, plain, table
from cli.stopping import Stopped, stop_now
from schemas.accounts import Connection
from storage import connections, resources


@click.group(cls=Group)
def connection() -> None:
    """Manage what moves where: create, list, show, pause, resume, delete."""


commands = {"connection": connection}
connection.add_command(schema)
for one in by_hand.of_connection:
    connection.add_command(one)


@command(connection)
@click.argument("name")
@click.option("-f", "--file", "path", required=True, type=click.Path(path_type=Path), help="YAML.")
def create(cli: Cli, name: str, path: Path) -> None:
    """Create a connection from one entry of a document (see `apply`)."""
    spec = connection_from_file(path, cli.split(name)[1])
    with cli.inside(name) as (tx, account, short):
        connections.create(
            tx,
            account,
            spec,
            source=resources.get(tx, spec.source),
            destination=resources.get(tx, spec.destination),
            next_due_at=next_slot(spec.schedule, account.plan, connections.now(tx)),
            principal=cli.principal,
        )
    cli.answer({"created": short}, lambda: f"connection {short} created ({spec.schedule})")


@command(connection, "list")
def list_(cli: Cli) -> None:
    """List connections."""
    with cli.inside() as (tx, _, _name):
        found = connections.listing(tx)
    rows = [
        (
            c.spec.name,
            f"{c.spec.source} -> {c.spec.destination}",
            c.spec.schedule,
            _state(c),
            ago(c.last_success_at),
        )
        for c in found
    ]
    cli.answer(
        list(found),
        lambda: table(("CONNECTION", "FROM -> TO", "SCHEDULE", "STATE", "SUCCESS"), rows),
    )


def _state(found: Connection) -> str:
    return f"paused ({found.state_reason})" if found.state == "paused" else found.state


def _failures(found: Connection) -> str:
    limit = found.spec.pause_after
    of = "never paused for them" if limit is None else f"{limit} would pause it"
    return f"{found.failures} {'failure' if found.failures == 1 else 'failures'} in a row ({of})"


def _next(found: Connection) -> str:
    due = found.next_due_at
    return str(found.spec.schedule) if due is None else f"{found.spec.schedule}; next {ago(due)}"


#: What ends a pause, by its reason (docs/operations.md).
_THEN_RESUME = "; then: syncward connection resume {name}"
_NEXT_STEPS = {
    "operator": "syncward connection resume {name}",
    "failures": "mend what syncward run explain {name} shows" + _THEN_RESUME,
    "credentials": "syncward resource rotate {ends}, the one that syncward run explain {name} names"
    + _THEN_RESUME,
    "needs_reauth": "syncward resource authorize {ends}, the one that resource list names",
    "unsealable": "give workers the right keyring, or: syncward resource rotate {ends}"
    + _THEN_RESUME,
    "lost_leases": "look at the workers' memory and logs" + _THEN_RESUME,
}


def _next_step(found: Connection) -> list[str]:
    if found.state != "paused" or found.state_reason not in _NEXT_STEPS:
        return []
    ends = f"{found.spec.source} or {found.spec.destination}"
    return [
        f"do          {_NEXT_STEPS[found.state_reason].format(name=found.spec.name, ends=ends)}"
    ]


@command(connection)
@click.argument("name")
def show(cli: Cli, name: str) -> None:
    """Show one connection with its streams and cursors."""
    with cli.inside(name) as (tx, _, short):
        found = connections.get(tx, short)
        cursors = connections.cursors(tx, found.connection_id)
    spec = found.spec
    lines = [
        f"{spec.name}: {spec.source} -> {spec.destination} (schema {spec.target.schema_name})",
        f"schedule    {_next(found)}",
        f"state       {_state(found)}, {_failures(found)}",
        *_next_step(found),
        f"success     {ago(found.last_success_at)}",
    ]
    if spec.description:
        lines.append(f"about       {plain(spec.description)}")
    rows = [
        (
            s.name,
            s.mode,
            ",".join(s.key) or "-",
            s.cursor or "-",
            cursor_text(cursors.get(s.name)) or "-",
        )
        for s in spec.streams
    ]
    streams = table(("STREAM", "MODE", "KEY", "CURSOR", "READ UP TO"), rows)
    cli.answer(
        {**found.spec.model_dump(mode="json", by_alias=True), "state": found.state,
         "state_reason": found.state_reason, "next_due_at": found.next_due_at, "cursors": cursors},
        lambda: "\n".join([*lines, "", streams]),
    )  # fmt: skip


@command(connection)
@click.argument("name")
@click.option("--now", is_flag=True, help="Cancel its running run, too, and wait for its end.")
def pause(cli: Cli, name: str, *, now: bool) -> None:
    """Stop scheduling; a running run goes on to its end."""
    with cli.inside(name) as (tx, account, short):
        found = connections.get(tx, short)
        moved = connections.pause(tx, account, found, cli.principal)
    stopped = stop_now(cli, account, found.connection_id) if now else Stopped()
    cli.answer(
        {"connection": short, "state": "paused", "changed": moved, **stopped.document},
        lambda: f"connection {short} {'paused' if moved else 'was paused already'}{stopped.text}",
    )
    stopped.exit()


@command(connection)
@click.argument("name")
def resume(cli: Cli, name: str) -> None:
    """Schedule again from now on; missed slots are not replayed."""
    with cli.inside(name) as (tx, account, short):
        found = connections.get(tx, short)
        moved = connections.resume(
            tx,
            account,
            found,
            next_due_at=next_slot(found.spec.schedule, account.plan, connections.now(tx)),
            principal=cli.principal,
        )
    cli.answer(
        {"connection": short, "state": "active", "changed": moved},
        lambda: f"connection {short} {'resumed' if moved else 'was active already'}",
    )


@command(connection)
@click.argument("name")
def delete(cli: Cli, name: str) -> None:
    """Delete a connection; data that it has loaded stays."""
    with cli.inside(name) as (tx, account, short):
        connections.delete(tx, account, connections.get(tx, short), cli.principal)
    cli.answer({"deleted": short}, lambda: f"connection {short} deleted; its tables stay")
