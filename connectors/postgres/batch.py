"""One batch on its way into one table: what it is, how it is staged, and the SQL of its parts."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import Any

import psycopg
from psycopg import sql

from connectors.postgres import column_types, tuples
from connectors.postgres import keys as pg_keys
from connectors.postgres import rows as pg_rows
from connectors.postgres.link import Connection, PostgresConfig
from connectors.postgres.refusals import (
    Care,
    Reason,
    Refusals,
    Refused,
    digest_of,
    reason_of,
    unless_refused,
)
from connectors.shape_changes import widens
from schemas.records import (
    Batch,
    Column,
    KeySweep,
    LoadRequest,
    SchemaChange,
    StreamShape,
    WireFormat,
)
from schemas.streams import Deletes, Mode

#: Our columns in destination tables: when this row version was loaded, and since when its source
#: row is gone.
SYNCED_AT = "_syncward_synced_at"
DELETED_AT = "_syncward_deleted_at"
#: In a history: from when, and until when, runs saw this version of its row; NULL: it is current.
VALID_FROM = "_syncward_valid_from"
VALID_TO = "_syncward_valid_to"
STAGING = sql.Identifier("pg_temp", "syncward_staging")
KEYS = sql.Identifier("pg_temp", "syncward_keys")
GONE = sql.Identifier("pg_temp", "syncward_gone")
#: Keys of rows that are not in the staging table because they were refused, which are not gone.
REFUSED = sql.Identifier("pg_temp", "syncward_refused")
_PLACE = sql.Identifier("_syncward_place")
#: Staged rows from which on statistics pay for themselves.
_ANALYZE_FROM = 1_000
#: Statistics target for a key's columns: 300 rows are looked at for each.
_KEY_SAMPLE = 20
#: Memory of a join over a batch: what it needs, up to this, if the server gives less by itself.
_WORK_MEM_MAX = 64 * 2**20

#: Record image: json, xml and point have no equality, and 1.0 is not 1.00.
_DIFFERS = sql.SQL("ROW({})::record *<> ROW({})::record")


@dataclass(frozen=True, slots=True)
class Hidden:
    """A table beside the target that holds all rows of a large full read, range after range."""

    table: sql.Identifier
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """One batch on its way into one table, inside the caller's transaction."""

    conn: Connection
    config: PostgresConfig
    request: LoadRequest
    batch: Batch
    rewrite: bool  # the table's content becomes the batch, also for append
    seen_shape: str | None = None  # `schema_hash` of what was loaded last
    seen: Mapping[str, Sequence[Any]] | None = None  # its columns: number and type of each
    #: what of the batch the table takes, in its types; None: all as it is
    carried: tuple[Column, ...] | None = None
    changes: tuple[SchemaChange, ...] = ()  # what is done to the table for this batch
    #: does it; readers wait from then on, so the rows are staged before
    pending: Callable[[], None] | None = None
    stamps: bool = False  # the table has a column that says since when a row is deleted
    hidden: Hidden | None = None  # where the rows are already; None: they come with the batch
    since: datetime | None = None  # in a history: when the versions of this load begin, others end
    #: rows that are refused are left out and noted here (rejects.py); None: they end the load
    refusals: Refusals | None = None

    @property
    def table(self) -> sql.Identifier:
        return sql.Identifier(self.request.target_schema, self.request.stream.table_name)

    @property
    def name(self) -> str:
        return f"{self.request.target_schema}.{self.request.stream.table_name}"

    @property
    def shape(self) -> StreamShape:
        return self.batch.shape

    @property
    def columns(self) -> Sequence[Column]:
        """The columns that are written, in the target's types."""
        return self.batch.shape.columns if self.carried is None else self.carried

    @property
    def deletion(self) -> Deletes:
        """What becomes of rows that are gone; a rewritten table has nothing but the batch.

        In a history they go from the current ones: their versions end, and none is removed.
        """
        said = self.request.stream.deletion
        ends = self.is_history and said is Deletes.SOFT
        return Deletes.HARD if self.rewrite or ends else said

    @property
    def is_history(self) -> bool:
        """Say whether the table keeps what its rows were before."""
        return self.request.stream.mode is Mode.HISTORY

    @property
    def moment(self) -> sql.Literal:
        """In a history: the time at which versions end and begin."""
        if self.since is None:
            raise RuntimeError("a history is changed before the load's time is known")
        return sql.Literal(self.since)

    @property
    def covers_all(self) -> bool:
        """Whether a row that is not in the batch is gone from the source."""
        append = self.request.stream.mode is Mode.APPEND
        return self.rewrite if append else self.batch.everything

    @property
    def through_staging(self) -> bool:
        """Say whether rows do not go into the table as they come: this server reads them first."""
        return (
            self.pending is not None
            or self.refusals is not None
            or tuple(self.columns) != self.shape.columns
            or self.needs_reading
        )

    @property
    def needs_reading(self) -> bool:
        """Say whether some column comes as text and is of another type."""
        return any(c.as_text and c.type != "text" for c in self.columns)

    @property
    def key(self) -> tuple[Column, ...]:
        """The columns of the key as they come; () if the stream has none."""
        known = {c.name: c for c in self.shape.columns}
        return tuple(known[name] for name in self.request.stream.key or self.shape.key)

    @property
    def staging(self) -> sql.Identifier:
        """The table of the batch's rows, before they are rows of the target."""
        return STAGING if self.hidden is None else self.hidden.table

    @property
    def served(self) -> sql.Composable:
        """The condition of rows that readers take for rows of the source."""
        if self.is_history:
            return sql.SQL("{} IS NULL").format(sql.Identifier(VALID_TO))
        alive = sql.SQL("{} IS NULL").format(sql.Identifier(DELETED_AT))
        return alive if self.stamps else sql.SQL("true")


