"""The window of a backfill: no child can be asked for one, so all is read and the rest left out."""

from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from connectors.rest.values import Type
from schemas.errors import ConfigError
from schemas.records import Between, Row
from schemas.streams import StreamSpec

_INT8 = 2**63


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _day(text: str) -> date:
    return _time(text).date()


def _integer(text: str) -> int:
    found = int(text)
    if not -_INT8 <= found < _INT8:
        raise ValueError
    return found


_READ: dict[Type, Callable[[str], Any]] = {
    Type.TIMESTAMP: _time,
    Type.DATE: _day,
    Type.INTEGER: _integer,
    Type.NUMBER: Decimal,
    Type.STRING: str,
}


def inside(spec: StreamSpec, between: Between, type_: Type, place: int) -> Callable[[Row], bool]:
    """Return what says whether a row lies in the window; ConfigError if that cannot be read."""
    read = _READ.get(type_)
    if read is None:
        raise ConfigError(
            f"{spec.name}: its cursor column {spec.cursor} is of type {type_}, which has no order"
        )
    bounds = []
    for option, text in (("--from", between.lower), ("--to", between.upper)):
        try:
            bounds.append(read(text))
        except (ValueError, InvalidOperation):
            raise ConfigError(
                f"{spec.name}: {option} is no {type_}, the type of its cursor column "
                f"{spec.cursor}; write a time as 2026-01-31 or 2026-01-31 12:00:00"
            ) from None
    lower, upper = bounds
    if not lower < upper:
        raise ConfigError(
            f"{spec.name}: --from is not below --to; rows from the first on are read, up to and "
            "without the second"
        )

    def holds(row: Row) -> bool:
        value: Any = row[place]
        return value is not None and bool(lower <= value < upper)

    return holds
