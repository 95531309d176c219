"""Connections with their streams and schedules: create, change, find, pause, resume, delete."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection as Tx
from sqlalchemy import Row, text
from sqlalchemy.exc import IntegrityError

from schemas.accounts import Account, Connection, ConnectionSpec, Resource
from schemas.audit import AuditAction, AuditEvent, FieldChange, Principal, TargetKind
from schemas.errors import Conflict, NotFound
from schemas.ids import new_id
from schemas.mistakes import meant
from schemas.schedules import CatchUp, Overlap, Schedule
from schemas.streams import StreamSpec
from storage import audit, commitments
from storage.endings import free_account, lock_schedule
from storage.runs import Subject

_SELECT = """
SELECT c.*, s.kind AS schedule_kind, s.interval_s, s.cron, s.zone, s.catch_up, s.overlap, s.state,
       s.state_reason, s.next_due_at, s.last_success_at, s.failures, s.pause_after,
       src.name AS source, dst.name AS destination,
       (SELECT jsonb_agg(t.spec ORDER BY t.position) FROM streams t
        WHERE t.connection_id = c.id) AS streams
FROM connections c
JOIN schedules s ON s.connection_id = c.id
JOIN resources src ON src.id = c.source_id
JOIN resources dst ON dst.id = c.destination_id
"""


def listing(tx: Tx) -> Sequence[Connection]:
    """Return the account's connections by name. `tx` has entered the account, here and below."""
    return [_connection(row) for row in tx.execute(text(f"{_SELECT} ORDER BY c.name"))]


def get(tx: Tx, name: str) -> Connection:
    """Return one connection; NotFound names it."""
    row = tx.execute(text(f"{_SELECT} WHERE c.name = :name"), {"name": name}).one_or_none()
    if row is None:
        known = tx.execute(text("SELECT name FROM connections ORDER BY name LIMIT 1000")).scalars()
        other = "see: syncward connection list"
        raise NotFound(f"connection {name}: no such connection; {meant(name, known, else_=other)}")
    return _connection(row)


def _connection(row: Row[Any]) -> Connection:
    return Connection(
        connection_id=row.id,
        account_id=row.account_id,
        spec=_spec(row),
        source_id=row.source_id,
        destination_id=row.destination_id,
        state=row.state,
        state_reason=row.state_reason,
        next_due_at=row.next_due_at,
        last_success_at=row.last_success_at,
        failures=row.failures,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )


def _spec(row: Row[Any]) -> ConnectionSpec:
    return ConnectionSpec.model_validate(
        {
            "name": row.name,
            "source": row.source,
            "destination": row.destination,
            "description": row.description,
            "parameters": row.parameters,
            "schedule": Schedule(
                every=timedelta(seconds=row.interval_s) if row.interval_s else None,
                cron=row.cron,
                zone=row.zone,
                catch_up=CatchUp(row.catch_up),
                overlap=Overlap(row.overlap),
            ),
            "pause_after": row.pause_after,
            "target": {"schema": row.target_schema},
            "streams": tuple(StreamSpec.model_validate(spec) for spec in row.streams or ()),
        }
    )


def subject(connection: Connection) -> Subject:
    """Return what a run of this connection is about."""
    return Subject(
        connection.connection_id,
        connection.account_id,
        connection.source_id,
        connection.destination_id,
    )


def now(tx: Tx) -> datetime:
    """Return the database's time of this transaction, from which schedules are anchored."""
    at: datetime = tx.execute(text("SELECT now()")).scalar_one()
    return at


def create(
    tx: Tx,
    account: Account,
    spec: ConnectionSpec,
    *,
    source: Resource,
    destination: Resource,
    next_due_at: datetime | None,
    principal: Principal,
) -> UUID:
    """Create a connection, its streams and its schedule; Conflict if the name is taken."""
    connection_id = new_id()
    try:
        with tx.begin_nested():
            _insert(tx, connection_id, spec, source, destination)
    except IntegrityError:
        raise Conflict(
            f"connection {spec.name}: exists already; see: syncward connection show {spec.name}"
        ) from None
    _write_streams(tx, account, connection_id, spec)
    tx.execute(
        text(
            "INSERT INTO schedules (connection_id, account_id, source_id, destination_id, kind, "
            "interval_s, cron, zone, jitter_s, catch_up, overlap, pause_after, next_due_at) "
            "VALUES (:id, :account, :source, :destination, :kind, :interval_s, :cron, :zone, "
            ":jitter_s, :catch_up, :overlap, :pause_after, :next)"
        ),
        {
            "id": connection_id,
            "account": account.account_id,
            "source": source.resource_id,
            "destination": destination.resource_id,
            **_schedule(spec),
            "next": _due(next_due_at, spec.schedule, connection_id),
        },
    )
    audit.append(
        tx,
        _event(AuditAction.CONNECTION_CREATED, account, connection_id, principal, name=spec.name),
    )
    return connection_id


