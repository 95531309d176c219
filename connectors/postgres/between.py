"""The rows of a backfill: those whose cursor column lies between two values that a person wrote.

Where they are many they are cut into ranges of the stream's key, as a large full read is.
"""

import psycopg
from psycopg import sql

from connectors.postgres import column_types
from connectors.postgres import ranges as pg_ranges
from connectors.postgres.catalog import Relation, rows_estimated
from connectors.postgres.link import Connection
from connectors.postgres.window import Window
from schemas.errors import ConfigError
from schemas.records import Between, Cursor, Ranges
from schemas.streams import StreamSpec

#: A size or a domain would cut, round or refuse what was written; its order is the column's.
_TYPE = """
WITH RECURSIVE base AS (
  SELECT a.atttypid AS oid, a.attcollation AS collation FROM pg_attribute a
  WHERE a.attrelid = %s AND a.attname = %s::text
  UNION ALL
  SELECT t.typbasetype, b.collation FROM base b JOIN pg_type t ON t.oid = b.oid AND t.typtype = 'd')
SELECT format_type(t.oid, -1), n.nspname::text, c.collname::text
FROM base b JOIN pg_type t ON t.oid = b.oid AND t.typtype <> 'd'
LEFT JOIN pg_collation c ON c.oid = b.collation LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
"""
#: Types that leave an hour or a zone unread without a word, and move the window by it.
_LESS_THAN_A_MOMENT = ("date", "timestamp without time zone")
#: Rows of the table looked at to find bounds: so many at least, and so many for each range of all.
_SAMPLE = 200_000
_SAMPLE_OF_EACH = 1_000
#: As text, where the share of the window's rows before it passes the next n-th. None if the sample
#: says that the window is less than two ranges.
_BOUNDS = """
WITH _syncward_sample AS (
  SELECT {key}, row_number() OVER (ORDER BY {key}) - 1 AS _syncward_place
  FROM {table} TABLESAMPLE SYSTEM ({share}) REPEATABLE (0) WHERE {window}),
_syncward_counted AS (SELECT count(*) AS _syncward_rows FROM _syncward_sample),
_syncward_cut AS (
  SELECT _syncward_rows, least(floor(_syncward_rows * {times} / {each})::bigint,
    CASE WHEN {few} OR _syncward_rows * {times} * 2 < {rows} THEN {most} END) AS _syncward_n
  FROM _syncward_counted)
SELECT {texts} FROM _syncward_sample, _syncward_cut
WHERE _syncward_n > 1 AND _syncward_place > 0
  AND _syncward_place * _syncward_n / _syncward_rows
    <> (_syncward_place - 1) * _syncward_n / _syncward_rows
ORDER BY _syncward_place
"""


def window(conn: Connection, stream: StreamSpec, relation: Relation, between: Between) -> Window:
    """Make the condition; outside of the snapshot, as a value that cannot be read would end it."""
    if stream.cursor in {None, "xmin"}:
        raise ConfigError(
            f"{stream.name}: a backfill needs a cursor that is a column; read everything again "
            f"with: syncward run enqueue CONNECTION --full-refresh --stream {stream.name}"
        )
    name = str(stream.cursor)
    found = conn.execute(_TYPE, (relation.oid, name)).fetchone()
    if found is None:
        raise ConfigError(
            f"{stream.name}: column {name} was removed at the source just now; ask again"
        )
    read_as, *collation = found
    lower = _read(conn, stream, "--from", between.lower, read_as)
    upper = _read(conn, stream, "--to", between.upper, read_as)
    ends = {
        "column": sql.Identifier(name),
        "lower": sql.SQL("{}::{}").format(sql.Literal(lower), sql.SQL(read_as)),
        "upper": sql.SQL("{}::{}").format(sql.Literal(upper), sql.SQL(read_as)),
        "from": column_types.operator(conn, read_as, ">="),
        "below": column_types.operator(conn, read_as, "<"),
    }
    order: sql.Composable = sql.SQL("")
    if collation[1] is not None:
        order = sql.SQL(" COLLATE {}").format(sql.Identifier(*collation))
    ordered = conn.execute(
        sql.SQL("SELECT {lower} {below} {upper}{order}").format(**ends, order=order)
    ).fetchone()
    if ordered is None or not ordered[0]:
        raise ConfigError(
            f"{stream.name}: --from is not below --to; rows from the first on are read, up to and "
            "without the second"
        )
    where = sql.SQL("{column} {from} {lower} AND {column} {below} {upper}").format(**ends)
    return Window(where, _cursor(name, lower), _cursor(name, upper), full=False)


def cut(
    conn: Connection, stream: StreamSpec, relation: Relation, window: Window, ranges: Ranges
) -> pg_ranges.Cut | None:
    """Find where a large window is cut; None if it is read in one piece.

    What is kept goes on, if it is of this window. Inside the snapshot. Rows that are equal in the
    stream's key are read in one range, so they never meet at the destination as they were at two
    times.
    """
    key = pg_ranges.key_of(stream, relation)
    if not key or not set(key) <= set(stream.key) or stream.mask:
        return None
    kept = ranges.kept
    if kept is not None and kept.upper == window.upper:
        return pg_ranges.Cut(key, kept.bounds, kept)
    rows = rows_estimated(conn, relation)
    if rows < 2 * ranges.rows:
        return None
    share = min(1.0, max(_SAMPLE, rows // ranges.rows * _SAMPLE_OF_EACH) / rows)
    columns = [sql.Identifier(name) for name in key]
    found = conn.execute(
        sql.SQL(_BOUNDS).format(
            texts=sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns),
            key=sql.SQL(", ").join(columns),
            # each range may go through all of the window, or through its share of the table
            few=sql.Literal(pg_ranges.scattered(conn, stream, key)),
            most=sql.Literal(pg_ranges.SCATTERED),
            times=sql.Literal(1 / share),
            rows=sql.Literal(rows),
            each=sql.Literal(ranges.rows),
            table=sql.Identifier(stream.schema_name, stream.table_name),
            share=sql.Literal(100 * share),
            window=sql.SQL("({}) AND {}").format(window.where, relation.rows),
        )
    ).fetchall()
    return pg_ranges.Cut(key, tuple(tuple(row) for row in found)) if found else None


def _read(conn: Connection, stream: StreamSpec, option: str, value: str, type_: str) -> str:
    """Have the source read a value, and return it as the source writes it."""
    read = sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(type_))
    whole: sql.Composable = sql.SQL("true")
    if type_ in _LESS_THAN_A_MOMENT:
        whole = sql.SQL("{}::timestamptz::timestamp = {}").format(sql.Literal(value), read)
    try:
        row = conn.execute(sql.SQL("SELECT {}::text, {}").format(read, whole)).fetchone()
    except psycopg.DataError:
        raise ConfigError(
            f"{stream.name}: {option} is nothing that the source reads as {type_}, the type of "
            f"its cursor column {stream.cursor}; write it as Postgres does"
        ) from None
    if row is None:
        raise RuntimeError("a SELECT without FROM returns a row")
    if not row[1]:
        raise ConfigError(
            f"{stream.name}: its cursor column {stream.cursor} is a {type_}, which drops a part of "
            f"{option}: the hour, or the zone; write it without that part"
        )
    return str(row[0])


def _cursor(name: str, value: str) -> Cursor:
    return {"kind": "column", "column": name, "value": value}
