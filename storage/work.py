"""What a worker takes with a claimed run: connection, resources, sealed credentials."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, LeaseLost, SyncwardError
from schemas.runs import Claim, RunKind
from schemas.streams import StreamSpec
from storage import audit, tenancy


@dataclass(frozen=True, slots=True)
class SealedField:
    """One sealed credential with the wrapped key that opens it (in a worker only)."""

    field: str
    version: int
    envelope: bytes
    dek_id: UUID
    root_id: UUID
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class SealedResource:
    """A resource as a worker takes it: clear config, sealed credentials."""

    resource_id: UUID
    account_id: UUID
    name: str
    kind: str
    config: dict[str, Any]
    sealed: tuple[SealedField, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A run's subject: a connection with its streams, or one resource (then `streams` is empty)."""

    name: str
    source: SealedResource
    destination: SealedResource | None
    target_schema: str
    streams: tuple[StreamSpec, ...]


def take(tx: Connection, held: Claim, principal: Principal) -> Work | SyncwardError:
    """Read the run's subject and its credentials, and record that they are about to be opened.

    The database hands sealed credentials only to the holder of the run's live lease. A subject
    that cannot be taken is an answer, not an exception: the claim of the same transaction stands.
    """
    tenancy.enter(tx, held.account_id)
    try:
        work = _connection(tx, held) if held.kind is RunKind.SYNC else _resource(tx, held)
    except (ConfigError, LeaseLost) as error:
        return error
    opened = [r for r in (work.source, work.destination) if r is not None]
    audit.append(tx, *(_unsealed(resource, held, principal) for resource in opened))
    return work


def _resource(tx: Connection, held: Claim) -> Work:
    resource = _resources(tx, held, [held.subject_id])[held.subject_id]
    return Work(resource.name, resource, None, "", ())


_CONNECTION = text(
    "SELECT name, source_id, destination_id, target_schema, ARRAY(SELECT spec FROM streams t "
    "WHERE t.connection_id = c.id ORDER BY position) AS specs FROM connections c WHERE id = :id"
)


def _connection(tx: Connection, held: Claim) -> Work:
    row = tx.execute(_CONNECTION, {"id": held.subject_id}).one_or_none()
    if row is None:
        raise ConfigError("the connection was deleted while its run was waiting")
    resources = _resources(tx, held, [row.source_id, row.destination_id])
    return Work(
        name=row.name,
        source=resources[row.source_id],
        destination=resources[row.destination_id],
        target_schema=row.target_schema,
        streams=tuple(StreamSpec.model_validate(spec) for spec in row.specs),
    )


def _resources(tx: Connection, held: Claim, ids: Sequence[UUID]) -> dict[UUID, SealedResource]:
    sealed = tx.execute(
        text("SELECT * FROM sealed_credentials(:run, :token)"),
        {"run": held.run_id, "token": held.token},
    ).all()
    if not sealed:
        _explain_nothing(tx, held)
    rows = tx.execute(
        text("SELECT id, account_id, name, kind, config FROM resources WHERE id = ANY(:ids)"),
        {"ids": list(ids)},
    )
    return {
        row.id: SealedResource(
            resource_id=row.id,
            account_id=row.account_id,
            name=row.name,
            kind=row.kind,
            config=row.config,
            sealed=tuple(_field(s) for s in sealed if s.resource_id == row.id),
        )
        for row in rows
    }


def _field(row: Row[Any]) -> SealedField:
    return SealedField(
        field=row.field,
        version=row.version,
        envelope=bytes(row.envelope),
        dek_id=row.dek_id,
        root_id=row.root_id,
        wrapped=bytes(row.wrapped),
    )


def _explain_nothing(tx: Connection, held: Claim) -> None:
    """Say why no credential came: the lease is gone, or none was ever stored."""
    alive = tx.execute(
        text("SELECT FROM leases WHERE token = :t AND expires_at > clock_timestamp()"),
        {"t": held.token},
    ).one_or_none()
    if alive is None:
        raise LeaseLost(f"run {held.run_id}: another worker owns it")
    raise ConfigError(
        "no credentials are stored; store them with: syncward resource rotate NAME",
        code="no_credentials",
    )


def _unsealed(resource: SealedResource, held: Claim, principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.CREDENTIAL_UNSEALED,
        TargetKind.RESOURCE,
        resource.resource_id,
        principal,
        account_id=resource.account_id,
        outcome="attempted",
        run_id=held.run_id,
        detail={
            "fields": ", ".join(sealed.field for sealed in resource.sealed),
            "versions": ", ".join(str(sealed.version) for sealed in resource.sealed),
        },
    )
