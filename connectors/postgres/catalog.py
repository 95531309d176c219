"""What a table looks like, read from the catalog, and a snapshot that it is read at."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import sql

from connectors.postgres.column_types import is_plain, travels
from connectors.postgres.link import Connection, PostgresConfig, fits
from schemas.errors import ConfigError, ReadAgain
from schemas.records import Column, LoadRequest, StreamShape
from schemas.streams import StreamSpec

#: Kinds of relation that can be read, and those whose rows have an xmin.
READABLE = "rpvmf"
WITH_XMIN = "rp"

#: A row for each column, each with the table's kind and its unique keys: is it the primary one, how
#: many columns are the key, the numbers of these and of others beside them. One question, so that
#: one moment of the catalog answers it. A key of a table that others inherit from says nothing of
#: their rows, which are read with it.
_TABLE = """
SELECT c.oid, c.relkind::text, c.relhassubclass,
  ARRAY(SELECT concat_ws(' ', i.indisprimary::int, i.indnkeyatts, i.indkey::text)
    FROM pg_index i
    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
      AND i.indexprs IS NULL AND (c.relkind = 'p'
        OR NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhparent = c.oid))
    ORDER BY i.indisprimary DESC, i.indexrelid),
  a.attname, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull, a.attnum,
  t.oid, t.typtype::text, t.typname::text, t.typcategory::text, t.typsend <> 0
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN (pg_attribute a JOIN pg_type t ON t.oid = a.atttypid)
  ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE n.nspname = %s::text AND c.relname = %s::text AND c.relkind::text = ANY(%s)
ORDER BY a.attnum
"""

#: Rows by the size of the files and how full they were at the last look; where nobody has looked,
#: 50 rows a page. A partitioned table is its partitions.
_ROWS = """
SELECT coalesce(sum(CASE WHEN p.relpages > 0 AND p.reltuples >= 0 THEN p.reltuples / p.relpages
  ELSE 50 END * pg_relation_size(p.oid) / current_setting('block_size')::float8), 0)::bigint
FROM (SELECT %(table)s::oid UNION SELECT t.relid::oid FROM pg_partition_tree(%(table)s::oid) AS t)
  AS own (oid)
JOIN pg_class p ON p.oid = own.oid AND p.relkind IN ('r', 'm')
"""

_BEGIN = sql.SQL("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
#: The catalog as the snapshot has it, beside the files as they are now.
_OTHER_FILES = sql.SQL("""
SELECT count(*) FROM pg_class c
WHERE c.oid IN ({}) AND c.relkind IN ('r', 'm') AND c.relfilenode <> 0
  AND pg_relation_filenode(c.oid) IS DISTINCT FROM c.relfilenode
""")
_ALONE = sql.SQL("{oid}")
#: With its partitions, or the tables that inherit from it.
_BELOW = sql.SQL("""
WITH RECURSIVE below (oid) AS (
  SELECT {oid}::oid UNION SELECT h.inhrelid FROM pg_inherits h JOIN below b ON h.inhparent = b.oid)
SELECT oid FROM below
""")


@dataclass(frozen=True, slots=True)
class Relation:
    """A table of the server: its kind, shape, and what its columns are good for."""

    oid: int
    kind: str
    has_children: bool  # or had: partitions, or tables that inherit from it
    shape: StreamShape
    keys: tuple[tuple[str, ...], ...]  # every proven key, the primary one first
    categories: dict[str, tuple[str, str]]  # column -> (type category, type name)
    types: dict[str, int]  # column -> number of its type, below its domains
    #: the condition of the rows that the stream reads
    rows: sql.Composable = field(default_factory=lambda: sql.SQL("true"))

    def is_key(self, columns: tuple[str, ...]) -> bool:
        """Say whether a constraint of the server proves that these columns are a key."""
        return any(set(key) <= set(columns) for key in self.keys)


def find(conn: Connection, schema: str, table: str) -> Relation | None:
    """Describe a table; None if there is none of that name that this login may see."""
    rows = conn.execute(_TABLE, (schema, table, list(READABLE))).fetchall()
    if not rows:
        return None
    oid, kind, has_children, indexes, *_ = rows[0]
    columns, categories, types = _columns(conn, [row[4:] for row in rows if row[4] is not None])
    keys = _keys(columns, indexes)
    return Relation(
        oid=oid,
        kind=kind,
        has_children=has_children,
        shape=StreamShape(
            columns=columns,
            key=keys[0] if keys else (),
            key_is_unique=bool(keys),
        ),
        keys=keys,
        categories=categories,
        types=types,
    )


def rows_estimated(conn: Connection, relation: Relation) -> int:
    """Return about how many rows a table has, by its statistics and the size of its files."""
    row = conn.execute(_ROWS, {"table": relation.oid}).fetchone()
    return int(row[0]) if row else 0


def _keys(columns: Sequence[Column], indexes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return the keys that unique indexes prove: those that may not hold NULL."""
    known, keys = {column.number: column for column in columns}, []
    for index in indexes:
        primary, length, *places = map(int, index.split())
        key = [known[place] for place in places[:length] if place in known]
        if len(key) == length and (primary or not any(column.nullable for column in key)):
            keys.append(tuple(column.name for column in key))
    return tuple(keys)


