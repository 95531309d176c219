"""How a root is replaced, step by step; each step can be said again after an interruption.

1. A new root is made and made known as `next`, with its canary.
2. Every living worker reports that it has the root.
3. It becomes active: the keystore says so, and everybody who has it wraps by it.
4. Data keys are wrapped again: those of credentials by workers, those of records here.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

from cli import credentials
from cli.context import Cli, interactive
from crypto.canary import make_canary
from crypto.kms import file
from crypto.roots import Keyring, Purpose, Rotating, WrapContext, Wrapped
from schemas.errors import ConfigError, TransientError
from storage import keystore, rewrap
from storage.keystore import Root, RootOffer, StoredKey

_POLL_S = 0.5
#: How long `keys replace` waits for workers; they need about a millisecond for each key.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Files:
    """Where the workers' half of a new root goes: into their file here, or to be carried."""

    worker: Path | None
    update: Path | None


@dataclass(frozen=True, slots=True)
class Rotated:
    """The end of a rotation."""

    root_id: UUID
    rewrapped: int
    text: str


def rotate(cli: Cli, purpose: Purpose, files: Files, *, patience: timedelta) -> Rotated:
    """Begin a rotation, or go on with one that has begun; says what to do where it must wait."""
    keyring = credentials.open_keyring(cli)
    target = _begun(cli, purpose) or _new_root(cli, keyring, purpose, files)
    total = _left(cli, target)
    if target.state == "next":
        if not _everybody_has(cli, target, patience):
            raise TransientError(
                f"root {target.root_id}: {_lacking(cli, target)} workers do not have it yet; "
                "carry the update file to each host and run there: syncward keys merge "
                f"WORKER_FILE UPDATE_FILE, then here again: syncward keys rotate {purpose}"
            )
        with cli.transaction() as tx, cli.keystore.beside(tx) as keys:
            keystore.activate(tx, keys, target, cli.principal)
    _follow(cli, keyring, target)
    _wrap_again(cli, keyring, target, total, patience)
    return Rotated(
        target.root_id,
        total,
        f"root {target.root_id} is active; {total:,} data keys were wrapped again",
    )


def _follow(cli: Cli, keyring: Keyring, target: Root) -> None:
    """Wrap by the active root here, too, and have this host's file say so; done before or not."""
    if not keyring.prefer(target.root_id):
        raise ConfigError(
            f"root {target.root_id}: this host's keyring does not have it, or not to wrap with; "
            "use the keyring file that the rotation was begun with"
        )
    if keyring.scheme == "file":
        file.activate(file.path_of(cli.settings.keyring or ""), target.root_id)


def _begun(cli: Cli, purpose: str) -> Root | None:
    """Return the root of a rotation that goes on: one that waits, or has keys left to wrap."""
    with cli.keystore.transaction() as keys:
        known = {r.state: r for r in keystore.roots(keys) if r.purpose == purpose}
    active = known.get("active")
    unfinished = active if active is not None and _left(cli, active) else None
    return known.get("next") or unfinished


def _left(cli: Cli, target: Root) -> int:
    """Count the data keys of a root's purpose that other roots wrap."""
    with cli.keystore.transaction() as keys:
        counted = keystore.counts(keys)
    return sum(
        one.keys
        for one in counted
        if one.purpose == target.purpose and one.root_id != target.root_id
    )


def _new_root(cli: Cli, keyring: Keyring, purpose: Purpose, files: Files) -> Root:
    """Make a root and make it known; the workers' half goes where the operator said."""
    if keyring.scheme != "file":
        return _new_version(cli, keyring, purpose)
    own = file.path_of(cli.settings.keyring or "")
    if files.worker is not None:
        root_id = file.add_root(own, files.worker, purpose)
    elif files.update is not None:
        root_id = file.carry(own, files.update, purpose)
    else:
        raise ConfigError(
            "say where the workers' part of the new root goes: --worker-file PATH if their keyring "
            "file is on this host, or --update-file PATH to be carried to their hosts"
        )
    keyring.reload()
    return _make_known(cli, keyring, purpose, root_id)


def _new_version(cli: Cli, keyring: Keyring, purpose: Purpose) -> Root:
    """Have the KMS make a new version of its key; every host has it at once."""
    if not isinstance(keyring, Rotating):
        raise ConfigError(f"keyring {keyring.scheme}://: it cannot be rotated from here")
    root_id = keyring.rotate(purpose)
    return _make_known(cli, keyring, purpose, root_id)


def _make_known(cli: Cli, keyring: Keyring, purpose: Purpose, root_id: UUID) -> Root:
    if not keyring.prefer(root_id):
        raise ConfigError(f"root {root_id}: this host's keyring does not have it")
    offer = RootOffer(root_id, purpose, keyring.scheme, lambda: make_canary(keyring, purpose))
    with cli.transaction() as tx, cli.keystore.beside(tx) as keys:
        keystore.add_root(tx, keys, offer, cli.principal)
        known = keystore.roots(keys)
    made = next((root for root in known if root.root_id == root_id), None)
    if made is None:
        raise ConfigError(f"root {root_id}: another rotation goes on; see: syncward keys status")
    return made


