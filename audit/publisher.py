"""Bring what was signed to every anchor. Start at `Publisher.look`, which the sealer's loop calls.

One rule: `published_size` moves to the size of a checkpoint only after all configured anchors have
accepted that checkpoint or a later one. Each anchor has a thread of its own, so that one that hangs
delays neither sealing nor the others; it is given the newest checkpoint only, once a second.

What an anchor holds and the database does not is the end: `LogWentBack`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from time import monotonic
from uuid import UUID

from sqlalchemy import Connection, Engine

from audit import memory, metrics, statement
from audit.anchors.base import TIMEOUT_S, Anchor, AnchorFailed
from audit.checkpoint import Checkpoint
from audit.memory import LastSigned
from audit.sealer import LogWentBack, Sealer
from audit.tree import Edge, ProofError
from crypto.signing import PublicKey, note, parse_note, signed_by
from schemas.audit import AuditAction
from schemas.errors import ConfigError, SyncwardError
from storage import seal_watch, sealing
from storage.engine import transaction
from storage.sealing import LogState, Sealed

logger = logging.getLogger(__name__)

#: Seconds between two checkpoints that are published.
PUBLISH_EVERY_S = 1.0
#: Seconds between two looks at what the anchors have accepted.
LOOK_EVERY_S = 0.25
#: After an anchor failed: doubled up to the longest while it keeps failing.
RETRY_FIRST_S = 1.0
RETRY_LONGEST_S = 60.0
#: How long a start waits for what anchors hold.
COMPARE_S = 2.5 * TIMEOUT_S


@dataclass(frozen=True, slots=True)
class Offer:
    """A checkpoint to be published, as a note."""

    note: str
    checkpoint: Checkpoint


def offer_of(log_id: UUID, sealed: Sealed) -> Offer:
    """Return what the database holds as the signed note that it was made from."""
    made = Checkpoint(log_id, sealed.size, sealed.root, sealed.epoch, sealed.signed_at)
    return Offer(note(made.text, sealed.signatures), made)


class AnchorsNotCompared(ConfigError):  # noqa: N818 - reads best where it is raised
    """A sealer that remembers nothing cannot tell whether this is what was signed: it stops."""

    code = "anchors_not_compared"


@dataclass(frozen=True, slots=True)
class Held:
    """The newest checkpoint of ours that an anchor holds, and how many notes are not ours."""

    checkpoint: Checkpoint | None
    foreign: int


class Judge:
    """Compares what anchors hold with the database."""

    def __init__(
        self, engine: Engine, sealer: Sealer, known: Callable[[], Sequence[PublicKey]]
    ) -> None:
        self._engine = engine
        self._sealer = sealer
        self._known = known

    def read(self, anchor: Anchor) -> "Held":
        """Return the newest that an anchor took of what one of our keys signed."""
        foreign = 0
        for group in anchor.notes():
            ours = [found for note_ in group if (found := self._ours(note_)) is not None]
            foreign += len(group) - len(ours)
            if ours:
                return Held(max(ours, key=lambda one: (one.epoch, one.size)), foreign)
        return Held(None, foreign)

    def _ours(self, note_: str) -> Checkpoint | None:
        """Return the checkpoint that a note of an anchor is, if one of our keys signed it."""
        try:
            text, signatures = parse_note(note_)
            signed = signed_by(text, signatures, self._known())
            return Checkpoint.parse(text) if signed else None
        except ValueError:
            return None

    def judge(self, name: str, held: Checkpoint | None) -> None:
        """Raise LogWentBack if the database is not what the anchor holds."""
        with transaction(self._engine) as tx:  # later than the anchor was read: it may only grow
            seen = sealing.state(tx)
            size = held.size if held else 0
            if held is None or not self._contradicts(tx, seen, held):
                if size < seen.published_size:
                    about = {"anchor": name, "size": size, "published": seen.published_size}
                    logger.error("anchor_went_back", extra=about)
                return
        if self._sealer.accepted_loss is not None and held.size > seen.size:
            self._learn(held)
            return
        raise LogWentBack(
            f"audit: {name} holds a checkpoint of {held.size} events of log {held.log_id} (epoch "
            f"{held.epoch}), which the database, with {seen.size} events of log {seen.log_id} "
            f"(epoch {seen.epoch}), does not contain; nothing more is signed. Run: syncward audit "
            "verify; if it was restored from a backup, start once with: syncward sealer "
            "--accept-loss REASON"
        )

    def _contradicts(self, tx: Connection, seen: LogState, held: Checkpoint) -> bool:
        def fetch(level: int, n: int) -> bytes:
            return sealing.tile(tx, level, n)

        if held.log_id == seen.log_id and held.size <= seen.size:
            try:
                if Edge.load(held.size, fetch).root() == held.root:
                    return False
            except (KeyError, ProofError):
                pass
        return held.log_id != seen.log_id or not self._was_accepted(tx, seen, held)

    def _was_accepted(self, tx: Connection, seen: LogState, held: Checkpoint) -> bool:
        """Say whether a later epoch says, signed by us, that what the anchor holds was lost."""
        action = AuditAction.AUDIT_EPOCH_STARTED
        return any(
            statement.is_signed(seen.log_id, action, one.detail, self._known())
            and held.epoch < int(one.detail["epoch"] or 0) <= seen.epoch
            and int(one.detail["size"] or 0) < held.size
            and _is_within(held, one.detail)
            for one in seal_watch.losses(tx)
        )

    def _learn(self, held: Checkpoint) -> None:
        """Remember what the anchor holds as signed here: the next epoch then says it is lost."""
        last = memory.recall(self._memory)
        if last is None or last.log_id != held.log_id or last.size < held.size:
            keys = tuple(key.line for key in self._sealer.signer.public)
            memory.remember(self._memory, LastSigned(held.log_id, held.size, held.root, keys))

    @property
    def _memory(self) -> Path:
        return memory.path_of(self._sealer.key_path)


def _is_within(held: Checkpoint, loss: statement.Detail) -> bool:
    """Say whether a checkpoint belongs to the history that a signed loss names."""
    lost = int(loss.get("lost_size") or 0)
    same = held.root.hex() == loss.get("lost_root")
    return held.size < lost or (held.size == lost and same)


class Lane:
    """One anchor and its thread."""

    def __init__(self, number: int, kind: str, anchor: Anchor, judge: Judge) -> None:
        self.number = number
        self.name = f"anchor {number} ({kind})"
        self._anchor = anchor
        self._judge = judge
        self._changed = Condition()
        self._offer: Offer | None = None
        self._accepted: Checkpoint | None = None
        self._compared = False
        self._stopping = False
        self._fatal: LogWentBack | None = None
        self._thread = Thread(target=self._run, name=self.name, daemon=True)

    def start(self) -> None:
        """Begin to publish what is offered."""
        self._thread.start()

    def offer(self, offer: Offer) -> None:
        """Give it the newest checkpoint, in place of one that it has not begun with."""
        with self._changed:
            self._offer = offer
            self._changed.notify_all()

    def again(self) -> None:
        """Compare before the next checkpoint: another sealer was here meanwhile."""
        with self._changed:
            self._compared = False
            self._offer = None

    def stop(self, seconds: float) -> None:
        """End the thread, or leave it behind."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)

    @property
    def accepted(self) -> int:
        """How large the newest checkpoint is that it took from us."""
        with self._changed:
            return self._accepted.size if self._accepted else 0

    def raise_if_fatal(self) -> None:
        """Raise what it found, if that is the end."""
        with self._changed:
            if self._fatal is not None:
                raise self._fatal

    def compare(self, *, first: bool = False) -> None:
        """Look at what the anchor holds.

        What nobody of us signed is no evidence, and no reason to publish no more: it is told.
        AnchorFailed if that is all there is where this is the `first` that is ever heard of it.
        """
        if self._anchor.readable:
            held = self._judge.read(self._anchor)
            if held.foreign:
                metrics.ANCHOR_FOREIGN.labels(str(self.number)).inc(held.foreign)
                about = {"anchor": self.name, "notes": held.foreign}
                logger.warning("anchor_foreign_notes", extra=about)
            if first and held.foreign and held.checkpoint is None:
                raise AnchorFailed(
                    f"{self.name}: none of its newest {held.foreign} notes was signed by one of "
                    "our keys; if the key was replaced without a rotation, add the old public key "
                    "to SYNCWARD_AUDIT_PUBLIC_KEY"
                )
            self._judge.judge(self.name, held.checkpoint)
        with self._changed:
            self._compared = True

    @property
    def compared(self) -> bool:
        """Whether what it holds is in the database."""
        with self._changed:
            return self._compared

    def failed(self, error: SyncwardError) -> None:
        """Count and say a failure."""
        metrics.ANCHOR_FAILURES.labels(str(self.number)).inc()
        logger.warning("anchor_failed", extra={"anchor": self.name, "reason": error.public})

    def _run(self) -> None:
        pause = RETRY_FIRST_S
        while (offer := self._next()) is not None:
            try:
                if not self._compared:
                    self.compare()
                self._anchor.publish(offer.note, offer.checkpoint)
            except LogWentBack as error:
                with self._changed:
                    self._fatal = error
                return
            except SyncwardError as error:
                self.failed(error)
            except Exception:
                metrics.ANCHOR_FAILURES.labels(str(self.number)).inc()
                logger.exception("anchor_crashed", extra={"anchor": self.name})
            else:
                pause = RETRY_FIRST_S
                with self._changed:
                    self._accepted = offer.checkpoint
                continue
            with self._changed:
                self._compared = False
                self._changed.wait_for(lambda: self._stopping, pause)
            pause = min(2 * pause, RETRY_LONGEST_S)
        self._anchor.close()

    def _next(self) -> Offer | None:
        """Wait for a checkpoint that the anchor does not hold; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._has_work())
            return None if self._stopping else self._offer

    def _has_work(self) -> bool:
        return self._offer is not None and self._offer.checkpoint != self._accepted


class Publisher:
    """All anchors of one log. Used by the sealer's loop only; it waits for no anchor."""

    def __init__(self, engine: Engine, sealer: Sealer, lanes: Sequence[Lane]) -> None:
        self._engine = engine
        self._sealer = sealer
        self._lanes = tuple(lanes)
        self._offered_at = self._looked_at = float("-inf")
        self._held = False

    def compare(self, patience: float = COMPARE_S, *, first: bool = False) -> None:
        """Compare every anchor with the database, before anything is sealed.

        LogWentBack if one holds more. One that does not answer is compared before it is published
        to; AnchorsNotCompared if this is the `first` comparison of a sealer that knows nothing.
        """
        found: list[tuple[Lane, SyncwardError]] = []

        def look(lane: Lane) -> None:
            try:
                lane.compare(first=first)
            except SyncwardError as error:
                found.append((lane, error))

        threads = [Thread(target=look, args=(lane,), daemon=True) for lane in self._lanes]
        for thread in threads:
            thread.start()
        until = monotonic() + patience
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))
        for lane, error in found:
            if isinstance(error, LogWentBack):
                raise error
            if not isinstance(error, AnchorFailed):
                raise error  # the database does not answer
            lane.failed(error)
        if first:
            self._require_compared({lane.name: error.public for lane, error in found})

    def _require_compared(self, why: dict[str, str]) -> None:
        open_ = [lane.name for lane in self._lanes if not lane.compared]
        if open_:
            reasons = "; ".join(f"{name}: {why.get(name, 'it does not answer')}" for name in open_)
            raise AnchorsNotCompared(
                f"audit: this sealer remembers nothing that was signed ({reasons}), so nothing "
                "shows that the database is what was; bring back the anchor or signer.json.last, "
                "or, if you know that all is well, start once with: syncward sealer --accept-loss "
                "REASON"
            )

    def start(self) -> None:
        """Start the anchors' threads."""
        for lane in self._lanes:
            lane.start()

    def stop(self, seconds: float = 2.0) -> None:
        """Stop the threads; one that hangs is left behind."""
        until = monotonic() + seconds
        for lane in self._lanes:
            lane.stop(max(0.0, until - monotonic()))

    def look(self) -> None:
        """Offer the newest checkpoint, and record what all anchors have accepted.

        LogWentBack if an anchor holds what the database does not.
        """
        for lane in self._lanes:
            lane.raise_if_fatal()
        if not self._sealer.holds:
            self._held = False
            return
        if not self._held:
            self._held = True
            for lane in self._lanes:
                lane.again()
        if monotonic() < self._looked_at + LOOK_EVERY_S:
            return
        self._looked_at = monotonic()
        with transaction(self._engine) as tx:
            seen = sealing.state(tx)
            self._record(tx, seen)
            if seen.size == seen.published_size or monotonic() < self._offered_at + PUBLISH_EVERY_S:
                return
            newest = sealing.newest_checkpoint(tx)
        if newest is not None:
            self._offered_at = monotonic()
            self._give(offer_of(seen.log_id, newest))

    def _record(self, tx: Connection, seen: LogState) -> None:
        """Move `published_size` to what every anchor has accepted."""
        everywhere = min((lane.accepted for lane in self._lanes), default=0)
        if everywhere > seen.published_size:
            sealing.published(tx, everywhere)
        for lane in self._lanes:
            behind = sealing.checkpoints(tx, after=max(lane.accepted, seen.published_size), most=1)
            waits = seal_watch.age(tx, behind[0].signed_at) if behind else 0.0
            metrics.ANCHOR_LAG.labels(str(lane.number)).set(waits)

    def _give(self, offer: Offer) -> None:
        text, signatures = parse_note(offer.note)
        try:
            ours = signed_by(text, signatures, self._sealer.signer.public)
        except ValueError:
            ours = []
        if not ours:
            raise ConfigError(
                f"audit: the checkpoint of {offer.checkpoint.size} events in the database was "
                "signed by none of our keys; it is not published. Run: syncward audit verify"
            )
        for lane in self._lanes:
            lane.offer(offer)
