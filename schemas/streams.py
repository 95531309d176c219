"""Streams: what of a table is read, and how it is written."""

import re
from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from schemas import conditions
from schemas.mistakes import matching

#: As many as a Postgres table can have.
COLUMNS_MAX = 1_600
#: Rows of one range where a stream does not say otherwise; tables of twice as many are cut.
RANGE_ROWS = 1_000_000

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
    HISTORY = "history"  # as merge, and what a row was before stays


class Drift(StrEnum):
    """What happens to the target when the source's table changes."""

    EVOLVE = "evolve"
    FREEZE = "freeze"
    IGNORE = "ignore"


class Deletes(StrEnum):
    """What becomes of a target's row whose source row is gone."""

    IGNORE = "ignore"  # it stays as it is
    SOFT = "soft"  # it stays and is stamped in _syncward_deleted_at
    HARD = "hard"  # it is deleted


class Guards(BaseModel):
    """When a stream's run stops and asks a person (docs/streams.md); `false` turns one off."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    zero_rows: bool = True
    delete_ratio: float = Field(0.2, ge=0, le=1)  # 1 is off: more than all cannot be deleted
    floor: int = Field(100, ge=0)  # the first two look only where so many rows are served
    duplicate_keys: bool = True
    future_cursor: Duration | None = timedelta(days=1)  # how far beyond now is too far
    narrowed_type: bool = True

    @field_validator("delete_ratio", mode="before")
    @classmethod
    def _never(cls, value: object) -> object:
        return 1.0 if value is False else value

    @field_validator("future_cursor", mode="before")
    @classmethod
    def _not_at_all(cls, value: object) -> object:
        return None if value is False else value


class Columns(BaseModel):
    """Which columns of the source are read: all but some, or some and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    include: tuple[str, ...] = Field((), max_length=COLUMNS_MAX)
    exclude: tuple[str, ...] = Field((), max_length=COLUMNS_MAX)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if bool(self.include) == bool(self.exclude):
            raise ValueError("columns: name some in either include or exclude, e.g. exclude: [ssn]")
        return self

    def takes(self, name: str) -> bool:
        """Say whether a column is read."""
        return name in self.include if self.include else name not in self.exclude


#: What a masked column holds: a token (docs/keys.md), a constant, or its first characters.
MaskRule = Annotated[
    str,
    matching(
        r"^(hmac|redact|truncate\([1-9][0-9]{0,5}\))\Z",
        "write hmac, redact or truncate(N), N being how many characters stay",
    ),
]

#: As many rows of a stream may be rejected in one load, whatever its owner allows: each of them is
#: looked for by itself.
REJECTED_MOST = 10_000


