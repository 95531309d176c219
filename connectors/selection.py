"""Which columns of a table a stream takes, and which keys are keys still: of every database alike.

How a condition is written is each connector's own (selection.py in postgres and mariadb).
"""

from collections.abc import Collection, Iterable, Sequence

from schemas.errors import ConfigError
from schemas.records import Column
from schemas.streams import StreamSpec


def is_whole(stream: StreamSpec) -> bool:
    """Say whether the stream takes all rows and columns as they are."""
    return stream.columns is None and not stream.mask and stream.where is None


def chosen(stream: StreamSpec, known: Sequence[Column]) -> tuple[str, ...]:
    """Name the columns that are read; ConfigError lists what columns there are."""
    columns = stream.columns
    named = [*(() if columns is None else (*columns.include, *columns.exclude)), *stream.mask]
    check_known(stream, named, [column.name for column in known])
    found = tuple(column.name for column in known if stream.reads(column.name))
    if not found:
        raise ConfigError(f"{stream.name}: all of its columns are excluded; name one less")
    return found


def check_known(stream: StreamSpec, named: Iterable[str], known: Collection[str]) -> None:
    """ConfigError if the table lacks a column that the stream names."""
    unknown = sorted({name for name in named if name not in known})
    if unknown:
        raise ConfigError(
            f"{stream.name}: no column {', '.join(unknown)} at the source; there are "
            f"{', '.join(known)}"
        )


def kept_keys(
    stream: StreamSpec, columns: Collection[str], keys: Iterable[tuple[str, ...]]
) -> tuple[tuple[str, ...], ...]:
    """Return the keys that still tell rows apart: whole, or with equal tokens for equal values."""
    whole = {name for name in columns if stream.mask.get(name, "hmac") == "hmac"}
    return tuple(key for key in keys if set(key) <= whole)


def incomparable(stream: StreamSpec, column: str, type_: str) -> ConfigError:
    """Say that a literal of `where` is no value of its column; never which."""
    return ConfigError(
        f"{stream.name}: where: column {column} is {type_}, and the source cannot compare it like "
        "that; correct the literal or the test"
    )
