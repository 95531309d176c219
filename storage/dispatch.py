"""The scheduler's second step in SQL: which queued runs go to the queue now."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, Principal
from schemas.jobs import Job
from schemas.limits import (
    DISPATCH_AHEAD,
    DISPATCH_BATCH,
    DISPATCH_PER_ACCOUNT,
    DISPATCH_SPARE,
    DISPATCH_WINDOW,
    WORKER_SILENT_AFTER,
)
from storage import audit
from storage.endings import lock_accounts, run_event
from storage.rowset import rowset


@dataclass(frozen=True, slots=True)
class AccountQueue:
    account_id: UUID
    weight: float
    vtime: float
    woken: int  # how often anything asked for a look at this account
    free: int  # runs the plan still allows


@dataclass(frozen=True, slots=True)
class Candidate:
    run_id: UUID
    account_id: UUID
    resources: tuple[UUID, ...]
    priority: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits and what is busy. Only more may become free until the transaction ends."""

    accounts: Sequence[AccountQueue]
    candidates: Sequence[Candidate]
    resource_free: dict[UUID, int]


def lock(tx: Connection) -> bool:
    """Become the only dispatcher until the transaction ends.

    False if somebody else is, or if no account needs a look. Counting what is busy needs a
    snapshot taken after the lock: hence a statement of its own (locking and counting in one
    statement lets an account exceed its cap).
    """
    return bool(
        tx.execute(
            text(
                "SELECT CASE WHEN EXISTS (SELECT FROM account_queues WHERE has_work "
                "AND NOT at_cap AND NOT paused) "
                "THEN pg_try_advisory_xact_lock(hashtext('syncward.dispatch')) END, "
                "set_config('enable_sort', 'off', true)"  # see _candidates
            )
        ).scalar_one()
    )


def room(tx: Connection, runs_max: int) -> int:
    """Return how many jobs may be sent now: a little more than there are free slots.

    0 or less: nothing, as while the instance is paused.
    """
    row = tx.execute(
        text(
            "SELECT (SELECT coalesce(sum(slots), 0) FROM workers "
            "WHERE NOT draining AND seen_at > clock_timestamp() - :silent) AS slots, "
            "(SELECT count(*) FROM active_runs WHERE state IN ('dispatched', 'running')) AS busy, "
            "(SELECT state = 'active' FROM instance) AS active"
        ),
        {"silent": WORKER_SILENT_AFTER},
    ).one()
    if not row.active:
        return 0
    slots = int(row.slots)
    window = max(ceil(DISPATCH_WINDOW * slots), slots + DISPATCH_AHEAD) if slots else 0
    return min(min(window, runs_max) - int(row.busy), DISPATCH_BATCH)


def waiting(tx: Connection, wanted: int) -> Waiting:
    """Read the accounts with work, in order of their virtual time, and what waits in each.

    At most `wanted` runs will be picked, so that many accounts suffice, with some to spare for
    those whose resources are busy; likewise the runs read of each. Nothing is locked: a run that
    ends meanwhile must not wait for the dispatcher (`_charge` notices that it ended).
    """
    accounts = _accounts(tx, wanted + DISPATCH_SPARE)
    ids = [account.account_id for account in accounts]
    if not ids:
        return Waiting((), (), {})
    per_account = min(ceil(1.5 * wanted / len(ids)) + 2, DISPATCH_PER_ACCOUNT)
    busy = _busy_resources(tx)
    full = [resource for resource, free in busy.items() if free <= 0]
    candidates = _candidates(tx, ids, full, per_account)
    touched = {resource for candidate in candidates for resource in candidate.resources}
    return Waiting(
        accounts=accounts,
        candidates=candidates,
        resource_free={**_resource_caps(tx, touched - set(busy)), **busy},
    )


def _accounts(tx: Connection, limit: int) -> Sequence[AccountQueue]:
    rows = tx.execute(
        text(
            "SELECT q.account_id, q.weight, q.vtime, q.woken, q.runs_max - (SELECT count(*) "
            "FROM active_runs b WHERE b.account_id = q.account_id "
            "AND b.state IN ('dispatched', 'running')) AS free "
            "FROM account_queues q WHERE q.has_work AND NOT q.at_cap AND NOT q.paused "
            "ORDER BY q.vtime LIMIT :limit"
        ),
        {"limit": limit},
    )
    return [AccountQueue(*row) for row in rows]


