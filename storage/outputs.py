"""Outputs: one document per run, and its streams in clear columns."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.records import StreamResult

_STREAM_COLUMNS = ", ".join(StreamResult.model_fields)


def streams(tx: Connection, run_id: UUID) -> Sequence[StreamResult]:
    """Return the results of a run's streams so far. `tx` has entered the account."""
    rows = tx.execute(
        text(f"SELECT {_STREAM_COLUMNS} FROM run_streams WHERE run_id = :run ORDER BY position"),  # noqa: S608 - field names of our own model
        {"run": run_id},
    )
    return [StreamResult.model_validate(row._asdict()) for row in rows]


def document(tx: Connection, run_id: UUID) -> dict[str, Any] | None:
    """Return the document a run left; tests and discoveries answer in it. None if there is none."""
    found: dict[str, Any] | None = tx.execute(
        text("SELECT document FROM run_outputs WHERE run_id = :run"), {"run": run_id}
    ).scalar()
    return found
