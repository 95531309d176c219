"""The group `syncward audit`; each command is a module beside this one."""

import click


@click.group()
def audit() -> None:
    """Audit log: read, verify, prove, export, prune; the keys that sign it."""
