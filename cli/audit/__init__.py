"""`syncward audit`: one module a command, gathered here."""

from cli.audit import erase, export, keys, prove, prune, tail, verify
from cli.audit.group import audit

__all__ = ["commands", "erase", "export", "keys", "prove", "prune", "tail", "verify"]

commands = {"audit": audit}
