"""Questions that only a worker can answer: asked as a run, waited for, its answer opened here."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from cli.context import Cli
from cli.records import opened_output, read_event
from cli.waiting import wait_for_run
from schemas.accounts import Account
from schemas.audit import AuditAction
from schemas.errors import SyncwardError
from schemas.limits import INTERACTIVE_DEADLINE
from schemas.runs import Run, RunKind, RunOptions, RunState
from storage import audit, outputs, runs
from storage.runs import Subject

#: Finds what the run is about; `str` is its name within the account.
SubjectOf = Callable[[Connection, Account, str], Subject]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker found out; `name` is the subject's within its account."""

    run: Run
    account: str
    name: str
    document: dict[str, Any]


def ask_a_worker(
    cli: Cli,
    name: str,
    subject_of: SubjectOf,
    kind: RunKind,
    options: RunOptions,
) -> Answer:
    """Ask, and wait for the answer; the error of a run that failed is raised as ours.

    Nobody else may unseal, so nobody else can look. That somebody reads it is an event.
    """
    with cli.inside(name) as (tx, account, short):
        subject = subject_of(tx, account, short)
        asked = runs.enqueue(
            tx, subject, kind, options, cli.principal, deadline=INTERACTIVE_DEADLINE
        )
    patience = INTERACTIVE_DEADLINE + timedelta(seconds=10)
    run = wait_for_run(cli, account.name, asked.run_id, patience=patience)
    if run.state is not RunState.SUCCEEDED:
        about = "connection" if kind.of_connection else "resource"
        raise SyncwardError(f"{about} {short}: {run.error}", code=run.error_code or "failed")
    with cli.inside(f"{account.name}/") as (tx, _, _name):
        audit.append(tx, read_event(AuditAction.OUTPUT_READ, run, cli.principal))
        stored = outputs.stored(tx, run.run_id)
    return Answer(run, account.name, short, opened_output(cli, run, stored))
