"""The keys of all rows of a read, noted while it is read: what is not among them is gone there."""

import pickle
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from schemas.records import Column, KeySweep, Row, RowGroup
from schemas.streams import StreamSpec


class KeyFile:
    """Keys in a file without a name, as they were noted, until `opened` is closed."""

    def __init__(self, columns: Sequence[Column], opened: ExitStack) -> None:
        self._columns = tuple(columns)
        self._spool = opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115

    def add(self, keys: list[Row]) -> None:
        """Note some keys."""
        pickle.dump(keys, self._spool)

    @property
    def keys(self) -> KeySweep:
        """All of them, for whoever asks when no more are added."""
        return KeySweep(self._columns, iter(()), self._groups())

    def _groups(self) -> Iterator[RowGroup]:
        end = self._spool.tell()
        self._spool.seek(0)
        while self._spool.tell() < end:
            rows = pickle.load(self._spool)  # noqa: S301 - written above
            yield RowGroup(rows, 16 * len(rows) * len(self._columns))


def noted(
    groups: Iterator[RowGroup], shape: Sequence[Column], spec: StreamSpec, opened: ExitStack
) -> tuple[Iterator[RowGroup], KeySweep]:
    """Return the groups, and the keys of their rows that say not that they are deleted.

    The keys lie in a file without a name until `opened` is closed; they come after the groups.
    """
    columns = tuple(c for c in shape if c.name in spec.key)
    names = [c.name for c in shape]
    places = [names.index(c.name) for c in columns]
    dead = None if spec.tombstone is None else names.index(spec.tombstone)
    file = KeyFile(columns, opened)

    def read() -> Iterator[RowGroup]:
        for group in groups:
            alive: list[Row] = [
                tuple(row[i] for i in places)
                for row in group.rows
                if dead is None or row[dead] is None or row[dead] is False
            ]
            file.add(alive)
            yield group

    return read(), file.keys
