"""Resources: external systems and their sealed credentials. Plaintext never comes here."""

import json
from collections.abc import Collection, Sequence
from hashlib import sha256
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from schemas.accounts import Account, Resource
from schemas.audit import AuditAction, AuditEvent, FieldChange, Principal, TargetKind
from schemas.errors import ConfigError, Conflict, NotFound
from schemas.mistakes import meant
from schemas.sealed_secret import SealedSecret
from storage import audit, commitments, keystore, renewals
from storage.keystore import RootOffer, StoredKey

#: Longer than a worker holds a resource, which may exchange twice; less than a statement may take.
_RENEWED_WITHIN = "25s"

_SELECT = """
SELECT r.*, coalesce(q.runs_max, 0) AS runs_max, coalesce((
  SELECT jsonb_object_agg(v.field, v.version) FROM (
    SELECT c.field, max(c.version) AS version FROM credentials c
    WHERE c.resource_id = r.id GROUP BY c.field) v), '{}') AS secret_versions,
  (SELECT d.since FROM dead_logins d WHERE d.resource_id = r.id) AS needs_reauth_since
FROM resources r LEFT JOIN resource_queues q ON q.resource_id = r.id
"""


def listing(tx: Connection) -> Sequence[Resource]:
    """Return the account's resources by name. `tx` has entered the account, here and below."""
    return [_resource(row) for row in tx.execute(text(f"{_SELECT} ORDER BY r.name"))]


def get(tx: Connection, name: str) -> Resource:
    """Return one resource; NotFound names it."""
    row = tx.execute(text(f"{_SELECT} WHERE r.name = :name"), {"name": name}).one_or_none()
    if row is None:
        known = tx.execute(text("SELECT name FROM resources ORDER BY name LIMIT 1000")).scalars()
        other = "see: syncward resource list"
        raise NotFound(f"resource {name}: no such resource; {meant(name, known, else_=other)}")
    return _resource(row)


def _resource(row: Row[Any]) -> Resource:
    return Resource(
        resource_id=row.id,
        account_id=row.account_id,
        name=row.name,
        kind=row.kind,
        config=row.config,
        secret_versions=row.secret_versions,
        runs_max=row.runs_max,
        created_at=row.created_at,
        updated_at=row.updated_at,
        needs_reauth_since=row.needs_reauth_since,
    )


def settings(tx: Connection, resource_id: UUID) -> tuple[str, dict[str, Any]]:
    """Return the kind and the clear settings of a resource that is there."""
    row = tx.execute(
        text("SELECT kind, config FROM resources WHERE id = :id"), {"id": resource_id}
    ).one()
    return row.kind, row.config


def lock(tx: Connection, name: str) -> None:
    """Wait until no worker renews the login of a resource; whoever stores a secret does it first.

    What its newest versions are is asked after this.
    """
    tx.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": _RENEWED_WITHIN})
    tx.execute(text("SELECT FROM resources WHERE name = :name FOR NO KEY UPDATE"), {"name": name})


def next_version(tx: Connection, resource: Resource, field: str) -> int:
    """Return the next version of a field: none that the other system has refused already."""
    found: int = tx.execute(
        text(
            "SELECT 1 + greatest((SELECT max(version) FROM credentials WHERE resource_id = :id "
            "AND field = :field), (SELECT CAST(versions ->> :field AS integer) FROM dead_logins "
            "WHERE resource_id = :id), 0)"
        ),
        {"id": resource.resource_id, "field": field},
    ).scalar_one()
    return found


def create(
    tx: Connection,
    account: Account,
    *,
    resource_id: UUID,
    name: str,
    kind: str,
    config: dict[str, Any],
    runs_max: int,
    principal: Principal,
) -> None:
    """Create a resource without credentials; Conflict if the name is taken."""
    try:
        with tx.begin_nested():
            tx.execute(
                text(
                    "INSERT INTO resources (id, account_id, name, kind, config) "
                    "VALUES (:id, :account, :name, :kind, CAST(:config AS jsonb))"
                ),
                {
                    "id": resource_id,
                    "account": account.account_id,
                    "name": name,
                    "kind": kind,
                    "config": json.dumps(config),
                },
            )
    except IntegrityError:
        raise Conflict(
            f"resource {name}: exists already; see: syncward resource show {name}"
        ) from None
    tx.execute(
        text("INSERT INTO resource_queues (resource_id, runs_max) VALUES (:id, :max)"),
        {"id": resource_id, "max": runs_max},
    )
    audit.append(
        tx,
        _event(AuditAction.RESOURCE_CREATED, account, resource_id, principal, name=name, kind=kind),
    )


def _event(
    action: AuditAction,
    account: Account,
    resource_id: UUID,
    principal: Principal,
    change: tuple[FieldChange, ...] = (),
    **detail: str | int,
) -> AuditEvent:
    return AuditEvent(
        action,
        TargetKind.RESOURCE,
        resource_id,
        principal,
        account_id=account.account_id,
        detail=dict(detail),
        change=change,
    )


def check_aim(
    resource: Resource, given: Collection[str], *, moved: bool, renewed: Collection[str]
) -> frozenset[str]:
    """Return the secrets to forget with a change; ConfigError if some have to be given again.

    Who may change where secrets are sent (`moved`) must know them, or they would be sent to a host
    of theirs. What workers have stored nobody can give: it is forgotten, and authorised again.
    """
    if not moved:
        return frozenset()
    left = set(resource.secret_versions) - set(given)
    missing = ", ".join(sorted(left - set(renewed)))
    if missing:
        raise ConfigError(
            f"resource {resource.name}: its secrets would be sent elsewhere with these settings; "
            f"give them again in the document, under secret: {missing}"
        )
    return frozenset(left)


