"""Logins that workers renew: their lock, their new versions, and what becomes of dead ones.

Every function but `revive` wants the live lease of a run of the resource; the database checks it.
`tx` has entered the run's account.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import LeaseLost
from schemas.runs import Claim
from schemas.sealed_secret import SealedSecret
from storage import audit, keystore
from storage.keystore import RootOffer, StoredKey

#: How long the other rows of such a transaction are waited for: as everywhere in a worker.
_OTHERS = "10s"
#: Why a connection is paused, and why it goes on.
NEEDS_REAUTH, AUTHORIZED = "needs_reauth", "authorized"


@dataclass(frozen=True, slots=True)
class LoginLock:
    """A resource that nobody else renews now; `dead` are the versions that were refused, if any."""

    resource_id: UUID
    dead: Mapping[str, int] | None


def lock(tx: Connection, held: Claim, resource_id: UUID, *, wait_s: float) -> LoginLock:
    """Keep everybody else from renewing this login until `tx` ends; LeaseLost without a lease.

    TransientError (`rolled_back`) if somebody else has it for longer than `wait_s`.
    """
    wait = text("SELECT set_config('lock_timeout', :wait, true)")
    tx.execute(wait, {"wait": f"{wait_s * 1000:.0f}ms"})
    row = tx.execute(
        text("SELECT * FROM lock_login(:run, :token, :resource)"), _of(held, resource_id)
    ).one()
    tx.execute(wait, {"wait": _OTHERS})  # a new login is not lost to somebody who pauses something
    if not row.held:
        raise _lost(held)
    return LoginLock(resource_id, row.dead)


def store(
    tx: Connection,
    keys: Connection,
    held: Claim,
    resource_id: UUID,
    secrets: Sequence[SealedSecret],
    *,
    aim: bytes,
    offer: RootOffer,
    principal: Principal,
) -> None:
    """Store the next version of each field; what was paused because the login was dead goes on.

    `aim` is where the settings lead that it came by.
    """
    superseded: list[UUID] = []
    for one in secrets:
        key = StoredKey(one.dek_id, held.account_id, one.root_id, one.wrapped)
        keystore.keep(tx, keys, key, offer, principal)
        gone = tx.execute(
            text(
                "SELECT store_renewed(:run, :token, :resource, :field, :version, :envelope, "
                ":fingerprint, :short, :aim)"
            ),
            {
                **_of(held, resource_id),
                "field": one.field,
                "version": one.version,
                "envelope": one.envelope,
                "fingerprint": one.fingerprint,
                "short": one.short,
                "aim": aim,
            },
        ).scalar_one()
        if gone is None:
            raise _lost(held)
        superseded += gone
        audit.append(tx, _sealed(held, resource_id, one, principal))
    if superseded:
        keystore.supersede(keys, superseded)
    resumed = tx.execute(
        text("SELECT login_renewed(:run, :token, :resource)"), _of(held, resource_id)
    ).scalars()
    _tell_resumed(tx, held.account_id, list(resumed), principal)


def died(
    tx: Connection,
    held: Claim,
    resource_id: UUID,
    versions: Mapping[str, int],
    principal: Principal,
) -> None:
    """Note that the other system refuses these versions, and pause every connection of the login.

    However many runs meet it: one event for the resource, one for each connection that stops.
    """
    row = tx.execute(
        text("SELECT * FROM login_died(:run, :token, :resource, CAST(:versions AS jsonb))"),
        {**_of(held, resource_id), "versions": json.dumps(dict(versions))},
    ).one()
    if row.first is None:
        raise _lost(held)
    events = [_moved(AuditAction.CONNECTION_PAUSED, held.account_id, one, principal, NEEDS_REAUTH)
              for one in row.paused]  # fmt: skip
    if row.first:
        events.insert(0, _expired(held, resource_id, versions, principal))
    audit.append(tx, *events)


def revive(tx: Connection, account_id: UUID, resource_id: UUID, principal: Principal) -> None:
    """Let go on what was paused because this login was dead: an operator has stored a new one.

    A connection that a person has stopped meanwhile stays so. The caller holds the resource's lock.
    """
    resumed = tx.execute(text("SELECT revive_login(:id)"), {"id": resource_id}).scalars()
    _tell_resumed(tx, account_id, list(resumed), principal)


def is_dead(tx: Connection, connection_id: UUID) -> bool:
    """Say whether an end of a connection waits to be authorised again."""
    found: bool = tx.execute(
        text(
            "SELECT EXISTS (SELECT FROM dead_logins d JOIN connections c "
            "ON d.resource_id IN (c.source_id, c.destination_id) WHERE c.id = :id)"
        ),
        {"id": connection_id},
    ).scalar_one()
    return found


def _of(held: Claim, resource_id: UUID) -> dict[str, object]:
    return {"run": held.run_id, "token": held.token, "resource": resource_id}


def _lost(held: Claim) -> LeaseLost:
    return LeaseLost(f"run {held.run_id}: another worker owns it")


def _sealed(held: Claim, resource_id: UUID, one: SealedSecret, by: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.CREDENTIAL_SEALED,
        TargetKind.RESOURCE,
        resource_id,
        by,
        account_id=held.account_id,
        reason="renewed",
        run_id=held.run_id,
        detail={
            "field": one.field,
            "version": one.version,
            "digest": sha256(one.envelope).hexdigest(),
        },
    )


def _expired(
    held: Claim, resource_id: UUID, versions: Mapping[str, int], by: Principal
) -> AuditEvent:
    return AuditEvent(
        AuditAction.CREDENTIAL_EXPIRED,
        TargetKind.RESOURCE,
        resource_id,
        by,
        account_id=held.account_id,
        outcome="error",
        reason=NEEDS_REAUTH,
        run_id=held.run_id,
        detail={
            "fields": ", ".join(sorted(versions)),
            "versions": ", ".join(str(versions[field]) for field in sorted(versions)),
        },
    )


def _moved(
    action: AuditAction, account_id: UUID, connection_id: UUID, by: Principal, reason: str
) -> AuditEvent:
    return AuditEvent(
        action, TargetKind.CONNECTION, connection_id, by, account_id=account_id, reason=reason
    )


def _tell_resumed(
    tx: Connection, account_id: UUID, connections: Sequence[UUID], by: Principal
) -> None:
    action = AuditAction.CONNECTION_RESUMED
    audit.append(tx, *(_moved(action, account_id, one, by, AUTHORIZED) for one in connections))
