"""Which rows of a MariaDB table a run reads, and where the next one begins: start at `Look`.

A row may commit after its time or its number was given out. Who may see all sessions (PROCESS)
looks before the snapshot is taken: what is still open holds the bound back. Otherwise the bound
stays a while behind now, and the notes say `inexact`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from secrets import token_hex
from time import monotonic, sleep
from typing import Any
from uuid import UUID

from connectors.mariadb.tables import Asking, Table, TableColumn, quoted
from connectors.portable import Kind, kind_of
from connectors.row_reads import Window, no_cursor_to_backfill, no_value, not_below, stored
from schemas.errors import ConfigError
from schemas.records import Between, Cursor, FarCursor
from schemas.streams import Mode, StreamSpec

#: How far behind now a window ends where open transactions cannot be seen.
DEFAULT_SETTLE = timedelta(seconds=60)
#: Between a statement's clock and its place in the list of sessions, and the clock's own grain.
_MARGIN = timedelta(seconds=1)
#: A bound further behind than this is somebody's forgotten transaction: say whose.
_HELD_LONG = timedelta(minutes=10)
#: How long an append by number waits for transactions that may hold numbers below its bound.
_WAIT_S = 5.0
#: The server shows the same list of transactions again until nobody has looked for 100 ms.
_EVERY_S, _LOOKS = 0.13, 25

_TIMES = {Kind.DATE, Kind.TIMESTAMP, Kind.TIMESTAMPTZ}
_ORDERED = {Kind.INT, Kind.DECIMAL, Kind.UUID}
_ORDERED_TEXTS = {"char", "varchar", "tinytext", "text", "mediumtext", "longtext"}
#: The beginning of time: where a bound is unknown.
_NOWHERE = datetime(1, 1, 1, tzinfo=UTC)

#: Statements that may have read the clock or taken a number, and are not in a transaction yet.
_RUNNING = """
SELECT id, time_ms FROM information_schema.processlist
WHERE id <> CONNECTION_ID() AND command NOT IN ('Sleep', 'Daemon')
  AND command NOT LIKE 'Slave%%' AND command NOT LIKE 'Binlog%%'
  AND COALESCE(info, '') NOT LIKE '/* syncward */%%'
"""
#: Transactions that may write. Of one without a session (XA, prepared) the start is not known.
_OPEN = """
SELECT trx_mysql_thread_id, trx_id,
       TIMESTAMPDIFF(SECOND, CONVERT_TZ(trx_started, 'SYSTEM', '+00:00'), UTC_TIMESTAMP()),
       trx_mysql_thread_id = CONNECTION_ID(), trx_query LIKE %s
FROM information_schema.innodb_trx
WHERE trx_mysql_thread_id = CONNECTION_ID()
   OR (trx_is_read_only = 0 AND trx_autocommit_non_locking = 0)
