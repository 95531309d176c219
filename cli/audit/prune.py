"""`syncward audit prune`: ask that old months go, agree to it, take it back, see what was asked."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import click
from sqlalchemy import Connection

from audit import prune as rules
from audit.prune import PruneRefused
from cli.audit.group import audit
from cli.context import Cli, command
from cli.show import table
from schemas.audit import AuditAction, AuditEvent, TargetKind
from storage import audit as events
from storage import prune as requests
from storage.prune import StepDenied

#: Why the database does not let somebody approve or withdraw, and what to do.
_WHY = {
    "unknown": "there is no such request; see: syncward audit prune --list",
    "not_open": "it is not open for that (any more); see: syncward audit prune --list",
    "same_login": "the login that asked may not approve; somebody else must, by a login of theirs",
}
#: Days that nobody can drop.
_FLOOR_DAYS = 31


@command(audit)
@click.option("--before", metavar="YYYY-MM-DD", help="Ask that all before this month's begin goes.")
@click.option("--export", "directory", metavar="DIR",
              type=click.Path(path_type=Path, file_okay=False),
              help="With --before: an export that holds all of it.")  # fmt: skip
@click.option("--approve", type=click.UUID, metavar="ID", help="Agree to what somebody else asked.")
@click.option("--withdraw", type=click.UUID, metavar="ID", help="Take back what was asked for.")
@click.option("--list", "list_", is_flag=True, help="Show what was asked for.")
def prune(
    cli: Cli,
    *,
    before: str | None,
    directory: Path | None,
    approve: UUID | None,
    withdraw: UUID | None,
    list_: bool,
) -> None:
    """Drop old months of the audit log: one person asks, another agrees, the sealer does it."""
    if sum([before is not None, approve is not None, withdraw is not None, list_]) != 1:
        raise click.UsageError("one of --before, --approve, --withdraw, --list")
    if (before is None) != (directory is None):
        raise click.UsageError("--before and --export belong together")
    if before is not None and directory is not None:
        _ask(cli, before, directory)
    elif approve is not None:
        _approve(cli, approve)
    elif withdraw is not None:
        _withdraw(cli, withdraw)
    else:
        _list(cli)


def _ask(cli: Cli, before: str, directory: Path) -> None:
    moment = rules.month(before)
    request_id = uuid4()
    with cli.transaction() as tx:
        if not requests.old_enough(tx, moment, _FLOOR_DAYS):
            raise PruneRefused(
                f"audit: nothing younger than {_FLOOR_DAYS} days can be pruned; keep 13 months"
            )
        if any(r.state in {"approved", "recorded"} for r in requests.requests(tx)):
            raise PruneRefused(
                "audit: an approved request is not carried out yet; wait for the sealer "
                "(syncward audit prune --list), or take it back: syncward audit prune --withdraw ID"
            )
        wanted = requests.plan(tx, moment)
        if wanted is None:
            raise PruneRefused(
                f"audit: nothing as young as {before} is sealed yet; is a sealer up?"
            )
        if wanted.unsealed:
            raise PruneRefused(f"audit: not all before {before} is sealed; is a sealer up?")
        if len(wanted.also) > requests.ALSO_MAX:
            raise PruneRefused(
                f"audit: more than {requests.ALSO_MAX} older events stand behind index "
                f"{wanted.first_kept}; choose another month"
            )
        if not requests.months(tx, moment):
            raise PruneRefused(f"audit: no month ends before {before}; there is nothing to drop")
        digest = rules.check_export(tx, directory, moment, wanted)
        events.append(
            tx,
            _event(
                cli,
                AuditAction.AUDIT_PRUNE_REQUESTED,
                request=str(request_id),
                before=before,
                first_kept=wanted.first_kept,
                also=len(wanted.also),
                sha256=digest,
            ),
        )
        requests.request(tx, request_id, moment, wanted, digest)
        months = requests.months(tx, moment)
    cli.answer(
        {"request": request_id, "before": before, "first_kept": wanted.first_kept,
         "also": wanted.also, "sha256": digest, "partitions": months},
        lambda: f"asked: {request_id}\nwould go: {', '.join(months) or 'no month'} (indexes before "
        f"{wanted.first_kept} and {len(wanted.also)} more)\n"
        f"another operator agrees with: syncward audit prune --approve {request_id}",
    )  # fmt: skip


def _approve(cli: Cli, request_id: UUID) -> None:
    _take(cli, AuditAction.AUDIT_PRUNE_APPROVED, requests.approve, request_id)
    cli.answer(
        {"request": request_id, "state": "approved"},
        lambda: (
            f"approved: {request_id}\nthe sealer records it, and drops the months once anchors "
            "hold the record; see: syncward audit prune --list"
        ),
    )


def _withdraw(cli: Cli, request_id: UUID) -> None:
    _take(cli, AuditAction.AUDIT_PRUNE_WITHDRAWN, requests.withdraw, request_id)
    cli.answer(
        {"request": request_id, "state": "withdrawn"},
        lambda: f"withdrawn: {request_id}\nnothing was dropped",
    )


def _take(
    cli: Cli, action: AuditAction, step: Callable[[Connection, UUID], None], request_id: UUID
) -> None:
    """Say it and do it; if the database refuses, say that it was denied."""
    told = _event(cli, action, request=str(request_id))
    try:
        with cli.transaction() as tx:
            events.append(tx, told)
            step(tx, request_id)
    except StepDenied as denied:  # what was said above is undone with it
        with cli.transaction() as tx:
            events.append(tx, replace(told, outcome="denied", reason=denied.reason))
        raise PruneRefused(f"audit: prune {request_id}: {_WHY[denied.reason]}") from None


def _list(cli: Cli) -> None:
    with cli.auditing() as tx:
        found = requests.requests(tx)
    cli.answer(
        found,
        lambda: table(
            ("REQUEST", "STATE", "BEFORE", "ASKED", "APPROVED"),
            [(r.id, r.state, f"{r.before:%Y-%m-%d}", r.requested_by, r.approved_by) for r in found],
            names=3,
        ),
    )


def _event(cli: Cli, action: AuditAction, **detail: str | int) -> AuditEvent:
    return AuditEvent(
        action, TargetKind.INSTANCE, events.INSTANCE_ID, cli.principal, detail=dict(detail)
    )
