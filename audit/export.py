"""Write a range of the log to a directory that verifies without us. Start at `write`.

All of it comes from one snapshot. Nothing is judged here: what is missing in the database is
written as missing, what is wrong as it is.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from sqlalchemy import Connection

from audit import ocsf
from audit.checkpoint import Checkpoint, time_text
from audit.evidence import BODY, Batch, EvidenceCut, Row
from audit.exported import FIELDS, FORMAT, NAMES, SUMS
from audit.live import LiveEvidence
from audit.tree import HASH_BYTES, TILE_WIDTH
from schemas.errors import ConfigError, NotFound
from storage import audit_names, audit_tail
from storage.audit_log import batch_at, largest_batch
from storage.audit_tail import Filters

#: Events of one file.
_PER_FILE = 100_000
_TILES_AT_ONCE = 256
OCSF = "ocsf.jsonl"
_STANDALONE = Path(__file__).parent / "standalone"
#: What an auditor needs to verify an export without us.
SCRIPTS = ("verify.py", "log_format.py")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    first: int
    size: int
    sha256: str  # of SHA256SUMS, which names the SHA-256 of every file


class _Writer:
    """Writes files of one directory and remembers their sums."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._sums: dict[str, str] = {}

    @contextmanager
    def file(self, name: str) -> Iterator["_Summed"]:
        path = self.directory / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as raw:
            summed = _Summed(raw)
            yield summed
            raw.flush()
            os.fsync(raw.fileno())
        self._sums[name] = summed.digest.hexdigest()

    def finish(self) -> str:
        """Write the sums and return their own."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._sums.items()))
        with self.file(SUMS) as file:
            file.write(lines.encode())
        return self._sums[SUMS]


class _Summed:
    """A file that is hashed as it is written."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.digest = sha256()

    def write(self, content: bytes) -> None:
        self._raw.write(content)
        self.digest.update(content)

    def line(self, document: dict[str, Any]) -> None:
        """Write one line: whatever stands in an event, JSON in ASCII does not break it."""
        self.write(json.dumps(document, ensure_ascii=True).encode() + b"\n")


@contextmanager
def directory(wanted: Path) -> Iterator[Path]:
    """Give a directory beside the wanted one, which takes its place if all goes well.

    ConfigError if that is there and not empty.
    """
    try:
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise ConfigError(f"{wanted}: exists and is not an empty directory; name another one")
        partial = wanted.absolute().with_name(f".{wanted.name}.{token_hex(4)}")
        partial.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"{wanted}: cannot be made: {error.strerror}") from None
    try:
        yield partial
        partial.rename(wanted)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write(
    tx: Connection,
    into: Path,
    *,
    first: int = 0,
    end: int | None = None,
    names: bool = False,
    as_ocsf: bool = False,
) -> Exported:
    """Write the events first <= index < end to an empty directory, whole batches of them.

    `tx` is a snapshot of the log. With the names of operators, and with the events once more as
    OCSF, if wanted. NotFound if nothing is sealed there.
    """
    evidence = LiveEvidence(tx)
    facts = evidence.facts()
    last = batch_at(tx, end - 1) if end else None
    size = last.size if last else facts.largest
    before = largest_batch(tx, at_most=min(first, size)) if first else None
    begin = before.size if before else 0
    if begin >= size:
        raise NotFound(f"audit: no sealed events from index {first} on; {size} are sealed")
    try:
        frontier = evidence.frontier(begin).hashes
    except EvidenceCut:
        raise NotFound(
            f"audit: the tiles before index {begin} are missing; export from 0, and run: syncward "
            "audit verify"
        ) from None
    writer = _Writer(into)
    with writer.file("log.json") as file:
        file.line(
            {
                "format": FORMAT,
                "log_id": str(facts.log_id),
                "first": begin,
                "size": size,
                "checkpoint_size": facts.largest,
                "log_size": facts.log_size,
                "software": f"syncward {metadata.version('syncward')}",
                "frontier": [hash_.hex() for hash_ in frontier],
                "exported_at": time_text(facts.as_of),
            }
        )
    with writer.file("epochs.jsonl") as file:
        for epoch in evidence.epochs():
            file.line(asdict(epoch))
    _log(evidence, writer, begin, size)
    # of the newest state everything is written, also what should not be there
    all_ = max(size, evidence.tiled()) if size == facts.largest else size
    _hashes(evidence, writer, begin, all_)
    if names:
        with writer.file(NAMES) as file:
            for one in audit_names.known(tx):
                file.line(asdict(one) | {"salt": one.salt.hex()})
    if as_ocsf:
        _ocsf(tx, writer, begin, size, names=names)
    for name in SCRIPTS:
        with writer.file(name) as file:
            file.write((_STANDALONE / name).read_bytes())
    return Exported(begin, size, writer.finish())


