"""What a source hands to a destination, and what both report: shapes, batches, results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from schemas.errors import GuardTripped
from schemas.guards import Finding
from schemas.streams import StreamSpec

#: Code of the guard that stops a run whose destination is ahead of the control database.
CONTROL_RESTORED = "control_restored"

#: Rejected rows that a run's document shows of a stream.
SAMPLE_REJECTED = 20

#: Where a stream resumes. Only the source reads it; everybody else stores and compares it whole.
Cursor = dict[str, str]


class WireFormat(StrEnum):
    """Formats two connectors can agree on, fastest first."""

    PG_BINARY = "pg_binary"  # COPY … (FORMAT binary), relayed unparsed
    ROWS = "rows"  # groups of rows, of the closed set of types that `Value` names


#: What a row of ROWS may hold; connectors/portable.py says which SQL type travels as which.
Value = None | bool | int | float | Decimal | str | bytes | date | time | datetime | UUID
Row = tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Some rows of a batch, and about how many bytes their values have."""

    rows: list[Row]
    size: int


@dataclass(frozen=True, slots=True)
class Column:
    """A column as its source describes it: what its values are, and how they travel."""

    name: str
    type: str  # exact SQL type, e.g. numeric(12,2); user types are schema-qualified
    nullable: bool = True
    as_text: bool = False  # travels as text: its binary form means nothing on another server
    otherwise: str = ""  # the type it is where `type` is missing; "" if there is none
    extension: str = ""  # the extension that brings the type
    labels: tuple[str, ...] = ()  # of an enum, at the source
    #: another column that came later under the same name has another one; 0 if the source has none
    number: int = field(default=0, compare=False)


class Change(StrEnum):
    """How a column of the source differs from the target's."""

    ADDED = "added"
    REMOVED = "removed"
    WIDENED = "widened"
    NARROWED = "narrowed"
    CHANGED = "changed"
    NULLABLE = "nullable"


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """One change of a table, with the types before and after; `str()` is a sentence's part."""

    column: str
    change: Change
    before: str | None
    after: str | None

    def __str__(self) -> str:
        match self.change:
            case Change.ADDED:
                return f"column {self.column} {self.after} is new"
            case Change.REMOVED:
                return f"column {self.column} {self.before} is gone"
            case Change.NULLABLE:
                return f"column {self.column} may be NULL now"
            case _:
                return f"column {self.column} was {self.before} and is {self.after}"


@dataclass(frozen=True, slots=True)
class StreamShape:
    """A table as the source describes it. `key` is () if it has none."""

    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    key_is_unique: bool = False  # the source's own constraint proves the key


@dataclass(frozen=True, slots=True)
class KeySweep:
    """Keys of rows of the source: of all that are not marked as deleted, in the batch's snapshot.

    Or of some that are gone (`Batch.gone`). `chunks` or `groups` may be consumed once, after those
    of the batch.
    """

    columns: tuple[Column, ...]
    chunks: Iterator[bytes]
    groups: Iterator[RowGroup] = field(default_factory=lambda: iter(()))


@dataclass(frozen=True, slots=True)
class FarCursor:
    """The farthest value of a time cursor beyond what its guard allows."""

    text: str
    seconds: int  # since 1970


#: Where a range of keys begins: a value of each column of the key, as the source writes it.
Bound = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a destination has of a large full read that did not come to its end.

    Only the source can tell whether it may go on: with the same columns, on the same server.
    """

    run_id: UUID  # the run that began it
    shape: str  # digest of the source's columns and key, and of its table where it tells
    upper: Cursor | None  # frozen when it began
    bounds: tuple[Bound, ...]
    done: frozenset[int]
    rows: int  # in the ranges that are done

    @property
    def complete(self) -> bool:
        return len(self.done) > len(self.bounds)


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a large full read a batch is: one range of keys, or the end of all of them.

    `bounds` lie between the ranges, so there is one range more; the number after the last range is
    the end, which has no rows of its own.
    """

    bounds: tuple[Bound, ...]
    n: int
    kept: Kept | None = None  # of the read that goes on with this part
    beside: bool = False  # it may be loaded at the same time as others
    lasting: bool = True  # no other attempt may go on: the bounds mean something in this one only
    digest: str = ""  # of the columns and the table; "" where the shape says it all
    #: ends what the source does for ranges beside; no more than that
    stop: Callable[[], None] | None = field(default=None, compare=False)

    @property
    def ranges(self) -> int:
        return len(self.bounds) + 1

    @property
    def is_end(self) -> bool:
        return self.n == self.ranges


@dataclass(frozen=True, slots=True)
class Ranges:
    """How a full read may be cut: ranges of about so many rows, and what there is of it already.

    `at_once` of them may be read at the same time.
    """

    rows: int
    kept: Kept | None = None
    at_once: int = 1


class Purge(StrEnum):
    """What a purge does with a stream's rows at the destination."""

    KEEP = "keep"  # they go out of sight, and can be brought back for a while
    UNDO = "undo"  # they come back
    NOW = "now"  # they are deleted for good, also those that were kept before


