"""Which rows a run reads: [lower, upper), upper frozen at the start and stored as the next lower.

Never max(seen): a transaction that commits later with older values would be skipped for ever.
"""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg import sql

from connectors.postgres import column_types
from connectors.postgres.catalog import WITH_XMIN, Relation
from connectors.postgres.link import Connection, PostgresConfig
from schemas.errors import ConfigError
from schemas.records import Cursor, FarCursor
from schemas.streams import Mode, StreamSpec

#: How far behind now a time window ends where open transactions cannot be seen.
DEFAULT_SETTLE = timedelta(seconds=60)
#: A bound further behind than this is somebody's forgotten transaction: say whose.
_HELD_LONG = timedelta(minutes=10)
#: A backend's xact_start shows in pg_stat_activity a moment after its now() was taken; a
#: transaction inside that moment is not seen as open, so the window ends this much earlier.
_MARGIN = timedelta(milliseconds=100)
#: A bound that would move back by more: say so.
_BACK_SAID = timedelta(seconds=1)
#: Clocks on walls are set back by up to this, always at a whole quarter of an hour.
_SET_BACK, _QUARTER = timedelta(hours=3), timedelta(minutes=15)

_TWO_32 = 2**32
_TWO_31 = 2**31

ALL = sql.SQL("true")
_NOT_ASKED = sql.SQL("NULL")
_XMIN = sql.SQL("xmin")


@dataclass(frozen=True, slots=True)
class Window:
    """A condition on the rows, the cursor before and after them, and what people should know."""

    where: sql.Composable
    lower: Cursor | None
    upper: Cursor | None
    full: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TimeBound:
    """No row that commits from now on carries a time below `at` (unless `exact` is False)."""

    at: datetime | None  # None: unknown, hold the previous bound
    exact: bool
    notes: tuple[str, ...]
    beyond: FarCursor | None = None


#: The time of the statement's arrival, not of its end: it lies before the look at the sessions. The
#: functions beneath pg_stat_activity and pg_prepared_xacts, which those views join with names.
_BOUND = """
SELECT statement_timestamp(), pg_is_in_recovery(),
       pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
       (SELECT p.gid FROM pg_prepared_xact() AS p WHERE p.dbid = here.oid LIMIT 1),
       oldest.xact_start, oldest.pid, {beyond}
FROM (SELECT oid FROM pg_database WHERE datname = current_database()) AS here
LEFT JOIN LATERAL (
  SELECT a.xact_start, a.pid FROM pg_stat_get_activity(NULL) AS a
  WHERE a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid()
    AND (a.datid = here.oid OR a.datid IS NULL)
    AND a.backend_type NOT LIKE 'autovacuum%' AND a.application_name NOT LIKE 'syncward:source%'
  ORDER BY a.xact_start LIMIT 1) AS oldest ON true
"""


def time_bound(
    conn: Connection, stream: StreamSpec, beyond: sql.Composable = _NOT_ASKED
) -> TimeBound:
    """Find how far time has settled. Call before the snapshot is taken, never after.

    A transaction that begins after this call has a later start than the bound; one that is open
    now holds the bound at its start; one that has ended is visible to the later snapshot.
    """
    row = conn.execute(sql.SQL(_BOUND).format(beyond=beyond)).fetchone()
    if row is None:
        raise RuntimeError("one row is selected without a FROM that could be empty")
    far = FarCursor(row[6][0], int(row[6][1])) if row[6] else None
    return replace(_bound(row, stream), beyond=far)


def _bound(row: tuple[Any, ...], stream: StreamSpec) -> TimeBound:
    now, standby, sees_all, prepared, started, pid = row[:6]
    if standby or not sees_all:
        settle = DEFAULT_SETTLE if stream.settle is None else stream.settle
        why = "a standby" if standby else "without pg_read_all_stats open transactions are hidden"
        note = f"inexact: {why}; rows are read {int(settle.total_seconds())} s behind"
        return TimeBound(now - settle, exact=False, notes=(note,))
    if prepared is not None:
        note = f"held back: prepared transaction {prepared!r} is open and its start is unknown"
        return TimeBound(None, exact=True, notes=(note,))
    if started is None or started >= now - _MARGIN:
        return TimeBound(now - _MARGIN, exact=True, notes=())
    held = now - started
    notes = (
        (f"held back {int(held.total_seconds() // 60)} min by the open transaction of pid {pid}",)
        if held > _HELD_LONG
        else ()
    )
    return TimeBound(started - _MARGIN, exact=True, notes=notes)


