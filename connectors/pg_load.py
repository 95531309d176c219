"""Set-based loading: COPY, then at most three statements, however many rows there are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from psycopg import sql

from connectors import pg_drift, pg_types
from connectors.pg_catalog import Relation, find
from connectors.pg_drift import Table
from connectors.postgres import Connection, PostgresConfig
from schemas.errors import ConfigError, SyncwardError
from schemas.records import Batch, Column, LoadCounts, LoadRequest, SchemaChange, StreamShape
from schemas.streams import Mode

#: Our column in every destination table: when this row version was loaded.
SYNCED_AT = "_syncward_synced_at"
_STAGING = "syncward_staging"
#: Staged rows from which on statistics pay for themselves.
_ANALYZE_FROM = 1_000

#: Record image: json, xml and point have no equality, and 1.0 is not 1.00.
_DIFFERS = sql.SQL("ROW({})::record *<> ROW({})::record")


@dataclass(frozen=True, slots=True)
class Load:
    """One batch on its way into one table, inside the caller's transaction."""

    conn: Connection
    config: PostgresConfig
    request: LoadRequest
    batch: Batch
    rewrite: bool  # the table's content becomes the batch, also for append
    seen_shape: str | None = None  # `schema_hash` of what was loaded last
    #: what of the batch the table takes, in its types; None: all as it is
    carried: tuple[Column, ...] | None = None
    changes: tuple[SchemaChange, ...] = ()  # what was done to the table for this batch

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
    def through_staging(self) -> bool:
        """Say whether rows do not go into the table as they come: this server reads them first."""
        return tuple(self.columns) != self.shape.columns or any(
            c.as_text and c.type != "text" for c in self.columns
        )


def run(load: Load) -> LoadCounts:
    """Load the batch; the caller's transaction makes it visible or not."""
    target = find(load.conn, load.request.target_schema, load.request.stream.table_name)
    if target is None:
        return _into_new_table(load)
    load = _adapted(load, target)
    return replace(_into_table(load, target), changes=load.changes)


def _into_table(load: Load, target: Relation) -> LoadCounts:
    if load.request.stream.mode is Mode.APPEND and not load.rewrite:
        return _append(load)
    if load.request.stream.mode is Mode.MERGE:
        _check_key(load, target)
    if _is_empty(load) and not load.through_staging:
        return _append(load)
    staged, size = _stage(load)
    if load.request.stream.mode is Mode.MERGE:
        return _merge(load, staged, size, load.request.stream.key)
    if load.shape.key and target.is_key(load.shape.key):
        return _replace_by_key(load, staged, size)
    return _replace_by_content(load, staged, size)


# ── first load ───────────────────────────────────────────────────────────────────────────────


def _into_new_table(load: Load) -> LoadCounts:
    """Create the table with the source's exact types; its key comes after the rows."""
    _check_types(load, load.columns)
    columns = sql.SQL(", ").join(_definition(column) for column in load.columns)
    load.conn.execute(
        sql.SQL("CREATE TABLE {} ({}, {} timestamptz NOT NULL DEFAULT now())").format(
            load.table, columns, sql.Identifier(SYNCED_AT)
        )
    )
    counts = _append(load)
    # An update arrives as one more row in append, so its target has no key to break.
    if load.shape.key and load.request.stream.mode is not Mode.APPEND:
        key = sql.SQL(", ").join(map(sql.Identifier, load.shape.key))
        load.conn.execute(sql.SQL("ALTER TABLE {} ADD PRIMARY KEY ({})").format(load.table, key))
    load.conn.execute(sql.SQL("ANALYZE {}").format(load.table))
    return counts


def _definition(column: Column) -> sql.Composed:
    # The type was parsed as exactly one type name by this server (_check_types).
    type_ = sql.SQL(column.type)
    null = sql.SQL("" if column.nullable else " NOT NULL")
    return sql.SQL("{} {}{}").format(sql.Identifier(column.name), type_, null)


