"""Data files of one load: written under temporary names, on the disk before anybody names them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Self

from connectors.files.format import Hashed, Writer, read, to_json, writer
from connectors.files.manifest import Part
from connectors.local_files import explained
from connectors.row_groups import Grouping, sizes
from schemas.errors import ConfigError
from schemas.records import Column, Row, RowGroup

#: A file that has reached one of these is followed by the next. A merge rewrites whole files.
ROWS_MAX = 1_000_000
BYTES_MAX = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of a load go, and what is in them."""

    directory: Path
    shown: str  # for people: the resource's path, never the host's
    stream: str
    format: str
    columns: tuple[Column, ...]
    key: tuple[int, ...]  # positions of the columns that give the order; () if there is none
    generation: int
    fence: int
    check: Callable[[], None]  # raises if the load was cancelled

    def name(self, number: int) -> str:
        """Name a file; no other load has this fence."""
        return f"g{self.generation:08}-f{self.fence:012}-{number:05}.{self.format}"


class Parts:
    """Writes rows into as many files as they need. Numbers of files go on from writer to writer."""

    def __init__(self, place: Place, numbers: Iterator[int]) -> None:
        self._place = place
        self._numbers = numbers
        self._grouping = Grouping(sizes(place.columns))
        self._open: _OpenPart | None = None
        self._done: list[Part] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.discard()

    def add(self, row: Row) -> None:
        """Write one row."""
        group = self._grouping.add(row)
        if group is not None:
            self.write(group)

    def write(self, group: RowGroup) -> None:
        """Write a group of rows."""
        self._place.check()
        with explained(self._place.shown):
            if self._open is None:
                self._open = _OpenPart(self._place, self._place.name(next(self._numbers)))
            self._open.write(group)
            if self._open.rows >= ROWS_MAX or self._open.bytes >= BYTES_MAX:
                self._complete()

    def finish(self) -> list[Part]:
        """Bring everything to the disk and return the files, under their names."""
        for group in self._grouping.rest():
            self.write(group)
        with explained(self._place.shown):
            self._complete()
        return self._done

    def discard(self) -> None:
        """Remove what was written: nothing changed, or the load failed."""
        if self._open is not None:
            self._open.discard()
            self._open = None
        for part in self._done:
            (self._place.directory / part.name).unlink(missing_ok=True)

    def _complete(self) -> None:
        if self._open is not None:
            self._done.append(self._open.complete())
            self._open = None


class _OpenPart:
    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self._name = name
        self._temporary = place.directory / f".{name}.tmp"
        self._file: BufferedWriter = self._temporary.open("xb")
        os.fchmod(self._file.fileno(), 0o640)
        self._hashed = Hashed(self._file)
        self._writer: Writer = writer(place.format, self._hashed, place.columns, place.stream)
        self._first: Row | None = None
        self._last: Row | None = None
        self.rows = self.bytes = 0

    def write(self, group: RowGroup) -> None:
        self._writer.write(group)
        self._first = self._first or group.rows[0]
        self._last = group.rows[-1]
        self.rows += len(group.rows)
        self.bytes += group.size

    def complete(self) -> Part:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._place.directory / self._name)
        return Part(
            name=self._name,
            rows=self.rows,
            bytes=self._hashed.size,
            sha256=self._hashed.digest,
            first=self._key(self._first),
            last=self._key(self._last),
        )

    def _key(self, row: Row | None) -> tuple[object, ...] | None:
        if row is None or not self._place.key:
            return None
        columns = [self._place.columns[i] for i in self._place.key]
        return tuple(to_json([row[i] for i in self._place.key], columns))

    def discard(self) -> None:
        with suppress(Exception):  # its footer goes into a file that is removed next
            self._writer.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_part(place: Place, part: Part, columns: Sequence[Column]) -> Iterator[Row]:
    """Yield the rows of a file of an earlier run; ConfigError if somebody has touched it."""
    path = place.directory / part.name
    damaged = ConfigError(
        f"{place.shown}: file {part.name} is not the one that the manifest names; restore it, or "
        "remove the directory so that everything is read again",
        code="corrupted",
    )
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
                raise damaged
    except FileNotFoundError:
        raise damaged from None
    with explained(place.shown):
        yield from read(place.format, path, columns)
