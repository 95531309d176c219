"""The tree of a log, made again from its events and compared with its tiles. Start at `grow`.

Where events and tiles differ, both trees are made: the next signed root tells which of them is what
was sealed.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from audit.evidence import ACTION, AT, BODY, LEAF, SEQ, XID, Evidence, Row
from audit.findings import Level, Report
from audit.frontier import Frontier
from audit.leaf import leaf
from audit.statement import SIGNED
from audit.tree import HASH_BYTES, TILE_WIDTH
from storage.audit_log import is_cut

_UNKNOWN = bytes(HASH_BYTES)


class Read(NamedTuple):
    """What is kept of an event once its hash was computed; most of an event is its body."""

    place: int  # its index
    seq: int
    xid: int
    at: str
    action: str
    made: bytes | None  # None where there is none, or it is too long to be read
    stored: bytes
    body: str | None  # of a statement of the sealer
    there: bool


def read(rows: Iterable[Row]) -> list[Read]:
    """Compute the hash of each event, and let the event go."""
    return [_read(row) for row in rows]


def _read(row: Row) -> Read:
    if row[BODY] is None:
        return Read(row[0], 0, 0, "", "", None, b"", None, there=False)
    try:
        made: bytes | None = leaf(
            row[AT], row[4] or "", row[5], row[ACTION], row[7], row[8], row[9], row[10], row[BODY]
        )
    except (AttributeError, TypeError):  # a field that every event has is NULL
        return Read(row[0], 0, 0, "", "", None, b"", None, there=False)
    if made != row[LEAF] and is_cut(row):
        made = None
    body = row[BODY] if row[ACTION] in SIGNED else None
    return Read(
        row[0], row[SEQ], row[XID] or 0, row[AT], row[ACTION], made, row[LEAF], body, there=True
    )


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A place at which event and tile differ, until a root tells which of them is right."""

    index: int

    def of_event(self, report: Report) -> None:
        report.add(Level.TAMPERED, "the event is not what was sealed", self.index)

    def of_tile(self, report: Report) -> None:
        report.add(
            Level.TAMPERED,
            f"tile {self.index // TILE_WIDTH} of level 0 is not what was sealed", self.index,
        )  # fmt: skip


