"""The worker process: `syncward worker`. Builds everything once, runs Dramatiq's worker, drains."""

import logging
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from secrets import token_hex
from threading import Event
from time import monotonic, sleep

import dramatiq
from prometheus_client import start_http_server
from redis import Redis

from crypto import keyring as keyrings
from crypto.selftest import selftest
from schemas.audit import Principal
from schemas.errors import Draining, StartRefused
from schemas.jobs import QUEUE
from schemas.settings import Settings
from storage import logs
from storage.claims import WorkerState, sign_off
from storage.engine import open_engine, open_link, transaction
from storage.metrics import BUILD
from workers import actors, run_sync
from workers.enqueue import open_broker, open_client
from workers.heartbeat import Heartbeat
from workers.metrics import RUNNING
from workers.run_log import LogWriter

logger = logging.getLogger(__name__)

#: Milliseconds between two looks at an idle queue: a job waits so long at most, for ~1 % of a core.
POLL_MS = 200


@dataclass(slots=True)
class _Process:
    worker: dramatiq.Worker
    deps: run_sync.Dependencies
    client: Redis
    draining: Event


def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT, then drain: hand runs back without counting an attempt."""
    process = _build(settings)
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    process.deps.heartbeat.start()
    process.deps.logs.start()
    process.worker.start()
    logger.info("worker_started", extra={"worker": process.deps.worker_id})
    while not stop.wait(1.0):
        RUNNING.set(process.deps.heartbeat.running)
    _drain(process, settings)


def _build(settings: Settings) -> _Process:
    database_url, redis_url, keyring_uri = required(settings)
    keyring = keyrings.load(keyring_uri)
    selftest(keyring)
    engine = open_engine(database_url, "worker", pool_size=settings.worker_threads + 1)
    worker_id = f"{socket.gethostname()}-{token_hex(3)}"
    draining = Event()

    def state() -> WorkerState:
        return WorkerState(
            worker_id, version("syncward"), settings.worker_threads, draining.is_set()
        )

    def write_logs(lines: Sequence[logs.LogLine]) -> None:
        with transaction(engine) as tx:
            logs.append(tx, lines)

    deps = run_sync.Dependencies(
        engine=engine,
        keyring=keyring,
        heartbeat=Heartbeat(
            lambda: open_link(database_url, "worker"), state, settings.heartbeat.total_seconds()
        ),
        logs=LogWriter(write_logs),
        settings=settings,
        worker_id=worker_id,
        principal=Principal("worker", worker_id),
    )
    BUILD.labels(version("syncward")).set(1)
    client = open_client(redis_url)
    return _Process(_dramatiq(deps, client, settings), deps, client, draining)


def required(settings: Settings) -> tuple[str, str, str]:
    """Return (database, redis, keyring) or StartRefused with everything that is missing."""
    missing = [
        f"SYNCWARD_{name.upper()} is not set; see docs/settings.md"
        for name in ("database_url", "redis_url", "keyring")
        if getattr(settings, name) is None
    ]
    if missing or not settings.database_url or not settings.redis_url or not settings.keyring:
        raise StartRefused(missing)
    return (
        settings.database_url.get_secret_value(),
        settings.redis_url.get_secret_value(),
        settings.keyring,
    )


def _dramatiq(deps: run_sync.Dependencies, client: Redis, settings: Settings) -> dramatiq.Worker:
    broker = open_broker(client)
    actors.register(broker, lambda job: run_sync.execute(job, deps))
    worker = dramatiq.Worker(
        broker, queues={QUEUE}, worker_timeout=POLL_MS, worker_threads=settings.worker_threads
    )
    worker.queue_prefetch = settings.worker_threads  # do not hoard what others could run
    worker.delay_prefetch = 1  # nothing is ever delayed in Redis
    if settings.metrics_port:
        _serve_metrics(settings)
    return worker


def _drain(process: _Process, settings: Settings) -> None:
    """Stop taking jobs, tell running runs to hand themselves back, leave within the grace."""
    process.draining.set()
    for consumer in process.worker.consumers.values():
        consumer.pause()  # Dramatiq goes on fetching until its threads have ended
    process.deps.heartbeat.signal_all(Draining("The worker is stopping."))
    deadline = monotonic() + settings.drain_grace.total_seconds()
    while process.deps.heartbeat.running and monotonic() < deadline:
        sleep(0.05)
    process.worker.stop(timeout=2_000)
    with transaction(process.deps.engine) as tx:
        sign_off(tx, process.deps.worker_id)
    process.deps.logs.stop()
    process.deps.heartbeat.stop()
    logger.info("worker_stopped", extra={"worker": process.deps.worker_id})


def _serve_metrics(settings: Settings) -> None:
    host, port = settings.metrics_host, settings.metrics_port
    try:
        start_http_server(port, addr=host)
    except OSError as error:
        raise StartRefused(
            [f"metrics on {host}:{port}: {error.strerror}; choose another SYNCWARD_METRICS_PORT"]
        ) from None
