"""Rows of one stream as a child sends them, in batches. Start at `Reading.batches`.

Where a child says how far it is (its state), a batch may end: its rows and the state after them are
one commit of the destination, so a state is never stored before its rows. The last batch ends only
when the child has ended well and its protocol says that all was sent.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from time import monotonic
from typing import Any, Protocol

from connectors.child.between import inside
from connectors.child.process import Child, check_ending
from connectors.child.schema import Declared
from connectors.rest import exact_json
from connectors.rest.manifest import RAW
from connectors.rest.rows import Rows, Words
from connectors.rest.values import Type
from connectors.row_groups import ROWS_MAX, Grouping, sizes
from connectors.row_reads import no_cursor_to_backfill
from connectors.swept_keys import noted
from schemas.errors import ConfigError, TransientError
from schemas.records import Batch, Between, Cursor, Row, RowGroup, WireFormat
from schemas.streams import Deletes, Mode, StreamSpec

#: A batch with fewer rows goes on behind a state, unless it is so old: a commit is not for nothing.
BATCH_ROWS, BATCH_S = ROWS_MAX, 10.0
#: Of a state, which is stored beside the rows.
STATE_MAX = 2**20
#: Of our cursors: whatever the child said in its state.
KIND = "child"
#: A cursor of a stream that is whatever the connector calls its state.
STATE = "state"
_WORDS = Words(
    sender="the connector",
    mend="use a connector whose schema is right",
    add="use `drift: evolve`",
)
_MASKABLE = {Type.STRING, Type.INTEGER}
#: What an operator must know of an append.
_TWICE = (
    "inexact: a connector may send a record again that it has sent before, and append adds it once "
    "more"
)

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Position:
    """How far a child is, as it says itself: all records before it are behind it."""

    cursor: Cursor


class Talk(Protocol):
    """One read of one stream, as a protocol tells of it."""

    @property
    def declared(self) -> Declared | None:
        """The pinned schema, once it is known: always before the first record."""
        ...

    def take(self, line: bytes) -> Record | Position | None:
        """Take a line; return the record or the state of the stream that is in it."""
        ...

    def check_failure(self) -> None:
        """Raise what the child itself says that went wrong, whatever its exit code is."""
        ...

    def check_complete(self) -> None:
        """Raise unless the protocol says that all of the stream was sent; after a good end."""
        ...


@dataclass(frozen=True, slots=True)
class How:
    """How a stream is read."""

    spec: StreamSpec
    cursor: Cursor | None
    whole: bool  # one batch, whatever states come: what it replaces is served until its end
    between: Between | None = None

    @property
    def incremental(self) -> bool:
        return self.spec.cursor is not None and self.between is None


class Reading:
    """One read, from the first line of a child to its end."""

    def __init__(
        self, child: Child, talk: Talk, how: How, *, opened: ExitStack, look: Callable[[], None],
        explaining: Callable[[], AbstractContextManager[None]], notes: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._child = child
        self._talk = talk
        self._how = how
        self._opened = opened  # what is closed when the read has ended
        self._look = look  # whether the child has written its config anew
        self._more_notes = notes
        self._explaining = explaining  # says what it was refused, if it fails
        self._events = self._all_events()
        self._position: Position | None = None
        self._since = 0  # records after the last position
        self._number = 0

    def batches(self) -> Iterator[Batch]:
        """Yield the batches in order; nothing of the destination waits for the child to begin."""
        declared, begun = self._begin()
        rows = self._rows(declared)
        notes = self._notes(declared, rows, begun)
        lower, first = self._lower(), True
        events = chain(begun, self._events)
        more = True
        while more:
            batch = self._batch(rows, events, lower, full=first and self._is_full())
            batch.notes, notes = notes, ()
            yield batch
            lower, first, more = batch.upper, False, batch.more

    def _lower(self) -> Cursor | None:
        between = self._how.between
        return self._how.cursor if between is None else {"kind": KIND, "from": between.lower}

    def _is_full(self) -> bool:
        return self._how.cursor is None and self._how.between is None

    def _all_events(self) -> Iterator[Record | Position]:
        with self._explaining():
            yield from self._sent()

    def _sent(self) -> Iterator[Record | Position]:
        for line in self._child.lines():
            event = self._talk.take(line)
            if event is not None:
                yield event
        ending = self._child.ending()
        self._look()
        self._talk.check_failure()
        check_ending(self._child, ending)
        shown = self._child.shown
        if self._child.torn:
            raise TransientError(
                f"{shown}: ended in the middle of a line; nothing of this batch was loaded",
                code="connector_incomplete",
            )
        self._talk.check_complete()
        if self._how.incremental and self._since and not self._stands_still():
            raise TransientError(
                f"{shown}: sent {self._since:,} records after its last state, so nothing says "
                "where to go on; nothing of this batch was loaded",
                code="connector_incomplete",
            )

    def _stands_still(self) -> bool:
        """Say whether the child's state is the one that it was given, which some do not repeat."""
        given = (self._how.cursor or {}).get("state", "")
        now = given if self._position is None else self._position.cursor["state"]
        return bool(given) and exact_json.parse(given.encode()) == exact_json.parse(now.encode())

    def _begin(self) -> tuple[Declared, list[Record | Position]]:
        """Wait for the schema and for what follows it."""
        begun: list[Record | Position] = []
        for event in self._events:
            begun.append(event)
            if self._talk.declared is not None:
                break
        declared = self._talk.declared
        if declared is None:
            raise RuntimeError("a child that says nothing of its stream is not complete")
        self._check(declared)
        return declared, begun

    def _check(self, declared: Declared) -> None:
        """Refuse what the stream's settings cannot mean with this schema."""
        spec, fields = self._how.spec, declared.fields
        cursor = None if spec.cursor == STATE else spec.cursor
        missing = [n for n in (*spec.key, cursor, spec.tombstone) if n and n not in fields]
        if missing:
            raise ConfigError(
                f"{spec.name}: no column {', '.join(missing)} in the connector's schema",
                code="missing_object",
            )
        for name in spec.mask:
            if name not in fields or fields[name].type not in _MASKABLE:
                raise ConfigError(
                    f"{spec.name}: {name} is no field that can be masked; those of type string and "
                    "integer can"
                )
        if (spec.columns is not None or spec.mask) and declared.raw and spec.reads(RAW):
            raise ConfigError(
                f"{spec.name}: raw holds the whole record and would show what columns and mask "
                "hide; leave it out, too, with columns: {exclude: [raw]}, or say raw: false in the "
                "resource's config"
            )

    def _rows(self, declared: Declared) -> Rows:
        return Rows(self._how.spec.name, declared, Type.STRING, spec=self._how.spec, words=_WORDS)

    def _notes(
        self, declared: Declared, rows: Rows, begun: list[Record | Position]
    ) -> tuple[str, ...]:
        rows.look([event for event in begun if not isinstance(event, Position)])
        notes = self._more_notes + rows.note()
        if declared.left_out:
            count = len(declared.left_out)
            where = f"only in {RAW}" if declared.raw else "not kept"
            notes += (f"{count} fields whose names no column can have, {where}",)
        if self._how.spec.mode is Mode.APPEND and self._how.incremental:
            notes += (_TWICE,)
        return notes

    # ── one batch ────────────────────────────────────────────────────────────────────────────

    def _batch(
        self, rows: Rows, events: Iterator[Record | Position], lower: Cursor | None, *, full: bool
    ) -> Batch:
        counted: list[int] = [0]
        upper = self._upper(lower)
        batch = Batch(
            shape=rows.shape, wire=WireFormat.ROWS, chunks=iter(()), rows=lambda: counted[0],
            lower=lower, upper=upper, full=full,
        )  # fmt: skip
        keep = self._inside(rows)

        def groups() -> Iterator[RowGroup]:
            began, grouping = monotonic(), Grouping(sizes(rows.columns))
            for event in events:
                if isinstance(event, Position):
                    self._since = 0
                    self._position = event
                    self._look()
                    old = monotonic() - began > BATCH_S
                    if not self._how.whole and (counted[0] >= BATCH_ROWS or (counted[0] and old)):
                        batch.more = True
                        break
                    continue
                self._since += 1
                self._number += 1
                row = rows.row(event, None, f"record {self._number}")
                if keep is not None and not keep(row):
                    continue
                counted[0] += 1
                if (group := grouping.add(row)) is not None:
                    self._look()
                    yield group
            if self._how.incremental and upper is not None and self._position is not None:
                upper.update(self._position.cursor)
            yield from grouping.rest()

        batch.groups = groups()
        spec = self._how.spec
        deletes = spec.deletion is not Deletes.IGNORE and spec.key
        if full and self._how.whole and deletes and upper is not None:
            batch.groups, batch.keys = noted(batch.groups, rows.columns, spec, self._opened)
        return batch

    def _upper(self, lower: Cursor | None) -> Cursor | None:
        """Return the cursor after a batch; what the child says while it is read is put into it."""
        between = self._how.between
        if between is not None:
            return {"kind": KIND, "below": between.upper}
        if not self._how.incremental:
            return None
        return {"kind": KIND, "state": "", **(lower or {})}

    def _inside(self, rows: Rows) -> Callable[[Row], bool] | None:
        between, spec = self._how.between, self._how.spec
        if between is None:
            return None
        declared = self._talk.declared
        names = [column.name for column in rows.columns]
        if declared is None or spec.cursor is None or spec.cursor not in declared.fields:
            raise no_cursor_to_backfill(spec)
        type_ = declared.fields[spec.cursor].type
        return inside(spec, between, type_, names.index(spec.cursor))
