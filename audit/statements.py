"""What the sealer says in the log, and what follows from it once it is proven. Start at `hear`.

Three events change what is accepted: another key, months that were pruned, a loss after a restore.
They count if a trusted key signed them and if they lie under a checkpoint that one signed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audit import statement
from audit.anchored import Loss
from audit.checkpoint import Checkpoint
from audit.evidence import ACTION, BODY, Epoch, Row
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


class Statements:
    """Holds what was heard until it is proven, and trusts the keys that follow from it."""

    def __init__(self, keys: Sequence[PublicKey], report: Report) -> None:
        self.keys = list(keys)
        self._report = report
        self._pending: list[Statement] = []
        self._prunes: list[Statement] = []
        self._epochs: dict[int, Statement] = {}

    def hear(self, index: int, row: Row) -> None:
        """Keep what an event of the sealer says."""
        try:
            detail = json.loads(row[BODY])["detail"]
            if isinstance(detail, dict):
                self._pending.append(Statement(index, row[ACTION], detail))
                return
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self._report.add(Level.TAMPERED, f"{row[ACTION]} says nothing that can be read", index)

    def believe(self, point: Checkpoint) -> None:
        """Act on what was heard: a trusted checkpoint proves that it was said."""
        held, self._pending = self._pending, []
        for said in held:
            if not statement.is_signed(point.log_id, said.action, said.detail, self.keys):
                self._report.add(
                    Level.TAMPERED, f"{said.action} was not signed by the sealer", said.index
                )
            elif said.action == AuditAction.SIGNER_ROTATED:
                self._rotate(said)
            elif said.action == AuditAction.AUDIT_PRUNED:
                self._prunes.append(said)
            else:
                self._epochs[said.detail.get("epoch", 0)] = said

    def _rotate(self, said: Statement) -> None:
        try:
            fresh = PublicKey.parse(str(said.detail.get("after")))
        except ValueError:
            self._report.add(Level.TAMPERED, "signer.rotated names no key", said.index)
            return
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

    def losses(self, epochs: Sequence[Epoch], gone: Ranges, *, first: int, size: int) -> list[Loss]:
        """Compare epochs with what the sealer said about them; return the losses it declared."""
        losses = []
        rows: dict[int, Epoch] = {row.epoch: row for row in epochs}
        for number, said in sorted(self._epochs.items()):
            detail, row = said.detail, rows.get(number)
            claimed = [detail.get(x) for x in ("size", "why", "lost_size", "lost_root")]
            if row is None or claimed != [row.size, row.reason, row.lost_size, row.lost_root]:
                self._report.add(
                    Level.TAMPERED, f"epoch {number} is not what the sealer said", said.index
                )
            if isinstance(claimed[0], int) and isinstance(claimed[2], int):
                losses.append(Loss(number, claimed[0], claimed[2], str(claimed[3])))
                self._report.note(
                    f"epoch {number} began at {claimed[0]} events after a loss that was accepted "
                    f"({claimed[1]}): {claimed[2]} events had been signed, root {claimed[3]}"
                )
        for row in epochs:
            if row.epoch == 1 or row.epoch in self._epochs or row.size < first:
                continue
            pruned = any(a <= row.size + TILE_WIDTH and b > row.size for a, b in gone)
            if pruned or row.size >= size or self._pending:
                self._report.note(f"epoch {row.epoch} began at {row.size} events; its event is not "
                                 "here (pruned, or not sealed yet)")  # fmt: skip
            else:
                self._report.add(
                    Level.TAMPERED, f"the sealer never said that epoch {row.epoch} began", row.size
                )
        return losses


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