#: A binary COPY without a row: its header and its end.
_NO_ROWS = 19 + 2


def brings_rows(load: Load) -> bool:
    """Look at the beginning of the batch, and put it back: False if the source sent no row.

    The key of one that is gone is something to do, too.
    """
    batch, seen = load.batch, list[bytes]()
    if batch.wire is WireFormat.ROWS:
        first = next(batch.groups, None)
        batch.groups = chain(() if first is None else (first,), batch.groups)
        return first is not None or _brings_gone(batch)
    for chunk in batch.chunks:
        seen.append(chunk)
        if sum(map(len, seen)) > _NO_ROWS:
            break
    else:
        batch.chunks = iter(seen)
        return batch.rows() > 0
    batch.chunks = chain(seen, batch.chunks)
    return True


def _brings_gone(batch: Batch) -> bool:
    if batch.gone is None:
        return False
    first = next(batch.gone.groups, None)
    groups = chain(() if first is None else (first,), batch.gone.groups)
    batch.gone = replace(batch.gone, groups=groups)
    return first is not None


def copy_into(load: Load, table: sql.Composable) -> tuple[int, int]:
    """Relay the batch into a table; return (rows by this server's count, bytes)."""
    if load.refusals is not None and load.refusals.care is Care.ROWS:
        return _copy_rows(load, load.refusals, table)
    size = 0
    cursor = load.conn.cursor()
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        table, names(load.shape.columns)
    )
    with cursor.copy(statement) as copy:
        if load.batch.wire is WireFormat.ROWS:
            size = pg_rows.write(copy, load.batch.groups, load.shape.columns, load.request.stream)
        for chunk in load.batch.chunks:
            copy.write(chunk)
            size += len(chunk)
    return cursor.rowcount, size