def _insert(
    tx: Tx, connection_id: UUID, spec: ConnectionSpec, source: Resource, destination: Resource
) -> None:
    tx.execute(
        text(
            "INSERT INTO connections (id, account_id, name, description, parameters, source_id, "
            "destination_id, target_schema) VALUES (:id, :account, :name, :description, "
            "CAST(:parameters AS jsonb), :source, :destination, :target)"
        ),
        {
            "id": connection_id,
            "account": source.account_id,
            "source": source.resource_id,
            "destination": destination.resource_id,
            **_columns(spec),
        },
    )


def _columns(spec: ConnectionSpec) -> dict[str, str]:
    return {
        "name": spec.name,
        "description": spec.description,
        "parameters": json.dumps(spec.parameters),
        "target": spec.target.schema_name,
    }


def _due(slot: datetime | None, schedule: Schedule, connection_id: UUID) -> datetime | None:
    return None if slot is None else slot + schedule.offset(connection_id)


def _schedule(spec: ConnectionSpec) -> dict[str, object]:
    schedule = spec.schedule
    return {
        "pause_after": spec.pause_after,
        "kind": schedule.kind,
        "interval_s": int(schedule.every.total_seconds()) if schedule.every else None,
        "cron": schedule.cron,
        "zone": schedule.zone,
        "jitter_s": int(schedule.jitter.total_seconds()),
        "catch_up": schedule.catch_up.value,
        "overlap": schedule.overlap.value,
    }


def _write_streams(tx: Tx, account: Account, connection_id: UUID, spec: ConnectionSpec) -> None:
    tx.execute(text("DELETE FROM streams WHERE connection_id = :id"), {"id": connection_id})
    tx.execute(
        text(
            "INSERT INTO streams (connection_id, name, account_id, position, spec) "
            "VALUES (:id, :name, :account, :position, CAST(:spec AS jsonb))"
        ),
        [
            {
                "id": connection_id,
                "name": stream.name,
                "account": account.account_id,
                "position": position,
                "spec": stream.model_dump_json(),
            }
            for position, stream in enumerate(spec.streams)
        ],
    )


def _event(
    action: AuditAction,
    account: Account,
    connection_id: UUID,
    principal: Principal,
    *,
    reason: str | None = None,
    change: tuple[FieldChange, ...] = (),
    **detail: str,
) -> AuditEvent:
    return AuditEvent(
        action,
        TargetKind.CONNECTION,
        connection_id,
        principal,
        account_id=account.account_id,
        reason=reason,
        detail=dict(detail),
        change=change,
    )


def update(
    tx: Tx,
    account: Account,
    connection: Connection,
    spec: ConnectionSpec,
    *,
    source: Resource,
    destination: Resource,
    next_due_at: datetime | None,
    principal: Principal,
) -> None:
    """Replace what the owner wrote; cursors and pause stay."""
    parameters = {
        "id": connection.connection_id,
        "source": source.resource_id,
        "destination": destination.resource_id,
    }
    tx.execute(
        text(
            "UPDATE schedules SET source_id = :source, destination_id = :destination, "
            "kind = :kind, interval_s = :interval_s, cron = :cron, zone = :zone, "
            "jitter_s = :jitter_s, catch_up = :catch_up, overlap = :overlap, "
            "pause_after = :pause_after, "
            "version = version + 1, "
            "anchor_at = CASE WHEN :reanchor THEN now() ELSE anchor_at END, "
            "next_due_at = CASE WHEN :reanchor THEN :next ELSE next_due_at END "
            "WHERE connection_id = :id"
        ),
        {
            **parameters,
            **_schedule(spec),
            "reanchor": spec.schedule != connection.spec.schedule,
            "next": _due(next_due_at, spec.schedule, connection.connection_id),
        },
    )
    tx.execute(
        text(
            "UPDATE connections SET name = :name, description = :description, "
            "parameters = CAST(:parameters AS jsonb), source_id = :source, "
            "destination_id = :destination, target_schema = :target, "
            "updated_at = clock_timestamp() WHERE id = :id"
        ),
        {**parameters, **_columns(spec)},
    )
    _write_streams(tx, account, connection.connection_id, spec)
    change = commitments.changes(
        tx,
        account.account_id,
        connection.spec.model_dump(mode="json"),
        spec.model_dump(mode="json"),
    )
    audit.append(
        tx,
        _event(
            AuditAction.CONNECTION_UPDATED,
            account,
            connection.connection_id,
            principal,
            change=change,
            changed=", ".join(one.field for one in change),
        ),
    )