class Between(BaseModel):
    """Values of a stream's cursor column as a person wrote them: from the first, below the second.

    Only the source can read them, by the type of its column.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    lower: str = Field(min_length=1, max_length=1_000)
    upper: str = Field(min_length=1, max_length=1_000)


@dataclass(slots=True)
class Batch:
    """Rows of one stream plus the cursor after them.

    `chunks` (of PG_BINARY) or `groups` (of ROWS) may be consumed once, inside the source's
    snapshot; `rows()` is true only after that, and so are `more` and what is in `upper`, where the
    source learns them while it reads. `full` says that these are all rows of the stream,
    not a window of them.
    """

    shape: StreamShape
    wire: WireFormat
    chunks: Iterator[bytes]
    rows: Callable[[], int]
    lower: Cursor | None
    upper: Cursor | None
    full: bool
    notes: tuple[str, ...] = ()  # sentences for the run's log, e.g. who holds the bound back
    warnings: tuple[str, ...] = ()  # more of them, known only when the rows have been read
    groups: Iterator[RowGroup] = field(default_factory=lambda: iter(()))
    keys: KeySweep | None = None  # only where the run sweeps and the batch itself is not all rows
    #: rows of which the source says that they are gone; of them nothing but the key is told
    gone: KeySweep | None = None
    beyond: FarCursor | None = None  # a guard's finding at the source
    masked: bool = False  # the stream's masks have been put on (connectors/masking.py)
    part: Part | None = None  # of a large full read; None: the batch is all that is read
    more: bool = False  # another one follows: the stream is not complete with this one

    @property
    def everything(self) -> bool:
        """Whether the batch is the whole table of its snapshot, without any bound."""
        return self.full and self.upper is None


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that the destination refused: its key as text, and why. Data: never stored in clear."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadCounts:
    """What the destination did with a batch: loaded = inserted + updated + unchanged."""

    inserted: int
    updated: int
    unchanged: int
    deleted: int = 0
    rejected: int = 0
    bytes: int = 0
    #: what was done to the table, for the output and an event each
    changes: tuple[SchemaChange, ...] = ()
    refused: tuple[RejectedRow, ...] = ()  # a few of those rejected

    @property
    def loaded(self) -> int:
        return self.inserted + self.updated + self.unchanged


class StreamResult(BaseModel):
    """One stream's line of a run's output: the clear columns of `run_streams`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    stream: str
    state: str = Field(pattern="^(succeeded|failed|skipped|cancelled)$")
    mode: str
    rows_extracted: int = 0
    rows_loaded: int = 0
    rows_inserted: int = 0
    rows_updated: int = 0
    rows_unchanged: int = 0
    rows_deleted: int = 0
    rows_rejected: int = 0
    bytes: int = 0
    cursor_from: Cursor | None = None
    cursor_to: Cursor | None = None
    seconds: float = 0.0
    schema_hash: str | None = None
    schema_changes: tuple[SchemaChange, ...] = ()
    attempt: int = 1
    error: str | None = None
    #: a few of the rejected rows, for the run's sealed document and nothing else
    rejected: tuple[RejectedRow, ...] = Field((), exclude=True, repr=False)


@dataclass(frozen=True, slots=True)
class StreamClaim:
    """What the destination knows of a stream once this run's fence is in place.

    `result` is the stored result if *this run* has completed the stream already, in an attempt
    whose worker died before it could say so.
    """

    cursor: Cursor | None
    result: StreamResult | None
    #: the highest fence before this run's, and the run that loaded the stream last
    fence_before: int = 0
    last_run: UUID | None = None
    #: this connection has loaded the stream before; what it finds gone, it had loaded
    loaded_before: bool = False
    #: counted in the destination's own state: this run reads everything, or compares all keys
    full_due: bool = False
    sweep_due: bool = False
    #: keeps one range of a large full read where no reader sees it, in a fenced transaction of its
    #: own; None: this destination takes such a read in one piece
    keep: Callable[[Batch], None] | None = None
    #: what there is of one that did not come to its end
    kept: Kept | None = None
    #: ends what this destination does for ranges beside; no more than that
    stop: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class TargetView:
    """A stream's table at the destination beside its source's; None: there is no table yet."""

    columns: tuple[Column, ...] | None
    changes: tuple[SchemaChange, ...] = ()  # what the next run would find


def ahead(stream: str) -> GuardTripped:
    """Make the finding that a destination has seen runs that the control database has not."""
    return GuardTripped(
        f"{stream}: the destination has seen a later run than the control database knows; was the "
        "control database restored? See docs/backup.md. Approve to go on from the destination's "
        "state",
        code=CONTROL_RESTORED,
    )


class ServerReport(BaseModel):
    """Answer of `resource test`."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    server_version: str
    tls: str  # e.g. "TLSv1.3", or "none"
    login: str
    missing: tuple[str, ...] = ()  # sentences: what is missing and what to type


class DiscoveredColumn(BaseModel):
    """A column of a stream that could be read."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: str
    type: str
    nullable: bool


