"""`syncward keys`: keyrings, roots, and their rotation."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import click

from cli import credentials, key_rotation
from cli.context import Cli, Group, command
from cli.show import ago, table
from crypto import keyring as keyrings
from crypto.kms import file
from crypto.roots import Purpose, RootStatus
from schemas.errors import Conflict, NotFound
from storage import keystore
from storage.keystore import Root


@click.group(cls=Group)
def keys() -> None:
    """Keyrings: init, status, rotate, replace, retire, merge, drop."""


commands = {"keys": keys}

#: Digits of an id that are shown.
_SHORT = 12


@command(keys)
@click.argument("directory", type=click.Path(path_type=Path))
def init(cli: Cli, directory: Path) -> None:
    """Make a keyring: one file for operators, one for workers."""
    operator_file, worker_file = keyrings.init(directory)
    cli.answer(
        {"operator": str(operator_file), "worker": str(worker_file)},
        lambda: (
            f"{operator_file}: for the CLI and the scheduler; it seals and cannot open\n"
            f"{worker_file}: for workers only; move it to their hosts and delete it here"
        ),
    )


@dataclass(frozen=True, slots=True)
class RootLine:
    """One root, as the keystore and as this host's keyring know it."""

    purpose: str
    root_id: UUID
    state: str
    created_at: datetime
    keys: int  # data keys that it wraps
    wraps_here: bool
    opens_here: bool


@command(keys)
def status(cli: Cli) -> None:
    """Show the roots: age, use, what this host can do with them, and what is pending."""
    held = {one.root_id: one for one in credentials.open_keyring(cli).status()}
    with cli.keystore.transaction() as tx:
        known = {one.root_id: one for one in keystore.roots(tx)}
        counted = {one.root_id: one.keys for one in keystore.counts(tx)}
        former = [r.root_id for r in known.values() if r.state == "decrypt_only"]
        left = keystore.pending(tx, former)
    lines = [
        _line(root_id, held.get(root_id), known.get(root_id), counted.get(root_id, 0))
        for root_id in {**known, **held}
    ]
    heads = ("PURPOSE", "ROOT", "STATE", "MADE", "KEYS", "SEALS", "OPENS")
    rows = [
        (
            one.purpose, _short(one.root_id), one.state, ago(one.created_at), f"{one.keys:,}",
            "yes" if one.wraps_here else "no", "yes" if one.opens_here else "no",
        )
        for one in lines
    ]  # fmt: skip
    pending = f"pending: {left.rewrap:,} keys to wrap again, {left.replace:,} to replace"
    cli.answer(
        {"roots": lines, "pending": {"rewrap": left.rewrap, "replace": left.replace}},
        lambda: f"{table(heads, rows)}\n{pending}",
    )


def _short(root_id: UUID) -> str:
    """Return the random end of an id, which `keys retire` takes as well."""
    return root_id.hex[-_SHORT:]


def _line(root_id: UUID, held: RootStatus | None, known: Root | None, count: int) -> RootLine:
    """Join both views; the keystore's state decides where it knows the root."""
    purpose, state, made = ("", "", datetime.now(UTC))
    if held is not None:
        purpose, state, made = held.purpose, "not used yet", held.created_at
    if known is not None:
        purpose, state, made = known.purpose, known.state, known.created_at
    return RootLine(
        purpose,
        root_id,
        state,
        made,
        count,
        wraps_here=held is not None and held.state != "decrypt_only",
        opens_here=held is not None and held.can_unwrap,
    )


@command(keys)
@click.argument("purpose", type=click.Choice(["credentials", "records"]))
@click.option(
    "--worker-file", type=click.Path(path_type=Path), metavar="PATH",
    help="The workers' keyring file, if it is on this host, too.",
)  # fmt: skip
@click.option(
    "--update-file", type=click.Path(path_type=Path), metavar="PATH",
    help="Write the workers' part of the new root here, to be carried to their hosts.",
)  # fmt: skip
@click.option(
    "--timeout", default=600, show_default=True, metavar="SECONDS",
    help="Wait so long for workers; say the same again to go on.",
)  # fmt: skip
def rotate(
    cli: Cli,
    purpose: Purpose,
    *,
    worker_file: Path | None,
    update_file: Path | None,
    timeout: int,
) -> None:
    """Replace a root: make one, wait until all workers have it, wrap every data key again."""
    done = key_rotation.rotate(
        cli,
        purpose,
        key_rotation.Files(worker_file, update_file),
        patience=timedelta(seconds=timeout),
    )
    cli.answer(done, lambda: done.text)


