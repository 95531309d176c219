"""`syncward run`: ask for runs, look at them, decide about them."""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from uuid import UUID

import click
from sqlalchemy import Connection

from cli.context import Cli, Group, command
from cli.main import EXIT_AWAITING_APPROVAL, EXIT_FAILED
from cli.parameters import DurationType
from cli.records import OpenedLine, Reader, opened_output, read_event
from cli.show import (
    call_table,
    explanation_text,
    jsonable,
    output_text,
    plain,
    run_document,
    run_table,
    run_text,
    said_of,
    window_text,
)
from cli.waiting import wait_for_run
from schemas.accounts import Account
from schemas.accounts import Connection as Known
from schemas.audit import AuditAction
from schemas.errors import Conflict, NotFound
from schemas.runs import (
    FINAL_STATES,
    Explanation,
    Rule,
    Run,
    RunKind,
    RunOptions,
    RunState,
)
from storage import audit, calls, connections, logs, outputs, runs
from storage import explain as explanations
from storage.runs import Enqueued


@click.group(cls=Group)
def run() -> None:
    """Ask for runs, look at them, decide about them."""


commands = {"run": run}

#: Lines that are opened at once, and in all while `--grep` looks for something.
_PAGE = 1_000
GREP_MAX = 50_000

#: So much of a run's id, of which the first twelve digits are a time, may stand for all of it.
_BEGINNING = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}(?:-[0-9a-f]{0,4}(?:-[0-9a-f-]{0,16})?)?")


@command(run)
@click.argument("connection")
@click.option("--full-refresh", is_flag=True, help="Read everything again.")
@click.option("--stream", "streams", multiple=True, metavar="S", help="Only this stream.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit 0 only if it succeeded.")
def enqueue(
    cli: Cli, connection: str, *, full_refresh: bool, streams: tuple[str, ...], wait: bool
) -> None:
    """Ask for a run now. One that is live already is followed by this one."""
    with cli.inside(connection) as (tx, account, short):
        found = runnable(tx, short, streams)
        options = RunOptions(full_refresh=full_refresh, streams=streams)
        asked = runs.enqueue(tx, connections.subject(found), RunKind.SYNC, options, cli.principal)
    answer_asked(cli, account, short, asked, wait=wait)


def runnable(tx: Connection, name: str, streams: Sequence[str] = ()) -> Known:
    """Return a connection that may run now and has these streams; Conflict, NotFound if not."""
    found = connections.get(tx, name)
    if found.state == "paused":
        how = f"resume it first: syncward connection resume {name}"
        if found.state_reason == "needs_reauth":  # it goes on by itself then
            how = (
                "authorise its login first: syncward resource authorize (resource list says which)"
            )
        raise Conflict(f"connection {name} is paused ({found.state_reason}); {how}")
    unknown = sorted(set(streams) - {s.name for s in found.spec.streams})
    if unknown:
        known = ", ".join(s.name for s in found.spec.streams)
        raise NotFound(f"connection {name} has no stream {', '.join(unknown)}; it has {known}")
    return found


def answer_asked(cli: Cli, account: Account, name: str, asked: Enqueued, *, wait: bool) -> None:
    """Say what became of a wish for a run; with `wait` how it ended, also by the exit code."""
    said = f"run {asked.run_id} {asked.how.replace('_', ' ')}"
    if not wait:
        answer = {"run_id": asked.run_id, "connection": name, "how": asked.how}
        cli.answer(answer, lambda: said)
        return
    cli.note(said)
    ended = wait_for_run(cli, account.name, asked.run_id)
    with cli.inside(f"{account.name}/") as (tx, _, _name):
        results = outputs.streams(tx, ended.run_id)
    cli.answer(run_document(ended, results), lambda: run_text(ended, results))
    if ended.state is RunState.AWAITING_APPROVAL:
        sys.exit(EXIT_AWAITING_APPROVAL)
    if ended.state is not RunState.SUCCEEDED:
        sys.exit(EXIT_FAILED)


