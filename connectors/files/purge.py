"""Take a stream's rows out of its directory, keep them for a while, bring them back.

The files get a second name in `.purged`, which nobody but the worker may enter, with a record of
what the manifest said of them; then the manifest names no file. The manifest alone decides: the
record counts as long as the generation is the one that the purge made. The first run of the stream
after the time that it names removes it for good.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from connectors.files.manifest import Directory, KeptColumn, Manifest, Part, Retired
from connectors.local_files import explained
from schemas.errors import ConfigError
from schemas.limits import PURGE_UNDO_FOR
from schemas.records import Cursor, LoadRequest

_PLACE = ".purged"
_RECORD = "kept.json"
#: What comes back of a manifest, beside its files.
_COMES_BACK = (
    "cursor", "reads", "schema_hash", "runs_since_full", "format", "columns", "ordered_by", "files",
)  # fmt: skip


class Kept(BaseModel):
    """Files that were purged and can be brought back, with what the manifest said of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: int = 1
    generation: int  # the one that the purge made
    until: datetime
    cursor: Cursor | None
    reads: str | None
    schema_hash: str | None
    runs_since_full: int
    format: str
    columns: tuple[KeptColumn, ...]
    ordered_by: tuple[str, ...]
    files: tuple[Part, ...]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.files)


def tidy(directory: Directory, now: Manifest) -> None:
    """Remove what is kept if its time is over, or if it was never purged, or came back."""
    with directory.locked():
        kept = _read(directory)
        if kept is None:
            _remove(directory)  # a record that was not written to its end
            return
        here = {part.name for part in now.files}
        back = bool(kept.files) and here >= {part.name for part in kept.files}
        if kept.until < datetime.now(UTC) or kept.generation > now.generation or back:
            _remove(directory)


def put_away(directory: Directory, request: LoadRequest, now: Manifest) -> Mapping[str, Any]:
    """Keep the files; return what changes in the manifest. Under the directory's lock."""
    before = _read(directory)
    if before is not None:
        raise ConfigError(
            f"{request.stream.name}: {before.rows} rows of an earlier purge are kept until "
            f"{before.until:%Y-%m-%d %H:%M} UTC; bring them back with --undo, or remove them and "
            "these with --now"
        )
    kept = Kept(
        generation=now.generation + 1,
        until=datetime.now(UTC) + PURGE_UNDO_FOR,
        **{name: getattr(now, name) for name in _COMES_BACK},
    )
    place = directory.path / _PLACE
    with explained(directory.shown):
        place.mkdir(mode=0o700)
        for part in kept.files:
            _give_name(directory.path / part.name, place / part.name)
        _write(directory, kept)
    at = datetime.now(UTC)
    return _emptied(now, (*now.retired, *(Retired(name=p.name, since=at) for p in now.files)))


def delete(now: Manifest) -> Mapping[str, Any]:
    """Return what changes in the manifest where nothing is kept; `forget_files` follows."""
    return _emptied(now, ())


def forget_files(directory: Directory, before: Manifest) -> None:
    """Remove the files of a manifest at once, those that readers may have, and what is kept."""
    with directory.locked(), explained(directory.shown):
        for name in [*(part.name for part in before.files), *(one.name for one in before.retired)]:
            (directory.path / name).unlink(missing_ok=True)
        _remove(directory)


def bring_back(directory: Directory, request: LoadRequest, now: Manifest) -> Mapping[str, Any]:
    """Give the kept files their names again; return what changes in the manifest."""
    kept, name = _read(directory), request.stream.name
    if kept is None:
        raise ConfigError(
            f"{name}: no purged rows are kept; they are for {PURGE_UNDO_FOR.days} days, and not "
            "after --now. Load them again with: syncward run enqueue CONNECTION"
        )
    if kept.generation != now.generation:
        raise ConfigError(
            f"{name}: a run has loaded it since it was purged, and its rows are newer than the "
            "kept ones; there is nothing to undo. Remove those with --now, or leave them until "
            f"{kept.until:%Y-%m-%d %H:%M} UTC"
        )
    with explained(directory.shown):
        for part in kept.files:
            _give_name(directory.path / _PLACE / part.name, directory.path / part.name)
    back = {part.name for part in kept.files}
    return {
        "generation": now.generation + 1,
        "retired": tuple(one for one in now.retired if one.name not in back),
        "updated_at": datetime.now(UTC),
        **{name: getattr(kept, name) for name in _COMES_BACK},
    }


def forget_cursor(directory: Directory) -> None:
    """Let rows that come back be read from their beginning: somebody has reset the stream."""
    kept = _read(directory)
    if kept is not None:
        with explained(directory.shown):
            _write(directory, kept.model_copy(update={"cursor": None, "reads": None}))


def _emptied(now: Manifest, retired: tuple[Retired, ...]) -> Mapping[str, Any]:
    return {
        "generation": now.generation + 1,
        "cursor": None,
        "reads": None,
        "files": (),
        "retired": retired,
        "updated_at": datetime.now(UTC),
    }


def _give_name(file: Path, other: Path) -> None:
    """Give a file a second name, or where the file system knows none, a second copy."""
    if other.exists():  # a reader's, or of an attempt that died
        return
    try:
        os.link(file, other)
    except FileNotFoundError:
        raise
    except OSError:
        copy = other.with_name(f".{other.name}.tmp")
        shutil.copyfile(file, copy)
        copy.chmod(0o640)
        with copy.open("rb") as whole:  # before a manifest names it
            os.fsync(whole.fileno())
        copy.replace(other)


def _read(directory: Directory) -> Kept | None:
    with explained(directory.shown):
        try:
            text = (directory.path / _PLACE / _RECORD).read_bytes()
        except FileNotFoundError:
            return None
    try:
        return Kept.model_validate_json(text)
    except ValidationError:
        raise ConfigError(
            f"{directory.shown}: {_PLACE}/{_RECORD} of the stream cannot be read; restore it, or "
            f"remove that {_PLACE} with the purged rows that it keeps"
        ) from None


def _write(directory: Directory, kept: Kept) -> None:
    place = directory.path / _PLACE
    temporary = place / f".{_RECORD}.tmp"
    with temporary.open("wb") as file:
        file.write(kept.model_dump_json(indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(place / _RECORD)
    for one in (place, directory.path):
        descriptor = os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(directory: Directory) -> None:
    """Remove the record, then the files: without it they count for nothing."""
    place = directory.path / _PLACE
    if not place.exists():
        return
    with explained(directory.shown):
        (place / _RECORD).unlink(missing_ok=True)
    with suppress(OSError):  # the next claim finds it
        shutil.rmtree(place)
