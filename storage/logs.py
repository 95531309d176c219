"""Log lines of runs: written in batches, read while the run is going."""

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
    run_id: UUID
    account_id: UUID
    at: datetime
    level: str
    stream: str | None
    message: str
    seq: int = 0


_APPEND = text(
    "INSERT INTO run_logs (at, run_id, account_id, level, stream, message) SELECT e.* FROM "
    "json_to_recordset(CAST(:lines AS json)) AS e (at timestamptz, run_id uuid, "
    "account_id uuid, level text, stream text, message text)"
)


def append(tx: Connection, lines: Sequence[LogLine]) -> None:
    """Store lines of any number of runs, in their order."""
    by_account = sorted(lines, key=lambda line: line.account_id)
    for account_id, group in groupby(by_account, key=lambda line: line.account_id):
        tenancy.enter(tx, account_id)
        append_own(tx, list(group))


def append_own(tx: Connection, lines: Sequence[LogLine]) -> None:
    """Store lines of one account, which `tx` has entered."""
    if lines:
        tx.execute(_APPEND, {"lines": rowset([_row(line) for line in lines])})


def _row(line: LogLine) -> dict[str, str | None]:
    return {
        "at": line.at.isoformat(),
        "run_id": str(line.run_id),
        "account_id": str(line.account_id),
        "level": line.level,
        "stream": line.stream,
        "message": line.message,
    }


def read(tx: Connection, run_id: UUID, *, after: int = 0, limit: int = 1_000) -> Sequence[LogLine]:
    """Return a run's lines after a number, oldest first. `tx` has entered the account."""
    rows = tx.execute(
        text(
            "SELECT seq, at, account_id, level, stream, message FROM run_logs "
            "WHERE run_id = :run AND seq > :after ORDER BY seq LIMIT :limit"
        ),
        {"run": run_id, "after": after, "limit": limit},
    )
    return [LogLine(run_id, r.account_id, r.at, r.level, r.stream, r.message, r.seq) for r in rows]