def full_window() -> Window:
    """Read everything, for streams without a cursor."""
    return Window(ALL, None, None, full=True)


def time_window(
    stream: StreamSpec,
    relation: Relation,
    bound: TimeBound,
    cursor: Cursor | None,
    zone: str,
) -> Window:
    """Make the window of a date or time column from a bound found before the snapshot."""
    column = sql.Identifier(stream.cursor or "")
    kind = relation.categories[stream.cursor or ""][1]
    if kind not in {"timestamptz", "timestamp", "date"}:
        raise ConfigError(f"{stream.name}: {stream.cursor} is a {kind}, which is no point in time")
    lower = _value(stream, cursor)
    notes = bound.notes
    if bound.at is None:
        upper = lower or "-infinity"
    else:
        at = _before_rounding(bound.at, relation, stream.cursor or "")
        upper = _in_column_type(at, kind, zone)
    if lower is not None and lower != "-infinity" and upper < lower:
        notes = (*notes, *_set_back(stream, bound, lower, upper))
        if stream.mode is Mode.APPEND:
            upper = lower  # to move back would read rows twice
        else:
            lower = upper  # what is written meanwhile has times below the old bound
    stored = {"kind": "column", "column": stream.cursor or "", "value": upper}
    if kind == "timestamp":
        notes = (*notes, f"{stream.cursor} has no time zone; read as {zone} wall-clock time")
    if lower is None and bound.at is None:  # all now, and once more next time
        again = None if stream.mode is Mode.APPEND else stored  # None: it begins anew
        return Window(ALL, None, again, full=True, notes=notes)
    below: sql.Composable = sql.SQL("{} < {}").format(column, sql.Literal(upper))
    if kind == "date":
        below = ALL  # a day is not over: its rows are read now and again next time
    # infinity is behind every bound: read in full, and each time where that repeats nothing
    endless = sql.SQL("{} = 'infinity'").format(column)
    if lower is None:
        everything = _everything_below(stream.cursor or "", kind, upper)
        return Window(everything, None, stored, full=True, notes=notes)
    start = sql.SQL("({}::{} - {}::interval)").format(
        sql.Literal(lower), sql.SQL(kind), sql.Literal(f"{stream.overlap.total_seconds()} s")
    )
    where: sql.Composable = sql.SQL("{} >= {} AND {}").format(column, start, below)
    if stream.mode is not Mode.APPEND:
        where = sql.SQL("(({}) OR {})").format(where, endless)
    where = _with_unplaced(stream, relation, where)
    return Window(where, cursor, stored, full=False, notes=notes)


def resumed_window(
    conn: Connection,
    config: PostgresConfig,
    stream: StreamSpec,
    relation: Relation,
    upper: Cursor | None,
) -> Window | None:
    """Make the window of a full read that goes on: up to the bound that it had at its beginning.

    What was written since lies behind that bound and comes with the next window. Inside the
    snapshot. None if the bound means nothing here any more.
    """
    where: sql.Composable = ALL
    if stream.cursor == "xmin":
        here = _snapshot(conn, relation)
        frozen, _ = _previous_xmin(upper, replace(here, oldest=here.next), config)
        if frozen is None:
            return None
        where = _decided(conn, stream, here, None, frozen)
    elif stream.cursor is not None and upper is not None:
        category, kind = relation.categories[stream.cursor]
        value = upper["value"]
        if category == "D" and value != "-infinity":
            where = _everything_below(stream.cursor, kind, value)
    return Window(where, None, upper, full=True)


def _everything_below(name: str, kind: str, upper: str) -> sql.Composed:
    """Make the condition of all rows up to a time; a day is not over, and infinity has no place."""
    column = sql.Identifier(name)
    below = ALL if kind == "date" else sql.SQL("{} < {}").format(column, sql.Literal(upper))
    return sql.SQL("({below} OR {column} = 'infinity' OR {column} IS NULL)").format(
        below=below, column=column
    )


def _set_back(stream: StreamSpec, bound: TimeBound, lower: str, upper: str) -> tuple[str, ...]:
    """Say that time stands before the last bound, where that is more than two looks at once."""
    back = _wall(lower) - _wall(upper)
    if back <= _BACK_SAID or not bound.exact:  # inexact: `settle` waits, nothing is missed
        return ()
    seconds = f"{back.total_seconds():.0f} s"
    if stream.mode is not Mode.APPEND:
        return (f"the source's time is {seconds} before the last bound; read again from there",)
    missed = "rows that it dates in between are missed"
    return (f"inexact: the source's time is {seconds} before the last bound; {missed}",)


def _wall(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=None)


