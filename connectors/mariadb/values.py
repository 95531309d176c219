"""What MariaDB's types mean here, and values made from the text in which the server writes them.

A value that Postgres' type cannot hold (a zero date, 25 hours as a time of the day, 2 as a boolean)
is a `Misfit`, and the read ends with its column: nothing is guessed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from uuid import UUID

from schemas.records import Value

Convert = Callable[[str | bytes], Value]


class Misfit(ValueError):  # noqa: N818 - says what it is
    """The value is outside of what its type is here."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A column's type as the server describes it."""

    data_type: str
    column_type: str
    precision: int | None = None
    scale: int | None = None
    fraction: int | None = None
    length: int | None = None

    @property
    def unsigned(self) -> bool:
        return "unsigned" in self.column_type


@dataclass(frozen=True, slots=True)
class Reader:
    """The SQL type that a column has here, and what makes its values."""

    type: str
    convert: Convert | None
    as_text: bool = False


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode()


def _int(value: str | bytes) -> int:
    return int(value)


def _bool(value: str | bytes) -> bool:
    number = int(value)
    if number not in {0, 1}:
        raise Misfit
    return bool(number)


def _float(value: str | bytes) -> float:
    return float(value)


def _decimal(value: str | bytes) -> Decimal:
    return Decimal(_text(value))


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _date(value: str | bytes) -> date:
    return date.fromisoformat(_text(value))


_CLOCK = re.compile(r"\d\d:\d\d:\d\d(\.\d{1,6})?", re.ASCII)


def _time(value: str | bytes) -> time:
    text = _text(value)
    if not _CLOCK.fullmatch(text):  # negative, or a hundred hours
        raise Misfit
    return time.fromisoformat(text)


def _timestamp(value: str | bytes) -> datetime:
    return datetime.fromisoformat(_text(value))


def _timestamptz(value: str | bytes) -> datetime:
    return datetime.fromisoformat(_text(value)).replace(tzinfo=UTC)


def _uuid(value: str | bytes) -> UUID:
    return UUID(_text(value))


def _bits(width: int) -> Convert:
    def convert(value: str | bytes) -> str:
        return format(int(value), f"0{width}b")

    return convert


#: Digits after the point of a second that a type without a number has in Postgres.
_FINEST = 6

_INTEGERS = {
    ("tinyint", False): "smallint", ("tinyint", True): "smallint",
    ("smallint", False): "smallint", ("smallint", True): "integer",
    ("mediumint", False): "integer", ("mediumint", True): "integer",
    ("int", False): "integer", ("int", True): "bigint",
    ("bigint", False): "bigint", ("year", False): "smallint", ("year", True): "smallint",
}  # fmt: skip
_PLAIN: dict[str, Reader] = {
    "float": Reader("real", _float),
    "double": Reader("double precision", _float),
    "date": Reader("date", _date),
    "uuid": Reader("uuid", _uuid),
    "inet4": Reader("inet", _text, as_text=True),
    "inet6": Reader("inet", _text, as_text=True),
    "json": Reader("json", _text, as_text=True),
    **dict.fromkeys(("tinytext", "text", "mediumtext", "longtext"), Reader("text", _text)),
    **dict.fromkeys(("enum", "set"), Reader("text", _text)),
    **dict.fromkeys(
        ("binary", "varbinary", "tinyblob", "blob", "mediumblob", "longblob"),
        Reader("bytea", _bytes),
    ),
}
_CLOCKS: dict[str, tuple[str, str, Convert]] = {
    "time": ("time", "without", _time),
    "datetime": ("timestamp", "without", _timestamp),
    "timestamp": ("timestamp", "with", _timestamptz),
}


def reader(declared: Declared) -> Reader:
    """Return what a column is here; without `convert` where no type of Postgres is like it."""
    kind = declared.data_type
    if declared.column_type.startswith("tinyint(1)") and not declared.unsigned:
        return Reader("boolean", _bool)  # what BOOLEAN makes
    if (kind, declared.unsigned) in _INTEGERS:
        return Reader(_INTEGERS[kind, declared.unsigned], _int)
    make = _MEASURED.get(kind)
    return _PLAIN.get(kind, Reader(kind, None)) if make is None else make(declared)


def _decimals(declared: Declared) -> Reader:
    return Reader(f"numeric({declared.precision},{declared.scale})", _decimal)


def _bit(declared: Declared) -> Reader:
    width = declared.precision or 1
    return Reader(f"bit({width})", _bits(width), as_text=True)


def _characters(declared: Declared) -> Reader:
    return Reader(f"character varying({declared.length})" if declared.length else "text", _text)


def _clock(declared: Declared) -> Reader:
    name, zone, convert = _CLOCKS[declared.data_type]
    digits = "" if declared.fraction in {None, _FINEST} else f"({declared.fraction})"
    return Reader(f"{name}{digits} {zone} time zone", convert)


#: Types whose column says how large they are.
_MEASURED: dict[str, Callable[[Declared], Reader]] = {
    "bigint": lambda _: Reader("numeric(20,0)", _decimal),  # unsigned
    "decimal": _decimals,
    "bit": _bit,
    **dict.fromkeys(("char", "varchar"), _characters),
    **dict.fromkeys(_CLOCKS, _clock),
}
