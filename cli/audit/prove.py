"""`syncward audit prove`: a document that proves one event to anybody with the public key."""

import json
import os
from pathlib import Path

import click

from cli.audit.group import audit
from cli.context import Cli, command
from schemas.audit import AuditAction, AuditEvent, TargetKind
from schemas.errors import ConfigError


@command(audit)
@click.argument("event", metavar="INDEX")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE",
              help="A new file instead of standard output.")  # fmt: skip
def prove(cli: Cli, event: str, *, output: Path | None) -> None:
    """Prove that an event is in the log; it is verified with `audit verify --proof`."""
    from audit import proof  # noqa: PLC0415 - `--help` must not wait for it
    from storage import audit as events  # noqa: PLC0415 - as above
    from storage.audit_log import snapshot  # noqa: PLC0415 - as above

    with snapshot(cli.audit_engine) as tx:
        document = proof.prove(tx, proof.find(event))
    with cli.auditing() as tx:
        events.append(
            tx,
            AuditEvent(
                AuditAction.AUDIT_READ,
                TargetKind.INSTANCE,
                events.INSTANCE_ID,
                cli.principal,
                detail={"events": 1, "filters": f"proof of index {document['index']}"},
            ),
        )
    text = json.dumps(document)  # one line: a proof is read to the byte
    if output is None:
        click.echo(text)
        return
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be made: {error.strerror}; name a new file") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(f"{text}\n")
    cli.answer({"file": str(output), "index": document["index"], "size": document["size"]},
               lambda: f"{output}: proof of index {document['index']}; it verifies with: "
               f"syncward audit verify --proof {output} --pubkey FILE")  # fmt: skip