def _ocsf(tx: Connection, writer: _Writer, begin: int, size: int, *, names: bool) -> None:
    """Write the events for programs that read OCSF; nothing proves this file."""
    shown = audit_names.shown(tx) if names else {}
    with writer.file(OCSF) as file:
        more = True
        while more and begin < size:
            page = audit_tail.following(tx, Filters(), begin=begin, limit=_PER_FILE)
            for event in page.events:
                if event.index is not None and event.index < size:
                    file.line(ocsf.document(event, shown))
            begin, more = page.end, page.more


def _log(evidence: LiveEvidence, writer: _Writer, begin: int, size: int) -> None:
    """Write checkpoints and events."""
    files = _Files(writer, begin)
    with writer.file("checkpoints.jsonl") as points:
        start = evidence.batch(begin) if begin else None
        if start is not None:
            points.line(asdict(start))
        for batches, rows in evidence.groups(begin):
            kept = [batch for batch in batches if _size_of(batch) <= size]
            for batch in kept:
                points.line(asdict(batch))
            files.write(row for row in rows if row[0] < size)
            if len(kept) < len(batches):
                break
    files.close()


def _size_of(batch: Batch) -> int:
    """Return the size that a checkpoint names; one that names none belongs to what is written."""
    try:
        return Checkpoint.parse(batch.text).size
    except ValueError:
        return 0


class _Files:
    """Files of so many events each, named by the index of their first."""

    def __init__(self, writer: _Writer, begin: int) -> None:
        self._writer = writer
        self._next = begin
        self._open: Any = None
        self._file: _Summed | None = None

    def write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            if self._file is None or row[0] >= self._next:
                self.close()
                self._open = self._writer.file(f"events/{row[0]:012}.jsonl")
                self._file = self._open.__enter__()
                self._next = row[0] + _PER_FILE
            self._file.line(event_line(row))

    def close(self) -> None:
        if self._file is not None:
            self._open.__exit__(None, None, None)
            self._file = None


def event_line(row: Row) -> dict[str, Any]:
    """Return an event as it stands in an export; one that is missing says so."""
    if row[BODY] is None:
        return {"index": row[0], "missing": True}
    return {**dict(zip(FIELDS, row, strict=True)), "leaf": row[-1].hex()}


def _hashes(evidence: LiveEvidence, writer: _Writer, begin: int, end: int) -> None:
    """Write what the tiles say was sealed; zeros stand for what they do not say."""
    width = TILE_WIDTH * HASH_BYTES
    with writer.file("hashes") as file:
        for low in range(begin // TILE_WIDTH, -(-end // TILE_WIDTH), _TILES_AT_ONCE):
            found = evidence.tiles(0, low, low + _TILES_AT_ONCE - 1)
            joined = b"".join(
                found.get(n, b"").ljust(width, b"\0") for n in range(low, low + _TILES_AT_ONCE)
            )
            skip = max(begin - low * TILE_WIDTH, 0) * HASH_BYTES
            file.write(joined[skip : (end - low * TILE_WIDTH) * HASH_BYTES])
