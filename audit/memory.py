"""What this sealer signed last, in a file beside its key: it never signs another history."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from uuid import UUID

from schemas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LastSigned:
    """The largest tree that was signed here and committed."""

    log_id: UUID
    size: int
    root: bytes
    #: Lines of the keys that sign here, and of those that did before: they sign no more.
    keys: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()


def path_of(key: Path) -> Path:
    """Return where the sealer that owns this signing key remembers what it signed."""
    return key.with_name(f"{key.name}.last")


def recall(path: Path) -> LastSigned | None:
    """Return what was signed last; None if nothing ever was."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return LastSigned(
            UUID(said["log"]), int(said["size"]), bytes.fromhex(said["root"]),
            *(tuple(map(str, said.get(name, []))) for name in ("keys", "retired")),
        )  # fmt: skip
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"audit: {path} (what this sealer signed last) cannot be read; restore it from its "
            "backup, or look at an anchor, then remove it"
        ) from None


def remember(path: Path, signed: LastSigned) -> None:
    """Replace the file at once, durably; ConfigError if it cannot be written.

    A key that signed beside one of `signed.keys` before, and is none of them now, is retired. (One
    that was replaced without a rotation, because it was lost, is not.)
    """
    before = recall(path)
    retired: set[str] = set(before.retired) if before else set()
    if before and not set(signed.keys).isdisjoint(before.keys):
        retired |= set(before.keys)
    said = {
        "log": str(signed.log_id), "size": signed.size, "root": signed.root.hex(),
        "keys": signed.keys, "retired": sorted(retired - set(signed.keys)),
    }  # fmt: skip
    # a name of its own: another sealer of this host may be writing, too
    fresh = path.with_name(f".{path.name}.{token_hex(8)}")
    try:
        _write(fresh, json.dumps(said))
        fresh.replace(path)
        _settle(path.parent)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise ConfigError(
            f"audit: {path} (what this sealer signed last) cannot be written: {error.strerror}; "
            "give its directory to the sealer and free some space"
        ) from None


def _write(path: Path, content: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _settle(directory: Path) -> None:
    """Make a rename survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
