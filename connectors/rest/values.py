"""The types of a manifest's schema: what they are in SQL, and values that keep to them.

Nothing is guessed: a text is no number and a number is no text. A value that does not fit is a
`Misfit`, and the read ends with its stream, field and key.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any

from connectors.rest import exact_json
from schemas.records import Column, Value

Convert = Callable[[object], Value]
#: The same of many values, none of which is None. What it raises says nothing of which it was.
ConvertAll = Callable[[Sequence[object]], Iterable[Value]]

_INT8 = 2**63
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
#: How most APIs write a time: 2026-01-31T23:59:59Z, with milliseconds or microseconds.
_COMMON_LENGTHS = {20, 24, 27}
_TIME = re.compile(
    r"(\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}(?::\d{2})?)(?:[.,](\d{1,12}))?"
    r"( ?(?:[Zz]|[+-]\d{2}:?\d{2}))?"
)


#: What those times and a date look like once every digit is a 0.
_ZEROS = str.maketrans("123456789", "0" * 9)
_COMMON_TIMES = frozenset(
    {"0000-00-00T00:00:00Z", "0000-00-00T00:00:00.000Z", "0000-00-00T00:00:00.000000Z"}
)
_COMMON_DATES = frozenset({"0000-00-00"})


class Misfit(ValueError):  # noqa: N818 - says what it is
    """The value is not one of its field's type."""


