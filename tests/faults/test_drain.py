"""How a worker leaves: in order, in time, with nothing in its pockets."""

import signal
import socket
import time
from contextlib import suppress
from threading import Event, Thread
from uuid import uuid4

import pytest

from schemas.errors import Draining
from schemas.jobs import QUEUE, Job
from schemas.limits import DISPATCH_DEADLINE
from schemas.runs import RunState
from tests.upgrade.versions import ROOT, Version
from workers import main
from workers.enqueue import JobQueue, open_client

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]

MERGE = "{mode: merge, key: [id], cursor: xmin}"
GRACE_S = 4
WAITING = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


class Workers:
    """Workers as real processes; the test is their only scheduler."""

    def __init__(self, world) -> None:
        self.world = world
        self.directory = world.directory / "workers"
        self.directory.mkdir()
        self.write(world.control.url)
        keyring = str(world.directory / "keys" / "worker.json")
        extra = {
            "SYNCWARD_KEYRING": keyring,
            "SYNCWARD_LEASE": "6s",
            "SYNCWARD_HEARTBEAT": "1s",
            "SYNCWARD_DRAIN_GRACE": f"{GRACE_S}s",
            "SYNCWARD_WORKER_THREADS": "1",
        }
        self.version = Version(ROOT, self.directory, self.directory, extra)

    def write(self, database_url: str) -> None:
        (self.directory / "dev.env").write_text(
            "SYNCWARD_PROFILE=development\n"
            f"SYNCWARD_REDIS_URL={self.world.cli.settings.redis_url.get_secret_value()}\n"
            f"SYNCWARD_DATABASE_URL={database_url}\n"
            f"SYNCWARD_EGRESS_ALLOW={self.world.control.opening}\n"
        )

    def start(self):
        process = self.version.start("workers")
        return process, process.id()

    def close(self) -> None:
        self.version.stop()


@pytest.fixture
def workers(world, valkey):
    valkey.flush()
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t SELECT generate_series(1, 9)"
    )
    world.apply({"public.t": MERGE})
    assert world.sync()[0].state is RunState.SUCCEEDED
    world.pair.source("INSERT INTO t VALUES (10)")
    world.close()
    world.control.act("DELETE FROM workers")
    made = Workers(world)
    yield made
    made.close()


class Relay:
    """A way to the control database that the test can close, or turn into a black hole."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._swallow = Event()
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                if not self._swallow.is_set():
                    other.sendall(data)

    def swallow(self) -> None:
        """Accept everything, answer nothing."""
        self._swallow.set()

    def cut(self) -> None:
        """Refuse, and reset what there is. A listener must be shut down to wake its accept()."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def relay(cluster):
    made = Relay(cluster.port)
    yield made
    made.cut()


def until(condition, seconds: float = 30) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


def held_by(world, worker: str) -> bool:
    return bool(world.control.all("SELECT 1 FROM leases WHERE worker_id = :w", w=worker))


def hold(world):
    """Keep a load from going on; closing the session lets it."""
    holder = world.pair.connect("destination", autocommit=False)
    holder.execute("LOCK TABLE acme.t IN EXCLUSIVE MODE")
    return holder


def test_an_idle_worker_signs_off_and_exits_with_0(workers):
    process, _ = workers.start()
    count = "SELECT count(*) FROM workers"
    assert workers.world.control.one(count) == 1
    assert process.drain() == 0
    assert workers.world.control.one(count) == 0


def test_a_drained_run_starts_elsewhere_within_the_dispatch_deadline(workers):
    world = workers.world
    first, name = workers.start()
    workers.version.start("scheduler")
    holder = hold(world)
    asked = world.enqueue()
    until(lambda: held_by(world, name))
    _, other = workers.start()
    started = time.monotonic()
    first.popen.send_signal(signal.SIGTERM)
    until(lambda: held_by(world, other))
    assert time.monotonic() - started < DISPATCH_DEADLINE.total_seconds()
    assert first.popen.wait(timeout=20) == 0
    holder.close()
    until(lambda: world.run(asked.run_id).state is RunState.SUCCEEDED)
    assert world.run(asked.run_id).attempt == 1
    assert world.pair.same("t")


