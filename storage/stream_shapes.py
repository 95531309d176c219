"""Since when a stream's table is as it is, as the runs tell that are still kept."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from pydantic import TypeAdapter
from sqlalchemy import Connection, text

from schemas.records import SchemaChange

#: Changes that are told of one stream at most, the newest.
_CHANGES = 20
_SCHEMA_CHANGES = TypeAdapter(tuple[SchemaChange, ...])


@dataclass(frozen=True, slots=True)
class Since:
    """`at_least`: older runs, which would tell more, are not kept any more or there were none."""

    at: datetime
    at_least: bool
    changes: tuple[tuple[datetime, SchemaChange], ...]  # the newest first


#: A load with another digest than the one before it is where a table became what it is.
_LOADS = """
WITH loads AS (
  SELECT t.stream, t.finished_at, t.schema_hash, t.schema_changes,
         lag(t.schema_hash) OVER (PARTITION BY t.stream ORDER BY t.finished_at) AS before
  FROM run_streams t JOIN runs r ON r.run_id = t.run_id
  WHERE r.subject_id = :id AND r.kind = 'sync' AND t.state = 'succeeded'
    AND t.schema_hash IS NOT NULL)
SELECT stream, finished_at, before IS NULL AS first, schema_changes FROM loads
WHERE before IS DISTINCT FROM schema_hash OR schema_changes <> '[]'
ORDER BY stream, finished_at DESC
"""


def since(tx: Connection, connection_id: UUID) -> dict[str, Since]:
    """Return what is known of each stream; `tx` has entered the connection's account."""
    found: dict[str, Since] = {}
    for row in tx.execute(text(_LOADS), {"id": connection_id}):
        known = found.get(row.stream) or Since(row.finished_at, row.first, ())
        changes = _SCHEMA_CHANGES.validate_python(row.schema_changes)
        told = (*known.changes, *((row.finished_at, change) for change in changes))
        found[row.stream] = Since(known.at, known.at_least, told[:_CHANGES])
    return found
