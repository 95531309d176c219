"""Drift: what is done to a table about what changed at its source. Start at `decide`.

Everything happens in the transaction of the load: the new columns and the rows that need them
become visible together, or nothing does.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from connectors.postgres.link import Connection
from connectors.shape_changes import changes
from schemas.errors import ConfigError, ReadAgain
from schemas.records import Change, Column, SchemaChange
from schemas.streams import Drift


@dataclass(frozen=True, slots=True)
class Table:
    """A target table and what may be done to it, in the load's transaction."""

    conn: Connection
    identifier: sql.Identifier
    name: str  # as people read it
    columns: Mapping[str, Column]  # without our own
    key: AbstractSet[str]  # the columns of its keys
    policy: Drift


def decide(
    table: Table, here: Sequence[Column], *, full: bool, first: bool
) -> tuple[SchemaChange, ...]:
    """Return what changed at the source and is to be followed, as the stream's policy says.

    `full`: the batch holds every row, or older rows do not matter. `first`: this shape of the
    source is loaded for the first time. Later a NOT NULL here is somebody's own, and stays.

    ReadAgain if older rows must be read for it: a column that was added with a default, or dropped
    and added once more, has values in rows that no cursor shows as changed. ConfigError names the
    change and the next step.
    """
    found = changes(table.columns, here, table.key)
    for change in found:
        _refuse(table, change)
    if table.policy is Drift.IGNORE:
        return found if first else ()
    done = tuple(c for c in found if first or c.change in {Change.ADDED, Change.WIDENED})
    if done and table.policy is Drift.FREEZE:
        raise ConfigError(
            f"{table.name}: the source's table changed and the stream says drift: freeze: "
            f"{'; '.join(map(str, done))}. Let it follow once: syncward connection schema accept "
            "CONNECTION; always with drift: evolve; or change the table here the same way",
            code="schema_drift",
        )
    if first and not full:
        what = "; ".join(map(str, done)) or "the source's table is another one than before"
        raise ReadAgain(f"{what}: older rows may differ, too")
    return done


def carry_out(table: Table, done: Sequence[SchemaChange]) -> None:
    """Change the table. From here to the commit readers wait: call it once the rows are here."""
    for change in done:
        if table.policy is not Drift.IGNORE and not _settled(table, change):
            _carry_out(table, change)


def after(table: Table, done: Sequence[SchemaChange]) -> dict[str, Column]:
    """Return the table's columns as they will be once that is carried out."""
    columns = dict(table.columns)
    for change in done if table.policy is not Drift.IGNORE else ():
        if change.change in {Change.ADDED, Change.WIDENED} and change.after is not None:
            columns[change.column] = Column(change.column, change.after)
    return columns


def check_same(
    here: Sequence[Column], seen: Mapping[str, Sequence[Any]], there: AbstractSet[str]
) -> None:
    """ReadAgain if a column came back under a name the table has: no cursor shows its values.

    `seen` are the source's columns when it was loaded last, the number and the type of each.
    """
    others = [
        column.name
        for column in here
        if column.name in there
        and (column.name not in seen or column.number != seen[column.name][0])
    ]
    if others:
        raise ReadAgain(f"another column than before bears the name {', '.join(others)}")


def _settled(table: Table, change: SchemaChange) -> bool:
    """Say whether the table takes the source's rows as it is."""
    if change.change is Change.NARROWED:
        return True  # it keeps its wider type
    return change.change is Change.REMOVED and table.columns[change.column].nullable


def _refuse(table: Table, change: SchemaChange) -> None:
    if change.change is Change.CHANGED:
        raise ConfigError(
            f"{table.name}: column {change.column} is {change.after} at the source and "
            f"{change.before} here, and not every value of one is one of the other; change it here "
            "first, or drop the table and it is loaded again",
            code="schema_drift",
        )
    if change.change is Change.REMOVED and change.column in table.key:
        raise ConfigError(
            f"{table.name}: {change}, and it is part of the key here; if it was renamed, rename it "
            "here, too; else drop the table and it is loaded again by the key it has now",
            code="schema_drift",
        )


def _carry_out(table: Table, change: SchemaChange) -> None:
    column = sql.Identifier(change.column)
    # Types were read from the source's catalog and parsed as one type name by this server.
    match change.change:
        case Change.ADDED:
            act = sql.SQL("ADD COLUMN {} {}").format(column, sql.SQL(change.after or ""))
        case Change.WIDENED:
            act = sql.SQL("ALTER COLUMN {} TYPE {}").format(column, sql.SQL(change.after or ""))
        case _:
            act = sql.SQL("ALTER COLUMN {} DROP NOT NULL").format(column)
    try:
        table.conn.execute(sql.SQL("ALTER TABLE {} {}").format(table.identifier, act))
    except psycopg.errors.InsufficientPrivilege:
        raise ConfigError(
            f"{table.name}: {change}; only the table's owner may change it here; make the login "
            "its owner, or change it yourself",
            code="schema_drift",
        ) from None
    except psycopg.errors.FeatureNotSupported:
        raise ConfigError(
            f"{table.name}: {change}; a view, rule, trigger or policy here depends on that column "
            "and keeps its type; drop it, run again, and make it once more",
            code="schema_drift",
        ) from None


def carried(there: Mapping[str, Column], here: Sequence[Column]) -> tuple[Column, ...]:
    """Return the source's columns that the target has, each with the type it has there."""
    return tuple(
        replace(column, type=there[column.name].type) for column in here if column.name in there
    )
