"""Why a run is not running yet: the first rule that holds it back, and when it may start."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from math import ceil
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.errors import Deferral, NotFound
from schemas.limits import WORKER_SILENT_AFTER
from schemas.runs import LIVE_STATES, Explanation, Rule, RunState
from storage import instance, runs
from storage.instance import InstanceState, Schedulers


def explain(tx: Connection, run_id: UUID, *, runs_max: int) -> Explanation:
    """Name the rule that holds a run back. `runs_max` is the instance's cap (a setting)."""
    live = tx.execute(text(f"{LIVE} WHERE a.run_id = :id"), {"id": run_id}).one_or_none()
    if live is None:
        return _not_live(tx, run_id)
    now = situation(tx)
    rule, sentence = held_back_by(live, now, runs_max)
    if rule is Rule.NOT_BEFORE:
        return Explanation(run_id, live.state, rule, sentence, expected_start=live.not_before)
    if rule in {Rule.GLOBAL_CAP, Rule.ACCOUNT_CAP, Rule.RESOURCE_CAP, Rule.TURN}:
        return _queued(tx, live, now, rule, sentence)
    return Explanation(run_id, live.state, rule, sentence)


#: A live run with what `held_back_by` looks at.
LIVE = (
    "SELECT a.*, clock_timestamp() AS at, q.paused AS account_paused, q.weight, "
    "(SELECT n.name FROM accounts n WHERE n.id = a.account_id) AS account_name, "
    "(SELECT n.name FROM connections n WHERE n.id = a.subject_id) AS connection_name, "
    "q.runs_max AS account_max, s.state AS schedule_state, s.state_reason, "
    "(SELECT string_agg(r.name, ', ' ORDER BY r.name) FROM dead_logins d "
    "JOIN resources r ON r.id = d.resource_id "
    "WHERE d.resource_id IN (a.source_id, a.destination_id)) AS dead_logins, "
    "l.waits_for, l.waits_until FROM active_runs a "
    "LEFT JOIN leases l ON l.run_id = a.run_id AND l.token = a.lease_token "
    "JOIN account_queues q ON q.account_id = a.account_id "
    "LEFT JOIN schedules s ON s.connection_id = a.subject_id"
)


@dataclass(frozen=True, slots=True)
class Situation:
    """What holds for all runs at one moment: as much to read for one of them as for a screenful."""

    instance: InstanceState
    schedulers: Schedulers
    slots: int
    busy_accounts: dict[UUID, int]  # runs that a worker holds or is about to
    full_resources: dict[UUID, tuple[int, int]]  # (busy, allowed)


def situation(tx: Connection) -> Situation:
    """Read what decides about runs; costs as much as there are busy runs."""
    busy = tx.execute(
        text(
            "SELECT account_id, count(*) AS n FROM active_runs "
            "WHERE state IN ('dispatched', 'running') GROUP BY account_id"
        )
    )
    full = tx.execute(
        text(
            "SELECT q.resource_id, count(*) AS busy, q.runs_max FROM active_runs b "
            "CROSS JOIN LATERAL (SELECT DISTINCT unnest(ARRAY[b.source_id, b.destination_id])) "
            "AS r (id) JOIN resource_queues q ON q.resource_id = r.id "
            "WHERE b.state IN ('dispatched', 'running') GROUP BY q.resource_id, q.runs_max "
            "HAVING count(*) >= q.runs_max"
        )
    )
    return Situation(
        instance=instance.read(tx),
        schedulers=instance.schedulers(tx),
        slots=_slots(tx),
        busy_accounts={row.account_id: int(row.n) for row in busy},
        full_resources={row.resource_id: (int(row.busy), row.runs_max) for row in full},
    )


def held_back_by(live: Row[Any], now: Situation, runs_max: int) -> tuple[Rule, str]:
    """Return the first rule that holds for a row of LIVE, and a sentence unless it is its turn."""
    return _blocked(live, now) or _capped(live, now, runs_max) or (Rule.TURN, "")


def _not_live(tx: Connection, run_id: UUID) -> Explanation:
    current = tx.execute(
        text("SELECT run_id, state FROM active_runs WHERE again_run_id = :id"), {"id": run_id}
    ).one_or_none()
    if current is not None:
        text_ = f"starts when run {current.run_id} ({current.state}) of the same connection ends"
        return Explanation(run_id, RunState.QUEUED, Rule.AFTER_CURRENT, text_)
    ended = runs.get(tx, run_id)
    if ended.state in LIVE_STATES:  # it started between our two looks
        raise NotFound(f"run {run_id} has just changed; ask again")
    return Explanation(run_id, ended.state, Rule.ENDED, f"it has ended: {ended.state}")


def _blocked(live: Row[Any], now: Situation) -> tuple[Rule, str] | None:
    """Return the first rule that no free slot would help against."""
    if live.state == RunState.RUNNING:
        waits = ""
        if live.waits_for is not None and live.waits_until > live.at:
            until = f"{live.waits_until:%Y-%m-%d %H:%M:%S} UTC"
            waits = f"; it waits in place until {until}: {live.waits_for}"
        return Rule.RUNNING, f"worker {live.worker_id} executes attempt {live.attempt}{waits}"
    if live.state == RunState.AWAITING_APPROVAL:
        return Rule.AWAITING_APPROVAL, f"a guard stopped it: {live.error}"
    return _paused(live, now.instance) or _undelivered(live, now)