def _copy_rows(load: Load, refusals: Refusals, table: sql.Composable) -> tuple[int, int]:
    """Copy the batch without the rows that the table's types refuse; these are noted."""

    def refused(row: tuples.Rows, error: psycopg.Error) -> None:
        reason = reason_of(error, [c.name for c in load.shape.columns])
        refusals.add([_refused(load, row, reason)], error)

    rows = tuples.blocks(load.batch.chunks, load.batch.groups)
    into = tuples.Table(load.conn, table, load.shape.columns, load.request.stream)
    counts = into.copy(rows, refused)
    refusals.left_out = refusals.count
    return counts


def _refused(load: Load, row: tuples.Rows, reason: Reason) -> Refused:
    """Describe a row that did not come into the staging table by its key, if it has one."""
    key = load.key
    if not key:
        return Refused(tuples.digest(row), None, reason, Care.ROWS)
    stream, kept = load.request.stream, row.columns([load.shape.columns.index(c) for c in key])
    found: tuple[bytes, dict[str, str | None]] | None = None

    def unread(_: tuples.Rows, error: psycopg.Error) -> None:
        raise error

    with unless_refused(load.conn):  # the key may be none here
        tuples.Table(load.conn, REFUSED, key, stream).copy(iter((kept,)), unread)
        found = load.conn.execute(
            sql.SQL("SELECT {}, {} FROM {} s ORDER BY {} DESC LIMIT 1").format(
                key_digest(load), key_text(load), REFUSED, _PLACE
            )
        ).fetchone()
    if found is None:
        encoding = load.conn.info.parameter_status("server_encoding") or ""
        came = tuples.shown(kept, key, encoding)
        return Refused(digest_of(came), came, reason, Care.ROWS, readable=False)
    return Refused(found[0], found[1], reason, Care.ROWS)


def make_refused(load: Load) -> None:
    """Make the table of the keys of rows that are left out."""
    if load.key:
        _make_temp(load, REFUSED, load.key)
        load.conn.execute(
            sql.SQL("ALTER TABLE {} ADD {} bigint GENERATED ALWAYS AS IDENTITY").format(
                REFUSED, _PLACE
            )
        )


@dataclass(frozen=True, slots=True)
class Staged:
    """What of a batch is in temporary tables."""

    rows: int
    bytes: int
    keys: int | None  # of all source rows; None if this run brings none
    gone: int  # keys of rows that the source says are gone


def stage(load: Load) -> Staged:
    """Copy the batch into temporary tables without constraints, and then change the target.

    From there on readers of it wait, so all that the source has to send is here before.
    """
    if load.refusals is not None:
        make_refused(load)
    if load.hidden is not None:
        rows, size = load.hidden.rows, load.hidden.bytes
    else:
        _make_temp(load, STAGING, load.shape.columns)
        rows, size = copy_into(load, STAGING)
    keys = None if load.batch.keys is None else _keys_into(load, load.batch.keys, KEYS)
    gone = 0 if load.batch.gone is None else _keys_into(load, load.batch.gone, GONE)
    if load.pending is not None:
        load.pending()
    if rows >= _ANALYZE_FROM:
        analyze(load, load.staging)
        wanted = min(2 * size, _WORK_MEM_MAX) // 1024
        load.conn.execute(_MORE_MEMORY, (wanted, wanted))
    return Staged(rows, size, keys, gone)


def analyze(load: Load, table: sql.Identifier) -> None:
    """Tell the planner how many rows there are and what their key is like, which joins go by.

    Statistics of the other columns are the dear part (documents, arrays), and no use here. A small
    sample tells of a key what a large one does; the server's own look at all columns comes later.
    """
    key = load.request.stream.key or load.shape.key
    if not key:
        load.conn.execute(sql.SQL("ANALYZE {}").format(table))
        return
    columns = sql.SQL(", ").join(map(sql.Identifier, key))
    load.conn.execute(
        sql.SQL("SET LOCAL default_statistics_target = {}; ANALYZE {} ({})").format(
            _KEY_SAMPLE, table, columns
        )
    )


