"""Verify the log: recompute every event, tile, root and signature. Start at `Verifier.run`.

Nothing is believed but the public keys that are given. What may change what is accepted (another
key, dropped months, a loss after a restore) counts only as a signed statement of the sealer, sealed
under a checkpoint that a trusted key signed. docs/verify.md says what is proven and what is not.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from audit import anchored
from audit.checkpoint import Checkpoint
from audit.evidence import (
    MOST,
    Batch,
    Evidence,
    EvidenceCut,
    Facts,
    NotAnExport,
    Row,
    Verified,
)
from audit.findings import Level, Report
from audit.recomputed import Read, Recomputed, read
from audit.statements import Statements
from audit.times import SKEW, Times
from audit.tree import HASH_BYTES
from crypto.signing import PublicKey, signed_by

#: The newest checkpoint of a live log is younger than this.
STALE = timedelta(minutes=5)

Progress = Callable[[int, int], None]


class Verifier:
    """One verification of one source of evidence.

    `Recomputed` makes the tree again, `Times` compares the times of events with signed ones,
    `Statements` knows the keys and what the sealer says in the log.
    """

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
        self._tree = Recomputed(evidence, self.report)
        self._times = Times(self.report)
        self._good = 0  # so many events are proven by a signature
        self._unknown: list[int] = []  # sizes since the last checkpoint of a trusted key
        self._covered: list[int] = []  # sizes of unknown keys that a trusted one covers
        self._faults: dict[str, int] = {}  # kinds of faults that would repeat to the end
        self._place = (0, 0)  # xid and seq of the event before
        self._in_window = 0  # the epoch whose checkpoints name their last event
        self._begun = 0  # so many epochs began before what was gone through
        self._newest: Verified | None = None
        self._whole = True

    def run(self) -> Report:
        """Go through the log once; return what was found."""
        report = self.report
        held = anchored.read(self._anchor_paths, report)
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
        first = self._tree.size
        self._tree.wanted = sorted({n.point.size for n in held.notes if n.point.size > first})
        for batches, rows in self._evidence.groups(first):
            self._group(batches, rows)
            self._progress(self._tree.size, facts.largest)
        report.size = self._tree.size
        self._end(facts, held, first)
        report.keys = [key.line for key in self._said.keys]
        return report

    # ── where to begin ───────────────────────────────────────────────────────────────────────

    def _begin(self, facts: Facts) -> bool:
        """Begin with an empty tree, or at the checkpoint before `start` with that of the tiles."""
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
            tiles = self._evidence.frontier(point.size)
        except EvidenceCut:
            self.report.add(
                Level.INCOMPLETE, f"tiles of the first {point.size} events are missing", None
            )
            return False
        self._good = point.size
        self._place = (batch.last_xid, batch.last_seq)
        self._in_window = point.epoch if batch.last_seq else 0
        self._tree.begin(tiles, point.root)
        if self._signed(batch, point):
            certain = bool(batch.last_seq)
            self._newest = Verified(None, point.epoch, *self._place, point.signed_at, certain)
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

    def _group(self, batches: Sequence[Batch], rows: Iterable[Row]) -> None:
        """Go through batches that follow each other, with the rows of all of them."""
        points = [(batch, self._parsed(batch)) for batch in batches]
        taken = []
        size = self._tree.size
        for batch, point in points:
            if point is not None and self._follows(batch, point, size):
                taken.append((batch, point))
                size = point.size
        if not taken:
            return
        first = self._tree.size
        events = self._in_order(read(rows), first, size)
        sealed = self._tree.sealed(first, size)
        for batch, point in taken:
            a, b = self._tree.size - first, point.size - first
            self._batch(batch, point, events[a:b], sealed[a * HASH_BYTES : b * HASH_BYTES])

    def _follows(self, batch: Batch, point: Checkpoint, size: int) -> bool:
        """Say whether a checkpoint leads on from a size; a hole of some size is gone through."""
        if point.size - batch.count == size and 0 < batch.count <= MOST:
            return True
        goes_on = size < point.size <= size + MOST
        text = f"the checkpoint of {point.size} events does not follow that of {size}"
        if goes_on:
            self.report.add(Level.TAMPERED, text, size, point.size)
        else:
            self._repeated("order", text, size, None)
        return goes_on

    def _in_order(self, events: list[Read], first: int, end: int) -> list[Read | None]:
        """Return the event of each index, None where there is none."""
        if len(events) == end - first and all(
            event.place == index for index, event in enumerate(events, first)
        ):
            return list(events)
        found: list[Read | None] = [None] * (end - first)
        for event in events:
            if not first <= event.place < end:
                self.report.add(Level.TAMPERED, f"an event says it has index {event.place}", first)
            elif found[event.place - first] is None:
                found[event.place - first] = event
            else:
                self.report.add(Level.TAMPERED, "two events with one number", event.place)
        return found

    def _batch(
        self, batch: Batch, point: Checkpoint, events: Sequence[Read | None], sealed: bytearray
    ) -> None:
        """Go through one batch, and judge it by the checkpoint after it."""
        last = self._times.last
        if last is None or last.epoch != point.epoch or not batch.last_seq:
            self._place = (0, 0)  # another server counted transactions from its own beginning
        signed = self._signed(batch, point)
        self._times.follow(point)
        self._of_its_epoch(point)
        times = None
        if signed:
            oldest = min((e.at for e in events if e is not None and e.there), default=None)
            times = self._times.window(point.signed_at, oldest)
        self._tree.grow(events, sealed)
        self._events(events, times)
        newest = events[-1]
        if self._evidence.live:
            self._names_its_last(batch, point, newest)
        certain = self._in_window == point.epoch or self._said.has_begun(point.epoch)
        named = (batch.last_xid, batch.last_seq)
        position = self._place if newest is not None and newest.there else named
        self._place = named
        self._tree.compare(point.root, self._good)
        if signed and self._tree.proves:
            self._good = point.size
            self._said.believe(point, signed)
            certain = certain or self._said.has_begun(point.epoch)
            self._newest = Verified(None, point.epoch, *position, point.signed_at, certain)

    def _events(self, events: Sequence[Read | None], times: tuple[str, str] | None) -> None:
        """Compare each event with its stored hash, its order, and the signed times around it."""
        report, place, live = self.report, self._place, self._evidence.live
        low, high = times or ("", "~")
        for index, event in enumerate(events, self._tree.size - len(events)):
            if event is None or not event.there:
                continue
            if event.made is not None:
                report.events += 1
                if event.stored != event.made:
                    report.add(
                        Level.TAMPERED, "the stored hash is not that of the event's fields", index
                    )
            position = (event.xid, event.seq)
            if live and position <= place:
                report.add(Level.TAMPERED, "not in the order of transaction and number", index)
            place = position
            if times is not None and not low <= event.at <= high:
                self._times.judge(index, event.at, times)
            if event.body is not None:
                self._said.hear(index, event.action, event.body)
        self._place = place

    # ── what was signed ──────────────────────────────────────────────────────────────────────

    def _names_its_last(self, batch: Batch, point: Checkpoint, newest: Read | None) -> None:
        """Check that a checkpoint names its last event; only what an epoch found there has none."""
        if not batch.last_seq:
            if self._in_window == point.epoch:
                self.report.add(
                    Level.TAMPERED, "the checkpoint does not name its last event", point.size - 1
                )
            return
        self._in_window = point.epoch
        there = newest is not None and newest.there
        if there and self._place != (batch.last_xid, batch.last_seq):
            self.report.add(
                Level.TAMPERED, "the checkpoint names another event as its last", point.size - 1
            )

    def _signed(self, batch: Batch, point: Checkpoint) -> list[PublicKey]:
        """Return the keys that signed this checkpoint of this log, if one of them is trusted."""
        if point.log_id != self._facts.log_id:
            self.report.add(
                Level.TAMPERED, f"a checkpoint of another log, {point.log_id}", self._good,
                point.size,
            )  # fmt: skip
            return []
        try:
            found = signed_by(batch.text, batch.signatures, self._said.keys)
        except ValueError:
            self._repeated(
                "forged",
                f"the checkpoint of {point.size} events is not what its key signed",
                self._good, point.size,
            )  # fmt: skip
            return []
        if not found:
            self._unknown.append(point.size)
        elif self._said.trusts(found, point.size):
            self.report.checkpoints += 1
            self._covered += self._unknown
            self._unknown.clear()
            return found
        else:
            self._repeated(
                "replaced",
                f"the checkpoint of {point.size} events is signed only by a key that was replaced "
                "before",
                self._good, point.size,
            )  # fmt: skip
        return []

    def _repeated(self, kind: str, text: str, index: int, end: int | None) -> None:
        """Report a fault once; one of its kind follows from it in every later checkpoint."""
        self._faults[kind] = self._faults.get(kind, 0) + 1
        if self._faults[kind] == 1:
            self.report.add(Level.TAMPERED, text, index, end)

    def _of_its_epoch(self, point: Checkpoint) -> None:
        """Check that the epoch that a checkpoint names is the one that began last."""
        epochs = self._epochs
        while self._begun < len(epochs) and epochs[self._begun].size < point.size:
            self._begun += 1
        if not self._begun or epochs[self._begun - 1].epoch != point.epoch:
            self._repeated(
                "epoch", f"the checkpoint of {point.size} events is of an unknown epoch",
                self._good, point.size,
            )  # fmt: skip

    # ── at the end ───────────────────────────────────────────────────────────────────────────

    def _end(self, facts: Facts, held: anchored.Held, first: int) -> None:
        tree = self._tree
        tree.end()
        self._ends(facts)
        self._said.excuse(tree.missing, tree.absent, self._root_at)
        losses = self._said.losses(
            self._epochs,
            [*tree.missing, *tree.absent],
            first=first,
            size=tree.size,
            complete=facts.complete,
        )
        anchored.compare(
            held, tree.roots, self._said, losses, self.report,
            log_id=facts.log_id, first=first, size=tree.size, complete=facts.complete,
            exported_at=None if self._evidence.live else facts.as_of,
        )  # fmt: skip
        newest = self._newest or Verified(None)
        self._evidence.look(
            self.report, replace(newest, events=self.report.events if self._whole else None)
        )

    def _ends(self, facts: Facts) -> None:
        """Check that the log ends where it says, and that its end is signed and young."""
        report, size = self.report, self._tree.size
        if not report.checkpoints:
            report.add(Level.UNVERIFIABLE, _NO_KEY if size else "nothing is sealed yet")
        elif self._unknown:
            report.add(
                Level.TAMPERED,
                f"{len(self._unknown)} checkpoints up to {size} events are signed by a key that no "
                "trusted key introduced; if it was replaced, give the new public key, too",
                self._good, size,
            )  # fmt: skip
        if self._covered:
            report.note(
                f"{len(self._covered)} checkpoints up to {self._covered[-1]} events are signed by "
                "keys that are not known here; one that a trusted key signed covers them"
            )
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
        self._is_young(facts)
        for kind, count in self._faults.items():
            if count > 1:
                report.note(f"the same holds for {count - 1} checkpoints that follow ({kind})")

    def _is_young(self, facts: Facts) -> None:
        last, newest = self._times.last, self._times.newest
        if facts.complete and last is not None and facts.as_of - last.signed_at > STALE:
            self.report.add(
                Level.INCOMPLETE,
                f"the newest checkpoint is of {last.signed_at:%Y-%m-%d %H:%M:%S} UTC: no "
                "sealer runs, or the end was cut off; compare with an anchor",
            )
        if newest is not None and newest - facts.as_of > SKEW:
            self.report.add(
                Level.INCOMPLETE,
                f"a checkpoint was signed at {newest:%Y-%m-%d %H:%M:%S} UTC, which has not come "
                "yet: the sealer's clock or the one here is wrong, and that of a log whose end was "
                "cut off would look young; set the clocks, and compare with an anchor",
            )

    def _root_at(self, size: int) -> str | None:
        """Return the root that a checkpoint of this size has; all of them were compared by now."""
        batch = self._evidence.batch(size)
        point = None if batch is None else self._parsed(batch)
        return point.root.hex() if point is not None and point.size == size else None


_NO_KEY = (
    "no checkpoint is signed by a key that is trusted here; give the public key of the sealer with "
    "--pubkey (on its host: syncward audit key show)"
)