class Recomputed:
    """The tree so far. `wanted`: the sizes at which anchors name a root."""

    def __init__(self, evidence: Evidence, report: Report) -> None:
        self._evidence = evidence
        self._report = report
        self.wanted: Sequence[int] = ()
        self.roots: dict[int, bytes] = {}  # at these sizes
        self.size = 0
        self.missing: list[tuple[int, int]] = []  # the source says: there is none
        self.absent: list[tuple[int, int]] = []  # the source does not say anything
        self._tiles = Frontier()  # of what the tiles say
        self._events: Frontier | None = None  # of what events say, while that is something else
        self._doubts: list[_Doubt] = []  # of the batches not yet judged
        self._broken = False  # somewhere neither is known: no root can be made any more
        self._diverged = False  # a signed root is not this tree's: no later one can be
        self._upper: dict[int, list[bytes]] = {}
        self._upper_first: dict[int, int] = {}
        self._unknown_tiles: set[int] = set()

    @property
    def proves(self) -> bool:
        """Whether a root still says something of every event so far."""
        return not (self._broken or self._diverged)

    def begin(self, tiles: Frontier, root: bytes) -> None:
        """Begin behind events that are not read, with what their tiles say."""
        self._tiles, self.size = tiles, tiles.size
        self._upper_first = {level: self.size // TILE_WIDTH**level for level in range(1, 8)}
        if tiles.root() != root:
            self._report.add(
                Level.TAMPERED, f"the tiles do not lead to the checkpoint of {self.size}", 0,
                self.size,
            )  # fmt: skip
            self._diverged = True

    def sealed(self, first: int, end: int) -> bytearray:
        """Return what the tiles of level 0 say; zeros where they say nothing."""
        low, high = first // TILE_WIDTH, (end - 1) // TILE_WIDTH
        there = self._evidence.tiles(0, low, high)
        width = TILE_WIDTH * HASH_BYTES
        hashes = bytearray()
        for n in range(low, high + 1):
            tile = there.get(n, b"")
            hashes += tile[:width].ljust(width, b"\0")
        skip = (first - low * TILE_WIDTH) * HASH_BYTES
        return hashes[skip : skip + (end - first) * HASH_BYTES]

    def grow(self, events: Sequence[Read | None], sealed: bytearray) -> None:
        """Let the tree grow by one batch: its events, None where there is none, and its tiles."""
        made = [None if event is None else event.made for event in events]
        if None not in made and b"".join(made) == sealed:  # type: ignore[arg-type]  # as just asked
            leaves: list[bytes] = made  # type: ignore[assignment]  # as above
            self._grow(leaves, leaves)
        else:
            self._doubt(events, made, sealed)

    def _doubt(
        self, events: Sequence[Read | None], made: Sequence[bytes | None], sealed: bytearray
    ) -> None:
        """Grow by a batch in which events and tiles differ, or where one of them is missing."""
        by_tiles, by_events = [], []
        for at, hash_ in enumerate(made):
            said = bytes(sealed[at * HASH_BYTES : (at + 1) * HASH_BYTES])
            index, event = self.size + at, events[at]
            if said == _UNKNOWN:
                self._unknown_tiles.add(index // TILE_WIDTH)
            if hash_ is None:
                self._without(index, event)
                self._broken = self._broken or said == _UNKNOWN
            elif said not in {hash_, _UNKNOWN}:
                self._doubts.append(_Doubt(index))
            by_tiles.append(said if said != _UNKNOWN else hash_ or _UNKNOWN)
            by_events.append(hash_ or said)
        self._grow(by_tiles, by_events)

    def _without(self, index: int, event: Read | None) -> None:
        """Remember an event that is not there; say of one that it is too long to be read."""
        if event is None:
            _extend(self.absent, index)
        elif not event.there:
            _extend(self.missing, index)
        else:
            self._report.add(
                Level.TAMPERED, "the event is longer than any that the database takes", index
            )

    def _grow(self, by_tiles: list[bytes], by_events: list[bytes]) -> None:
        """Let both trees grow, in steps that end where an anchor wants to know the root."""
        begin, end = self.size, self.size + len(by_tiles)
        if by_tiles is not by_events and self._events is None and by_tiles != by_events:
            self._events = self._tiles.copy()
        low, high = bisect_right(self.wanted, begin), bisect_right(self.wanted, end)
        at = 0
        for stop in [*(size - begin for size in self.wanted[low:high]), len(by_tiles)]:
            if stop > at:
                for level, hashes in self._tiles.extend(by_tiles[at:stop]):
                    if self._evidence.live:
                        self._upper.setdefault(level, []).extend(hashes)
                        self._compare_upper(level)
                if self._events is not None:
                    self._events.extend(by_events[at:stop])
            if high > low and not self._broken:
                self.roots[begin + stop] = (self._events or self._tiles).root()
            at = stop
        self.size = end

    def _compare_upper(self, level: int, *, rest: bool = False) -> None:
        """Compare what was computed of a level above 0 with its tiles, once a tile is full."""
        held = self._upper[level]
        first = self._upper_first.setdefault(level, 0)
        while held and (rest or (first + len(held)) // TILE_WIDTH > first // TILE_WIDTH):
            n, at = first // TILE_WIDTH, first % TILE_WIDTH
            hashes = b"".join(held[: TILE_WIDTH - at])
            tile = self._evidence.tiles(level, n, n).get(n, b"")[at * HASH_BYTES :]
            count = len(hashes) // HASH_BYTES
            if len(tile) < len(hashes) or tile[: len(hashes)].count(_UNKNOWN):
                self._report.add(Level.INCOMPLETE, f"tile {n} of level {level} is missing or cut")
            elif tile[: len(hashes)] != hashes and self.proves:
                self._report.add(
                    Level.TAMPERED, f"tile {n} of level {level} is not over its events",
                    first * TILE_WIDTH**level, (first + count) * TILE_WIDTH**level,
                )  # fmt: skip
            del held[:count]
            first += count
        self._upper_first[level] = first

    def compare(self, root: bytes, good: int) -> None:
        """Compare with the root of a checkpoint; events below `good` are proven by one before."""
        report, doubts, self._doubts = self._report, self._doubts, []
        if not self.proves or self._tiles.root() == root:
            for doubt in doubts:
                doubt.of_event(report)
            if self.proves:
                self._events = None  # where they differed is known: go on with what was sealed
        elif self._events is not None and self._events.root() == root:
            for doubt in doubts:
                doubt.of_tile(report)
            self._tiles, self._events = self._events, None
        else:
            self._diverged = True
            report.add(
                Level.TAMPERED,
                f"events and tiles do not lead to the root of the checkpoint of {self.size} events",
                good, self.size,
            )  # fmt: skip
            for doubt in doubts:
                doubt.of_event(report)

    def end(self) -> None:
        """Compare what is left of the levels above, and say which tiles were not there."""
        for level in list(self._upper):
            self._compare_upper(level, rest=True)
        for n in sorted(self._unknown_tiles):
            self._report.add(Level.INCOMPLETE, f"tile {n} of level 0 is missing or cut")


def _extend(ranges: list[tuple[int, int]], index: int) -> None:
    """Add an index to ranges that it comes after."""
    if ranges and ranges[-1][1] == index:
        ranges[-1] = (ranges[-1][0], index + 1)
    else:
        ranges.append((index, index + 1))