def pause(tx: Tx, account: Account, connection: Connection, principal: Principal) -> bool:
    """Stop scheduling and dispatching; False if it was paused already. A running run goes on.

    One that waits for a login does not go on with it any more.
    """
    moved = tx.execute(
        text(
            "UPDATE schedules SET state = 'paused', state_reason = 'operator' "
            "WHERE connection_id = :id AND (state = 'active' OR state_reason = 'needs_reauth')"
        ),
        {"id": connection.connection_id},
    ).rowcount
    if moved:
        audit.append(
            tx,
            _event(
                AuditAction.CONNECTION_PAUSED,
                account,
                connection.connection_id,
                principal,
                reason="operator",
            ),
        )
    return bool(moved)


def resume(
    tx: Tx,
    account: Account,
    connection: Connection,
    *,
    next_due_at: datetime | None,
    principal: Principal,
) -> bool:
    """Schedule again from now on, missed slots are not replayed; False if it was active."""
    moved = tx.execute(
        text(
            "UPDATE schedules SET state = 'active', state_reason = NULL, failures = 0, "
            "anchor_at = now(), next_due_at = :next WHERE connection_id = :id AND state = 'paused'"
        ),
        {
            "id": connection.connection_id,
            "next": _due(next_due_at, connection.spec.schedule, connection.connection_id),
        },
    ).rowcount
    if moved:
        audit.append(
            tx,
            _event(AuditAction.CONNECTION_RESUMED, account, connection.connection_id, principal),
        )
        free_account(tx, account.account_id, has_work=True)  # a run may have waited meanwhile
    return bool(moved)


def accept_schema(
    tx: Tx,
    account: Account,
    connection: Connection,
    streams: Sequence[str],
    *,
    run_id: UUID,
    principal: Principal,
) -> None:
    """Record who lets frozen streams follow their sources, in which run."""
    events = [
        _event(
            AuditAction.STREAM_DRIFT_ACCEPTED, account, connection.connection_id, principal,
            stream=name, run=str(run_id),
        )
        for name in streams
    ]  # fmt: skip
    audit.append(tx, *events)


def delete(tx: Tx, account: Account, connection: Connection, principal: Principal) -> None:
    """Delete a connection whose runs have ended. Loaded data and its state stay where they are."""
    lock_schedule(tx, connection.connection_id)  # else a run could begin between our two statements
    live = tx.execute(
        text("SELECT run_id FROM active_runs WHERE subject_id = :id"),
        {"id": connection.connection_id},
    ).scalar()
    if live is not None:
        raise Conflict(
            f"connection {connection.spec.name}: run {live} is live; "
            f"cancel it first: syncward run cancel {live}"
        )
    tx.execute(text("DELETE FROM connections WHERE id = :id"), {"id": connection.connection_id})
    audit.append(
        tx,
        _event(
            AuditAction.CONNECTION_DELETED,
            account,
            connection.connection_id,
            principal,
            name=connection.spec.name,
        ),
    )


def cursors(tx: Tx, connection_id: UUID) -> dict[str, dict[str, str] | None]:
    """Return the copied cursor of each stream that has one."""
    rows = tx.execute(
        text("SELECT stream, cursor FROM cursors WHERE connection_id = :id"), {"id": connection_id}
    )
    return {row.stream: row.cursor for row in rows}
