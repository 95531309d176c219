"""The worker process: `syncward worker`. Builds everything once, runs Dramatiq's worker, drains."""

import logging
import os
import socket
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from secrets import token_hex
from threading import Event, Timer
from time import monotonic, sleep

import dramatiq
from redis import Redis

from crypto import keyring as keyrings
from crypto.cache import KeyCache
from crypto.keyring import Keyring
from crypto.selftest import selftest
from schemas.audit import Principal
from schemas.errors import Draining, StartRefused, SyncwardError, TransientError
from schemas.jobs import QUEUE, Job
from schemas.profiles import all_reasons
from schemas.settings import Settings
from schemas.start import Reasons, until_asked
from storage import admission, exposition
from storage.claims import WorkerState, sign_off
from storage.engine import open_engine, open_link, transaction
from storage.keystore import Keystore
from storage.metrics import BUILD
from workers import actors, key_upkeep, run_sync, sentinels
from workers.attempt import Dependencies
from workers.call_list import CallWriter, write_calls
from workers.enqueue import JobQueue, open_broker, open_client
from workers.heartbeat import Heartbeat
from workers.key_upkeep import KeyUpkeep
from workers.metrics import RUNNING
from workers.quotas import SharedQuotas
from workers.records import RecordSealer, write_sealed
from workers.refusals import JobRefusals
from workers.run_log import LogWriter

logger = logging.getLogger(__name__)

#: Milliseconds between two looks at an idle queue where no bell rang, for less than 1 % of a core.
POLL_MS = 400
#: Seconds after the grace for goodbyes; then the process ends, whatever hangs.
LEAVING_S = 5.0
#: Exit code of a worker that left runs to their leases.
EXIT_LEFT = 1

#: Ended because a run's thread could not be; whoever supervises starts another worker.
EXIT_HANGING = 70


@dataclass(slots=True)
class _Process:
    worker: dramatiq.Worker
    deps: Dependencies
    keys: KeyUpkeep
    client: Redis
    draining: Event


