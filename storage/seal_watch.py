"""What a sealer and its watchers ask beside sealing: how far behind it is, what it waits for."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction
from storage.audit import INSTANCE_ID
from storage.audit_tail import said
from storage.sealing import Position


@dataclass(frozen=True, slots=True)
class Lag:
    """In seconds; 0 while nothing waits."""

    seal: float
    publish: float
    size: int
    sealers: int  # 1 while somebody holds the log
    published_size: int


def lag(tx: Connection) -> Lag:
    """Return how far behind the log is; every role of a process may ask."""
    row = tx.execute(
        text(
            "SELECT coalesce(lag.seal_s, 0) AS seal, coalesce(lag.publish_s, 0) AS publish, size, "
            "CAST(held_until > clock_timestamp() AS int) AS sealers, published_size "
            "FROM audit.log, audit.lag() AS lag"
        )
    ).one()
    return Lag(*row)


def age(tx: Connection, moment: datetime) -> float:
    """Return how long ago a moment was, by the clock that `lag` uses, too."""
    seconds = tx.execute(
        text("SELECT CAST(extract(epoch FROM clock_timestamp() - :moment) AS float8)"),
        {"moment": moment},
    ).scalar_one()
    return max(0.0, float(seconds))


@dataclass(frozen=True, slots=True)
class Blocker:
    """The oldest transaction that runs: no event younger than it is final."""

    pid: int | None  # None: a prepared transaction, which has no process
    login: str
    database: str
    application: str


def blocker(tx: Connection) -> Blocker | None:
    """Return who delays sealing, if another transaction than our own does."""
    row = tx.execute(
        text(
            "SELECT pid, login, database, application FROM ("
            "SELECT pid, coalesce(usename::text, '') AS login, coalesce(datname::text, '') AS "
            "database, coalesce(application_name, '') AS application, backend_xid AS xid "
            "FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() "
            "UNION ALL SELECT NULL, owner::text, database::text, 'prepared transaction', "
            "transaction FROM pg_prepared_xacts) AS running ORDER BY age(xid) DESC LIMIT 1"
        )
    ).one_or_none()
    return None if row is None else Blocker(*row)


@dataclass(frozen=True, slots=True)
class Said:
    """What an event about the log says; whether it may say so, its signature tells."""

    position: Position
    detail: Mapping[str, str | int | bool | None]


def losses(tx: Connection) -> list[Said]:
    """Return what all events say about losses that an operator accepted; seldom needed."""
    return _said(tx, AuditAction.AUDIT_EPOCH_STARTED, "100 years")


def rotations(tx: Connection, within: str = "31 days") -> list[Said]:
    """Return what events, of the last month if nothing else is said, say about rotated keys."""
    return _said(tx, AuditAction.SIGNER_ROTATED, within)


def _said(tx: Connection, action: AuditAction, within: str) -> list[Said]:
    rows = tx.execute(
        text(
            "SELECT xid::text::bigint, seq, body FROM audit.event WHERE target_id = :instance "
            "AND at > clock_timestamp() - CAST(:within AS interval) AND action = :action "
            "ORDER BY xid, seq"
        ),
        {"instance": INSTANCE_ID, "action": action, "within": within},
    )
    return [
        Said(Position(xid, seq), detail)
        for xid, seq, body in rows
        if isinstance(detail := said(body).get("detail"), dict)
    ]


def renew(tx: Connection, holder: str, lease: timedelta) -> None:
    """Lengthen the right to seal of who has it, so that a quiet log stays with one sealer."""
    tx.execute(
        text(
            "UPDATE audit.log SET held_until = clock_timestamp() + :lease "
            "WHERE holder = :holder AND held_until > clock_timestamp()"
        ),
        {"holder": holder, "lease": lease},
    )


@dataclass(frozen=True, slots=True)
class Holder:
    """Who seals, for people."""

    log_id: UUID
    holder: str
    alive: bool
    sealed_at: datetime


def holder(tx: Connection) -> Holder:
    """Return who sealed last and whether it still may."""
    row = tx.execute(
        text(
            "SELECT log_id, holder, held_until > clock_timestamp() AS alive, sealed_at "
            "FROM audit.log"
        )
    ).one()
    return Holder(*row)
