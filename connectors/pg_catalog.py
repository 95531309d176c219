"""What a table looks like, read from the catalog in one query per question."""

import re
from dataclasses import dataclass

from psycopg import sql

from connectors.postgres import Connection, PostgresConfig, fits
from schemas.errors import ConfigError
from schemas.records import Column, LoadRequest, StreamShape

#: Kinds of relation that can be read, and those whose rows have an xmin.
READABLE = "rpvmf"
WITH_XMIN = "rp"

#: Types that mean something else on another server (OIDs inside), or have no binary form.
_AS_TEXT = """
  t.typsend = 0 OR t.oid::regtype::text LIKE 'reg%%' OR t.typtype = 'c'
  OR (t.typcategory = 'A'
      AND (e.oid >= 16384 OR e.typtype = 'c' OR e.oid::regtype::text LIKE 'reg%%'))
"""

_COLUMNS = f"""
SELECT a.attname, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull,
       coalesce({_AS_TEXT}, false), t.typcategory::text, t.typname
FROM pg_attribute a
JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typcategory = 'A'
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
"""  # noqa: S608 - constants of this module

_KEY = """
SELECT array_agg(a.attname ORDER BY k.position)
FROM pg_index i
CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, position)
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
  AND i.indexprs IS NULL AND k.position <= i.indnkeyatts
GROUP BY i.indexrelid, i.indisprimary
HAVING i.indisprimary OR bool_and(a.attnotnull)
ORDER BY i.indisprimary DESC, i.indexrelid
"""


@dataclass(frozen=True, slots=True)
class Relation:
    """A table of the server: its kind, shape, and what its columns are good for."""

    oid: int
    kind: str
    shape: StreamShape
    keys: tuple[tuple[str, ...], ...]  # every proven key, the primary one first
    categories: dict[str, tuple[str, str]]  # column -> (type category, type name)

    def is_key(self, columns: tuple[str, ...]) -> bool:
        """Say whether a constraint of the server proves that these columns are a key."""
        return any(set(key) <= set(columns) for key in self.keys)


def find(conn: Connection, schema: str, table: str) -> Relation | None:
    """Describe a table; None if there is none of that name that this login may see."""
    row = conn.execute(
        "SELECT c.oid, c.relkind::text FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %s::text AND c.relname = %s::text AND c.relkind::text = ANY(%s)",
        (schema, table, list(READABLE)),
    ).fetchone()
    if row is None:
        return None
    oid, kind = row
    columns = conn.execute(_COLUMNS, (oid,)).fetchall()
    keys = tuple(tuple(key) for (key,) in conn.execute(_KEY, (oid,)).fetchall())
    return Relation(
        oid=oid,
        kind=kind,
        shape=StreamShape(
            columns=tuple(Column(c[0], c[1], c[2], as_text=c[3]) for c in columns),
            key=keys[0] if keys else (),
            key_is_unique=bool(keys),
        ),
        keys=keys,
        categories={c[0]: (c[4], c[5]) for c in columns},
    )


def describe(conn: Connection, config: PostgresConfig, schema: str, table: str) -> Relation:
    """Describe a table that must exist; ConfigError names it and how to list what there is."""
    found = find(conn, schema, table)
    if found is None:
        raise ConfigError(
            f"{config.where}: no table {schema}.{table} that {config.user} can see; "
            "list what there is with: syncward resource discover"
        )
    return found


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
