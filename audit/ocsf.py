"""An event in the words of the Open Cybersecurity Schema Framework (OCSF). Start at `document`.

docs/siem.md has the table of actions; what OCSF has no place for stands in `unmapped`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from schemas.audit import AuditAction, TargetKind
from storage.audit_tail import StoredEvent, said

#: The version of the schema that this follows.
VERSION = "1.5.0"

#: Classes by number: name, category.
CLASSES = {
    3001: ("Account Change", 3),
    3004: ("Entity Management", 3),
    6002: ("Application Lifecycle", 6),
    6003: ("API Activity", 6),
}
_CATEGORIES = {3: "Identity & Access Management", 6: "Application Activity"}

INFO, LOW, MEDIUM, HIGH, CRITICAL = 1, 2, 3, 4, 5
_SEVERITIES = {INFO: "Informational", LOW: "Low", MEDIUM: "Medium", HIGH: "High",
               CRITICAL: "Critical"}  # fmt: skip

CREATE, READ, UPDATE, DELETE, ENABLE, DISABLE, OTHER = 1, 2, 3, 4, 8, 9, 99
_ACTIVITIES = {
    (3001, 6): "Delete",
    (6002, 3): "Start",
    **{(3004, n): name for n, name in ((CREATE, "Create"), (READ, "Read"), (UPDATE, "Update"),
       (DELETE, "Delete"), (ENABLE, "Enable"), (DISABLE, "Disable"))},
    **{(6003, n): name for n, name in ((CREATE, "Create"), (READ, "Read"), (UPDATE, "Update"),
       (DELETE, "Delete"), (OTHER, "Other"))},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mapping_:  # noqa: N801 - `Mapping` is the standard library's
    """What an action is to OCSF."""

    class_uid: int
    activity_id: int
    severity_id: int = INFO


def _entity(activity: int, severity: int = INFO) -> Mapping_:
    return Mapping_(3004, activity, severity)


def _call(activity: int, severity: int = INFO) -> Mapping_:
    return Mapping_(6003, activity, severity)


_A = AuditAction
#: Every action. A test requires it.
ACTIONS: Mapping[AuditAction, Mapping_] = {
    _A.ACCOUNT_CREATED: _entity(CREATE),
    _A.ACCOUNT_DELETED: _entity(DELETE, LOW),
    _A.ACCOUNT_PAUSED: _entity(DISABLE),
    _A.ACCOUNT_RESUMED: _entity(ENABLE),
    _A.ACCOUNT_SHREDDED: _entity(DELETE, MEDIUM),
    _A.RESOURCE_CREATED: _entity(CREATE),
    _A.RESOURCE_UPDATED: _entity(UPDATE),
    _A.RESOURCE_DELETED: _entity(DELETE, LOW),
    _A.CREDENTIAL_SEALED: _entity(UPDATE),
    _A.CREDENTIAL_UNSEALED: _entity(READ),
    _A.CREDENTIAL_USED: _call(OTHER),
    _A.CREDENTIAL_REFUSED: _call(READ, MEDIUM),
    _A.CREDENTIAL_EXPIRED: _entity(DISABLE, MEDIUM),
    _A.CREDENTIAL_RESEALED: _entity(UPDATE),
    _A.KEYS_CREATED: _entity(CREATE),
    _A.KEYS_REWRAPPED: _entity(UPDATE),
    _A.KEYS_REPLACED: _entity(UPDATE, LOW),
    _A.KEYS_FORGOTTEN: _entity(DELETE, LOW),
    _A.ROOT_ADDED: _entity(CREATE, LOW),
    _A.ROOT_ACTIVATED: _entity(ENABLE, LOW),
    _A.ROOT_REPLACED: _entity(UPDATE, LOW),
    _A.ROOT_RETIRED: _entity(DISABLE, LOW),
    _A.EGRESS_REFUSED: _call(OTHER, MEDIUM),
    _A.JOB_REFUSED: _call(OTHER, MEDIUM),
    _A.CONNECTION_CREATED: _entity(CREATE),
    _A.CONNECTION_UPDATED: _entity(UPDATE),
    _A.STREAM_SCHEMA_CHANGED: _entity(UPDATE),
    _A.STREAM_DRIFT_ACCEPTED: _entity(UPDATE, LOW),
    _A.STREAM_RESET: _entity(UPDATE, LOW),
    _A.STREAM_PURGED: _entity(DELETE, MEDIUM),
    _A.STREAM_PURGE_UNDONE: _entity(UPDATE, LOW),
    _A.CONNECTION_DELETED: _entity(DELETE, LOW),
    _A.CONNECTION_PAUSED: _entity(DISABLE),
    _A.CONNECTION_RESUMED: _entity(ENABLE),
    _A.RUN_QUEUED: _call(CREATE),
    _A.RUN_MERGED: _call(UPDATE),
    _A.RUN_DISPATCHED: _call(UPDATE),
    _A.RUN_REQUEUED: _call(UPDATE),
    _A.RUN_STARTED: _call(UPDATE),
    _A.RUN_SUCCEEDED: _call(UPDATE),
    _A.RUN_FAILED: _call(UPDATE, LOW),
    _A.RUN_CANCEL_REQUESTED: _call(UPDATE),
    _A.RUN_CANCELLED: _call(UPDATE),
    _A.RUN_AWAITING_APPROVAL: _call(UPDATE, LOW),
    _A.RUN_APPROVED: _call(UPDATE, LOW),
    _A.RUN_REJECTED: _call(UPDATE, LOW),
    _A.RUN_FENCE_RAISED: _call(UPDATE, MEDIUM),
    _A.OUTPUT_READ: _call(READ),
    _A.LOGS_READ: _call(READ),
    _A.CALLS_READ: _call(READ),
    _A.RECORD_REFUSED: _call(READ, MEDIUM),
    _A.AUDIT_READ: _call(READ),
    _A.AUDIT_EXPORTED: _call(READ, LOW),
    _A.AUDIT_VERIFIED: _call(READ),
    _A.AUDIT_PRUNE_REQUESTED: _call(DELETE, MEDIUM),
    _A.AUDIT_PRUNE_APPROVED: _call(DELETE, MEDIUM),
    _A.AUDIT_PRUNE_WITHDRAWN: _call(UPDATE, LOW),
    _A.AUDIT_PRUNED: _call(DELETE, HIGH),
    _A.CONNECTOR_INSTALLED: _call(CREATE, LOW),
    _A.CONNECTOR_REMOVED: _call(DELETE, LOW),
    _A.SEALER_STARTED: Mapping_(6002, 3),
    _A.SIGNER_ROTATED: _entity(UPDATE, MEDIUM),
    _A.SUBJECT_ERASED: Mapping_(3001, 6, LOW),
    _A.AUDIT_HEARTBEAT: _call(OTHER),
    _A.AUDIT_EPOCH_STARTED: _call(OTHER, HIGH),
    _A.INSTANCE_READ: _call(READ),
    _A.INSTANCE_PAUSED: _call(UPDATE),
    _A.INSTANCE_RESUMED: _call(UPDATE),
    _A.DATABASE_UPGRADED: _call(UPDATE, LOW),
    _A.PARTITIONS_CREATED: _call(CREATE),
    _A.PARTITIONS_DROPPED: _call(DELETE, LOW),
    _A.RETENTION_APPLIED: _call(DELETE),
}
#: Of a version after this one: an event is never left out because its action is not known.
_UNKNOWN = Mapping_(6003, OTHER, LOW)

#: Outcome -> (status_id, status). What is none of these is shown as it stands, as Other.
_STATUS = {
    "success": (1, "Success"),
    "denied": (2, "Failure"),
    "error": (2, "Failure"),
    "failure": (2, "Failure"),
}


def mapped(action: str) -> Mapping_:
    """Return what an action is to OCSF, also for one that this version does not know."""
    try:
        return ACTIONS[AuditAction(action)]
    except (ValueError, KeyError):
        return _UNKNOWN


def document(event: StoredEvent, names: Mapping[str, str]) -> dict[str, Any]:
    """Return an event as OCSF. `names` are those of principals that the log knows by an id."""
    body = said(event.body)
    to = mapped(event.action)
    outcome = str(body.get("outcome", ""))
    status_id, status = _STATUS.get(outcome, (99, outcome or "Unknown"))
    name, category = CLASSES[to.class_uid]
    severity = _severity(event, body, to, status_id)
    found: dict[str, Any] = {
        "activity_id": to.activity_id,
        "activity_name": _ACTIVITIES[to.class_uid, to.activity_id],
        "category_uid": category,
        "category_name": _CATEGORIES[category],
        "class_uid": to.class_uid,
        "class_name": name,
        "type_uid": to.class_uid * 100 + to.activity_id,
        "type_name": f"{name}: {_ACTIVITIES[to.class_uid, to.activity_id]}",
        "time": int(event.at.timestamp() * 1000),
        "message": f"{event.action} {event.target_kind} {event.target_id}",
        "severity_id": severity,
        "severity": _SEVERITIES[severity],
        "status_id": status_id,
        "status": status,
        "metadata": _metadata(event, body),
        "actor": {"user": _user(str(body.get("principal", "")), event.login, names)},
        "src_endpoint": _endpoint(event.client),
        "unmapped": {
            "login": event.login,
            "class": event.class_,
            "seq": event.seq,
            "body": body,
        },
    }
    if body.get("reason") is not None:
        found["status_detail"] = str(body["reason"])
    return found | _of_class(to.class_uid, event, body, names)


def _severity(event: StoredEvent, body: Mapping[str, Any], to: Mapping_, status_id: int) -> int:
    detail = body.get("detail")
    result = detail.get("result") if isinstance(detail, dict) else None
    if event.action == AuditAction.AUDIT_VERIFIED and result not in {None, "intact"}:
        return CRITICAL
    return max(to.severity_id, MEDIUM) if status_id == 2 else to.severity_id  # noqa: PLR2004 - Failure


def _metadata(event: StoredEvent, body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "version": VERSION,
        "uid": event.leaf.hex(),
        "event_code": event.action,
        "log_name": "audit",
        "original_time": event.at.isoformat(),
        "product": {
            "name": "Syncward",
            "vendor_name": "Syncward",
            "version": metadata.version("syncward"),
        },
    }
    if event.index is not None:
        found["sequence"] = event.index
    if event.account_id is not None:
        found["tenant_uid"] = str(event.account_id)
    if body.get("run_id") is not None:
        found["correlation_uid"] = str(body["run_id"])
    return found


#: Type of a user in OCSF: a person, or a process of the system.
_USER, _SYSTEM = (1, "User"), (3, "System")


def _user(principal: str, login: str, names: Mapping[str, str]) -> dict[str, Any]:
    kind, _, name = principal.partition(":")
    type_id, type_ = _USER if kind == "operator" else _SYSTEM
    return {
        "uid": principal,
        "name": names.get(principal, name),
        "type_id": type_id,
        "type": type_,
        "account": {"name": login, "uid": login, "type_id": 99, "type": "Postgres login"},
    }


def _endpoint(client: str) -> dict[str, str]:
    """Return where a session came from; `local` is a socket of the database's own host."""
    return {"name": client} if client == "local" else {"ip": client}


def _of_class(
    class_uid: int, event: StoredEvent, body: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, Any]:
    target = {"uid": str(event.target_id), "type": event.target_kind}
    match class_uid:
        case 3001:
            detail = body.get("detail")
            gone = str(detail.get("principal", "")) if isinstance(detail, dict) else ""
            return {"user": _user(gone, event.login, names)}
        case 3004:
            return {"entity": target}
        case 6002:
            return {"app": {"name": "syncward sealer", "vendor_name": "Syncward"}}
        case _:
            return {
                "api": {"operation": event.action},
                "resources": [] if event.target_kind == TargetKind.INSTANCE else [target],
            }
