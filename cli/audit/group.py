"""The group `syncward audit`; each command is a module beside this one."""

import click

from cli.context import Group


@click.group(cls=Group)
def audit() -> None:
    """Audit log: read, verify, prove, export, prune; the keys that sign it."""
