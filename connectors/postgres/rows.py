"""Rows of Postgres as Python values, for and from connectors that do not speak COPY binary.

Both directions are binary COPY underneath, so that memory holds one group of rows and a NULL is
never mistaken for an empty string.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import psycopg
from psycopg import sql

from connectors.portable import Kind, kind_of, travels_as
from connectors.postgres import column_types
from connectors.postgres.link import Connection, PostgresConfig, translated
from connectors.row_groups import Grouping, sizes
from schemas.errors import ConfigError
from schemas.records import Column, Row, RowGroup
from schemas.streams import StreamSpec

#: The type under which psycopg reads and writes each kind in binary. The image of every text type
#: is that of `text`, and a server that reads COPY does not ask what the client called it.
_TYPES = {
    Kind.BOOL: "bool",
    Kind.FLOAT: "float8",
    Kind.DECIMAL: "numeric",
    Kind.TEXT: "text",
    Kind.BYTES: "bytea",
    Kind.DATE: "date",
    Kind.TIME: "time",
    Kind.TIMESTAMP: "timestamp",
    Kind.TIMESTAMPTZ: "timestamptz",
    Kind.UUID: "uuid",
}
#: Kinds with more than one width.
_WIDTHS = {"smallint": "int2", "integer": "int4", "bigint": "int8", "real": "float4"}
_TIMES = {Kind.DATE, Kind.TIME, Kind.TIMESTAMP, Kind.TIMESTAMPTZ}


def portable_columns(columns: Sequence[Column]) -> tuple[Column, ...]:
    """Return the columns as they travel in rows: as text what is not portable."""
    return tuple(replace(c, as_text=c.as_text or kind_of(c.type) is None) for c in columns)


def _wire_type(column: Column) -> str:
    if column.as_text:
        return "text"
    return _WIDTHS.get(column.type) or _TYPES[travels_as(column)]


class Reader:
    """One COPY TO STDOUT, read as rows."""

    def __init__(
        self,
        conn: Connection,
        query: sql.Composed,
        config: PostgresConfig,
        stream: StreamSpec,
        columns: Sequence[Column],
    ) -> None:
        self._conn = conn
        self._cursor = conn.cursor()
        self._query = query
        self._config = config
        self._stream = stream
        self._columns = columns
        self._seen = 0
        self._total: int | None = None

    def rows(self) -> int:
        """Return the server's count once the copy has ended, until then the rows so far."""
        return self._seen if self._total is None else self._total

    def groups(self) -> Iterator[RowGroup]:
        """Yield the rows in bounded groups; ends only if the server said that it was complete."""
        grouping = Grouping(sizes(self._columns))
        with translated(self._config, "source"):
            try:
                with self._cursor.copy(self._query) as copy:
                    copy.set_types([_wire_type(column) for column in self._columns])
                    while (row := self._next(copy)) is not None:
                        self._seen += 1
                        group = grouping.add(row)
                        if group is not None:
                            yield group
            except (psycopg.errors.ProgramLimitExceeded, psycopg.errors.InternalError_) as error:
                if not column_types.is_too_large(error):
                    raise
                raise column_types.too_large(self._conn, self._config, self._stream) from error
            self._total = self._cursor.rowcount
            yield from grouping.rest()

    def _next(self, copy: "psycopg.Copy") -> Row | None:
        try:
            return copy.read_row()
        except psycopg.DataError as error:
            if error.sqlstate is not None:  # the server's own
                raise
            times = [c.name for c in self._columns if travels_as(c) in _TIMES]
            raise ConfigError(
                f"{self._stream.name}: row {self._seen + 1} of the read has a date or time that "
                "the destination cannot hold (infinity, 24:00, or a year outside of 1 to 9999) in "
                f"{' or '.join(times)}; read a view that maps it",
                code="data_refused",
            ) from error


def write(
    copy: "psycopg.Copy",
    groups: Iterator[RowGroup],
    columns: Sequence[Column],
    stream: StreamSpec,
) -> int:
    """Write rows into a COPY FROM STDIN (FORMAT binary); return about how many bytes.

    The driver refuses what it cannot write before the server sees it, in words that may quote it.
    """
    copy.set_types([_wire_type(column) for column in columns])
    size = 0
    for group in groups:
        for row in group.rows:
            try:
                copy.write_row(row)
            except psycopg.DataError as error:
                if error.sqlstate is not None:
                    raise
                raise ConfigError(
                    f"{stream.name}: a value is outside of what its column's type holds here; "
                    "correct it at the source, or read a view that leaves it out",
                    code="data_refused",
                ) from error
        size += group.size
    return size