def _check_types(load: Load, columns: Sequence[Column]) -> None:
    """Refuse types that this server does not have, by a parser that accepts one type name only."""
    for column in columns:
        if column.name.startswith("_syncward_"):
            raise ConfigError(f"{load.request.stream.name}: column {column.name} is a name of ours")
        row = load.conn.execute("SELECT to_regtype(%s) IS NOT NULL", (column.type,)).fetchone()
        if row is None or not row[0]:
            raise ConfigError(
                f"{load.request.stream.name}: column {column.name} is of type {column.type}, which "
                f"{load.config.where} does not have; create it there"
            )


# ── existing tables ──────────────────────────────────────────────────────────────────────────


def _adapted(load: Load, target: Relation) -> Load:
    """Refuse a table that is not ours; let ours follow the source as the stream says."""
    if SYNCED_AT not in {column.name for column in target.shape.columns}:
        raise ConfigError(
            f"{load.config.where}: table {load.name} exists and was not made by Syncward; choose "
            "another target schema, or move the table"
        )
    spec, here, there = load.request.stream, load.shape.columns, _ours_apart(target)
    _check_types(load, [c for c in here if c.name not in there or c.type != there[c.name].type])
    key = {column for columns in target.keys for column in columns}
    table = Table(load.conn, load.table, load.name, there, key, spec.drift)
    every_row = load.batch.full or spec.mode is Mode.APPEND
    done = pg_drift.adapt(
        table, here, full=every_row, first=load.seen_shape != schema_hash(load.shape)
    )
    if done:
        there = _ours_apart(find(load.conn, load.request.target_schema, spec.table_name))
    return replace(load, carried=pg_drift.carried(there, here), changes=done)


def _ours_apart(target: Relation | None) -> dict[str, Column]:
    """Return a table's columns by name, without ours."""
    columns = () if target is None else target.shape.columns
    return {c.name: c for c in columns if not c.name.startswith("_syncward_")}


def _check_key(load: Load, target: Relation) -> None:
    key = load.request.stream.key
    if not target.is_key(key):
        raise ConfigError(
            f"{load.name}: no primary or unique key ({', '.join(key)}) there; merge needs one"
        )


def has_rows(load: Load) -> bool:
    """Say whether the target table exists and holds any row."""
    schema, table = load.request.target_schema, load.request.stream.table_name
    return find(load.conn, schema, table) is not None and not _is_empty(load)


def _is_empty(load: Load) -> bool:
    row = load.conn.execute(sql.SQL("SELECT FROM {} LIMIT 1").format(load.table)).fetchone()
    return row is None


def _append(load: Load) -> LoadCounts:
    """Add the batch as it is."""
    if load.through_staging:
        _, size = _stage(load)
        columns = _names(load.columns)
        rows = load.conn.execute(
            sql.SQL("INSERT INTO {} ({}) SELECT {} FROM pg_temp.{} s").format(
                load.table, columns, _typed(load), sql.Identifier(_STAGING)
            )
        ).rowcount
        return LoadCounts(rows, 0, 0, bytes=size)
    rows, size = _copy_into(load, load.table)
    return LoadCounts(inserted=rows, updated=0, unchanged=0, bytes=size)


def _copy_into(load: Load, table: sql.Composable) -> tuple[int, int]:
    """Relay the batch into a table; return (rows by this server's count, bytes)."""
    size = 0
    cursor = load.conn.cursor()
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        table, _names(load.shape.columns)
    )
    with cursor.copy(statement) as copy:
        for chunk in load.batch.chunks:
            copy.write(chunk)
            size += len(chunk)
    return cursor.rowcount, size


def _stage(load: Load) -> tuple[int, int]:
    """Copy the batch into a temporary table without constraints; return (rows, bytes)."""
    staging = sql.Identifier(_STAGING)
    load.conn.execute(sql.SQL("DROP TABLE IF EXISTS pg_temp.{}").format(staging))
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(
            sql.Identifier(c.name),
            sql.SQL("text" if c.as_text else c.type),
        )
        for c in load.shape.columns
    )
    load.conn.execute(sql.SQL("CREATE TEMP TABLE {} ({}) ON COMMIT DROP").format(staging, columns))
    rows, size = _copy_into(load, sql.SQL("pg_temp.{}").format(staging))
    if rows >= _ANALYZE_FROM:
        load.conn.execute(sql.SQL("ANALYZE pg_temp.{}").format(staging))
    return rows, size