"""
_SEES_ALL = """
SELECT COUNT(*) FROM information_schema.user_privileges
WHERE privilege_type IN ('PROCESS', 'SUPER')
  AND REPLACE(grantee, '''', '') = CURRENT_USER()
"""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen before the snapshot. Take it first, never after."""

    now: datetime
    at: datetime | None  # nothing that commits later carries an earlier time; None: unknown
    exact: bool
    notes: tuple[str, ...]
    top: str | None = None  # the highest number whose predecessors are all decided


def look(session: Asking, stream: StreamSpec, table: Table) -> Look:
    """See how far time, or the numbers of a stream, have settled. Outside of any transaction."""
    now = _moment(session.all("SELECT UTC_TIMESTAMP(6)")[0][0])
    if stream.cursor is None:
        return Look(now, now, exact=True, notes=())
    hidden = _hidden(session)
    if stream.mode is Mode.APPEND and stream.cursor == table.automatic:
        return _look_at_numbers(session, stream, table, now, hidden)
    if hidden:
        settle = DEFAULT_SETTLE if stream.settle is None else stream.settle
        note = f"inexact: {hidden}; rows are read {settle.total_seconds():.0f} s behind"
        return Look(now, now - settle, exact=False, notes=(note,))
    running = session.all(_RUNNING)  # before the transactions: it may become one meanwhile
    opened = _opened(session)
    if opened is None:
        return Look(now, None, exact=True, notes=(f"held back: {_STALE}",))
    if any(thread == "0" for thread, _, _ in opened):
        note = "held back: a prepared transaction is open and its start is unknown"
        return Look(now, None, exact=True, notes=(note,))
    ages = [(timedelta(milliseconds=float(ms)), thread) for thread, ms in running]
    ages += [(timedelta(seconds=int(age) + 1), thread) for thread, _, age in opened]
    held, thread = max(ages, default=(timedelta(0), ""))
    minutes = int(held.total_seconds() // 60)
    notes = (f"held back {minutes} min by session {thread}",) if held > _HELD_LONG else ()
    return Look(now, now - held - _MARGIN, exact=True, notes=notes)


def _hidden(session: Asking) -> str | None:
    """Say why open transactions cannot be seen; None if they can."""
    if session.all(_SEES_ALL)[0][0] == "0":
        return "without PROCESS open transactions are hidden"
    followers = "SELECT COUNT(*) FROM information_schema.processlist WHERE command LIKE 'Slave%%'"
    if session.all(followers)[0][0] != "0":
        return "a replica applies what was committed elsewhere"
    if session.all("SHOW GLOBAL STATUS LIKE 'wsrep_ready'")[:1] == [("wsrep_ready", "ON")]:
        return "a cluster's other nodes write, too"
    return None


_STALE = "others ask for the list of transactions so often that the server never renews it"


def _opened(session: Asking) -> list[tuple[str, str, str]] | None:
    """List the transactions that are open now; None if the server tells only of earlier ones.

    A list that was made since we asked shows our own transaction with this very question.
    """
    session.all("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
    try:
        for _ in range(_LOOKS):
            mark = token_hex(8)
            found = session.all(f"/* {mark} */{_OPEN}", f"/* {mark} */%")
            if any(ours == "1" and asked == "1" for _, _, _, ours, asked in found):
                return [(t, n, age) for t, n, age, ours, _ in found if ours == "0"]
            sleep(_EVERY_S)
    finally:
        session.all("ROLLBACK")
    return None


def _look_at_numbers(
    session: Asking, stream: StreamSpec, table: Table, now: datetime, hidden: str | None
) -> Look:
    """Take the highest number, then wait for whoever may hold a lower one that is not committed.

    Numbers that are given out later are higher. A transaction that was open at the look at the
    highest number is decided once it is gone from the list.
    """
    if hidden:
        raise ConfigError(
            f"{stream.name}: append by {stream.cursor} could miss rows that commit out of order: "
            f"{hidden}. GRANT PROCESS at the primary, or use mode: merge"
        )
    column = quoted(stream.cursor or "")
    top = session.all(f"/* syncward */ SELECT MAX(t.{column}) FROM {table.sql} t")[0][0]  # noqa: S608 - quoted names
    waited_for = _writers(session)
    end = monotonic() + _WAIT_S
    while waited_for and monotonic() < end:
        sleep(_EVERY_S)
        still = _writers(session)
        waited_for = None if still is None or waited_for is None else waited_for & still
    if waited_for is None:
        return Look(now, now, exact=True, notes=(f"held back: {_STALE}",))
    if waited_for:
        thread = min(thread for thread, _ in waited_for)
        note = f"held back by the open transaction or statement of session {thread}"
        return Look(now, now, exact=True, notes=(note,))
    return Look(now, now, exact=True, notes=(), top=top)


def _writers(session: Asking) -> set[tuple[str, str]] | None:
    """Name statements that run and transactions that are open, so that the same is known again."""
    running = {(thread, "") for thread, _ in session.all(_RUNNING)}
    opened = _opened(session)
    if opened is None:
        return None
    return running | {(thread, number) for thread, number, _ in opened}


def window(
    session: Asking, stream: StreamSpec, table: Table, cursor: Cursor | None, seen: Look
) -> Window:
    """Make the window of a stream; inside the snapshot."""
    if stream.cursor is None:
        return Window("1", (), None, None, full=True)
    field = table.field(stream.cursor)
    if field is None:
        raise ConfigError(
            f"{stream.name}: no cursor column {stream.cursor}; MariaDB has no xmin: use a column "
            "that says when a row changed, or mode: replace"
        )
    lower = cursor["value"] if cursor and cursor.get("column") == stream.cursor else None
    kind = kind_of(field.column.type)
    if kind in _TIMES:
        return _of_times(session, stream, table, kind, lower, seen)
    if stream.mode is Mode.APPEND:
        return _of_new_numbers(stream, table, lower, seen)
    return _of_order(session, stream, table, field, lower)


#: How a value is compared as what it is: with a text a number would be compared as a double.
_AS = {Kind.INT: "CAST(%s AS DECIMAL(65,0))", Kind.DECIMAL: "CAST(%s AS DECIMAL(65,30))"}


def window_between(stream: StreamSpec, table: Table, between: Between) -> Window:
    """Make the window of a backfill from two values that a person wrote."""
    field = None if stream.cursor is None else table.field(stream.cursor)
    kind = None if field is None else kind_of(field.column.type)
    text = field is not None and field.declared.data_type in _ORDERED_TEXTS
    known = field is not None and not field.column.as_text and kind in _TIMES | _ORDERED
    if field is None or not (known or text):
        raise no_cursor_to_backfill(stream)
    as_kind = Kind.TEXT if text or kind is None else kind
    lower = _read(stream, field, as_kind, "--from", between.lower)
    upper = _read(stream, field, as_kind, "--to", between.upper)
    in_order = lower != upper if text else lower < upper  # of texts only the server knows
    if not in_order:
        raise not_below(stream)
    column, value = f"t.{quoted(field.column.name)}", _AS.get(as_kind, "%s")
    ends = (_shown(lower), _shown(upper))
    where = f"({column} >= {value} AND {column} < {value})"
    before, after = stored(stream, ends[0]), stored(stream, ends[1])
    return Window(where, ends, before, after, full=False)


def _read(stream: StreamSpec, field: TableColumn, kind: Kind, option: str, value: str) -> Any:  # noqa: ANN401 - values that can be compared
    """Read a value as the column's type: a time with a zone as UTC, one without as the server's."""
    try:
        found = _value(kind, value)
    except (ValueError, OverflowError, InvalidOperation):
        found = None
    if found is None:
        raise no_value(stream, option, field.column.type)
    return found


def _value(kind: Kind, value: str) -> Any:  # noqa: ANN401 - as above
    """Return a value, or None for what is one of another type."""
    if kind in _TIMES:
        at = datetime.fromisoformat(value)
        if at.tzinfo is None:
            return at.replace(tzinfo=UTC)
        return at.astimezone(UTC) if kind is Kind.TIMESTAMPTZ else None
    read: dict[Kind, Callable[[str], Any]] = {
        Kind.INT: int, Kind.DECIMAL: Decimal, Kind.UUID: UUID,
    }  # fmt: skip
    found = read.get(kind, str)(value)
    return None if isinstance(found, Decimal) and not found.is_finite() else found


def _shown(value: object) -> str:
    if isinstance(value, datetime):
        return _written(value)
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _of_new_numbers(stream: StreamSpec, table: Table, lower: str | None, seen: Look) -> Window:
    """Read the rows above the last number, up to the highest below which all is decided."""
    if stream.cursor != table.automatic:
        raise ConfigError(
            f"{stream.name}: append by {stream.cursor} could miss rows; use the AUTO_INCREMENT "
            "column, a time, or mode: merge"
        )
    column = f"t.{quoted(stream.cursor or '')}"
    before = None if lower is None else stored(stream, lower)
    if lower is None and seen.top is None:  # all now, and all once more in its place next time
        return Window("1", (), None, None, full=True, notes=seen.notes)
    if seen.top is None or (lower is not None and int(seen.top) <= int(lower)):
        return Window("0", (), before, before, full=False, notes=seen.notes)
    upper = stored(stream, seen.top)
    if lower is None:
        return Window(f"{column} <= %s", (seen.top,), None, upper, full=True, notes=seen.notes)
    where = f"({column} > %s AND {column} <= %s)"
    return Window(where, (lower, seen.top), before, upper, full=False, notes=seen.notes)


def _of_order(
    session: Asking, stream: StreamSpec, table: Table, field: TableColumn, lower: str | None
) -> Window:
    """Read from the largest value of last time on, that one again, as the server orders them."""
    known = kind_of(field.column.type) in _ORDERED and not field.column.as_text
    if not known and field.declared.data_type not in _ORDERED_TEXTS:
        raise ConfigError(
            f"{stream.name}: cursor {stream.cursor} is a {field.declared.column_type}, which has "
            "no order here; use a number, a text or a time"
        )
    column = f"t.{quoted(field.column.name)}"
    top = _largest(session, table, column)
    note = f"inexact: rows whose {stream.cursor} is smaller than one already read are missed"
    value = lower if top is None else str(top)
    upper = None if value is None else stored(stream, value)
    if lower is None:
        return Window("1", (), None, upper, full=True, notes=(note,))
    before = stored(stream, lower)
    where = f"({column} >= %s OR {column} IS NULL)"  # what has no place is read each time
    return Window(where, (lower,), before, upper, full=False, notes=(note,))


def _of_times(  # noqa: PLR0917 - one call
    session: Asking, stream: StreamSpec, table: Table, kind: Kind, lower: str | None, seen: Look
) -> Window:
    """Read from the last bound on. A merge reads what lies above the new bound, too, twice."""
    if kind is Kind.DATE and stream.mode is Mode.APPEND:
        raise ConfigError(
            f"{stream.name}: append by a date would miss the rest of the day; use mode: merge"
        )
    column = f"t.{quoted(stream.cursor or '')}"
    notes = seen.notes
    if kind is not Kind.TIMESTAMPTZ:
        notes = (*notes, f"{stream.cursor} has no time zone; read as the server's own time")
    bound = _written(_NOWHERE) if seen.at is None else _in_column(session, kind, seen.at)
    bound = max(lower or "", bound)  # it never moves back, e.g. after a clock was set
    upper = stored(stream, bound)
    beyond = _beyond(session, stream, table, kind, seen.now)
    if stream.mode is Mode.APPEND:
        if lower is None and seen.at is None:  # as for numbers
            return Window("1", (), None, None, full=True, notes=notes, beyond=beyond)
        if lower is None:
            where = f"({column} < %s OR {column} IS NULL)"
            return Window(where, (bound,), None, upper, full=True, notes=notes, beyond=beyond)
        where = f"({column} >= %s AND {column} < %s)"
        before = stored(stream, lower)
        return Window(where, (lower, bound), before, upper, full=False, notes=notes, beyond=beyond)
    if lower is None:
        return Window("1", (), None, upper, full=True, notes=notes, beyond=beyond)
    first = _earlier(lower, stream.overlap)
    before = stored(stream, lower)
    where = f"({column} >= %s OR {column} IS NULL)"
    return Window(where, (first,), before, upper, full=False, notes=notes, beyond=beyond)


def _in_column(session: Asking, kind: Kind, at: datetime) -> str:
    """Write a moment as the column has it: without a zone, as the clock on the server's wall.

    That clock is set back once a year; until an hour later the bound stays where it will show
    again.
    """
    if kind is Kind.TIMESTAMPTZ:
        return _written(at)
    quarter = timedelta(minutes=15)
    next_quarter = datetime.min.replace(tzinfo=UTC) + (
        -(-(at - datetime.min.replace(tzinfo=UTC)) // quarter) * quarter
    )
    moments = [_written(at), *(_written(next_quarter + i * quarter) for i in range(13))]
    wall = "COALESCE(CONVERT_TZ(%s, '+00:00', @@GLOBAL.time_zone), %s)"
    values = [value for moment in moments for value in (moment, moment)]
    (lowest,) = session.all(f"SELECT LEAST({', '.join([wall] * len(moments))})", *values)[0]
    moment = _moment(lowest)
    if kind is Kind.DATE:
        moment = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    return _written(moment)


def _beyond(
    session: Asking, stream: StreamSpec, table: Table, kind: Kind, now: datetime
) -> FarCursor | None:
    """Return the newest time if it is farther ahead of now than its guard allows."""
    margin = stream.guards.future_cursor
    if margin is None:
        return None
    column = f"t.{quoted(stream.cursor or '')}"
    newest = _largest(session, table, column)
    if newest is None or newest.startswith("0000"):
        return None
    at = _moment(newest)
    if kind is not Kind.TIMESTAMPTZ:
        margin += timedelta(hours=14)  # wherever the server's wall is
    if at <= now + margin:
        return None
    return FarCursor(newest, int(at.timestamp()))


def _largest(session: Asking, table: Table, column: str) -> str | None:
    """Return the largest value of a column in the stream's rows."""
    query = f"/* syncward */ SELECT MAX({column}) FROM {table.sql} t WHERE {table.rows_where}"  # noqa: S608 - quoted names
    ((found,),) = session.all(query, *table.rows_values)
    return None if found is None else str(found)


def is_dead(stream: StreamSpec, table: Table) -> str:
    """Make the condition that a row's tombstone says deleted: true, or any time at all."""
    field = table.field(stream.tombstone or "")
    kind = None if field is None else kind_of(field.column.type)
    if field is None or kind not in {Kind.BOOL, *_TIMES}:
        raise ConfigError(
            f"{stream.name}: no tombstone column {stream.tombstone} of a boolean or a time"
        )
    name = f"t.{quoted(field.column.name)}"
    return f"COALESCE({name} = 1, 0)" if kind is Kind.BOOL else f"({name} IS NOT NULL)"


def _written(at: datetime) -> str:
    return at.replace(tzinfo=None).isoformat(" ", "microseconds")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _earlier(at: str, distance: timedelta) -> str:
    try:
        return _written(_moment(at) - distance)
    except OverflowError:
        return _written(_NOWHERE)