#: For this transaction; never less than the server's own setting.
_MORE_MEMORY = """
SELECT set_config('work_mem', %s::bigint || 'kB', true) FROM pg_settings
WHERE name = 'work_mem' AND setting::bigint < %s::bigint
"""


def _keys_into(load: Load, keys: KeySweep, table: sql.Identifier) -> int:
    known = {column.name: column for column in load.shape.columns}
    _make_temp(load, table, [known[column.name] for column in keys.columns])
    if load.refusals is not None and load.refusals.care is Care.ROWS:
        columns = [known[column.name] for column in keys.columns]
        into = tuples.Table(load.conn, table, columns, load.request.stream)
        # A key that is none here cannot be that of a row here, and its row is refused, too.
        return into.copy(tuples.blocks(keys.chunks, keys.groups), lambda *_: None)[0]
    cursor = load.conn.cursor()
    copied = names(keys.columns)
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(table, copied)
    with cursor.copy(statement) as copy:
        if load.batch.wire is WireFormat.ROWS:
            came = [known[column.name] for column in keys.columns]
            pg_rows.write(copy, keys.groups, came, load.request.stream)
        for chunk in keys.chunks:
            copy.write(chunk)
    rows = cursor.rowcount
    if rows >= _ANALYZE_FROM:
        load.conn.execute(sql.SQL("ANALYZE {}").format(table))
    return rows


def _make_temp(load: Load, table: sql.Identifier, columns: Sequence[Column]) -> None:
    load.conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(table))
    load.conn.execute(
        sql.SQL("CREATE TEMP TABLE {} ({}) ON COMMIT DROP").format(table, as_they_come(columns))
    )


def as_they_come(columns: Sequence[Column]) -> sql.Composed:
    """Define columns that take what the source sends, without any constraint."""
    return sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(c.name), sql.SQL("text" if c.as_text else c.type))
        for c in columns
    )


def interferes(load: Load) -> bool:
    """Say whether something of the target's own may swallow rows without a word.

    Then what is not written must not be taken for unchanged. Partitions have triggers of their own.
    """
    table = sql.Literal(load.table.as_string(load.conn))
    row = load.conn.execute(
        sql.SQL(
            "WITH RECURSIVE parts (oid) AS (SELECT {}::regclass::oid UNION "
            "SELECT i.inhrelid FROM parts p JOIN pg_inherits i ON i.inhparent = p.oid) "
            "SELECT c.relhasrules OR row_security_active(c.oid) OR EXISTS ("
            "SELECT FROM pg_trigger g JOIN parts p ON p.oid = g.tgrelid "
            "WHERE NOT g.tgisinternal AND g.tgenabled <> 'D' AND g.tgtype & 2 = 2) "
            "FROM pg_class c WHERE c.oid = {}::regclass"
        ).format(table, table)
    ).fetchone()
    return row is not None and bool(row[0])


# ── pieces of SQL ────────────────────────────────────────────────────────────────────────────


def names(columns: Sequence[Column]) -> sql.Composed:
    """Name columns."""
    return sql.SQL(", ").join(sql.Identifier(c.name) for c in columns)


def typed(load: Load, alias: str = "s.") -> sql.Composed:
    """Name the staged columns as the table's types: those that came otherwise are read here."""
    return sql.SQL(", ").join(values(load, alias))


#: A cast to these cuts off what is too long without a word; an assignment refuses it.
_CUTS = re.compile(r"(character varying|bit varying)\([0-9]+\)((?:\[\])*)")

#: A cast to a type of less digits rounds without a word; no type reads the text that this makes.
_EXACTLY = (
    "CASE WHEN {read}::{came} = {value} THEN {read} ELSE ('no ' || {value}::text)::{type} END"
)


def values(load: Load, alias: str) -> list[sql.Composed]:
    """Return each staged column as a value of the table's type."""
    came = {c.name: c.type for c in load.shape.columns if not c.as_text}
    return [_value(c, came.get(c.name), alias) for c in load.columns]


