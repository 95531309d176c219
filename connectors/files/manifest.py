"""What a directory of files holds: one manifest, replaced in one step.

A file system has no transactions, so this is the transaction: data files are written beside what
is there, and nobody counts them until the manifest that names them is renamed into its place. It
holds the rows' files and where the stream resumes, so both move together or not at all. Whoever
reads or replaces it holds the directory's lock; a run that was fenced off cannot replace it.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from connectors.local_files import explained
from schemas.errors import ConfigError, LeaseLost, TransientError
from schemas.records import Column, Cursor, LoadRequest, StreamResult, ahead

NAME = "manifest.json"
_LOCK = ".lock"
#: Seconds that a lock is waited for; it is held for one small file, never while rows are written.
_LOCK_S = 60.0
_LOCK_LOOK_S = 0.05

#: Every file that a load makes, and no other: only these are ever removed.
_OURS = re.compile(r"\.?(g\d{8}-f\d{12}|sort-f\d{12})-\d{5}\.(parquet|jsonl)(\.tmp)?")


class Part(BaseModel):
    """One data file. `first` and `last` are its keys as JSON, if the stream is kept in order."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    rows: int
    bytes: int
    sha256: str
    first: tuple[Any, ...] | None = None
    last: tuple[Any, ...] | None = None


class Retired(BaseModel):
    """A file that no longer counts; readers of an older manifest may still want it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    since: datetime


class KeptColumn(BaseModel):
    """A column of the files."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    type: str
    nullable: bool
    as_text: bool

    @property
    def column(self) -> Column:
        return Column(self.name, self.type, self.nullable, self.as_text)

    @classmethod
    def of(cls, column: Column) -> "KeptColumn":
        """Keep a column as the source describes it."""
        return cls(
            name=column.name,
            type=column.type,
            nullable=column.nullable,
            as_text=column.as_text,
        )


