"""The few types that every connector understands, and which SQL types travel as them.

`Column.type` is always the exact SQL type, as Postgres writes it. A type that is not in this table
travels as text: its exact `::text` image, and its column says `as_text`. So do json and jsonb, as
the text they were written as.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from struct import Struct
from typing import Any

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


class DoesNotFit(ValueError):  # noqa: N818 - a fact about a value
    """A value is none of the column that is to take it; `args[0]` is that column."""


def fitting(given: Sequence[Column], wanted: Sequence[Column]) -> Fit | None:
    """Return what lays rows out for other columns: by name, NULL for what is not given.

    None if nothing has to be done. A column may be wider than what is given, or narrower, where
    its stream ignores that the source's is wider now: then DoesNotFit for what it would round.
    """
    names = [column.name for column in given]
    places = [names.index(c.name) if c.name in names else None for c in wanted]
    changes = [
        (i, change)
        for i, (column, place) in enumerate(zip(wanted, places, strict=True))
        if place is not None and (change := _change(given[place], column)) is not None
    ]
    if places == list(range(len(given))) and not changes:
        return None

    def fit(row: Row) -> Row:
        values = [None if place is None else row[place] for place in places]
        for i, change in changes:
            if values[i] is not None:
                values[i] = change(values[i])
        return tuple(values)

    return fit


def _change(given: Column, wanted: Column) -> Callable[[Any], Any] | None:
    """Return what makes a value one of another column; None if it is one as it is."""
    before, after = travels_as(given), travels_as(wanted)
    if (before, after) == (Kind.INT, Kind.DECIMAL):
        return Decimal

    def whole(value: Decimal) -> int:
        if not value.is_finite() or value != int(value):
            raise DoesNotFit(wanted)
        return int(value)

    def single(value: float) -> float:
        try:
            rounded: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
        except OverflowError:
            raise DoesNotFit(wanted) from None
        if rounded != value and not math.isnan(value):
            raise DoesNotFit(wanted)
        return value

    if (before, after) == (Kind.DECIMAL, Kind.INT):
        return whole
    return single if (given.type, wanted.type) == ("double precision", "real") else None


#: A number of single precision.
_SINGLE = Struct(">f")


def schema_hash(shape: StreamShape) -> str:
    """Return a digest of names, types and key: a change of it is drift."""
    parts = [f"{c.name} {c.type} {c.nullable}" for c in shape.columns]
    return hashlib.sha256("\n".join([*parts, *shape.key]).encode()).hexdigest()
