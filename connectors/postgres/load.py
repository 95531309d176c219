"""Set-based loading: COPY, then a few statements, however many rows there are."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import psycopg
from psycopg import sql

from connectors.portable import schema_hash
from connectors.postgres import column_types, deletes, drift, guards, history, rejects
from connectors.postgres.batch import (
    DELETED_AT,
    SYNCED_AT,
    Hidden,
    Load,
    analyze,
    as_they_come,
    brings_rows,
    copy_into,
    interferes,
    names,
    parts,
    stage,
    typed,
    values,
)
from connectors.postgres.catalog import Relation, find
from connectors.postgres.deletes import SourceRows
from connectors.postgres.drift import Table
from connectors.shape_changes import changes
from schemas.errors import ConfigError, ReadAgain, SyncwardError
from schemas.records import Column, LoadCounts
from schemas.streams import Deletes, Mode

#: Since this version MERGE returns what it did to each row.
_MERGE_COUNTS = 170_000


def run(load: Load) -> LoadCounts:
    """Load the batch; the caller's transaction makes it visible or not."""
    target = find(load.conn, load.request.target_schema, load.request.stream.table_name)
    if target is None and not load.batch.full:
        raise ReadAgain(f"{load.name} is gone")  # a window alone would be a fragment
    if target is None and load.refusals is None:
        return rejects.settle(load, _into_new_table(load))
    if target is None:
        return rejects.settle(load, _into_table_made_first(load))
    load = _adapted(load, target)
    counts = replace(_into_table(load, target), changes=load.changes)
    return rejects.settle(load, counts)


def _into_table(load: Load, target: Relation) -> LoadCounts:
    merge = load.request.stream.mode is Mode.MERGE
    if load.request.stream.mode is Mode.APPEND and not load.rewrite:
        return LoadCounts(0, 0, 0) if _nothing_changed(load) else _append(load)
    if merge:
        _check_key(load, target)
    if _nothing_changed(load):
        return LoadCounts(0, 0, 0)
    if load.is_history:
        load = history.begun(load, target)
    careful = load.refusals is not None
    direct = not careful and (load.hidden is not None or not load.through_staging)
    if direct and _is_empty(load) and _key_is_sure(load):
        return _fill(load)
    came = stage(load)
    staged, size = rejects.prepare(load, came.rows), came.bytes
    found = SourceRows(staged, came.keys, rejects.left_out(load), came.gone)
    rejects.swept(load, keys=found.keys is not None, named=found.gone > 0)
    if load.batch.full or found.keys is not None:
        guards.check_zero_rows(load, found.all)
    if merge or load.is_history:
        return _merge(load, found, size, load.request.stream.key)
    if load.shape.key and target.is_key(load.shape.key):
        return _merge(load, found, size, load.shape.key)
    return _replace_by_content(load, staged, size)


def _nothing_changed(load: Load) -> bool:
    """Say whether a window is empty: the most frequent run of all, which should cost nothing.

    Not if the table is to be changed: that waits for no row, and is told now.
    """
    window = not load.batch.full and load.batch.keys is None and not load.rewrite
    return window and load.pending is None and not brings_rows(load)


def _key_is_sure(load: Load) -> bool:
    return load.shape.key_is_unique or not load.shape.key


# ── first load ───────────────────────────────────────────────────────────────────────────────


def _into_new_table(load: Load) -> LoadCounts:
    """Create the table with the source's exact types; its key comes after the rows."""
    _check_types(load, load.columns)
    load = replace(load, stamps=load.deletion is Deletes.SOFT)
    if load.hidden is not None and not load.needs_reading:
        _rename(load, load.hidden)
        counts = LoadCounts(load.hidden.rows, 0, 0, bytes=load.hidden.bytes)
    else:
        _create(load, load.table)
        counts = _append(load)
    counts = _buried(load, counts)
    # An update arrives as one more row in append, so its target has no key to break.
    if load.shape.key and load.request.stream.mode is not Mode.APPEND:
        rejected = _add_key(load)
        counts = replace(counts, inserted=counts.inserted - rejected, rejected=rejected)
    analyze(load, load.table)
    return counts


def _into_table_made_first(load: Load) -> LoadCounts:
    """Create the table with its key, then load into it: row by row where one is refused."""
    _check_types(load, load.columns)
    load = replace(load, stamps=load.deletion is Deletes.SOFT)
    _create(load, load.table)
    if load.shape.key and load.request.stream.mode is not Mode.APPEND:
        load.conn.execute(_key_added(load))
    target = find(load.conn, load.request.target_schema, load.request.stream.table_name)
    if target is None:
        raise RuntimeError(f"{load.name}: was made, and is not there")
    counts = _into_table(load, target)
    analyze(load, load.table)
    return counts


