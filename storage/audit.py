"""Append audit events in the caller's transaction, and read them back.

The database refuses a commit in which a guarded table changed without an event that targets the
changed row: INSERT, DELETE and UPDATE OF state of the tables below.
"""

import json
from collections import Counter as Counted
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from prometheus_client import Counter
from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditClass, AuditEvent, TargetKind, audit_class
from storage.rowset import rowset

#: Guarded table -> the column an event must target. A test compares this with the triggers.
GUARDED_TABLES = {
    "accounts": "id",
    "resources": "id",
    "credentials": "resource_id",
    "connections": "id",
    "schedules": "connection_id",
    "active_runs": "run_id",
    "instance": "id",
    "keystore.root": "id",
}

#: Target of events about the installation itself.
INSTANCE_ID = UUID(int=0)

EVENTS = Counter("syncward_audit_events", "Audit events written by this process.", ["class"])
for _class in AuditClass:
    EVENTS.labels(_class.name.lower())

_APPEND = text(
    "INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body) "
    "SELECT * FROM json_to_recordset(CAST(:events AS json)) AS e (account_id uuid, class text, "
    "action text, target_kind text, target_id uuid, body text)"
)


def append(tx: Connection, *events: AuditEvent) -> None:
    """Record events; they commit or vanish with what they describe."""
    if not events:
        return
    tx.execute(_APPEND, {"events": rowset([_row(event) for event in events])})
    for kind, count in Counted(audit_class(event.action) for event in events).items():
        EVENTS.labels(kind.name.lower()).inc(count)


#: Made once: with these options json.dumps would make one for each event.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _row(event: AuditEvent) -> dict[str, str | None]:
    return {
        "account_id": str(event.account_id) if event.account_id else None,
        "class": audit_class(event.action).value,
        "action": event.action.value,
        "target_kind": event.target_kind.value,
        "target_id": str(event.target_id),
        "body": _body(event),
    }


def _body(event: AuditEvent) -> str:
    """Canonical JSON: sorted keys, no floats, ASCII keys (profile of RFC 8785)."""
    body = {
        "detail": event.detail,
        "outcome": event.outcome,
        "principal": str(event.principal),
        "reason": event.reason,
        "run_id": str(event.run_id) if event.run_id else None,
        "v": 1,
    }
    canonical = _CANONICAL.encode({k: v for k, v in body.items() if v is not None})
    return canonical.encode("utf-8", "backslashreplace").decode()  # lone surrogates: as escapes


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as the database stamped it."""

    seq: int
    at: datetime
    account_id: UUID | None
    class_: str
    action: AuditAction
    target_kind: TargetKind
    target_id: UUID
    login: str
    client: str
    body: str
    leaf: bytes


def tail(
    tx: Connection, *, account_id: UUID | None = None, after: int | None = None, limit: int = 50
) -> Sequence[StoredEvent]:
    """Return the newest events, oldest first; with `after`, those that follow that number."""
    order = "ASC" if after is not None else "DESC"
    rows = tx.execute(
        text(
            "SELECT seq, at, account_id, class AS class_, action, target_kind, target_id, "  # noqa: S608 - the only variable part is the word above
            "login, client, body, leaf FROM audit.event "
            "WHERE (CAST(:account AS uuid) IS NULL OR account_id = :account) "
            "AND (CAST(:after AS bigint) IS NULL OR seq > :after) "
            f"ORDER BY seq {order} LIMIT :limit"
        ),
        {"account": account_id, "after": after, "limit": limit},
    )
    events = [_stored(row) for row in rows]
    return events if after is not None else events[::-1]


def _stored(row: Row[Any]) -> StoredEvent:
    return StoredEvent(
        seq=row.seq,
        at=row.at,
        account_id=row.account_id,
        class_=row.class_,
        action=AuditAction(row.action),
        target_kind=TargetKind(row.target_kind),
        target_id=row.target_id,
        login=row.login,
        client=row.client,
        body=row.body,
        leaf=bytes(row.leaf),
    )
