"""MariaDB as a source: one consistent snapshot per stream, rows as the server sends them."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from connectors.discovery import described
from connectors.mariadb.selection import selected
from connectors.mariadb.tables import (
    AIMED_BY,
    SECRET_FIELDS,
    MariadbConfig,
    Table,
    describe,
    names,
)
from connectors.mariadb.window import is_dead, look, window, window_between
from connectors.row_reads import Reading, Window, batch_of, check_key, keys_of, wants_keys
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

if TYPE_CHECKING:
    from connectors.mariadb.link import Session

CONFIG = MariadbConfig
_NO_SNAPSHOT = "inexact: the table's engine knows no snapshots; InnoDB does"
__all__ = ["AIMED_BY", "CONFIG", "SECRET_FIELDS", "check_link", "open_source"]


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
    from connectors.mariadb.link import open_session  # noqa: PLC0415 - needs the driver

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
                found.append(
                    described(
                        f"{table.schema}.{table.name}",
                        table.columns,
                        table.key,
                        number=table.automatic,
                        rows=table.rows,
                    )
                )
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
            if wants_keys(stream, batch, cursor, sweep=sweep):
                batch.keys = self._keys(stream, table)
            yield iter((batch,))
        finally:
            self._session.undo()

    def _described(self, stream: StreamSpec) -> Table:
        database = self._config.database
        known = stream.schema_name == database
        table = describe(self._session, database, stream.table_name) if known else None
        if table is None:
            raise ConfigError(
                f"{self._config.where}: no table {stream.name} that {self._config.user} may read; "
                f"names begin with {database}., and syncward resource discover lists what there is"
            )
        check_key(stream, table.columns)
        table = selected(stream, table)
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
        reading = self._reading(stream, table, found.where, found.values)
        notes = () if table.snapshot else (_NO_SNAPSHOT,)
        return batch_of(found, reading, key=key, proven=table.is_key(key), notes=notes)

    def _keys(self, stream: StreamSpec, table: Table) -> KeySweep:
        """Bring the keys of all rows that are not marked as deleted, in the same transaction."""
        where = f"NOT {is_dead(stream, table)}" if stream.tombstone else "1"
        return keys_of(self._reading(stream, table.only(stream.key), where, ()))

    def _reading(
        self, stream: StreamSpec, table: Table, where: str, values: tuple[str | int, ...]
    ) -> Reading:
        columns = ", ".join(field.select for field in table.fields)
        query = (
            f"/* syncward */ SELECT {columns} FROM {table.sql} t "  # noqa: S608 - quoted names
            f"WHERE ({where}) AND {table.rows_where}"
        )
        values = (*values, *table.rows_values)
        converters = [f.convert for f in table.fields if f.convert is not None]
        return Reading(
            stream,
            table.columns,
            converters,
            lambda: self._rows(stream, query, values),
            declared=[f.declared.column_type for f in table.fields],
        )

    def _rows(
        self, stream: StreamSpec, query: str, values: Sequence[str | int]
    ) -> Iterator[tuple[Any, ...]]:
        """Yield rows one by one; what was cancelled between two of them ends here, too."""
        rows, number = self._session.stream(query, *values), 0
        try:
            for row in rows:
                if self._cancelled:
                    break
                number += 1
                yield row
        except UnicodeDecodeError:
            raise ConfigError(
                f"{stream.name}: row {number + 1} of the read holds a text that is not in its "
                "column's character set; correct it there",
                code="data_refused",
            ) from None
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
