"""Audit: the closed list of actions, and one event. docs/audit.md explains each of them."""

from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID


class AuditClass(StrEnum):
    SECURITY = "A"
    RUNS = "B"


class TargetKind(StrEnum):
    ACCOUNT = "account"
    RESOURCE = "resource"
    CONNECTION = "connection"
    RUN = "run"
    INSTANCE = "instance"
    ROOT = "root"


class AuditAction(StrEnum):
    """`subject.past_tense_verb`; never renamed, because events outlive code."""

    ACCOUNT_CREATED = "account.created"
    ACCOUNT_DELETED = "account.deleted"
    ACCOUNT_PAUSED = "account.paused"
    ACCOUNT_RESUMED = "account.resumed"
    ACCOUNT_SHREDDED = "account.shredded"
    RESOURCE_CREATED = "resource.created"
    RESOURCE_UPDATED = "resource.updated"
    RESOURCE_DELETED = "resource.deleted"
    CREDENTIAL_SEALED = "credential.sealed"
    CREDENTIAL_UNSEALED = "credential.unsealed"
    CREDENTIAL_USED = "credential.used"
    CREDENTIAL_REFUSED = "credential.refused"
    CREDENTIAL_EXPIRED = "credential.expired"
    CREDENTIAL_RESEALED = "credential.resealed"
    KEYS_CREATED = "keys.created"
    KEYS_REWRAPPED = "keys.rewrapped"
    KEYS_REPLACED = "keys.replaced"
    KEYS_FORGOTTEN = "keys.forgotten"
    ROOT_ADDED = "root.added"
    ROOT_ACTIVATED = "root.activated"
    ROOT_REPLACED = "root.replaced"
    ROOT_RETIRED = "root.retired"
    EGRESS_REFUSED = "egress.refused"
    JOB_REFUSED = "job.refused"
    CONNECTION_CREATED = "connection.created"
    CONNECTION_UPDATED = "connection.updated"
    CONNECTION_DELETED = "connection.deleted"
    CONNECTION_PAUSED = "connection.paused"
    CONNECTION_RESUMED = "connection.resumed"
    STREAM_SCHEMA_CHANGED = "stream.schema_changed"
    STREAM_DRIFT_ACCEPTED = "stream.drift_accepted"
    STREAM_RESET = "stream.reset"
    STREAM_PURGED = "stream.purged"
    STREAM_PURGE_UNDONE = "stream.purge_undone"
    RUN_QUEUED = "run.queued"
    RUN_MERGED = "run.merged"
    RUN_DISPATCHED = "run.dispatched"
    RUN_REQUEUED = "run.requeued"
    RUN_STARTED = "run.started"
    RUN_SUCCEEDED = "run.succeeded"
    RUN_FAILED = "run.failed"
    RUN_CANCEL_REQUESTED = "run.cancel_requested"
    RUN_CANCELLED = "run.cancelled"
    RUN_AWAITING_APPROVAL = "run.awaiting_approval"
    RUN_APPROVED = "run.approved"
    RUN_REJECTED = "run.rejected"
    RUN_FENCE_RAISED = "run.fence_raised"
    OUTPUT_READ = "output.read"
    LOGS_READ = "logs.read"
    CALLS_READ = "calls.read"
    RECORD_REFUSED = "record.refused"
    AUDIT_READ = "audit.read"
    AUDIT_EXPORTED = "audit.exported"
    AUDIT_VERIFIED = "audit.verified"
    AUDIT_PRUNE_REQUESTED = "audit.prune_requested"
    AUDIT_PRUNE_APPROVED = "audit.prune_approved"
    AUDIT_PRUNE_WITHDRAWN = "audit.prune_withdrawn"
    AUDIT_PRUNED = "audit.pruned"
    CONNECTOR_INSTALLED = "connector.installed"
    CONNECTOR_REMOVED = "connector.removed"
    SEALER_STARTED = "sealer.started"
    SIGNER_ROTATED = "signer.rotated"
    SUBJECT_ERASED = "subject.erased"
    AUDIT_HEARTBEAT = "audit.heartbeat"
    AUDIT_EPOCH_STARTED = "audit.epoch_started"
    INSTANCE_READ = "instance.read"
    INSTANCE_PAUSED = "instance.paused"
    INSTANCE_RESUMED = "instance.resumed"
    DATABASE_UPGRADED = "database.upgraded"
    PARTITIONS_CREATED = "partitions.created"
    PARTITIONS_DROPPED = "partitions.dropped"
    RETENTION_APPLIED = "retention.applied"


_RUN_ACTIONS = frozenset(
    a
    for a in AuditAction
    if a.startswith(("run.", "stream.schema_changed", "partitions.created", "audit.heartbeat"))
)


def audit_class(action: AuditAction) -> AuditClass:
    """Class A: security and operators. Class B: the life of runs."""
    return AuditClass.RUNS if action in _RUN_ACTIONS else AuditClass.SECURITY


@dataclass(frozen=True, slots=True)
class Principal:
    """Who did it, as a process claims; the database stamps who it authenticated beside it."""

    kind: str  # operator | scheduler | worker | sealer
    name: str
    #: The command that a person gave: its events belong together. No part of who it was.
    request: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field before and after, as commitments (storage.commitments): comparable, not readable.

    None: there was no such field.
    """

    field: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event. docs/audit.md says what each action's detail holds; schemas.audit_details checks.

    `outcome` is success, attempted, denied or error.
    """

    action: AuditAction
    target_kind: TargetKind
    target_id: UUID
    principal: Principal
    account_id: UUID | None = None
    outcome: str = "success"
    reason: str | None = None
    run_id: UUID | None = None
    detail: dict[str, str | int | bool | None] = field(default_factory=dict)
    change: tuple[FieldChange, ...] = ()
