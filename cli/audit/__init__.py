"""`syncward audit`: one module a command, gathered here."""

from cli.audit import __all__, audit, cli, commands, erase, export, from, group, import, keys, prove, tail, verify

commands = {"audit": audit}