_WITH_DIGITS = re.compile(r"timestamp\(([0-6])\) with(?:out)? time zone")
_FINEST = ("timestamp with time zone", "timestamp without time zone", "date")


def _before_rounding(at: datetime, relation: Relation, name: str) -> datetime:
    """Return a moment that no later one is rounded below: a column may have whole seconds only."""
    type_ = next((c.type for c in relation.shape.columns if c.name == name), "")
    if type_ in _FINEST:
        return at
    digits = _WITH_DIGITS.fullmatch(type_)  # a domain does not say what it is made of
    unit = 10 ** (6 - int(digits[1])) if digits else 1_000_000
    return at.replace(microsecond=at.microsecond // unit * unit)


def _in_column_type(at: datetime, kind: str, zone: str) -> str:
    """Write a moment the way the column's type reads it, sortable as text.

    Without a zone it is the earliest time that a clock on the wall shows from then on: the hour
    that comes twice in autumn holds the bound at its beginning until it comes again.
    """
    if kind == "timestamptz":
        return at.strftime("%Y-%m-%d %H:%M:%S.%f+00")
    from zoneinfo import ZoneInfo  # noqa: PLC0415 - only for columns without a zone

    quarter = _QUARTER.total_seconds()
    first = datetime.fromtimestamp(-(-at.timestamp() // quarter) * quarter, UTC)
    moments = [at, *(first + i * _QUARTER for i in range(_SET_BACK // _QUARTER + 1))]
    local = min(m.astimezone(ZoneInfo(zone)).replace(tzinfo=None) for m in moments)
    return local.strftime("%Y-%m-%d" if kind == "date" else "%Y-%m-%d %H:%M:%S.%f")


def _value(stream: StreamSpec, cursor: Cursor | None) -> str | None:
    if cursor is None or cursor.get("column") != stream.cursor:
        return None
    return cursor["value"]


#: Older servers have NaN only behind all other numbers.
_HAS_INFINITE_NUMERICS = 140_000


def ordered_window(
    conn: Connection, stream: StreamSpec, relation: Relation, cursor: Cursor | None
) -> Window:
    """Make the window of a number, text or uuid column; inside the snapshot. Merge only.

    Values become visible out of order (cached sequences, slow transactions), so this can miss
    rows that commit late: said in the notes, refused for append.
    """
    if stream.mode is Mode.APPEND:
        raise ConfigError(
            f"{stream.name}: append by {stream.cursor} could miss rows that commit out of order; "
            "use cursor: xmin, or mode: merge"
        )
    column = sql.Identifier(stream.cursor or "")
    table = sql.Identifier(stream.schema_name, stream.table_name)
    endless = _endless(conn, relation.categories[stream.cursor or ""][1], column)
    row = conn.execute(
        sql.SQL(
            "SELECT {0}::text FROM {1} AS t WHERE {0} IS NOT NULL AND NOT {2} "
            "ORDER BY t.{0} DESC LIMIT 1"  # without t it would be the text, and 9 behind 10
        ).format(column, table, endless)
    ).fetchone()
    lower, upper = _value(stream, cursor), row[0] if row else None
    stored = {"kind": "column", "column": stream.cursor or "", "value": upper or lower or ""}
    note = f"inexact: rows whose {stream.cursor} commits out of order are missed; prefer xmin"
    if lower is None or upper is None:
        return Window(ALL, None, stored if upper else None, full=True, notes=(note,))
    known = {c.name: c.type for c in relation.shape.columns}
    above = column_types.operator(conn, known.get(stream.cursor or "", ""), ">=")
    where = _with_unplaced(
        stream, relation, sql.SQL("{} {} {}").format(column, above, sql.Literal(lower))
    )
    return Window(where, cursor, stored, full=False, notes=(note,))


def _with_unplaced(stream: StreamSpec, relation: Relation, where: sql.Composable) -> sql.Composable:
    """Add the rows that have no cursor value: they lie in no window, and would never be seen.

    Like those at infinity they are read each time, where that repeats nothing.
    """
    name = stream.cursor or ""
    has_value = any(c.name == name and not c.nullable for c in relation.shape.columns)
    if stream.mode is Mode.APPEND or has_value:
        return where
    return sql.SQL("(({}) OR {} IS NULL)").format(where, sql.Identifier(name))


def _endless(conn: Connection, kind: str, column: sql.Identifier) -> sql.Composable:
    """Tell NaN and infinity from other numbers; they lie in every window, behind its lower end."""
    if kind not in {"float4", "float8", "numeric"}:
        return sql.SQL("false")
    known = kind != "numeric" or conn.info.server_version >= _HAS_INFINITE_NUMERICS
    return sql.SQL("{} >= {}").format(column, sql.Literal("Infinity" if known else "NaN"))


#: Of the timeline: a server that took over writes on a new one at once, which the names of its WAL
#: files show; its control file does after a checkpoint, minutes later. A standby writes none: it is
#: on the newest one that it has received or reached.
_SNAPSHOT = """
SELECT pg_snapshot_xmin(s)::text, pg_snapshot_xmax(s)::text,
       (SELECT system_identifier::text FROM pg_control_system()),
       (CASE WHEN pg_is_in_recovery() THEN
          (SELECT greatest(c.timeline_id, r.min_recovery_end_timeline,
                           (SELECT max(received_tli) FROM pg_stat_wal_receiver))
           FROM pg_control_checkpoint() AS c, pg_control_recovery() AS r)
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END)::text,
       (SELECT 'prepared transaction ' || quote_literal(gid) FROM pg_prepared_xacts
        WHERE transaction::text = xid AND prepared < clock_timestamp() - %(long)s LIMIT 1),
       (SELECT 'the open transaction of pid ' || pid FROM pg_stat_activity
        WHERE backend_xid::text = xid AND xact_start < clock_timestamp() - %(long)s LIMIT 1),
       %(table)s::text, EXISTS (SELECT FROM pg_inherits WHERE inhparent = %(table)s)
FROM pg_current_snapshot() AS s,
LATERAL (SELECT (pg_snapshot_xmin(s)::text::bigint %% 4294967296)::text AS xid) AS oldest
"""
#: Each table below another one, and how it came there: whether in this window, or not decided yet.
#: A table that two others have came with the first of them.
_LINKS = """
WITH RECURSIVE tree (oid, new, late) AS (
  SELECT {table}::oid, false, false
  UNION ALL
  SELECT i.inhrelid, t.new OR {new}, t.late OR {late}
  FROM tree t JOIN (SELECT inhrelid, inhparent, xmin FROM pg_inherits) AS i ON i.inhparent = t.oid)
SELECT array_agg(oid) FILTER (WHERE new AND NOT late), array_agg(oid) FILTER (WHERE late),
       (SELECT min(c.oid::regclass::text) FROM pg_class c JOIN tree ON tree.oid = c.oid
        WHERE c.relkind = 'f')
FROM (SELECT oid, bool_and(new) AS new, bool_and(late) AS late FROM tree GROUP BY oid) AS parts
"""
#: The transaction that made a table: its system columns are written once.
_MADE = "SELECT {} FROM pg_attribute WHERE attrelid = {}::oid AND attname = 'tableoid'"


@dataclass(frozen=True, slots=True)
class _Transactions:
    """Where a server's transactions are, and what server that is.

    A standby that was promoted and a backup that was restored begin a timeline: they may have lost
    the last transactions, and give their numbers out again.
    """

    oldest: int  # still open; all before it are decided
    next: int
    system: str
    timeline: str
    holder: str | None  # of the oldest one, if it has been open for long
    table: str  # the one that is read
    has_parts: bool  # others lie below it, and their rows are read with it


def xmin_window(
    conn: Connection, config: PostgresConfig, stream: StreamSpec, relation: Relation,
    cursor: Cursor | None,
) -> Window:  # fmt: skip
    """Make the window of row versions by the transaction that wrote them; inside the snapshot.

    upper is the oldest transaction still open: everything below it is decided. Row xids have 32
    bits and are compared modulo 2^32 with the 64-bit bounds.
    """
    if relation.kind not in WITH_XMIN:
        raise ConfigError(f"{stream.name}: cursor xmin needs a table; this is a view or foreign")
    here = _snapshot(conn, relation)
    stored = {
        "kind": "xmin", "value": str(here.oldest), "system": here.system,
        "timeline": here.timeline, "table": here.table,
    }  # fmt: skip
    lower, notes = _previous_xmin(cursor, here, config)
    if here.holder is not None:
        notes = (*notes, f"held back by {here.holder}")
    before = (cursor or {}).get("table", here.table)
    if lower is not None and before != here.table:
        other = f"{stream.name} is another table than before"
        if stream.mode is not Mode.APPEND:
            lower, notes = None, (*notes, f"{other}; everything is read again")
        elif not _made_between(conn, here, lower):
            where = _decided(conn, stream, here, None, here.oldest, but=before)
            notes = (*notes, f"{other}; all of its rows are added")
            return Window(where, cursor, stored, full=False, notes=notes)
    where = _decided(conn, stream, here, lower, here.oldest, but=before)
    if lower is None:
        return Window(where, None, stored, full=True, notes=notes)
    return Window(where, cursor, stored, full=False, notes=notes)


def _decided(
    conn: Connection,
    stream: StreamSpec,
    here: _Transactions,
    lower: int | None,
    upper: int,
    *,
    but: str = "",
) -> sql.Composable:
    """Make the condition of the rows that came in [lower, upper), by a write or with their table.

    Without a lower bound that is everything but what is still undecided: versions in [upper, next)
    may be seen or not. A partition that is attached brings rows that were written long before.
    `but` is one that was read before: its rows are no news.
    """
    decided: sql.Composable = sql.SQL("NOT {}").format(_written_between(upper, here.next))
    where = decided if lower is None else _written_between(lower, upper)
    if not here.has_parts:
        return where
    xmin = sql.SQL("i.xmin")
    links = sql.SQL(_LINKS).format(
        table=sql.Literal(here.table),
        new=sql.SQL("false") if lower is None else _written_between(lower, upper, xmin),
        late=_written_between(upper, here.next, xmin),
    )
    new, late, foreign = conn.execute(links).fetchone() or (None, None, None)
    if foreign is not None:
        raise ConfigError(
            f"{stream.name}: {foreign} is a foreign table, whose rows have no xmin here; use a "
            "column as cursor, or read it as a stream of its own"
        )
    new = [oid for oid in new or () if str(oid) != but]
    if new:
        came = sql.SQL("tableoid = ANY({}::oid[])").format(sql.Literal(new))
        where = sql.SQL("({} OR ({} AND {}))").format(where, came, decided)
    if late:
        later = sql.SQL("tableoid <> ALL({}::oid[])").format(sql.Literal(late))
        where = sql.SQL("({} AND {})").format(where, later)
    return where


def _made_between(conn: Connection, here: _Transactions, lower: int) -> bool:
    """Say whether a table was made after this bound, so that all of its rows were."""
    made = sql.SQL(_MADE).format(_written_between(lower, here.next), sql.Literal(here.table))
    row = conn.execute(made).fetchone()
    return row is not None and bool(row[0])


def _snapshot(conn: Connection, relation: Relation) -> _Transactions:
    row = conn.execute(_SNAPSHOT, {"long": _HELD_LONG, "table": relation.oid}).fetchone()
    if row is None:
        raise RuntimeError("pg_current_snapshot() always returns a row")
    oldest, after, system, timeline, prepared, session, *of_table = row
    return _Transactions(int(oldest), int(after), system, timeline, prepared or session, *of_table)


def _previous_xmin(
    cursor: Cursor | None, here: _Transactions, config: PostgresConfig
) -> tuple[int | None, tuple[str, ...]]:
    """Return the last bound if it means the same transactions here; else None, and why."""
    if cursor is None or cursor.get("kind") != "xmin":
        return None, ()
    if cursor["system"] != here.system:
        return None, (f"{config.where} is another server than before; everything is read again",)
    # cursors of versions before this one name no timeline
    if cursor.get("timeline", here.timeline) != here.timeline:
        why = "was restored, or a standby took over, which may have lost the last transactions"
        return None, (f"{config.where} {why}; everything is read again",)
    lower = int(cursor["value"])
    if here.oldest < lower:
        why = "is at an earlier state than before"
        return None, (f"{config.where} {why}; everything is read again",)
    if here.oldest - lower >= _TWO_31:
        return None, ("over 2^31 transactions since the last run; everything is read again",)
    return lower, ()


def _written_between(lower: int, upper: int, xmin: sql.Composable = _XMIN) -> sql.Composable:
    return sql.SQL("((({}::text::bigint - {} + {}) % {}) < {})").format(
        xmin,
        sql.Literal(lower % _TWO_32),
        sql.Literal(_TWO_32),
        sql.Literal(_TWO_32),
        sql.Literal(upper - lower),
    )


def check_cursor_column(stream: StreamSpec, relation: Relation) -> str:
    """Return the type category of the cursor column; ConfigError if it cannot order rows."""
    column = stream.cursor or ""
    if column not in relation.categories:
        times = [n for n, (category, _) in relation.categories.items() if category == "D"]
        raise ConfigError(
            f"{stream.name}: no cursor column {column}; use {', '.join([*times, 'xmin'])}"
        )
    category, name = relation.categories[column]
    if category not in {"D", "N", "S"} and name != "uuid":
        raise ConfigError(
            f"{stream.name}: cursor {column} is a {name}, which has no order; use cursor: xmin"
        )
    return category
