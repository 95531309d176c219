"""The few types that every connector understands, and which SQL types travel as them.

`Column.type` is always the exact SQL type, as Postgres writes it. A type that is not in this table
travels as text: its exact `::text` image, and its column says `as_text`. So do json and jsonb, as
the text they were written as.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from schemas.records import Column, Row, StreamShape


class Kind(StrEnum):
    """How a value travels in a row of WireFormat.ROWS, with its Python type."""

    BOOL = "bool"  # bool
    INT = "int"  # int
    FLOAT = "float"  # float
    DECIMAL = "decimal"  # Decimal, NaN and Infinity included
    TEXT = "text"  # str
    BYTES = "bytes"  # bytes
    DATE = "date"  # date
    TIME = "time"  # time without a zone
    TIMESTAMP = "timestamp"  # datetime without a zone
    TIMESTAMPTZ = "timestamptz"  # datetime in UTC
    UUID = "uuid"  # UUID


_KINDS = {
    "boolean": Kind.BOOL,
    "smallint": Kind.INT,
    "integer": Kind.INT,
    "bigint": Kind.INT,
    "real": Kind.FLOAT,
    "double precision": Kind.FLOAT,
    "numeric": Kind.DECIMAL,
    "text": Kind.TEXT,
    "character varying": Kind.TEXT,
    "character": Kind.TEXT,
    "bytea": Kind.BYTES,
    "date": Kind.DATE,
    "time without time zone": Kind.TIME,
    "timestamp without time zone": Kind.TIMESTAMP,
    "timestamp with time zone": Kind.TIMESTAMPTZ,
    "uuid": Kind.UUID,
}
_PARENTHESES = re.compile(r"\([0-9,-]+\)")
_NUMERIC = re.compile(r"numeric\(([0-9]+),(-?[0-9]+)\)")


def kind_of(sql_type: str) -> Kind | None:
    """Return how a SQL type travels; None if as text."""
    return _KINDS.get(_PARENTHESES.sub("", sql_type, count=1))


def travels_as(column: Column) -> Kind:
    """Return the kind of a column's values in a row."""
    return Kind.TEXT if column.as_text else kind_of(column.type) or Kind.TEXT


@dataclass(frozen=True, slots=True)
class Digits:
    """What `numeric(precision,scale)` allows."""

    precision: int
    scale: int


def digits_of(sql_type: str) -> Digits | None:
    """Return the bounds of a numeric type; None if it has none."""
    found = _NUMERIC.fullmatch(sql_type)
    return None if found is None else Digits(int(found[1]), int(found[2]))


Fit = Callable[[Row], Row]


def fitting(given: Sequence[Column], wanted: Sequence[Column]) -> Fit | None:
    """Return what lays rows out for other columns: by name, NULL for what is not given.

    None if nothing has to be done. Of the types that widen only whole numbers change their kind.
    """
    names = [column.name for column in given]
    places = [names.index(c.name) if c.name in names else None for c in wanted]
    decimal = {
        i
        for i, (column, place) in enumerate(zip(wanted, places, strict=True))
        if place is not None
        and travels_as(column) is Kind.DECIMAL
        and travels_as(given[place]) is Kind.INT
    }
    if places == list(range(len(given))) and not decimal:
        return None

    def fit(row: Row) -> Row:
        values = [None if place is None else row[place] for place in places]
        for i in decimal:
            value = values[i]
            if isinstance(value, int):
                values[i] = Decimal(value)
        return tuple(values)

    return fit


def schema_hash(shape: StreamShape) -> str:
    """Return a digest of names, types and key: a change of it is drift."""
    parts = [f"{c.name} {c.type} {c.nullable}" for c in shape.columns]
    return hashlib.sha256("\n".join([*parts, *shape.key]).encode()).hexdigest()