@command(keys)
@click.option("--all", "everybody", is_flag=True, help="Of all accounts.")
@click.option("--wait/--no-wait", default=True, help="Wait until workers have done it.")
def replace(cli: Cli, *, everybody: bool, wait: bool) -> None:
    """Replace the data keys of credentials: workers seal each again under a new one."""
    done = key_rotation.replace(cli, everybody=everybody, wait=wait)
    cli.answer(
        {"replaced": done, "waited": wait},
        lambda: f"{done:,} data keys {'are' if wait else 'are being'} replaced",
    )


@command(keys)
@click.argument("file_", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("update", type=click.Path(path_type=Path))
def merge(cli: Cli, file_: Path, update: Path) -> None:
    """Add the roots of an update file to a keyring file; running workers take them at once."""
    added = file.merge(file_, update)
    cli.answer(
        {"added": added},
        lambda: (
            f"{len(added)} roots added to {file_}; delete {update} now"
            if added
            else f"{file_} has them already; delete {update} now"
        ),
    )


@command(keys)
@click.argument("file_", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("root_id", metavar="ROOT", type=click.UUID)
def drop(cli: Cli, file_: Path, root_id: UUID) -> None:
    """Take a retired root out of a keyring file, on the host that has it."""
    file.drop_root(file_, root_id)
    cli.answer({"dropped": root_id}, lambda: f"root {root_id} is no longer in {file_}")


@command(keys)
@click.argument("name", metavar="ROOT")
@click.option("--force", is_flag=True, help="Also while backups exist that need it.")
def retire(cli: Cli, name: str, *, force: bool) -> None:
    """Take a replaced root out of use, when neither a data key nor a backup needs it.

    One that waits for workers, because its update file was lost, is given up in the same way.
    """
    with cli.transaction() as tx, cli.keystore.beside(tx) as stored:
        found = _root(keystore.roots(stored), name)
        in_use = sum(one.keys for one in keystore.counts(stored) if one.root_id == found.root_id)
        _refuse_early(cli, found, in_use, force=force)
        if not keystore.retire(tx, stored, found, cli.principal):
            raise Conflict(
                f"root {found.root_id}: a data key was wrapped by it just now; try again"
            )
    key_rotation.drop_here(cli, found)
    cli.answer(
        {"retired": found.root_id},
        lambda: (
            f"root {name} is retired; take it out of the keyring files of other hosts with: "
            f"syncward keys drop FILE {found.root_id}"
        ),
    )


def _root(known: Sequence[Root], name: str) -> Root:
    """Find a root by its id, or by the end of it that `keys status` shows."""
    wanted = name.replace("-", "").lower()
    found = [one for one in known if len(wanted) >= _SHORT and one.root_id.hex.endswith(wanted)]
    if len(found) != 1:
        raise NotFound(f"root {name}: no such root; see: syncward keys status")
    return found[0]


def _refuse_early(cli: Cli, found: Root, in_use: int, *, force: bool) -> None:
    if found.state in {"active", "retired"}:
        raise Conflict(
            f"root {found.root_id} is {found.state}; only a replaced one can be retired "
            "(syncward keys rotate replaces one)"
        )
    if in_use:
        raise Conflict(
            f"root {found.root_id} still wraps {in_use:,} data keys; "
            f"wrap them again with: syncward keys rotate {found.purpose}"
        )
    if found.state == "next":  # nothing was ever wrapped by it
        return
    store, settings = cli.keystore, cli.settings
    kept = settings.keystore_backup_keep if store.separate else settings.backup_keep
    safe = (found.unused_since or datetime.now(UTC)) + kept
    if safe > datetime.now(UTC) and not force:
        raise Conflict(
            f"root {found.root_id}: backups that need it are kept until {safe:%Y-%m-%d %H:%M} UTC; "
            "retire it then, or now with --force if no backup is to be opened any more"
        )
