"""MariaDB as a source: one consistent snapshot per stream, rows as the server sends them."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from connectors.discovery import change_times, discovered
from connectors.mariadb import (
    SECRET_FIELDS,
    MariadbConfig,
    Table,
    describe,
    names,
)
from connectors.mariadb_window import Window, is_dead, look, window, window_between
from connectors.row_groups import Grouping, sizes
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, TransientError
from schemas.records import (
    Batch,
    Between,
    Cursor,
    DiscoveredStream,
    KeySweep,
    Ranges,
    RowGroup,
    ServerReport,
    StreamShape,
    WireFormat,
)
from schemas.streams import Deletes, StreamSpec

if TYPE_CHECKING:
    from connectors.mariadb_link import Session

CONFIG = MariadbConfig
__all__ = ["CONFIG", "SECRET_FIELDS", "check_link", "open_source"]


def check_link(config: MariadbConfig, policy: LinkPolicy) -> None:
    """Accept it: every link proves who answers, whatever the policy."""
    del config, policy


def open_source(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "MariadbSource":
    """Connect to the server; errors are ours and name its address."""
    checked = MariadbConfig.model_validate(dict(config))
    if importlib.util.find_spec("pymysql") is None:
        raise ConfigError(
            f"{checked.where}: this worker has no PyMySQL; install syncward[mariadb] there"
        )
    from connectors.mariadb_link import open_session  # noqa: PLC0415 - needs the driver

    return MariadbSource(checked, open_session(checked, secrets, policy))


class MariadbSource:
    """One read-only session. Meets schemas.records.Source."""

    wires = (WireFormat.ROWS,)

    def __init__(self, config: MariadbConfig, session: "Session") -> None:
        self._config = config
        self._session = session
        self._cancelled = False

    def test(self) -> ServerReport:
        """Report the server, and what is missing as statements to type."""
        missing = []
        if not names(self._session, self._config.database):
            missing.append(f"GRANT SELECT ON `{self._config.database}`.* TO {self._config.user}")
        sees = self._session.all(
            "SELECT COUNT(*) FROM information_schema.user_privileges "
            "WHERE privilege_type IN ('PROCESS', 'SUPER')"
        )
        if sees[0][0] == "0":
            missing.append(
                f"GRANT PROCESS ON *.* TO {self._config.user}: without it open transactions are "
                "hidden, time cursors are inexact and append by a number is refused"
            )
        return ServerReport(
            server_version=self._session.version,
            tls=self._session.tls,
            login=self._config.user,
            missing=tuple(missing),
        )

    def discover(self) -> Sequence[DiscoveredStream]:
        """List the tables and views of the database."""
        found = []
        for name in names(self._session, self._config.database):
            table = describe(self._session, self._config.database, name)
            if table is not None:  # else it was dropped just now
                found.append(_discovered(table))
        return found

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
        """Open a snapshot and yield its one batch: a read begins anew where it was left."""
        del wire, ranges  # there is one
        self._session.ready()
        table = self._described(stream)
        asked = None if between is None else window_between(stream, table, between)
        seen = look(self._session, stream, table) if asked is None else None
        try:
            self._session.act("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
            found = asked
            if seen is not None:
                found = window(self._session, stream, table, cursor, seen)
            if found is None:
                raise RuntimeError("a read has a window")
            batch = self._batch(stream, table, found)
            wanted = stream.deletion is not Deletes.IGNORE and stream.key
            if wanted and not batch.everything and (sweep or (found.full and cursor is not None)):
                batch.keys = self._keys(stream, table)
            yield iter((batch,))
        finally:
            self._session.undo()

    def _described(self, stream: StreamSpec) -> Table:
        if stream.columns is not None or stream.mask or stream.where is not None:
            raise ConfigError(
                f"{stream.name}: columns, mask and where are settings of streams from Postgres; "
                "read a view that leaves out what must not leave the server"
            )
        database = self._config.database
        known = stream.schema_name == database
        table = describe(self._session, database, stream.table_name) if known else None
        if table is None:
            raise ConfigError(
                f"{self._config.where}: no table {stream.name} that {self._config.user} may read; "
                f"names begin with {database}., and syncward resource discover lists what there is"
            )
        missing = [name for name in stream.key if table.field(name) is None]
        if missing:
            raise ConfigError(f"{stream.name}: no key column {', '.join(missing)}")
        strange = [f for f in table.fields if f.convert is None]
        if strange:
            what = ", ".join(f"{f.column.name} ({f.declared.column_type})" for f in strange)
            raise ConfigError(
                f"{stream.name}: {what} has no counterpart here; read a view that leaves it out or "
                "casts it, e.g. with ST_AsText",
                code="data_refused",
            )
        return table

    def _batch(self, stream: StreamSpec, table: Table, found: Window) -> Batch:
        key = stream.key or table.key
        rows = _Reader(self, stream, table, found.where, found.values)
        notes = found.notes
        if not table.snapshot:
            notes = (*notes, "inexact: the table's engine knows no snapshots; InnoDB does")
        return Batch(
            shape=StreamShape(columns=table.columns, key=key, key_is_unique=table.is_key(key)),
            wire=WireFormat.ROWS,
            chunks=iter(()),
            groups=rows.groups(),
            rows=lambda: rows.seen,
            lower=found.lower,
            upper=found.upper,
            full=found.full,
            notes=notes,
            beyond=found.beyond,
        )

    def _keys(self, stream: StreamSpec, table: Table) -> KeySweep:
        """Bring the keys of all rows that are not marked as deleted, in the same transaction."""
        where = f"NOT {is_dead(stream, table)}" if stream.tombstone else "1"
        keys = table.only(stream.key)
        return KeySweep(keys.columns, iter(()), _Reader(self, stream, keys, where, ()).groups())

    def rows(self, query: str, values: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield rows one by one; what was cancelled between two of them ends here, too."""
        for row in self._session.stream(query, *values):
            if self._cancelled:
                break
            yield row
        if self._cancelled:
            raise TransientError(
                f"{self._config.where}: the read was cancelled", code="cancelled_there"
            )

    def cancel(self) -> None:
        """End whatever the server is doing for this session; for another thread."""
        self._cancelled = True
        self._session.cancel()

    def cut(self) -> None:
        """End the link under whatever waits on it; for another thread."""
        self._cancelled = True
        self._session.cut()

    def close(self) -> None:
        """Close the session; the server rolls back what was open."""
        self._session.close()