def _value(column: Column, came: str | None, alias: str) -> sql.Composed:
    """Read one column as the table's type; an error of a value that it would round."""
    value = sql.SQL("{}{}").format(sql.SQL(alias), sql.Identifier(column.name))
    if came == column.type:
        return value
    type_ = sql.SQL(_CUTS.sub(r"\1\2", column.type))
    read = sql.SQL("{}::{}").format(value, type_)
    if came is None or not widens(column.type, came) or _CUTS.fullmatch(column.type):
        return read
    return sql.SQL(_EXACTLY).format(value=value, read=read, came=sql.SQL(came), type=type_)


def key_text(load: Load, alias: str = "s.") -> sql.Composed:
    """Make one JSON object of the text of each column of the key."""
    written = dict(zip((c.name for c in load.columns), values(load, alias), strict=True))
    return sql.SQL("jsonb_build_object({})").format(
        sql.SQL(", ").join(
            sql.SQL("{}::text, ({})::text").format(
                sql.Literal(c.name),
                written.get(c.name)
                or sql.SQL("{}{}").format(sql.SQL(alias), sql.Identifier(c.name)),
            )
            for c in load.key
        )
    )


def as_it_came(load: Load, alias: str = "s.") -> sql.Composed:
    """Make the same object of the key as it came, whether or not that can be read here."""
    return sql.SQL("jsonb_build_object({})").format(
        sql.SQL(", ").join(
            sql.SQL("{}::text, {}{}::text").format(
                sql.Literal(c.name), sql.SQL(alias), sql.Identifier(c.name)
            )
            for c in load.key
        )
    )


def key_digest(load: Load, alias: str = "s.") -> sql.Composed:
    """Make the digest by which a refused row is known again: that of its key, or of all of it."""
    if load.key:
        return sql.SQL("sha256(convert_to({}::text, 'UTF8'))").format(key_text(load, alias))
    images = column_types.images(load.columns, values(load, alias))
    return sql.SQL("sha256(record_send(ROW({})))").format(images)


def same(load: Load, key: Sequence[str]) -> sql.Composable:
    """Make the condition that `t` and `s` are the same row by its key."""
    return sql.SQL(" AND ").join(
        column_types.equal(load.conn, column) for column in load.columns if column.name in key
    )


def dead(load: Load) -> sql.Composable | None:
    """Make the condition that the staged row `s` says itself that it is deleted; None: cannot."""
    if load.request.stream.tombstone is None:
        return None
    return pg_keys.is_dead(load.request.stream, load.shape.columns, "s.")


def parts(
    load: Load, key: Sequence[str], staged: sql.Composable | None = None
) -> dict[str, sql.Composable]:
    """Return the parts of which the statements of a load are made, of all staged rows or some."""
    here = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in load.columns)
    read = typed(load)
    differs: sql.Composable = _DIFFERS.format(here, read)
    stamped: sql.Composable = sql.SQL("")
    stamp = born = stamped
    if load.stamps:
        column, says = sql.Identifier(DELETED_AT), dead(load) or sql.SQL("false")
        stamped = sql.SQL(", {}").format(column)
        stamp = sql.SQL(", CASE WHEN {} THEN coalesce(t.{}, now()) END").format(says, column)
        born = sql.SQL(", CASE WHEN {} THEN now() END").format(says)
        differs = sql.SQL("({} OR (t.{} IS NOT NULL) <> ({}))").format(differs, column, says)
    current = same(load, key)
    if load.is_history:
        current = sql.SQL("{} AND t.{} IS NULL").format(current, sql.Identifier(VALID_TO))
    return {
        "table": load.table,
        "staging": staged or load.staging,
        "columns": names(load.columns),
        "typed": read,
        "synced": sql.Identifier(SYNCED_AT),
        "stamped": stamped,  # the column of the stamp, and what an update or an insert puts there
        "stamp": stamp,
        "born": born,
        "same": current,
        "differs": differs,
    }