class DiscoveredStream(BaseModel):
    """Answer of `resource discover`, one per table."""

    model_config = ConfigDict(frozen=True, hide_input_in_errors=True)

    name: str  # schema.table
    columns: tuple[DiscoveredColumn, ...]
    key: tuple[str, ...]
    cursors: tuple[str, ...]  # candidates, best first; "xmin" is always possible on a table
    rows_estimated: int
    suggestion: str  # a ready line of YAML, e.g. {mode: merge, key: [id], cursor: updated_at}


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """Everything a destination needs besides the rows to load a batch exactly once."""

    connection_id: UUID
    run_id: UUID
    attempt: int
    fence: int
    stream: StreamSpec
    target_schema: str
    #: replace the content even where the mode would add to it (a full refresh of an append)
    rewrite: bool = False
    #: what a person has approved of what guards found in this run before
    approvals: tuple[Finding, ...] = ()
    #: which key makes the tokens of masked columns; "" where none does
    pseudonyms: str = ""
    #: merge rows beside what was read: cursor, definition and what is counted stay as they are
    backfill: bool = False

    @property
    def selection(self) -> list[str]:
        """What decides which columns and rows are read, and how they look; [] if all as they are.

        A part of what defines a stream: where it changes, everything is read again.
        """
        stream, parts = self.stream, []
        if stream.columns is not None:
            parts += ["include", *sorted(stream.columns.include)]
            parts += ["exclude", *sorted(stream.columns.exclude)]
        if stream.mask:
            parts += ["mask", *(f"{name} {rule}" for name, rule in sorted(stream.mask.items()))]
            parts += [self.pseudonyms]
        if stream.where is not None:
            parts += ["where", stream.where]
        return parts


class Source(Protocol):
    """A system we read from, used by one thread; `cancel` and `cut` come from others."""

    @property
    def wires(self) -> tuple[WireFormat, ...]:
        """The formats it offers, fastest first."""
        ...

    def test(self) -> ServerReport:
        """Say what is there, and what this login lacks for exact reads, each with its next step.

        An error of ours where nothing answers or the login is refused, as of every call here.
        """
        ...

    def discover(self) -> Sequence[DiscoveredStream]:
        """List the streams that can be read, each with a line for a connection; reads no rows."""
        ...

    def extract(
        self,
        stream: StreamSpec,
        cursor: Cursor | None,
        wire: WireFormat,
        *,
        sweep: bool = False,
        ranges: Ranges | None = None,
        between: Between | None = None,
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Open one snapshot and yield its batches in cursor order; None reads everything.

        With `sweep` the last batch brings the keys of all rows, unless it is all rows itself. With
        `ranges` a large full read comes as ranges of keys and their end, each batch with its
        `part`; ranges that are kept already are left out. With `between` the rows are those whose
        cursor column lies there, and nothing else decides; ConfigError if it has no such column.
        They come in ranges, too, if they are many.
        """
        ...

    def cancel(self) -> None:
        """Ask the server to end what it does for us; may be called more than once."""
        ...

    def cut(self) -> None:
        """End the link under a call that cancelling did not end; needs no answer of the server."""
        ...

    def close(self) -> None:
        """Leave nothing open, in the middle of a read, too; what was not committed is undone."""
        ...


class Destination(Protocol):
    """A system we write to, used by one thread; `cancel` and `cut` come from others."""

    @property
    def wires(self) -> tuple[WireFormat, ...]:
        """The formats it takes."""
        ...

    def test(self) -> ServerReport:
        """Say what is there, and what this login lacks for writing, each with its next step."""
        ...

    def claim_stream(self, request: LoadRequest) -> StreamClaim:
        """Raise this run's fence over the stream; waits out a zombie's commit, then bars it."""
        ...

    def highest_fence(self, connection_id: UUID) -> int:
        """Return the highest fence that any stream of the connection has seen; 0 if none."""
        ...

    def load(self, request: LoadRequest, batch: Batch) -> StreamResult:
        """Load the batch, its cursor and its result in one fenced transaction.

        The end of a large full read makes all its ranges visible, and the result is that of all.
        A backfill is merged by key, fenced alike, and leaves the cursor where it is.
        """
        ...

    def compare(self, request: LoadRequest, shape: StreamShape) -> TargetView:
        """Show the stream's table, and what of the source's shape differs; changes nothing."""
        ...

    def reset(self, request: LoadRequest) -> StreamResult:
        """Forget where the claimed stream is read, and what is there of a read; rows stay."""
        ...

    def purge(self, request: LoadRequest, how: Purge) -> StreamResult:
        """Take the claimed stream's rows out of its table, or bring them back, in one step.

        Where it is read is forgotten, or known again, with them.
        """
        ...

    def cancel(self) -> None:
        """Ask the server to end what it does for us; may be called more than once."""
        ...

    def cut(self) -> None:
        """End the link under a call that cancelling did not end; needs no answer of the server."""
        ...

    def close(self) -> None:
        """Leave nothing open, in the middle of a read, too; what was not committed is undone."""
        ...
