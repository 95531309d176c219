"""`syncward db`: the control database."""

import sys

import click

from cli.context import Cli, Group, command
from cli.main import EXIT_FAILED
from storage import migrate, revision
from storage.roles import role_sql


@click.group(cls=Group)
def db() -> None:
    """Control database: upgrade, check."""


commands = {"db": db}


@command(db)
@click.option("--print-sql", is_flag=True, help="Print the role SQL for a DBA; change nothing.")
def upgrade(cli: Cli, *, print_sql: bool) -> None:
    """Create roles and bring the schema to this version, and that of a separate keystore."""
    if print_sql:
        cli.answer({"sql": role_sql()}, role_sql)
        return
    before, after = migrate.upgrade(cli.control_url(), cli.principal)
    if cli.settings.keystore_url is not None:
        migrate.upgrade_keystore(cli.settings.keystore_url.get_secret_value())
    text = (
        f"already at {after}"
        if before == after
        else f"upgraded from {before or 'empty'} to {after}"
    )
    cli.answer({"before": before, "after": after}, lambda: f"control database: {text}")


@command(db)
def check(cli: Cli) -> None:
    """Compare the database with what this version wants."""
    with cli.transaction() as tx:
        found, wanted = migrate.current(tx), migrate.head()
        differences = migrate.differences(tx) if found == wanted else []
    older = revision.is_older(found, wanted)
    good = not older and not differences
    lines = [f"control database: {found or 'empty'}, wanted {wanted}", *differences]
    if older:
        lines.append("run: syncward db upgrade")
    elif found != wanted:
        lines.append("newer than this version, which goes on working beside it; upgrade this host")
    cli.answer(
        {"revision": found, "wanted": wanted, "differences": differences},
        lambda: "\n".join([*lines, "ok" if good else "not ok"]),
    )
    if not good:
        sys.exit(EXIT_FAILED)
