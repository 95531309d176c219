"""Forget what the plans no longer keep: runs with their logs, outputs and results; old months."""

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.limits import RETENTION_BATCH, SLOTS_KEPT
from schemas.plans import PLANS
from storage import audit

#: A partition is dropped when all of its month is old enough.
_A_MONTH = timedelta(days=31)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What one transaction removed of one account."""

    runs: int = 0
    streams: int = 0
    outputs: int = 0
    log_lines: int = 0

    def __add__(self, other: "Forgotten") -> "Forgotten":
        return Forgotten(
            self.runs + other.runs,
            self.streams + other.streams,
            self.outputs + other.outputs,
            self.log_lines + other.log_lines,
        )


@dataclass(frozen=True, slots=True)
class Expired:
    """An account with runs older than its plan keeps."""

    account_id: UUID
    account: str
    days: int
    runs: int


_PLAN_DAYS = {
    "plans": list(PLANS),
    "days": [known.retention_days for known in PLANS.values()],
}


def expired(tx: Connection) -> list[Expired]:
    """Return the accounts that have something to forget, and how many runs."""
    rows = tx.execute(
        text(
            "SELECT a.id, a.name, p.days, count(*) FROM accounts a "
            "JOIN unnest(CAST(:plans AS text[]), CAST(:days AS int[])) AS p (plan, days) "
            "ON p.plan = a.plan JOIN runs r ON r.account_id = a.id "
            "AND r.finished_at < now() - make_interval(days => p.days) "
            "GROUP BY a.id, a.name, p.days ORDER BY a.name"
        ),
        _PLAN_DAYS,
    )
    return [Expired(*row) for row in rows]


def behind(tx: Connection) -> Expired | None:
    """Return an account with something to forget, without counting it; None if there is none."""
    row = tx.execute(
        text(
            "SELECT a.id, a.name, p.days FROM accounts a "
            "JOIN unnest(CAST(:plans AS text[]), CAST(:days AS int[])) AS p (plan, days) "
            "ON p.plan = a.plan WHERE EXISTS (SELECT FROM runs r WHERE r.account_id = a.id "
            "AND r.finished_at < now() - make_interval(days => p.days)) LIMIT 1"
        ),
        _PLAN_DAYS,
    ).one_or_none()
    return None if row is None else Expired(row.id, row.name, row.days, runs=0)


def forget(tx: Connection, one: Expired, principal: Principal) -> Forgotten:
    """Remove one batch of an account's expired runs; an empty answer means: nothing is left."""
    row = tx.execute(
        text("SELECT * FROM expire_runs(:account, now() - make_interval(days => :days), :batch)"),
        {"account": one.account_id, "days": one.days, "batch": RETENTION_BATCH},
    ).one()
    gone = Forgotten(*row)
    if gone.runs:
        audit.append(
            tx,
            AuditEvent(
                AuditAction.RETENTION_APPLIED,
                TargetKind.ACCOUNT,
                one.account_id,
                principal,
                account_id=one.account_id,
                detail={"days": one.days, "runs": gone.runs, "log_lines": gone.log_lines},
            ),
        )
    return gone


def drop_months(tx: Connection, principal: Principal) -> list[str]:
    """Drop the partitions of months that no plan keeps, and of old slots; return their names."""
    longest = timedelta(days=max(known.retention_days for known in PLANS.values()))
    dropped = list(
        tx.execute(
            text("SELECT drop_partitions(now() - :runs, now() - :slots)"),
            {"runs": longest + _A_MONTH, "slots": SLOTS_KEPT + _A_MONTH},
        ).scalars()
    )
    if dropped:
        audit.append(
            tx,
            AuditEvent(
                AuditAction.PARTITIONS_DROPPED,
                TargetKind.INSTANCE,
                audit.INSTANCE_ID,
                principal,
                detail={"partitions": ", ".join(dropped)},
            ),
        )
    return dropped