def _merge(load: Load, staged: int, size: int, key: Sequence[str]) -> LoadCounts:
    """Update what differs, insert what is missing; rows that are equal are not touched."""
    if not load.shape.key_is_unique:
        _check_staged_key(load, key)
    wanted = _wanted(load, key) if _interferes(load) else None
    updated = _update_changed(load, key)
    inserted = load.conn.execute(
        sql.SQL(
            "INSERT INTO {table} ({columns}) SELECT {typed} FROM pg_temp.{staging} s "
            "WHERE NOT EXISTS (SELECT FROM {table} t WHERE {same})"
        ).format(**_parts(load, key))
    ).rowcount
    unchanged = staged - (inserted + updated if wanted is None else wanted)
    return LoadCounts(inserted, updated, unchanged, bytes=size)


def _interferes(load: Load) -> bool:
    """Say whether something of the target's own may swallow rows without a word.

    Then what is not written must not be taken for unchanged.
    """
    row = load.conn.execute(
        sql.SQL(
            "SELECT c.relhasrules OR row_security_active(c.oid) OR EXISTS ("
            "SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal "
            "AND g.tgenabled <> 'D' AND g.tgtype & 2 = 2) "
            "FROM pg_class c WHERE c.oid = {}::regclass"
        ).format(sql.Literal(load.table.as_string(load.conn)))
    ).fetchone()
    return row is not None and bool(row[0])


def _wanted(load: Load, key: Sequence[str]) -> int:
    """Count the staged rows that differ from the target's or are missing there."""
    row = load.conn.execute(
        sql.SQL(
            "SELECT count(*) FROM pg_temp.{staging} s WHERE NOT EXISTS (SELECT FROM {table} t "
            "WHERE {same} AND NOT ({differs}))"
        ).format(**_parts(load, key))
    ).fetchone()
    return int(row[0]) if row else 0


def _check_replaced(load: Load, staged: int) -> None:
    """Refuse a replaced table that holds other rows than were read: a DELETE was swallowed."""
    if not _interferes(load):
        return
    row = load.conn.execute(sql.SQL("SELECT count(*) FROM {}").format(load.table)).fetchone()
    if row is None or row[0] != staged:
        raise SyncwardError(
            f"{load.name}: {staged} rows were read and {row[0] if row else 'no'} are there now; a "
            "trigger, rule or policy of the table interferes; nothing was kept",
            code="rows_missing",
        )


def _update_changed(load: Load, key: Sequence[str]) -> int:
    parts = _parts(load, key)
    return load.conn.execute(
        sql.SQL(
            "UPDATE {table} t SET ({columns}, {synced}) = ROW({staged}, now()) "
            "FROM pg_temp.{staging} s WHERE {same} AND {differs}"
        ).format(**parts)
    ).rowcount


def _replace_by_key(load: Load, staged: int, size: int) -> LoadCounts:
    """Make the table's content the batch: readers see the old one until the commit."""
    key = load.shape.key
    if not load.shape.key_is_unique:
        _check_staged_key(load, key)
    deleted = load.conn.execute(
        sql.SQL(
            "DELETE FROM {table} t WHERE NOT EXISTS (SELECT FROM pg_temp.{staging} s WHERE {same})"
        ).format(**_parts(load, key))
    ).rowcount
    merged = _merge(load, staged, size, key)
    _check_replaced(load, staged)
    return LoadCounts(merged.inserted, merged.updated, merged.unchanged, deleted, bytes=size)


