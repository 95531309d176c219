"""`syncward connection schema`: a stream's table here and at its source, and what differs.

What a table has only its own server knows, so a worker looks; since when it is like that, and what
was changed before, is known from the runs that the control database still has.
"""

from collections.abc import Sequence
from typing import Any

import click

from cli.context import Cli, Group, command
from cli.questions import ask_a_worker
from cli.runs import answer_asked, runnable
from cli.show import plain, table
from schemas.errors import Conflict
from schemas.records import Change
from schemas.runs import RunKind, RunOptions
from schemas.streams import Drift
from storage import connections, runs, stream_shapes
from storage.stream_shapes import Since


@click.group(cls=Group)
def schema() -> None:
    """Look at the tables of a connection: show, diff; accept a change of a frozen one."""


_STREAMS = click.option("--stream", "streams", multiple=True, metavar="S", help="Only this stream.")


@command(schema)
@click.argument("connection")
@_STREAMS
def show(cli: Cli, connection: str, *, streams: tuple[str, ...]) -> None:
    """Show each stream's columns at the destination, and since when they are like that."""
    document = _ask(cli, connection, streams)
    texts = [_shown(one) for one in document["streams"]]
    cli.answer(document, lambda: "\n\n".join(texts))


def _shown(one: dict[str, Any]) -> str:
    since = one["since"]
    at_least = "at least " if one["since_at_least"] else ""
    when = f"like this since {at_least}{since:%Y-%m-%d %H:%M} UTC" if since else "not loaded yet"
    lines = [f"{plain(one['stream'])}: {when}; drift: {one['drift']}"]
    if one["error"]:
        return "\n".join([*lines, plain(one["error"])])
    columns = one["columns"]
    rows = [(c["name"], c["type"], "" if c["nullable"] else "NOT NULL") for c in columns or ()]
    lines.append(table(("COLUMN", "TYPE", ""), rows) if rows else "no table there yet")
    lines += [f"{c['at']:%Y-%m-%d %H:%M}  {plain(c['says'])}" for c in one["changed_before"]]
    return "\n".join(lines)


@command(schema)
@click.argument("connection")
@_STREAMS
def diff(cli: Cli, connection: str, *, streams: tuple[str, ...]) -> None:
    """Say what of each stream's table is otherwise at the source now, and what becomes of it."""
    document = _ask(cli, connection, streams)
    lines = [line for one in document["streams"] for line in _differs(one, document["connection"])]
    cli.answer(document, lambda: "\n".join(lines))


def _differs(one: dict[str, Any], connection: str) -> list[str]:
    name = plain(one["stream"])
    if one["error"]:
        return [f"{name}: {plain(one['error'])}"]
    if one["columns"] is None:
        return [f"{name}: no table there yet; the first run makes it"]
    if not one["changes"]:
        return [f"{name}: no change"]
    lines = [f"{name}: {plain(change['says'])}" for change in one["changes"]]
    return [*lines, f"  {_then(one, connection)}"]


def _then(one: dict[str, Any], connection: str) -> str:
    """Say what the next run makes of the changes: one that none follows, then the policy."""
    kinds = {Change(change["change"]) for change in one["changes"]}
    if Change.CHANGED in kinds:
        return "runs fail: no policy follows another type; change the column here first"
    policy = Drift(one["drift"])
    if policy is Drift.FREEZE:
        return (
            "runs fail until it is accepted: syncward connection schema accept "
            f"{connection} --stream {plain(one['stream'])}"
        )
    asks = "; its guard asks before, as a column holds less" if Change.NARROWED in kinds else ""
    follows = "the next run follows" if policy is Drift.EVOLVE else "the table stays as it is"
    return f"{follows}{asks}"


def _ask(cli: Cli, connection: str, streams: Sequence[str]) -> dict[str, Any]:
    """Have a worker look at both ends, and add what the control database knows of before."""
    answer = ask_a_worker(
        cli,
        connection,
        lambda tx, _, short: connections.subject(runnable(tx, short, streams)),
        RunKind.SCHEMA,
        RunOptions(streams=tuple(streams)),
    )
    with cli.inside(f"{answer.account}/") as (tx, _, _name):
        known = stream_shapes.since(tx, answer.run.subject_id)
    return {
        "run_id": answer.run.run_id,
        "connection": answer.name,
        "streams": [
            {**one, **_before(known.get(one["stream"]))} for one in answer.document["tables"]
        ],
    }


def _before(known: Since | None) -> dict[str, Any]:
    if known is None:
        return {"since": None, "since_at_least": False, "changed_before": []}
    told = [{"at": at, "says": str(change)} for at, change in known.changes]
    return {"since": known.at, "since_at_least": known.at_least, "changed_before": told}


@command(schema)
@click.argument("connection")
@_STREAMS
@click.option("--wait", is_flag=True, help="Wait for the end; exit 0 only if it succeeded.")
def accept(cli: Cli, connection: str, *, streams: tuple[str, ...], wait: bool) -> None:
    """Let frozen streams follow their sources once: a run begins that does so. An audit event."""
    with cli.inside(connection) as (tx, account, short):
        found = runnable(tx, short, streams)
        frozen = tuple(s.name for s in found.spec.streams if s.drift is Drift.FREEZE)
        accepted = tuple(name for name in frozen if not streams or name in streams)
        other = sorted(set(streams) - set(accepted))
        if other or not accepted:
            raise Conflict(
                f"connection {short}: {', '.join(other) or 'no stream'} is drift: freeze; only "
                "such a stream waits for somebody to accept a change"
            )
        options = RunOptions(streams=accepted, accept=accepted)
        asked = runs.enqueue(tx, connections.subject(found), RunKind.SYNC, options, cli.principal)
        connections.accept_schema(
            tx, account, found, accepted, run_id=asked.run_id, principal=cli.principal
        )
    answer_asked(cli, account, short, asked, wait=wait)
