"""What each audit action says in its `detail`: one model per action. Start at `DETAILS`.

storage.audit checks every event against its model before it is written, so that the stream holds
what docs/audit.md says and nothing else. Values are texts, integers, truth values or nothing; a
list is a text with commas.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from schemas.audit import AuditAction

#: The largest integer that every reader of JSON holds exactly.
INTEGER_MAX = 2**53 - 1

Int = Annotated[int, Field(ge=-INTEGER_MAX, le=INTEGER_MAX)]


class Detail(BaseModel):
    """An action that says nothing beyond what every event says."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", hide_input_in_errors=True)


class Planned(Detail):
    plan: str


class Named(Detail):
    name: str


class Shredded(Detail):
    keys: str
    effective_at: str


class ResourceMade(Detail):
    name: str
    kind: str


class ResourceChanged(Detail):
    name: str
    changed: str


class ConnectionChanged(Detail):
    changed: str


class Stored(Detail):
    field: str
    version: Int
    digest: str


class Unsealed(Detail):
    fields: str
    versions: str


class CredentialOf(Detail):
    """Of a run, or of one credential that was to be sealed again."""

    attempt: Int | None = None
    subject: str | None = None
    field: str | None = None
    version: Int | None = None


class KeyMade(Detail):
    purpose: str
    month: str = ""  # of records; the key of pseudonyms has none
    key: str


class Keys(Detail):
    keys: Int


class RootAdded(Detail):
    purpose: str
    provider: str


class RootActivated(Detail):
    purpose: str


class Counted(Detail):
    count: Int


class Queued(Detail):
    subject: str
    kind: str | None = None
    slot: str | None = None
    after: str | None = None


class Merged(Detail):
    subject: str
    slot: str | None = None
    attempt: Int | None = None


class OfRun(Detail):
    attempt: Int
    subject: str


class Dispatched(OfRun):
    dispatch: Int


class Requeued(OfRun):
    worker: str | None = None


class Started(OfRun):
    worker: str
    fence: Int


class SchemaChanged(Detail):
    stream: str
    column: str
    change: str
    before: str | None
    after: str | None


class SchemaAccepted(Detail):
    stream: str
    run: str


class StreamReset(Detail):
    stream: str


class Purged(Detail):
    stream: str
    rows: Int
    for_good: bool


class PurgeUndone(Detail):
    stream: str
    rows: Int


class Decided(OfRun):
    found: str | None = None


class FenceRaised(OfRun):
    before: Int
    after: Int


class RecordRefused(Detail):
    refused: Int
    missing: Int


class LogRead(Detail):
    events: Int
    filters: str = ""


class Exported(Detail):
    first: Int
    size: Int
    format: str
    sha256: str


class Verified(Detail):
    size: Int
    result: str
    first_bad: Int | None = None


class PruneRequested(Detail):
    request: str
    before: str
    first_kept: Int
    also: Int
    sha256: str


class PruneApproved(Detail):
    request: str


class PruneWithdrawn(Detail):
    request: str


class Pruned(Detail):
    request: str
    before: str
    first_kept: Int
    also: str
    size: Int
    root: str
    sha256: str
    partitions: str
    approved_by: str
    requested_by: str
    signature: str


class ConnectorInstalled(Detail):
    package: str
    version: str
    kind: str
    sha256: str


class ConnectorRemoved(Detail):
    package: str
    version: str


class SealerStarted(Detail):
    version: str
    keys: str


class SignerRotated(Detail):
    before: str
    after: str
    signature: str


class Erased(Detail):
    principal: str


class Heartbeat(Detail):
    size: Int


class EpochStarted(Detail):
    epoch: Int
    size: Int
    why: str
    lost_size: Int | None = None
    lost_root: str | None = None
    left_over: Int | None = None
    oldest: str | None = None
    signature: str | None = None


class Upgraded(Detail):
    before: str | None
    after: str


class Partitions(Detail):
    partitions: str


class RetentionApplied(Detail):
    days: Int
    runs: Int
    log_lines: Int


_A = AuditAction