def begin_at(conn: Connection, stream: StreamSpec, relation: Relation) -> None:
    """Take a snapshot and keep the table until it ends; ReadAgain if it is another than described.

    A TRUNCATE or a rewrite that comes between a snapshot and the first look at the table leaves
    nothing there that the snapshot could see, and nothing would be promoted as everything. And the
    bytes of a column whose type was changed meanwhile would be taken for one of the type before.
    One message says all of it: the snapshot, the lock and the look.
    """
    if relation.kind == "f":
        conn.execute(_BEGIN)
        return
    names = [column.name for column in relation.shape.columns]
    look = sql.SQL("SELECT {} FROM {} LIMIT 0").format(
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.Identifier(stream.schema_name, stream.table_name),
    )
    statements: list[sql.Composable] = [_BEGIN, look]
    if relation.kind in {"r", "p", "m"}:
        below = _BELOW if relation.has_children else _ALONE
        statements.append(_OTHER_FILES.format(below.format(oid=sql.Literal(relation.oid))))
    try:
        cursor = conn.execute(sql.SQL("; ").join(statements))
    except psycopg.errors.UndefinedColumn:
        raise ReadAgain(f"{stream.name} was changed just now", same=True) from None
    cursor.nextset()  # from BEGIN to the look
    types = [column.type_code for column in cursor.description or ()]
    if types != [relation.types[name] for name in names]:
        raise ReadAgain(f"{stream.name} was changed just now", same=True)
    if cursor.nextset() and cursor.fetchone() != (0,):
        raise ReadAgain(f"{stream.name} was truncated or rewritten just now", same=True)


def _columns(
    conn: Connection, rows: Sequence[tuple[Any, ...]]
) -> tuple[tuple[Column, ...], dict[str, tuple[str, str]], dict[str, int]]:
    """Return the columns of a relation, and the category, name and number of each one's type."""
    types: dict[str, int] = {}
    columns: dict[str, Column] = {}
    categories: dict[str, tuple[str, str]] = {}
    asked = []
    for name, type_, nullable, place, number, kind, type_name, category, has_binary in rows:
        columns[name] = Column(name, type_, nullable, number=place)
        categories[name], types[name] = (category, type_name), number
        if not is_plain(number, kind, type_name, has_binary=has_binary):
            asked.append((name, number, type_))
    found = travels(conn, [(number, type_) for _, number, type_ in asked]) if asked else []
    for (name, _, _), travel in zip(asked, found, strict=True):
        columns[name] = replace(
            columns[name],
            type=travel.type,
            as_text=travel.as_text,
            otherwise=travel.otherwise,
            extension=travel.extension,
            labels=travel.labels,
        )
        categories[name], types[name] = (travel.category, travel.base), travel.oid
    return tuple(columns.values()), categories, types


def describe(conn: Connection, config: PostgresConfig, schema: str, table: str) -> Relation:
    """Describe a table that must exist; ConfigError names it and how to list what there is."""
    found = find(conn, schema, table)
    if found is None:
        raise ConfigError(
            f"{config.where}: no table {schema}.{table} that {config.user} can see; "
            "list what there is with: syncward resource discover"
        )
    return found


def check_key(conn: Connection, stream: StreamSpec, relation: Relation) -> None:
    """Refuse a table without columns and a key that cannot tell rows apart."""
    names = [column.name for column in relation.shape.columns]
    if not names:
        raise ConfigError(f"{stream.name}: has no columns; remove the stream")
    unknown = [name for name in stream.key if name not in names]
    if unknown:
        raise ConfigError(f"{stream.name}: key {', '.join(unknown)} is no column of it")
    if not stream.key or relation.is_key(stream.key):
        return
    ordered = sql.SQL("SELECT FROM {} ORDER BY {} LIMIT 0").format(
        sql.Identifier(stream.schema_name, stream.table_name),
        sql.SQL(", ").join(map(sql.Identifier, stream.key)),
    )
    try:
        conn.execute(ordered)
    except psycopg.errors.UndefinedFunction:
        kinds = ", ".join(f"{name} {relation.categories[name][1]}" for name in stream.key)
        raise ConfigError(
            f"{stream.name}: key ({kinds}) is of a type without order, such as json, xml or point; "
            "choose another key, or mode: replace, which needs none"
        ) from None


#: Schemas that are the server's, or hold where streams resume.
_TAKEN = re.compile(r"pg_.*|information_schema|_syncward", re.DOTALL)


def check_names(request: LoadRequest) -> None:
    """Refuse names that the destination would cut off, and schemas that are no place for tables."""
    spec = request.stream
    names = (request.target_schema, spec.schema_name, spec.table_name, *spec.key, spec.cursor)
    for name in names:
        if name is not None and not fits(name):
            raise ConfigError(
                f"{spec.name}: the name {name[:70]!r} has no 1 to 63 bytes, or holds what is no "
                "character; Postgres would cut it off and take another table for it"
            )
    if _TAKEN.fullmatch(request.target_schema):
        raise ConfigError(
            f"target schema {request.target_schema} belongs to the server or to Syncward; "
            "choose another one"
        )


def ensure_schema(conn: Connection, name: str) -> None:
    """Make a schema where it is missing, in a short transaction of its own, before any load.

    Two first loads into one new schema would both make it, and one would fail; inside the load
    the second would wait until all rows of the first are there.
    """
    if _has_schema(conn, name):
        return
    with conn.transaction():
        conn.execute("SELECT pg_advisory_xact_lock(hashtext('_syncward.schema'))")
        # Looked up in the table again: the name cache of this session still says that it is
        # missing, and CREATE SCHEMA IF NOT EXISTS believes the cache.
        if not _has_schema(conn, name):
            conn.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))


def _has_schema(conn: Connection, name: str) -> bool:
    row = conn.execute("SELECT FROM pg_namespace WHERE nspname = %s::text", (name,)).fetchone()
    return row is not None
