"""Take a stream's rows out of its table, keep them for a while, bring them back.

The rows move and the table stays: views, grants and indexes of it stay with it, and whoever reads
sees all rows or none. They lie in a table of the state schema, which readers have no right to, and
`_syncward.purged` says until when; the first run of the stream after that removes them for good.
Each step is one transaction under the run's fence, with the cursor, so that a half of it is none.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from connectors.postgres.link import Connection
from schemas.errors import ConfigError, SyncwardError
from schemas.limits import PURGE_UNDO_FOR
from schemas.records import Cursor, LoadRequest

SCHEMA = "_syncward"

CREATE = """
CREATE TABLE IF NOT EXISTS _syncward.purged (
  connection_id uuid NOT NULL,
  stream text NOT NULL,
  target_schema text NOT NULL,
  target_table text NOT NULL,
  kept text NOT NULL,
  rows bigint NOT NULL,
  generation bigint NOT NULL,
  cursor jsonb,
  reads text,
  purged_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  until timestamptz NOT NULL,
  PRIMARY KEY (connection_id, stream)
)
"""
#: An expression for a statement that takes a stream's state: what is kept for no longer.
EXPIRED = """
(SELECT p.kept FROM _syncward.purged p WHERE p.connection_id = %(connection)s
  AND p.stream = %(stream)s AND p.until < clock_timestamp())
"""
_KEPT = """
SELECT kept, target_schema, target_table, rows, generation, cursor, reads,
  to_char(until AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI')
FROM _syncward.purged WHERE connection_id = %(connection)s AND stream = %(stream)s
"""
_FORGET = (
    "DELETE FROM _syncward.purged WHERE connection_id = %(connection)s AND stream = %(stream)s"
)
_FORGET_CURSOR = (
    "UPDATE _syncward.purged SET cursor = NULL, reads = NULL "
    "WHERE connection_id = %(connection)s AND stream = %(stream)s"
)
_REMEMBER = """
INSERT INTO _syncward.purged (connection_id, stream, target_schema, target_table, kept, rows,
  generation, cursor, reads, until)
VALUES (%(connection)s, %(stream)s, %(schema)s, %(table)s, %(kept)s, %(rows)s, %(generation)s,
  %(cursor)s, %(reads)s, clock_timestamp() + %(for)s)
"""
#: What a table says that has other columns, types or conditions than the rows that are to come.
_DOES_NOT_TAKE = (
    psycopg.errors.UndefinedColumn,
    psycopg.errors.DatatypeMismatch,
    psycopg.DataError,
    psycopg.IntegrityError,
)
#: What a foreign key would do to rows of other tables, which no undo brings back.
_TOUCHES_OTHERS = """
SELECT FROM pg_constraint WHERE contype = 'f' AND confrelid = %s::regclass
  AND conrelid <> confrelid AND confdeltype IN ('c', 'n', 'd') LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows that were purged and can be brought back."""

    table: str
    target: tuple[str, str]
    rows: int
    generation: int
    cursor: Cursor | None
    reads: str | None
    until: str


def find(conn: Connection, request: LoadRequest) -> Kept | None:
    """Return what is kept of a stream; None if nothing is."""
    row = conn.execute(_KEPT, _names(request)).fetchone()
    if row is None:
        return None
    table, schema, name, *rest = row
    return Kept(table, (schema, name), *rest)


def put_away(
    conn: Connection, request: LoadRequest, *, generation: int, cursor: Cursor | None,
    reads: str | None,
) -> int:  # fmt: skip
    """Move all rows out of the table and remember where they were read to; return how many."""
    before = find(conn, request)
    if before is not None:
        raise ConfigError(
            f"{request.stream.name}: {before.rows} rows of an earlier purge are kept until "
            f"{before.until} UTC; bring them back with --undo, or remove them and these with --now"
        )
    table, kept = _locked(conn, request), _kept_name(request)
    there = sql.Identifier(SCHEMA, kept)
    conn.execute(sql.SQL("CREATE TABLE {} (LIKE {})").format(there, table))
    rows = conn.execute(sql.SQL("INSERT INTO {} SELECT * FROM {}").format(there, table)).rowcount
    _empty(conn, request, table, rows)
    conn.execute(
        _REMEMBER,
        {
            **_names(request),
            "schema": request.target_schema,
            "table": request.stream.table_name,
            "kept": kept,
            "rows": rows,
            "generation": generation,
            "cursor": None if cursor is None else Jsonb(cursor),
            "reads": reads,
            "for": PURGE_UNDO_FOR,
        },
    )
    return rows


def delete(conn: Connection, request: LoadRequest) -> int:
    """Delete all rows for good, and those that are kept; return how many the table had."""
    table = _locked(conn, request)
    row = conn.execute(sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
    rows = int(row[0]) if row else 0
    _empty(conn, request, table, rows)
    before = find(conn, request)
    if before is not None and not remove(conn, request, before.table):
        raise ConfigError(
            f"{request.stream.name}: something depends on {SCHEMA}.{before.table}, which keeps the "
            "rows of an earlier purge; nothing was changed. Drop what depends on it (a view?), "
            "then purge again"
        )
    return rows


def bring_back(conn: Connection, request: LoadRequest, *, generation: int) -> Kept:
    """Move the kept rows back; ConfigError if a run has loaded the stream since."""
    kept = find(conn, request)
    name = request.stream.name
    if kept is None:
        raise ConfigError(
            f"{name}: no purged rows are kept; they are for {PURGE_UNDO_FOR.days} days, and not "
            "after --now. Load them again with: syncward run enqueue CONNECTION"
        )
    if kept.target != (request.target_schema, request.stream.table_name):
        raise ConfigError(
            f"{name}: the kept rows are of {'.'.join(kept.target)}, and the stream goes elsewhere "
            "now; set the target schema as it was to bring them back"
        )
    table = _locked(
        conn,
        request,
        then=f"make it again, with its key, e.g. as CREATE TABLE (LIKE {SCHEMA}.{kept.table}), and "
        "undo once more; or load everything with: syncward run enqueue CONNECTION",
    )
    some = conn.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(table)).fetchone()
    if some is not None or kept.generation != generation:
        raise ConfigError(
            f"{name}: a run has loaded it since it was purged, and its rows are newer than the "
            "kept ones; there is nothing to undo. Remove those with --now, or leave them until "
            f"{kept.until} UTC"
        )
    there = sql.Identifier(SCHEMA, kept.table)
    columns = _columns(conn, there, table)
    try:
        with conn.transaction():
            came = conn.execute(
                sql.SQL(
                    "INSERT INTO {} ({columns}) OVERRIDING SYSTEM VALUE SELECT {columns} FROM {}"
                ).format(table, there, columns=columns)
            ).rowcount
    except _DOES_NOT_TAKE as error:
        raise ConfigError(
            f"{name}: the table was changed since it was purged and does not take the kept rows; "
            f"change it back, or copy them by hand from {SCHEMA}.{kept.table}"
        ) from error
    if came != kept.rows:
        raise _interferes(request)
    remove(conn, request, kept.table)
    return kept


def forget_cursor(conn: Connection, request: LoadRequest) -> None:
    """Let rows that come back be read from their beginning: somebody has reset the stream."""
    conn.execute(_FORGET_CURSOR, _names(request))


def remove(conn: Connection, request: LoadRequest, kept: str) -> bool:
    """Remove kept rows for good; False where somebody's view needs them: they stay."""
    try:
        with conn.transaction():
            conn.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(SCHEMA, kept)))
            conn.execute(_FORGET, _names(request))
    except psycopg.errors.DependentObjectsStillExist:
        return False
    return True


