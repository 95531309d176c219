"""What a scheduler does again and again; each tick is one transaction and may fail alone."""

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import takewhile
from time import CLOCK_BOOTTIME, clock_gettime, monotonic
from typing import Protocol

from sqlalchemy import Connection, Engine

from scheduler import metrics
from scheduler.cluster import ClusterGauges
from scheduler.dispatch import pick
from scheduler.due import decide
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.jobs import Job
from schemas.limits import DISPATCH_DEADLINE, RETENTION_SLICE_S
from schemas.settings import Settings
from storage import audit, dispatch, due, instance, partitions, reap, retention
from storage.engine import transaction

#: A gap between two looks that is shorter is a slow tick, not an outage.
BLIND_AT_LEAST_S = 5.0


class Queue(Protocol):
    """What a scheduler wants of a queue: workers.enqueue.JobQueue, or a test's."""

    def alive(self) -> bool: ...
    def send(self, job: Job) -> bool: ...
    def close(self) -> None: ...


class Sight:
    """When the reaper last saw the database.

    One that could not see it for a whole lease must assume that the workers could not either, and
    gives them a lease to renew before it takes anything from them.
    """

    def __init__(self) -> None:
        self._seen_at: float | None = None
        self._wait_until = float("-inf")

    def was_blind(self, lease: timedelta) -> bool:
        """Note that the database answers now; say whether workers deserve more time."""
        now = clock_gettime(CLOCK_BOOTTIME)  # counts the time a suspended machine slept
        gap = 0.0 if self._seen_at is None else now - self._seen_at
        if gap > max(lease.total_seconds(), BLIND_AT_LEAST_S):
            self._wait_until = now + lease.total_seconds()
        self._seen_at = now
        return now < self._wait_until


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Everything the ticks need, built once in main.py."""

    engine: Engine
    queue: Queue
    settings: Settings
    principal: Principal
    scheduler_id: str = "scheduler"
    version: str = "0"
    sight: Sight = field(default_factory=Sight)
    cluster: ClusterGauges = field(default_factory=ClusterGauges)


def due_tick(scheduler: Scheduler) -> int:
    """Turn one batch of due schedules into queued runs; return the size of the batch."""
    with transaction(scheduler.engine) as tx:
        now, batch = due.claim_due(tx)
        due.apply(tx, [decide(one, now) for one in batch], scheduler.principal)
    return len(batch)


def dispatch_tick(scheduler: Scheduler) -> int:
    """Send what fits to the queue; return how many jobs were sent.

    Nothing is marked while Redis does not answer, so that `queued` tells the truth. A crash or an
    error after the commit costs at most the dispatch deadline, then the reaper puts it back. After
    one job that Redis does not take, none of the others waits for its timeout.
    """
    if not scheduler.queue.alive():
        return 0
    with transaction(scheduler.engine) as tx:
        jobs = _mark(tx, scheduler) if dispatch.lock(tx) else []
    return sum(1 for _ in takewhile(lambda job: _send(scheduler.queue, job), jobs))


def _send(queue: Queue, job: Job) -> bool:
    sent = queue.send(job)
    metrics.DISPATCHES.labels("sent" if sent else "error").inc()
    return sent


def _mark(tx: Connection, scheduler: Scheduler) -> list[Job]:
    wanted = dispatch.room(tx, scheduler.settings.runs_max)
    if wanted <= 0:
        return []
    seen = dispatch.waiting(tx, wanted)
    if not seen.accounts:
        return []
    return dispatch.mark(tx, pick(seen, wanted), seen, DISPATCH_DEADLINE, scheduler.principal)


def reap_tick(scheduler: Scheduler) -> int:
    """Recover what workers, Redis or time have lost; return how many runs moved."""
    moved = dict.fromkeys(("lease", "undelivered", "overdue", "stuck"), 0)
    with transaction(scheduler.engine) as tx:
        settings = scheduler.settings
        cut_off = scheduler.sight.was_blind(settings.lease)
        if not cut_off and not reap.amnesty(tx, settings.lease):
            moved["lease"] = reap.expired_leases(tx, scheduler.principal, settings.lost_leases_max)
    metrics.LEASES_EXPIRED.inc(moved["lease"])
    with transaction(scheduler.engine) as tx:
        moved["stuck"] = reap.cancel_stuck(tx, scheduler.settings.stuck_after, scheduler.principal)
        moved["undelivered"] = reap.undelivered(tx, scheduler.principal)
        moved["overdue"] = reap.overdue(tx, scheduler.principal)
    with transaction(scheduler.engine) as tx:  # many accounts: after what locks runs
        reap.wake_ready(tx)
        reap.wake_capped(tx)
    for reason, count in moved.items():
        metrics.RECOVERED.labels(reason).inc(count)
    return sum(moved.values())


def upkeep_tick(scheduler: Scheduler) -> int:
    """Make partitions ahead, forget silent workers, wake accounts a crash left asleep."""
    with transaction(scheduler.engine) as tx:
        made = partitions.ensure(tx)
        if made:
            audit.append(tx, _made(made, scheduler.principal))
        reap.forget_workers(tx)
        reap.promote(tx)
    return len(made)


def presence_tick(scheduler: Scheduler) -> int:
    """Show that this scheduler lives; the elected one also reads the cluster's gauges."""
    with transaction(scheduler.engine) as tx:
        elected = instance.scheduler_seen(
            tx, scheduler.scheduler_id, scheduler.version, queue_alive=scheduler.queue.alive()
        )
    if not elected:
        scheduler.cluster.lose()
        return 0
    scheduler.cluster.elect(scheduler.engine)
    return 1


def leave(scheduler: Scheduler) -> int:
    """Say goodbye, so that another scheduler exports the gauges at once."""
    scheduler.cluster.lose()
    with transaction(scheduler.engine) as tx:
        instance.scheduler_left(tx, scheduler.scheduler_id)
    return 1


def retention_tick(scheduler: Scheduler) -> int:
    """Forget what plans no longer keep, a slice of time's worth; return how many runs went.

    0 when nothing is left: then old months go, too.
    """
    gone, until = 0, monotonic() + RETENTION_SLICE_S
    while monotonic() < until:
        with transaction(scheduler.engine) as tx:
            account = retention.behind(tx)
            if account is None:
                retention.drop_months(tx, scheduler.principal)
                return gone
            gone += retention.forget(tx, account, scheduler.principal).runs
    return gone


def _made(names: list[str], principal: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.PARTITIONS_CREATED,
        TargetKind.INSTANCE,
        audit.INSTANCE_ID,
        principal,
        detail={"partitions": ", ".join(names)},
    )
