"""Append audit events in the caller's transaction; audit_tail.py reads them back.

The database refuses a commit in which a guarded table changed without an event that targets the
changed row: INSERT, DELETE and UPDATE OF state of the tables below.
"""

from collections import Counter as Counted
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prometheus_client import Counter
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from schemas.audit import AuditClass, AuditEvent, Principal, audit_class
from schemas.audit_body import Scalar, body_of, checked, escaped
from schemas.errors import AuditUnavailable
from storage.rowset import rowset

#: Guarded table -> the column an event must target. A test compares this with the triggers.
GUARDED_TABLES = {
    "accounts": "id",
    "resources": "id",
    "credentials": "resource_id",
    "dead_logins": "resource_id",
    "connections": "id",
    "schedules": "connection_id",
    "active_runs": "run_id",
    "instance": "id",
    "keystore.root": "id",
}

#: What may change without an event, and why. A test asks that each table is in one of the two.
UNGUARDED_TABLES = {
    "streams": "part of a connection: written only with it, under connection.created or .updated",
    "cursors": "where a stream goes on; what moves it is a run, which has its events",
    "account_queues": "counters of the queue, derived from runs and plans",
    "resource_queues": "counters of the queue, derived from runs and plans",
    "schedulers": "who is alive: heartbeats",
    "workers": "who is alive: heartbeats",
    "leases": "who holds a run; run.started and what ends a run say it",
    "slots": "the ledger of due times; run.queued and run.merged say what came of each",
    "runs": "the history of a run that left active_runs, which is guarded",
    "run_streams": "results of a run, which has its events",
    "run_outputs": "results of a run, sealed; whoever reads one leaves output.read",
    "run_logs": "lines of a run, sealed; whoever reads them leaves logs.read",
    "api_calls": "calls of a run, without content; whoever lists them leaves calls.read",
    "keystore.dek": "wrapped keys, each made with what it seals; credential.* and keys.* say it",
    "audit.event": "the log itself: append-only",
    "audit.log": "where the sealer stands; signed checkpoints say it",
    "audit.checkpoint": "signed, append-only",
    "audit.tile": "hashes of the log: computed again by whoever verifies",
    "audit.epoch": "append-only; audit.epoch_started says it",
    "audit.principal": "a trigger of its own: a name goes only with subject.erased",
    "audit.prune": "each step is taken by a function that asks for its event",
    "audit.commitment_key": "made at first use and gone with the account",
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
_PRINCIPAL = text("SELECT audit.principal_of(:kind, :name)")


#: The audit table cannot take the event: read-only, behind a lock, or too slow; and the classes of
#: a full disk and of a tablespace that fails.
_UNWRITABLE = frozenset({"25006", "55P03", "57014"})
_UNWRITABLE_CLASSES = frozenset({"53", "58"})


def append(tx: Connection, *events: AuditEvent) -> None:
    """Record events; they commit or vanish with what they describe.

    AuditUnavailable if the log cannot take them: then what they describe does not happen.
    """
    if not events:
        return
    details = [checked(event) for event in events]
    with _writable():
        names = _named(tx, {event.principal for event in events})
        rows = [
            _row(event, detail, names[event.principal])
            for event, detail in zip(events, details, strict=True)
        ]
        tx.execute(_APPEND, {"events": rowset(rows)})
    for kind, count in Counted(audit_class(event.action) for event in events).items():
        EVENTS.labels(kind.name.lower()).inc(count)


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        state = getattr(error.orig, "sqlstate", None) or ""
        if state in _UNWRITABLE or state[:2] in _UNWRITABLE_CLASSES:
            raise AuditUnavailable(
                f"audit log: it cannot be written (SQLSTATE {state}), so nothing was done; free "
                "space for the control database or end what locks audit.event or audit.principal, "
                "then try again"
            ) from error
        raise


def _named(tx: Connection, principals: set[Principal]) -> dict[Principal, str]:
    """Return how each is named in the log: operators by an id, other processes in clear."""
    return {
        one: _operator(tx, one) if one.kind == "operator" else escaped(str(one))
        for one in principals
    }


def _operator(tx: Connection, one: Principal) -> str:
    known = tx.execute(_PRINCIPAL, {"kind": one.kind, "name": escaped(one.name)})
    return f"{one.kind}:{known.scalar_one()}"


def _row(event: AuditEvent, detail: dict[str, Scalar], principal: str) -> dict[str, str | None]:
    return {
        "account_id": str(event.account_id) if event.account_id else None,
        "class": audit_class(event.action).value,
        "action": event.action.value,
        "target_kind": event.target_kind.value,
        "target_id": str(event.target_id),
        "body": body_of(event, detail, principal),
    }
