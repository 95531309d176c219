"""Read the sealed log in the order of its indexes, for those who verify, prove and export it."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class LogEvent:
    """An event as the database shows it at an index; nothing of it is verified yet."""

    index: int
    seq: int
    at: datetime
    account_id: UUID | None
    class_: str
    action: str
    target_kind: str
    target_id: UUID
    login: str
    client: str
    body: str
    leaf: bytes


_EVENTS = text(
    "SELECT c.size - cardinality(c.seqs) + p.place - 1 AS index, p.seq, e.at, e.account_id, "
    "e.class, e.action, e.target_kind, e.target_id, e.login, e.client, e.body, e.leaf "
    "FROM audit.checkpoint c CROSS JOIN LATERAL unnest(c.seqs) WITH ORDINALITY AS p (seq, place) "
    "LEFT JOIN audit.event e ON e.seq = p.seq AND e.at BETWEEN c.earliest AND c.latest "
    "WHERE c.size > :first AND c.size - cardinality(c.seqs) < :end "
    "AND c.size - cardinality(c.seqs) + p.place - 1 BETWEEN :first AND :end - 1 "
    "ORDER BY c.size, p.place"
)


def events(tx: Connection, first: int, end: int) -> Iterator[tuple[int, LogEvent | None]]:
    """Yield (index, event) of the sealed events first <= index < end; None where it is missing."""
    for row in tx.execute(_EVENTS, {"first": first, "end": end}):
        place, *columns = row
        yield place, None if row.at is None else LogEvent(place, *columns)
