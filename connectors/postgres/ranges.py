"""A large full read as ranges: where a table is cut, and the condition of each range.

It is cut by a key where there is one: values are compared by the source alone, in its own order;
everybody else keeps them as text. Each range is a scan of the key's index, so only keys that a
constraint proves are cut by. A table without one is cut by the place of its rows, which means
something in one snapshot only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from connectors.postgres.catalog import Relation, rows_estimated
from connectors.postgres.link import Connection
from schemas.records import Bound, Kept, Ranges
from schemas.streams import StreamSpec

#: Types whose text means the same value in every session, and whose order needs no extension.
_NUMBERS = {"int2", "int4", "int8", "numeric"}
_TYPES = _NUMBERS | {"text", "varchar", "bpchar", "bytea", "uuid", "bool"}
_TYPES |= {"date", "timestamp", "timestamptz"}
#: Rows looked at to find the bounds: so many at least, and so many for each range.
_SAMPLE = 100_000
_SAMPLE_OF_EACH = 1_000
#: A key without any relation to where its rows lie makes each range read much of the table, so
#: there are no more ranges than this.
SCATTERED = 8
_CORRELATED = 0.5

#: As text, where the share of the rows before it passes the next n-th. No column has names of ours.
_BOUNDS = """
SELECT {texts} FROM (
  SELECT {key}, row_number() OVER (ORDER BY {key}) - 1 AS _syncward_place,
    count(*) OVER () AS _syncward_rows
  FROM {table} TABLESAMPLE SYSTEM ({share}) REPEATABLE (0)) AS sample
WHERE _syncward_place > 0 AND _syncward_place * {n} / _syncward_rows
  <> (_syncward_place - 1) * {n} / _syncward_rows
ORDER BY _syncward_place
"""


#: The place of a row: its page and its number there.
_PLACE = "ctid"
#: Older servers read the whole table for each range of places.
_READS_PLACES = 140_000
#: A table that is no part of others and has none: rows of several would have the same places.
#: Places, and the lock, are for those who may read the whole table, not some columns of it.
_PAGES = """
SELECT pg_relation_size(c.oid) / current_setting('block_size')::bigint
FROM pg_class c JOIN pg_am a ON a.oid = c.relam
WHERE c.oid = %s AND c.relkind IN ('r', 'm') AND a.amname = 'heap'
  AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhparent = c.oid)
  AND has_table_privilege(c.oid, 'SELECT')
"""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a full read is cut: a key of the table and the bounds between the ranges."""

    key: tuple[str, ...]
    bounds: tuple[Bound, ...]
    kept: Kept | None = None  # what the destination has of it already

    @property
    def lasting(self) -> bool:
        """Whether the bounds mean the same rows in another snapshot."""
        return self.key != (_PLACE,)

    @property
    def left(self) -> tuple[int, ...]:
        """The ranges that are still to be read."""
        there = frozenset[int]() if self.kept is None else self.kept.done
        return tuple(n for n in range(len(self.bounds) + 1) if n not in there)

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know."""
        ranges = len(self.bounds) + 1
        if self.kept is None:
            by = f"({', '.join(self.key)})" if self.lasting else "the places of its rows"
            return (f"read in {ranges} ranges of {by}",)
        there = f"{len(self.kept.done)} of {ranges} ranges ({self.kept.rows:,} rows)"
        return (f"goes on: {there} are at the destination already",)

    def within(self, window: sql.Composable, n: int) -> sql.Composed:
        """Make the condition of one range's rows within a window."""
        return sql.SQL("({}) AND {}").format(window, self.where(n))

    def where(self, n: int) -> sql.Composable:
        """Make the condition of the rows of one range; all ranges together are all rows."""
        parts = []
        if n > 0:
            parts.append(self._compared(">=", self.bounds[n - 1]))
        if n < len(self.bounds):
            parts.append(self._compared("<", self.bounds[n]))
        return sql.SQL(" AND ").join(parts) if parts else sql.SQL("true")

    def _compared(self, operator: str, bound: Bound) -> sql.Composed:
        columns, values = map(sql.Identifier, self.key), list(map(sql.Literal, bound))
        if not self.lasting:
            return sql.SQL("{} {} {}::tid").format(*columns, sql.SQL(operator), *values)
        if len(self.key) == 1:
            return sql.SQL("{} {} {}").format(*columns, sql.SQL(operator), *values)
        return sql.SQL("({}) {} ({})").format(
            sql.SQL(", ").join(columns), sql.SQL(operator), sql.SQL(", ").join(values)
        )


