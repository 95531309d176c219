"""Verify the log: recompute every event, tile, root and signature. Start at `Verifier.run`.

Nothing is believed but the public keys that are given. What may change what is accepted (another
key, dropped months, a loss after a restore) counts only as a signed statement of the sealer, sealed
under a checkpoint that a trusted key signed. docs/verify.md says what is proven and what is not.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from audit import anchored, statement
from audit.anchored import Anchored
from audit.checkpoint import Checkpoint
from audit.evidence import ACTION, BODY, LEAF, Batch, Evidence, EvidenceCut, Facts, NotAnExport, Row
from audit.findings import Level, Report
from audit.frontier import Frontier
from audit.leaf import leaf
from audit.statements import Statements
from audit.tree import HASH_BYTES, TILE_WIDTH
from crypto.signing import PublicKey, signed_by

#: A live sealer writes at least a heartbeat a minute.
GAP = timedelta(seconds=180)
#: The newest checkpoint of a live log is younger than this.
STALE = timedelta(minutes=5)

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class _Tree:
    """The tree as it was recomputed so far, twice where events and tiles differ."""

    tiles: Frontier  # of what the tiles say
    events: Frontier | None = None  # of what the events say, while that is something else
    doubts: list[tuple[int, str]] = field(default_factory=list)  # of the batches not yet judged
    broken: bool = False  # somewhere neither is known: no root can be made any more
    diverged: bool = False  # a signed root is not this tree's: no later one can be
    roots: dict[int, bytes] = field(default_factory=dict)  # at the sizes that anchors name
    upper: dict[int, list[bytes]] = field(default_factory=dict)
    upper_first: dict[int, int] = field(default_factory=dict)


class Verifier:
    """One verification of one source of evidence."""

    def __init__(
        self,
        evidence: Evidence,
        keys: Sequence[PublicKey],
        *,
        anchors: Sequence[Path] = (),
        start: int = 0,
        progress: Progress = lambda _done, _of: None,
    ) -> None:
        self._evidence = evidence
        self._progress = progress
        self._start = start
        self._anchor_paths = anchors
        self.report = Report()
        self._said = Statements(keys, self.report)
        self._good = 0  # so many events are proven by a signature
        self._size = 0  # so many events were gone through
        self._missing: list[tuple[int, int]] = []  # the source says: there is none
        self._absent: list[tuple[int, int]] = []  # the source does not say anything
        self._unknown_tiles: set[int] = set()
        self._unknown: list[int] = []  # sizes since the last checkpoint of a trusted key
        self._faults: dict[str, int] = {}  # kinds of faults that would repeat to the end
        self._last: Checkpoint | None = None
        self._place = (0, 0)  # xid and seq of the event before
        self._whole = True

    def run(self) -> Report:
        """Go through the log once; return what was found."""
        report = self.report
        notes = anchored.read(self._anchor_paths, report)
        try:
            self._facts = facts = self._evidence.facts()
        except NotAnExport as error:
            report.add(Level.UNVERIFIABLE, str(error))
            self._evidence.look(report, None)
            return report
        except EvidenceCut as error:
            report.add(Level.INCOMPLETE, str(error))
            self._evidence.look(report, None)
            return report
        report.log_id = facts.log_id
        self._epochs = list(self._evidence.epochs())
        if not self._begin(facts):
            return report
        self._wanted = sorted({n.point.size for n in notes if n.point.size > self._size})
        first = self._size
        for batches, rows in self._evidence.groups(self._size):
            self._group(batches, rows)
            self._progress(self._size, facts.largest)
        report.size = self._size
        self._end(facts, notes, first)
        report.keys = [key.line for key in self._said.keys]
        return report

    # ── where to begin ───────────────────────────────────────────────────────────────────────

    def _begin(self, facts: Facts) -> bool:
        """Begin with an empty tree, or at the checkpoint before `start` with that of the tiles."""
        self._tree = _Tree(Frontier())
        wanted = max(self._start, facts.first)
        batch = self._evidence.batch(wanted) if wanted else None
        if batch is None:
            if wanted and facts.first:
                self.report.add(
                    Level.UNVERIFIABLE, f"no checkpoint at {facts.first}, where this export begins"
                )
                return False
            return True
        self._whole = False
        point = self._parsed(batch)
        if point is None:
            return False
        try:
            self._tree.tiles = self._evidence.frontier(point.size)
        except EvidenceCut:
            self.report.add(
                Level.INCOMPLETE, f"tiles of the first {point.size} events are missing", None
            )
            return False
        self._size = self._good = point.size
        self._place = (batch.last_xid, batch.last_seq)
        for level in range(1, 8):
            self._tree.upper_first[level] = point.size // TILE_WIDTH**level
        if self._tree.tiles.root() != point.root:
            self.report.add(
                Level.TAMPERED, f"the tiles do not lead to the checkpoint of {point.size}", 0,
                point.size,
            )  # fmt: skip
            self._tree.diverged = True
        self._signature(batch, point)
        self.report.note(f"the first {point.size} events are proven by tiles, not read")
        return True

    def _parsed(self, batch: Batch) -> Checkpoint | None:
        try:
            return Checkpoint.parse(batch.text)
        except ValueError:
            self._repeated(
                "unreadable", "a checkpoint is none that can have been signed", self._good, None
            )
            return None

    # ── the log itself ───────────────────────────────────────────────────────────────────────

    def _group(self, batches: Sequence[Batch], rows: Sequence[Row]) -> None:
        """Go through batches that follow each other, with the rows of all of them."""
        points = [(batch, self._parsed(batch)) for batch in batches]
        read = [(batch, point) for batch, point in points if point is not None]
        if not read:
            return
        first, last = self._size, read[-1][1].size
        if last <= first:
            self.report.add(Level.TAMPERED, "checkpoints are not in order", first)
            return
        ordered = self._in_order(rows, first, last)
        sealed = self._sealed_hashes(first, last)
        for batch, point in read:
            begin = point.size - batch.count
            if begin != self._size or batch.count < 1:
                self.report.add(
                    Level.TAMPERED,
                    f"the checkpoint of {point.size} events does not follow that of {self._size}",
                    self._size, point.size,
                )  # fmt: skip
            if point.size <= self._size:
                continue
            if self._last is None or self._last.epoch != point.epoch or not batch.last_seq:
                self._place = (0, 0)  # another server counted transactions from its own beginning
            a, b = self._size - first, point.size - first
            self._leaves(ordered[a:b], sealed[a * HASH_BYTES : b * HASH_BYTES])
            self._judge(batch, point, ordered[b - 1])

    def _in_order(self, rows: Sequence[Row], first: int, end: int) -> list[Row | None]:
        """Return the row of each index, None where there is none (one may say: it is missing)."""
        if [row[0] for row in rows] == list(range(first, end)):
            return list(rows)
        found: list[Row | None] = [None] * (end - first)
        for row in rows:
            if not first <= row[0] < end:
                self.report.add(Level.TAMPERED, f"an event says it has index {row[0]}", first)
            elif found[row[0] - first] is None:
                found[row[0] - first] = row
            else:
                self.report.add(Level.TAMPERED, "two events with one number", row[0])
        return found

    def _sealed_hashes(self, first: int, end: int) -> bytearray:
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

    def _leaves(self, rows: Sequence[Row | None], sealed: bytearray) -> None:
        """Recompute the leaves of one batch and let the tree grow by them."""
        made = [None if row is None or row[BODY] is None else _leaf_of(row) for row in rows]
        if None not in made and b"".join(made) == sealed:  # type: ignore[arg-type]  # as just asked
            leaves: list[bytes] = made  # type: ignore[assignment]  # as above
            self._grow(leaves, leaves)
        else:
            self._doubt(rows, made, sealed)
        self.report.events += len(made) - made.count(None)
        place = self._place
        for index, row in enumerate(rows, self._size - len(rows)):
            if row is None or row[BODY] is None:
                continue
            if row[LEAF] != made[index - self._size + len(rows)]:
                self.report.add(
                    Level.TAMPERED, "the stored hash is not that of the event's fields", index
                )
            if (row[2], row[1]) <= place and self._evidence.live:
                self.report.add(Level.TAMPERED, "not in the order of transaction and number", index)
            place = (row[2], row[1])
            if row[ACTION] in statement.SIGNED:
                self._said.hear(index, row)
        self._place = place

    def _doubt(
        self, rows: Sequence[Row | None], made: Sequence[bytes | None], sealed: bytearray
    ) -> None:
        """Grow by a batch in which events and tiles differ, or where one of them is missing."""
        by_tiles, by_events = [], []
        unknown = bytes(HASH_BYTES)
        for at, hash_ in enumerate(made):
            said = bytes(sealed[at * HASH_BYTES : (at + 1) * HASH_BYTES])
            index = self._size + at
            if said == unknown:
                self._unknown_tiles.add(index // TILE_WIDTH)
            if hash_ is None:
                _extend(self._missing if rows[at] is not None else self._absent, index)
                if said == unknown:
                    self._tree.broken = True
            elif said not in {hash_, unknown}:
                self._tree.doubts.append((index, "the event is not what was sealed"))
            by_tiles.append(said if said != unknown else hash_ or unknown)
            by_events.append(hash_ or said)
        self._grow(by_tiles, by_events)

    def _grow(self, by_tiles: list[bytes], by_events: list[bytes]) -> None:
        """Let both trees grow, in steps that end where an anchor wants to know the root."""
        tree, begin, end = self._tree, self._size, self._size + len(by_tiles)
        if by_tiles is not by_events and tree.events is None and by_tiles != by_events:
            tree.events = tree.tiles.copy()
        low, high = bisect_right(self._wanted, begin), bisect_right(self._wanted, end)
        at = 0
        for stop in [*(size - begin for size in self._wanted[low:high]), len(by_tiles)]:
            if stop > at:
                for level, hashes in tree.tiles.extend(by_tiles[at:stop]):
                    if not self._evidence.live:
                        continue
                    tree.upper.setdefault(level, []).extend(hashes)
                    self._upper(level)
                if tree.events is not None:
                    tree.events.extend(by_events[at:stop])
            if high > low and not tree.broken:
                tree.roots[begin + stop] = (tree.events or tree.tiles).root()
            at = stop
        self._size = end

    def _upper(self, level: int, *, rest: bool = False) -> None:
        """Compare what was computed of a level above 0 with its tiles, once a tile is full."""
        tree = self._tree
        held = tree.upper[level]
        first = tree.upper_first.setdefault(level, 0)
        while held and (rest or (first + len(held)) // TILE_WIDTH > first // TILE_WIDTH):
            n, at = first // TILE_WIDTH, first % TILE_WIDTH
            hashes = b"".join(held[: TILE_WIDTH - at])
            tile = self._evidence.tiles(level, n, n).get(n, b"")[at * HASH_BYTES :]
            count = len(hashes) // HASH_BYTES
            if len(tile) < len(hashes) or tile[: len(hashes)].count(bytes(HASH_BYTES)):
                self.report.add(Level.INCOMPLETE, f"tile {n} of level {level} is missing or cut")
            elif tile[: len(hashes)] != hashes and not (tree.diverged or tree.broken):
                self.report.add(
                    Level.TAMPERED, f"tile {n} of level {level} is not over its events",
                    first * TILE_WIDTH**level, (first + count) * TILE_WIDTH**level,
                )  # fmt: skip
            del held[:count]
            first += count
        tree.upper_first[level] = first

    # ── what was signed ──────────────────────────────────────────────────────────────────────

    def _judge(self, batch: Batch, point: Checkpoint, newest: Row | None) -> None:
        """Compare the tree with one checkpoint, and the checkpoint with its signatures."""
        trusted = self._signature(batch, point)
        self._in_time(point)
        tree = self._tree
        here = newest is not None and newest[BODY] is not None and self._evidence.live
        if here and batch.last_seq and self._place != (batch.last_xid, batch.last_seq):
            self.report.add(
                Level.TAMPERED, "the checkpoint names another event as its last", point.size - 1
            )
        self._place = (batch.last_xid, batch.last_seq)
        if not tree.broken and not tree.diverged:
            if tree.tiles.root() == point.root:
                for index, text in tree.doubts:
                    self.report.add(Level.TAMPERED, text, index)
                tree.events = None  # where they differed is known: go on with what was sealed
            elif tree.events is not None and tree.events.root() == point.root:
                for index, _ in tree.doubts:
                    self.report.add(
                        Level.TAMPERED,
                        f"tile {index // TILE_WIDTH} of level 0 is not what was sealed", index,
                    )  # fmt: skip
                tree.tiles, tree.events = tree.events, None
            else:
                self._diverge(point)
            tree.doubts.clear()
        elif tree.doubts:
            for index, text in tree.doubts:
                self.report.add(Level.TAMPERED, text, index)
            tree.doubts.clear()
        if trusted and not tree.diverged and not tree.broken:
            self._good = point.size
            self._said.believe(point)

    def _diverge(self, point: Checkpoint) -> None:
        self._tree.diverged = True
        self.report.add(
            Level.TAMPERED,
            f"events and tiles do not lead to the root of the checkpoint of {point.size} events",
            self._good, point.size,
        )  # fmt: skip
        for index, text in self._tree.doubts:
            self.report.add(Level.TAMPERED, text, index)

    def _signature(self, batch: Batch, point: Checkpoint) -> bool:
        """Say whether a trusted key signed this checkpoint of this log."""
        if point.log_id != self._facts.log_id:
            self.report.add(
                Level.TAMPERED, f"a checkpoint of another log, {point.log_id}", self._good,
                point.size,
            )  # fmt: skip
            return False
        try:
            trusted = bool(signed_by(batch.text, batch.signatures, self._said.keys))
        except ValueError:
            self._repeated(
                "forged",
                f"the checkpoint of {point.size} events is not what its key signed",
                self._good, point.size,
            )  # fmt: skip
            return False
        if trusted:
            self.report.checkpoints += 1
            self._unknown.clear()
        else:
            self._unknown.append(point.size)
        return trusted

    def _repeated(self, kind: str, text: str, index: int, end: int | None) -> None:
        """Report a fault once; one of its kind follows from it in every later checkpoint."""
        self._faults[kind] = self._faults.get(kind, 0) + 1
        if self._faults[kind] == 1:
            self.report.add(Level.TAMPERED, text, index, end)

    def _in_time(self, point: Checkpoint) -> None:
        """Note gaps and steps of the sealer's clock; check the epoch."""
        before, self._last = self._last, point
        begun = [x for x in self._epochs if x.size < point.size]
        if not begun or begun[-1].epoch != point.epoch:
            self._repeated(
                "epoch", f"the checkpoint of {point.size} events is of an unknown epoch",
                self._good, point.size,
            )  # fmt: skip
        if before is None:
            return
        gap = point.signed_at - before.signed_at
        if gap > GAP:
            self.report.note(
                f"nothing was sealed for {gap.total_seconds():.0f} s before the checkpoint of "
                f"{point.size} events ({point.signed_at:%Y-%m-%d %H:%M:%S} UTC)"
            )
        elif gap < timedelta(0):
            self.report.note(
                f"the sealer's clock went back by {-gap.total_seconds():.1f} s before the "
                f"checkpoint of {point.size} events"
            )

    # ── at the end ───────────────────────────────────────────────────────────────────────────

    def _end(self, facts: Facts, notes: Sequence[Anchored], first: int) -> None:
        for level in list(self._tree.upper):
            self._upper(level, rest=True)
        for n in sorted(self._unknown_tiles):
            self.report.add(Level.INCOMPLETE, f"tile {n} of level 0 is missing or cut")
        self._ends(facts)
        self._said.excuse(self._missing, self._absent, self._root_at)
        losses = self._said.losses(
            self._epochs, [*self._missing, *self._absent], first=first, size=self._size
        )
        anchored.compare(
            notes, self._tree.roots, self._said.keys, losses, self.report,
            log_id=facts.log_id, first=first, size=self._size, complete=facts.complete,
        )  # fmt: skip
        found = self.report.events if self._whole else None
        self._evidence.look(self.report, found)

    def _ends(self, facts: Facts) -> None:
        """Check that the log ends where it says, and that its end is signed and young."""
        report, size = self.report, self._size
        if not report.checkpoints:
            report.add(Level.UNVERIFIABLE, _NO_KEY if size else "nothing is sealed yet")
        elif self._unknown:
            report.add(
                Level.TAMPERED,
                f"{len(self._unknown)} checkpoints up to {size} events are signed by a key that no "
                "trusted key introduced; if it was replaced, give the new public key, too",
                self._good, size,
            )  # fmt: skip
        if size < facts.largest and facts.complete:
            report.add(Level.INCOMPLETE, f"checkpoints from {size} to {facts.largest} are missing")
        if facts.log_size != facts.largest:
            report.add(
                Level.TAMPERED,
                f"the log says that {facts.log_size} events are sealed, its checkpoints reach to "
                f"{facts.largest}: cut off",
                min(facts.log_size, facts.largest),
            )
        tiled = self._evidence.tiled()
        if facts.complete and tiled > size:
            report.add(Level.TAMPERED, f"tiles hold {tiled} events, checkpoints {size}", size)
        if facts.complete and self._last is not None and facts.as_of - self._last.signed_at > STALE:
            report.add(
                Level.INCOMPLETE,
                f"the newest checkpoint is of {self._last.signed_at:%Y-%m-%d %H:%M:%S} UTC: no "
                "sealer runs, or the end was cut off; compare with an anchor",
            )
        for kind, count in self._faults.items():
            if count > 1:
                report.note(f"the same holds for {count - 1} checkpoints that follow ({kind})")

    def _root_at(self, size: int) -> str | None:
        """Return the root that a checkpoint of this size has; all of them were compared by now."""
        batch = self._evidence.batch(size)
        point = None if batch is None else self._parsed(batch)
        return point.root.hex() if point is not None and point.size == size else None


_NO_KEY = (
    "no checkpoint is signed by a key that is trusted here; give the public key of the sealer with "
    "--pubkey (on its host: syncward audit key show)"
)


def _extend(ranges: list[tuple[int, int]], index: int) -> None:
    """Add an index to ranges that it comes after."""
    if ranges and ranges[-1][1] == index:
        ranges[-1] = (ranges[-1][0], index + 1)
    else:
        ranges.append((index, index + 1))


def _leaf_of(row: Row) -> bytes:
    return leaf(
        row[3], row[4] or "", row[5], row[ACTION], row[7], row[8], row[9], row[10], row[11]
    )  # fmt: skip
