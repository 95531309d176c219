"""`syncward`: parse, call one function, print. Errors are one line; exit codes are documented."""

import importlib
import json
import sys

import click

from schemas.errors import GuardTripped, StartRefused, SyncwardError

#: Documented in docs/cli.md.
EXIT_FAILED = 1
EXIT_AWAITING_APPROVAL = 3
EXIT_REFUSED = 78

#: Command -> module that defines it as `group` (or as a command of the same name).
_COMMANDS = {
    "account": "cli.accounts",
    "apply": "cli.apply",
    "audit": "cli.audit",
    "connection": "cli.connections",
    "db": "cli.db",
    "demo": "cli.demo",
    "diff": "cli.apply",
    "down": "cli.up",
    "keys": "cli.keys",
    "metrics": "cli.metrics",
    "resource": "cli.resources",
    "run": "cli.runs",
    "scheduler": "cli.processes",
    "up": "cli.up",
    "worker": "cli.processes",
}


class _Lazy(click.Group):
    """Imports a command's module when it is called, so that `--help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[name])
        found: click.Command = module.commands[name]
        return found


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="syncward")
def syncward() -> None:
    """Self-hosted, security-first sync engine."""


def main() -> None:
    """Run a command; turn our errors into one line and a documented exit code."""
    try:
        syncward(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except SyncwardError as error:
        _explain(error)
        sys.exit(_exit_code(error))


def _exit_code(error: SyncwardError) -> int:
    if isinstance(error, StartRefused):
        return EXIT_REFUSED
    return EXIT_AWAITING_APPROVAL if isinstance(error, GuardTripped) else EXIT_FAILED


def _explain(error: SyncwardError) -> None:
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": {"code": error.code, "message": error.public}}))
    click.echo(f"syncward: {error.public}", err=True)


if __name__ == "__main__":
    main()