class Type(StrEnum):
    """What a field of a schema may be."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    TIMESTAMP = "timestamp"
    DATE = "date"
    OBJECT = "object"
    ARRAY = "array"
    ANY = "any"


class Format(StrEnum):
    """How a timestamp is written."""

    ISO = "iso"  # with its offset
    ISO_UTC = "iso_utc"  # without one it is UTC
    EPOCH = "epoch"  # seconds, also as a text
    EPOCH_MS = "epoch_ms"


_SQL = {
    Type.STRING: "text",
    Type.INTEGER: "bigint",
    Type.NUMBER: "numeric",
    Type.BOOLEAN: "boolean",
    Type.TIMESTAMP: "timestamp with time zone",
    Type.DATE: "date",
    Type.OBJECT: "jsonb",
    Type.ARRAY: "jsonb",
    Type.ANY: "jsonb",
}


def column(name: str, type_: Type, *, nullable: bool = True) -> Column:
    """Return the column of a field."""
    sql = _SQL[type_]
    return Column(name, sql, nullable=nullable, as_text=sql == "jsonb")


def converter(type_: Type, format_: Format = Format.ISO) -> Convert:
    """Return what checks and makes the values of a field; it is never called with None."""
    if type_ is Type.TIMESTAMP:
        return _TIMESTAMPS[format_]
    return _CONVERTERS[type_]


def _string(value: object) -> str:
    if not isinstance(value, str) or "\x00" in value:
        raise Misfit
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Misfit from None
    return value


def _integer(value: object) -> int:
    if isinstance(value, Decimal) and -_INT8 <= value < _INT8 and value == int(value):
        value = int(value)  # 1.0 is 1, whoever writes it so
    if isinstance(value, int) and not isinstance(value, bool) and -_INT8 <= value < _INT8:
        return value
    raise Misfit


def _number(value: object) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    raise Misfit


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise Misfit


def _date(value: object) -> date:
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        raise Misfit
    return date.fromisoformat(value)


def _iso(value: object) -> datetime:
    return _time(value, naive=False)


def _iso_utc(value: object) -> datetime:
    return _time(value, naive=True)


def _time(value: object, *, naive: bool) -> datetime:
    """Read ISO 8601; digits after the microsecond are cut off, `raw` has them."""
    if isinstance(value, str) and _is_common(value):
        return datetime.fromisoformat(value)
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None or (match[3] is None and not naive):
        raise Misfit
    zone = (match[3] or "Z").strip()
    seconds = match[1] if match[1].count(":") == 2 else f"{match[1]}:00"  # noqa: PLR2004 - h:m:s
    fraction = f".{match[2][:6]:0<6}" if match[2] else ""
    if zone in {"Z", "z", "+00:00"}:
        return datetime.fromisoformat(f"{seconds}{fraction}+00:00").replace(tzinfo=UTC)
    return datetime.fromisoformat(f"{seconds}{fraction}{zone}").astimezone(UTC)


def _is_common(text: str) -> bool:
    """Say whether a time is written so that the standard library reads nothing else into it."""
    return (
        len(text) in _COMMON_LENGTHS
        and text[-1] == "Z"
        and text[4] == text[7] == "-"
        and text[10] == "T"
        and text[13] == text[16] == ":"
        and (len(text) == 20 or text[19] == ".")  # noqa: PLR2004 - without a fraction
    )


def _epoch(value: object) -> datetime:
    return _since(value, 1)


def _epoch_ms(value: object) -> datetime:
    return _since(value, 1_000)


def _since(value: object, parts: int) -> datetime:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,15}(?:\.\d{1,9})?", value):
        value = Decimal(value)
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise Misfit
    return _EPOCH + timedelta(microseconds=int(value * 1_000_000 // parts))


def _object(value: object) -> str:
    if isinstance(value, dict):
        return exact_json.write(value)
    raise Misfit


def _array(value: object) -> str:
    if isinstance(value, list):
        return exact_json.write(value)
    raise Misfit


# ── many at once ─────────────────────────────────────────────────────────────────────────────


def all_converter(type_: Type, format_: Format = Format.ISO) -> ConvertAll:
    """Return what does for many values what `converter` does for one: the same, and faster."""
    one = converter(type_, format_)
    if type_ is Type.TIMESTAMP:
        if format_ not in {Format.ISO, Format.ISO_UTC}:
            return each(one)
        return _written_alike(_COMMON_TIMES, datetime.fromisoformat, one)
    if type_ is Type.DATE:
        return _written_alike(_COMMON_DATES, date.fromisoformat, one)
    known = _AS_THEY_ARE.get(type_)
    return each(one) if known is None else _as_they_are(*known, one)


def each(one: Convert) -> ConvertAll:
    """Return what converts one after the other."""

    def convert(values: Sequence[object]) -> Iterable[Value]:
        return map(one, values)

    return convert


def _as_they_are(kind: type, fit: Callable[[Sequence[Any]], bool], one: Convert) -> ConvertAll:
    """Return what hands values on that are all of one kind and fit, and looks at each of others."""

    def convert(values: Sequence[Any]) -> Iterable[Value]:
        if set(map(type, values)) == {kind} and fit(values):
            return values
        return map(one, values)

    return convert


def _written_alike(
    patterns: frozenset[str], read: Callable[[str], Value], one: Convert
) -> ConvertAll:
    """Return what reads texts of well-known patterns, and looks at each where some is none."""
    lengths = set(map(len, patterns))

    def convert(values: Sequence[Any]) -> Iterable[Value]:
        if set(map(type, values)) == {str} and set(map(len, values)) <= lengths:
            zeros = "/".join(values).translate(_ZEROS).split("/")
            if patterns.issuperset(zeros):
                return map(read, values)
        return map(one, values)

    return convert


def _plain_texts(values: Sequence[str]) -> bool:
    return all(map(str.isascii, values)) and True not in ["\x00" in value for value in values]


def _of_64_bits(values: Sequence[int]) -> bool:
    return min(values) >= -_INT8 and max(values) < _INT8


def _any(_values: Sequence[object]) -> bool:
    return True


#: The Python type that a value of such a field has already, and what else it takes.
_AS_THEY_ARE: dict[Type, tuple[type, Callable[[Sequence[Any]], bool]]] = {
    Type.STRING: (str, _plain_texts),
    Type.INTEGER: (int, _of_64_bits),
    Type.NUMBER: (Decimal, _any),
    Type.BOOLEAN: (bool, _any),
}
_CONVERTERS: dict[Type, Convert] = {
    Type.STRING: _string,
    Type.INTEGER: _integer,
    Type.NUMBER: _number,
    Type.BOOLEAN: _boolean,
    Type.DATE: _date,
    Type.OBJECT: _object,
    Type.ARRAY: _array,
    Type.ANY: exact_json.write,
}
_TIMESTAMPS: dict[Format, Convert] = {
    Format.ISO: _iso,
    Format.ISO_UTC: _iso_utc,
    Format.EPOCH: _epoch,
    Format.EPOCH_MS: _epoch_ms,
}


def inferred(values: list[object]) -> Type:
    """Return the narrowest type that all these values fit; they are JSON, and not null."""
    for type_ in (Type.BOOLEAN, Type.INTEGER, Type.NUMBER, Type.TIMESTAMP, Type.DATE, Type.STRING,
                  Type.OBJECT):  # fmt: skip
        if all(_fits(type_, value) for value in values):
            return type_
    return Type.ARRAY


def _fits(type_: Type, value: object) -> bool:
    if type_ is Type.INTEGER and isinstance(value, Decimal):
        return False  # a price that is whole by chance
    try:
        converter(type_)(value)
    except (ValueError, OverflowError):
        return False
    return True
