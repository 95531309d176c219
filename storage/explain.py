"""Why a run is not running yet: the first rule that holds it back, and when it may start."""

from datetime import datetime, timedelta
from math import ceil
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from schemas.errors import NotFound
from schemas.limits import WORKER_SILENT_AFTER
from schemas.runs import LIVE_STATES, Explanation, Rule, RunState
from storage import instance, runs
from storage.instance import Schedulers


def explain(tx: Connection, run_id: UUID, *, runs_max: int) -> Explanation:
    """Name the rule that holds a run back. `runs_max` is the instance's cap (a setting)."""
    live = tx.execute(_LIVE, {"id": run_id}).one_or_none()
    if live is None:
        return _not_live(tx, run_id)
    rule, sentence = _blocked(tx, live) or _capped(tx, live, runs_max) or (Rule.TURN, "")
    if rule is Rule.NOT_BEFORE:
        return Explanation(run_id, live.state, rule, sentence, expected_start=live.not_before)
    if rule in {Rule.GLOBAL_CAP, Rule.ACCOUNT_CAP, Rule.RESOURCE_CAP, Rule.TURN}:
        return _queued(tx, live, rule, sentence)
    return Explanation(run_id, live.state, rule, sentence)


_LIVE = text(
    "SELECT a.*, clock_timestamp() AS at, q.paused AS account_paused, q.weight, "
    "q.runs_max AS account_max, s.state AS schedule_state, s.state_reason FROM active_runs a "
    "JOIN account_queues q ON q.account_id = a.account_id "
    "LEFT JOIN schedules s ON s.connection_id = a.subject_id WHERE a.run_id = :id"
)


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


def _blocked(tx: Connection, live: Row[Any]) -> tuple[Rule, str] | None:
    """Return the first rule that no free slot would help against."""
    if live.state == RunState.RUNNING:
        return Rule.RUNNING, f"worker {live.worker_id} executes attempt {live.attempt}"
    if live.state == RunState.AWAITING_APPROVAL:
        return Rule.AWAITING_APPROVAL, f"a guard stopped it: {live.error}"
    return _paused(tx, live) or _undelivered(tx, live, instance.schedulers(tx))


def _paused(tx: Connection, live: Row[Any]) -> tuple[Rule, str] | None:
    now = instance.read(tx)
    if now.paused:
        return Rule.INSTANCE_PAUSED, f"drained ({now.reason}); go on with: syncward drain --end"
    if live.account_paused:
        return Rule.ACCOUNT_PAUSED, "the account is paused; syncward account resume"
    if live.schedule_state == "paused":
        text_ = f"the connection is paused ({live.state_reason}); syncward connection resume"
        return Rule.CONNECTION_PAUSED, text_
    return None


def _undelivered(tx: Connection, live: Row[Any], living: Schedulers) -> tuple[Rule, str] | None:
    """Return what is missing between the run and a worker: a scheduler, time, Redis, the worker."""
    if not living.alive:
        return Rule.NO_SCHEDULER, "no scheduler is running; start one: syncward scheduler"
    if live.state == RunState.QUEUED and live.not_before > live.at:
        why = f" after {live.error_code}" if live.error_code else ""
        return Rule.NOT_BEFORE, f"waits{why} until {live.not_before:%Y-%m-%d %H:%M:%S} UTC"
    if living.queue_down_since is not None:
        return Rule.REDIS_DOWN, _redis_sentence(living, live.at)
    if not _slots(tx):
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


def _capped(tx: Connection, live: Row[Any], runs_max: int) -> tuple[Rule, str] | None:
    """Return the cap that is full, the widest first."""
    busy = tx.execute(
        text(
            "SELECT count(*) AS all_, count(*) FILTER (WHERE account_id = :account) AS account "
            "FROM active_runs WHERE state IN ('dispatched', 'running')"
        ),
        {"account": live.account_id},
    ).one()
    if busy.all_ >= runs_max:
        return Rule.GLOBAL_CAP, f"{busy.all_} of {runs_max} runs of the instance are busy"
    if busy.account >= live.account_max:
        return Rule.ACCOUNT_CAP, f"{busy.account} of {live.account_max} runs of its plan are busy"
    full = tx.execute(_FULL_RESOURCE, {"ids": [live.source_id, live.destination_id]}).first()
    if full is not None:
        return Rule.RESOURCE_CAP, f"{full.busy} of {full.runs_max} runs of a resource are busy"
    return None


_FULL_RESOURCE = text(
    "SELECT q.runs_max, count(b.run_id) AS busy FROM resource_queues q JOIN active_runs b "
    "ON q.resource_id IN (b.source_id, b.destination_id) "
    "AND b.state IN ('dispatched', 'running') "
    "WHERE q.resource_id = ANY(CAST(:ids AS uuid[])) "
    "GROUP BY q.resource_id, q.runs_max HAVING count(b.run_id) >= q.runs_max LIMIT 1"
)


def _queued(tx: Connection, live: Row[Any], rule: Rule, sentence: str) -> Explanation:
    """Estimate the start: runs that go first, over the slots, times how long runs take lately."""
    ahead = int(tx.execute(_AHEAD, {"run": live.run_id}).scalar_one() or 0)
    slots = max(_slots(tx), 1)
    mean: timedelta | None = tx.execute(_MEAN).scalar()
    expected = None if mean is None else live.at + mean * ceil((ahead + 1) / slots)
    text_ = sentence or f"waits for its turn: {ahead} runs go first, {slots} slots"
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
