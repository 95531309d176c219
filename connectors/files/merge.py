"""Rows in the order of their key: sorted on disk in bounded memory, then merged into the files.

The files of an ordered stream do not overlap: each holds a range of keys. So a merge reads and
rewrites only the files in whose range it has rows, and the others stay as they are.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connectors.files.format import Hashed, JsonWriter, from_json, read_json
from connectors.files.manifest import Part
from connectors.files.parts import Parts, Place, read_part
from connectors.local_files import explained
from connectors.portable import Kind, digits_of, fitting, travels_as
from schemas.errors import ConfigError
from schemas.records import Column, LoadCounts, Row, RowGroup

#: What is sorted in memory at once.
_RUN_ROWS = 20_000
_RUN_BYTES = 8 * 2**20
#: Sorted runs that are merged at once; more are merged into a longer one first.
_FAN_IN = 64
#: Rows between two looks at whether the load was cancelled.
_LOOK_EVERY = 1_000

KeyOf = Callable[[Row], Any]


def key_of(positions: Sequence[int]) -> KeyOf:
    """Return what reads the key of a row."""
    if len(positions) == 1:
        (only,) = positions
        return lambda row: row[only]
    return lambda row: tuple(row[i] for i in positions)


class Sorter:
    """An external sort: runs of bounded size go to disk, and come back merged."""

    def __init__(self, place: Place, columns: Sequence[Column]) -> None:
        self._place = place
        self._columns = columns
        self._key = key_of(place.key)
        self._rows: list[Row] = []
        self._bytes = 0
        self._runs: list[Path] = []
        self._numbers = itertools.count(1)

    def add(self, group: RowGroup) -> None:
        """Take rows in any order; ConfigError if one has no key."""
        for row in group.rows:
            if any(row[i] is None or row[i] != row[i] for i in self._place.key):
                raise _no_key(self._place, "rows have NULL or NaN in it")
        self._rows += group.rows
        self._bytes += group.size
        if len(self._rows) >= _RUN_ROWS or self._bytes >= _RUN_BYTES:
            self._spill()

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order; ConfigError if a key repeats."""
        self._rows.sort(key=self._key)
        found = self._rows if not self._runs else self._merged([*self._runs], self._rows)
        last: Any = None
        for number, row in enumerate(found):
            key = self._key(row)
            if number and key == last:
                raise _no_key(self._place, "values repeat")
            if number % _LOOK_EVERY == 0:
                self._place.check()
            last = key
            yield row

    def close(self) -> None:
        """Remove what was spilled."""
        for run in self._runs:
            run.unlink(missing_ok=True)

    def _merged(self, runs: Sequence[Path], rest: Sequence[Row] = ()) -> Iterator[Row]:
        spilled = [read_json(run, self._columns) for run in runs]
        return heapq.merge(*spilled, rest, key=self._key)

    def _spill(self) -> None:
        self._place.check()
        self._rows.sort(key=self._key)
        self._runs.append(self._written(self._rows))
        self._rows, self._bytes = [], 0
        if len(self._runs) >= _FAN_IN:
            short, self._runs = self._runs, []
            self._runs.append(self._written(self._merged(short)))
            for run in short:
                run.unlink()

    def _written(self, rows: Sequence[Row] | Iterator[Row]) -> Path:
        name = f".sort-f{self._place.fence:012}-{next(self._numbers):05}.jsonl.tmp"
        path = self._place.directory / name
        with explained(self._place.shown), path.open("xb") as file:
            path.chmod(0o600)
            out = JsonWriter(Hashed(file), self._columns)
            for number, row in enumerate(rows):
                if number % _LOOK_EVERY == 0:
                    self._place.check()
                out.write(RowGroup([row], 0))
        return path


def _no_key(place: Place, why: str) -> ConfigError:
    names = ", ".join(place.columns[i].name for i in place.key)
    return ConfigError(f"{place.stream}: key ({names}) is no key: {why}", code="duplicate_key")


@dataclass(slots=True)
class Merged:
    """The files after a merge, those that they replace, and what happened to the rows."""

    kept: list[Part] = field(default_factory=list)
    replaced: list[Part] = field(default_factory=list)
    inserted: int = 0
    updated: int = 0
    unchanged: int = 0
    deleted: int = 0

    def counts(self, size: int) -> LoadCounts:
        """Return the counts of a load."""
        return LoadCounts(self.inserted, self.updated, self.unchanged, self.deleted, bytes=size)