def _replace_by_content(load: Load, staged: int, size: int) -> LoadCounts:
    """Without a key: a multiset difference by the digest of each row's image."""
    parts = _parts(load, ())
    numbered = sql.SQL(
        "SELECT {id}, sha256(record_send(ROW({images}))) AS digest, row_number() OVER "
        "(PARTITION BY sha256(record_send(ROW({images})))) AS copy FROM {table}"
    )
    old = numbered.format(
        id=sql.SQL("ctid AS place"),
        images=pg_types.images(load.columns, [sql.Identifier(c.name) for c in load.columns]),
        table=load.table,
    )
    new = numbered.format(
        id=sql.SQL("ctid AS place"),
        images=pg_types.images(load.columns, _values(load, "")),
        table=parts["staging_table"],
    )
    deleted = load.conn.execute(
        sql.SQL(
            "WITH old AS ({old}), new AS ({new}) DELETE FROM {table} WHERE ctid IN (SELECT o.place "
            "FROM old o LEFT JOIN new n USING (digest, copy) WHERE n.digest IS NULL)"
        ).format(old=old, new=new, table=load.table)
    ).rowcount
    inserted = load.conn.execute(
        sql.SQL(
            "WITH old AS ({old}), new AS ({new}) INSERT INTO {table} ({columns}) SELECT {typed} "
            "FROM {staging} s WHERE s.ctid IN (SELECT n.place FROM new n "
            "LEFT JOIN old o USING (digest, copy) WHERE o.digest IS NULL)"
        ).format(
            old=old,
            new=new,
            table=load.table,
            columns=parts["columns"],
            typed=parts["typed"],
            staging=parts["staging_table"],
        )
    ).rowcount
    _check_replaced(load, staged)
    return LoadCounts(inserted, 0, staged - inserted, deleted, bytes=size)


def _check_staged_key(load: Load, key: Sequence[str]) -> None:
    """Refuse keys that repeat or are NULL: which row should win is not ours to guess."""
    names = sql.SQL(", ").join(map(sql.Identifier, key))
    missing = sql.SQL(" OR ").join(sql.SQL("{} IS NULL").format(sql.Identifier(k)) for k in key)
    row = load.conn.execute(
        sql.SQL(
            "SELECT (SELECT count(*) FROM (SELECT FROM {t} GROUP BY {k} "
            "HAVING count(*) > 1) AS d), "
            "(SELECT count(*) FROM {t} WHERE {m})"
        ).format(t=sql.SQL("pg_temp.{}").format(sql.Identifier(_STAGING)), k=names, m=missing)
    ).fetchone()
    repeated, nulls = row or (0, 0)
    if repeated or nulls:
        raise ConfigError(
            f"{load.request.stream.name}: key ({', '.join(key)}) is no key: {repeated} values "
            f"repeat, {nulls} rows have NULL in it"
        )


# ── pieces of SQL ────────────────────────────────────────────────────────────────────────────


def _names(columns: Sequence[Column]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(c.name) for c in columns)


def _typed(load: Load, alias: str = "s.") -> sql.Composed:
    """Name the staged columns as the table's types: those that came otherwise are read here."""
    return sql.SQL(", ").join(_values(load, alias))


def _values(load: Load, alias: str) -> list[sql.Composed]:
    came = {c.name: c.type for c in load.shape.columns if not c.as_text}
    return [
        sql.SQL("{}{}" if came.get(c.name) == c.type else "{}{}::{}").format(
            sql.SQL(alias),
            sql.Identifier(c.name),
            *([] if came.get(c.name) == c.type else [sql.SQL(c.type)]),
        )
        for c in load.columns
    ]


def _parts(load: Load, key: Sequence[str]) -> dict[str, sql.Composable]:
    here = sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(c.name)) for c in load.columns)
    same = sql.SQL(" AND ").join(
        pg_types.equal(load.conn, column) for column in load.columns if column.name in key
    )
    typed = _typed(load)
    return {
        "table": load.table,
        "staging": sql.Identifier(_STAGING),
        "staging_table": sql.SQL("pg_temp.{}").format(sql.Identifier(_STAGING)),
        "columns": _names(load.columns),
        "typed": typed,
        "staged": typed,
        "synced": sql.Identifier(SYNCED_AT),
        "same": same,
        "differs": _DIFFERS.format(here, typed),
    }


def schema_hash(shape: StreamShape) -> str:
    """Return a digest of names, types and key: a change of it is drift."""
    parts = [f"{c.name} {c.type} {c.nullable}" for c in shape.columns]
    return hashlib.sha256("\n".join([*parts, *shape.key]).encode()).hexdigest()
