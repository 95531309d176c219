"""Log lines of runs: stored sealed, written in batches, read while the run is going."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from uuid import UUID

from sqlalchemy import Connection, text

from storage import tenancy
from storage.rowset import rowset


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line as a worker holds it; nothing here stores it before it is sealed."""

    run_id: UUID
    account_id: UUID
    at: datetime
    level: str
    stream: str | None
    message: str
    series: bytes = b""  # the attempt that wrote it, at random
    number: int = 0  # within the series, from 1
    gap: int = 0  # so many before it were given up
    last: bool = False  # of its series


@dataclass(frozen=True, slots=True)
class SealedLine:
    """A line to be stored: what it says is in its envelope."""

    run_id: UUID
    account_id: UUID
    at: datetime
    level: str
    stream: str | None
    envelope: bytes


@dataclass(frozen=True, slots=True)
class StoredLine:
    """A line as it was found; one of the version before this one has a message and no envelope."""

    seq: int
    run_id: UUID
    account_id: UUID
    at: datetime
    level: str
    stream: str | None
    envelope: bytes | None
    message: str | None


_APPEND = text(
    "INSERT INTO run_logs (at, run_id, account_id, level, stream, envelope) SELECT e.* FROM "
    "json_to_recordset(CAST(:lines AS json)) AS e (at timestamptz, run_id uuid, "
    "account_id uuid, level text, stream text, envelope bytea)"
)


def append(tx: Connection, lines: Sequence[SealedLine]) -> None:
    """Store lines of any number of runs, in their order."""
    by_account = sorted(lines, key=lambda line: line.account_id)
    for account_id, group in groupby(by_account, key=lambda line: line.account_id):
        tenancy.enter(tx, account_id)
        append_own(tx, list(group))


def append_own(tx: Connection, lines: Sequence[SealedLine]) -> None:
    """Store lines of one account, which `tx` has entered."""
    if lines:
        tx.execute(_APPEND, {"lines": rowset([_row(line) for line in lines])})


def _row(line: SealedLine) -> dict[str, str | None]:
    return {
        "at": line.at.isoformat(),
        "run_id": str(line.run_id),
        "account_id": str(line.account_id),
        "level": line.level,
        "stream": line.stream,
        "envelope": "\\x" + line.envelope.hex(),
    }


def read(
    tx: Connection, run_id: UUID, *, after: int = 0, limit: int = 1_000
) -> Sequence[StoredLine]:
    """Return a run's lines after a number, oldest first. `tx` has entered the account."""
    rows = tx.execute(
        text(
            "SELECT seq, run_id, account_id, at, level, stream, envelope, message FROM run_logs "
            "WHERE run_id = :run AND seq > :after ORDER BY seq LIMIT :limit"
        ),
        {"run": run_id, "after": after, "limit": limit},
    )
    return [StoredLine(**row._mapping) for row in rows]  # noqa: SLF001 - its public name
