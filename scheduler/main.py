"""The scheduler process, `syncward scheduler`: any number of them may run."""

import logging
import socket
from collections.abc import Callable
from importlib.metadata import version
from secrets import token_hex
from time import monotonic

from prometheus_client import REGISTRY

from scheduler import metrics, ticks
from scheduler.bell import Bell
from scheduler.cluster import ClusterGauges
from scheduler.ticks import Scheduler
from schemas.audit import Principal
from schemas.errors import SyncwardError
from schemas.limits import DUE_BATCH
from schemas.profiles import all_reasons
from schemas.settings import Settings
from schemas.start import Reasons, until_asked
from storage import admission, exposition
from storage.engine import open_engine, open_link
from storage.metrics import BUILD
from workers.enqueue import JobQueue, open_client

logger = logging.getLogger(__name__)

#: Seconds between two ticks of a kind. Due and dispatch decide how late a run starts.
DUE_EVERY_S = 0.25
DISPATCH_EVERY_S = 0.15
#: While jobs are being sent: slots become free sooner than the usual tick would notice. Nor does
#: dispatch look more often than this, however often somebody rings.
DISPATCH_BUSY_S = 0.01
REAP_EVERY_S = 1.0
PRESENCE_EVERY_S = 5.0
UPKEEP_EVERY_S = 30.0
RETENTION_EVERY_S = 3_600.0
#: While there is more to forget.
RETENTION_BUSY_S = 1.0
#: After a tick that failed, whatever its kind: the reason rarely goes away at once.
FAILED_PAUSE_S = 1.0


def run(settings: Settings) -> None:
    """Tick until SIGTERM or SIGINT. A tick that fails is logged and comes again; none is fatal."""
    scheduler = _build(settings)
    admission.ask(scheduler.engine, settings, "scheduler")
    if settings.metrics_port:
        REGISTRY.register(scheduler.cluster)
        exposition.serve(settings)
    stop = until_asked()
    loops: list[tuple[str, float, Callable[[Scheduler], int]]] = [
        ("upkeep", UPKEEP_EVERY_S, ticks.upkeep_tick),
        ("due", DUE_EVERY_S, ticks.due_tick),
        ("reap", REAP_EVERY_S, ticks.reap_tick),
        ("dispatch", DISPATCH_EVERY_S, ticks.dispatch_tick),
        ("presence", PRESENCE_EVERY_S, ticks.presence_tick),
        ("retention", RETENTION_EVERY_S, ticks.retention_tick),
    ]
    next_at = dict.fromkeys((name for name, _, _ in loops), 0.0)
    pauses = {name: every for name, every, _ in loops}
    bell = _bell(settings)
    logger.info("scheduler_started")
    while not stop.is_set():
        for name, every, tick in loops:
            if monotonic() >= next_at[name]:
                done = _tick(name, tick, scheduler)
                pauses[name] = _pause(name, every, done, pauses[name])
                next_at[name] = monotonic() + pauses[name]
                if name == "due" and done:
                    next_at["dispatch"] = 0.0  # what has just been queued need not wait
        if bell.wait(max(0.0, min(next_at.values()) - monotonic())):
            looked_at = next_at["dispatch"] - pauses["dispatch"]
            next_at["dispatch"] = min(next_at["dispatch"], looked_at + DISPATCH_BUSY_S)
    bell.close()
    _tick("leave", ticks.leave, scheduler)
    scheduler.queue.close()
    scheduler.engine.dispose()
    logger.info("scheduler_stopped")


def _pause(name: str, every: float, done: int | None, before: float) -> float:
    """Come back sooner while there is work: a due batch was full, or jobs found free slots.

    Slots that were full become free again soon: after jobs were sent, the pause (it was `before`)
    grows step by step to the usual one.
    """
    match name:
        case _ if done is None:
            return max(every, FAILED_PAUSE_S)
        case "due" if done >= DUE_BATCH:
            return 0.0
        case "dispatch":
            return DISPATCH_BUSY_S if done else min(2 * before, every)
        case "retention" if done:
            return RETENTION_BUSY_S
        case _:
            return every


def _bell(settings: Settings) -> Bell:
    """Listen in a thread of its own."""
    assert settings.database_url is not None  # noqa: S101 - as in _build
    url = settings.database_url.get_secret_value()
    bell = Bell(lambda: open_link(url, "scheduler"))
    bell.start()
    return bell


def _build(settings: Settings) -> Scheduler:
    reasons = Reasons(all_reasons(settings, "scheduler"))
    with reasons.collecting():
        exposition.read_token(settings)
    reasons.refuse_if_any()
    assert settings.database_url is not None  # noqa: S101 - else there was a reason
    assert settings.redis_url is not None  # noqa: S101 - as above
    BUILD.labels(version("syncward")).set(1)
    return Scheduler(
        engine=open_engine(settings.database_url.get_secret_value(), "scheduler", pool_size=2),
        queue=JobQueue(open_client(settings.redis_url.get_secret_value())),
        settings=settings,
        principal=Principal("scheduler", socket.gethostname()),
        scheduler_id=f"{socket.gethostname()}-{token_hex(3)}",
        version=version("syncward"),
        cluster=ClusterGauges(),
    )


def _tick(name: str, tick: Callable[[Scheduler], int], scheduler: Scheduler) -> int | None:
    """Do one tick; None if it failed."""
    started = monotonic()
    try:
        done = tick(scheduler)
    except SyncwardError as error:
        metrics.TICKS_FAILED.labels(name).inc()
        logger.warning("tick_failed", extra={"tick": name, "reason": error.public})
        return None
    metrics.TICK_DURATION.labels(name).observe(monotonic() - started)
    metrics.TICK_ITEMS.labels(name).inc(done)
    metrics.TICK_LAST.labels(name).set_to_current_time()
    return done
