"""Which rows of a SQLite table a run reads, and where the next one begins.

Writers come one after the other, but a time is taken before the file's lock is: a row may be
committed later than its time says. So a merge begins each time a little before the newest row, and
an append ends a little before now.
"""

import sqlite3
from datetime import UTC, datetime, timedelta

from connectors.portable import Kind, travels_as
from connectors.row_reads import Window, no_cursor_to_backfill, no_value, not_below, stored
from connectors.sqlite.file import Table, quoted
from schemas.errors import ConfigError
from schemas.records import Between, Cursor, FarCursor
from schemas.streams import Mode, StreamSpec

#: How long a writer may take between reading the clock and committing.
DEFAULT_SETTLE = timedelta(seconds=60)

_TIMES = {Kind.DATE, Kind.TIMESTAMP, Kind.TIMESTAMPTZ}
_ORDERED = {Kind.INT, Kind.TEXT}


def window(
    conn: sqlite3.Connection, stream: StreamSpec, table: Table, cursor: Cursor | None
) -> Window:
    """Make the window of a stream; inside the read transaction."""
    if stream.cursor is None:
        return Window("1", (), None, None, full=True)
    column = table.column(stream.cursor)
    if column is None:
        raise ConfigError(
            f"{stream.name}: no cursor column {stream.cursor}; SQLite has no xmin: use a column "
            "that says when a row changed, or mode: replace"
        )
    kind = travels_as(column)
    lower = cursor["value"] if cursor and cursor.get("column") == stream.cursor else None
    if kind in _TIMES:
        return _of_times(conn, stream, table, kind, lower)
    if stream.mode is Mode.APPEND:
        return _of_new_numbers(conn, stream, table, lower)
    if kind not in _ORDERED or column.as_text:
        raise ConfigError(
            f"{stream.name}: cursor {stream.cursor} is a {column.type}, which has no order here; "
            "use a number, a text or a time"
        )
    return _of_order(conn, stream, kind, lower)


def window_between(stream: StreamSpec, table: Table, between: Between) -> Window:
    """Make the window of a backfill from two values that a person wrote."""
    column = None if stream.cursor is None else table.column(stream.cursor)
    kind = None if column is None else travels_as(column)
    if column is None or kind not in _TIMES | _ORDERED or column.as_text:
        raise no_cursor_to_backfill(stream)
    lower = _read(stream, column.type, kind, "--from", between.lower)
    upper = _read(stream, column.type, kind, "--to", between.upper)
    ordered = lower < upper if isinstance(lower, type(upper)) else False  # type: ignore[operator]
    if not ordered:
        raise not_below(stream)
    name = f"t.{quoted(column.name)}"
    if kind in _TIMES:
        at = f"strftime('%Y-%m-%d %H:%M:%f', {name})"
        where = f"({at} >= ? AND {at} < ?)"
    else:
        stored_as = "integer" if kind is Kind.INT else "text"
        within = f"{name} COLLATE BINARY >= ? AND {name} COLLATE BINARY < ?"
        where = f"(typeof({name}) = '{stored_as}' AND {within})"
    ends = stored(stream, str(lower)), stored(stream, str(upper))
    return Window(where, (lower, upper), *ends, full=False)


def _read(stream: StreamSpec, type_: str, kind: Kind | None, option: str, value: str) -> str | int:
    """Read a value as the column's type; times in UTC and to the millisecond, as they compare."""
    try:
        if kind is Kind.INT:
            number = int(value)
            number.to_bytes(8, signed=True)  # OverflowError: no column holds it
            return number
        if kind is Kind.TEXT:
            return value
        at = datetime.fromisoformat(value)
        return _text(at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC))
    except (ValueError, OverflowError):
        raise no_value(stream, option, type_) from None


def _of_new_numbers(
    conn: sqlite3.Connection, stream: StreamSpec, table: Table, lower: str | None
) -> Window:
    """Read the rows above the last number: one writer at a time gives them out in order."""
    if table.alias is None or stream.cursor != table.alias:
        raise ConfigError(
            f"{stream.name}: append by {stream.cursor} could miss rows; use the INTEGER PRIMARY "
            "KEY, a time, or mode: merge"
        )
    column = f"t.{quoted(table.alias)}"
    (top,) = conn.execute(f"SELECT max({column}) FROM {quoted(table.name)} t").fetchone()  # noqa: S608 - quoted names
    note = (
        f"inexact: {stream.cursor} is not AUTOINCREMENT, so the number of a deleted last row is "
        "given out again and that row is missed"
    )
    notes = () if table.ever_new else (note,)
    value = lower if top is None else str(top)
    upper = None if value is None else stored(stream, value)
    if lower is None:
        return Window("1", (), None, upper, full=True, notes=notes)
    return Window(
        f"{column} > ?", (int(lower),), stored(stream, lower), upper, full=False, notes=notes
    )