def test_jobs_in_a_workers_memory_go_back_to_redis(world, valkey):
    valkey.flush()
    settings, client = world.cli.settings, open_client(valkey.url)
    draining = Event()
    worker = main._dramatiq(world.deps, client, settings, draining)
    worker.worker_threads, worker.queue_prefetch = 1, 4
    queue = JobQueue(client)
    world.deps.heartbeat.start()
    world.deps.logs.start()
    slow = world.control.admin_engine().connect()
    slow.exec_driver_sql("LOCK TABLE active_runs")  # the one thread waits in its claim
    worker.start()
    for _ in range(4):
        assert queue.send(Job(run_id=uuid4(), dispatch=1))
    until(lambda: world.control.one(WAITING) == 1 and worker.work_queue.qsize() == 3)

    def let_go() -> None:
        time.sleep(1)
        slow.close()

    release = Thread(target=let_go)
    release.start()
    assert main._drain(
        main._Process(worker, world.deps, world.key_upkeep(), client, draining), settings
    )
    release.join()
    assert client.llen(f"syncward:{QUEUE}") == 3
    assert client.zcard(f"syncward:{QUEUE}.XQ") == 1  # the unknown run that was begun
    client.close()


def test_a_draining_worker_takes_no_more_jobs_however_long_its_runs_take(world, valkey):
    valkey.flush()
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": MERGE})
    world.enqueue()
    (job,) = world.dispatch()
    claim = world.claim(job)
    client, draining = open_client(valkey.url), Event()
    worker = main._dramatiq(world.deps, client, world.cli.settings, draining)
    queue = JobQueue(client)
    world.deps.heartbeat.start()
    world.deps.logs.start()
    worker.start()
    held = Event()

    def last_long() -> None:
        with world.deps.heartbeat.hold(claim):
            held.set()
            time.sleep(3)

    run = Thread(target=last_long)
    run.start()
    held.wait()
    slow = world.control.admin_engine().connect()
    slow.exec_driver_sql("LOCK TABLE active_runs")  # every thread waits in its first claim
    for _ in range(200):
        queue.send(Job(run_id=uuid4(), dispatch=1))
    until(lambda: client.llen(f"syncward:{QUEUE}") == 200 - world.cli.settings.worker_threads)
    release = Thread(target=lambda: draining.wait() and slow.close())
    release.start()
    assert main._drain(
        main._Process(worker, world.deps, world.key_upkeep(), client, draining), world.cli.settings
    )
    for thread in (run, release):
        thread.join()
    begun = client.zcard(f"syncward:{QUEUE}.XQ")
    assert begun <= world.cli.settings.worker_threads
    assert client.llen(f"syncward:{QUEUE}") == 200 - begun
    client.close()


def test_a_run_claimed_while_the_worker_begins_to_drain_is_told_so(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": MERGE})
    world.enqueue()
    (job,) = world.dispatch()
    claim = world.claim(job)
    world.deps.heartbeat.signal_all(Draining("The worker is stopping."))
    with world.deps.heartbeat.hold(claim) as control, pytest.raises(Draining):
        control.check()


def test_a_second_sigterm_ends_a_worker_at_once(workers):
    world = workers.world
    process, name = workers.start()
    holder = hold(world)
    world.enqueue()
    (job,) = world.dispatch()
    queue = JobQueue(open_client(world.cli.settings.redis_url.get_secret_value()))
    queue.send(job)
    until(lambda: held_by(world, name))
    slow = world.control.admin_engine().connect()
    slow.exec_driver_sql("LOCK TABLE active_runs")  # the run cannot be handed back
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.popen.poll() is None
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(timeout=2) == -signal.SIGTERM
    slow.close()
    holder.close()
    queue.close()


@pytest.mark.parametrize("fault", ["cut", "swallow"])
def test_a_worker_without_its_control_database_leaves_in_time(workers, relay, fault):
    world = workers.world
    url = world.control.url
    workers.write(url.replace(f":{world.control.cluster.port}/", f":{relay.port}/"))
    process, name = workers.start()
    holder = hold(world)
    world.enqueue()
    (job,) = world.dispatch()
    queue = JobQueue(open_client(world.cli.settings.redis_url.get_secret_value()))
    queue.send(job)
    until(lambda: held_by(world, name))
    getattr(relay, fault)()
    started = time.monotonic()
    assert process.drain() == main.EXIT_LEFT
    assert time.monotonic() - started < GRACE_S + main.LEAVING_S + 3
    holder.close()
    queue.close()
