"""Checkpoints that left the database: signed notes of anchors, compared with the log.

What an anchor holds cannot be taken back. A note counts if a trusted key signed it: whoever can
write to an anchor cannot accuse the log.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from uuid import UUID

from audit.checkpoint import Checkpoint, notes_in
from audit.findings import Level, Report
from crypto.signing import PublicKey, parse_note, signed_by

#: Characters of a line; an anchor's is shorter by far.
_LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Loss:
    """A signed statement that a restore lost what lay between two sizes."""

    epoch: int  # the one that began after the restore
    size: int
    lost_size: int
    lost_root: str


@dataclass(frozen=True, slots=True)
class Anchored:
    """A signed note and where it was found (the first of the files that hold it)."""

    where: str
    files: set[Path]
    point: Checkpoint
    text: str
    signatures: str


@dataclass(frozen=True, slots=True)
class Held:
    """What anchors hold: their notes, and which files hold any."""

    notes: Sequence[Anchored]
    files: Sequence[Path]


class Trusted(Protocol):
    """The keys that count, and up to which size."""

    keys: list[PublicKey]

    def trusts(self, signed: Iterable[PublicKey], size: int) -> bool:
        """Say whether one of the keys that signed counts at this size."""
        ...


def read(paths: Iterable[Path], report: Report) -> Held:
    """Return the notes in files of any kind, each once; say what cannot be read."""
    found: dict[str, Anchored] = {}
    files = []
    for path in paths:
        unreadable, held = 0, 0
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                while line := file.readline(_LONGEST):
                    try:
                        held += _take(line, path, found)
                    except ValueError:  # of base64 and UTF-8, too
                        unreadable += 1
        except OSError as error:
            report.add(Level.INCOMPLETE, f"anchor {path} cannot be read: {error.strerror}")
            continue
        if unreadable:
            report.note(f"{path.name} holds {unreadable} lines that are cut: not counted")
        if held:
            files.append(path)
        else:
            report.add(Level.INCOMPLETE, f"{path.name} holds no checkpoint: it proves nothing")
    return Held(list(found.values()), files)


def _take(line: str, path: Path, found: dict[str, Anchored]) -> int:
    """Add the notes of a line; return how many. ValueError if one of them is cut."""
    held = 0
    for note in notes_in(line):
        text, signatures = parse_note(note)
        point = Checkpoint.parse(text)
        held += 1
        found.setdefault(note, Anchored(path.name, set(), point, text, signatures)).files.add(path)
    return held


def compare(
    held: Held,
    roots: Mapping[int, bytes],
    trusted: Trusted,
    losses: Sequence[Loss],
    report: Report,
    *,
    log_id: UUID,
    first: int,
    size: int,
    complete: bool,
    exported_at: datetime | None,
) -> None:
    """Compare each note with the root that the log has at its size.

    `exported_at`: when it was written down; None if it is live, and so holds all that was signed.
    """
    good = [first]
    beyond: list[Anchored] = []
    bad: list[tuple[Checkpoint, str]] = []
    ordered = sorted(held.notes, key=lambda n: (n.point.epoch, n.point.size))
    counted = [note for note in ordered if _counts(note, trusted, report, log_id)]
    for note in counted:
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
            beyond.append(note)
        elif point.size <= first:
            continue  # before what is here
        elif point.size in roots and roots[point.size] != point.root:
            bad.append((point, f"{note.where} holds another root of {point.size} events: a fork"))
        elif point.size in roots:
            report.anchored += 1
            good.append(point.size)
    bad += _cut_off(beyond, size, exported_at, report)
    _say(bad, good, size, report)
    _forks(counted, report)
    _say_nothing(held, counted, report)


def _say_nothing(held: Held, counted: Iterable[Anchored], report: Report) -> None:
    """Report the files none of whose notes count."""
    speaking = {path for note in counted for path in note.files}
    for path in held.files:
        if path not in speaking:
            report.add(
                Level.INCOMPLETE,
                f"{path.name} holds no checkpoint of this log that a trusted key signed: it proves "
                "nothing",
            )


def _cut_off(
    beyond: Iterable[Anchored], size: int, exported_at: datetime | None, report: Report
) -> list[tuple[Checkpoint, str]]:
    """Return the notes behind the end that cannot have been signed after the log was exported."""
    newest, bad = 0, []
    for note in beyond:
        point = note.point
        if exported_at is not None and point.signed_at > exported_at:
            newest = max(newest, point.size)
        else:
            bad.append((point, f"{note.where} holds {point.size} events, the log {size}: cut off"))
    if newest:
        report.add(
            Level.INCOMPLETE,
            f"the log went on after this export was made, to {newest} events: ask for a newer one",
            size,
        )
    return bad


def _say(bad: list[tuple[Checkpoint, str]], good: Sequence[int], size: int, report: Report) -> None:
    for point, text in bad:
        if point.size > size:
            report.add(Level.TAMPERED, text, size)
        else:
            before = max((x for x in good if x < point.size), default=0)
            report.add(Level.TAMPERED, text, before, point.size)


def _counts(note: Anchored, trusted: Trusted, report: Report, log_id: UUID) -> bool:
    """Say whether a note speaks about this log with a key that is trusted."""
    if note.point.log_id != log_id:
        report.note(f"{note.where} holds a checkpoint of another log, {note.point.log_id}")
        return False
    try:
        signed = signed_by(note.text, note.signatures, trusted.keys)
        if trusted.trusts(signed, note.point.size):
            return True
        why = f"signed by a key that {'was replaced before' if signed else 'is not trusted'}"
    except ValueError:
        why = "whose signature is forged"
    report.note(f"{note.where} holds a checkpoint of {note.point.size} events {why}: not counted")
    return False


def _loss_of(point: Checkpoint, losses: Sequence[Loss]) -> Loss | None:
    """Return the declared loss that took this checkpoint away, if one did."""
    return next((x for x in losses if point.epoch < x.epoch and point.size > x.size), None)


def _forks(notes: Iterable[Anchored], report: Report) -> None:
    """Report signed checkpoints of one epoch and size with different roots."""
    seen: dict[tuple[int, int], Anchored] = {}
    for note in notes:
        other = seen.setdefault((note.point.epoch, note.point.size), note)
        if other.point.root != note.point.root:
            report.add(
                Level.TAMPERED,
                f"{other.where} and {note.where} hold different checkpoints of {note.point.size} "
                "events: a fork",
            )