# ── every worker has it ──────────────────────────────────────────────────────────────────────


def _lacking(cli: Cli, root: Root) -> int:
    with cli.transaction() as tx:
        return rewrap.workers_without(tx, root.root_id)


def _everybody_has(cli: Cli, root: Root, patience: timedelta) -> bool:
    return _until(
        cli,
        lambda: _lacking(cli, root),
        lambda left: f"waiting for {left} workers to take root {root.root_id}",
        patience,
    )


# ── data keys are wrapped again ──────────────────────────────────────────────────────────────


def _wrap_again(cli: Cli, keyring: Keyring, active: Root, total: int, patience: timedelta) -> None:
    def left() -> int:
        if active.purpose == "records":  # again: workers follow within seconds, not at once
            _wrap_records(cli, keyring, active)
        return _left(cli, active)

    done = _until(
        cli,
        left,
        lambda left: f"{total - left:,} of {total:,} data keys wrapped again",
        patience,
    )
    if not done:
        raise TransientError(
            f"root {active.root_id} is active, but {_left(cli, active):,} data keys wait to be "
            "wrapped by it; workers go on (syncward keys status shows how far they are)"
        )


def _wrap_records(cli: Cli, keyring: Keyring, active: Root) -> None:
    """Wrap records keys again here: workers cannot open them."""
    with cli.keystore.transaction() as keys:
        known = keystore.roots(keys)
    for former in known:
        if former.purpose == "records" and former.state == "decrypt_only":
            bad: set[UUID] = set()
            again = partial(_rewrapped, keyring, active)
            while rewrap.wrap_batch(cli.keystore, former, again, bad, cli.principal) is not None:
                pass
            if bad:
                raise ConfigError(
                    f"root {former.root_id}: {len(bad)} of its records keys do not open here; "
                    "use the operator's keyring that has both roots"
                )


def _rewrapped(
    keyring: Keyring, active: Root, found: Sequence[StoredKey]
) -> list[StoredKey | None]:
    items = [
        (Wrapped(key.root_id, key.wrapped), WrapContext(key.account_id, "records", key.dek_id))
        for key in found
    ]
    return [
        dataclasses.replace(key, root_id=new.root_id, wrapped=new.blob)
        if isinstance(new, Wrapped) and new.root_id == active.root_id
        else None
        for key, new in zip(found, keyring.rewrap_many(items), strict=True)
    ]


# ── data keys are replaced ───────────────────────────────────────────────────────────────────


def replace(cli: Cli, *, everybody: bool, wait: bool) -> int:
    """Have the data keys of an account's credentials replaced by workers; return how many."""
    if everybody:
        with cli.transaction() as tx, cli.keystore.beside(tx) as keys:
            count = keystore.replace(tx, keys, None, cli.principal)
    else:
        with cli.inside() as (tx, account, _), cli.keystore.beside(tx) as keys:
            count = keystore.replace(tx, keys, account.account_id, cli.principal)
    if wait and not _until(cli, partial(_to_replace, cli), _waiting, _PATIENCE):
        raise TransientError(
            f"{_to_replace(cli):,} data keys still wait to be replaced; workers go on "
            "(syncward keys status shows how far they are)"
        )
    return count


def _waiting(left: int) -> str:
    return f"{left:,} data keys wait to be replaced"


def _to_replace(cli: Cli) -> int:
    with cli.keystore.transaction() as keys:
        return keystore.pending(keys, []).replace


def drop_here(cli: Cli, root: Root) -> None:
    """Take a retired root out of this host's keyring, or have the KMS refuse it from now on."""
    keyring = credentials.open_keyring(cli)
    if isinstance(keyring, Rotating):
        purpose: Purpose = "credentials" if root.purpose == "credentials" else "records"
        with cli.keystore.transaction() as keys:
            kept = [
                one.root_id
                for one in keystore.roots(keys)
                if one.purpose == purpose and one.state != "retired"
            ]
        keyring.retire_below(purpose, kept[0])  # the oldest that still opens something
    elif any(one.root_id == root.root_id for one in keyring.status()):
        file.drop_root(file.path_of(cli.settings.keyring or ""), root.root_id)


def _until(
    cli: Cli, left: Callable[[], int], says: Callable[[int], str], patience: timedelta
) -> bool:
    """Wait until nothing is left, saying how far it is; False if patience ends first."""
    deadline = time.monotonic() + patience.total_seconds()
    with _shown(cli) as show:
        first = now = left()
        while now > 0:
            show(says(now), first - now, first)
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
            now = left()
    return True


@contextmanager
def _shown(cli: Cli) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far it is: a bar on a terminal, a line for each change elsewhere."""
    if interactive() and not cli.json:
        from cli.progress import counting  # noqa: PLC0415 - rich takes a tenth of a second

        with counting() as show:
            yield show
        return
    said = ""

    def line(text_: str, _done: int, _total: int) -> None:
        nonlocal said
        if text_ != said:
            said = text_
            cli.note(text_)

    yield line
