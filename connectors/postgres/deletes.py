"""Rows that are gone at the source: deleted or stamped here, by set, inside the load's transaction.

They are found in four ways: by a batch that is the whole table, by the keys of all rows beside a
batch, because the row itself says so (its tombstone), or because the source names their keys. The
guard of deletes looks afterwards: what it stops is rolled back, and in the usual case it costs
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from connectors.postgres import guards
from connectors.postgres.batch import (
    DELETED_AT,
    GONE,
    KEYS,
    REFUSED,
    SYNCED_AT,
    VALID_TO,
    Load,
    dead,
    same,
)
from schemas.errors import SyncwardError
from schemas.streams import Deletes


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What a run knows of the source: rows staged, and all keys if it brings them."""

    staged: int
    keys: int | None
    left_out: int = 0  # refused before they were staged
    gone: int = 0  # rows of which it says that they are gone

    @property
    def all(self) -> int:
        """How many rows the source has, where the run knows it."""
        return self.staged + self.left_out if self.keys is None else self.keys


def remove(load: Load, key: Sequence[str], found: SourceRows, *, meddled: bool) -> int:
    """Delete or stamp the rows that are gone; return how many. Guards may stop it.

    Where something of the target's own may swallow that (`meddled`), it is looked at afterwards.
    """
    if load.deletion is Deletes.IGNORE:
        return 0
    gone = _gone(load, key, found)
    if not gone:
        return 0
    if load.stamps and found.keys is not None:
        _take_back(load, key)
    removed = 0
    for position, condition in enumerate(gone):
        statement = _statement(load, condition)
        if position == 0:
            removed += guards.marked(load.conn, statement)
        else:
            removed += load.conn.execute(statement).rowcount
    guards.check_deletes(load, removed, found.all, gone, key)
    if meddled:
        _check_gone(load, gone)
    return removed


def _check_gone(load: Load, gone: Sequence[sql.Composable]) -> None:
    for condition in gone:
        row = load.conn.execute(
            sql.SQL("SELECT count(*) FROM {} t WHERE {} AND {}").format(
                load.table, load.served, condition
            )
        ).fetchone()
        if row is None or row[0]:
            raise SyncwardError(
                f"{load.name}: {row[0] if row else 'some'} rows that are gone at the source could "
                "not be removed; a trigger, rule or policy of the table interferes; nothing was "
                "kept",
                code="rows_missing",
            )


def _gone(load: Load, key: Sequence[str], found: SourceRows) -> list[sql.Composable]:
    """Return the conditions of target rows `t` that are gone."""
    missing = sql.SQL("NOT EXISTS (SELECT FROM {} s WHERE {})")
    conditions: list[sql.Composable] = []
    if found.keys is not None:
        conditions.append(missing.format(KEYS, same(load, key)))
    elif load.covers_all:
        gone = missing.format(load.staging, same(load, key))
        if found.left_out:
            gone = sql.SQL("{} AND {}").format(gone, missing.format(REFUSED, same(load, key)))
        conditions.append(gone)
    says = dead(load)
    if says is not None and found.staged:
        conditions.append(
            sql.SQL("EXISTS (SELECT FROM {} s WHERE {} AND {})").format(
                load.staging, same(load, key), says
            )
        )
    if found.gone:
        named = sql.SQL("EXISTS (SELECT FROM {} s WHERE {})")
        conditions.append(named.format(GONE, same(load, key)))
    return conditions


def _statement(load: Load, condition: sql.Composable) -> sql.Composed:
    if load.is_history:
        return sql.SQL("UPDATE {} t SET ({}, {}) = ROW({}, now()) WHERE {} AND {}").format(
            load.table,
            sql.Identifier(VALID_TO),
            sql.Identifier(SYNCED_AT),
            load.moment,
            load.served,
            condition,
        )
    if load.deletion is Deletes.HARD:
        return sql.SQL("DELETE FROM {} t WHERE {}").format(load.table, condition)
    return sql.SQL("UPDATE {} t SET ({}, {}) = ROW(now(), now()) WHERE t.{} IS NULL AND {}").format(
        load.table,
        sql.Identifier(DELETED_AT),
        sql.Identifier(SYNCED_AT),
        sql.Identifier(DELETED_AT),
        condition,
    )


def _take_back(load: Load, key: Sequence[str]) -> None:
    """Clear the stamps of rows whose keys are there again, although their cursor did not move."""
    stamp = sql.Identifier(DELETED_AT)
    load.conn.execute(
        sql.SQL(
            "UPDATE {} t SET ({}, {}) = ROW(NULL, now()) WHERE t.{} IS NOT NULL AND EXISTS "
            "(SELECT FROM {} s WHERE {})"
        ).format(load.table, stamp, sql.Identifier(SYNCED_AT), stamp, KEYS, same(load, key))
    )


def drop_dead(load: Load, staged: int) -> int:
    """Take the rows out of the batch that say they are deleted, where the target keeps none."""
    says = dead(load)
    if says is None or load.deletion is not Deletes.HARD or not staged:
        return 0
    return load.conn.execute(
        sql.SQL("DELETE FROM {} s WHERE {}").format(load.staging, says)
    ).rowcount


def alive(load: Load) -> sql.Composable:
    """Name the staged rows that do not say they are deleted."""
    says = dead(load) or sql.SQL("false")
    return sql.SQL("{} s WHERE NOT ({})").format(load.staging, says)


def bury(load: Load) -> int:
    """Delete or stamp rows of a table just filled that say they are deleted; return how many."""
    says = dead(load)
    if says is None:
        return 0
    statement = (
        sql.SQL("DELETE FROM {table} s WHERE {says}")
        if load.deletion is Deletes.HARD
        else sql.SQL("UPDATE {table} s SET {stamp} = now() WHERE {says}")
    )
    return load.conn.execute(
        statement.format(table=load.table, says=says, stamp=sql.Identifier(DELETED_AT))
    ).rowcount
