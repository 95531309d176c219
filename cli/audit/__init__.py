"""`syncward audit`: one module a command, gathered here."""

from cli.audit import keys, tail
from cli.audit.group import audit

__all__ = ["commands", "keys", "tail"]

commands = {"audit": audit}