def _of_order(
    conn: sqlite3.Connection, stream: StreamSpec, kind: Kind, lower: str | None
) -> Window:
    """Read from the largest value of last time on, that one again; what fits no type as well."""
    name = quoted(stream.cursor or "")
    stored_as = "integer" if kind is Kind.INT else "text"
    (top,) = conn.execute(
        f"SELECT max(t.{name} COLLATE BINARY) FROM {quoted(stream.table_name)} t "  # noqa: S608 - quoted names
        f"WHERE typeof(t.{name}) = ?",
        (stored_as,),
    ).fetchone()
    note = f"inexact: rows whose {stream.cursor} is smaller than one already read are missed"
    value = lower if top is None else str(top)
    if lower is not None and kind is Kind.INT and value is not None:
        value = str(max(int(lower), int(value)))
    elif lower is not None and value is not None:
        value = max(lower, value)
    upper = None if value is None else stored(stream, value)
    if lower is None:
        return Window("1", (), None, upper, full=True, notes=(note,))
    where = f"(t.{name} COLLATE BINARY >= ? OR typeof(t.{name}) <> ?)"  # NULL has a type of its own
    first: str | int = int(lower) if kind is Kind.INT else lower
    return Window(
        where, (first, stored_as), stored(stream, lower), upper, full=False, notes=(note,)
    )


def _of_times(
    conn: sqlite3.Connection, stream: StreamSpec, table: Table, kind: Kind, lower: str | None
) -> Window:
    """Compare times as SQLite reads them, in UTC and to the millisecond, whatever their form.

    A value that is no time belongs to every window, so that the read ends with its place.
    """
    if kind is Kind.DATE and stream.mode is Mode.APPEND:
        raise ConfigError(
            f"{stream.name}: append by a date would miss the rest of the day; use mode: merge"
        )
    name = quoted(stream.cursor or "")
    at = f"strftime('%Y-%m-%d %H:%M:%f', t.{name})"
    odd = f"(t.{name} IS NOT NULL AND (typeof(t.{name}) <> 'text' OR {at} IS NULL))"
    settle = DEFAULT_SETTLE if stream.settle is None else stream.settle
    now = datetime.now(UTC)
    late = f"inexact: a row that is committed over {_seconds(settle)} after its time is missed"
    notes: tuple[str, ...] = (late,)
    if kind is not Kind.TIMESTAMPTZ:
        notes = (*notes, f"{stream.cursor} has no time zone; read as UTC")
    (newest,) = conn.execute(
        f"SELECT max({at}) FROM {quoted(table.name)} t"  # noqa: S608 - quoted names
    ).fetchone()
    beyond = _beyond(stream, newest, now)
    if stream.mode is Mode.APPEND:
        bound = max(lower or "", _text(now - settle))
        upper = stored(stream, bound)
        if lower is None:
            where = f"({at} < ? OR t.{name} IS NULL OR {odd})"
            return Window(where, (bound,), None, upper, full=True, notes=notes, beyond=beyond)
        where, lowest = f"(({at} >= ? AND {at} < ?) OR {odd})", stored(stream, lower)
        return Window(where, (lower, bound), lowest, upper, full=False, notes=notes, beyond=beyond)
    bound_at = min(_text(now), newest) if newest is not None else None
    next_lower = lower if bound_at is None else max(lower or "", _before(bound_at, settle, kind))
    next_cursor = None if next_lower is None else stored(stream, next_lower)
    if lower is None:
        return Window("1", (), None, next_cursor, full=True, notes=notes, beyond=beyond)
    first = _before(lower, stream.overlap, kind)
    where = f"({at} >= ? OR t.{name} IS NULL OR {odd})"
    lowest = stored(stream, lower)
    return Window(where, (first,), lowest, next_cursor, full=False, notes=notes, beyond=beyond)


def _beyond(stream: StreamSpec, newest: str | None, now: datetime) -> FarCursor | None:
    """Return the newest time if it is farther ahead of now than its guard allows."""
    margin = stream.guards.future_cursor
    if newest is None or margin is None or newest <= _text(now + margin):
        return None
    return FarCursor(newest, int(datetime.fromisoformat(newest).replace(tzinfo=UTC).timestamp()))


def is_dead(stream: StreamSpec, table: Table) -> str:
    """Make the condition that a row's tombstone says deleted: true, or any time at all."""
    column = table.column(stream.tombstone or "")
    kind = None if column is None else travels_as(column)
    if column is None or kind not in {Kind.BOOL, *_TIMES}:
        raise ConfigError(
            f"{stream.name}: no tombstone column {stream.tombstone} of a boolean or a time"
        )
    name = f"t.{quoted(column.name)}"
    return f"({name} IS 1)" if kind is Kind.BOOL else f"({name} IS NOT NULL)"


def _seconds(settle: timedelta) -> str:
    return f"{settle.total_seconds():.0f} s"


def _text(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S.") + f"{at.microsecond // 1_000:03}"


def _before(at: str, distance: timedelta, kind: Kind) -> str:
    """Return an earlier moment; of a column of dates the beginning of its day."""
    try:
        earlier = datetime.fromisoformat(at).replace(tzinfo=UTC) - distance
    except OverflowError:
        earlier = datetime.min.replace(tzinfo=UTC)
    if kind is Kind.DATE:
        earlier = earlier.replace(hour=0, minute=0, second=0, microsecond=0)
    return _text(earlier)
