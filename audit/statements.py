"""What the sealer says in the log, and what follows from it once it is proven. Start at `hear`.

Three events change what is accepted: another key, months that were pruned, a loss after a restore.
They count if a trusted key signed them and if they lie under a checkpoint that one signed.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from audit import statement
from audit.anchored import Loss
from audit.checkpoint import Checkpoint
from audit.evidence import Epoch
from audit.findings import Level, Report
from audit.tree import TILE_WIDTH
from crypto.signing import PublicKey
from schemas.audit import AuditAction

#: Ranges of indexes.
Ranges = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Statement:
    """What the sealer said in the log, at an index."""

    index: int
    action: str
    detail: dict[str, Any]


@dataclass(slots=True)
class _Begun:
    """What the sealer said of an epoch: when it began, and again when it had looked around."""

    said: list[Statement]
    signed_at: datetime


class Statements:
    """Holds what was heard until it is proven, and trusts the keys that follow from it.

    A key counts up to the size at which the one that replaced it signed alone.
    """

    def __init__(self, keys: Sequence[PublicKey], report: Report) -> None:
        self.keys = list(keys)
        self._report = report
        self._pending: list[Statement] = []
        self._rotations: list[tuple[PublicKey, PublicKey]] = []  # (before, after)
        self._until: dict[PublicKey, int] = {}  # a key that was replaced -> the last size it signs
        self._prunes: list[Statement] = []
        self._epochs: dict[int, _Begun] = {}

    def hear(self, index: int, action: str, body: str) -> None:
        """Keep what an event of the sealer says."""
        try:
            detail = json.loads(body)["detail"]
            if isinstance(detail, dict):
                self._pending.append(Statement(index, action, detail))
                return
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self._report.add(Level.TAMPERED, f"{action} says nothing that can be read", index)

    def trusts(self, signed: Iterable[PublicKey], size: int) -> bool:
        """Say whether one of the keys that signed was not replaced before this size."""
        return any(size <= self._until.get(key, size) for key in signed)

    def has_begun(self, epoch: int) -> bool:
        """Say whether the sealer said of this epoch that it began, and was believed."""
        return epoch in self._epochs

    def believe(self, point: Checkpoint, signed: Sequence[PublicKey]) -> None:
        """Act on what was heard: a trusted checkpoint proves that it was said."""
        for before, after in self._rotations:
            if after in signed and before not in signed and before not in self._until:
                self._until[before] = point.size
                self._report.note(
                    f"{before.name} was replaced: from index {point.size} on it is not believed"
                )
        held, self._pending = self._pending, []
        for said in held:
            if self._is_signed(point, said):
                self._act(said, point)

    def _is_signed(self, point: Checkpoint, said: Statement) -> bool:
        try:
            signed = statement.signers(point.log_id, said.action, said.detail, self.keys)
        except ValueError:
            signed, known = [], True
        else:
            known = bool(signed)
        if self.trusts(signed, said.index + 1):
            return True
        if known:
            self._report.add(
                Level.TAMPERED, f"{said.action} was not signed by the sealer", said.index
            )
        else:
            self._report.add(
                Level.UNVERIFIABLE,
                f"{said.action} is signed by a key that is not known here; if an older key of the "
                "sealer signed it, give that public key, too",
                said.index,
            )
        return False

    def _act(self, said: Statement, point: Checkpoint) -> None:
        if said.action == AuditAction.SIGNER_ROTATED:
            self._rotate(said)
        elif said.action == AuditAction.AUDIT_PRUNED:
            self._prunes.append(said)
        else:
            begun = self._epochs.setdefault(
                said.detail.get("epoch", 0), _Begun([], point.signed_at)
            )
            begun.said.append(said)

    def _rotate(self, said: Statement) -> None:
        try:
            before = PublicKey.parse(str(said.detail.get("before")))
            fresh = PublicKey.parse(str(said.detail.get("after")))
        except ValueError:
            self._report.add(Level.TAMPERED, "signer.rotated names no key", said.index)
            return
        self._rotations.append((before, fresh))
        if fresh not in self.keys:
            self.keys.append(fresh)
            self._report.note(f"from index {said.index} on {fresh.name} signs, too: {fresh.line}")

    def excuse(self, missing: Ranges, absent: Ranges, root_at: Callable[[int], str | None]) -> None:
        """Judge events that are missing: only the record of a prune excuses them."""
        kept, also = 0, set[int]()
        for said in self._prunes:
            found = _pruned(said, root_at)
            if found is None:
                self._report.add(
                    Level.TAMPERED, "the record of a prune is not about this log", said.index
                )
                continue
            kept, also = max(kept, found[0]), also | found[1]
            self._report.note(
                f"events before index {found[0]} and {len(found[1])} more were pruned (asked for "
                f"by {said.detail.get('requested_by')}, approved by "
                f"{said.detail.get('approved_by')}; their export has SHA-256 "
                f"{said.detail.get('sha256')})"
            )
        for ranges, level, text in (
            (missing, Level.TAMPERED, "the event is missing"),
            (absent, Level.INCOMPLETE, "the event is not here"),
        ):
            for begin, end in ranges:
                for index in range(max(begin, kept), end):
                    if index not in also:
                        self._report.add(level, text, index)

    def losses(
        self, epochs: Sequence[Epoch], gone: Ranges, *, first: int, size: int, complete: bool
    ) -> list[Loss]:
        """Compare epochs with what the sealer said about them; return the losses it declared."""
        losses = []
        rows: dict[int, Epoch] = {row.epoch: row for row in epochs}
        for number, begun in sorted(self._epochs.items()):
            row = rows.get(number)
            for said in begun.said:
                at, _, lost, root = claimed = [said.detail.get(x) for x in _OF_EPOCH]
                if row is None or claimed != [row.size, row.reason, row.lost_size, row.lost_root]:
                    self._report.add(
                        Level.TAMPERED, f"epoch {number} is not what the sealer said", said.index
                    )
                if isinstance(at, int) and isinstance(lost, int):
                    losses.append(Loss(number, at, lost, str(root)))
            self._report.note(_epoch_line(number, begun), always=True)
        for row in epochs:
            if row.epoch == 1 or row.epoch in self._epochs or row.size < first:
                continue
            waits = row.size == size or (row.size > size and not complete)
            pruned = any(a <= row.size + TILE_WIDTH and b > row.size for a, b in gone)
            if pruned or waits or self._pending:
                self._report.note(
                    f"epoch {row.epoch} began at {row.size} events ({row.reason:.200}); its event "
                    "is not here (pruned, or not sealed yet)",
                    always=row.epoch <= _SHOWN,
                )
            else:
                self._report.add(
                    Level.TAMPERED, f"the sealer never said that epoch {row.epoch} began", row.size
                )
        return losses


_OF_EPOCH = ("size", "why", "lost_size", "lost_root")
#: Epochs of which nothing signed is here are named up to this one, whatever else was found.
_SHOWN = 100


def _epoch_line(number: int, begun: _Begun) -> str:
    """Say of an epoch why, where and when it began, and what it took in."""
    detail: dict[str, Any] = {}
    for said in begun.said:
        detail |= said.detail
    size = detail.get("size")
    if "left_over" in detail:
        took = f"{detail['left_over']} events that stood in no checkpoint were taken in" + (
            f", the oldest of {detail['oldest']}" if "oldest" in detail else ""
        )
    elif isinstance(size, int):
        took = f"{begun.said[0].index - size} events were sealed ahead of its own"
    else:
        took = "it does not say where"
    lost = ""
    if detail.get("lost_size") is not None:
        lost = (
            f"; a loss was accepted: {detail['lost_size']} events had been signed, root "
            f"{detail.get('lost_root')}"
        )
    return (
        f"epoch {number} began at {size} events ({detail.get('why')}), sealed "
        f"{begun.signed_at:%Y-%m-%d %H:%M:%S} UTC at index {begun.said[0].index}; {took}{lost}"
    )


def _pruned(said: Statement, root_at: Callable[[int], str | None]) -> tuple[int, set[int]] | None:
    """Return (first index that was kept, others that went); None if it is not about this log."""
    first_kept, size = said.detail.get("first_kept"), said.detail.get("size")
    try:
        named = {int(index) for index in str(said.detail["also"]).split(",") if index}
    except (KeyError, ValueError):
        return None
    if type(first_kept) is not int or type(size) is not int:
        return None
    if not (0 <= first_kept <= size <= said.index and max(named, default=-1) < size):
        return None
    return (first_kept, named) if root_at(size) == said.detail.get("root") else None
