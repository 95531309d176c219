"""Events about connectors of others that a host has; the files themselves are no matter of SQL."""

from sqlalchemy import Connection

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from storage import audit


def note_installed(
    tx: Connection, package: str, version: str, *, kind: str, sha256: str, principal: Principal
) -> None:
    """Record that a host has a connector from now on."""
    detail = {"package": package, "version": version, "kind": kind, "sha256": sha256}
    _note(tx, AuditAction.CONNECTOR_INSTALLED, detail, principal)


def note_removed(tx: Connection, package: str, version: str, *, principal: Principal) -> None:
    """Record that a host has it no more."""
    detail = {"package": package, "version": version}
    _note(tx, AuditAction.CONNECTOR_REMOVED, detail, principal)


def _note(
    tx: Connection, action: AuditAction, detail: dict[str, str], principal: Principal
) -> None:
    event = AuditEvent(action, TargetKind.INSTANCE, audit.INSTANCE_ID, principal, detail={**detail})
    audit.append(tx, event)
