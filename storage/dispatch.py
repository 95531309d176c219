"""The scheduler's second step in SQL: which queued runs go to the queue now."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from schemas.audit import AuditAction, Principal
from schemas.jobs import Job
from schemas.limits import DISPATCH_ACCOUNTS, DISPATCH_PER_ACCOUNT, WORKER_SILENT_AFTER
from storage import audit
from storage.endings import run_event


@dataclass(frozen=True, slots=True)
class AccountQueue:
    account_id: UUID
    weight: float
    vtime: float
    free: int  # runs the plan still allows


@dataclass(frozen=True, slots=True)
class Candidate:
    run_id: UUID
    account_id: UUID
    resources: tuple[UUID, ...]
    priority: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """A consistent view of what waits and what is busy; stays true until the transaction ends."""

    live_slots: int  # of workers that are heard and not draining
    in_flight: int  # dispatched or running, all accounts
    accounts: Sequence[AccountQueue]
    candidates: Sequence[Candidate]
    resource_free: dict[UUID, int]


def lock(tx: Connection) -> bool:
    """Become the only dispatcher until the transaction ends; False if somebody else is.

    Counting what is busy needs a snapshot taken after the lock: hence a statement of its own
    (locking and counting in one statement lets an account exceed its cap).
    """
    return bool(
        tx.execute(
            text("SELECT pg_try_advisory_xact_lock(hashtext('syncward.dispatch'))")
        ).scalar_one()
    )


def waiting(tx: Connection) -> Waiting:
    """Lock the accounts with work, in order of their virtual time, and read what waits in each."""
    accounts = tx.execute(
        text(
            "SELECT account_id FROM account_queues WHERE has_work AND NOT at_cap AND NOT paused "
            "ORDER BY vtime LIMIT :limit FOR NO KEY UPDATE SKIP LOCKED"
        ),
        {"limit": DISPATCH_ACCOUNTS},
    ).scalars()
    ids = list(accounts)
    if not ids:
        return Waiting(0, 0, (), (), {})
    candidates = _candidates(tx, ids)
    return Waiting(
        live_slots=_live_slots(tx),
        in_flight=_in_flight(tx),
        accounts=_accounts(tx, ids),
        candidates=candidates,
        resource_free=_resource_free(tx, {r for c in candidates for r in c.resources}),
    )


def _live_slots(tx: Connection) -> int:
    return int(
        tx.execute(
            text(
                "SELECT coalesce(sum(slots), 0) FROM workers "
                "WHERE NOT draining AND seen_at > clock_timestamp() - :silent"
            ),
            {"silent": WORKER_SILENT_AFTER},
        ).scalar_one()
    )


def _in_flight(tx: Connection) -> int:
    return int(
        tx.execute(
            text("SELECT count(*) FROM active_runs WHERE state IN ('dispatched', 'running')")
        ).scalar_one()
    )


def _accounts(tx: Connection, ids: Sequence[UUID]) -> Sequence[AccountQueue]:
    rows = tx.execute(
        text(
            "SELECT q.account_id, q.weight, q.vtime, q.runs_max - (SELECT count(*) "
            "FROM active_runs b WHERE b.account_id = q.account_id "
            "AND b.state IN ('dispatched', 'running')) AS free "
            "FROM account_queues q WHERE q.account_id = ANY(:ids) ORDER BY q.vtime"
        ),
        {"ids": ids},
    )
    return [AccountQueue(r.account_id, r.weight, r.vtime, r.free) for r in rows]


def _candidates(tx: Connection, ids: Sequence[UUID]) -> Sequence[Candidate]:
    rows = tx.execute(
        text(
            "SELECT r.* FROM unnest(CAST(:ids AS uuid[])) AS a (id) CROSS JOIN LATERAL ("
            "SELECT w.run_id, w.account_id, w.source_id, w.destination_id, w.priority "
            "FROM active_runs w LEFT JOIN schedules s ON s.connection_id = w.subject_id "
            "WHERE w.account_id = a.id AND w.state = 'queued' AND w.not_before <= now() "
            "AND coalesce(s.state, 'active') = 'active' "
            "ORDER BY w.priority, w.not_before, w.run_id LIMIT :per) AS r"
        ),
        {"ids": ids, "per": DISPATCH_PER_ACCOUNT},
    )
    return [
        Candidate(
            r.run_id,
            r.account_id,
            tuple({i for i in (r.source_id, r.destination_id) if i is not None}),
            r.priority,
        )
        for r in rows
    ]


def _resource_free(tx: Connection, ids: Collection[UUID]) -> dict[UUID, int]:
    rows = tx.execute(
        text(
            "SELECT q.resource_id, q.runs_max - (SELECT count(*) FROM active_runs b "
            "WHERE b.state IN ('dispatched', 'running') "
            "AND q.resource_id IN (b.source_id, b.destination_id)) AS free "
            "FROM resource_queues q WHERE q.resource_id = ANY(:ids)"
        ),
        {"ids": list(ids)},
    )
    return {r.resource_id: r.free for r in rows}


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
            "AND state = 'queued' FOR UPDATE SKIP LOCKED) RETURNING *"
        ),
        {"ids": [c.run_id for c in picked], "deadline": deadline},
    ).all()
    _charge(tx, seen, [row.account_id for row in rows])
    audit.append(
        tx,
        *(
            run_event(AuditAction.RUN_DISPATCHED, row, principal, dispatch=row.dispatch)
            for row in rows
        ),
    )
    return [Job(run_id=row.run_id, dispatch=row.dispatch) for row in rows]


def _charge(tx: Connection, seen: Waiting, served: Sequence[UUID]) -> None:
    """Advance virtual time by runs over weight; note who is at its cap and who has no run left."""
    counts = [served.count(a.account_id) for a in seen.accounts]
    tx.execute(
        text(
            "UPDATE account_queues q SET vtime = q.vtime + u.n / q.weight, at_cap = u.n >= u.free, "
            "has_work = EXISTS (SELECT FROM active_runs r WHERE r.account_id = q.account_id "
            "AND r.state = 'queued') FROM unnest(CAST(:ids AS uuid[]), CAST(:n AS int[]), "
            "CAST(:free AS int[])) AS u (id, n, free) WHERE q.account_id = u.id"
        ),
        {
            "ids": [a.account_id for a in seen.accounts],
            "n": counts,
            "free": [a.free for a in seen.accounts],
        },
    )
