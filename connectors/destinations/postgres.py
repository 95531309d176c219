"""Postgres as a destination: rows, cursor and fence in one transaction."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock
from time import monotonic
from typing import Any
from uuid import UUID

import psycopg

from connectors import results
from connectors.egress import Lookup, look_up
from connectors.portable import schema_hash
from connectors.postgres import column_types, generations, rejects
from connectors.postgres import discover as pg_discover
from connectors.postgres import load as pg_load
from connectors.postgres import purge as pg_purge
from connectors.postgres import refusals as pg_refusals
from connectors.postgres import state as pg_state
from connectors.postgres.batch import Load
from connectors.postgres.catalog import check_names, ensure_schema, find
from connectors.postgres.generations import Generation
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
from connectors.postgres.refusals import Care, Refusals, RowsRefused, is_of_a_row, next_care
from connectors.postgres.sessions import Sessions
from connectors.postgres.state import StateRow
from connectors.shape_changes import changes
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, ReadAgain
from schemas.records import (
    Batch,
    Change,
    Cursor,
    LoadRequest,
    Part,
    Purge,
    ServerReport,
    StreamClaim,
    StreamResult,
    StreamShape,
    TargetView,
    WireFormat,
)
from schemas.streams import Mode

CONFIG = PostgresConfig
__all__ = ["AIMED_BY", "CONFIG", "SECRET_FIELDS", "check_link", "open_destination"]

_SESSION = {"TimeZone": "UTC", "lock_timeout": "60s"}


def open_destination(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "PostgresDestination":
    """Connect for writing; errors are ours and name the server."""
    checked = PostgresConfig.model_validate(dict(config))

    def opened(lookup: Lookup = look_up) -> tuple[Connection, pg_state.Seen]:
        conn = connect(
            checked, secrets, role="destination", session=_SESSION, policy=policy, lookup=lookup
        )
        with translated(checked, "destination"):
            return conn, pg_state.Seen(*begin_session(conn, pg_state.LOOK))

    conn, seen = opened()
    elsewhere = where_it_is(conn, checked)
    return PostgresDestination(checked, conn, lambda: opened(elsewhere)[0], seen)


class PostgresDestination:
    """One writing session, and more beside it for ranges. Meets schemas.records.Destination."""

    wires = (WireFormat.PG_BINARY, WireFormat.ROWS)

    def __init__(
        self,
        config: PostgresConfig,
        conn: Connection,
        once_more: Callable[[], Connection],
        seen: pg_state.Seen,
    ) -> None:
        self._config = config
        self._conn = conn
        self._beside = Sessions(once_more)
        self._alone = Lock()  # for what ranges that are loaded at the same time do in turn
        self._begun_here: set[str] = set()  # streams whose generation is of this very read
        self._line = Line(conn)
        self._seen: pg_state.Seen | None = seen  # until it is made whole
        self._states: dict[str, StateRow] = {}
        self._expected: dict[str, Cursor | None] = {}
        self._care: dict[str, Care] = {}

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
        name = request.stream.name
        self._begun_here.discard(name)
        met = self._care.get(name, Care.NONE) if state.fence == request.fence else Care.NONE
        self._states[name], self._expected[name] = state, state.cursor
        self._care[name] = max(state.care, met)
        cursor = state.cursor if state.resumable else None
        result, unfinished = state.result, state.unfinished
        if result is not None and result.rows_rejected:
            with translated(self._config, "destination"):
                sample = pg_refusals.sample(self._conn, request)
            result = result.model_copy(update={"rejected": sample})
        if unfinished is not None and not unfinished.goes_on(request, loaded=state.generation):
            unfinished = None
        return StreamClaim(
            cursor,
            result,
            state.fence,
            state.run_id,
            loaded_before=state.known,
            full_due=state.full_due(request.stream),
            sweep_due=state.sweep_due(request.stream),
            keep=partial(self._keep, request),
            stop=self._beside.stop,
            kept=None if unfinished is None else unfinished.kept,
        )

    def highest_fence(self, connection_id: UUID) -> int:
        """Return the highest fence that any stream of the connection has seen; 0 if none."""
        with translated(self._config, "destination"):
            self._ensure()
            return pg_state.highest_fence(self._conn, connection_id)

    def _ensure(self) -> None:
        if self._seen is not None:
            pg_state.ensure(self._conn, self._config, self._seen)
            self._seen = None

    def load(self, request: LoadRequest, batch: Batch) -> StreamResult:
        """Load a batch exactly once: all of it with its cursor, or nothing.

        ReadAgain where a row was refused that may be: next time it is looked for.
        """
        used = self._care[request.stream.name]
        try:
            return self._load(request, batch)
        except ConfigError as error:
            self._more_carefully(request, error, used)
            raise

    def _more_carefully(self, request: LoadRequest, error: ConfigError, before: Care) -> None:
        """Ask for the same rows once more, if the stream may go on without the one refused.

        `before` is the care that they were loaded with; another range may have asked for more.
        """
        name, cause = request.stream.name, error.__cause__
        early = isinstance(error, RowsRefused)
        if request.stream.rejected_max == 0 or not (early or is_of_a_row(cause)):
            return
        care = next_care(cause, before) if isinstance(cause, psycopg.Error) else Care.SETS
        begun = self._expected[name] != self._states[name].cursor
        if begun or care <= before:
            return
        self._care[name] = max(self._care[name], care)
        raise ReadAgain(f"{name}: {error.public}; the others are loaded", same=True) from error

    def _load(self, request: LoadRequest, batch: Batch) -> StreamResult:
        name, started = request.stream.name, monotonic()
        results.check_masked(request, batch)
        unfinished = self._states[name].unfinished
        with translated(self._config, "destination"):
            if not self._states[name].known:
                ensure_schema(self._conn, request.target_schema)
        labels = column_types.labels_named(self._conn, self._config, request, batch.shape.columns)
        with translated(self._config, "destination"), labels, self._conn.transaction():
            here = column_types.settled(self._conn, self._config, request, batch)
            results.check_backfill(request, here, self._states[name].schema_hash)
            load = self._plan(request, here)
            if batch.part is not None:
                if unfinished is None:  # all of the target would look gone
                    raise RuntimeError(f"{name}: the end of a read that was never begun")
                hidden, before = generations.complete(self._conn, request, unfinished)
                read = hidden.rows + (load.refusals.before if load.refusals else 0)
                here.rows, started = (lambda: read), started - before
                load = replace(load, hidden=hidden)
            counts = pg_load.run(load)
            if unfinished is not None:  # of a backfill, or with rows older than these
                generations.drop(self._conn, request, unfinished)
            column_types.check_intervals(self._conn, self._config, request, here.shape.columns)
            result = results.result_of(request, here, counts, seconds=monotonic() - started)
            columns = {c.name: (c.number, c.type) for c in here.shape.columns}
            pg_state.commit(
                self._conn,
                request,
                result,
                columns,
                expected=self._expected[name],
                full=batch.full,
                swept=batch.full or batch.keys is not None,
                more=batch.more,
            )
        if not request.backfill:
            self._expected[name] = batch.upper
            self._states[name] = replace(
                self._states[name],
                unfinished=None,
                known=True,
                elsewhere=None,
                schema_hash=result.schema_hash,
                columns=columns,
            )
        return result

    def _keep(self, request: LoadRequest, batch: Batch) -> None:
        """Keep one range, under this run's fence: its rows and the note that they are there."""
        used = self._care[request.stream.name]
        try:
            self._keep_range(request, batch)
        except ConfigError as error:
            self._more_carefully(request, error, used)
            raise

    def _keep_range(self, request: LoadRequest, batch: Batch) -> None:
        part = batch.part
        if part is None:
            raise RuntimeError(f"{request.stream.name}: a batch that is no range")
        results.check_masked(request, batch)
        with self._alone:
            generation = self._begun(request, batch, part)
        with self._session_for(request, part) as conn:
            started = monotonic()
            labels = column_types.labels_named(conn, self._config, request, batch.shape.columns)
            with translated(self._config, "destination"), labels, conn.transaction():
                here = column_types.settled(conn, self._config, request, batch)
                load = self._plan(request, here, conn)
                rows, size, refused = rejects.keep_range(load, generation.table)
                if rows != here.rows() - refused:
                    raise results.rows_missing(request, here.rows(), rows)
                counts = {"rows": rows, "bytes": size, "seconds": monotonic() - started}
                generations.done(conn, request, generation, part, counts)

    @contextmanager
    def _session_for(self, request: LoadRequest, part: Part) -> Iterator[Connection]:
        """Lend the session for a range: one of its own, if it may be loaded beside others.

        Where rows are refused and looked for, one after the other: they share what is noted.
        """
        if part.beside and not self._care[request.stream.name]:
            with self._beside.one() as conn:
                yield conn
        else:
            with self._alone:
                yield self._conn

    def _begun(self, request: LoadRequest, batch: Batch, part: Part) -> Generation:
        """Return the generation that a range belongs to; the first range begins a new one."""
        name = request.stream.name
        state, shape = self._states[name], part.digest or schema_hash(batch.shape)
        if state.unfinished is not None and (part.kept or name in self._begun_here):
            return state.unfinished
        new = generations.begun(request, state.generation + 1, shape, batch.upper, part)
        with translated(self._config, "destination"):
            ensure_schema(self._conn, request.target_schema)
        labels = column_types.labels_named(self._conn, self._config, request, batch.shape.columns)
        with translated(self._config, "destination"), labels, self._conn.transaction():
            here = column_types.settled(self._conn, self._config, request, batch)
            results.check_backfill(request, here, state.schema_hash)
            generations.begin(self._conn, request, new, before=state.unfinished)
            if self._care[name]:
                pg_refusals.forget_ranges(self._conn, request)
            pg_load.make_hidden(self._plan(request, here), new.table)
        self._states[name] = replace(state, unfinished=new)
        self._begun_here.add(name)
        return new

    def _refusals(self, request: LoadRequest, batch: Batch) -> Refusals | None:
        """Return what notes the rows that are refused; None where none was until now."""
        name = request.stream.name
        care, unfinished = self._care[name], self._states[name].unfinished
        if not care:
            return None
        refusals = Refusals(request, care, met=care is Care.SETS and not self._states[name].care)
        if batch.part is not None and unfinished is not None:
            return pg_refusals.of_ranges(self._conn, refusals, unfinished.number)
        return refusals

    def _plan(self, request: LoadRequest, batch: Batch, conn: Connection | None = None) -> Load:
        """Decide whether the batch adds to the table or becomes its content."""
        state = self._states[request.stream.name]
        append = request.stream.mode is Mode.APPEND
        load = Load(
            conn or self._conn,
            self._config,
            request,
            batch,
            rewrite=batch.full and (request.rewrite or (append and state.known)),
            seen_shape=state.schema_hash,
            seen=state.columns,
            refusals=self._refusals(request, batch),
        )
        if append and (state.elsewhere or not state.known):
            _refuse_rows_of_others(load, state.elsewhere)
        return load

    def compare(self, request: LoadRequest, shape: StreamShape) -> TargetView:
        """Show the stream's table, and what the next run would find changed at the source."""
        check_names(request)
        with translated(self._config, "destination"):
            self._ensure()
            schema, table = request.target_schema, request.stream.table_name
            there = pg_load.ours_apart(find(self._conn, schema, table))
            if not there:
                return TargetView(None)
            batch = Batch(shape, WireFormat.PG_BINARY, iter(()), lambda: 0, None, None, full=True)
            here = column_types.settled(self._conn, self._config, request, batch).shape
            found = changes(there, here.columns, frozenset(here.key))
            if pg_state.last_shape(self._conn, request) == schema_hash(here):  # it was followed
                found = tuple(c for c in found if c.change in {Change.ADDED, Change.WIDENED})
        return TargetView(tuple(there.values()), found)

    def reset(self, request: LoadRequest) -> StreamResult:
        """Forget where the claimed stream is read, and a read that did not come to its end."""
        state = self._states[request.stream.name]
        result = results.acted(request, cursor_from=state.cursor)
        with translated(self._config, "destination"), self._conn.transaction():
            self._forget(request, state)
            pg_purge.forget_cursor(self._conn, request)
            pg_state.rewind(self._conn, request, result)
        return result

    def purge(self, request: LoadRequest, how: Purge) -> StreamResult:
        """Put all rows of the claimed stream away, delete them, or bring them back."""
        state, started = self._states[request.stream.name], monotonic()
        if state.elsewhere or not state.known:
            raise results.nothing_to_purge(request)
        with translated(self._config, "destination"), self._conn.transaction():
            self._forget(request, state)
            if how is Purge.UNDO:
                kept = pg_purge.bring_back(self._conn, request, generation=state.generation)
                result = results.acted(
                    request, inserted=kept.rows, cursor_to=kept.cursor,
                    seconds=monotonic() - started,
                )  # fmt: skip
                pg_state.rewind(self._conn, request, result, reads=kept.reads)
                return result
            if how is Purge.NOW:
                rows = pg_purge.delete(self._conn, request)
            else:
                rows = pg_purge.put_away(
                    self._conn, request, generation=state.generation, cursor=state.cursor,
                    reads=state.reads,
                )  # fmt: skip
            result = results.acted(
                request, deleted=rows, cursor_from=state.cursor, seconds=monotonic() - started
            )
            pg_state.rewind(self._conn, request, result)
        return result

    def _forget(self, request: LoadRequest, state: StateRow) -> None:
        """Hold this run's fence, and drop what there is of an unfinished read."""
        generations.fenced(self._conn, request)
        if state.unfinished is not None:
            generations.drop(self._conn, request, state.unfinished)

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


def _refuse_rows_of_others(load: Load, before: str | None) -> None:
    """Refuse to append to rows that this connection has not loaded: it would double or drop them.

    `before` is the schema that the stream went to until now, if it went anywhere.
    """
    if not pg_load.has_rows(load):
        return
    went = f" (the stream went to {before} until now)" if before else ""
    raise ConfigError(
        f"{load.name}: holds rows that this connection has not loaded{went}; append would double "
        "or drop them. Choose another target schema, or empty the table"
    )
