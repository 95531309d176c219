"""The live database as evidence, and what only a live database can show."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection

from audit.checkpoint import Checkpoint
from audit.evidence import GROUP, MOST, Batch, Epoch, EvidenceCut, Facts, Row, Verified
from audit.findings import SHOWN, Level, Report
from audit.frontier import Frontier
from audit.tree import ProofError
from storage import audit_guard, audit_log, audit_names, revision, sealing
from storage.audit_log import BatchRow, Place

_AT_ONCE = 512
#: Epochs at most: one begins after a restore.
_EPOCHS = 10_000
#: Events of so long before the newest checkpoint are looked at one by one.
_YOUNG = timedelta(hours=1)


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
            for row in audit_log.epochs(self._tx, most=_EPOCHS)
        ]

    def batch(self, at_most: int) -> Batch | None:
        """Return the largest checkpoint of at most so many events."""
        found = audit_log.largest_batch(self._tx, at_most=at_most)
        return None if found is None else batch_of(self._log_id, found)

    def groups(self, after: int) -> Iterator[tuple[Sequence[Batch], Iterable[Row]]]:
        """Yield groups of some thousand events, which are read as they are taken."""
        held: list[BatchRow] = []
        while True:
            if not held:
                held = audit_log.batches(self._tx, after=after, most=_AT_ONCE)
            if not held:
                return
            fit, events = 1, held[0].count
            while fit < len(held) and events + held[fit].count <= GROUP:
                events += held[fit].count
                fit += 1
            group = held[:fit]
            rows = audit_log.stream(self._tx, group) if events <= MOST else ()
            yield [batch_of(self._log_id, b) for b in group], rows
            held, after = held[fit:], group[-1].size

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

    def look(self, report: Report, verified: Verified | None) -> None:
        """Protections, names, events that are in no batch, and how many wait to be sealed."""
        if revision.is_newer(self._tx):
            report.add(
                Level.UNVERIFIABLE,
                "the database's schema is newer than this version, which cannot tell whether the "
                "log is protected: upgrade this host and verify again",
            )
        else:
            for line in audit_guard.missing(self._tx):
                report.add(Level.TAMPERED, f"the log is not protected: {line}")
        for line in audit_names.findings(self._tx):
            report.add(Level.TAMPERED, line)
        if len(audit_log.epochs(self._tx, most=_EPOCHS)) == _EPOCHS:
            report.add(Level.TAMPERED, f"audit.epoch has {_EPOCHS} rows or more: inserted")
        self._unsealed(report, verified or Verified(None))

    def _unsealed(self, report: Report, verified: Verified) -> None:
        """Judge what is in no checkpoint, by where the log was verified to stand."""
        found, signed_at = verified.events, verified.signed_at
        young = "-infinity" if signed_at is None else (signed_at - _YOUNG).isoformat()
        place = Place(verified.epoch, verified.xid, verified.seq, young)
        count, shown = audit_log.unsealed(self._tx, place, SHOWN)
        total = audit_log.total(self._tx) if found is not None else 0
        if found is not None and total != found + count:
            place = replace(place, since="-infinity")
            count, shown = audit_log.unsealed(self._tx, place, SHOWN)
        elif found is None:
            report.note(
                f"events that are in no checkpoint were looked for since {young} only: leave out "
                "--from to look for older ones"
            )
        for one in shown:
            event = f"event number {one.seq} of {one.at}"
            if one.behind and verified.certain:
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
            elif one.ahead:
                report.add(
                    Level.INCOMPLETE,
                    f"{event} is of a time that has not come: the database's clock was wrong, or "
                    "somebody inserted it",
                )
            elif one.old or one.behind:
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