def _paused(live: Row[Any], state: InstanceState) -> tuple[Rule, str] | None:
    if state.paused:
        return Rule.INSTANCE_PAUSED, f"drained ({state.reason}); go on with: syncward drain --end"
    if live.account_paused:
        return (
            Rule.ACCOUNT_PAUSED,
            f"the account is paused; syncward account resume {live.account_name}",
        )
    if live.state_reason == "needs_reauth" and live.dead_logins is not None:
        text_ = (
            f"the connection waits for the login of {live.dead_logins}; syncward resource "
            f"authorize {live.dead_logins}"
        )
        return Rule.CONNECTION_PAUSED, text_
    if live.schedule_state == "paused":
        text_ = (
            f"the connection is paused ({live.state_reason}); syncward connection resume "
            f"{live.connection_name}"
        )
        return Rule.CONNECTION_PAUSED, text_
    return None


def _undelivered(live: Row[Any], now: Situation) -> tuple[Rule, str] | None:
    """Return what is missing between the run and a worker: a scheduler, time, Redis, the worker."""
    if not now.schedulers.alive:
        return Rule.NO_SCHEDULER, "no scheduler is running; start one: syncward scheduler"
    if live.state == RunState.QUEUED and live.not_before > live.at:
        why = f" after {live.error_code}" if live.error_code else ""
        told = f": {live.error}" if live.error_code == Deferral.code and live.error else ""
        until = f"{live.not_before:%Y-%m-%d %H:%M:%S} UTC"
        return Rule.NOT_BEFORE, f"waits{why} until {until}{told}"
    if now.schedulers.queue_down_since is not None:
        return Rule.REDIS_DOWN, _redis_sentence(now.schedulers, live.at)
    if not now.slots:
        return Rule.NO_WORKER, "no worker is running; start one: syncward worker"
    if live.state == RunState.DISPATCHED:
        return Rule.JOB_SENT, f"its job {live.dispatch} is in Redis; a worker takes it next"
    return None


def _redis_sentence(living: Schedulers, now: datetime) -> str:
    since = living.queue_down_since or now
    return (
        f"Redis does not answer since {(now - since).total_seconds():.0f} s; nothing is lost, "
        "it starts when Redis is back"
    )


def _capped(live: Row[Any], now: Situation, runs_max: int) -> tuple[Rule, str] | None:
    """Return the cap that is full, the widest first."""
    if now.instance.busy >= runs_max:
        return Rule.GLOBAL_CAP, f"{now.instance.busy} of {runs_max} runs of the instance are busy"
    busy = now.busy_accounts.get(live.account_id, 0)
    if busy >= live.account_max:
        return Rule.ACCOUNT_CAP, f"{busy} of {live.account_max} runs of its plan are busy"
    for resource in (live.source_id, live.destination_id):
        if resource in now.full_resources:
            busy, allowed = now.full_resources[resource]
            return Rule.RESOURCE_CAP, f"{busy} of {allowed} runs of a resource are busy"
    return None


def _queued(
    tx: Connection, live: Row[Any], now: Situation, rule: Rule, sentence: str
) -> Explanation:
    """Estimate the start: runs that go first, over the slots, times how long runs take lately."""
    ahead = int(tx.execute(_AHEAD, {"run": live.run_id}).scalar_one() or 0)
    slots = max(now.slots, 1)
    mean: timedelta | None = tx.execute(_MEAN).scalar()
    expected = None if mean is None else live.at + mean * ceil((ahead + 1) / slots)
    first = f"{ahead} {'run goes' if ahead == 1 else 'runs go'} first" if ahead else "it is next"
    text_ = sentence or f"{first}; workers have {slots} slots"
    return Explanation(live.run_id, RunState(live.state), rule, text_, ahead, expected)


#: Turns go round by weight: of each other account, as many runs as fit beside ours and those
#: before it in its own account.
_AHEAD = text(
    "WITH me AS (SELECT a.*, q.weight FROM active_runs a JOIN account_queues q "
    "ON q.account_id = a.account_id WHERE a.run_id = :run), "
    "own AS (SELECT count(*) AS n FROM active_runs r, me WHERE r.account_id = me.account_id "
    "AND r.state = 'queued' AND r.not_before <= clock_timestamp() "
    "AND (r.priority, r.not_before, r.run_id) < (me.priority, me.not_before, me.run_id)), "
    "others AS (SELECT r.account_id, count(*) AS n FROM active_runs r, me "
    "WHERE r.account_id <> me.account_id AND r.state = 'queued' "
    "AND r.not_before <= clock_timestamp() GROUP BY r.account_id) "
    "SELECT own.n + coalesce((SELECT sum(least(o.n, ceil((own.n + 1) * q.weight / me.weight))) "
    "FROM others o JOIN account_queues q ON q.account_id = o.account_id "
    "WHERE NOT q.paused), 0) FROM own, me"
)
_MEAN = text(
    "SELECT avg(finished_at - started_at) FROM (SELECT finished_at, started_at FROM runs "
    "WHERE started_at IS NOT NULL AND finished_at > clock_timestamp() - interval '1 day' "
    "ORDER BY finished_at DESC LIMIT 200) AS recent"
)


def _slots(tx: Connection) -> int:
    found = tx.execute(
        text(
            "SELECT coalesce(sum(slots), 0) FROM workers WHERE NOT draining "
            "AND seen_at > clock_timestamp() - :silent"
        ),
        {"silent": WORKER_SILENT_AFTER},
    ).scalar_one()
    return int(found)
