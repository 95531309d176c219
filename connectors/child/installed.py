"""Connectors that an operator has installed: where they are, and that nobody has changed them.

Each has a directory of its own below SYNCWARD_CONNECTORS_DIR, `tap-github@1.2.3`, with a virtual
environment and, written last, a manifest with the hash of every file. Start at `installed`.
"""

import hashlib
import json
import os
import pwd
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from connectors.child.launcher import can_guard
from schemas.children import ChildPolicy
from schemas.errors import ConfigError

Kind = Literal["singer", "airbyte"]

MANIFEST, VENV = "manifest.json", "venv"
_REQUIREMENT = re.compile(
    r"(?P<package>[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9])?)==(?P<version>[0-9][0-9A-Za-z.!+_-]{0,48})"
)
_SCRIPT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PIECE = 2**20
_MANIFEST_MAX = 64 * 2**20


class Manifest(BaseModel):
    """What is in a connector's directory, as `connector install` left it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    format: Literal[1] = 1
    kind: Kind
    package: str
    version: str
    executables: tuple[str, ...]  # that its package brings; the first is the one to start
    installed_at: str
    files: dict[str, str]  # path below the environment -> SHA-256, or -> where a link leads

    @property
    def digest(self) -> str:
        """One hash for all of it, in the audit log."""
        text = json.dumps(self.model_dump(mode="json", exclude={"installed_at"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Installed:
    """One connector that may be started."""

    shown: str
    command: tuple[str, ...]
    bin: Path
    readable: tuple[Path, ...]  # its environment, and the interpreter's own files


def place(root: Path, connector: str) -> Path:
    """Return the directory of a connector: for some programs `=` in a path means something."""
    return root / connector.replace("==", "@")


def requirement(text: str) -> tuple[str, str]:
    """Read `tap-github==1.2.3`; ValueError says how to write one."""
    found = _REQUIREMENT.fullmatch(text)
    if found is None:
        raise ValueError("write a package and its exact version, e.g. tap-github==1.2.3")
    return found["package"], found["version"]


def executable_name(text: str) -> str:
    """Check the name of an executable; ValueError says how to write one."""
    if not _SCRIPT.fullmatch(text):
        raise ValueError("write the name of a command that the package brings, without a path")
    return text


def installed(policy: ChildPolicy, kind: Kind, connector: str, executable: str) -> Installed:
    """Return a connector that is as it was installed; ConfigError says what is in the way."""
    root = _allowed(policy, connector)
    directory = place(root, connector)
    manifest = read_manifest(directory)
    if manifest is None:
        raise ConfigError(
            f"{connector}: is not installed on this worker; on each worker's host: "
            f"syncward connector install {connector}",
            code="connector_missing",
        )
    if manifest.kind != kind:
        raise ConfigError(
            f"{connector}: is a connector of kind {manifest.kind}; correct the resource's kind",
            code="connector_missing",
        )
    name = executable or manifest.executables[0]
    if name not in manifest.executables:
        raise ConfigError(
            f"{connector}: brings no command of that name; it has "
            f"{', '.join(manifest.executables)}: correct the resource's `executable`",
            code="connector_missing",
        )
    _verify(directory, manifest, connector)
    if policy.writable_refused and _may_change(directory, policy.user):
        raise ConfigError(
            f"{connector}: the login that it would run as may write to its directory, to one above "
            "or to a file in it, so it could change itself; let another login own "
            "SYNCWARD_CONNECTORS_DIR with all that is in it (docs/child-connectors.md)",
            code="connector_changed",
        )
    path = directory / VENV / "bin"
    interpreter = (path / "python").resolve().parent.parent
    return Installed(connector, _command(path, name), path, (directory / VENV, interpreter))


def _allowed(policy: ChildPolicy, connector: str) -> Path:
    if policy.directory is None:
        raise ConfigError(
            f"{connector}: other people's connectors are not allowed here; ask whoever runs this "
            "installation to set SYNCWARD_CONNECTORS_DIR on the workers (docs/child-connectors.md)",
            code="connector_off",
        )
    if not (policy.unguarded_there or can_be_guarded(policy)):
        raise ConfigError(
            f"{connector}: would reach the network past the egress guard, as this worker cannot "
            "guard it: that takes Linux 5.14 or later with Landlock and seccomp, on x86-64 or ARM, "
            "and SYNCWARD_CONNECTORS_CONFINED; SYNCWARD_CONNECTORS_UNGUARDED=true allows it "
            "(docs/child-connectors.md)",
            code="connector_off",
        )
    if not hasattr(os, "pidfd_open") or not hasattr(os, "memfd_create"):
        raise ConfigError(
            f"{connector}: other people's connectors need a worker on Linux", code="connector_off"
        )
    return policy.directory.absolute()


def can_be_guarded(policy: ChildPolicy) -> bool:
    """Say whether a child here makes no connection but those that it is given."""
    return policy.confined and can_guard()


def _may_change(directory: Path, user: str | None) -> bool:
    """Say whether a connector could change its own files, or put others in their place."""
    try:
        uid, groups = _login(user)
    except KeyError:
        return True
    if uid == 0:
        return True
    above = {*directory.parents, *directory.resolve().parents}
    if any(_writable(path.stat(), uid, groups, sticky=True) for path in above):
        return True
    found = [directory, *(Path(below) for below, _, _ in os.walk(directory))]
    found += [entry for _, entry in files_below(directory)]
    return any(_writable(path.lstat(), uid, groups) for path in found)


def _login(user: str | None) -> tuple[int, Collection[int]]:
    """Return who a connector runs as; as ourselves it has our groups, whatever /etc/group says."""
    if user is None:
        return os.geteuid(), {os.getegid(), *os.getgroups()}
    entry = pwd.getpwnam(user)
    return entry.pw_uid, os.getgrouplist(entry.pw_name, entry.pw_gid)


def _writable(
    status: os.stat_result, uid: int, groups: Collection[int], *, sticky: bool = False
) -> bool:
    """Say whether a login could change it: its owner may always.

    In a directory with the sticky bit nobody moves what belongs to others.
    """
    mode = status.st_mode
    if uid == status.st_uid:
        return True
    if stat.S_ISLNK(mode) or (sticky and mode & stat.S_ISVTX):
        return False
    return bool(mode & stat.S_IWOTH) or (bool(mode & stat.S_IWGRP) and status.st_gid in groups)


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a directory; None if nothing was installed there to its end."""
    try:
        with (directory / MANIFEST).open("rb") as file:
            return Manifest.model_validate_json(file.read(_MANIFEST_MAX))
    except (OSError, ValidationError):
        return None


