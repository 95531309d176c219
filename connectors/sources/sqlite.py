"""SQLite as a source: one file, one read transaction, rows that keep to their declared types."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from connectors.discovery import described
from connectors.local_files import existing_file
from connectors.row_reads import Reading, Window, batch_of, check_key, keys_of, refuse, wants_keys
from connectors.sqlite.file import (
    SCHEMA,
    SqliteConfig,
    Table,
    connect,
    describe,
    names,
    quoted,
    translated,
)
from connectors.sqlite.window import is_dead, window, window_between
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, TransientError
from schemas.records import (
    Batch,
    Between,
    Cursor,
    DiscoveredStream,
    KeySweep,
    Ranges,
    ServerReport,
    WireFormat,
)
from schemas.streams import StreamSpec

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
        return described(
            f"{SCHEMA}.{name}", table.columns, table.key, number=table.alias, rows=max(rows, 0)
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
                if wants_keys(stream, batch, cursor, sweep=sweep):
                    batch.keys = self._keys(stream, table)
                yield iter((batch,))
            finally:
                with suppress(sqlite3.Error):  # closed, or interrupted: there is nothing to undo
                    self._conn.execute("ROLLBACK")

    def _described(self, stream: StreamSpec) -> Table:
        refuse(
            stream,
            "columns",
            "mask",
            "where",
            instead="read a view that leaves out what must not leave the file",
        )
        known = stream.schema_name == SCHEMA
        table = describe(self._conn, stream.table_name) if known else None
        if table is None:
            raise ConfigError(
                f"{self._config.path}: no table {stream.name}; names begin with main., and "
                "syncward resource discover lists what there is"
            )
        check_key(stream, table.columns)
        return table

    def _batch(self, stream: StreamSpec, table: Table, found: Window) -> Batch:
        key = stream.key or table.key
        reading = self._reading(stream, table, found.where, found.values)
        return batch_of(found, reading, key=key, proven=table.is_key(key))

    def _keys(self, stream: StreamSpec, table: Table) -> KeySweep:
        """Bring the keys of all rows that are not marked as deleted, in the same transaction."""
        where = f"NOT {is_dead(stream, table)}" if stream.tombstone else "1"
        return keys_of(self._reading(stream, table.only(stream.key), where, ()))

    def _reading(
        self, stream: StreamSpec, table: Table, where: str, values: tuple[str | int, ...]
    ) -> Reading:
        query = _select(table, where)
        return Reading(
            stream,
            table.columns,
            table.converters,
            lambda: self._rows(query, values),
            place=_place,
            first=1,
        )

    def _rows(self, query: str, values: Sequence[str | int]) -> Iterator[tuple[Any, ...]]:
        """Yield rows one by one; what was cancelled between two of them ends here, too."""
        with translated(self._config.path):
            for row in self._conn.execute(query, values):
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


def _select(table: Table, where: str) -> str:
    """Select a row's place, then its columns."""
    columns = [f"t.{quoted(column.name)}" for column in table.columns]
    place = f"t.{table.rowid}" if table.rowid else "NULL"
    return f"SELECT {', '.join([place, *columns])} FROM {quoted(table.name)} t WHERE {where}"  # noqa: S608 - quoted names


def _place(values: tuple[Any, ...], number: int) -> str:
    place = values[0]
    return f"row {number} of the read" if place is None else f"the row with rowid {place}"
