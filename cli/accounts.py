"""`syncward account`: tenants."""

import click

from cli.context import Cli, Group, command
from cli.show import ago, table
from cli.stopping import Stopped, stop_now
from schemas.accounts import Account
from storage import accounts


@click.group(cls=Group)
def account() -> None:
    """Tenants: create, list, show, pause, resume, delete."""


commands = {"account": account}


@command(account)
@click.argument("name")
@click.option("--company", default="", help="Company name.")
@click.option("--plan", default="standard", show_default=True, help="standard or unlimited.")
def create(cli: Cli, name: str, company: str, plan: str) -> None:
    """Create an account."""
    with cli.transaction() as tx:
        made = accounts.create(tx, name, company=company, plan=plan, principal=cli.principal)
    cli.answer(made, lambda: f"account {made.name} created on plan {made.plan}")


@command(account, "list")
def list_(cli: Cli) -> None:
    """List accounts."""
    with cli.transaction() as tx:
        found = accounts.listing(tx)
    rows = [(a.name, a.plan, a.state, a.company, ago(a.created_at)) for a in found]
    cli.answer(list(found), lambda: table(("ACCOUNT", "PLAN", "STATE", "COMPANY", "CREATED"), rows))


@command(account)
@click.argument("name")
def show(cli: Cli, name: str) -> None:
    """Show one account."""
    with cli.transaction() as tx:
        found = accounts.get(tx, name)
    cli.answer(found, lambda: _text(found))


def _text(found: Account) -> str:
    state = "" if found.state == "active" else f" {found.state},"
    return f"{found.name}: plan {found.plan},{state} created {ago(found.created_at)}"


@command(account)
@click.argument("name")
@click.option("--reason", default="operator", help="Kept with the account and in the event.")
@click.option("--now", is_flag=True, help="Cancel what runs, too, and wait for its end.")
def pause(cli: Cli, name: str, *, reason: str, now: bool) -> None:
    """Start nothing of it any more; what runs goes on, what is due waits."""
    with cli.transaction() as tx:
        found = accounts.get(tx, name)
        moved = accounts.pause(tx, found, reason, cli.principal)
    stopped = stop_now(cli, found) if now else Stopped()
    cli.answer(
        {"account": name, "state": "paused", "changed": moved, **stopped.document},
        lambda: f"account {name} {'paused' if moved else 'was paused already'}{stopped.text}",
    )
    stopped.exit()


@command(account)
@click.argument("name")
def resume(cli: Cli, name: str) -> None:
    """Start what has waited."""
    with cli.transaction() as tx:
        moved = accounts.resume(tx, accounts.get(tx, name), cli.principal)
    cli.answer(
        {"account": name, "state": "active", "changed": moved},
        lambda: f"account {name} {'resumed' if moved else 'was active already'}",
    )


@command(account)
@click.argument("name")
def delete(cli: Cli, name: str) -> None:
    """Delete an account that has nothing left in it, and the keys of all that was kept of it."""
    kept = cli.settings.keystore_backup_keep if cli.keystore.separate else cli.settings.backup_keep
    with cli.keystore.after() as last, cli.transaction() as tx:
        gone_at = accounts.delete(
            tx, last or tx, accounts.get(tx, name), cli.principal, backups=kept
        )
    cli.answer(
        {"deleted": name, "shredded_at": gone_at},
        lambda: (
            f"account {name} deleted and its keys shredded; backups that hold the keys "
            f"expire {gone_at:%Y-%m-%d}"
        ),
    )
