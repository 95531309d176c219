"""An export directory as evidence. docs/verify.md describes its files."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from types import TracebackType
from typing import Any, BinaryIO, Self
from uuid import UUID

from audit.checkpoint import LOG_ID, TIME, Checkpoint, parse_time
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
#: Those of them that are hashed.
HASHED = FIELDS[3:-1]

# What one export may cost a reader, whoever made it. An event's body has 64 kB at most, which are
# six times as many in JSON; the sealer signs after 1024 events at the latest.
LONGEST_LINE = 1 << 20
LARGEST_BATCH = 1024
MOST_EPOCHS = 1000
GROUP_BYTES = 32 << 20


def form(**values: str) -> re.Pattern[str]:
    """Return what a line must be, to the byte: these keys in this order, with such values.

    JSON that means the same in another form was not written by an export, and two readers may
    understand it differently (a key that is there twice, 3.0, 1e400).
    """
    inner = ", ".join(f'"{key}": {value}' for key, value in values.items())
    return re.compile(f"{{{inner}}}\n")


INT = "(?:0|[1-9][0-9]{0,17})"
HEX = '"[0-9a-f]{64}"'
STRING = r'"(?:[ !#-\[\]-~]++|\\["\\bfnrt]|\\u[0-9a-f]{4})*+"'
HASHES = rf"\[(?:{HEX}(?:, {HEX})*)?\]"
TEXTS = dict.fromkeys(HASHED, STRING) | {"account_id": f"(?:null|{STRING})"}
_LOG = form(
    format=f'"{FORMAT}"', log_id=f'"{LOG_ID}"', first=INT, size=INT, checkpoint_size=INT,
    log_size=INT, software=STRING, frontier=HASHES, exported_at=f'"{TIME}"',
)  # fmt: skip
_EVENT = form(index=INT, seq=INT, xid=INT, **TEXTS, leaf=HEX)
_MISSING = form(index=INT, missing="true")
_CHECKPOINT = form(text=STRING, signatures=STRING, count=INT, last_xid=INT, last_seq=INT)
_EPOCH = form(
    epoch=INT, size=INT, reason=STRING, lost_size=f"(?:null|{INT})", lost_root=f"(?:null|{HEX})"
)
_NAME = form(id=STRING, kind=STRING, name=STRING, salt=HEX)
_FILE = re.compile(
    r"log\.json|(epochs|checkpoints|names|ocsf)\.jsonl|hashes|(verify|log_format)\.py|SHA256SUMS"
    r"|events/[0-9]{12}\.jsonl"
)
_SUM = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[!-~]+)\n")


@dataclass(slots=True)
class ExportEvidence:
    """Reads an export once, front to back; only hashes are read where they are asked for."""

    directory: Path
    live: bool = False
    _log: dict[str, Any] = field(default_factory=dict)
    _faults: list[tuple[Level, str, int | None]] = field(default_factory=list)
    _hashes: BinaryIO | None = None
    _first: int = 0
    _size: int = 0
    _bytes: int = 0  # of `hashes`
    _cut: bool = False  # `hashes` ends before the checkpoints do

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
        there = self._files()
        self._sums(there)
        if "log.json" not in there:
            raise NotAnExport(f"{self.directory} is no export: log.json is not there")
        with plain(self.directory / "log.json") as file:
            self._log = log = read(file.read(LONGEST_LINE), _LOG) or {}
        if not log:
            raise NotAnExport(f"{self.directory}: log.json is none of the format {FORMAT}")
        self._first, self._size = first, size = log["first"], log["size"]
        if not first < size <= log["checkpoint_size"] or len(log["frontier"]) != first.bit_count():
            raise NotAnExport(f"{self.directory}: log.json does not say what it must")
        try:
            as_of = parse_time(log["exported_at"])
        except ValueError:
            raise NotAnExport(f"{self.directory}: log.json does not say what it must") from None
        for name in ("checkpoints.jsonl", "epochs.jsonl", "hashes"):
            if name not in there:
                raise EvidenceCut(f"{name} is not there")
        self._hashes = plain(self.directory / "hashes")
        self._bytes = os.fstat(self._hashes.fileno()).st_size
        if first and self.batch(first) is None:
            self._fault(Level.TAMPERED, f"checkpoints.jsonl does not begin at {first}", first)
            raise EvidenceCut(f"there is no checkpoint at {first}, where this export begins")
        complete = size == log["checkpoint_size"]
        if not complete:
            self._faults.append(
                (Level.NOTE, f"the export ends at {size} of {log['checkpoint_size']} events", None)
            )
        return Facts(
            UUID(log["log_id"]), first, log["log_size"], log["checkpoint_size"],
            complete=complete, as_of=as_of,
        )  # fmt: skip

    def _files(self) -> set[str]:
        """Return the files that are there; if one is nothing of an export, none is read."""
        there = set()
        for folder, folders, files in os.walk(self.directory):
            entries = [*folders, *files]
            folders[:] = [name for name in folders if name == "events"]
            for name in entries:
                path = Path(folder, name)
                relative = str(path.relative_to(self.directory))
                as_file = _FILE.fullmatch(relative) is not None and path.is_file()
                as_folder = relative == "events" and path.is_dir()
                if path.is_symlink() or not (as_file or as_folder):
                    self._fault(Level.TAMPERED, f"{relative} is nothing that an export holds")
                elif as_file:
                    there.add(relative)
        if self._faults:
            raise EvidenceCut("nothing was read: look at what else lies there")
        return there

    def _sums(self, there: set[str]) -> None:
        """Compare every file with SHA256SUMS, and SHA256SUMS with what is there."""
        if SUMS not in there:
            self._fault(Level.INCOMPLETE, f"{SUMS} is missing")
            return
        named: dict[str, str] = {}
        for line in self._raw(SUMS):
            match = _SUM.fullmatch(line.decode("ascii", "replace"))
            if match is None or match["name"] in named:
                self._fault(Level.TAMPERED, f"{SUMS} has a line that is none")
            else:
                named[match["name"]] = match["digest"]
        for name in sorted((there | named.keys()) - {SUMS}):
            if name not in there:
                self._fault(Level.INCOMPLETE, f"{name} is missing")
            elif name not in named:
                self._fault(Level.TAMPERED, f"{name} was not exported")
            elif _sum_of(self.directory / name) != named[name]:
                self._fault(Level.TAMPERED, f"{name} is not the file that was exported")

    def _fault(self, level: Level, text: str, index: int | None = None) -> None:
        self._faults.append((level, text, index))

    def _raw(self, name: str) -> Iterator[bytes]:
        """Yield the lines of a file, up to one that is longer than any line of an export."""
        with plain(self.directory / name) as file:
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    self._fault(Level.TAMPERED, f"{name} has a line of more than 1 MiB")
                    return
                yield line

    def _lines(self, name: str, *forms: re.Pattern[str]) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the objects of a file of JSON lines and how long they are; {} for what is none."""
        for line in self._raw(name):
            yield read(line, *forms) or {}, len(line)

    def epochs(self) -> Sequence[Epoch]:
        """Return all epochs, the oldest first."""
        found: list[Epoch] = []
        for said, _ in self._lines("epochs.jsonl", _EPOCH):
            if not said or len(found) == MOST_EPOCHS:
                self._fault(Level.TAMPERED, "epochs.jsonl has a line that is none, or too many")
                break
            found.append(Epoch(**said))
        return found

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        """Yield the checkpoints and their sizes, up to the first that cannot stand there."""
        before, most = 0, LARGEST_BATCH
        if self._first:  # a part of a log begins with the checkpoint there
            before, most = self._first - 1, 1
        for said, _ in self._lines("checkpoints.jsonl", _CHECKPOINT):
            try:
                batch = Batch(**said)
                size = Checkpoint.parse(batch.text).size
            except (TypeError, ValueError):
                self._fault(Level.TAMPERED, "checkpoints.jsonl has a line that is none", before)
                return
            if not before < size <= min(self._size, before + most):
                self._fault(
                    Level.TAMPERED,
                    f"a checkpoint of {size} events cannot follow that of {before}", before,
                )  # fmt: skip
                return
            yield batch, size
            before, most = size, LARGEST_BATCH

    def batch(self, at_most: int) -> Batch | None:
        """Return the largest checkpoint of at most so many events."""
        found = None
        for batch, size in self._batches():
            if size > at_most:
                break
            found = batch
        return found

    def groups(self, after: int) -> Iterator[tuple[Sequence[Batch], Sequence[Row]]]:
        """Yield groups of some thousand events, or of fewer that are large."""
        rows = self._rows(after)
        held = next(rows, None)
        batches: list[Batch] = []
        taken: list[Row] = []
        before, begin, weight = after, after, 0
        for batch, size in self._batches():
            if size <= after:
                continue
            there = self._first + self._bytes // HASH_BYTES
            if size > there:  # what the hashes do not reach to would cost more than is there
                self._fault(Level.INCOMPLETE, f"hashes are missing from {there} on", there)
                self._cut = True
                break
            if batches and (size - begin > GROUP or weight > GROUP_BYTES):
                yield batches, taken
                batches, taken, begin, weight = [], [], before, 0
            while held is not None and held[0][0] < size:
                taken.append(held[0])
                weight += held[1]
                held = next(rows, None)
            batches.append(batch)
            before = size
        if batches:
            yield batches, taken
        self._ends(before, more=held is not None)

    def _ends(self, size: int, *, more: bool) -> None:
        """Say how the export ends, after so many events that its checkpoints cover."""
        if size < self._size:
            self._fault(Level.INCOMPLETE, f"checkpoints from {size} to {self._size} are missing")
        if not self._cut and (more or self._bytes > (size - self._first) * HASH_BYTES):
            self._fault(Level.TAMPERED, "the log goes on after its last checkpoint", size)

    def _rows(self, after: int) -> Iterator[tuple[Row, int]]:
        """Yield the events from an index on, and how long they are, up to a line that is none."""
        expected = self._first
        names = sorted(path.name for path in (self.directory / "events").glob("*.jsonl"))
        skip = sum(int(name[:12]) <= after for name in names[1:])
        if skip:
            expected = int(names[skip][:12])
        for name in names[skip:]:
            for said, length in self._lines(f"events/{name}", _EVENT, _MISSING):
                index = said.get("index", -1)
                if index < expected:
                    self._fault(
                        Level.TAMPERED,
                        f"events/{name} has a line that is none, or twice, or out of order",
                        expected,
                    )
                    return
                expected = index + 1
                if index >= after:
                    yield _row(said), length

    def frontier(self, size: int) -> Frontier:
        """Return the tree before the first event that is here."""
        made = Frontier.of(self._first, [bytes.fromhex(hash_) for hash_ in self._log["frontier"]])
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
        """Return how many leaves were sealed; none if it was said that some are missing."""
        return 0 if self._cut else self._first + self._bytes // HASH_BYTES

    def look(self, report: Report, verified: Verified | None) -> None:  # noqa: ARG002 - of live logs
        """Say what is wrong with the files."""
        if self._hashes and (self.directory / NAMES).is_file():
            for said, _ in self._lines(NAMES, _NAME):
                if not _is_meant(said):
                    report.add(Level.TAMPERED, f"{NAMES} has a name that its id does not mean")
        for level, text, index in self._faults:
            report.add(level, text, index)


def plain(path: Path) -> BinaryIO:
    """Open a file that is nothing but a file: no link is followed, and no pipe is waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise EvidenceCut(f"{path.name} cannot be read: {error.strerror}") from None
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise EvidenceCut(f"{path.name} is no plain file")
    return os.fdopen(descriptor, "rb")


def read(line: bytes, *forms: re.Pattern[str]) -> dict[str, Any] | None:
    """Return the object that a line holds; None if it has none of the forms."""
    text = line.decode("ascii", "replace")
    if not any(form.fullmatch(text) for form in forms):
        return None
    found: dict[str, Any] = json.loads(text)
    return found


def _is_meant(said: dict[str, Any]) -> bool:
    try:
        return bool(said) and Name(**said | {"salt": bytes.fromhex(said["salt"])}).is_meant
    except ValueError:  # half a character
        return False


def _row(said: dict[str, Any]) -> Row:
    """Return an event's line as a row."""
    if "missing" in said:
        return (said["index"], *[None] * (len(FIELDS) - 1))
    *row, leaf = said.values()
    return (*row, bytes.fromhex(leaf))


def _sum_of(path: Path) -> str:
    with plain(path) as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
