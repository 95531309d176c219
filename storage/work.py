"""What a worker takes with a claimed run: connection, resources, sealed credentials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Connection, Row, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, LeaseLost, SyncwardError, TransientError
from schemas.runs import Claim
from schemas.streams import StreamSpec
from storage import audit, keystore
from storage.keystore import Keystore, StoredKey

#: The root of a wrapped key that the control database does not have, and the key of no envelope.
NO_ROOT = NO_KEY = UUID(int=0)


@dataclass(frozen=True, slots=True)
class SealedField:
    """One sealed credential with the wrapped key that opens it (in a worker only)."""

    field: str
    version: int
    envelope: bytes
    key: StoredKey
    #: where it was to be sent when it was stored (registry.aim_digest); None: nobody said
    aim: bytes | None = None


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
    #: the fence of the last load of each stream that this database knows of
    fences: Mapping[str, int]

    @property
    def has_credentials(self) -> bool:
        """Whether any end has something to unseal; files on the worker's disk have not."""
        return any(end.sealed for end in (self.source, self.destination) if end is not None)


_RESOURCE = (
    "r.id, r.account_id, r.name AS resource, r.kind, r.config, s.field, s.version, s.envelope, "
    "s.dek_id, s.root_id, s.wrapped, s.aim FROM resources r "
    "LEFT JOIN aimed_credentials(:run, :token) s ON s.resource_id = r.id"
)
#: Everything in one round trip: a row for each sealed field of each resource.
_TAKE_RESOURCE = text("SELECT " + _RESOURCE + " WHERE r.id = :subject")
_TAKE_CONNECTION = text(
    "SELECT c.name, c.source_id, c.destination_id, c.target_schema, ARRAY(SELECT spec "  # noqa: S608 - constants of this module
    "FROM streams t WHERE t.connection_id = c.id ORDER BY position) AS specs, "
    "(SELECT jsonb_object_agg(k.stream, k.fence) FROM cursors k WHERE k.connection_id = c.id) "
    "AS fences, "
    + _RESOURCE
    + " JOIN connections c ON r.id IN (c.source_id, c.destination_id) WHERE c.id = :subject"
)


def take(
    tx: Connection, held: Claim, principal: Principal, *, keyless: frozenset[str] = frozenset()
) -> Work | SyncwardError:
    """Read the run's subject and its credentials, and record that they are about to be opened.

    The database hands sealed credentials only to the holder of the run's live lease. A subject
    that cannot be taken is an answer, not an exception: the claim of the same transaction stands.
    `tx` has entered the run's account. Connectors in `keyless` want no credentials.
    """
    connection = held.kind.of_connection
    rows = tx.execute(
        _TAKE_CONNECTION if connection else _TAKE_RESOURCE,
        {"subject": held.subject_id, "run": held.run_id, "token": held.token},
    ).all()
    if not rows:
        return ConfigError("the connection was deleted while its run was waiting")
    if all(row.field is None for row in rows) and not {row.kind for row in rows} <= keyless:
        return _why_nothing(tx, held)
    streams = _streams(rows[0]) if connection else ()
    if isinstance(streams, SyncwardError):
        return streams
    resources = _resources(rows)
    opened = [resource for resource in resources.values() if resource.sealed]
    audit.append(tx, *(unsealed_event(resource, held, principal) for resource in opened))
    if connection:
        return _connection(rows[0], resources, streams)
    return _resource(resources[held.subject_id])


def _resource(resource: SealedResource) -> Work:
    return Work(resource.name, resource, None, "", (), {})


def _streams(row: Row[Any]) -> tuple[StreamSpec, ...] | SyncwardError:
    """Read the streams; those of a newer version are left to a newer worker, with nothing opened.

    What it does not know (a mode, a setting) it must not guess at; while versions are mixed the
    run comes to another worker, and fails if there is none.
    """
    try:
        return tuple(StreamSpec.model_validate(spec) for spec in row.specs)
    except ValidationError as error:
        (place, *_) = error.errors(include_input=False, include_url=False, include_context=False)
        what = ".".join(map(str, place["loc"])) or "a setting"
        return TransientError(
            f"{row.name}: this worker's version cannot read {what} of a stream; it was written by "
            "a newer one: upgrade the workers, or apply the connection's document again"
        )