def _key_added(load: Load) -> sql.Composed:
    if load.is_history:
        return history.keys(load)
    key = sql.SQL(", ").join(map(sql.Identifier, load.shape.key))
    return sql.SQL("ALTER TABLE {} ADD PRIMARY KEY ({})").format(load.table, key)


def _add_key(load: Load) -> int:
    """Make the key; return how many rows that repeat it were rejected, where that is allowed."""
    add = _key_added(load)
    if load.shape.key_is_unique:
        load.conn.execute(add)
        return 0
    try:
        with load.conn.transaction():
            load.conn.execute(add)
    except psycopg.errors.UniqueViolation:
        rejected = guards.make_unique(load, load.shape.key, load.table)
        load.conn.execute(add)
        return rejected
    return 0


def _create(load: Load, table: sql.Identifier) -> None:
    own = [sql.SQL("{} timestamptz NOT NULL DEFAULT now()").format(sql.Identifier(SYNCED_AT))]
    if load.deletion is Deletes.SOFT:
        own.append(sql.SQL("{} timestamptz").format(sql.Identifier(DELETED_AT)))
    columns = sql.SQL(", ").join([*(_definition(column) for column in load.columns), *own])
    load.conn.execute(sql.SQL("CREATE TABLE {} ({})").format(table, columns))


def make_hidden(load: Load, table: sql.Identifier) -> None:
    """Make the table that takes the ranges of a large read: the target itself, by another name.

    Where columns come as text and are of another type they stay as they come until the end.
    """
    _check_types(load, load.columns)
    target = find(load.conn, load.request.target_schema, load.request.stream.table_name)
    if target is not None:
        _check_ours(load, target)
    if load.needs_reading:
        columns = as_they_come(load.columns)
        load.conn.execute(sql.SQL("CREATE TABLE {} ({})").format(table, columns))
        return
    _create(load, table)


def _rename(load: Load, hidden: Hidden) -> None:
    load.conn.execute(
        sql.SQL("ALTER TABLE {} RENAME TO {}").format(
            hidden.table, sql.Identifier(load.request.stream.table_name)
        )
    )


def _fill(load: Load) -> LoadCounts:
    """Load the batch into an empty table; rows that say they are deleted go or are stamped."""
    return _buried(load, _append(load))


def _buried(load: Load, counts: LoadCounts) -> LoadCounts:
    buried = deletes.bury(load)
    if load.deletion is Deletes.SOFT:
        return replace(counts, deleted=buried)
    return replace(counts, inserted=counts.inserted - buried, unchanged=buried)


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
    if not columns:
        return
    known = load.conn.execute(
        "SELECT array_agg(to_regtype(t) IS NOT NULL ORDER BY n) "
        "FROM unnest(%s::text[]) WITH ORDINALITY AS u (t, n)",
        ([column.type for column in columns],),
    ).fetchone()
    for column, is_known in zip(columns, known[0] if known else (), strict=True):
        if not is_known:
            raise ConfigError(
                f"{load.request.stream.name}: column {column.name} is of type {column.type}, which "
                f"{load.config.where} does not have; create it there"
            )


# ── existing tables ──────────────────────────────────────────────────────────────────────────


def _adapted(load: Load, target: Relation) -> Load:
    """Refuse a table that is not ours; let ours follow the source as the stream says."""
    own = _check_ours(load, target)
    spec, here, there = load.request.stream, load.shape.columns, ours_apart(target)
    _check_types(load, [c for c in here if c.name not in there or c.type != there[c.name].type])
    key = {column for columns in target.keys for column in columns}
    table = Table(load.conn, load.table, load.name, there, key, spec.drift)
    every_row = load.batch.full or spec.mode is Mode.APPEND
    first = load.seen_shape != schema_hash(load.shape)
    if first:
        guards.check_narrowed(load, changes(there, here, key))
    if not every_row and load.seen is not None:
        drift.check_same(here, load.seen, set(there))
    done = drift.decide(table, here, full=every_row, first=first)
    load = replace(
        load,
        carried=drift.carried(drift.after(table, done), here),
        changes=done,
        pending=partial(drift.carry_out, table, done) if done else None,
    )
    return _stampable(load, target, stamps=DELETED_AT in own)


def _check_ours(load: Load, target: Relation) -> set[str]:
    own = {column.name for column in target.shape.columns}
    if SYNCED_AT not in own:
        raise ConfigError(
            f"{load.config.where}: table {load.name} exists and was not made by Syncward; choose "
            "another target schema, or move the table"
        )
    history.check_kept(load, own)
    return own