def _command(path: Path, name: str) -> tuple[str, ...]:
    """Return how it is started: a script by the environment's own interpreter, isolated."""
    script = path / name
    with script.open("rb") as file:
        is_script = file.read(2) == b"#!"
    return (str(path / "python"), "-I", "-B", str(script)) if is_script else (str(script),)


# ── unchanged ────────────────────────────────────────────────────────────────────────────────

#: What a file was like when its hash was right: its time of change cannot be set back.
_Look = tuple[int, int, int, int]
_seen: dict[Path, tuple[str, dict[str, _Look]]] = {}
_lock = Lock()


def _verify(directory: Path, manifest: Manifest, connector: str) -> None:
    """Refuse a connector that is not as it was installed; what was looked at is remembered."""
    digest = manifest.digest
    with _lock:
        before, looks = _seen.get(directory, ("", {}))
    try:
        name, now = compared(directory, manifest, looks if before == digest else {})
    except OSError as error:
        raise ConfigError(
            f"{connector}: its files cannot be read by the worker's login; let it read "
            "SYNCWARD_CONNECTORS_DIR",
            code="connector_changed",
        ) from error
    if name is not None:
        raise _changed(connector, name)
    with _lock:
        _seen[directory] = digest, now


def compared(
    directory: Path, manifest: Manifest, known: Mapping[str, _Look]
) -> tuple[str | None, dict[str, _Look]]:
    """Compare every file with its hash, but for those that look as they did when it was right.

    Return the first that differs, is new or is gone, and how all of them look.
    """
    now: dict[str, _Look] = {}
    for name, entry in files_below(directory / VENV):
        status = entry.lstat()
        now[name] = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        wanted = manifest.files.get(name)
        if wanted is None or (known.get(name) != now[name] and hash_of(entry) != wanted):
            return name, now
    return min(manifest.files.keys() - now.keys(), default=None), now


def _changed(connector: str, name: str) -> ConfigError:
    shown = name if name.isprintable() and len(name) <= 200 else "a file with an odd name"  # noqa: PLR2004 - fits a line
    return ConfigError(
        f"{connector}: {shown} is not as it was installed; find out who changed it, then: "
        f"syncward connector install --again {connector}",
        code="connector_changed",
    )


def files_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file and link below a directory, in order, with its relative name."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        for entry in sorted(os.scandir(root / below), key=lambda one: one.name):
            name = f"{below}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{name}/")
            else:
                yield name, Path(entry.path)


def hash_of(path: Path) -> str:
    """Return a file's SHA-256, or where a link leads; other things have no hash."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"-> {path.readlink()}"
    if not stat.S_ISREG(mode):
        return "no file"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
