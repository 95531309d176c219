"""`syncward account`: tenants."""

import click

from cli.context import Cli, command
from cli.show import ago, table
from storage import accounts


@click.group()
def account() -> None:
    """Tenants: create, list, show, delete."""


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
    rows = [(a.name, a.plan, a.company, ago(a.created_at)) for a in found]
    cli.answer(list(found), lambda: table(("ACCOUNT", "PLAN", "COMPANY", "CREATED"), rows))


@command(account)
@click.argument("name")
def show(cli: Cli, name: str) -> None:
    """Show one account."""
    with cli.transaction() as tx:
        found = accounts.get(tx, name)
    cli.answer(found, lambda: f"{found.name}: plan {found.plan}, created {ago(found.created_at)}")


@command(account)
@click.argument("name")
def delete(cli: Cli, name: str) -> None:
    """Delete an account that has nothing left in it."""
    with cli.transaction() as tx:
        accounts.delete(tx, accounts.get(tx, name), cli.principal)
    cli.answer({"deleted": name}, lambda: f"account {name} deleted")