class Manifest(BaseModel):
    """All that is known of one stream's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: int = 1
    connection_id: UUID
    stream: str
    fence: int
    claimed_by: UUID
    cursor: Cursor | None = None
    reads: str | None = None
    generation: int = 0
    schema_hash: str | None = None
    run_id: UUID | None = None
    runs_since_full: int = 0
    result: StreamResult | None = None
    format: str = ""
    columns: tuple[KeptColumn, ...] = ()
    #: the rows are in the order of this key, within each file and from file to file
    ordered_by: tuple[str, ...] = ()
    files: tuple[Part, ...] = ()
    retired: tuple[Retired, ...] = ()
    updated_at: datetime


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
_RESERVED = re.compile(r"con|prn|aux|nul|com\d|lpt\d")
_LONGEST = 200


def directory_name(name: str) -> str:
    """Return a name for the file system: another one for every name, whatever its letters are.

    Capitals are written out, too: two names that differ in them are one on some file systems.
    """
    safe = "".join(
        chr(byte) if chr(byte) in _PLAIN else f"%{byte:02X}" for byte in name.encode("utf-8")
    )
    if _RESERVED.fullmatch(safe):
        safe = f"%{ord(safe[0]):02X}{safe[1:]}"
    if len(safe) > _LONGEST:  # "%~" stands in no other name
        safe = f"{safe[:120]}%~{hashlib.sha256(name.encode()).hexdigest()[:32]}"
    return safe


def definition(request: LoadRequest, format_: str) -> str:
    """Return a digest of what decides which rows belong into the files, and how they look."""
    stream = request.stream
    parts = [stream.mode, list(stream.key), stream.cursor, request.target_schema, format_]
    parts += request.selection
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Directory:
    """The directory of one stream, under its lock."""

    def __init__(self, path: Path, shown: str, check: Callable[[], None]) -> None:
        self.path = path
        self.shown = shown
        self._check = check

    def make(self) -> None:
        """Make the directory and those above it."""
        with explained(self.shown):
            for one in (self.path.parent, self.path):
                one.mkdir(mode=0o750, exist_ok=True)
                if one.is_symlink():
                    raise ConfigError(f"{self.shown}: a directory there is a symbolic link")
                _sync_directory(one.parent)

    def claim(self, request: LoadRequest) -> tuple[Manifest, Manifest | None]:
        """Raise the fence; return the manifest now and before. Waits out a zombie's commit."""
        with self.locked():
            before = self.read()
            if before is not None:
                self._refuse_others(before, request)
                fence, claimed_by = before.fence, before.claimed_by
                if fence > request.fence or (
                    fence == request.fence and claimed_by != request.run_id
                ):
                    raise ahead(request.stream.name)
            now = (before or _empty(request)).model_copy(
                update={"fence": request.fence, "claimed_by": request.run_id}
            )
            self._replace(now)
            self._remove_left_over(now)
            return now, before

    def commit(
        self,
        request: LoadRequest,
        *,
        expected: Cursor | None,
        grace: timedelta,
        changed: Callable[[Manifest], Manifest],
    ) -> None:
        """Replace the manifest; LeaseLost if another run has taken over since our claim."""
        with self.locked():
            now = self.read()
            if now is None or not _ours(now, request) or now.cursor != expected:
                raise LeaseLost(
                    f"{request.stream.name}: another run has taken over; nothing was written"
                )
            new = changed(now)
            limit = datetime.now(UTC) - grace
            kept = tuple(one for one in new.retired if one.since > limit)
            self._replace(new.model_copy(update={"retired": kept}))
            for one in set(new.retired) - set(kept):
                with suppress(OSError):  # the next claim finds it
                    (self.path / one.name).unlink()

    def fenced_off(self, request: LoadRequest) -> bool:
        """Say whether another run has claimed the stream since."""
        now = self.read()
        return now is None or not _ours(now, request)

    def read(self) -> Manifest | None:
        """Return the manifest; None if there is none yet."""
        with explained(self.shown):
            try:
                text = (self.path / NAME).read_bytes()
            except FileNotFoundError:
                return None
        try:
            return Manifest.model_validate_json(text)
        except ValidationError:
            raise ConfigError(
                f"{self.shown}: its manifest.json cannot be read; restore it, or remove the "
                "directory so that everything is read again"
            ) from None

    def _refuse_others(self, before: Manifest, request: LoadRequest) -> None:
        if (before.connection_id, before.stream) != (request.connection_id, request.stream.name):
            raise ConfigError(
                f"{self.shown}: holds rows that this connection has not loaded; choose another "
                "target schema, or remove the directory"
            )

    def _replace(self, manifest: Manifest) -> None:
        """Write the manifest beside the old one and rename it: readers see one or the other."""
        text = manifest.model_dump_json(indent=1).encode()
        with explained(self.shown):
            temporary = self.path / f".{NAME}.tmp"
            with temporary.open("wb") as file:
                file.write(text + b"\n")
                file.flush()
                os.fchmod(file.fileno(), 0o640)
                os.fsync(file.fileno())
            temporary.replace(self.path / NAME)
            _sync_directory(self.path)

    def _remove_left_over(self, manifest: Manifest) -> None:
        """Remove what a run wrote that ended before its manifest did."""
        known = {part.name for part in manifest.files} | {one.name for one in manifest.retired}
        for found in self.path.iterdir():
            if _OURS.fullmatch(found.name) and found.name not in known:
                with suppress(OSError):  # it harms nobody
                    found.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process away from the manifest."""
        with explained(self.shown):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.path / _LOCK, flags, 0o600)
        try:
            self._wait(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _wait(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._check()
                if time.monotonic() > deadline:
                    raise TransientError(
                        f"{self.shown}: another process has held its lock for {_LOCK_S:.0f} s",
                        code="lock_timeout",
                    ) from None
                time.sleep(_LOCK_LOOK_S)
            else:
                return


def _empty(request: LoadRequest) -> Manifest:
    return Manifest(
        connection_id=request.connection_id,
        stream=request.stream.name,
        fence=request.fence,
        claimed_by=request.run_id,
        updated_at=datetime.now(UTC),
    )


def _ours(manifest: Manifest, request: LoadRequest) -> bool:
    return manifest.fence == request.fence and manifest.claimed_by == request.run_id


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
