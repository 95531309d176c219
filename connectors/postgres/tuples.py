"""COPY a batch row by row, for a load that leaves out the rows that a table's types refuse.

The rows come in blocks, each under a savepoint of its own; of a block that is refused the server
names the row. Memory holds one block, or one row if that is longer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from struct import Struct

import psycopg
from psycopg import sql

from connectors.masking import header_end
from connectors.postgres import refusals as pg_refusals
from connectors.postgres import rows as pg_rows
from connectors.postgres.link import Connection
from schemas.errors import ConfigError, SyncwardError
from schemas.records import Column, Row, RowGroup
from schemas.streams import StreamSpec

#: Rows and bytes of a block: what is sent once more for each row that is refused.
_ROWS, _BYTES = 1_000, 256 * 1024
_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_END = b"\xff\xff"
_COUNT, _LENGTH = Struct(">h"), Struct(">i")


@dataclass(frozen=True, slots=True)
class Tuples:
    """Rows of COPY binary, each as the bytes it is."""

    rows: Sequence[bytes]
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> "Tuples":
        return Tuples(self.rows[first:last], 0)

    def columns(self, places: Sequence[int]) -> "Tuples":
        chosen = []
        for row in self.rows:
            fields = _fields(row)
            chosen.append(_COUNT.pack(len(places)) + b"".join(fields[place] for place in places))
        return Tuples(chosen, 0)

    def write(self, copy: "psycopg.Copy", columns: Sequence[Column], stream: StreamSpec) -> None:
        del columns, stream
        copy.write(b"".join((_HEADER, *self.rows, _END)))

    def texts(self) -> list[str | None]:
        null = _LENGTH.pack(-1)
        return [
            None if field == null else field[4:].decode("utf-8", "backslashreplace")
            for field in _fields(self.rows[0])
        ]


@dataclass(frozen=True, slots=True)
class Values:
    """Rows of Python values."""

    rows: Sequence[Row]
    size: int

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, first: int, last: int) -> "Values":
        return Values(self.rows[first:last], 0)

    def columns(self, places: Sequence[int]) -> "Values":
        return Values([tuple(row[place] for place in places) for row in self.rows], 0)

    def write(self, copy: "psycopg.Copy", columns: Sequence[Column], stream: StreamSpec) -> None:
        pg_rows.write(copy, iter((RowGroup(list(self.rows), 0),)), columns, stream)

    def texts(self) -> list[str | None]:
        return [None if value is None else str(value) for value in self.rows[0]]


#: Some rows in the form in which they came. `write` writes all of them into a COPY; `texts` is what
#: the fields of the first look like, whatever they are.
Rows = Tuples | Values


def shown(rows: Rows, columns: Sequence[Column], encoding: str) -> dict[str, str | None]:
    """Return the first row as text by column, for people, in what a server can hold."""

    def held(text: str) -> str:
        whole = encoding == "UTF8"
        written = text if whole else text.encode("ascii", "backslashreplace").decode()
        return written.replace("\0", "\\0")

    return {
        column.name: None if text is None else held(text)
        for column, text in zip(columns, rows.texts(), strict=True)
    }


def digest(rows: Rows) -> bytes:
    """Return by what the first row is known again."""
    return sha256(repr(rows.texts()).encode("utf-8", "backslashreplace")).digest()


def blocks(chunks: Iterator[bytes], groups: Iterator[RowGroup]) -> Iterator[Rows]:
    """Yield the rows of a batch in blocks, in whichever form they come."""
    for group in groups:
        for first in range(0, len(group.rows), _ROWS):
            size = group.size if first == 0 else 0
            yield Values(group.rows[first : first + _ROWS], size)
    yield from _tuples(chunks)


@dataclass(frozen=True, slots=True)
class Table:
    """A table that takes rows, and the columns that they have."""

    conn: Connection
    name: sql.Composable
    columns: Sequence[Column]
    stream: StreamSpec

    def copy(
        self, rows: Iterator[Rows], refused: Callable[[Rows, psycopg.Error], None]
    ) -> tuple[int, int]:
        """Copy rows but for those that are refused; return (rows, bytes).

        `refused` gets each of these by itself, with what the server or the driver said.
        """
        loaded = size = 0
        for block in rows:
            size += block.size
            left = [(0, len(block))]
            while left:
                first, last = left.pop()
                if first == last:
                    continue
                error = self._try(block.part(first, last))
                if error is None:
                    loaded += last - first
                    continue
                line = pg_refusals.refused_line(error)
                if last - first == 1:
                    refused(block.part(first, last), error)
                elif line is not None and first + line < last:
                    bad = first + line
                    refused(block.part(bad, bad + 1), error)
                    left += [(bad + 1, last), (first, bad)]
                else:
                    middle = (first + last) // 2
                    left += [(middle, last), (first, middle)]
        return loaded, size

    def _try(self, rows: Rows) -> psycopg.Error | None:
        """Copy rows under a savepoint; return the error if one of them is to blame."""
        statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
            self.name, sql.SQL(", ").join(sql.Identifier(c.name) for c in self.columns)
        )
        try:
            with self.conn.transaction(), self.conn.cursor().copy(statement) as into:
                rows.write(into, self.columns, self.stream)
        except (psycopg.Error, ConfigError) as error:
            cause = error if isinstance(error, psycopg.Error) else error.__cause__
            if isinstance(cause, psycopg.Error) and pg_refusals.is_of_a_row(cause):
                return cause
            raise
        return None


def _tuples(chunks: Iterator[bytes]) -> Iterator[Tuples]:
    """Cut COPY binary into blocks of rows. Ends with an error if it does not end whole."""
    held, begun, ended, came = bytearray(), False, False, False
    rows: list[bytes] = []
    size = wanted = 0
    for chunk in chunks:
        came = came or bool(chunk)
        held += chunk
        if len(held) < wanted:  # a long row is not looked at before it is here
            continue
        if not begun:
            start = header_end(held)
            if not start:
                continue
            del held[:start]
            begun = True
        block, at = bytes(held), 0
        while not ended and (end := _row_end(block, at)) <= len(block):
            if end == at + 2 and _COUNT.unpack_from(block, at)[0] < 0:
                ended, at = True, end
                break
            rows.append(block[at:end])
            size += end - at
            at = end
            if len(rows) >= _ROWS or size >= _BYTES:
                yield Tuples(rows, size)
                rows, size = [], 0
        wanted = 0 if ended else end - at
        del held[:at]
    if rows:
        yield Tuples(rows, size)
    if came and (not ended or held):
        raise SyncwardError("the source's rows are not whole; nothing was kept")


def _row_end(block: bytes, start: int) -> int:
    """Return where the row that begins here ends; if that is not here yet, a place before it."""
    size, length_at = len(block), _LENGTH.unpack_from
    at = start + 2
    if at > size:
        return at
    for _ in range(_COUNT.unpack_from(block, start)[0]):  # a negative count is the end of all
        if at + 4 > size:
            return at + 4
        (length,) = length_at(block, at)
        at += 4 + max(0, length)
    return at


def _fields(row: bytes) -> list[bytes]:
    """Return the fields of a row, each with its length before it."""
    fields, at = [], 2
    for _ in range(_COUNT.unpack_from(row, 0)[0]):
        (length,) = _LENGTH.unpack_from(row, at)
        end = at + 4 + max(0, length)
        fields.append(row[at:end])
        at = end
    return fields