class Merge:
    """Merges sorted rows into the files of earlier runs, file by file."""

    def __init__(
        self,
        place: Place,
        old: Sequence[Part],
        *,
        numbers: Iterator[int],
        stamp: Row,
        columns: tuple[Column, ...],
        keep_missing: bool,
        rewrite: bool,
    ) -> None:
        self._place = place
        self._old = old
        self._numbers = numbers
        self._stamp = stamp  # our own columns, which are not compared
        self._columns = columns  # of the old files
        self._keep_missing = keep_missing
        self._rewrite = rewrite  # also what did not change: the old files have other columns
        self._key = key_of(place.key)
        self._image = _image_of(place.columns[: len(place.columns) - len(stamp)])
        self._next: Row | None = None
        self._rows: Iterator[Row] = iter(())
        self._done = Merged()

    def run(self, rows: Iterator[Row]) -> Merged:
        """Merge; the rows come in the order of their key, without our own columns."""
        self._rows = rows
        self._next = next(rows, None)
        key_columns = [self._place.columns[i] for i in self._place.key]
        for number, part in enumerate(self._old):
            last = from_json(part.last or (), key_columns)
            bound = last[0] if len(last) == 1 else last
            everything = number == len(self._old) - 1
            ours = self._next is not None and (everything or self._key(self._next) <= bound)
            if self._keep_missing and not ours and not self._rewrite:
                self._done.kept.append(part)
                continue
            self._into(part, self._up_to(None if everything else bound))
        if not self._old:
            self._into(None, self._up_to(None))
        return self._done

    def _up_to(self, bound: Any) -> Iterator[Row]:  # noqa: ANN401 - a key
        """Yield the rows that belong into the range of one file."""
        while self._next is not None and (bound is None or self._key(self._next) <= bound):
            row, self._next = self._next, next(self._rows, None)
            yield row

    def _into(self, part: Part | None, new: Iterator[Row]) -> None:
        """Write one file's rows again with the new ones; keep the file if nothing changed."""
        before = self._changes()
        old = iter(()) if part is None else self._fitted(part)
        with Parts(self._place, self._numbers) as out:
            for row in self._joined(old, new):
                out.add(row)
            if part is not None and before == self._changes() and not self._rewrite:
                out.discard()
                self._done.kept.append(part)
                return
            self._done.kept += out.finish()
        if part is not None:
            self._done.replaced.append(part)

    def _fitted(self, part: Part) -> Iterator[Row]:
        rows = read_part(self._place, part, self._columns)
        fit = fitting(self._columns, self._place.columns)
        return rows if fit is None else map(fit, rows)

    def _changes(self) -> int:
        return self._done.inserted + self._done.updated + self._done.deleted

    def _joined(self, old: Iterator[Row], new: Iterator[Row]) -> Iterator[Row]:
        """Walk both in order; equal rows keep their stamp."""
        done, key = self._done, self._key
        mine, theirs = next(new, None), next(old, None)
        while mine is not None or theirs is not None:
            if theirs is None or (mine is not None and key(mine) < key(theirs)):
                done.inserted += 1
                yield (*(mine or ()), *self._stamp)
                mine = next(new, None)
            elif mine is None or key(theirs) < key(mine):
                if self._keep_missing:
                    yield theirs
                else:
                    done.deleted += 1
                theirs = next(old, None)
            else:
                if self._image(mine) == self._image(theirs):
                    done.unchanged += 1
                    yield theirs
                else:
                    done.updated += 1
                    yield (*mine, *self._stamp)
                mine, theirs = next(new, None), next(old, None)


def _image_of(columns: Sequence[Column]) -> Callable[[Row], Row]:
    """Return what makes rows comparable: 1.0 is not 1.00, and NaN is itself."""
    odd = [
        i
        for i, column in enumerate(columns)
        if travels_as(column) is Kind.FLOAT
        or (travels_as(column) is Kind.DECIMAL and digits_of(column.type) is None)
    ]
    count = len(columns)

    def image(row: Row) -> Row:
        values = list(row[:count])
        for i in odd:
            value = values[i]
            if value is not None:
                values[i] = repr(value) if isinstance(value, float) else format(value, "f")
        return tuple(values)

    return image
