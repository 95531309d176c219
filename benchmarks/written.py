"""What each contestant wrote, beside the source: row by row, column by column."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psycopg
from psycopg import sql

from benchmarks.contestants import KEY, TABLE, Contestant, Target
from benchmarks.lab import Lab

_COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute
WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
_KEY = """
SELECT string_agg(a.attname, ', ' ORDER BY a.attnum) FROM pg_index i
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
WHERE i.indrelid = to_regclass(%s) AND i.indisprimary
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the source and what became of it."""

    name: str
    type: str
    type_there: str | None  # None: it is not there
    differs: int  # rows; by image if the type is the same, else by text
    null_allowed: bool  # it was NOT NULL

    @property
    def exact(self) -> bool:
        return self.type_there == self.type and not self.differs and not self.null_allowed


@dataclass(frozen=True, slots=True)
class Written:
    """A contestant's copy beside the source table."""

    contestant: str
    rows_missing: int
    rows_extra: int
    key: str | None
    columns: tuple[Column, ...]
    own_columns: tuple[str, ...]  # that the contestant added

    @property
    def exact(self) -> bool:
        """Whether every row, type, NOT NULL and the key are the source's."""
        whole = not self.rows_missing and not self.rows_extra and self.key == KEY
        return whole and all(column.exact for column in self.columns)

    def plain(self) -> dict[str, object]:
        return {**asdict(self), "exact": self.exact}


def compare(made: Lab, contestants: Sequence[Contestant], target: Target) -> list[Written]:
    """Compare every contestant's target with the source; all of them are up to date."""
    bring_truth(made)
    with made.session(made.destination) as db:
        return [beside_truth(db, one.name, f"{one.schema(target)}.{TABLE}") for one in contestants]


def bring_truth(made: Lab) -> None:
    """Bring the source's rows beside the copies, and prove by digest that they are the same."""
    made.act(made.destination, "DROP SCHEMA IF EXISTS truth CASCADE", "CREATE SCHEMA truth")
    with made.session(made.source) as db:
        columns = db.execute(_COLUMNS, (TABLE,)).fetchall()
    made.act(
        made.destination,
        "CREATE TABLE truth.events ("
        + ", ".join(f"{name} {kind}{' NOT NULL' * must}" for name, kind, must in columns)
        + ")",
    )
    made.by_hand(f"SELECT * FROM {TABLE}", before=(), into="truth.events", after=())
    digest = (
        "SELECT count(*), sum(('x' || left(md5(record_send(e)), 15))::bit(60)::bigint::numeric) "
        "FROM {} e"
    )
    here = made.one(made.source, digest.format(TABLE))
    if made.one(made.destination, digest.format("truth.events")) != here:
        raise RuntimeError("the source's rows did not arrive as they are; nothing can be compared")


def beside_truth(db: psycopg.Connection, name: str, table: str) -> Written:
    """Compare a copy with the rows in truth.events, in one pass over both."""
    wanted = db.execute(_COLUMNS, ("truth.events",)).fetchall()
    there = {row[0]: row[1:] for row in db.execute(_COLUMNS, (table,)).fetchall()}
    key = (db.execute(_KEY, (table,)).fetchone() or (None,))[0]
    both = [(column, kind) for column, kind, _ in wanted if column in there]
    counts = [
        sql.SQL("count(*) FILTER (WHERE s.{k} = t.{k} AND {differs})").format(
            k=sql.Identifier(KEY), differs=_differs(column, same=there[column][0] == kind)
        )
        for column, kind in both
    ]
    found = db.execute(
        sql.SQL(
            "SELECT count(*) FILTER (WHERE t.{k} IS NULL), count(*) FILTER (WHERE s.{k} IS "
            "NULL), {counts} FROM truth.events s FULL JOIN {table} t ON s.{k} = t.{k}"
        ).format(
            k=sql.Identifier(KEY),
            counts=sql.SQL(", ").join(counts),
            table=sql.Identifier(*table.split(".")),
        )
    ).fetchone()
    missing, extra, *differ = found or (0, 0)
    rows = dict(zip((column for column, _ in both), differ, strict=True))
    columns = tuple(
        Column(
            name=column,
            type=kind,
            type_there=there[column][0] if column in there else None,
            differs=rows.get(column, 0),
            null_allowed=must and column in there and not there[column][1],
        )
        for column, kind, must in wanted
    )
    own = tuple(sorted(there.keys() - rows.keys()))
    return Written(name, missing, extra, key, columns, own)


def _differs(column: str, *, same: bool) -> sql.Composed:
    """Compare by image: 1.0 is not 1.00. Of two types only the text can be the same."""
    pattern = (
        "record_send(ROW(s.{c})) IS DISTINCT FROM record_send(ROW(t.{c}))"
        if same
        else "s.{c}::text IS DISTINCT FROM t.{c}::text"
    )
    return sql.SQL(pattern).format(c=sql.Identifier(column))
