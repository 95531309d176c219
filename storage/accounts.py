"""Accounts: create, find, delete. Plans become limits of the account's queue."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text
from sqlalchemy.exc import IntegrityError

from schemas.accounts import Account
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import ConfigError, Conflict, NotFound
from schemas.ids import new_id
from schemas.mistakes import meant
from schemas.plans import plan as find_plan
from storage import audit, keystore, tenancy


def create(tx: Connection, name: str, *, company: str, plan: str, principal: Principal) -> Account:
    """Create an account with its queue; Conflict if the name is taken."""
    limits = find_plan(plan)
    account_id = new_id()
    try:
        with tx.begin_nested():
            tx.execute(
                text(
                    "INSERT INTO accounts (id, name, company, plan) "
                    "VALUES (:id, :name, :company, :plan)"
                ),
                {"id": account_id, "name": name, "company": company, "plan": plan},
            )
    except IntegrityError:
        raise Conflict(f"account {name}: exists already; see: syncward account list") from None
    tx.execute(
        text("INSERT INTO account_queues (account_id, runs_max) VALUES (:id, :runs_max)"),
        {"id": account_id, "runs_max": limits.runs_max},
    )
    audit.append(tx, _event(AuditAction.ACCOUNT_CREATED, account_id, principal, plan=plan))
    return get(tx, name)


def _event(
    action: AuditAction, account_id: UUID, principal: Principal, **detail: str
) -> AuditEvent:
    return AuditEvent(
        action,
        TargetKind.ACCOUNT,
        account_id,
        principal,
        account_id=account_id,
        detail=dict(detail),
    )


def listing(tx: Connection) -> Sequence[Account]:
    """Return all accounts by name."""
    return [_account(row) for row in tx.execute(text("SELECT * FROM accounts ORDER BY name"))]


def get(tx: Connection, name: str) -> Account:
    """Return one account; NotFound names it."""
    row = tx.execute(
        text("SELECT * FROM accounts WHERE name = :name"), {"name": name}
    ).one_or_none()
    if row is None:
        known = tx.execute(text("SELECT name FROM accounts ORDER BY name LIMIT 1000")).scalars()
        make = f"syncward account list shows all; make it with: syncward account create {name}"
        raise NotFound(f"account {name}: no such account; {meant(name, known, else_=make)}")
    return _account(row)


def resolve(tx: Connection, name: str | None) -> Account:
    """Return the named account, or the sole one; enter it for the rest of the transaction."""
    if name is not None:
        account = get(tx, name)
    else:
        accounts = listing(tx)
        if not accounts:
            raise ConfigError("there is no account yet; create one: syncward account create NAME")
        if len(accounts) > 1:
            raise ConfigError(
                f"there are {len(accounts)} accounts; say which with --account NAME "
                "or SYNCWARD_ACCOUNT"
            )
        account = accounts[0]
    tenancy.enter(tx, account.account_id)
    return account


def delete(
    tx: Connection,
    keys: Connection,
    account: Account,
    principal: Principal,
    *,
    backups: timedelta,
) -> datetime:
    """Delete an account and shred what is kept of it: its data keys go, so its records are noise.

    Conflict names connections and resources that are left. Return when the last backup of the
    keystore that holds its keys has expired: they could be restored until then.
    """
    tenancy.enter(tx, account.account_id)
    left = tx.execute(
        text("SELECT (SELECT count(*) FROM connections), (SELECT count(*) FROM resources)")
    ).one()
    if any(left):
        raise Conflict(
            f"account {account.name}: {left[0]} connections and {left[1]} resources are left; "
            "delete them first"
        )
    shredded = keystore.shred_account(keys, account.account_id)
    tx.execute(text("DELETE FROM accounts WHERE id = :id"), {"id": account.account_id})
    effective: datetime = tx.execute(
        text("SELECT now() + :backups"), {"backups": backups}
    ).scalar_one()
    audit.append(
        tx,
        _event(AuditAction.ACCOUNT_DELETED, account.account_id, principal),
        _event(
            AuditAction.ACCOUNT_SHREDDED,
            account.account_id,
            principal,
            keys=str(shredded),
            effective_at=effective.isoformat(timespec="seconds"),
        ),
    )
    return effective


def _account(row: Row[Any]) -> Account:
    return Account(row.id, row.name, row.company, row.plan, row.state, row.created_at)


def pause(tx: Connection, account: Account, reason: str, principal: Principal) -> bool:
    """Start nothing of this account any more; what runs goes on, what is due waits.

    False if it was paused already.
    """
    return _move(tx, account, "paused", reason, principal)


def resume(tx: Connection, account: Account, principal: Principal) -> bool:
    """Start what has waited; False if the account was active."""
    return _move(tx, account, "active", None, principal)


def _move(
    tx: Connection, account: Account, state: str, reason: str | None, principal: Principal
) -> bool:
    action = AuditAction.ACCOUNT_PAUSED if state == "paused" else AuditAction.ACCOUNT_RESUMED
    moved = tx.execute(
        text(
            "UPDATE accounts SET state = :state, state_reason = :reason "
            "WHERE id = :id AND state <> :state"
        ),
        {"id": account.account_id, "state": state, "reason": reason},
    ).rowcount
    if not moved:
        return False
    tx.execute(
        text(
            "UPDATE account_queues SET paused = :paused, has_work = true, at_cap = false, "
            "woken = woken + 1 "
            "WHERE account_id = :id"
        ),
        {"id": account.account_id, "paused": state == "paused"},
    )
    event = AuditEvent(
        action, TargetKind.ACCOUNT, account.account_id, principal,
        account_id=account.account_id, reason=reason,
    )  # fmt: skip
    audit.append(tx, event)
    return True