def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT, then drain: hand runs back without counting an attempt.

    Exit code 1 if a run could not be handed back in time, or the control database did not hear of
    the end: such runs go on when their leases have expired.
    """
    process = _build(settings)
    admission.ask(
        process.deps.engine,
        settings,
        "worker",
        keystore=process.deps.keystore.own,
        also=lambda: _check_roots(process),
    )
    if settings.metrics_port:
        exposition.serve(settings)
    stop = until_asked()
    process.keys.start()
    process.deps.heartbeat.start()
    process.deps.logs.start()
    process.deps.calls.start()
    process.worker.start()
    logger.info("worker_started", extra={"worker": process.deps.worker_id})
    heartbeat = process.deps.heartbeat
    while not stop.wait(1.0) and not _must_leave(process):
        RUNNING.set(heartbeat.running)
        process.deps.refusals.tell()
    in_order = _drain(process, settings)
    if heartbeat.given_up:
        logger.error("worker_left_hanging_runs", extra={"runs": heartbeat.given_up})
        os._exit(EXIT_HANGING)  # a thread that hangs would keep the interpreter from ending
    if not in_order:
        sys.exit(EXIT_LEFT)


def _check_roots(process: _Process) -> None:
    """Compare the keyring with the keystore, and wrap by what that calls active from the start."""
    try:
        key_upkeep.check_roots(process.deps.keyring, process.deps.keystore)
        process.keys.begin()
    except TransientError as error:
        logger.warning("roots_not_checked", extra={"reason": error.public})


def _must_leave(process: _Process) -> bool:
    """Take no job any more once a thread hangs for good; leave when nothing else runs here."""
    if process.deps.heartbeat.given_up and not process.draining.is_set():
        process.draining.set()
        for consumer in process.worker.consumers.values():
            consumer.stop()
    return bool(process.deps.heartbeat.given_up) and not process.deps.heartbeat.running


def _build(settings: Settings) -> _Process:
    database_url, redis_url, keyring = _required(settings)
    engine = open_engine(database_url, "worker", pool_size=settings.worker_threads + 1)
    own = settings.keystore_url and open_engine(
        settings.keystore_url.get_secret_value(),
        "worker",
        pool_size=settings.worker_threads + 1,
        database="keystore",
    )
    worker_id = f"{socket.gethostname()}-{token_hex(3)}"
    draining = Event()

    def state() -> WorkerState:
        return WorkerState(
            worker_id,
            version("syncward"),
            settings.worker_threads,
            draining.is_set(),
            roots=keys.held,
        )

    principal = Principal("worker", worker_id)
    keystore = Keystore(engine, own or None)
    keys = KeyUpkeep(keyring, keystore, settings, principal)
    records = RecordSealer(engine, keyring, keystore, principal)
    client = open_client(redis_url)
    deps = Dependencies(
        engine=engine,
        keyring=KeyCache(keyring),
        keystore=keystore,
        heartbeat=Heartbeat(
            lambda: open_link(database_url, "worker"), state, settings.heartbeat.total_seconds()
        ),
        logs=LogWriter(lambda lines: write_sealed(engine, records, lines)),
        records=records,
        calls=CallWriter(partial(write_calls, engine)),
        quotas=SharedQuotas(client),
        settings=settings,
        policy=replace(settings.link_policy(), moving=sentinels.servers(client)),
        refusals=JobRefusals(engine, principal),
        worker_id=worker_id,
        principal=principal,
    )
    BUILD.labels(version("syncward")).set(1)
    return _Process(_dramatiq(deps, client, settings, draining), deps, keys, client, draining)


def _required(settings: Settings) -> tuple[str, str, Keyring]:
    """Return (database, redis, keyring), or StartRefused with everything that is wrong.

    Nothing is bound, connected or written before this.
    """
    reasons = Reasons(all_reasons(settings, "worker"))
    keyring: Keyring | None = None
    with reasons.collecting():
        exposition.read_token(settings)
    with reasons.collecting():
        if settings.keyring is not None:
            keyring = keyrings.load(settings.keyring)
            selftest(keyring)
    with reasons.collecting():
        _opens_credentials(keyring)
    reasons.refuse_if_any()
    assert settings.database_url is not None  # noqa: S101 - else there was a reason
    assert settings.redis_url is not None  # noqa: S101 - as above
    assert keyring is not None  # noqa: S101 - as above
    return (
        settings.database_url.get_secret_value(), settings.redis_url.get_secret_value(), keyring
    )  # fmt: skip


def _opens_credentials(keyring: Keyring | None) -> None:
    if keyring is not None and not keyring.can_unwrap("credentials"):
        raise StartRefused(
            ["SYNCWARD_KEYRING: it opens no stored credential; give a worker the file worker.json"]
        )


def _dramatiq(
    deps: Dependencies, client: Redis, settings: Settings, draining: Event
) -> dramatiq.Worker:
    broker, put_back = open_broker(client, deps.refusals.note), JobQueue(client)

    def execute(job: Job) -> None:
        if draining.is_set():  # taken in the moment of the signal: let another worker have it
            put_back.send(job)
            return
        try:
            run_sync.execute(job, deps)
        except run_sync.UnknownRun:
            deps.refusals.note("unknown_run")
            raise

    actors.register(broker, execute)
    worker = dramatiq.Worker(
        broker, queues={QUEUE}, worker_timeout=POLL_MS, worker_threads=settings.worker_threads
    )
    worker.queue_prefetch = settings.worker_threads  # do not hoard what others could run
    worker.delay_prefetch = 1  # nothing is ever delayed in Redis
    return worker


def _drain(process: _Process, settings: Settings) -> bool:
    """Stop taking jobs, tell running runs to hand themselves back, leave within the grace.

    Say whether everything was handed back and said goodbye to. Whatever hangs (a database that
    does not answer, a thread inside a server call) is left behind after that: leases end it.
    """
    process.draining.set()
    grace = settings.drain_grace.total_seconds()
    last = Timer(grace + LEAVING_S, _leave_at_once)
    last.daemon = True
    last.start()
    process.keys.ask_to_stop()
    for consumer in process.worker.consumers.values():
        consumer.stop()  # one that is only paused goes on fetching while jobs come
    for thread in process.worker.workers:
        thread.stop()  # jobs that it has not begun go back to Redis, below
    process.deps.heartbeat.signal_all(Draining("The worker is stopping."))
    deadline = monotonic() + grace
    while process.deps.heartbeat.running and monotonic() < deadline:
        sleep(0.05)
    orderly = not process.deps.heartbeat.running
    if not orderly:
        logger.warning("runs_left", extra={"runs": process.deps.heartbeat.running})
    process.worker.stop(timeout=2_000)
    process.deps.refusals.tell(every_s=0)
    try:
        with transaction(process.deps.engine) as tx:
            sign_off(tx, process.deps.worker_id)
        process.deps.logs.stop()
        process.deps.calls.stop()
    except SyncwardError as error:  # forgotten by the reaper instead
        logger.warning("not_signed_off", extra={"reason": error.public})
        orderly = False
    process.deps.heartbeat.stop()
    last.cancel()
    logger.info("worker_stopped", extra={"worker": process.deps.worker_id})
    return orderly


def _leave_at_once() -> None:
    logger.warning("drain_timed_out")
    os._exit(EXIT_LEFT)
