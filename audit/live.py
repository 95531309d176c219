"""The live database as evidence, and what only a live database can show."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import takewhile
from uuid import UUID

from sqlalchemy import Connection

from audit.checkpoint import Checkpoint
from audit.evidence import GROUP, Batch, Epoch, EvidenceCut, Facts, Row
from audit.findings import SHOWN, Level, Report
from audit.frontier import Frontier
from audit.tree import ProofError
from storage import audit_guard, audit_log, audit_names, sealing
from storage.audit_log import BatchRow

_AT_ONCE = 512


def batch_of(log_id: UUID, row: BatchRow) -> Batch:
    """Return a checkpoint's row as what was signed; a row that nobody can have signed as such."""
    try:
        signed_at = datetime.fromisoformat(row.time)
        text = Checkpoint(log_id, row.size, row.root, row.epoch, signed_at).text
    except (ValueError, OverflowError):
        text = ""
    return Batch(text, row.signatures, row.count, row.last_xid, row.last_seq)


class LiveEvidence:
    """Reads within one transaction of `audit_log.snapshot`."""

    live = True

    def __init__(self, tx: Connection) -> None:
        self._tx = tx
        self._log_id = sealing.state(tx).log_id

    def facts(self) -> Facts:
        """As the database shows it; the time is that of our own clock."""
        state = sealing.state(self._tx)
        largest = audit_log.largest_batch(self._tx)
        size = largest.size if largest else 0
        return Facts(state.log_id, 0, state.size, size, complete=True, as_of=datetime.now(UTC))

    def epochs(self) -> Sequence[Epoch]:
        """Return all epochs, the oldest first."""
        return [
            Epoch(row.epoch, row.size, row.reason, row.lost_size, row.lost_root)
            for row in audit_log.epochs(self._tx)
        ]

    def batch(self, at_most: int) -> Batch | None:
        """Return the largest checkpoint of at most so many events."""
        found = audit_log.largest_batch(self._tx, at_most=at_most)
        return None if found is None else batch_of(self._log_id, found)

    def groups(self, after: int) -> Iterator[tuple[Sequence[Batch], Sequence[Row]]]:
        """Yield groups of some thousand events."""
        held: list[BatchRow] = []
        while True:
            if not held:
                held = audit_log.batches(self._tx, after=after, most=_AT_ONCE)
            if not held:
                return
            start = held[0].size - held[0].count
            fit = list(takewhile(lambda b: b.size - start <= GROUP, held)) or held[:1]  # noqa: B023 - used up here
            yield [batch_of(self._log_id, b) for b in fit], audit_log.rows(self._tx, fit)
            held, after = held[len(fit) :], fit[-1].size

    def frontier(self, size: int) -> Frontier:
        """Return the tree of this size, from tiles."""
        try:
            return Frontier.load(size, lambda level, n: self.tiles(level, n, n)[n])
        except (KeyError, ProofError):
            raise EvidenceCut from None

    def tiles(self, level: int, first: int, last: int) -> dict[int, bytes]:
        """Return those tiles of a level that are there."""
        return audit_log.tiles(self._tx, level, first, last)

    def tiled(self) -> int:
        """Return how many leaves the tiles hold."""
        return audit_log.tiled(self._tx)

    def look(self, report: Report, found: int | None) -> None:
        """Protections, names, events that are in no batch, and how many wait to be sealed."""
        for line in audit_guard.missing(self._tx):
            report.add(Level.TAMPERED, f"the log is not protected: {line}")
        for line in audit_names.findings(self._tx):
            report.add(Level.TAMPERED, line)
        self._unsealed(report, found)

    def _unsealed(self, report: Report, found: int | None) -> None:
        """Judge what is in no checkpoint; `found` events of the log were verified, if all were."""
        count, shown = audit_log.unsealed(self._tx, SHOWN, all_=False)
        total = audit_log.total(self._tx) if found is not None else 0
        if found is not None and total != found + count:
            count, shown = audit_log.unsealed(self._tx, SHOWN, all_=True)
        for one in shown:
            event = f"event number {one.seq} of {one.at}"
            if one.behind:
                report.add(
                    Level.TAMPERED,
                    f"{event} is older than what is sealed and was never sealed: inserted "
                    "afterwards",
                )
            elif one.never:
                report.add(
                    Level.TAMPERED,
                    f"{event} is of a transaction or a time that has not come: inserted",
                )
            elif one.old:
                report.add(
                    Level.INCOMPLETE,
                    f"{event} is not sealed yet: a transaction has been "
                    "open for long, a restore left it, or somebody inserted it",
                )
        if found is not None and total != found + count:
            report.add(
                Level.TAMPERED,
                f"the database holds {total} events, {found} are sealed and {count} are not: some "
                "stand there twice",
            )
        if count:
            report.note(f"{count} events are not sealed yet: nothing is proven about them")