class _Reader:
    """One SELECT, whose every value is made from the server's own text."""

    def __init__(
        self,
        source: MariadbSource,
        stream: StreamSpec,
        table: Table,
        where: str,
        values: tuple[str, ...],
    ) -> None:
        columns = ", ".join(field.select for field in table.fields)
        self._query = f"/* syncward */ SELECT {columns} FROM {table.sql} t WHERE {where}"  # noqa: S608 - quoted names
        self._values = values
        self._source = source
        self._stream = stream
        self._table = table
        self.seen = 0

    def groups(self) -> Iterator[RowGroup]:
        """Yield the rows in bounded groups."""
        converters = tuple(f.convert for f in self._table.fields if f.convert is not None)
        grouping = Grouping(sizes(self._table.columns))
        try:
            for values in self._source.rows(self._query, self._values):
                self.seen += 1
                try:
                    row = tuple(
                        None if value is None else convert(value)
                        for convert, value in zip(converters, values, strict=True)
                    )
                except ValueError:  # a Misfit, or a day that does not exist
                    raise self._misfit(values) from None
                group = grouping.add(row)
                if group is not None:
                    yield group
        except UnicodeDecodeError:
            raise ConfigError(
                f"{self._stream.name}: row {self.seen + 1} of the read holds a text that is not "
                "in its column's character set; correct it there",
                code="data_refused",
            ) from None
        yield from grouping.rest()

    def _misfit(self, values: Sequence[Any]) -> ConfigError:
        """Name table and column, and the row by its place; never the value."""
        for field, value in zip(self._table.fields, values, strict=True):
            try:
                if value is not None and field.convert is not None:
                    field.convert(value)
            except ValueError:
                return ConfigError(
                    f"{self._stream.name}: column {field.column.name} "
                    f"({field.declared.column_type}) of row {self.seen} of the read holds what is "
                    f"no {field.column.type}; correct it there, or read a view that casts it",
                    code="data_refused",
                )
        raise RuntimeError("the value that did not fit fits now")


def _discovered(table: Table) -> DiscoveredStream:
    cursors = _cursors(table)
    suggestion = "{mode: replace}"
    if table.key and cursors and cursors[0] != table.automatic:
        suggestion = f"{{mode: merge, key: [{', '.join(table.key)}], cursor: {cursors[0]}}}"
    return DiscoveredStream(
        name=f"{table.schema}.{table.name}",
        columns=discovered(table.columns),
        key=table.key,
        cursors=cursors,
        rows_estimated=table.rows,
        suggestion=suggestion,
    )


def _cursors(table: Table) -> tuple[str, ...]:
    """Return the columns that say when a row changed, then the row's number."""
    return change_times(table.columns) + ((table.automatic,) if table.automatic else ())
