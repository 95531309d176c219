"""`syncward audit`: one module a command, gathered here."""

from cli.audit import tail
from cli.audit.group import audit

__all__ = ["commands", "tail"]

commands = {"audit": audit}
