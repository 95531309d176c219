"""Checkpoints that left the database: signed notes of anchors, compared with the log.

What an anchor holds cannot be taken back. A note counts if a trusted key signed it: whoever can
write to an anchor cannot accuse the log.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from audit.checkpoint import Checkpoint, notes_in
from audit.findings import Level, Report
from crypto.signing import PublicKey, parse_note, signed_by


@dataclass(frozen=True, slots=True)
class Loss:
    """A signed statement that a restore lost what lay between two sizes."""

    epoch: int  # the one that began after the restore
    size: int
    lost_size: int
    lost_root: str


@dataclass(frozen=True, slots=True)
class Anchored:
    """A signed note and where it was found."""

    where: str
    point: Checkpoint
    text: str
    signatures: str


def read(paths: Iterable[Path], report: Report) -> list[Anchored]:
    """Return the notes in files of any kind, each once; say what cannot be read."""
    found: dict[str, Anchored] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            report.add(Level.INCOMPLETE, f"anchor {path} cannot be read: {error.strerror}")
            continue
        unreadable, held = 0, 0
        for line in lines:
            try:
                for note in notes_in(line):
                    text, signatures = parse_note(note)
                    point = Checkpoint.parse(text)
                    held += 1
                    found.setdefault(note, Anchored(path.name, point, text, signatures))
            except ValueError:  # of base64 and UTF-8, too
                unreadable += 1
        if unreadable:
            report.note(f"{path.name} holds {unreadable} lines that are cut: not counted")
        if not held:
            report.add(Level.INCOMPLETE, f"{path.name} holds no checkpoint: it proves nothing")
    return list(found.values())


def compare(
    notes: Sequence[Anchored],
    roots: Mapping[int, bytes],
    keys: Sequence[PublicKey],
    losses: Sequence[Loss],
    report: Report,
    *,
    log_id: UUID,
    first: int,
    size: int,
    complete: bool,
) -> None:
    """Compare each note with the root that the log has at its size now."""
    good = [first]
    bad: list[tuple[Checkpoint, str]] = []
    for note in sorted(notes, key=lambda n: (n.point.epoch, n.point.size)):
        if not _counts(note, keys, report, log_id):
            continue
        point, loss = note.point, _loss_of(note.point, losses)
        if loss is not None:
            if point.size > loss.lost_size or (
                point.size == loss.lost_size and point.root.hex() != loss.lost_root
            ):
                bad.append((point, f"{note.where} holds more than the declared loss admits"))
            else:
                report.anchored += 1
        elif point.size > size and not complete:
            continue  # behind what is here
        elif point.size > size:
            bad.append((point, f"{note.where} holds {point.size} events, the log {size}: cut off"))
        elif point.size <= first:
            continue  # before what is here
        elif point.size in roots and roots[point.size] != point.root:
            bad.append((point, f"{note.where} holds another root of {point.size} events: a fork"))
        elif point.size in roots:
            report.anchored += 1
            good.append(point.size)
    _say(bad, good, size, report)
    _forks(notes, keys, report)


def _say(bad: list[tuple[Checkpoint, str]], good: Sequence[int], size: int, report: Report) -> None:
    for point, text in bad:
        if point.size > size:
            report.add(Level.TAMPERED, text, size)
        else:
            before = max((x for x in good if x < point.size), default=0)
            report.add(Level.TAMPERED, text, before, point.size)


def _counts(note: Anchored, keys: Sequence[PublicKey], report: Report, log_id: UUID) -> bool:
    """Say whether a note speaks about this log with a key that is trusted."""
    if note.point.log_id != log_id:
        report.note(f"{note.where} holds a checkpoint of another log, {note.point.log_id}")
        return False
    try:
        if signed_by(note.text, note.signatures, keys):
            return True
        why = "signed by a key that is not trusted"
    except ValueError:
        why = "whose signature is forged"
    report.note(f"{note.where} holds a checkpoint of {note.point.size} events {why}: not counted")
    return False


def _loss_of(point: Checkpoint, losses: Sequence[Loss]) -> Loss | None:
    """Return the declared loss that took this checkpoint away, if one did."""
    return next((x for x in losses if point.epoch < x.epoch and point.size > x.size), None)


def _forks(notes: Sequence[Anchored], keys: Sequence[PublicKey], report: Report) -> None:
    """Report signed checkpoints of one epoch and size with different roots."""
    seen: dict[tuple[UUID, int, int], Anchored] = {}
    for note in notes:
        place = (note.point.log_id, note.point.epoch, note.point.size)
        other = seen.setdefault(place, note)
        if other.point.root == note.point.root:
            continue
        try:
            both = all(signed_by(n.text, n.signatures, keys) for n in (note, other))
        except ValueError:
            both = False
        if both:
            report.add(
                Level.TAMPERED,
                f"{other.where} and {note.where} hold different checkpoints of {note.point.size} "
                "events: a fork",
            )
