"""What `resource discover` says of a table, whatever system it is in."""

from collections.abc import Iterable, Sequence

from schemas.records import Column, DiscoveredColumn, DiscoveredStream

_CHANGE_WORDS = ("updated", "modified", "changed")


def discovered(columns: Iterable[Column]) -> tuple[DiscoveredColumn, ...]:
    """Describe columns."""
    return tuple(DiscoveredColumn(name=c.name, type=c.type, nullable=c.nullable) for c in columns)


def change_times(columns: Iterable[Column | DiscoveredColumn]) -> tuple[str, ...]:
    """Return the times that by their names say when a row changed, those that are never NULL first.

    Candidates for a cursor: a person chooses.
    """
    times = sorted(
        (c.nullable, c.name)
        for c in columns
        if c.type.startswith("timestamp")
        and not c.type.endswith("[]")
        and any(word in c.name.lower() for word in _CHANGE_WORDS)
    )
    return tuple(name for _, name in times)


def described(
    name: str, columns: Sequence[Column], key: tuple[str, ...], *, number: str | None, rows: int
) -> DiscoveredStream:
    """Describe a table of a system that numbers its rows; a merge goes by a time, not by that."""
    times = change_times(columns)
    suggestion = "{mode: replace}"
    if key and times:
        suggestion = f"{{mode: merge, key: [{', '.join(key)}], cursor: {times[0]}}}"
    return DiscoveredStream(
        name=name,
        columns=discovered(columns),
        key=key,
        cursors=times + ((number,) if number else ()),
        rows_estimated=rows,
        suggestion=suggestion,
    )
