"""Where a verifier reads: what it needs of a live database or of an export, nothing believed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from audit.findings import Report
from audit.frontier import Frontier

#: Events of a group of batches, about: what is held in memory at once.
GROUP = 8192
#: Events of one batch at most: no sealer seals more at once, so more is not even read.
MOST = 1 << 16

#: (index, seq, xid, at, account_id, class, action, target_kind, target_id, login, client, body,
#: leaf) as `storage.audit_log.rows` returns them.
Row = tuple[Any, ...]
SEQ, XID, AT, ACTION, BODY, LEAF = 1, 2, 3, 6, 11, 12


class NotAnExport(Exception):  # noqa: N818 - reads best where it is raised
    """The directory is no export of a format that is known here."""


class EvidenceCut(Exception):  # noqa: N818 - as above
    """Something that is needed is not there."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the source says about the log as a whole."""

    log_id: UUID
    first: int  # index of the first event that is here
    log_size: int  # how many events the log says it has sealed
    largest: int  # of its checkpoints
    complete: bool  # whether this reaches up to the largest
    as_of: datetime  # by the clock of who reads, or of who exported


@dataclass(frozen=True, slots=True)
class Batch:
    """Events that were sealed together, and what was signed after them."""

    text: str
    signatures: str
    count: int
    last_xid: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """Why the log went on somewhere else, as the source says outside the log."""

    epoch: int
    size: int
    reason: str
    lost_size: int | None
    lost_root: str | None


@dataclass(frozen=True, slots=True)
class Verified:
    """How far the log was verified, for what only its source can tell beyond that."""

    events: int | None  # so many of its events were found in batches; None if not all were read
    epoch: int = 0  # of the last checkpoint that a trusted key signed, as what follows
    xid: int = 0  # of its last event
    seq: int = 0
    signed_at: datetime | None = None
    certain: bool = False  # whether what is not sealed must lie behind this event


class Evidence(Protocol):
    """A source of evidence; each method may be called once, `tiles` and `batch` at any time."""

    #: Whether here is what only the database has: transactions, tiles above the lowest.
    live: bool

    def facts(self) -> Facts:
        """Say which log this is, and how far it goes; NotAnExport if nobody can tell."""
        ...

    def epochs(self) -> Sequence[Epoch]:
        """Return all epochs, the oldest first."""
        ...

    def batch(self, at_most: int) -> Batch | None:
        """Return the largest checkpoint of at most so many events."""
        ...

    def groups(self, after: int) -> Iterator[tuple[Sequence[Batch], Iterable[Row]]]:
        """Yield batches beyond `after` in their order, in groups, with their events."""
        ...

    def frontier(self, size: int) -> Frontier:
        """Return the tree of a checkpoint's size; EvidenceCut if it cannot be had."""
        ...

    def tiles(self, level: int, first: int, last: int) -> dict[int, bytes]:
        """Return those tiles first <= n <= last of a level that are there."""
        ...

    def tiled(self) -> int:
        """Return how many leaves the tiles hold."""
        ...

    def look(self, report: Report, verified: Verified | None) -> None:
        """Add what only this source can tell; None if nothing could be verified."""
        ...