def forget(tx: Connection, keys: Connection, resource: Resource, fields: Collection[str]) -> None:
    """Delete secrets in every version; whoever calls this leaves an event of the resource."""
    held = text("SELECT credential_key_ids(:id)"), {"id": resource.resource_id}
    before = set(tx.execute(*held).scalars())
    tx.execute(
        text("DELETE FROM credentials WHERE resource_id = :id AND field = ANY(:fields)"),
        {"id": resource.resource_id, "fields": sorted(fields)},
    )
    keystore.supersede(keys, sorted(before - set(tx.execute(*held).scalars())))


def update_config(
    tx: Connection,
    account: Account,
    resource: Resource,
    config: dict[str, Any],
    principal: Principal,
) -> None:
    """Replace the clear settings of a resource; `check_aim` first."""
    tx.execute(
        text(
            "UPDATE resources SET config = CAST(:config AS jsonb), updated_at = clock_timestamp() "
            "WHERE id = :id"
        ),
        {"config": json.dumps(config), "id": resource.resource_id},
    )
    change = commitments.changes(tx, account.account_id, resource.config, config)
    _note_update(tx, account, resource, principal, change)


def limit_runs(
    tx: Connection, account: Account, resource: Resource, runs_max: int, principal: Principal
) -> None:
    """Let so many runs work with a resource at once, from the next dispatch on."""
    tx.execute(
        text("UPDATE resource_queues SET runs_max = :max WHERE resource_id = :id"),
        {"max": runs_max, "id": resource.resource_id},
    )
    change = commitments.changes(
        tx, account.account_id, {"runs_max": resource.runs_max}, {"runs_max": runs_max}
    )
    _note_update(tx, account, resource, principal, change)


def _note_update(
    tx: Connection,
    account: Account,
    resource: Resource,
    principal: Principal,
    change: tuple[FieldChange, ...],
) -> None:
    audit.append(
        tx,
        _event(
            AuditAction.RESOURCE_UPDATED,
            account,
            resource.resource_id,
            principal,
            change,
            name=resource.name,
            changed=", ".join(one.field for one in change),
        ),
    )


def store_secret(
    tx: Connection,
    keys: Connection,
    account: Account,
    resource_id: UUID,
    secret: SealedSecret,
    *,
    offer: RootOffer,
    principal: Principal,
    aim: bytes | None = None,
    revives: bool = True,
) -> None:
    """Store a new version of a sealed credential, and its wrapped key in the keystore first.

    If the other system refused what was stored before (`needs_reauth`), the connections that were
    paused for it go on; not with one that a worker has yet to make a login of (`revives` False).
    """
    key = StoredKey(secret.dek_id, account.account_id, secret.root_id, secret.wrapped)
    keystore.keep(tx, keys, key, offer, principal)
    tx.execute(
        text(
            "INSERT INTO credentials (resource_id, field, version, account_id, envelope, "
            "fingerprint, short, aim) "
            "VALUES (:id, :field, :version, :account, :envelope, :fingerprint, :short, :aim)"
        ),
        {
            "id": resource_id,
            "field": secret.field,
            "version": secret.version,
            "account": account.account_id,
            "envelope": secret.envelope,
            "fingerprint": secret.fingerprint,
            "short": secret.short,
            "aim": aim,
        },
    )
    audit.append(
        tx,
        _event(
            AuditAction.CREDENTIAL_SEALED,
            account,
            resource_id,
            principal,
            field=secret.field,
            version=secret.version,
            digest=sha256(secret.envelope).hexdigest(),
        ),
    )
    if revives:
        renewals.revive(tx, account.account_id, resource_id, principal)


def fingerprints(
    tx: Connection, resource_id: UUID, renewed: Collection[str] = ()
) -> dict[str, list[bytes]]:
    """Return salted fingerprints of each field, to see whether a given secret is new.

    Of the newest version; of the fields `renewed`, where workers store newer ones, of each that is
    kept, so that what an operator gave first is not taken for new.
    """
    rows = tx.execute(
        text(
            "SELECT field, fingerprint, version = max(version) OVER (PARTITION BY field) AS newest "
            "FROM credentials WHERE resource_id = :id"
        ),
        {"id": resource_id},
    )
    found: dict[str, list[bytes]] = {}
    for row in rows:
        if row.newest or row.field in renewed:
            found.setdefault(row.field, []).append(bytes(row.fingerprint))
    return found


def delete(
    tx: Connection, keys: Connection, account: Account, resource: Resource, principal: Principal
) -> None:
    """Delete a resource with its credentials and their keys; Conflict names who still uses it."""
    used = tx.execute(
        text("SELECT name FROM connections WHERE :id IN (source_id, destination_id) ORDER BY name"),
        {"id": resource.resource_id},
    ).scalars()
    names = ", ".join(used)
    if names:
        raise Conflict(f"resource {resource.name}: used by {names}; delete those connections first")
    held = tx.execute(text("SELECT credential_key_ids(:id)"), {"id": resource.resource_id})
    keystore.shred(keys, account.account_id, list(held.scalars()))
    tx.execute(text("DELETE FROM resources WHERE id = :id"), {"id": resource.resource_id})
    audit.append(
        tx,
        _event(
            AuditAction.RESOURCE_DELETED,
            account,
            resource.resource_id,
            principal,
            name=resource.name,
        ),
    )
