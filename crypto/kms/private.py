"""Files that only their owner may read: keyrings and the tokens of a KMS."""

import os
import stat
from pathlib import Path

from crypto.errors import KeyringError

_BYTES_MAX = 1024 * 1024


def read(path: Path, what: str, missing: str) -> bytes:
    """Read a file that nobody else can read; checks the opened file, not the name.

    KeyringError names `what`, the reason and what to type; `missing` is the way out without it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KeyringError(f"{what} {path}: no such file; {missing}") from None
    except OSError:
        raise KeyringError(
            f"{what} {path}: cannot be opened (a symbolic link, or no permission); "
            "give the file itself, owned by this user"
        ) from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise KeyringError(f"{what} {path}: not a regular file; give the file itself")
    with os.fdopen(descriptor, "rb") as file:
        if about.st_uid != os.geteuid():
            raise KeyringError(
                f"{what} {path}: belongs to another user; run: chown {os.geteuid()} {path}"
            )
        if about.st_mode & 0o077:
            raise KeyringError(
                f"{what} {path}: others can read it; run: chmod 600 {path} "
                "(and make a new one if somebody may have)"
            )
        _check_place(path, what)
        return file.read(_BYTES_MAX)


def stamp(path: Path) -> tuple[int, ...] | None:
    """Return what tells that a file was replaced; None leaves the words to whoever reads it."""
    try:
        about = path.stat()
    except OSError:
        return None
    return (about.st_dev, about.st_ino, about.st_mtime_ns, about.st_size, about.st_mode)


def _check_place(path: Path, what: str) -> None:
    """Refuse a directory in which others could put another file, or that is backed up with data."""
    directory = path.absolute().parent
    if directory.stat().st_mode & 0o022:
        raise KeyringError(
            f"{what} {path}: others can replace files in {directory}; run: chmod go-w {directory}"
        )
    for above in (directory, *directory.parents):
        if (above / "PG_VERSION").exists():
            raise KeyringError(
                f"{what} {path}: stands in the data directory of a database ({above}), whose "
                "backups would hold both; move it elsewhere"
            )
