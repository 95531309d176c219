"""What each contestant made of the API's records, beside what they are: column by column."""

from dataclasses import asdict, dataclass

import psycopg
from psycopg import sql

from benchmarks.lab import Lab
from benchmarks.rest_server import record

TRUTH = "truth.customers"
#: What a column of the API is in SQL.
TYPES = {
    "id": "bigint", "email": "text", "name": "text", "balance": "numeric", "orders": "bigint",
    "active": "boolean", "created_at": "timestamp with time zone",
    "updated_at": "timestamp with time zone", "birthday": "date", "note": "text",
    "address": "jsonb",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """A column and what became of it."""

    name: str
    type_there: str | None  # None: it is not there
    differs: int  # rows, compared as what the column is; all, where that cannot be done


@dataclass(frozen=True, slots=True)
class Written:
    """A contestant's table beside the truth."""

    contestant: str
    rows_missing: int
    rows_extra: int
    columns: tuple[Column, ...]

    @property
    def exact(self) -> bool:
        """Whether every record is there once, with every value and the type it should have."""
        whole = not self.rows_missing and not self.rows_extra
        return whole and all(not c.differs and c.type_there == TYPES[c.name] for c in self.columns)

    def plain(self) -> dict[str, object]:
        return {**asdict(self), "exact": self.exact}


def make_truth(made: Lab, rows: int) -> None:
    """Make a table of what the server's records are."""
    columns = ", ".join(f"{name} {type_}" for name, type_ in TYPES.items())
    with made.session(made.destination) as db:
        db.execute(f"CREATE SCHEMA truth; CREATE TABLE {TRUTH} ({columns}, PRIMARY KEY (id))")
        with db.cursor().copy(f"COPY {TRUTH} ({', '.join(TYPES)}) FROM STDIN") as copy:
            for number in range(rows):
                values = record(number)
                copy.write_row([_as_text(values[name]) for name in TYPES])
        db.execute("GRANT USAGE ON SCHEMA truth TO PUBLIC")


def _as_text(value: object) -> object:
    if isinstance(value, dict):
        return psycopg.types.json.Jsonb(value)
    return value if value is None or isinstance(value, bool) else str(value)


def compare(made: Lab, name: str, table: str) -> Written:
    """Compare a contestant's table with the truth, by the key."""
    schema, relation = table.split(".")
    there = sql.Identifier(schema, relation)
    with made.session(made.destination) as db:
        types = dict(
            db.execute(
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
                "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
                (table,),
            ).fetchall()
        )
        missing, extra = (
            _count(db, sql.SQL(query).format(there=there))
            for query in (
                f"SELECT count(*) FROM {TRUTH} t WHERE t.id NOT IN (SELECT id FROM {{there}})",
                "SELECT count(*) - count(DISTINCT id) FROM {there}",
            )
        )
        columns = tuple(
            Column(column, types.get(column), _differs(db, there, column, types.get(column)))
            for column in TYPES
        )
    return Written(name, missing, extra, columns)


def _differs(
    db: psycopg.Connection, there: sql.Identifier, column: str, type_there: str | None
) -> int:
    if type_there is None:
        return _count(db, sql.SQL(f"SELECT count(*) FROM {TRUTH}"))
    query = sql.SQL(
        f"SELECT count(*) FROM {TRUTH} t JOIN {{there}} h USING (id) "
        f"WHERE t.{{column}} IS DISTINCT FROM h.{{column}}::{TYPES[column]}"
    ).format(there=there, column=sql.Identifier(column))
    try:
        return _count(db, query)
    except psycopg.Error:
        return _count(db, sql.SQL(f"SELECT count(*) FROM {TRUTH}"))


def _count(db: psycopg.Connection, query: sql.SQL | sql.Composed) -> int:
    (row,) = db.execute(query).fetchall()
    return int(row[0])