def _rejected_max(value: object) -> object:
    """Read a number of rows or a share of those that are read; raise ValueError with an example."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= REJECTED_MOST:
        return value
    share = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,4})?) ?%", str(value))
    if share is not None and float(share[1]) <= 100:  # noqa: PLR2004 - per cent
        return f"{share[1]}%"
    raise ValueError(f"{value!r} says neither how many rows (0 to {REJECTED_MOST}) nor e.g. 0.1%")


#: Settings that are written only where they are set: an older worker reads all other documents.
_OPTIONAL = frozenset(
    {
        "deletes", "key_sweep", "tombstone", "full_every", "guards", "drift",
        "columns", "mask", "where", "range_rows", "ranges_at_once",
        "rejected_max",
    }
)  # fmt: skip


class StreamSpec(BaseModel):
    """One stream of a connection as its owner wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[
        str,
        matching(
            r"^[^.\x00]+\.[^\x00]+\Z",
            "a stream is called SCHEMA.TABLE, as `resource discover` lists it, e.g. public.orders",
        ),
    ]
    mode: Mode
    key: tuple[str, ...] = ()
    cursor: str | None = None  # a column, or xmin
    overlap: Duration = timedelta(0)
    drift: Drift = Drift.EVOLVE
    settle: Duration | None = None  # how far behind now, where open transactions are invisible
    deletes: Deletes | None = None  # unset: as the mode has it, see `deletion`
    key_sweep: int | None = Field(None, ge=1)  # every so many runs all keys are compared
    tombstone: str | None = None  # a column that says that its row is deleted
    full_every: int | None = Field(None, ge=1)  # every so many runs everything is read
    range_rows: int = Field(RANGE_ROWS, ge=100)  # about so many rows of a large table at a time
    ranges_at_once: int = Field(1, ge=1, le=8)  # each with a session of its own at both ends
    guards: Guards = Guards()
    columns: Columns | None = None
    mask: dict[str, MaskRule] = {}
    where: str | None = None  # see schemas/conditions.py
    #: rows of one load that the destination may refuse: a number, or a share such as 0.1%
    rejected_max: Annotated[int | str, BeforeValidator(_rejected_max)] = 0

    @field_validator("cursor", mode="before")
    @classmethod
    def _one_cursor(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            raise ValueError(  # noqa: TRY004 - pydantic shows no TypeError
                "cursor takes one column: a run reads all rows from its lower bound up to its "
                "upper one, those with equal values too, so a second column would change nothing"
            )
        return value

    @model_validator(mode="after")
    def _modes_have_what_they_need(self) -> Self:
        if self.mode is Mode.MERGE and not self.key:
            raise ValueError(f"{self.name}: merge needs a key, e.g. key: [id]")
        if self.mode is Mode.HISTORY and not self.key:
            raise ValueError(f"{self.name}: history needs a key, e.g. key: [id]")
        if self.mode is Mode.APPEND and not self.cursor:
            raise ValueError(f"{self.name}: append needs a cursor, e.g. cursor: xmin")
        if self.mode is Mode.APPEND and self.overlap:
            raise ValueError(f"{self.name}: overlap would repeat rows in append; use merge")
        if self.mode is Mode.REPLACE and self.cursor:
            raise ValueError(f"{self.name}: replace reads everything; remove the cursor")
        if len(set(self.key)) != len(self.key):
            raise ValueError(f"{self.name}: a key column is named twice")
        return self

    @model_validator(mode="after")
    def _deletes_have_what_they_need(self) -> Self:
        if self.mode is Mode.APPEND and self.deletion is not Deletes.IGNORE:
            raise ValueError(f"{self.name}: append only adds rows; for deletes use mode: merge")
        if self.mode is Mode.HISTORY and self.deletion is Deletes.HARD:
            raise ValueError(
                f"{self.name}: history never removes a row; with deletes: soft the version of a "
                "row that is gone ends"
            )
        if self.key_sweep and (self.mode not in {Mode.MERGE, Mode.HISTORY} or self.cursor is None):
            raise ValueError(f"{self.name}: every run sees all keys already; remove key_sweep")
        if self.full_every and self.cursor is None:
            raise ValueError(f"{self.name}: every run reads everything; remove full_every")
        wants = "key_sweep" if self.key_sweep else "tombstone" if self.tombstone else None
        if wants and self.deletion is Deletes.IGNORE:
            either = "soft" if self.mode is Mode.HISTORY else "soft or hard"
            raise ValueError(f"{self.name}: {wants} finds deleted rows; say deletes: {either}")
        return self

    @model_validator(mode="after")
    def _chosen_columns_are_whole(self) -> Self:
        needed = [*self.key, self.cursor, self.tombstone]
        for name in (*needed, *self.mask):
            if name not in {None, "xmin"} and not self.reads(str(name)):
                what = "a key, cursor or tombstone column" if name in needed else "masked"
                raise ValueError(f"{self.name}: {name} is {what}; it cannot be left out in columns")
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        for name, rule in self.mask.items():
            if name in self.key and rule != "hmac":
                raise ValueError(f"{self.name}: key column {name} can be masked with hmac only")
            if name in {self.cursor, self.tombstone}:
                raise ValueError(
                    f"{self.name}: {name} is the cursor or the tombstone, which the destination "
                    "keeps and compares as it is; it cannot be masked"
                )
        return self

    @field_validator("where")
    @classmethod
    def _where_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            conditions.parse(value)
        return value

    @model_serializer(mode="wrap")
    def _unset_is_not_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        for name in _OPTIONAL & set(written):
            if getattr(self, name) == type(self).model_fields[name].default:
                del written[name]
        return written

    @property
    def deletion(self) -> Deletes:
        """What happens to rows that are gone: a replaced table mirrors its source."""
        if self.deletes is not None:
            return self.deletes
        return Deletes.HARD if self.mode is Mode.REPLACE else Deletes.IGNORE

    def rejects_allowed(self, rows: int | None) -> int:
        """Return how many rows of so many may be rejected; None: that many are not read yet."""
        if isinstance(self.rejected_max, int):
            return self.rejected_max
        if rows is None:
            return REJECTED_MOST
        return min(int(rows * float(self.rejected_max.rstrip("%")) / 100), REJECTED_MOST)

    def reads(self, column: str) -> bool:
        """Say whether a column of the source is read at all."""
        return self.columns is None or self.columns.takes(column)

    @property
    def schema_name(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def table_name(self) -> str:
        return self.name.split(".", 1)[1]
