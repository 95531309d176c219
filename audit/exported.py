"""An export directory as evidence. docs/verify.md describes its files."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from os import SEEK_END
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from uuid import UUID

from audit.checkpoint import Checkpoint
from audit.evidence import GROUP, Batch, Epoch, EvidenceCut, Facts, NotAnExport, Row, Verified
from audit.findings import Level, Report
from audit.frontier import Frontier
from audit.tree import HASH_BYTES, TILE_WIDTH, split
from storage.audit_names import Name

FORMAT = "syncward-audit-export/1"
SUMS = "SHA256SUMS"
NAMES = "names.jsonl"
#: The columns of an event's line, in the order of a row.
FIELDS = (
    "index", "seq", "xid", "at", "account_id", "class", "action", "target_kind", "target_id",
    "login", "client", "body", "leaf",
)  # fmt: skip
_NUMBERS = 3  # of them; the others are text


@dataclass(slots=True)
class ExportEvidence:
    """Reads an export once, front to back; only hashes are read where they are asked for."""

    directory: Path
    live: bool = False
    _log: dict[str, Any] = field(default_factory=dict)
    _faults: list[tuple[Level, str, int | None]] = field(default_factory=list)
    _hashes: BinaryIO | None = None
    _first: int = 0

    @classmethod
    def open(cls, directory: Path) -> "ExportEvidence":
        """Return a directory as evidence; what is wrong with it is said later."""
        return cls(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._hashes is not None:
            self._hashes.close()

    def facts(self) -> Facts:
        """Compare all files with their sums, then say what log.json says."""
        self._sums()
        try:
            log = json.loads((self.directory / "log.json").read_bytes())
        except OSError:
            raise NotAnExport(f"{self.directory} is no export: log.json cannot be read") from None
        except (ValueError, RecursionError):
            raise NotAnExport(f"{self.directory} is no export: log.json is no JSON") from None
        if not isinstance(log, dict) or log.get("format") != FORMAT:
            raise NotAnExport(f"{self.directory} is no export of the format {FORMAT}")
        try:
            self._first = first = int(log["first"])
            facts = Facts(
                UUID(log["log_id"]),
                first,
                int(log["log_size"]),
                int(log["checkpoint_size"]),
                complete=log["size"] == log["checkpoint_size"],
                as_of=datetime.fromisoformat(log["exported_at"]),
            )
        except (KeyError, ValueError, TypeError, AttributeError):
            raise NotAnExport(f"{self.directory}: log.json does not say what it must") from None
        if facts.as_of.tzinfo is None or first < 0:
            raise NotAnExport(f"{self.directory}: log.json does not say what it must")
        self._log = log
        for name in ("checkpoints.jsonl", "epochs.jsonl", "hashes"):
            if not (self.directory / name).is_file():
                raise EvidenceCut(f"{name} is not there")
        self._hashes = (self.directory / "hashes").open("rb")
        return facts

    def _sums(self) -> None:
        """Compare every file with SHA256SUMS, and SHA256SUMS with what is there."""
        there = {
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.is_file()
        } - {SUMS}
        try:
            lines = (self.directory / SUMS).read_text("utf-8").splitlines()
        except (OSError, ValueError):
            self._fault(Level.INCOMPLETE, f"{SUMS} cannot be read")
            return
        named = set()
        for line in lines:
            digest, _, name = line.partition("  ")
            named.add(name)
            if name not in there:
                self._fault(Level.INCOMPLETE, f"{name} is missing")
            elif _sum_of(self.directory / name) != digest:
                self._fault(Level.TAMPERED, f"{name} is not the file that was exported")
        for name in sorted(there - named):
            if "__pycache__" not in name:
                self._fault(Level.TAMPERED, f"{name} was not exported")

    def _fault(self, level: Level, text: str, index: int | None = None) -> None:
        self._faults.append((level, text, index))

    def _lines(self, name: str) -> Iterator[dict[str, Any] | None]:
        """Yield the objects of a file of JSON lines; None for a line that is none."""
        try:
            file = (self.directory / name).open("rb")
        except OSError:
            self._fault(Level.INCOMPLETE, f"{name} cannot be read")
            return
        with file:
            for line in file:
                try:
                    said = json.loads(line)
                except (ValueError, RecursionError):
                    said = None
                yield said if isinstance(said, dict) else None

    def epochs(self) -> Sequence[Epoch]:
        """Return all epochs, the oldest first."""
        found = []
        for said in self._lines("epochs.jsonl"):
            try:
                assert said is not None  # noqa: S101 - caught below
                lost = said["lost_size"], said["lost_root"]
                found.append(
                    Epoch(int(said["epoch"]), int(said["size"]), str(said["reason"]), *lost)
                )
            except (AssertionError, KeyError, ValueError, TypeError):
                self._fault(Level.TAMPERED, "epochs.jsonl has a line that is none")
        return found

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        """Yield the checkpoints and their sizes."""
        for said in self._lines("checkpoints.jsonl"):
            try:
                assert said is not None  # noqa: S101 - caught below
                numbers = [said[name] for name in ("count", "last_xid", "last_seq")]
                batch = Batch(said["text"], said["signatures"], *numbers)
                if not all(type(number) is int for number in numbers):
                    raise TypeError  # noqa: TRY301 - caught below
                batch.signatures.splitlines()
                size = Checkpoint.parse(batch.text).size
            except (AssertionError, AttributeError, KeyError, ValueError, TypeError):
                self._fault(Level.TAMPERED, "checkpoints.jsonl has a line that is none")
                continue
            yield batch, size

    def batch(self, at_most: int) -> Batch | None:
        """Return the largest checkpoint of at most so many events."""
        found = None
        for batch, size in self._batches():
            if size > at_most:
                break
            found = batch
        return found

    def groups(self, after: int) -> Iterator[tuple[Sequence[Batch], Sequence[Row]]]:
        """Yield groups of some thousand events."""
        rows = self._rows(after)
        held = next(rows, None)
        batches: list[Batch] = []
        begin, size, before = after, after, after
        for batch, size in self._batches():
            if size <= after:
                continue
            if batches and size - begin > GROUP:
                taken, held = _until(rows, held, before)
                yield batches, taken
                batches, begin = [], before
            batches.append(batch)
            before = size
        if batches:
            taken, held = _until(rows, held, size)
            yield batches, taken
        if held is not None:
            self._fault(Level.TAMPERED, "events beyond the last checkpoint", before)

    def _rows(self, after: int) -> Iterator[Row]:
        """Yield the events from an index on; one that cannot be read as one that is missing."""
        expected = self._first
        names = sorted(path.name for path in (self.directory / "events").glob("*.jsonl"))
        begins = [int(name.partition(".")[0]) for name in names if name[:-6].isdecimal()]
        skip = sum(begin <= after for begin in begins[1:]) if len(begins) == len(names) else 0
        if skip:
            expected = begins[skip]
        for name in names[skip:]:
            for said in self._lines(f"events/{name}"):
                row = None if said is None else _row(said)
                if row is None:
                    self._fault(Level.TAMPERED, f"events/{name} has a line that is none", expected)
                    row = (expected, *[None] * (len(FIELDS) - 1))
                expected = row[0] + 1
                if row[0] >= after:
                    yield row

    def frontier(self, size: int) -> Frontier:
        """Return the tree before the first event that is here."""
        try:
            hashes = [bytes.fromhex(hash_) for hash_ in self._log["frontier"]]
            made = Frontier.of(self._first, hashes)
        except (KeyError, ValueError, TypeError):
            raise EvidenceCut from None
        while made.size < size and self._hashes is not None:
            self._hashes.seek((made.size - self._first) * HASH_BYTES)
            block = self._hashes.read(min(GROUP, size - made.size) * HASH_BYTES)
            if not block:
                break
            made.extend(split(block))
        if made.size != size:
            raise EvidenceCut
        return made

    def tiles(self, level: int, first: int, last: int) -> dict[int, bytes]:
        """Return hashes of sealed events by tiles, zeros before what is here."""
        if level or self._hashes is None:
            return {}
        width = TILE_WIDTH * HASH_BYTES
        found = {}
        for n in range(first, last + 1):
            at = n * width - self._first * HASH_BYTES
            self._hashes.seek(max(at, 0))
            found[n] = bytes(max(-at, 0)) + self._hashes.read(min(width, width + at))
        return found

    def tiled(self) -> int:
        """Return how many leaves were sealed."""
        if self._hashes is None:
            return 0
        return self._first + self._hashes.seek(0, SEEK_END) // HASH_BYTES

    def look(self, report: Report, verified: Verified | None) -> None:  # noqa: ARG002 - of live logs
        """Say what is wrong with the files."""
        for said in self._lines(NAMES) if (self.directory / NAMES).is_file() else ():
            if not _is_meant(said):
                report.add(Level.TAMPERED, f"{NAMES} has a name that its id does not mean")
        for level, text, index in self._faults:
            report.add(level, text, index)


def _is_meant(said: dict[str, Any] | None) -> bool:
    try:
        return said is not None and Name(**said | {"salt": bytes.fromhex(said["salt"])}).is_meant
    except (KeyError, ValueError, TypeError, AttributeError):
        return False


def _until(rows: Iterator[Row], held: Row | None, end: int) -> tuple[list[Row], Row | None]:
    """Return the rows below an index, and the first one that is not."""
    taken = []
    while held is not None and held[0] < end:
        taken.append(held)
        held = next(rows, None)
    return taken, held


def _row(said: dict[str, Any]) -> Row | None:
    """Return an event's line as a row; None if it is no event."""
    if said.get("missing") is True and type(said.get("index")) is int:
        return (said["index"], *[None] * (len(FIELDS) - 1))
    if said.keys() != set(FIELDS):
        return None
    row = [said[name] for name in FIELDS]
    texts = [text for text in row[_NUMBERS:] if text is not None]
    right = all(type(number) is int for number in row[:_NUMBERS])
    if not right or not all(type(text) is str for text in texts):
        return None
    if None in row[_NUMBERS + 2 :] or row[_NUMBERS] is None:  # only an account may be absent
        return None
    try:
        row[-1] = bytes.fromhex(row[-1])
    except ValueError:
        return None
    return tuple(row)


def _sum_of(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
