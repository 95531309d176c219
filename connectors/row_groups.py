"""Groups of rows: bounded by rows and by bytes, so that memory does not depend on the table."""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

from connectors.portable import Kind, travels_as
from schemas.records import Column, Row, RowGroup

ROWS_MAX = 5_000
BYTES_MAX = 4 * 2**20

#: Bytes of a value that is not text or bytes, about.
_FIXED = 16
_VARIABLE = {Kind.TEXT, Kind.BYTES}

Size = Callable[[Row], int]
SizeOfAll = Callable[[Sequence[Row]], int]


def sizes(columns: Sequence[Column]) -> Size:
    """Return a function that says about how many bytes the values of a row have."""
    variable = [i for i, column in enumerate(columns) if travels_as(column) in _VARIABLE]
    fixed = _FIXED * (len(columns) - len(variable))

    def size(row: Row) -> int:
        total = fixed
        for i in variable:
            value = row[i]
            if value is not None:
                total += len(cast("str | bytes", value))
        return total

    return size


def sizes_of_all(columns: Sequence[Column]) -> SizeOfAll:
    """Return a function that says the same of many rows together, column by column."""
    variable = [i for i, column in enumerate(columns) if travels_as(column) in _VARIABLE]
    fixed = _FIXED * (len(columns) - len(variable))

    def size(rows: Sequence[Row]) -> int:
        total = fixed * len(rows)
        for i in variable:
            values = [cast("str | bytes | None", row[i]) for row in rows]
            total += sum(map(len, filter(None, values)))
        return total

    return size


class Grouping:
    """Collects rows and says when a group of them is full."""

    def __init__(self, size: Size) -> None:
        self._size = size
        self._rows: list[Row] = []
        self._bytes = 0

    def add(self, row: Row) -> RowGroup | None:
        """Take a row; return the group that it completes."""
        self._rows.append(row)
        self._bytes += self._size(row)
        if len(self._rows) < ROWS_MAX and self._bytes < BYTES_MAX:
            return None
        return self._flush()

    def add_all(self, rows: Sequence[Row], size: int) -> Iterator[RowGroup]:
        """Take rows that have so many bytes together; yield the groups that they complete."""
        if len(self._rows) + len(rows) < ROWS_MAX and self._bytes + size < BYTES_MAX:
            self._rows += rows
            self._bytes += size
            return
        for row in rows:
            group = self.add(row)
            if group is not None:
                yield group

    def rest(self) -> Iterator[RowGroup]:
        """Yield what is left, if anything."""
        if self._rows:
            yield self._flush()

    def _flush(self) -> RowGroup:
        group = RowGroup(self._rows, self._bytes)
        self._rows, self._bytes = [], 0
        return group