def key_of(stream: StreamSpec, relation: Relation) -> tuple[str, ...]:
    """Return the key to cut by; () if the table has none that serves.

    One inside the stream's own key where there is one: then rows that are equal in the stream's
    key are read in one range, so by one snapshot, and there is no such pair.
    """
    inside = [key for key in relation.keys if set(key) <= set(stream.key)]
    key = (*inside, *relation.keys, ())[0]
    known = {column.name: column for column in relation.shape.columns}
    for name in key:
        plain = known[name].type == "text" or not (known[name].as_text or known[name].extension)
        if not plain or relation.categories[name][1] not in _TYPES:
            return ()
    return key


def resumed(
    stream: StreamSpec, relation: Relation, digest: str, ranges: Ranges | None
) -> Kept | None:
    """Return what is kept of this read, if it is of the very same columns and key."""
    kept = None if ranges is None else ranges.kept
    if kept is None or kept.shape != digest:
        return None
    columns = {len(bound) for bound in kept.bounds}
    return kept if columns <= {len(key_of(stream, relation))} else None


def cut(conn: Connection, stream: StreamSpec, relation: Relation, ranges: Ranges) -> Cut | None:
    """Find the bounds of a large table from a sample of its keys; None if it is read in one piece.

    Inside the snapshot. Costs two short questions, for large tables only.
    """
    # Bounds are stored at the destination, where nothing of a masked stream may come in clear.
    if stream.mask:
        return None
    rows = rows_estimated(conn, relation)
    if rows < 2 * ranges.rows:
        return None
    key, n = key_of(stream, relation), rows // ranges.rows
    if not key:
        return _by_place(conn, stream, relation, n)
    if scattered(conn, stream, key):
        n = min(n, SCATTERED)
    wanted = max(_SAMPLE, n * _SAMPLE_OF_EACH)
    columns = [sql.Identifier(name) for name in key]
    found = conn.execute(
        sql.SQL(_BOUNDS).format(
            texts=sql.SQL(", ").join(sql.SQL("{}::text").format(column) for column in columns),
            key=sql.SQL(", ").join(columns),
            table=sql.Identifier(stream.schema_name, stream.table_name),
            share=sql.Literal(min(100.0, 100.0 * wanted / rows)),
            n=sql.Literal(n),
        )
    ).fetchall()
    return Cut(key, tuple(tuple(row) for row in found)) if found else None


def _by_place(conn: Connection, stream: StreamSpec, relation: Relation, n: int) -> Cut | None:
    """Cut by pages into `n` ranges; None where places are no order of all rows.

    The lock keeps the rows in their places: nothing rewrites the table before the snapshot ends.
    """
    if conn.info.server_version < _READS_PLACES or relation.kind not in {"r", "m"}:
        return None
    row = conn.execute(_PAGES, (relation.oid,)).fetchone()
    if row is None:
        return None
    if relation.kind == "r":
        table = sql.Identifier(stream.schema_name, stream.table_name)
        conn.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(table))
    pages = row[0]
    cuts = sorted({pages * i // n for i in range(1, n)} - {0})
    return Cut((_PLACE,), tuple((f"({page},0)",) for page in cuts)) if cuts else None


def scattered(conn: Connection, stream: StreamSpec, key: Sequence[str]) -> bool:
    """Say whether the key's order is known to have little to do with where its rows lie."""
    row = conn.execute(
        "SELECT max(abs(correlation)) FROM pg_stats "
        "WHERE schemaname = %s::text AND tablename = %s::text AND attname = %s::text",
        (stream.schema_name, stream.table_name, key[0]),
    ).fetchone()
    return row is not None and row[0] is not None and row[0] < _CORRELATED