#: Total over AuditAction (tested).
DETAILS: dict[AuditAction, type[Detail]] = {
    _A.ACCOUNT_CREATED: Planned,
    _A.ACCOUNT_DELETED: Detail,
    _A.ACCOUNT_PAUSED: Detail,
    _A.ACCOUNT_RESUMED: Detail,
    _A.ACCOUNT_SHREDDED: Shredded,
    _A.RESOURCE_CREATED: ResourceMade,
    _A.RESOURCE_UPDATED: ResourceChanged,
    _A.RESOURCE_DELETED: Named,
    _A.CREDENTIAL_SEALED: Stored,
    _A.CREDENTIAL_UNSEALED: Unsealed,
    _A.CREDENTIAL_USED: CredentialOf,
    _A.CREDENTIAL_EXPIRED: Unsealed,
    _A.CREDENTIAL_REFUSED: CredentialOf,
    _A.CREDENTIAL_RESEALED: Stored,
    _A.KEYS_CREATED: KeyMade,
    _A.KEYS_REWRAPPED: Keys,
    _A.KEYS_REPLACED: Keys,
    _A.KEYS_FORGOTTEN: Keys,
    _A.ROOT_ADDED: RootAdded,
    _A.ROOT_ACTIVATED: RootActivated,
    _A.ROOT_REPLACED: Detail,
    _A.ROOT_RETIRED: Detail,
    _A.EGRESS_REFUSED: OfRun,
    _A.JOB_REFUSED: Counted,
    _A.CONNECTION_CREATED: Named,
    _A.CONNECTION_UPDATED: ConnectionChanged,
    _A.CONNECTION_DELETED: Named,
    _A.CONNECTION_PAUSED: Detail,
    _A.CONNECTION_RESUMED: Detail,
    _A.STREAM_SCHEMA_CHANGED: SchemaChanged,
    _A.STREAM_DRIFT_ACCEPTED: SchemaAccepted,
    _A.STREAM_RESET: StreamReset,
    _A.STREAM_PURGED: Purged,
    _A.STREAM_PURGE_UNDONE: PurgeUndone,
    _A.RUN_QUEUED: Queued,
    _A.RUN_MERGED: Merged,
    _A.RUN_DISPATCHED: Dispatched,
    _A.RUN_REQUEUED: Requeued,
    _A.RUN_STARTED: Started,
    _A.RUN_SUCCEEDED: OfRun,
    _A.RUN_FAILED: OfRun,
    _A.RUN_CANCEL_REQUESTED: OfRun,
    _A.RUN_CANCELLED: OfRun,
    _A.RUN_AWAITING_APPROVAL: OfRun,
    _A.RUN_APPROVED: Decided,
    _A.RUN_REJECTED: Decided,
    _A.RUN_FENCE_RAISED: FenceRaised,
    _A.OUTPUT_READ: Detail,
    _A.LOGS_READ: Detail,
    _A.CALLS_READ: Detail,
    _A.RECORD_REFUSED: RecordRefused,
    _A.AUDIT_READ: LogRead,
    _A.AUDIT_EXPORTED: Exported,
    _A.AUDIT_VERIFIED: Verified,
    _A.AUDIT_PRUNE_REQUESTED: PruneRequested,
    _A.AUDIT_PRUNE_APPROVED: PruneApproved,
    _A.AUDIT_PRUNE_WITHDRAWN: PruneWithdrawn,
    _A.AUDIT_PRUNED: Pruned,
    _A.CONNECTOR_INSTALLED: ConnectorInstalled,
    _A.CONNECTOR_REMOVED: ConnectorRemoved,
    _A.SEALER_STARTED: SealerStarted,
    _A.SIGNER_ROTATED: SignerRotated,
    _A.SUBJECT_ERASED: Erased,
    _A.AUDIT_HEARTBEAT: Heartbeat,
    _A.AUDIT_EPOCH_STARTED: EpochStarted,
    _A.INSTANCE_READ: Detail,
    _A.INSTANCE_PAUSED: Detail,
    _A.INSTANCE_RESUMED: Detail,
    _A.DATABASE_UPGRADED: Upgraded,
    _A.PARTITIONS_CREATED: Partitions,
    _A.PARTITIONS_DROPPED: Partitions,
    _A.RETENTION_APPLIED: RetentionApplied,
}
