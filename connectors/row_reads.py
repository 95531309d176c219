"""What the databases that are read row by row have in common: a window, its rows, its one batch.

A source says which rows (a `Window`) and how its values become ours (converters of a `Reading`);
`batch_of` makes the batch. Nothing here speaks SQL, and nothing is told to a person but names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from connectors.row_groups import Grouping, sizes
from schemas.errors import ConfigError
from schemas.records import (
    Batch,
    Column,
    Cursor,
    FarCursor,
    KeySweep,
    Row,
    RowGroup,
    StreamShape,
    Value,
    WireFormat,
)
from schemas.streams import Deletes, StreamSpec


@dataclass(frozen=True, slots=True)
class Window:
    """A condition with its values, the cursor before and after the rows, and notes."""

    where: str
    values: tuple[str | int, ...]
    lower: Cursor | None
    upper: Cursor | None
    full: bool
    notes: tuple[str, ...] = ()
    beyond: FarCursor | None = None


@dataclass(slots=True)
class Reading:
    """The rows of one SELECT, whose every value is made by the converter of its column.

    `rows` yields what the system has: the values of the columns behind `first` others. `place`
    names a row by these and by its number in the read, never by a value.
    """

    stream: StreamSpec
    columns: Sequence[Column]
    converters: Sequence[Callable[[Any], Value]]
    rows: Callable[[], Iterator[tuple[Any, ...]]]
    place: Callable[[tuple[Any, ...], int], str] = lambda _, number: f"row {number} of the read"
    first: int = 0
    declared: Sequence[str] = ()  # what the columns are there, where that says more
    seen: int = 0

    def groups(self) -> Iterator[RowGroup]:
        """Yield the rows in bounded groups."""
        converters, first = self.converters, self.first
        grouping = Grouping(sizes(self.columns))
        for values in self.rows():
            self.seen += 1
            try:
                row: Row = tuple(
                    None if value is None else convert(value)
                    for convert, value in zip(converters, values[first:], strict=True)
                )
            except ValueError:  # a Misfit, or a day or an hour that does not exist
                raise self._misfit(values) from None
            group = grouping.add(row)
            if group is not None:
                yield group
        yield from grouping.rest()

    def _misfit(self, values: tuple[Any, ...]) -> ConfigError:
        """Name table, column and row; never the value."""
        shown = [f" ({declared})" for declared in self.declared] or [""] * len(self.columns)
        for column, there, convert, value in zip(
            self.columns, shown, self.converters, values[self.first :], strict=True
        ):
            try:
                if value is not None:
                    convert(value)
            except ValueError:
                return ConfigError(
                    f"{self.stream.name}: column {column.name}{there} of "
                    f"{self.place(values, self.seen)} holds what is no {column.type}; correct it "
                    "there, or read a view that casts it",
                    code="data_refused",
                )
        raise RuntimeError("the value that did not fit fits now")


def batch_of(
    window: Window, reading: Reading, *, key: tuple[str, ...], proven: bool,
    notes: tuple[str, ...] = (),
) -> Batch:  # fmt: skip
    """Make the one batch of a window."""
    return Batch(
        shape=StreamShape(columns=tuple(reading.columns), key=key, key_is_unique=proven),
        wire=WireFormat.ROWS,
        chunks=iter(()),
        groups=reading.groups(),
        rows=lambda: reading.seen,
        lower=window.lower,
        upper=window.upper,
        full=window.full,
        notes=(*window.notes, *notes),
        beyond=window.beyond,
    )


def wants_keys(stream: StreamSpec, batch: Batch, cursor: Cursor | None, *, sweep: bool) -> bool:
    """Say whether the keys of all rows are to come along: only they show what is gone."""
    if stream.deletion is Deletes.IGNORE or not stream.key or batch.everything:
        return False
    return sweep or (batch.full and cursor is not None)


def keys_of(reading: Reading) -> KeySweep:
    """Bring the keys of all rows, in the transaction of the rows."""
    return KeySweep(tuple(reading.columns), iter(()), reading.groups())


def refuse(stream: StreamSpec, *settings: str, instead: str) -> None:
    """ConfigError if a stream has settings that say less than the table, and nobody heeds them."""
    asked = [name for name in settings if getattr(stream, name)]
    if asked:
        raise ConfigError(f"{stream.name}: {', '.join(asked)} cannot be had here; {instead}")


def check_key(stream: StreamSpec, columns: Sequence[Column]) -> None:
    """ConfigError if the table lacks a column of the stream's key."""
    known = {column.name for column in columns}
    missing = [name for name in stream.key if name not in known]
    if missing:
        raise ConfigError(f"{stream.name}: no key column {', '.join(missing)}")


def stored(stream: StreamSpec, value: str) -> Cursor:
    """Return the cursor of a stream that stands at a value of its cursor column."""
    return {"kind": "column", "column": stream.cursor or "", "value": value}


# ── what a person wrote about a backfill ─────────────────────────────────────────────────────


def no_cursor_to_backfill(stream: StreamSpec) -> ConfigError:
    """Say that a window needs a column whose values have an order."""
    return ConfigError(
        f"{stream.name}: a backfill needs a cursor that is a column of numbers, texts or "
        "times; read everything again with: syncward run enqueue CONNECTION --full-refresh "
        f"--stream {stream.name}"
    )


def not_below(stream: StreamSpec) -> ConfigError:
    """Say that the window holds nothing."""
    return ConfigError(
        f"{stream.name}: --from is not below --to; rows from the first on are read, up to and "
        "without the second"
    )


def no_value(stream: StreamSpec, option: str, type_: str) -> ConfigError:
    """Say that an end of the window is no value of the cursor's type; never which."""
    return ConfigError(
        f"{stream.name}: {option} is no {type_}, the type of its cursor column {stream.cursor}; "
        "write a time as 2026-01-31 or 2026-01-31 12:00:00"
    )
