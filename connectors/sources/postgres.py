"""Postgres as a source: one snapshot, one window, rows relayed as COPY binary."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import psycopg
from psycopg import sql

from connectors.portable import schema_hash
from connectors.postgres import between as pg_between
from connectors.postgres import column_types, selection
from connectors.postgres import discover as pg_discover
from connectors.postgres import keys as pg_keys
from connectors.postgres import ranges as pg_ranges
from connectors.postgres import rows as pg_rows
from connectors.postgres import window as pg_window
from connectors.postgres.catalog import Relation, begin_at, check_key, describe
from connectors.postgres.link import (
    AIMED_BY,
    SECRET_FIELDS,
    Connection,
    Line,
    PostgresConfig,
    begin_session,
    check_link,
    connect,
    translated,
    where_it_is,
)
from connectors.postgres.relay import Relay
from connectors.postgres.sessions import Sessions
from connectors.postgres.window import Window
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, TransientError
from schemas.records import (
    Batch,
    Between,
    Column,
    Cursor,
    DiscoveredStream,
    KeySweep,
    Part,
    Ranges,
    ServerReport,
    StreamShape,
    WireFormat,
)
from schemas.streams import Deletes, StreamSpec

CONFIG = PostgresConfig
__all__ = ["AIMED_BY", "CONFIG", "SECRET_FIELDS", "check_link", "open_source"]

#: The zone that this login has at the server; then the session goes on in UTC.
_IN_UTC = sql.SQL("current_setting('TimeZone'), set_config('TimeZone', 'UTC', false)")
#: The session waits in its transaction while the destination writes what it has sent, or while
#: others read ranges by its snapshot: longer than that takes.
_SESSION = {
    "default_transaction_read_only": "on",
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "3600s",
}


def open_source(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "PostgresSource":
    """Connect for reading; errors are ours and name the server."""
    checked = PostgresConfig.model_validate(dict(config))
    opened = partial(connect, checked, secrets, role="source", session=_SESSION, policy=policy)
    conn = opened()
    if policy.superuser_refused and _is_superuser(conn):
        conn.close()
        raise ConfigError(
            f"{checked.where}: login {checked.user} is a superuser, and a read-only session does "
            "not hold one; give a login that can only read (docs/postgres.md)",
            code="superuser_source",
        )
    with translated(checked, "source"):
        (zone, _) = begin_session(conn, _IN_UTC)
        once_more = partial(opened, lookup=where_it_is(conn, checked))
        return PostgresSource(checked, conn, zone=str(zone), once_more=once_more)


def _is_superuser(conn: Connection) -> bool:
    """Say what the server reported at the login: no question is needed."""
    return conn.info.parameter_status("is_superuser") == "on"


class PostgresSource:
    """One read-only session, and more beside it for ranges. Meets schemas.records.Source."""

    wires = (WireFormat.PG_BINARY, WireFormat.ROWS)

    def __init__(
        self,
        config: PostgresConfig,
        conn: Connection,
        *,
        zone: str,
        once_more: Callable[[], Connection],
    ) -> None:
        self._config = config
        self._conn = conn
        self._line = Line(conn)
        self._zone = zone
        self._once_more = once_more
        self._snapshot_id = ""
        self._beside = Sessions(self._joined)

    def test(self) -> ServerReport:
        """Report the server and what this login lacks for exact reading."""
        with translated(self._config, "source"):
            return pg_discover.report_source(self._conn, self._config)

    def discover(self) -> Sequence[DiscoveredStream]:
        """List the tables and views this login can read."""
        with translated(self._config, "source"):
            return pg_discover.streams(self._conn)

    @contextmanager
    def extract(
        self,
        stream: StreamSpec,
        cursor: Cursor | None,
        wire: WireFormat = WireFormat.PG_BINARY,
        *,
        sweep: bool = False,
        ranges: Ranges | None = None,
        between: Between | None = None,
    ) -> Iterator[Iterator[Batch]]:
        """Open a snapshot and yield its batches: the window from the cursor to a frozen bound.

        It is one batch, unless everything or much is read of a large table: then one for each range
        of keys that the destination does not have yet, and an empty one that ends them.
        """
        with translated(self._config, "source"):
            relation = describe(self._conn, self._config, stream.schema_name, stream.table_name)
            check_key(self._conn, stream, relation)
            relation = selection.selected(self._conn, stream, relation)
            category = None
            if stream.cursor not in {None, "xmin"}:
                category = pg_window.check_cursor_column(stream, relation)
            bound = asked = None
            if between is not None:
                asked = pg_between.window(self._conn, stream, relation, between)
            elif category == "D":
                beyond = pg_keys.far_cursor(stream, relation, self._zone, full=cursor is None)
                bound = pg_window.time_bound(self._conn, stream, beyond)
            with self._snapshot(stream, relation):
                if asked is not None:
                    window = asked
                elif bound is not None:
                    window = pg_window.time_window(stream, relation, bound, cursor, self._zone)
                else:
                    window = self._window(stream, relation, cursor)
                cut = None
                large = window.full or between is not None
                if ranges is not None and large and wire is WireFormat.PG_BINARY:
                    window, cut = self._cut(stream, relation, window, ranges)
                batch = self._batch(stream, relation, window)
                batch.beyond = bound.beyond if bound is not None else None
                if sweep or (window.full and cursor is not None):
                    batch.keys = self._keys(stream, relation, batch)
                if cut is not None:
                    at_once = min(ranges.at_once if ranges else 1, len(cut.left))
                    yield self._in_ranges(stream, relation, window, batch, cut, at_once=at_once)
                    return
                if wire is WireFormat.ROWS:
                    batch = self._in_rows(stream, relation, window, batch)
                yield iter((batch,))

    @contextmanager
    def _snapshot(self, stream: StreamSpec, relation: Relation) -> Iterator[None]:
        """Hold one snapshot; on failure the session is closed, as a COPY may be half way."""
        try:
            begin_at(self._conn, stream, relation)
            yield
        except BaseException:
            with suppress(psycopg.Error):  # a lost session must not hide why it was lost
                if self._conn.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:
                    self.close()
                else:
                    self._conn.execute("ROLLBACK")
            raise
        finally:  # those beside see this snapshot as long as they live
            self._beside.close()
        with suppress(psycopg.OperationalError):  # all is read; a lost session is for the next one
            self._conn.execute("COMMIT")

    def _window(self, stream: StreamSpec, relation: Relation, cursor: Cursor | None) -> Window:
        if stream.cursor is None:
            return pg_window.full_window()
        if stream.cursor == "xmin":
            return pg_window.xmin_window(self._conn, self._config, stream, relation, cursor)
        return pg_window.ordered_window(self._conn, stream, relation, cursor)

    def _cut(
        self, stream: StreamSpec, relation: Relation, window: Window, ranges: Ranges
    ) -> tuple[Window, pg_ranges.Cut | None]:
        """Return where a large read is cut, with its window: that of the read that goes on, if any.

        None if it is read in one piece.
        """
        digest = _digest(stream, relation)
        kept = pg_ranges.resumed(stream, relation, digest, ranges)
        if not window.full:
            of_window = replace(ranges, kept=kept)
            return window, pg_between.cut(self._conn, stream, relation, window, of_window)
        if kept is not None:
            frozen = pg_window.resumed_window(
                self._conn, self._config, stream, relation, kept.upper
            )
            if frozen is not None:
                key = pg_ranges.key_of(stream, relation)
                return frozen, pg_ranges.Cut(key, kept.bounds, kept)
        return window, pg_ranges.cut(self._conn, stream, relation, ranges)

    def _in_ranges(
        self,
        stream: StreamSpec,
        relation: Relation,
        window: Window,
        batch: Batch,
        cut: pg_ranges.Cut,
        *,
        at_once: int,
    ) -> Iterator[Batch]:
        """Make of one batch the ranges that are left, and an end without rows of its own."""
        part = Part(
            cut.bounds, 0, cut.kept, beside=at_once > 1, lasting=cut.lasting,
            digest=_digest(stream, relation), stop=self._beside.stop,
        )  # fmt: skip
        told = (*cut.notes, *batch.notes)
        if part.beside:
            told = (f"{at_once} ranges are read at the same time", *told)
            self._lend_snapshot()
        for n in cut.left:
            query = _query(stream, relation, replace(window, where=cut.within(window.where, n)))
            copy = (
                _CopyBeside(self._beside, query, self._config, stream)
                if part.beside
                else _Copy(self._conn, query, self._config, stream)
            )
            yield replace(
                batch,
                chunks=copy.chunks(),
                rows=copy.rows,
                notes=told,
                keys=None,
                part=replace(part, n=n),
            )
            told = ()
            if part.beside:  # it waits for the others, and is not to look forgotten
                self._conn.execute("SELECT")
        end = replace(part, n=len(cut.bounds) + 1, beside=False)
        yield replace(batch, chunks=iter(()), rows=lambda: 0, notes=told, part=end)

    def _lend_snapshot(self) -> None:
        """Let the sessions beside this one see what it sees."""
        row = self._conn.execute("SELECT pg_export_snapshot()").fetchone()
        self._snapshot_id = str(row[0]) if row else ""

    def _joined(self) -> Connection:
        """Open a session that sees what the first one sees; for the thread that uses it."""
        with translated(self._config, "source"):
            conn = self._once_more()
            try:
                begin_session(conn, _IN_UTC)
                conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                self._see_the_same(conn)
            except BaseException:
                conn.close()
                raise
            return conn

    def _see_the_same(self, conn: Connection) -> None:
        snapshot = sql.Literal(self._snapshot_id)
        try:
            conn.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot))
        except (psycopg.errors.InvalidParameterValue, psycopg.errors.UndefinedObject) as error:
            raise TransientError(
                f"{self._config.where}: the snapshot of the first session is not there for the "
                "others: something ended that session, or a pooler leads to several servers; if it "
                "stays so, set the stream's ranges_at_once to 1",
                code="cancelled_there",
            ) from error

    def _batch(self, stream: StreamSpec, relation: Relation, window: Window) -> Batch:
        copy = _Copy(self._conn, _query(stream, relation, window), self._config, stream)
        types = column_types.notes(relation.shape.columns) if window.full else ()
        return Batch(
            shape=_shape(stream, relation),
            wire=WireFormat.PG_BINARY,
            chunks=copy.chunks(),
            rows=copy.rows,
            lower=window.lower,
            upper=window.upper,
            full=window.full,
            notes=(*window.notes, *types, *self._warnings()),
        )

    def _keys(self, stream: StreamSpec, relation: Relation, batch: Batch) -> KeySweep | None:
        """Bring all keys of this snapshot, unless nobody wants them or the batch is all rows."""
        if stream.deletion is Deletes.IGNORE or not stream.key or batch.everything:
            return None
        copy = _Copy(self._conn, pg_keys.keys_query(stream, relation), self._config, stream)
        return KeySweep(pg_keys.key_columns(stream, relation), copy.chunks())

    def _in_rows(
        self, stream: StreamSpec, relation: Relation, window: Window, batch: Batch
    ) -> Batch:
        """Make the same batch for a destination that cannot read COPY binary."""
        columns = pg_rows.portable_columns(relation.shape.columns)
        relation = replace(relation, shape=replace(relation.shape, columns=columns))

        def read(query: sql.Composed, of: Sequence[Column]) -> pg_rows.Reader:
            return pg_rows.Reader(self._conn, query, self._config, stream, of)

        rows, keys = read(_query(stream, relation, window), columns), batch.keys
        if keys is not None:
            named = pg_keys.key_columns(stream, relation)
            groups = read(pg_keys.keys_query(stream, relation), named).groups()
            keys = KeySweep(named, iter(()), groups)
        return replace(
            batch,
            shape=replace(batch.shape, columns=columns),
            wire=WireFormat.ROWS,
            chunks=iter(()),
            groups=rows.groups(),
            rows=rows.rows,
            keys=keys,
        )

    def _warnings(self) -> Iterator[str]:
        if _is_superuser(self._conn):
            yield (
                f"login {self._config.user} is a superuser; production refuses that, give a login "
                "that can only read"
            )

    def cancel(self) -> None:
        """End whatever the server is doing for these sessions; for another thread."""
        self._beside.cancel(self._line)

    def cut(self) -> None:
        """End the links under whatever waits on them; for another thread."""
        self._beside.cut()
        self._line.cut()

    def close(self) -> None:
        """Close the sessions; the server rolls back what was open."""
        self._beside.close()
        self._line.close()


def _shape(stream: StreamSpec, relation: Relation) -> StreamShape:
    key = stream.key or relation.shape.key
    return StreamShape(relation.shape.columns, key, relation.is_key(key))


def _digest(stream: StreamSpec, relation: Relation) -> str:
    """Return by what a large read knows its table again.

    What another table of that name, or another column, has in its rows no cursor shows.
    """
    shape = _shape(stream, relation)
    numbers = [column.number for column in shape.columns]
    parts = [schema_hash(shape), str(relation.oid), *map(str, numbers)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _query(stream: StreamSpec, relation: Relation, window: Window) -> sql.Composed:
    columns = sql.SQL(", ").join(
        sql.SQL("{}::text").format(sql.Identifier(c.name)) if c.as_text else sql.Identifier(c.name)
        for c in relation.shape.columns
    )
    table = sql.Identifier(stream.schema_name, stream.table_name)
    return sql.SQL("COPY (SELECT {} FROM {} WHERE ({}) AND {}) TO STDOUT (FORMAT binary)").format(
        columns, table, window.where, relation.rows
    )


class _Copy:
    """One COPY TO STDOUT, re-blocked. Rows are never parsed: the server counts them."""

    def __init__(
        self, conn: Connection, query: sql.Composed, config: PostgresConfig, stream: StreamSpec
    ) -> None:
        self._conn = conn
        self._query = query
        self._config = config
        self._stream = stream
        self._relay = Relay(conn)

    def rows(self) -> int:
        """Return the server's count once the copy has ended, until then the messages so far."""
        return self._relay.messages if self._relay.total is None else self._relay.total

    def chunks(self) -> Iterator[bytes]:
        """Yield the stream in blocks; ends only if the server said that it was complete."""
        with translated(self._config, "source"):
            try:
                with self._conn.cursor().copy(self._query):
                    yield from self._relay.blocks()
            except (psycopg.errors.ProgramLimitExceeded, psycopg.errors.InternalError_) as error:
                if not column_types.is_too_large(error):
                    raise
                raise column_types.too_large(self._conn, self._config, self._stream) from error
            yield self._relay.rest


class _CopyBeside:
    """As `_Copy`, in a session that is borrowed while the rows are read."""

    def __init__(
        self, sessions: Sessions, query: sql.Composed, config: PostgresConfig, stream: StreamSpec
    ) -> None:
        self._sessions = sessions
        self._made = partial(_Copy, query=query, config=config, stream=stream)
        self._copy: _Copy | None = None

    def rows(self) -> int:
        """Return what `_Copy.rows` does; 0 before it has begun."""
        return 0 if self._copy is None else self._copy.rows()

    def chunks(self) -> Iterator[bytes]:
        """Yield the stream in blocks, as `_Copy.chunks`."""
        with self._sessions.one() as conn:
            self._copy = self._made(conn)
            yield from self._copy.chunks()
