"""`syncward`: parse, call one function, print. Errors are one line; exit codes are documented."""

import importlib
import json
import sys
from io import StringIO

import click
from click.exceptions import NoSuchCommand

from schemas.errors import GuardTripped, StartRefused, SyncwardError
from schemas.scrub import scrub

#: Documented in docs/cli.md.
EXIT_FAILED = 1
EXIT_AWAITING_APPROVAL = 3
EXIT_REFUSED = 78

#: Command -> the module that defines it in its `commands`, and its line of help.
_COMMANDS = {
    "account": ("cli.accounts", "Tenants: create, list, show, pause, resume, delete."),
    "apply": ("cli.apply", "Make resources and connections like a document."),
    "audit": ("cli.audit", "The audit log: tail, verify, prove, export, prune."),
    "backfill": ("cli.by_hand", "Read some rows of a stream again."),
    "connection": ("cli.connections", "What moves where, and when."),
    "connector": ("cli.connectors", "Manifests of APIs; connectors of others."),
    "db": ("cli.db", "Control database: upgrade, check."),
    "demo": ("cli.demo", "Real servers, real syncs, real crashes, proofs."),
    "diff": ("cli.apply", "Show what `apply` would change."),
    "doctor": ("cli.doctor", "What is wrong here, why it matters, what to type."),
    "down": ("cli.up", "Stop what `up --dev` started."),
    "drain": ("cli.instance", "Start nothing any more; wait until nothing runs."),
    "keys": ("cli.keys", "Keyrings: init, status, rotate, replace, retire."),
    "metrics": ("cli.metrics", "Cluster-wide metrics, once or served."),
    "resource": ("cli.authorize", "External systems and their sealed credentials."),
    "retention": ("cli.instance", "Remove runs older than the plans keep."),
    "run": ("cli.runs", "Ask for runs, look at them, decide about them."),
    "scheduler": ("cli.processes", "Run a scheduler in the foreground."),
    "sealer": ("cli.processes", "Run a sealer of the audit log in the foreground."),
    "top": ("cli.top", "Queue, workers and runs, live."),
    "up": ("cli.up", "Run scheduler, workers and sealer, restarting what dies."),
    "worker": ("cli.processes", "Run a worker in the foreground."),
}


class _Lazy(click.Group):
    """Imports a command's module when it is called, so that `--help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[name][0])
        found: click.Command = module.commands[name]
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except NoSuchCommand:  # click knows no names here to say which may have been meant
            raise NoSuchCommand(args[0], possibilities=_COMMANDS, ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in sorted(_COMMANDS.items())])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="syncward")
def syncward() -> None:
    """Self-hosted, security-first sync engine."""


def main() -> None:
    """Run a command; turn what it raises into one line and a documented exit code."""
    scrub()
    try:
        syncward(standalone_mode=False)
    except click.ClickException as error:
        usage = StringIO()
        error.show(file=usage)  # may repeat what was typed
        click.echo(_masked(usage.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except SyncwardError as error:
        _explain(error.code, error.public)
        sys.exit(_exit_code(error))
    except Exception as error:  # noqa: BLE001 - a traceback would quote what it was about
        _explain("internal", _bug(error))
        sys.exit(EXIT_FAILED)


def _exit_code(error: SyncwardError) -> int:
    if isinstance(error, StartRefused):
        return EXIT_REFUSED
    return EXIT_AWAITING_APPROVAL if isinstance(error, GuardTripped) else EXIT_FAILED


def _bug(error: Exception) -> str:
    """Say what kind of error it was and where, not what it says: that may be a row or a secret."""
    from schemas.log_lines import frames  # noqa: PLC0415 - `--help` must not wait for it

    places = " < ".join(frames(error)[:4])
    return f"internal error ({type(error).__name__} at {places}); please report it, see SECURITY.md"


def _masked(text: str) -> str:
    from schemas.redaction import REDACTOR  # noqa: PLC0415 - as above

    return REDACTOR.text(text)


def _explain(code: str, public: str) -> None:
    message = _masked(public)
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": {"code": code, "message": message}}))
    click.echo(f"syncward: {message}", err=True)


if __name__ == "__main__":
    main()