def _stampable(load: Load, target: Relation, *, stamps: bool) -> Load:
    """Give the table the column of stamps if it needs one; refuse what no key can tell apart."""
    if load.deletion is Deletes.SOFT and not stamps:  # a table of before, or of another setting
        load.conn.execute(
            sql.SQL("ALTER TABLE {} ADD COLUMN {} timestamptz").format(
                load.table, sql.Identifier(DELETED_AT)
            )
        )
        stamps = True
    key = load.request.stream.key or load.shape.key
    replaces = load.request.stream.mode is Mode.REPLACE
    if replaces and load.deletion is not Deletes.HARD and not (key and target.is_key(key)):
        raise ConfigError(
            f"{load.request.stream.name}: deletes: {load.deletion} needs a key to tell which rows "
            "are gone; name one, or set deletes: hard"
        )
    return replace(load, stamps=stamps)


def ours_apart(target: Relation | None) -> dict[str, Column]:
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


def _has_policies(load: Load) -> bool:
    """Say whether policies look at each row that this login writes, for which there is no COPY."""
    table = sql.Literal(load.table.as_string(load.conn))
    asked = sql.SQL("SELECT row_security_active({}::regclass)").format(table)
    row = load.conn.execute(asked).fetchone()
    return row is not None and bool(row[0])


def _append(load: Load) -> LoadCounts:
    """Add the batch as it is."""
    if load.hidden is not None or load.through_staging or _has_policies(load):
        came = stage(load)
        rejects.prepare(load, came.rows)
        rows = _insert_staged(load)
        return LoadCounts(rows, 0, 0, bytes=came.bytes)
    rows, size = copy_into(load, load.table)
    return LoadCounts(inserted=rows, updated=0, unchanged=0, bytes=size)


def _insert_staged(load: Load) -> int:
    """Insert all staged rows, but for those that may be rejected; return how many."""
    insert = sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} s")

    def statement(staged: sql.Composable) -> rejects.Done:
        query = insert.format(load.table, names(load.columns), typed(load), staged)
        return load.conn.execute(query).rowcount, 0

    (inserted, _), _ = rejects.write(load, statement)
    return inserted


def _merge(load: Load, found: SourceRows, size: int, key: Sequence[str]) -> LoadCounts:
    """Remove what is gone, update what differs, insert what is missing (a history: see there).

    Rows that are equal are not touched. Readers see the old content until the commit.
    """
    repeated = 0 if load.shape.key_is_unique else guards.make_unique(load, key, load.staging)
    meddled = interferes(load)
    deleted = deletes.remove(load, key, found, meddled=meddled)
    dead = deletes.drop_dead(load, found.staged)
    keyless = rejects.left_out(load) - found.left_out
    staged = found.staged - repeated - dead - keyless
    wanted = _wanted(load, key) if meddled else None
    at_once = not meddled and load.conn.info.server_version >= _MERGE_COUNTS
    merge = partial(_merge_at_once if at_once else _merge_in_two, load, key)
    if load.is_history:
        merge = partial(history.follow, load, key, meddled=meddled)
    (inserted, updated), refused = rejects.write(load, merge)
    unchanged = staged - (inserted + updated + refused if wanted is None else wanted)
    if load.request.stream.mode not in {Mode.MERGE, Mode.HISTORY}:
        _check_replaced(load, refused)
    return LoadCounts(inserted, updated, unchanged + dead, deleted, repeated, bytes=size)


def _wanted(load: Load, key: Sequence[str]) -> int:
    """Count the staged rows that differ from the target's or are missing there."""
    row = load.conn.execute(
        sql.SQL(
            "SELECT count(*) FROM {staging} s WHERE NOT EXISTS (SELECT FROM {table} t "
            "WHERE {same} AND NOT ({differs}))"
        ).format(**parts(load, key))
    ).fetchone()
    return int(row[0]) if row else 0


def _check_replaced(load: Load, refused: int = 0, *, taken_out: int = 0) -> None:
    """Refuse a replaced table that serves other rows than were read: a DELETE was swallowed.

    Of rows that were refused an older version may be there, or none. `taken_out` rows were as they
    are here, and are staged no longer.
    """
    if load.deletion is Deletes.IGNORE or not interferes(load):
        return
    row = load.conn.execute(
        sql.SQL("SELECT (SELECT count(*) FROM {}), (SELECT count(*) FROM {} WHERE {})").format(
            deletes.alive(load), load.table, load.served
        )
    ).fetchone()
    staged, there = row or (0, -1)
    read = staged + taken_out
    kept = there - rejects.left_out(load)  # the same of those that are not even staged
    if not read - refused <= there or kept > read:
        raise SyncwardError(
            f"{load.name}: {read} rows were read and {there} are there now; a trigger, rule or "
            "policy of the table interferes; nothing was kept",
            code="rows_missing",
        )


