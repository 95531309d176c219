"""Which columns and rows of a MariaDB table are read, and which columns leave it to be masked.

What is left out is not in the SELECT. A literal of `where` is read here as its column's type, so
that the server compares numbers as numbers and times as times, and never guesses from a text.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

from connectors import selection
from connectors.mariadb.tables import Table, TableColumn, quoted
from connectors.mariadb.values import Convert
from connectors.portable import Kind, kind_of
from schemas import conditions
from schemas.conditions import All, Among, Compare, Condition, IsNull, Not
from schemas.errors import ConfigError
from schemas.records import Column
from schemas.streams import StreamSpec

#: A condition and its values.
Written = tuple[str, tuple[str | int, ...]]

#: Kinds whose values have the same text in every system, so that equal ones have equal tokens.
_SAME_TEXT = {Kind.BOOL, Kind.INT, Kind.DECIMAL, Kind.TEXT, Kind.UUID, Kind.DATE}
_SAME_TEXT_TYPES = {"json", "bit"}
#: Digits behind the point, and in all, that the server's numbers have.
_SCALE_MAX, _DIGITS_MAX = 38, 65


def selected(stream: StreamSpec, table: Table) -> Table:
    """Return the table as the stream reads it; ConfigError names what it has not, or not so."""
    if selection.is_whole(stream):
        return table
    names = selection.chosen(stream, table.columns)
    fields = tuple(
        _masked(stream, field) if field.column.name in stream.mask else field
        for field in table.fields
        if field.column.name in names
    )
    keys = selection.kept_keys(stream, names, table.keys)
    where, values = _rows(stream, table)
    return replace(
        table,
        fields=fields,
        key=table.key if table.key in keys else (),
        keys=keys,
        rows_where=where,
        rows_values=values,
    )


def _masked(stream: StreamSpec, field: TableColumn) -> TableColumn:
    """Return a column that comes as the text which is masked behind us."""
    column, convert = field.column, field.convert
    same = _kind(field) in _SAME_TEXT or field.declared.data_type in _SAME_TEXT_TYPES
    if convert is None or not same:
        raise ConfigError(
            f"{stream.name}: {column.name} ({field.declared.column_type}) has another text in each "
            "system and cannot be masked; texts, numbers but for floats, booleans, dates, uuids "
            "and JSON can. Leave it out with columns, or read a view that casts it to a text"
        )
    return replace(
        field,
        column=Column(column.name, "text", column.nullable, as_text=True),
        convert=_text_of(convert),
    )


def _text_of(convert: Convert) -> Convert:
    def text(value: str | bytes) -> str:
        made = convert(value)
        if isinstance(made, bool):
            return "true" if made else "false"
        return f"{made:f}" if isinstance(made, Decimal) else str(made)

    return text


def _kind(field: TableColumn) -> Kind | None:
    return None if field.column.as_text else kind_of(field.column.type)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────


def _rows(stream: StreamSpec, table: Table) -> Written:
    if stream.where is None:
        return "1", ()
    parsed = conditions.parse(stream.where)
    known = [column.name for column in table.columns]
    selection.check_known(stream, [test.column for test in conditions.tests(parsed)], known)
    where, values = _sql(stream, table, parsed)
    return f"({where})", values


def _sql(stream: StreamSpec, table: Table, condition: Condition) -> Written:
    match condition:
        case Compare(name, operator, literal):
            column, value, found = _read(stream, table, name, literal)
            return f"{column} {operator} {value}", (found,)
        case Among(name, literals):
            read = [_read(stream, table, name, literal) for literal in literals]
            listed = ", ".join(value for _, value, _ in read)
            return f"{read[0][0]} IN ({listed})", tuple(found for *_, found in read)
        case IsNull(name):  # IS NULL would be true for a zero date
            return f"t.{quoted(name)} <=> NULL", ()
        case Not(part):
            where, values = _sql(stream, table, part)
            return f"(NOT ({where}))", values
        case All(parts):
            return _joined(" AND ", [_sql(stream, table, part) for part in parts])
        case conditions.Any(parts):
            return _joined(" OR ", [_sql(stream, table, part) for part in parts])


def _joined(word: str, parts: list[Written]) -> Written:
    values = tuple(value for _, some in parts for value in some)
    return f"({word.join(where for where, _ in parts)})", values


def _read(stream: StreamSpec, table: Table, name: str, literal: str) -> tuple[str, str, str | int]:
    """Return a column, how a value is compared with it, and the value: of the column's type."""
    field = table.field(name)
    if field is None:
        raise RuntimeError("the columns of a condition are looked up before")
    read, declared = _READ.get(_kind(field) or Kind.BYTES), field.declared.column_type
    if read is None:
        raise selection.incomparable(stream, name, declared)
    try:
        value, found = read(literal)
    except (ValueError, LookupError, OverflowError, InvalidOperation):
        raise selection.incomparable(stream, name, declared) from None
    return f"t.{quoted(name)}", value, found


def _bool(literal: str) -> tuple[str, int]:
    return "%s", {"true": 1, "t": 1, "1": 1, "false": 0, "f": 0, "0": 0}[literal.lower()]


def _int(literal: str) -> tuple[str, int]:
    return "%s", int(literal)


def _decimal(literal: str) -> tuple[str, str]:
    number = Decimal(literal)
    if not number.is_finite() or abs(number.adjusted()) > _DIGITS_MAX:  # before it is written out
        raise ValueError
    text = f"{number:f}"
    scale = len(text.partition(".")[2])
    if scale > _SCALE_MAX or len(text.strip("-").replace(".", "")) > _DIGITS_MAX:
        raise ValueError
    return f"CAST(%s AS DECIMAL({_DIGITS_MAX},{scale}))", text


def _date(literal: str) -> tuple[str, str]:
    return "CAST(%s AS DATE)", date.fromisoformat(literal).isoformat()


def _timestamp(literal: str) -> tuple[str, str]:
    at = datetime.fromisoformat(literal)
    if at.tzinfo is not None:
        raise ValueError
    return "CAST(%s AS DATETIME(6))", at.isoformat(" ", "microseconds")


def _timestamptz(literal: str) -> tuple[str, str]:
    at = datetime.fromisoformat(literal)
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    return "CAST(%s AS DATETIME(6))", at.replace(tzinfo=None).isoformat(" ", "microseconds")


def _time(literal: str) -> tuple[str, str]:
    at = time.fromisoformat(literal)
    if at.tzinfo is not None:
        raise ValueError
    return "CAST(%s AS TIME(6))", at.isoformat("microseconds")


_READ: dict[Kind, Callable[[str], tuple[str, Any]]] = {
    Kind.BOOL: _bool,
    Kind.INT: _int,
    Kind.DECIMAL: _decimal,
    Kind.TEXT: lambda literal: ("%s", literal),
    Kind.UUID: lambda literal: ("%s", str(UUID(literal))),
    Kind.DATE: _date,
    Kind.TIMESTAMP: _timestamp,
    Kind.TIMESTAMPTZ: _timestamptz,
    Kind.TIME: _time,
}