@command(run, "list")
@click.argument("connection", required=False)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([s.value for s in RunState]),
    help="Only these states.",
)
@click.option("--kind", type=click.Choice([k.value for k in RunKind]), help="Only this kind.")
@click.option("--error", metavar="CODE", help="Only with this error code, as in docs/errors.md.")
@click.option("--since", type=DurationType(), metavar="2h", help="Only asked for since then.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
def list_(
    cli: Cli,
    connection: str | None,
    *,
    states: tuple[str, ...],
    kind: str | None,
    error: str | None,
    since: timedelta | None,
    limit: int,
) -> None:
    """List runs, live ones first."""
    with cli.inside(connection) as (tx, account, short):
        wanted = runs.Filter(
            subject_id=connections.get(tx, short).connection_id if short else None,
            states=tuple(RunState(state) for state in states),
            kinds=(RunKind(kind),) if kind else (),
            error_code=error,
            since=since,
        )
        found = runs.listing(tx, account.account_id, wanted, limit=limit)
    cli.answer(list(found), lambda: run_table(found))


def _find(tx: Connection, account_id: UUID, name: str) -> Run:
    """Return a run by its id, the beginning of one, or the latest of a connection.

    A look at schemas is no run that somebody means by the connection's name.
    """
    try:
        return runs.get(tx, UUID(name))
    except ValueError:
        pass
    begun = runs.beginning(tx, account_id, name) if _BEGINNING.fullmatch(name) else ()
    if len(begun) == 1:
        return begun[0]
    if begun:
        raise NotFound(f"run {name}: more than one begins so; write more of it")
    subject = connections.get(tx, name).connection_id
    wanted = runs.Filter(
        subject_id=subject, kinds=tuple(k for k in RunKind if k is not RunKind.SCHEMA)
    )
    latest = runs.listing(tx, account_id, wanted, limit=1)
    if not latest:
        raise NotFound(f"connection {name} has no run yet; start one: syncward run enqueue {name}")
    return latest[0]


def _find_id(tx: Connection, account_id: UUID, name: str) -> UUID:
    """Return the id, which may be of a run that is only promised, or of a connection's latest."""
    try:
        return UUID(name)
    except ValueError:
        return _find(tx, account_id, name).run_id


@command(run)
@click.argument("name", metavar="RUN|CONNECTION")
def show(cli: Cli, name: str) -> None:
    """Show one run (a connection's name means its latest)."""
    with cli.inside(name) as (tx, account, short):
        found = _find(tx, account.account_id, short)
        results = outputs.streams(tx, found.run_id)
    cli.answer({**_fields(found), "streams": jsonable(results)}, lambda: run_text(found, results))


@command(run)
@click.argument("name", metavar="RUN|CONNECTION")
def explain(cli: Cli, name: str) -> None:
    """Say which rule holds a run back, and when it is expected to start."""
    with cli.inside(name) as (tx, account, short):
        run_id = _find_id(tx, account.account_id, short)
        why = explanations.explain(tx, run_id, runs_max=cli.settings.runs_max)
        awaits = why.rule is Rule.AWAITING_APPROVAL
        found = runs.get(tx, run_id).findings if awaits else ()
        shown = runs.get(tx, run_id) if why.rule in {Rule.ENDED, Rule.NOT_BEFORE} else None
        said = None if shown is None else said_of(shown, shown.error)
    document = {
        **_fields(why),
        **({"findings": jsonable(found)} if awaits else {}),
        **({"error": said} if said else {}),
    }
    error = None if said is not None and said in why.sentence else said
    cli.answer(document, lambda: explanation_text(why, found, error))


def _fields(found: Run | Explanation) -> dict[str, object]:
    document = jsonable(found)
    assert isinstance(document, dict)  # noqa: S101 - a dataclass becomes a dict
    return document


@command(run, "logs")
@click.argument("name", metavar="RUN|CONNECTION")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended.")
@click.option("--grep", metavar="TEXT", help="Only lines that contain this.")
def show_logs(cli: Cli, name: str, *, follow: bool, grep: str | None) -> None:
    """Show a run's log, also while it is running. Reading it is an audit event."""
    with cli.inside(name) as (tx, account, short):
        found = _find(tx, account.account_id, short)
    reader = Reader(cli, found)
    reader.require_keys()
    with cli.inside(f"{account.name}/") as (tx, _, _name):
        audit.append(tx, read_event(AuditAction.LOGS_READ, found, cli.principal))
    kept: list[object] = []
    after, ended, scanned = 0, False, 0
    while not ended:
        with cli.inside(f"{account.name}/") as (tx, _, _name):
            reader.run = _still(tx, found)
            ended = not follow or reader.run.state in FINAL_STATES
            lines = logs.read(tx, found.run_id, after=after, limit=_PAGE)
        kept += [
            _print_line(cli, line, follow=follow)
            for line in reader.page(lines)
            if grep is None or line.message is None or grep in line.message
        ]
        after, scanned = lines[-1].seq if lines else after, scanned + len(lines)
        if grep is not None and scanned >= GREP_MAX:
            cli.note(f"stopped after {scanned:,} lines; there may be more")
            reader.stopped_early = True
            break
        ended = ended and len(lines) < _PAGE  # a full page: go on
        if not ended and len(lines) < _PAGE:
            time.sleep(0.3)
    if cli.json and not follow:
        cli.answer(kept, str)
    reader.finish()


def _still(tx: Connection, found: Run) -> Run:
    """Return how a run is now; its log may be read while it moves into history."""
    return found if found.state in FINAL_STATES else runs.get(tx, found.run_id)


def _print_line(cli: Cli, line: OpenedLine, *, follow: bool) -> object:
    row = line.stored
    document = {"at": row.at, "level": row.level, "stream": row.stream, "message": line.message}
    if line.problem is not None:
        document["problem"] = line.problem
    if not cli.json:
        where = f"{row.stream}: " if row.stream else ""
        if line.message is not None and line.message.startswith(where):
            where = ""
        said = f"[cannot be opened: {line.problem}]" if line.message is None else line.message
        click.echo(f"{row.at:%H:%M:%S.%f}"[:-3] + f" {row.level:<7} {plain(where + said)}")
    elif follow:
        import json  # noqa: PLC0415 - `-f --json` prints JSON lines

        click.echo(json.dumps(jsonable(document)))
    return document


@command(run)
@click.argument("name", metavar="RUN|CONNECTION")
def output(cli: Cli, name: str) -> None:
    """Show what a run produced. Reading it is an audit event."""
    with cli.inside(name) as (tx, account, short):
        found = _find(tx, account.account_id, short)
        audit.append(tx, read_event(AuditAction.OUTPUT_READ, found, cli.principal))
        results = outputs.streams(tx, found.run_id)
        stored = outputs.stored(tx, found.run_id)
    document = opened_output(cli, found, stored)
    answer = {**run_document(found, results), **({"document": document} if document else {})}
    lines = window_text(found, results)
    cli.answer(answer, lambda: "\n".join([*lines, output_text(results, document)]))


@command(run, "calls")
@click.argument("name", metavar="RUN|CONNECTION")
@click.option("--failed", is_flag=True, help="Only without an answer, with status 400 or above.")
@click.option("--limit", default=1_000, show_default=True, type=click.IntRange(1, 100_000))
def list_calls(cli: Cli, name: str, *, failed: bool, limit: int) -> None:
    """List a run's calls over HTTP, the newest ones. Reading it is an audit event."""
    with cli.inside(name) as (tx, account, short):
        found = _find(tx, account.account_id, short)
        audit.append(tx, read_event(AuditAction.CALLS_READ, found, cli.principal))
        made = [
            {"attempt": one.attempt, **asdict(one.call)}
            for one in calls.listing(tx, found.run_id, failed=failed, limit=limit)
        ]
    cli.answer(made, lambda: call_table(made))
    if len(made) == limit:
        cli.note(f"the newest {limit:,}; there may be more: --limit")


@command(run)
@click.argument("name", metavar="RUN|CONNECTION")
def cancel(cli: Cli, name: str) -> None:
    """Stop a run: at once if no worker has it, within seconds otherwise."""
    with cli.inside(name) as (tx, account, short):
        run_id = _find_id(tx, account.account_id, short)
        state = runs.cancel(tx, run_id, cli.principal)
    if state is RunState.RUNNING:
        state = wait_for_run(cli, account.name, run_id).state
    cli.answer({"run_id": run_id, "state": state}, lambda: f"run {run_id} {state}")


@command(run)
@click.argument("name", metavar="RUN|CONNECTION")
def approve(cli: Cli, name: str) -> None:
    """Let a run that a guard stopped go on: with as much of that finding, and no more."""
    with cli.inside(name) as (tx, account, short):
        found = _find(tx, account.account_id, short)
        runs.approve(tx, found.run_id, cli.principal)
    cli.answer({"approved": found.run_id}, lambda: f"run {found.run_id} approved; it goes on")


@command(run)
@click.argument("name", metavar="RUN|CONNECTION")
def reject(cli: Cli, name: str) -> None:
    """End a run that a guard stopped; the previous data stays served."""
    with cli.inside(name) as (tx, account, short):
        found = _find(tx, account.account_id, short)
        runs.reject(tx, found.run_id, cli.principal)
    cli.answer({"rejected": found.run_id}, lambda: f"run {found.run_id} rejected")
