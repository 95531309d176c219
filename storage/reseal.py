"""Sealed credentials that get another data key: taken by the key that they have, changed in place.

Workers only: what is returned here is opened, and each use has its event before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.audit_body import escaped
from storage import audit


@dataclass(frozen=True, slots=True)
class SealedCredential:
    """One credential with where it stands: what its envelope is bound to."""

    account_id: UUID
    resource_id: UUID
    field: str
    version: int
    envelope: bytes
    dek_id: UUID


def take(
    tx: Connection, dek_ids: Sequence[UUID], principal: Principal
) -> Sequence[SealedCredential]:
    """Return all that is sealed with these keys. The database records that it is to be opened."""
    rows = tx.execute(
        text("SELECT * FROM credentials_of_keys(:ids, :principal)"),
        {"ids": list(dek_ids), "principal": escaped(str(principal))},
    )
    return [
        SealedCredential(
            account_id=row.account_id,
            resource_id=row.resource_id,
            field=row.field,
            version=row.version,
            envelope=bytes(row.envelope),
            dek_id=row.dek_id,
        )
        for row in rows
    ]


def in_use(tx: Connection, dek_ids: Sequence[UUID]) -> set[UUID]:
    """Return those of these keys that something is sealed with."""
    rows = tx.execute(text("SELECT keys_in_use(:ids)"), {"ids": list(dek_ids)})
    return set(rows.scalars())


def put(tx: Connection, one: SealedCredential, envelope: bytes, principal: Principal) -> bool:
    """Replace an envelope, compare-and-set; False if it changed or went meanwhile."""
    replaced: bool = tx.execute(
        text("SELECT reseal_credential(:resource, :field, :version, :old, :new)"),
        {
            "resource": one.resource_id,
            "field": one.field,
            "version": one.version,
            "old": one.envelope,
            "new": envelope,
        },
    ).scalar_one()
    if replaced:
        digest = sha256(envelope).hexdigest()
        audit.append(tx, _event(AuditAction.CREDENTIAL_RESEALED, one, principal, digest=digest))
    return replaced


def let_go(tx: Connection, one: SealedCredential, principal: Principal) -> None:
    """Record that a credential was opened and is as it was: somebody changed it meanwhile."""
    audit.append(tx, _event(AuditAction.CREDENTIAL_USED, one, principal))


def refused(tx: Connection, one: SealedCredential, principal: Principal) -> None:
    """Record that a credential did not open; it stays as it is."""
    audit.append(tx, _event(AuditAction.CREDENTIAL_REFUSED, one, principal, outcome="error"))


def _event(
    action: AuditAction,
    one: SealedCredential,
    principal: Principal,
    *,
    outcome: str = "success",
    **more: str,
) -> AuditEvent:
    return AuditEvent(
        action,
        TargetKind.RESOURCE,
        one.resource_id,
        principal,
        account_id=one.account_id,
        outcome=outcome,
        reason="reseal",
        detail={"field": one.field, "version": one.version, **more},
    )
