"""SQLite as a source: one file, one read transaction, rows that keep to their declared types."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from connectors.discovery import change_times, discovered
from connectors.local_files import existing_file
from connectors.row_groups import Grouping, sizes
from connectors.sqlite import (
    SCHEMA,
    SqliteConfig,
    Table,
    connect,
    describe,
    names,
    quoted,
    translated,
)
from connectors.sqlite_window import Window, is_dead, window, window_between
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, TransientError
from schemas.records import (
    Batch,
    Between,
    Cursor,
    DiscoveredStream,
    KeySweep,
    Ranges,
    Row,
    RowGroup,
    ServerReport,
    StreamShape,
    WireFormat,
)
from schemas.streams import Deletes, StreamSpec

CONFIG = SqliteConfig
SECRET_FIELDS = ()
__all__ = ["CONFIG", "SECRET_FIELDS", "check_link", "open_source"]


def check_link(config: SqliteConfig, policy: LinkPolicy) -> None:
    """Accept it: there is no link, and only a worker knows which files it has."""
    del config, policy


def open_source(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "SqliteSource":
    """Open the file for reading; errors are ours and name its path."""
    del secrets  # there are none
    checked = SqliteConfig.model_validate(dict(config))
    file = existing_file(policy, checked.path)
    return SqliteSource(checked, connect(file, checked.path))


class SqliteSource:
    """One read-only session. Meets schemas.records.Source."""

    wires = (WireFormat.ROWS,)

    def __init__(self, config: SqliteConfig, conn: sqlite3.Connection) -> None:
        self._config = config
        self._conn = conn
        self._cancelled = False

    def test(self) -> ServerReport:
        """Report the library, and what stands in the way of reading beside writers."""
        missing = []
        with translated(self._config.path):
            (journal,) = self._conn.execute("PRAGMA journal_mode").fetchone()
            tables = names(self._conn)
        if journal != "wal":
            missing.append(
                "writers wait while a run reads; on a file that is written to, run there: "
                "PRAGMA journal_mode = WAL"
            )
        if not tables:
            missing.append("no table")
        return ServerReport(
            server_version=f"SQLite {sqlite3.sqlite_version}",
            tls="not needed, a local file",
            login="the worker's own",
            missing=tuple(missing),
        )

    def discover(self) -> Sequence[DiscoveredStream]:
        """List the tables and views of the file."""
        with translated(self._config.path):
            return [self._discovered(name, type_) for name, type_ in names(self._conn)]

    def _discovered(self, name: str, type_: str) -> DiscoveredStream:
        table = describe(self._conn, name)
        if table is None:
            raise ConfigError(f"{self._config.path}: {name} was dropped just now; ask again")
        rows = 0
        if type_ == "table" and table.rowid:
            (rows,) = self._conn.execute(
                f"SELECT coalesce(max(t.{table.rowid}), 0) FROM {quoted(name)} t"  # noqa: S608 - quoted names
            ).fetchone()
        cursors = _cursors(table)
        return DiscoveredStream(
            name=f"{SCHEMA}.{name}",
            columns=discovered(table.columns),
            key=table.key,
            cursors=cursors,
            rows_estimated=max(rows, 0),
            suggestion=_suggestion(table, cursors),
        )

    @contextmanager
    def extract(
        self,
        stream: StreamSpec,
        cursor: Cursor | None,
        wire: WireFormat = WireFormat.ROWS,
        *,
        sweep: bool = False,
        ranges: Ranges | None = None,
        between: Between | None = None,
    ) -> Iterator[Iterator[Batch]]:
        """Open a read transaction and yield its one batch: no table here is large."""
        del wire, ranges  # there is one
        with translated(self._config.path):
            self._conn.execute("BEGIN")
            try:
                table = self._described(stream)
                if between is not None:
                    found = window_between(stream, table, between)
                else:
                    found = window(self._conn, stream, table, cursor)
                batch = self._batch(stream, table, found)
                wanted = stream.deletion is not Deletes.IGNORE and stream.key
                if (
                    wanted
                    and not batch.everything
                    and (sweep or (found.full and cursor is not None))
                ):
                    batch.keys = self._keys(stream, table)
                yield iter((batch,))
            finally:
                with suppress(sqlite3.Error):  # closed, or interrupted: there is nothing to undo
                    self._conn.execute("ROLLBACK")

    def _described(self, stream: StreamSpec) -> Table:
        if stream.columns is not None or stream.mask or stream.where is not None:
            raise ConfigError(
                f"{stream.name}: columns, mask and where are settings of streams from Postgres; "
                "read a view that leaves out what must not leave the file"
            )
        known = stream.schema_name == SCHEMA
        table = describe(self._conn, stream.table_name) if known else None
        if table is None:
            raise ConfigError(
                f"{self._config.path}: no table {stream.name}; names begin with main., and "
                "syncward resource discover lists what there is"
            )
        missing = [name for name in stream.key if table.column(name) is None]
        if missing:
            raise ConfigError(f"{stream.name}: no key column {', '.join(missing)}")
        return table

    def _batch(self, stream: StreamSpec, table: Table, found: Window) -> Batch:
        key = stream.key or table.key
        reader = _Reader(self, stream, table, found.where, found.parameters)
        return Batch(
            shape=StreamShape(columns=table.columns, key=key, key_is_unique=table.is_key(key)),
            wire=WireFormat.ROWS,
            chunks=iter(()),
            groups=reader.groups(),
            rows=lambda: reader.seen,
            lower=found.lower,
            upper=found.upper,
            full=found.full,
            notes=found.notes,
            beyond=found.beyond,
        )

    def _keys(self, stream: StreamSpec, table: Table) -> KeySweep:
        """Bring the keys of all rows that are not marked as deleted, in the same transaction."""
        where = f"NOT {is_dead(stream, table)}" if stream.tombstone else "1"
        keys = table.only(stream.key)
        reader = _Reader(self, stream, keys, where, ())
        return KeySweep(keys.columns, iter(()), reader.groups())

    def rows(self, query: str, parameters: Sequence[str | int]) -> Iterator[tuple[Any, ...]]:
        """Yield rows one by one; what was cancelled between two of them ends here, too."""
        with translated(self._config.path):
            for row in self._conn.execute(query, parameters):
                if self._cancelled:
                    raise TransientError(
                        f"{self._config.path}: the read was cancelled", code="cancelled_there"
                    )
                yield row

    def cancel(self) -> None:
        """End whatever SQLite is doing for this session; for another thread."""
        self._cancelled = True
        self._conn.interrupt()

    def cut(self) -> None:
        """Do the same: there is no link to cut."""
        self.cancel()

    def close(self) -> None:
        """Close the session."""
        self._conn.close()


class _Reader:
    """One SELECT, whose every value is checked against its column's declared type."""

    def __init__(
        self,
        source: SqliteSource,
        stream: StreamSpec,
        table: Table,
        where: str,
        parameters: tuple[str | int, ...],
    ) -> None:
        columns = [f"t.{quoted(column.name)}" for column in table.columns]
        place = f"t.{table.rowid}" if table.rowid else "NULL"
        self._query = (
            f"SELECT {', '.join([place, *columns])} FROM {quoted(table.name)} t "  # noqa: S608 - quoted names
            f"WHERE {where}"
        )
        self._parameters = parameters
        self._source = source
        self._stream = stream
        self._table = table
        self.seen = 0

    def groups(self) -> Iterator[RowGroup]:
        """Yield the rows in bounded groups."""
        converters, grouping = self._table.converters, Grouping(sizes(self._table.columns))
        for place, *values in self._source.rows(self._query, self._parameters):
            self.seen += 1
            try:
                row: Row = tuple(
                    None if value is None else convert(value)
                    for convert, value in zip(converters, values, strict=True)
                )
            except ValueError:  # a Misfit, or a day or an hour that does not exist
                raise self._misfit(place, values) from None
            group = grouping.add(row)
            if group is not None:
                yield group
        yield from grouping.rest()

    def _misfit(self, place: int | None, values: Sequence[object]) -> ConfigError:
        """Name table, column and row; never the value."""
        where = f"row {self.seen} of the read" if place is None else f"the row with rowid {place}"
        for column, convert, value in zip(
            self._table.columns, self._table.converters, values, strict=True
        ):
            try:
                if value is not None:
                    convert(value)
            except ValueError:
                return ConfigError(
                    f"{self._stream.name}: column {column.name} of {where} holds what is no "
                    f"{column.type}; correct it there, or read a view that does",
                    code="data_refused",
                )
        raise RuntimeError("the value that did not fit fits now")


def _cursors(table: Table) -> tuple[str, ...]:
    """Return the columns that say when a row changed, then the row's number."""
    return change_times(table.columns) + ((table.alias,) if table.alias else ())


def _suggestion(table: Table, cursors: tuple[str, ...]) -> str:
    if table.key and cursors and cursors[0] != table.alias:
        return f"{{mode: merge, key: [{', '.join(table.key)}], cursor: {cursors[0]}}}"
    return "{mode: replace}"
