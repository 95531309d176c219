"""Outputs: one sealed document per run, and its streams in clear columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.records import StreamResult


@dataclass(frozen=True, slots=True)
class SealedOutput:
    """A document to be stored; of a discovery, how many rows each stream has stays clear."""

    envelope: bytes
    counts: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """A document as it was found; without an envelope it is of the version before this one."""

    run_id: UUID
    account_id: UUID
    envelope: bytes | None
    document: dict[str, Any] | None


_STREAM_COLUMNS = ", ".join(n for n, f in StreamResult.model_fields.items() if not f.exclude)


def streams(tx: Connection, run_id: UUID) -> Sequence[StreamResult]:
    """Return the results of a run's streams so far. `tx` has entered the account."""
    rows = tx.execute(
        text(f"SELECT {_STREAM_COLUMNS} FROM run_streams WHERE run_id = :run ORDER BY position"),  # noqa: S608 - field names of our own model
        {"run": run_id},
    )
    return [StreamResult.model_validate(row._asdict()) for row in rows]


def stored(tx: Connection, run_id: UUID) -> StoredOutput | None:
    """Return the document a run left, sealed; None if there is none."""
    row = tx.execute(
        text("SELECT run_id, account_id, envelope, document FROM run_outputs WHERE run_id = :run"),
        {"run": run_id},
    ).one_or_none()
    return None if row is None else StoredOutput(**row._mapping)  # noqa: SLF001 - its public name
