"""`syncward audit erase-name`: erase an operator's name from behind the log."""

import click

from cli.audit.group import audit
from cli.context import Cli, command
from schemas.audit_body import REASON_MAX


@command(audit, "erase-name")
@click.argument("name")
@click.option("--reason", required=True, help="Why, for the log.")
def erase_name(cli: Cli, *, name: str, reason: str) -> None:
    """Erase the NAME of an operator; what the operator did stays, and stays proven."""
    from storage import audit_names  # noqa: PLC0415 - `--help` must not wait for it

    if len(reason) > REASON_MAX:
        raise click.BadParameter(f"longer than {REASON_MAX} characters", param_hint="--reason")
    with cli.transaction() as tx:
        erased = audit_names.erase(tx, name, reason=reason, principal=cli.principal)
    cli.answer(
        {"principal": erased},
        lambda: (
            f"erased; events of operator:{erased} stay. Backups and database logins keep what "
            "they hold: docs/audit.md"
        ),
    )
