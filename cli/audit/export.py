"""`syncward audit export`: a directory with the log, exact to the byte, that verifies offline."""

from pathlib import Path

import click

from cli.audit.group import audit
from cli.context import Cli, command
from schemas.audit import AuditAction, AuditEvent, TargetKind


@command(audit)
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--first", type=click.IntRange(0), default=0, metavar="INDEX",
              help="Begin with the batch of this index.")  # fmt: skip
@click.option("--end", type=click.IntRange(1), metavar="INDEX",
              help="End with the batch of the index before this one.")  # fmt: skip
@click.option("--names", is_flag=True, help="With the names of operators (docs/verify.md).")
@click.option("--format", "format_", type=click.Choice(["jsonl", "ocsf"]), default="jsonl",
              show_default=True, help="ocsf: the events once more in that form.")  # fmt: skip
def export(
    cli: Cli, directory: Path, *, first: int, end: int | None, names: bool, format_: str
) -> None:
    """Write sealed events, hashes and checkpoints to a new directory, with a verifier beside."""
    from audit import export as exports  # noqa: PLC0415 - `--help` must not wait for it
    from storage import audit as events  # noqa: PLC0415 - as above
    from storage.audit_log import snapshot  # noqa: PLC0415 - as above

    with exports.directory(directory) as partial:
        with snapshot(cli.audit_engine) as tx:
            done = exports.write(
                tx, partial, first=first, end=end, names=names, as_ocsf=format_ == "ocsf"
            )
        with cli.auditing() as tx:  # before anybody has it
            events.append(
                tx,
                AuditEvent(
                    AuditAction.AUDIT_EXPORTED,
                    TargetKind.INSTANCE,
                    events.INSTANCE_ID,
                    cli.principal,
                    detail={
                        "first": done.first,
                        "size": done.size,
                        "format": format_,
                        "sha256": done.sha256,
                    },
                ),
            )
    cli.answer(
        {"directory": str(directory), "first": done.first, "size": done.size,
         "sha256": done.sha256},
        lambda: f"{directory}: events {done.first} to {done.size - 1}; SHA-256 of its SHA256SUMS "
        f"{done.sha256}\nverify: syncward audit verify --export {directory} --pubkey FILE",
    )  # fmt: skip