def _connection(
    row: Row[Any], resources: dict[UUID, SealedResource], streams: tuple[StreamSpec, ...]
) -> Work:
    return Work(
        name=row.name,
        source=resources[row.source_id],
        destination=resources[row.destination_id],
        target_schema=row.target_schema,
        streams=streams,
        fences=row.fences or {},
    )


def _resources(rows: Sequence[Row[Any]]) -> dict[UUID, SealedResource]:
    return {
        row.id: SealedResource(
            resource_id=row.id,
            account_id=row.account_id,
            name=row.resource,
            kind=row.kind,
            config=row.config,
            sealed=tuple(_field(s) for s in rows if s.id == row.id and s.field is not None),
        )
        for row in rows
    }


def _field(row: Row[Any]) -> SealedField:
    return SealedField(
        field=row.field,
        version=row.version,
        envelope=bytes(row.envelope),
        key=StoredKey(
            row.dek_id or NO_KEY, row.account_id, row.root_id or NO_ROOT, bytes(row.wrapped or b"")
        ),
        aim=None if row.aim is None else bytes(row.aim),
    )


_NEWEST = text(
    "SELECT field, version, envelope, dek_id, root_id, wrapped, aim, CAST(:account AS uuid) "
    "AS account_id FROM aimed_credentials(:run, :token) WHERE resource_id = :resource"
)


def newest(
    tx: Connection, held: Claim, resource: SealedResource, store: Keystore
) -> SealedResource:
    """Return the resource with its credentials as they are now; LeaseLost without a live lease.

    TransientError if its settings are others now: they would send what is new where it is not for.
    Whoever opens what is newer than `resource` records it before (`unsealed_event`).
    """
    settings = text("SELECT config FROM resources WHERE id = :id")
    if tx.execute(settings, {"id": resource.resource_id}).scalar_one_or_none() != resource.config:
        raise TransientError(
            f"resource {resource.name}: its settings were changed meanwhile; tried again with them"
        )
    rows = tx.execute(
        _NEWEST,
        {
            "account": resource.account_id,
            "run": held.run_id,
            "token": held.token,
            "resource": resource.resource_id,
        },
    ).all()
    if not rows and resource.sealed:
        raise LeaseLost(f"run {held.run_id}: another worker owns it")
    found = replace(resource, sealed=tuple(_field(row) for row in rows))
    missing = _without_keys([found])
    return _filled(found, _keys_apart(missing, store)) if missing else found


def with_keys(work: Work, store: Keystore) -> Work:
    """Return the work with the wrapped keys that are in a separate keystore.

    A key that is in neither place stays empty: it was shredded, and opens nothing.
    """
    ends = [end for end in (work.source, work.destination) if end is not None]
    missing = _without_keys(ends)
    if not missing or not store.separate:
        return work
    found = _keys_apart(missing, store)
    destination = work.destination and _filled(work.destination, found)
    return replace(work, source=_filled(work.source, found), destination=destination)


def _without_keys(ends: Sequence[SealedResource]) -> list[UUID]:
    return [s.key.dek_id for end in ends for s in end.sealed if not s.key.wrapped]


def _keys_apart(missing: Sequence[UUID], store: Keystore) -> Mapping[UUID, StoredKey]:
    if not store.separate:
        return {}
    with store.transaction() as keys:
        return keystore.credential_keys(keys, missing)


def _filled(end: SealedResource, found: Mapping[UUID, StoredKey]) -> SealedResource:
    sealed = (replace(s, key=found.get(s.key.dek_id, s.key)) for s in end.sealed)
    return replace(end, sealed=tuple(sealed))


def _why_nothing(tx: Connection, held: Claim) -> SyncwardError:
    """Say why no credential came: the lease is gone, or none was ever stored."""
    alive = tx.execute(
        text("SELECT FROM leases WHERE token = :t AND expires_at > clock_timestamp()"),
        {"t": held.token},
    ).one_or_none()
    if alive is None:
        return LeaseLost(f"run {held.run_id}: another worker owns it")
    return ConfigError(
        "no credentials are stored; store them with: syncward resource rotate NAME",
        code="no_credentials",
    )


def unsealed_event(resource: SealedResource, held: Claim, principal: Principal) -> AuditEvent:
    """Return the event that all credentials of a resource are about to be opened."""
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
