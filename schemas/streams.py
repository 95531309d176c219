"""Streams: what of a table is read, and how it is written."""

import re
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(value: object) -> timedelta:
    """Read `10s`, `5m`, `2h` or `1d`; raise ValueError with an example otherwise."""
    if isinstance(value, timedelta):
        return value
    match = re.fullmatch(r"(\d{1,6})([smhd])", str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a duration; write 10s, 5m, 2h or 1d")
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def format_duration(value: timedelta) -> str:
    """Write a duration the way `parse_duration` reads it, in the largest whole unit."""
    seconds = int(value.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


Duration = Annotated[
    timedelta, BeforeValidator(parse_duration), PlainSerializer(format_duration, return_type=str)
]


class Mode(StrEnum):
    REPLACE = "replace"
    APPEND = "append"
    MERGE = "merge"


class Drift(StrEnum):
    """What happens to the target when the source's table changes."""

    EVOLVE = "evolve"
    FREEZE = "freeze"
    IGNORE = "ignore"


class StreamSpec(BaseModel):
    """One stream of a connection as its owner wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[^.\x00]+\.[^\x00]+$")  # schema.table, unquoted
    mode: Mode
    key: tuple[str, ...] = ()
    cursor: str | None = None  # a column, or xmin
    overlap: Duration = timedelta(0)
    drift: Drift = Drift.EVOLVE
    settle: Duration | None = None  # how far behind now, where open transactions are invisible

    @model_validator(mode="after")
    def _modes_have_what_they_need(self) -> Self:
        if self.mode is Mode.MERGE and not self.key:
            raise ValueError(f"{self.name}: merge needs a key, e.g. key: [id]")
        if self.mode is Mode.APPEND and not self.cursor:
            raise ValueError(f"{self.name}: append needs a cursor, e.g. cursor: xmin")
        if self.mode is Mode.APPEND and self.overlap:
            raise ValueError(f"{self.name}: overlap would repeat rows in append; use merge")
        if self.mode is Mode.REPLACE and self.cursor:
            raise ValueError(f"{self.name}: replace reads everything; remove the cursor")
        if len(set(self.key)) != len(self.key):
            raise ValueError(f"{self.name}: a key column is named twice")
        return self

    @property
    def schema_name(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def table_name(self) -> str:
        return self.name.split(".", 1)[1]
