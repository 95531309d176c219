"""`syncward audit key`: the key that signs the audit log, on the sealer's host."""

from pathlib import Path
from uuid import UUID

import click

from audit import statement
from audit.checkpoint import Checkpoint
from cli.audit.group import audit
from cli.context import Cli, command
from crypto import signing
from crypto.signing import PublicKey
from schemas.audit import AuditAction
from schemas.errors import ConfigError, Conflict
from storage import seal_watch, sealing
from storage.sealing import Sealed

_FILE = click.argument("file_", metavar="[FILE]", required=False, type=click.Path(path_type=Path))


@audit.group()
def key() -> None:
    """Signing key of the audit log: init, show, rotate, retire."""


@command(key)
@click.argument("file_", metavar="FILE", type=click.Path(path_type=Path))
def init(cli: Cli, file_: Path) -> None:
    """Make a signing key (mode 0600) and print its public half, for auditors."""
    made = signing.init(file_)
    cli.note(
        f"{file_}: for the sealer only (SYNCWARD_AUDIT_SIGNING_KEY). Give this line to whoever "
        "verifies (SYNCWARD_AUDIT_PUBLIC_KEY), by a way that no database administrator controls:"
    )
    cli.answer({"file": str(file_), "keys": [made.line]}, lambda: made.line)


@command(key)
@_FILE
def show(cli: Cli, file_: Path | None) -> None:
    """Print the public half, one line for each key: what auditors need."""
    lines = [one.line for one in signing.load(_path(cli, file_)).public]
    cli.answer({"keys": lines}, lambda: "\n".join(lines))


@command(key)
@_FILE
def rotate(cli: Cli, file_: Path | None) -> None:
    """Make a new key; the one before signs beside it until it is retired."""
    path = _path(cli, file_)
    made = signing.rotate(path)
    cli.note(
        "the sealer takes it within seconds and signs with both; copy the file to the other "
        "sealers' hosts; when a checkpoint with both is published: syncward audit key retire"
    )
    cli.answer({"file": str(path), "keys": [made.line]}, lambda: made.line)


@command(key)
@_FILE
def retire(cli: Cli, file_: Path | None) -> None:
    """Forget the key that was replaced, once anchors hold what says by which other."""
    path = _path(cli, file_)
    keys = signing.load(path).public
    if len(keys) > 1:
        _require_published(cli, keys)
    gone = signing.retire(path)
    cli.answer(
        {"file": str(path), "retired": gone.line},
        lambda: (
            f"{gone.name} signs no more; whoever verifies keeps it for what it signed. Copy the "
            "file to the other sealers' hosts"
        ),
    )


def _path(cli: Cli, file_: Path | None) -> Path:
    path = file_ or cli.settings.audit_signing_key
    if path is None:
        raise ConfigError("name the key's FILE, or set SYNCWARD_AUDIT_SIGNING_KEY")
    return path


def _require_published(cli: Cli, keys: tuple[PublicKey, ...]) -> None:
    """Refuse while a verifier who only knows the old key could not get to the new one."""
    with cli.sealing() as tx:
        seen = sealing.state(tx)
        published = sealing.newest_checkpoint(tx, at_most=seen.published_size)
        said = [
            one
            for one in seal_watch.rotations(tx)
            if one.detail.get("after") == keys[0].line
            and statement.is_signed(seen.log_id, AuditAction.SIGNER_ROTATED, one.detail, [keys[1]])
        ]
    if published is None or not _signed_by_all(seen.log_id, published, keys):
        raise Conflict(
            "audit key: no checkpoint was published with both keys yet; is a sealer running with "
            "this file, and do all anchors accept? See: syncward doctor audit"
        )
    last = published.last
    if not any((one.position.xid, one.position.seq) <= (last.xid, last.seq) for one in said):
        raise Conflict(
            "audit key: the event that names the new key is not published yet; try again in a "
            "few seconds"
        )


def _signed_by_all(log_id: UUID, published: Sealed, keys: tuple[PublicKey, ...]) -> bool:
    text = Checkpoint(
        log_id, published.size, published.root, published.epoch, published.signed_at
    ).text
    return set(signing.signed_by(text, published.signatures, keys)) == set(keys)