def _locked(
    conn: Connection, request: LoadRequest, then: str = "the next run makes it and loads everything"
) -> sql.Identifier:
    """Name the stream's table, and keep other writers away; readers go on."""
    table = sql.Identifier(request.target_schema, request.stream.table_name)
    try:
        conn.execute(sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(table))
    except (psycopg.errors.UndefinedTable, psycopg.errors.WrongObjectType):
        raise ConfigError(
            f"{request.stream.name}: there is no table {request.target_schema}."
            f"{request.stream.table_name}; nothing was changed: {then}"
        ) from None
    ours = conn.execute(
        "SELECT row_security_active(attrelid) FROM pg_attribute WHERE attrelid = %s::regclass "
        "AND attname = '_syncward_synced_at' AND NOT attisdropped",
        (table.as_string(conn),),
    ).fetchone()
    if ours is None:
        raise ConfigError(
            f"{request.stream.name}: table {request.target_schema}.{request.stream.table_name} "
            "was not made by Syncward; its rows are not taken away"
        )
    if ours[0]:  # rows that this login does not see would stay
        raise _interferes(request)
    return table


def _empty(conn: Connection, request: LoadRequest, table: sql.Identifier, rows: int) -> None:
    """Delete all rows; whoever reads keeps what they see until their statement ends."""
    needed = ConfigError(
        f"{request.stream.name}: another table's foreign key needs its rows, or would delete or "
        "change its own with them; nothing was changed. Drop that constraint at the destination "
        "first"
    )
    if conn.execute(_TOUCHES_OTHERS, (table.as_string(conn),)).fetchone() is not None:
        raise needed
    try:
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")  # else the commit would say it, less clearly
        deleted = conn.execute(sql.SQL("DELETE FROM {}").format(table)).rowcount
    except psycopg.errors.ForeignKeyViolation:
        raise needed from None
    left = conn.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(table)).fetchone()
    if deleted != rows or left is not None:
        raise _interferes(request)


def _interferes(request: LoadRequest) -> SyncwardError:
    return SyncwardError(
        f"{request.stream.name}: not all rows could be moved; a trigger, rule or policy of the "
        "table interferes; nothing was changed",
        code="rows_missing",
    )


def _columns(conn: Connection, kept: sql.Identifier, table: sql.Identifier) -> sql.Composed:
    """Name the columns of the kept rows that the table does not compute itself."""
    rows = conn.execute(
        "SELECT k.attname::text FROM pg_attribute k LEFT JOIN pg_attribute t "
        "ON t.attrelid = %s::regclass AND t.attname = k.attname AND NOT t.attisdropped "
        "WHERE k.attrelid = %s::regclass AND k.attnum > 0 AND NOT k.attisdropped "
        "AND coalesce(t.attgenerated, '') = '' ORDER BY k.attnum",
        (table.as_string(conn), kept.as_string(conn)),
    ).fetchall()
    return sql.SQL(", ").join(sql.Identifier(name) for (name,) in rows)


def _kept_name(request: LoadRequest) -> str:
    named = f"{request.connection_id} {request.stream.name}"
    return f"purged_{hashlib.sha256(named.encode()).hexdigest()[:24]}"


def _names(request: LoadRequest) -> dict[str, Any]:
    return {"connection": request.connection_id, "stream": request.stream.name}
