"""Postgres as a destination: rows, cursor and fence in one transaction."""

from collections.abc import Mapping
from time import monotonic
from typing import Any
from uuid import UUID

from connectors import pg_discover, pg_load, pg_state, pg_types
from connectors.pg_batch import Load
from connectors.pg_catalog import check_names, ensure_schema
from connectors.pg_state import StateRow
from connectors.portable import schema_hash
from connectors.postgres import (
    SECRET_FIELDS,
    Connection,
    Line,
    PostgresConfig,
    check_link,
    connect,
    translated,
    watch_client,
)
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError
from schemas.records import (
    Batch,
    Cursor,
    LoadCounts,
    LoadRequest,
    ServerReport,
    StreamClaim,
    StreamResult,
    WireFormat,
)
from schemas.streams import Mode

CONFIG = PostgresConfig
__all__ = ["CONFIG", "SECRET_FIELDS", "check_link", "open_destination"]

_SESSION = {"TimeZone": "UTC", "lock_timeout": "60s"}


def open_destination(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "PostgresDestination":
    """Connect for writing; errors are ours and name the server."""
    checked = PostgresConfig.model_validate(dict(config))
    conn = connect(checked, secrets, role="destination", session=_SESSION, policy=policy)
    with translated(checked, "destination"):
        watch_client(conn)
    return PostgresDestination(checked, conn)


class PostgresDestination:
    """One writing session. Meets schemas.records.Destination."""

    wires = (WireFormat.PG_BINARY, WireFormat.ROWS)

    def __init__(self, config: PostgresConfig, conn: Connection) -> None:
        self._config = config
        self._conn = conn
        self._line = Line(conn)
        self._ready = False
        self._states: dict[str, StateRow] = {}
        self._expected: dict[str, Cursor | None] = {}

    def test(self) -> ServerReport:
        """Report the server and what this login lacks for writing."""
        with translated(self._config, "destination"):
            return pg_discover.report_destination(self._conn, self._config)

    def claim_stream(self, request: LoadRequest) -> StreamClaim:
        """Raise this run's fence; return where the stream resumes, or what this run has done."""
        check_names(request)
        with translated(self._config, "destination"):
            self._ensure()
            state = pg_state.claim(self._conn, request)
            if not state.resumable:  # nothing is there yet, or it goes elsewhere now
                ensure_schema(self._conn, request.target_schema)
        self._states[request.stream.name] = state
        self._expected[request.stream.name] = state.cursor
        cursor = state.cursor if state.resumable else None
        return StreamClaim(
            cursor,
            state.result,
            state.fence,
            state.run_id,
            loaded_before=state.known,
            full_due=state.full_due(request.stream),
            sweep_due=state.sweep_due(request.stream),
        )

    def highest_fence(self, connection_id: UUID) -> int:
        """Return the highest fence that any stream of the connection has seen; 0 if none."""
        with translated(self._config, "destination"):
            self._ensure()
            return pg_state.highest_fence(self._conn, connection_id)

    def _ensure(self) -> None:
        if not self._ready:
            pg_state.ensure(self._conn, self._config)
            self._ready = True

    def load(self, request: LoadRequest, batch: Batch) -> StreamResult:
        """Load a batch exactly once: all of it with its cursor, or nothing."""
        name, started = request.stream.name, monotonic()
        if request.stream.mask and not batch.masked:
            raise RuntimeError("rows of a masked stream came in clear")
        with translated(self._config, "destination"):
            if not self._states[name].known:
                ensure_schema(self._conn, request.target_schema)
        labels = pg_types.labels_named(self._conn, self._config, request, batch.shape.columns)
        with translated(self._config, "destination"), labels, self._conn.transaction():
            here = pg_types.settled(self._conn, self._config, request, batch)
            counts = pg_load.run(self._plan(request, here))
            pg_types.check_intervals(self._conn, self._config, request, here.shape.columns)
            result = _result(request, here, counts, seconds=monotonic() - started)
            pg_state.commit(
                self._conn,
                request,
                result,
                {c.name: (c.number, c.type) for c in here.shape.columns},
                expected=self._expected[name],
                full=batch.full,
                swept=batch.full or batch.keys is not None,
            )
        self._expected[name] = batch.upper
        return result

    def _plan(self, request: LoadRequest, batch: Batch) -> Load:
        """Decide whether the batch adds to the table or becomes its content."""
        state = self._states[request.stream.name]
        append = request.stream.mode is Mode.APPEND
        load = Load(
            self._conn,
            self._config,
            request,
            batch,
            rewrite=request.rewrite or (append and batch.full and state.known),
            seen_shape=state.schema_hash,
            seen=state.columns,
        )
        if append and not state.known:
            _refuse_rows_of_others(load)
        return load

    def cancel(self) -> None:
        """End whatever the server is doing for this session; for another thread."""
        self._line.cancel()

    def cut(self) -> None:
        """End the link under whatever waits on it; for another thread."""
        self._line.cut()

    def close(self) -> None:
        """Close the session; the server rolls back what was open."""
        self._line.close()


def _refuse_rows_of_others(load: Load) -> None:
    """Refuse to append to rows that this connection has not loaded: it would double them."""
    if pg_load.has_rows(load):
        raise ConfigError(
            f"{load.name}: holds rows that this connection has not loaded; append would double "
            "them. Choose another target schema, or empty the table"
        )


def _result(
    request: LoadRequest, batch: Batch, counts: LoadCounts, *, seconds: float
) -> StreamResult:
    """Compare the two servers' counts; a difference rolls everything back."""
    extracted = batch.rows()
    if counts.loaded != extracted - counts.rejected:
        raise SyncwardError(
            f"{request.stream.name}: the source sent {extracted} rows and {counts.loaded} were "
            "loaded; nothing was kept",
            code="rows_missing",
        )
    return StreamResult(
        stream=request.stream.name,
        state="succeeded",
        mode=request.stream.mode,
        rows_extracted=extracted,
        rows_loaded=counts.loaded,
        rows_inserted=counts.inserted,
        rows_updated=counts.updated,
        rows_unchanged=counts.unchanged,
        rows_deleted=counts.deleted,
        rows_rejected=counts.rejected,
        bytes=counts.bytes,
        cursor_from=batch.lower,
        cursor_to=batch.upper,
        seconds=seconds,
        schema_hash=schema_hash(batch.shape),
        schema_changes=counts.changes,
        attempt=request.attempt,
    )