def _merge_at_once(load: Load, key: Sequence[str], staged: sql.Composable) -> tuple[int, int]:
    """Insert and update with one join, where the server says which was which."""
    row = load.conn.execute(
        sql.SQL(
            "WITH merged AS (MERGE INTO {table} t USING {staging} s ON {same} "
            "WHEN MATCHED AND {differs} THEN "
            "UPDATE SET ({columns}, {synced}{stamped}) = ROW({typed}, now(){stamp}) "
            "WHEN NOT MATCHED THEN INSERT ({columns}{stamped}) VALUES ({typed}{born}) "
            "RETURNING merge_action() AS act) "
            "SELECT count(*) FILTER (WHERE act = 'INSERT'), "
            "count(*) FILTER (WHERE act = 'UPDATE') FROM merged"
        ).format(**parts(load, key, staged))
    ).fetchone()
    return row or (0, 0)


def _merge_in_two(load: Load, key: Sequence[str], staged: sql.Composable) -> tuple[int, int]:
    """Insert and update one after the other; rules and triggers have their say in both."""
    updated = load.conn.execute(
        sql.SQL(
            "UPDATE {table} t SET ({columns}, {synced}{stamped}) = ROW({typed}, now(){stamp}) "
            "FROM {staging} s WHERE {same} AND {differs}"
        ).format(**parts(load, key, staged))
    ).rowcount
    inserted = load.conn.execute(
        sql.SQL(
            "INSERT INTO {table} ({columns}{stamped}) SELECT {typed}{born} FROM {staging} s "
            "WHERE NOT EXISTS (SELECT FROM {table} t WHERE {same})"
        ).format(**parts(load, key, staged))
    ).rowcount
    return inserted, updated


def _replace_by_content(load: Load, staged: int, size: int) -> LoadCounts:
    """Without a key: a multiset difference by the digest of each row's image."""
    dead = deletes.drop_dead(load, staged)
    staged -= dead
    numbered = sql.SQL(
        "SELECT {id}, sha256(record_send(ROW({images}))) AS digest, row_number() OVER "
        "(PARTITION BY sha256(record_send(ROW({images})))) AS copy FROM {table}"
    )
    place = sql.SQL("ctid AS place")
    here = column_types.images(load.columns, [sql.Identifier(c.name) for c in load.columns])
    staged_here = column_types.images(load.columns, values(load, ""))
    # a place is one of each partition
    old = numbered.format(id=sql.SQL("tableoid AS part, ctid AS place"), images=here,
                          table=load.table)  # fmt: skip
    new = numbered.format(id=place, images=staged_here, table=load.staging)
    gone = sql.SQL(
        "WITH old AS ({old}), new AS ({new}), gone AS (SELECT o.part, o.place FROM old o LEFT JOIN "
        "new n USING (digest, copy) WHERE n.digest IS NULL) DELETE FROM {table} t USING gone g "
        "WHERE t.ctid = g.place AND t.tableoid = g.part"
    )
    deleted = guards.marked(load.conn, gone.format(old=old, new=new, table=load.table))
    kept, inserted = _insert_missing(load, old, new)
    unchanged = staged - inserted if kept is None else kept
    # Without a key an update is one row that goes and one that comes: what counts is the rest.
    guards.check_deletes(load, deleted - inserted, staged)
    _check_replaced(load, staged - inserted - unchanged, taken_out=kept or 0)
    return LoadCounts(inserted, 0, unchanged + dead, deleted, bytes=size)


def _insert_missing(load: Load, old: sql.Composed, new: sql.Composed) -> tuple[int | None, int]:
    """Insert the staged rows that the table lacks; return how many it has, if known, and how many.

    Where some may be rejected, the others are taken out first: then all that is staged is new.
    """
    if load.refusals is not None:
        kept = load.conn.execute(
            sql.SQL(
                "WITH old AS ({}), new AS ({}) DELETE FROM {} s WHERE s.ctid IN "
                "(SELECT n.place FROM new n JOIN old o USING (digest, copy))"
            ).format(old, new, load.staging)
        ).rowcount
        return kept, _insert_staged(load)
    inserted = load.conn.execute(
        sql.SQL(
            "WITH old AS ({old}), new AS ({new}) INSERT INTO {table} ({columns}) SELECT {typed} "
            "FROM {staging} s WHERE s.ctid IN (SELECT n.place FROM new n "
            "LEFT JOIN old o USING (digest, copy) WHERE o.digest IS NULL)"
        ).format(
            old=old,
            new=new,
            table=load.table,
            columns=names(load.columns),
            typed=typed(load),
            staging=load.staging,
        )
    ).rowcount
    return None, inserted
