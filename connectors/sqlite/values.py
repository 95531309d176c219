"""What SQLite's declared types mean, and values that keep to them.

SQLite stores any value in any column unless the table is STRICT. Nothing is guessed: a value that
does not fit the declared type is a `Misfit`, and the read ends with the row's place.
"""

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Context, Decimal, InvalidOperation
from uuid import UUID

from connectors.portable import Digits, Kind, digits_of
from schemas.records import Value

Convert = Callable[[object], Value]


class Misfit(ValueError):  # noqa: N818 - says what it is
    """The value is not one of its column's declared type."""


class NoText:
    """Stands for a text that is not UTF-8."""


def read_text(stored: bytes) -> object:
    """Decode a text; what is none fits no column."""
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return NoText()


_EXACT = {
    "BOOL": "boolean",
    "BOOLEAN": "boolean",
    "DATE": "date",
    "TIME": "time without time zone",
    "DATETIME": "timestamp without time zone",
    "TIMESTAMP": "timestamp without time zone",
    "TIMESTAMPTZ": "timestamp with time zone",
    "TIMESTAMP WITH TIME ZONE": "timestamp with time zone",
    "UUID": "uuid",
    "GUID": "uuid",
    "JSON": "json",
}
#: SQLite's own rules, in its order, for the names that are left.
_CONTAINED = (
    ("INT", "bigint"),
    ("CHAR", "text"),
    ("CLOB", "text"),
    ("TEXT", "text"),
    ("BLOB", "bytea"),
    ("REAL", "double precision"),
    ("FLOA", "double precision"),
    ("DOUB", "double precision"),
)
_DECIMAL = re.compile(r"(?:DECIMAL|NUMERIC)\s*(?:\(\s*(\d{1,3})\s*(?:,\s*(\d{1,3})\s*)?\))?")


def sql_type(declared: str) -> tuple[str, bool]:
    """Return the SQL type that a declared type stands for, and whether it travels as text."""
    name = " ".join(declared.upper().split())
    bare = re.sub(r"\s*\([^)]*\)", "", name)
    if bare in _EXACT:
        return _EXACT[bare], bare == "JSON"
    decimal = _DECIMAL.fullmatch(name)
    if decimal:
        precision, scale = decimal[1], decimal[2] or "0"
        bounded = precision and int(precision) > 0 and int(scale) <= int(precision)
        return (f"numeric({precision},{scale})" if bounded else "numeric"), False
    for part, type_ in _CONTAINED:
        if part in bare:
            return type_, False
    return "text", True  # no type, or one of somebody's own


def converter(type_: str, kind: Kind, *, as_text: bool) -> Convert:
    """Return what checks and makes the values of a column; it is never called with None."""
    if as_text:
        return _image
    if kind is Kind.DECIMAL:
        return _decimal(digits_of(type_))
    return _CONVERTERS[kind]


def _image(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return repr(value)
    raise Misfit


def _bool(value: object) -> bool:
    if value in {0, 1} and isinstance(value, int):
        return bool(value)
    raise Misfit


def _int(value: object) -> int:
    if isinstance(value, int):
        return value
    raise Misfit


def _float(value: object) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, int) and int(float(value)) == value:
        return float(value)
    raise Misfit


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    raise Misfit


def _bytes(value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    raise Misfit


#: The most digits of a double, and then some; SQLite's own text may have more.
_WIDE = Context(prec=2_000)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)


def _decimal(digits: Digits | None) -> Convert:
    unit = Decimal(1).scaleb(-digits.scale) if digits else None

    def convert(value: object) -> Decimal:
        """Take a double as the shortest decimal that means it: 10.10 was stored as 10.1."""
        text = repr(value) if isinstance(value, int | float) else value
        if not isinstance(text, str) or not _NUMBER.fullmatch(text):
            raise Misfit
        number = Decimal(text)
        if unit is None or digits is None:
            return number
        try:
            exact = number.quantize(unit, context=_WIDE)
        except InvalidOperation:
            raise Misfit from None
        if exact != number or (exact.adjusted() >= digits.precision - digits.scale and exact):
            raise Misfit
        return exact

    return convert


_DATE = r"\d{4}-\d\d-\d\d"
_CLOCK = r"\d\d:\d\d(:\d\d(\.\d{1,6})?)?"
_ZONE = r" ?(Z|[+-]\d\d:\d\d)"
_IS_DATE = re.compile(_DATE, re.ASCII)
_IS_CLOCK = re.compile(_CLOCK, re.ASCII)
_IS_TIMESTAMP = re.compile(f"{_DATE}([ T]{_CLOCK})?", re.ASCII)
_IS_TIMESTAMPTZ = re.compile(f"{_DATE}[ T]{_CLOCK}{_ZONE}", re.ASCII)


def _matching(value: object, pattern: re.Pattern[str]) -> str:
    if isinstance(value, str) and pattern.fullmatch(value):
        return value
    raise Misfit


def _date(value: object) -> date:
    return date.fromisoformat(_matching(value, _IS_DATE))


def _time(value: object) -> time:
    return time.fromisoformat(_matching(value, _IS_CLOCK))


def _timestamp(value: object) -> datetime:
    return datetime.fromisoformat(_matching(value, _IS_TIMESTAMP))


def _timestamptz(value: object) -> datetime:
    text = _matching(value, _IS_TIMESTAMPTZ).replace(" +", "+").replace(" Z", "Z")
    return datetime.fromisoformat(text).astimezone(UTC)


def _uuid(value: object) -> UUID:
    if isinstance(value, bytes) and len(value) == 16:  # noqa: PLR2004 - bytes of a UUID
        return UUID(bytes=value)
    return UUID(_text(value))


_CONVERTERS: dict[Kind, Convert] = {
    Kind.BOOL: _bool,
    Kind.INT: _int,
    Kind.FLOAT: _float,
    Kind.TEXT: _text,
    Kind.BYTES: _bytes,
    Kind.DATE: _date,
    Kind.TIME: _time,
    Kind.TIMESTAMP: _timestamp,
    Kind.TIMESTAMPTZ: _timestamptz,
    Kind.UUID: _uuid,
}
