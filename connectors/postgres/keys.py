"""What a source is asked beside its rows: the keys of all rows, and cursors ahead of now."""

from psycopg import sql

from connectors.postgres.catalog import Relation
from schemas.errors import ConfigError
from schemas.records import Column
from schemas.streams import StreamSpec

#: The column leads a btree over all rows, so its largest value is found without reading the table.
_LEADS_INDEX = """
EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
  JOIN pg_am m ON m.oid = x.relam
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
  WHERE i.indrelid = {oid} AND a.attname = {column} AND m.amname = 'btree'
    AND i.indisvalid AND i.indpred IS NULL)
"""


def key_columns(stream: StreamSpec, relation: Relation) -> tuple[Column, ...]:
    """Return the columns of the stream's key as the source has them, in the key's order."""
    known = {column.name: column for column in relation.shape.columns}
    missing = [name for name in stream.key if name not in known]
    if missing:
        raise ConfigError(f"{stream.name}: no key column {', '.join(missing)} at the source")
    return tuple(known[name] for name in stream.key)


def keys_query(stream: StreamSpec, relation: Relation) -> sql.Composed:
    """Copy out the keys of all rows that are not marked as deleted."""
    columns = sql.SQL(", ").join(
        sql.SQL("{}::text").format(sql.Identifier(c.name)) if c.as_text else sql.Identifier(c.name)
        for c in key_columns(stream, relation)
    )
    alive: sql.Composable = sql.SQL("true")
    if stream.tombstone is not None:
        alive = sql.SQL("NOT ({})").format(is_dead(stream, relation.shape.columns))
    table = sql.Identifier(stream.schema_name, stream.table_name)
    return sql.SQL("COPY (SELECT {} FROM {} WHERE {} AND {}) TO STDOUT (FORMAT binary)").format(
        columns, table, alive, relation.rows
    )


def is_dead(stream: StreamSpec, columns: tuple[Column, ...], alias: str = "") -> sql.Composed:
    """Make the condition that a row's tombstone says deleted: true, or any time at all."""
    found = next((c for c in columns if c.name == stream.tombstone), None)
    if found is None:
        raise ConfigError(f"{stream.name}: no tombstone column {stream.tombstone} at the source")
    column = sql.SQL("{}{}").format(sql.SQL(alias), sql.Identifier(found.name))
    if found.type == "boolean":
        return sql.SQL("{} IS TRUE").format(column)
    if found.type.startswith(("timestamp", "date")):
        return sql.SQL("{} IS NOT NULL").format(column)
    raise ConfigError(
        f"{stream.name}: tombstone {found.name} is {found.type}; use a boolean or a timestamp"
    )


def far_cursor(stream: StreamSpec, relation: Relation, zone: str, *, full: bool) -> sql.Composable:
    """Make an expression: the farthest cursor beyond now and its guard's margin, and its seconds.

    Infinity is no point in time: such rows are read whenever that repeats nothing.
    Where no index would answer it is asked by full reads only, which read the table anyhow.
    """
    margin, name = stream.guards.future_cursor, stream.cursor or ""
    kind = relation.categories[name][1]
    if margin is None or kind not in {"timestamptz", "timestamp", "date"}:
        return sql.SQL("NULL")
    # Stable, not volatile: only so may an index look no further than the limit.
    limit = sql.SQL("(statement_timestamp() AT TIME ZONE {} + {}::interval)").format(
        sql.Literal("UTC" if kind == "timestamptz" else zone),
        sql.Literal(f"{margin.total_seconds()} s"),
    )
    if kind == "timestamptz":
        limit = sql.SQL("({} AT TIME ZONE 'UTC')").format(limit)
    farthest = sql.SQL(
        "(SELECT ARRAY[m::text, extract(epoch FROM m)::bigint::text] FROM (SELECT max({column}) "
        "AS m FROM {table} WHERE {column} > {limit} AND {column} < 'infinity' AND {rows}) AS f "
        "WHERE m IS NOT NULL)"
    ).format(
        rows=relation.rows,
        column=sql.Identifier(name),
        table=sql.Identifier(stream.schema_name, stream.table_name),
        limit=limit,
    )
    if full:
        return farthest
    leads = sql.SQL(_LEADS_INDEX).format(oid=sql.Literal(relation.oid), column=sql.Literal(name))
    return sql.SQL("CASE WHEN {} THEN {} END").format(leads, farthest)