def _candidates(
    tx: Connection, ids: Sequence[UUID], full: Sequence[UUID], per_account: int
) -> Sequence[Candidate]:
    """Read each account's first ready runs, leaving out those that would meet a full resource.

    The index is in the order of turns, so that a long backlog costs no more than a short one; the
    planner believes that sorting a few rows is cheaper, hence `enable_sort` above.
    """
    rows = tx.execute(
        text(
            "SELECT r.* FROM unnest(CAST(:ids AS uuid[])) AS a (id) CROSS JOIN LATERAL ("
            "SELECT w.run_id, w.account_id, w.source_id, w.destination_id, w.priority "
            "FROM active_runs w LEFT JOIN schedules s ON s.connection_id = w.subject_id "
            "WHERE w.account_id = a.id AND w.state = 'queued' AND w.not_before <= now() "
            "AND coalesce(s.state, 'active') = 'active' "
            "AND NOT coalesce(w.source_id = ANY(:full), false) "
            "AND NOT coalesce(w.destination_id = ANY(:full), false) "
            "ORDER BY w.priority, w.not_before, w.run_id LIMIT :per) AS r"
        ),
        {"ids": ids, "full": full, "per": per_account},
    )
    return [
        Candidate(run, account, tuple({r for r in (source, destination) if r}), priority)
        for run, account, source, destination, priority in rows
    ]


def _busy_resources(tx: Connection) -> dict[UUID, int]:
    """Return what each resource that is in use still allows; as many rows as runs are busy."""
    rows = tx.execute(
        text(
            "SELECT q.resource_id, q.runs_max - count(*) FROM active_runs b CROSS JOIN LATERAL ("
            "SELECT DISTINCT unnest(ARRAY[b.source_id, b.destination_id])) AS r (id) "
            "JOIN resource_queues q ON q.resource_id = r.id "
            "WHERE b.state IN ('dispatched', 'running') GROUP BY q.resource_id"
        )
    )
    return {row.resource_id: row[1] for row in rows}


def _resource_caps(tx: Connection, ids: Collection[UUID]) -> dict[UUID, int]:
    rows = tx.execute(
        text("SELECT resource_id, runs_max FROM resource_queues WHERE resource_id = ANY(:ids)"),
        {"ids": list(ids)},
    )
    return {row.resource_id: row[1] for row in rows}


def mark(
    tx: Connection,
    picked: Sequence[Candidate],
    seen: Waiting,
    deadline: timedelta,
    principal: Principal,
) -> list[Job]:
    """Move the picked runs to dispatched under a new number; charge their accounts."""
    rows = tx.execute(
        text(
            "UPDATE active_runs SET state = 'dispatched', dispatch = dispatch + 1, "
            "dispatch_deadline = clock_timestamp() + :deadline "
            "WHERE run_id IN (SELECT run_id FROM active_runs WHERE run_id = ANY(:ids) "
            "AND state = 'queued' FOR UPDATE SKIP LOCKED) "
            "RETURNING run_id, account_id, subject_id, attempt, dispatch"
        ),
        {"ids": [c.run_id for c in picked], "deadline": deadline},
    ).all()
    audit.append(
        tx,
        *(
            run_event(AuditAction.RUN_DISPATCHED, row, principal, dispatch=row.dispatch)
            for row in rows
        ),
    )
    _charge(tx, seen, Counter(row.account_id for row in rows))  # last: runs that end wait for it
    return [Job(run_id=row.run_id, dispatch=row.dispatch) for row in rows]


def _charge(tx: Connection, seen: Waiting, served: Counter[UUID]) -> None:
    """Advance virtual time by runs over weight, and note who need not be looked at for now.

    An account is at its cap when the plan allows no more, or when all that is ready would meet a
    full resource; the end of any of its runs clears that, and `busy_seen` shows the reaper whether
    one ended just now. It has no work when a look at it finds nothing ready; what becomes ready
    later is noticed by the reaper. New work clears both and counts `woken` up: then what we saw is
    out of date, and we look again.
    """
    offered = {candidate.account_id for candidate in seen.candidates}
    ids = [account.account_id for account in seen.accounts]
    lock_accounts(tx, ids)
    tx.execute(
        text(
            "UPDATE account_queues q SET vtime = q.vtime + u.n / q.weight, "
            "at_cap = q.woken = u.woken AND (u.n >= u.free OR NOT u.offered), "
            "looked_at = clock_timestamp(), busy_seen = q.runs_max - u.free + u.n, "
            "has_work = q.woken <> u.woken OR u.offered OR EXISTS (SELECT FROM active_runs r "
            "LEFT JOIN schedules s ON s.connection_id = r.subject_id "
            "WHERE r.account_id = q.account_id AND r.state = 'queued' AND r.not_before <= now() "
            "AND coalesce(s.state, 'active') = 'active') "
            "FROM json_to_recordset(CAST(:seen AS json)) AS u (id uuid, n int, free int, "
            "offered bool, woken bigint) WHERE q.account_id = u.id"
        ),
        {
            "seen": rowset(
                [
                    {
                        "id": account.account_id,
                        "n": served[account.account_id],
                        "free": account.free,
                        "offered": account.account_id in offered,
                        "woken": account.woken,
                    }
                    for account in seen.accounts
                ]
            )
        },
    )
