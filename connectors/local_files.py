"""Files on the worker's own disk: where a resource may look for them, and errors in our words.

Whoever may write a resource chooses a path, so a path is relative to the directory that the
operator opened for the account (`LinkPolicy.files_root`), no part of it is a symbolic link, and
what it names is looked at before anything opens it: a pipe would hold a worker's slot for good.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError, TransientError

#: Every part of a path: no hidden files, nothing that climbs, nothing that a shell or a URI reads.
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 _.@+=-]{0,199}")
PARTS_MAX = 20


def checked_path(path: str) -> str:
    """Return a relative path as it was written; ValueError says how to write one."""
    parts = path.split("/")
    if len(parts) > PARTS_MAX or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError(
            "write a path below the account's directory of files, e.g. shop/orders.db: letters, "
            "digits and _ . - + = @, no part that begins with a dot, not absolute"
        )
    return path


#: A setting of resources that pydantic checks.
PathBelow = Annotated[str, AfterValidator(checked_path)]


def root_of(policy: LinkPolicy, path: str) -> Path:
    """Return the account's directory; ConfigError where the operator has opened none."""
    if policy.files_root is None:
        raise ConfigError(
            f"{path}: files are not allowed here; ask whoever runs this installation to set "
            "SYNCWARD_FILES_ROOT on the workers (docs/sqlite.md)",
            code="files_refused",
        )
    return Path(os.path.realpath(policy.files_root))


def existing_file(policy: LinkPolicy, path: str) -> Path:
    """Return the absolute path of a regular file that is there."""
    found = root_of(policy, path)
    with explained(path):
        for part in path.split("/"):
            found /= part
            _refuse_link(found, path)
        if not stat.S_ISREG(found.lstat().st_mode):
            raise ConfigError(f"{path}: is no regular file; correct the resource's `path`")
    return found


def made_directory(policy: LinkPolicy, path: str) -> Path:
    """Return the absolute path of a directory, made where it is missing."""
    found = root_of(policy, path)
    with explained(path):
        if not found.parent.is_dir():
            raise ConfigError(
                f"{path}: the directory of SYNCWARD_FILES_ROOT is not on this worker; make it, or "
                "mount it, on every worker",
                code="files_refused",
            )
        found.mkdir(mode=0o750, exist_ok=True)
        for part in path.split("/"):
            found /= part
            found.mkdir(mode=0o750, exist_ok=True)
            _refuse_link(found, path)
    return found


def _refuse_link(found: Path, path: str) -> None:
    if found.is_symlink():
        raise ConfigError(
            f"{path}: leads through a symbolic link; write the path without one",
            code="files_refused",
        )


_LATER = {
    errno.ENOSPC: ("no space left on the worker's disk", "disk_full"),
    errno.EDQUOT: ("the quota of the worker's login is used up", "disk_full"),
    errno.EIO: ("the worker's disk fails", "server_io"),
    errno.ESTALE: ("the file system went away", "server_io"),
    errno.EMFILE: ("the worker has too many files open", "out_of_memory"),
}
_NOW = {
    errno.ENOENT: (
        "no such file on this worker below SYNCWARD_FILES_ROOT/ACCOUNT-ID (the id: account list)",
        "missing_object",
    ),
    errno.ENOTDIR: ("a part of the path is no directory", "missing_object"),
    errno.EACCES: ("the worker's login has no right to it", "permission"),
    errno.EPERM: ("the worker's login has no right to it", "permission"),
    errno.EROFS: ("the file system is mounted read-only", "permission"),
    errno.ENAMETOOLONG: ("the name is longer than the file system takes", "config"),
}


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn errors of the file system into ours: they name the resource's path, never the host's."""
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


def explain(error: OSError, path: str) -> SyncwardError:
    """Say in our words who can act."""
    number = error.errno or 0
    if number in _NOW:
        says, code = _NOW[number]
        return ConfigError(f"{path}: {says}; correct the path or the worker's disk", code=code)
    says, code = _LATER.get(number, ("the worker's file system refused it", "server_io"))
    return TransientError(f"{path}: {says}; tried again", code=code)
