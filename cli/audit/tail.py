"""`syncward audit tail`: follow the audit log."""

import json
import time

import click

from cli.audit.group import audit
from cli.context import Cli, command
from cli.show import jsonable, plain
from schemas.audit import AuditAction, AuditEvent, TargetKind
from storage import audit as events
from storage.audit import INSTANCE_ID, StoredEvent


@command(audit)
@click.option("-f", "--follow", is_flag=True, help="Go on until interrupted.")
@click.option("--after", type=int, metavar="INDEX", help="Only events after this number.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000))
def tail(cli: Cli, *, follow: bool, after: int | None, limit: int) -> None:
    """Show the newest events. Reading them is an event itself."""
    from storage import accounts  # noqa: PLC0415 - only with an account

    with cli.transaction() as tx:
        name = cli.account or cli.settings.account
        account_id = accounts.get(tx, name).account_id if name else None
        found = events.tail(tx, account_id=account_id, after=after, limit=limit)
        events.append(
            tx,
            AuditEvent(
                AuditAction.AUDIT_READ,
                TargetKind.INSTANCE,
                INSTANCE_ID,
                cli.principal,
                account_id=account_id,
                detail={"events": len(found)},
            ),
        )
    if not follow:
        cli.answer([_document(e) for e in found], lambda: "\n".join(line_of(e) for e in found))
        return
    last = found[-1].seq if found else after or 0
    while True:
        for event in found:
            click.echo(json.dumps(_document(event)) if cli.json else line_of(event))
            last = event.seq
        time.sleep(0.5)
        with cli.transaction() as tx:
            found = events.tail(tx, account_id=account_id, after=last, limit=limit)


def _document(event: StoredEvent) -> dict[str, object]:
    document = jsonable(event)
    assert isinstance(document, dict)  # noqa: S101 - a dataclass becomes a dict
    document["class"] = document.pop("class_")
    document["body"] = json.loads(event.body)
    return document


def line_of(event: StoredEvent) -> str:
    """Show an event in one line."""
    body = json.loads(event.body)
    reason = f" ({body['reason']})" if body.get("reason") else ""
    return (
        f"{event.seq:>6} {event.at:%H:%M:%S} {event.class_} {event.action:<24} "
        f"{event.target_kind} {str(event.target_id)[:8]} "
        f"{' '.join(plain(body['principal'] + reason).split())}"
    )
