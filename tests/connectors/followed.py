"""A stream followed window by window, the way a destination that misses nothing would."""

import time
from contextlib import closing
from itertools import count
from typing import Any
from uuid import uuid4

from connectors import registry
from schemas.records import Batch, Cursor, FarCursor, LoadRequest, StreamResult, WireFormat
from schemas.streams import StreamSpec
from tests.world import LOOSE

_PATIENCE_S = 20


class Followed:
    """Reads a table of a source again and again, each time from where it ended before."""

    def __init__(self, config, secret, table: str, **spec: Any) -> None:
        self._config, self._secret = config, secret
        self.spec = StreamSpec(name=f"public.{table}", **spec)
        self.cursor: Cursor | None = None
        self.batch: Batch | None = None
        #: the first column of each row, in the order in which they came
        self.seen: list[Any] = []

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.batch is None else self.batch.notes

    @property
    def beyond(self) -> FarCursor | None:
        return None if self.batch is None else self.batch.beyond

    @property
    def upper(self) -> str:
        assert self.cursor is not None
        return self.cursor["value"]

    def read(self) -> list[Any]:
        """Read one window; return the first column of its rows."""
        with (
            closing(registry.open_source("postgres", self._config, self._secret, LOOSE)) as source,
            source.extract(self.spec, self.cursor, WireFormat.ROWS) as batches,
        ):
            (self.batch,) = batches
            found = [row[0] for group in self.batch.groups for row in group.rows]
        self.cursor = self.batch.upper
        self.seen += found
        return found

    def until(self, wanted: set[Any]) -> None:
        """Read until all of these have come."""
        end = time.monotonic() + _PATIENCE_S
        while not wanted <= set(self.seen):
            assert time.monotonic() < end, (wanted - set(self.seen), self.notes)
            self.read()


def followed(pair, table: str, **spec: Any) -> Followed:
    """Follow a table of a pair's source."""
    return Followed(pair.config("source"), pair.secret("source"), table, **spec)


class Loaded:
    """A stream of a pair that is loaded again and again."""

    def __init__(self, pair, table: str, **spec: Any) -> None:
        self._ends = [(pair.config(r), pair.secret(r), LOOSE) for r in ("source", "destination")]
        self.spec = StreamSpec(name=f"public.{table}", **spec)
        self._connection, self._fences = uuid4(), count(1)

    def sync(self) -> StreamResult:
        with (
            closing(registry.open_source("postgres", *self._ends[0])) as source,
            closing(registry.open_destination("postgres", *self._ends[1])) as destination,
        ):
            fence = next(self._fences)
            request = LoadRequest(self._connection, uuid4(), 1, fence, self.spec, "acme")
            known = destination.claim_stream(request)
            with source.extract(self.spec, known.cursor, WireFormat.PG_BINARY) as batches:
                return destination.load(request, next(batches))
