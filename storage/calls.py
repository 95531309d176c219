"""Calls of runs over HTTP: written in batches by workers, listed by operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.calls import Call
from storage import tenancy
from storage.rowset import rowset


@dataclass(frozen=True, slots=True)
class RunCall:
    """A call, and the attempt of the run that made it."""

    run_id: UUID
    account_id: UUID
    attempt: int
    call: Call


_COLUMNS = (
    "at, run_id, account_id, attempt, method, host, route, status, error, request_bytes, "
    "response_bytes, milliseconds"
)
# A worker's clock may be wrong: a row of a month that has no partition yet would lie in the default
# one, and that month's could not be made any more, of no table.
_TAKEN = _COLUMNS.replace("at,", "least(at, now() + interval '1 day'),", 1)
_APPEND = text(
    f"INSERT INTO api_calls ({_COLUMNS}) SELECT {_TAKEN} FROM "  # noqa: S608 - constants of this module
    "json_to_recordset(CAST(:calls AS json)) AS e (at timestamptz, run_id uuid, account_id uuid, "
    "attempt int, method text, host text, route text, status smallint, error text, "
    "request_bytes bigint, response_bytes bigint, milliseconds int)"
)


def append(tx: Connection, calls: Sequence[RunCall]) -> None:
    """Store calls of any number of runs, in their order."""
    by_account = sorted(calls, key=lambda one: one.account_id)
    for account_id, group in groupby(by_account, key=lambda one: one.account_id):
        tenancy.enter(tx, account_id)
        tx.execute(_APPEND, {"calls": rowset([_row(one) for one in group])})


def _row(one: RunCall) -> dict[str, object]:
    call = one.call
    return {
        "at": call.at.isoformat(),
        "run_id": str(one.run_id),
        "account_id": str(one.account_id),
        "attempt": one.attempt,
        "method": call.method,
        "host": call.host,
        "route": call.route,
        "status": call.status,
        "error": call.error,
        "request_bytes": call.request_bytes,
        "response_bytes": call.response_bytes,
        "milliseconds": call.milliseconds,
    }


_LISTING = text(
    "SELECT at, run_id, account_id, attempt, method, host, route, status, error, request_bytes, "
    "response_bytes, milliseconds FROM (SELECT * FROM api_calls WHERE run_id = :run "
    "AND (NOT :failed OR status IS NULL OR status >= 400 OR error IS NOT NULL) "
    "ORDER BY at DESC, seq DESC LIMIT :limit) AS newest ORDER BY at, seq"
)


def listing(
    tx: Connection, run_id: UUID, *, failed: bool = False, limit: int = 1_000
) -> Sequence[RunCall]:
    """Return the newest calls of a run, oldest first. `tx` has entered the account."""
    rows = tx.execute(_LISTING, {"run": run_id, "failed": failed, "limit": limit})
    return [
        RunCall(
            row.run_id,
            row.account_id,
            row.attempt,
            Call(
                at=row.at,
                method=row.method,
                host=row.host,
                route=row.route,
                status=row.status,
                error=row.error,
                request_bytes=row.request_bytes,
                response_bytes=row.response_bytes,
                milliseconds=row.milliseconds,
            ),
        )
        for row in rows
    ]
