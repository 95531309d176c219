"""What this sealer signed last, in a file beside its key: it never signs another history."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from schemas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LastSigned:
    """The largest tree that was signed here and committed."""

    log_id: UUID
    size: int
    root: bytes


def path_of(key: Path) -> Path:
    """Return where the sealer that owns this signing key remembers what it signed."""
    return key.with_name(f"{key.name}.last")


def recall(path: Path) -> LastSigned | None:
    """Return what was signed last; None if nothing ever was."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return LastSigned(UUID(said["log"]), said["size"], bytes.fromhex(said["root"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"audit: {path} (what this sealer signed last) cannot be read; restore it from its "
            "backup, or look at an anchor, then remove it"
        ) from None


def remember(path: Path, signed: LastSigned) -> None:
    """Replace the file at once, durably."""
    said = {"log": str(signed.log_id), "size": signed.size, "root": signed.root.hex()}
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(said, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
