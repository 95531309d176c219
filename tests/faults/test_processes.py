"""Real processes: kill -9, a flushed Redis, a drain, a stopped database. Nobody helps by hand."""

import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread

import pytest

from cli.supervisor import Child, Supervisor, child_environment
from schemas.runs import FINAL_STATES, RunState
from storage import runs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]

MERGE = "{mode: merge, key: [id], cursor: xmin}"


class Fleet:
    """A scheduler and workers as supervised processes against a stepped world's databases."""

    def __init__(
        self, world, workers: int, *, schedulers: int = 1, metrics=(), supervised: bool = True
    ) -> None:
        settings = world.cli.settings
        env_file = world.directory / "dev.env"
        env_file.write_text(
            "SYNCWARD_PROFILE=development\n"
            f"SYNCWARD_DATABASE_URL={settings.database_url.get_secret_value()}\n"
            f"SYNCWARD_REDIS_URL={settings.redis_url.get_secret_value()}\n"
            f"SYNCWARD_EGRESS_ALLOW={world.control.opening}\n"
        )
        extra = {"SYNCWARD_LEASE": "3s", "SYNCWARD_HEARTBEAT": "1s", "SYNCWARD_DRAIN_GRACE": "10s"}
        worker_file = str(world.directory / "keys" / "worker.json")
        environment = child_environment(world.directory, SYNCWARD_KEYRING=worker_file, **extra)
        self.world = world
        self.logs = world.directory / "logs"
        self.logs.mkdir()
        modules = ["scheduler"] * schedulers + ["workers"] * workers
        children = [
            Child(
                f"{module}-{n}",
                f"{module}.process",
                {**environment, **({"SYNCWARD_METRICS_PORT": str(metrics[n])} if metrics else {})},
            )
            for n, module in enumerate(modules)
        ]
        self.supervisor = Supervisor(children, self.logs, lambda _line: None)
        self._stop = Event()
        self._thread = Thread(target=self.supervisor.run, args=(self._stop,))
        if supervised:
            self._thread.start()

    def worker_pids(self) -> list[int]:
        return [c.process.pid for c in self.supervisor.children if c.name[0] == "w" and c.process]

    def wait(self, run_id, *states: RunState, seconds: float = 90):
        deadline = time.monotonic() + seconds
        run = None
        while time.monotonic() < deadline:
            with self.world.cli.inside() as (tx, _, _name):
                if runs.promised(tx, run_id):
                    continue
                run = runs.get(tx, run_id)
            if run.state in (states or FINAL_STATES):
                return run
            time.sleep(0.05)
        output = "\n".join(p.read_text()[-3000:] for p in self.logs.iterdir())
        raise AssertionError(f"{run} after {seconds} s\n{output}")

    def in_the_middle(self) -> None:
        """Wait until rows of the large table are on their way at the destination."""
        query = (
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'syncward:destination' "
            "AND state = 'active' AND datname = current_database() "
            """AND query LIKE '%syncward_staging%' AND query LIKE '%"n"%'"""
        )
        deadline = time.monotonic() + 60
        while not self.world.pair.rows("destination", query):
            assert time.monotonic() < deadline, "the merge never began"
            time.sleep(0.005)

    @contextmanager
    def merge_held(self) -> Iterator[None]:
        """Keep the merge of the large table in its middle, by a lock that it waits for."""
        with self.world.pair.connect("destination", autocommit=False) as held:
            held.execute("LOCK TABLE acme.big IN SHARE MODE")
            yield

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def fleet(world, request):
    world.close()  # its own heartbeat must not count as a worker
    world.control.act("DELETE FROM workers")
    started = Fleet(world, getattr(request, "param", 2))
    yield started
    started.stop()


def big(world, rows: int) -> None:
    world.pair.source(
        "CREATE TABLE small (id int PRIMARY KEY, v text)",
        "INSERT INTO small SELECT g, 'v' FROM generate_series(1, 100) g",
        "CREATE TABLE big (id int PRIMARY KEY, v text, n numeric)",
        f"INSERT INTO big SELECT g, 'v' || g, g FROM generate_series(1, {rows}) g",
    )
    world.apply({"public.small": MERGE, "public.big": MERGE})


def checksums(world) -> list[tuple[object, ...]]:
    query = "SELECT count(*), sum(hashtextextended(ROW(id, v, n)::text, 1)::numeric) FROM {}.big"
    return [
        world.pair.rows("source", query.format("public"))[0],
        world.pair.rows("destination", query.format("acme"))[0],
    ]


@pytest.mark.parametrize("rows", [150_000, pytest.param(1_000_000, marks=pytest.mark.full)])
def test_a_worker_killed_in_a_merge_is_replaced_and_nothing_is_lost(fleet, rows, valkey):
    world = fleet.world
    big(world, rows)
    fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
    world.pair.source("UPDATE big SET v = 'changed'", "UPDATE small SET v = 'changed'")
    asked = world.enqueue()
    fleet.in_the_middle()
    (victim,) = world.control.all("SELECT worker_id FROM leases")
    for pid in fleet.worker_pids():
        os.kill(pid, signal.SIGKILL)
    valkey.flush()
    run = fleet.wait(asked.run_id, RunState.SUCCEEDED)
    assert run.attempt == 2
    assert run.worker_id != victim[0]
    streams = world.streams(run.run_id)
    assert streams["small"].attempt == 1, "a stream that was done is not done again"
    assert streams["big"].rows_updated == rows
    source, destination = checksums(world)
    assert source == destination


def test_a_flushed_redis_only_delays(fleet, valkey):
    world = fleet.world
    big(world, 1_000)
    stop = Event()

    def flush() -> None:
        while not stop.wait(0.02):
            valkey.flush()

    flusher = Thread(target=flush)
    flusher.start()
    try:
        asked = world.enqueue()
        time.sleep(3)
    finally:
        stop.set()
        flusher.join()
    fleet.wait(asked.run_id, RunState.SUCCEEDED, seconds=40)
    assert world.pair.same("small")


#: Rows of a merge that waits in its middle, and of one that computes meanwhile.
HELD = 1_000
MERGES = [HELD, pytest.param(1_000_000, marks=pytest.mark.full)]


def in_a_merge(fleet, rows: int):
    return fleet.merge_held() if rows == HELD else nullcontext()


@pytest.mark.parametrize("rows", MERGES)
@pytest.mark.parametrize("fleet", [1], indirect=True)
def test_a_drain_hands_the_run_back_without_counting_an_attempt(fleet, rows):
    world = fleet.world
    big(world, rows)
    fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
    world.pair.source("UPDATE big SET v = 'changed'")
    requeued = "SELECT body::jsonb ->> 'reason' FROM audit.event WHERE action = 'run.requeued'"
    with in_a_merge(fleet, rows):
        asked = world.enqueue()
        fleet.in_the_middle()
        os.kill(fleet.worker_pids()[0], signal.SIGTERM)
        deadline = time.monotonic() + 60
        while not world.control.all(requeued):
            assert time.monotonic() < deadline, "the run was not handed back"
            time.sleep(0.02)
    run = fleet.wait(asked.run_id, RunState.SUCCEEDED)
    assert run.attempt == 1
    assert world.control.all(requeued) == [("draining",)]
    source, destination = checksums(world)
    assert source == destination


@pytest.mark.parametrize("rows", MERGES)
@pytest.mark.parametrize("fleet", [1], indirect=True)
def test_cancel_reaches_a_running_merge_and_leaves_the_data_as_it_was(fleet, rows):
    world = fleet.world
    big(world, rows)
    fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
    world.pair.source("UPDATE big SET v = 'changed'")
    with in_a_merge(fleet, rows):
        asked = world.enqueue()
        fleet.in_the_middle()
        with world.cli.inside() as (tx, _, _name):
            runs.cancel(tx, asked.run_id, world.cli.principal)
        started = time.monotonic()
        run = fleet.wait(asked.run_id)
        assert run.state is RunState.CANCELLED
        assert time.monotonic() - started < 10
    assert world.pair.rows("destination", "SELECT count(*) FROM acme.big WHERE v = 'changed'") == [
        (0,)
    ]


def test_processes_carry_no_secret_in_arguments_or_environment(fleet):
    world = fleet.world
    big(world, 1_000)
    fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
    settings = world.cli.settings
    secrets = [
        *world.pair.logins.values(),
        settings.database_url.get_secret_value().split(":")[2].split("@")[0],
        settings.redis_url.get_secret_value().split(":")[2].split("@")[0],
    ]
    children = [c.process.pid for c in fleet.supervisor.children if c.process]
    assert len(children) == 3
    for pid in children:
        for place in ("cmdline", "environ"):
            with open(f"/proc/{pid}/{place}", "rb") as file:  # noqa: PTH123 - procfs
                content = file.read()
            assert content
            assert all(secret.encode() not in content for secret in secrets)
    for log in fleet.logs.iterdir():
        assert all(secret not in log.read_text() for secret in secrets)


def scrape(port: int) -> dict[str, float]:
    """Return the samples of one process's metrics endpoint, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = [ln.rsplit(" ", 1) for ln in text.splitlines() if ln.startswith("syncward_")]
    return {name: float(value) for name, value in samples}


def ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


def test_two_schedulers_and_two_workers_are_correct_and_their_metrics_add_up(world):
    world.close()
    world.control.act("DELETE FROM workers")
    chosen = ports(4)
    fleet = Fleet(world, workers=2, schedulers=2, metrics=chosen)
    try:
        big(world, 1_000)
        for number in range(6):
            world.pair.source(f"UPDATE big SET v = 'round {number}'")
            fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
        found = [scrape(port) for port in chosen]
    finally:
        fleet.stop()

    def total(name: str) -> float:
        return sum(samples.get(name, 0.0) for samples in found)

    assert total('syncward_runs_total{connector="postgres",state="succeeded"}') == 6
    rows = world.control.one("SELECT sum(rows_loaded)::int FROM run_streams")
    assert total('syncward_rows_total{connector="postgres",direction="loaded"}') == rows
    assert total('syncward_claims_total{result="claimed"}') == 6
    assert total('syncward_decrypts_total{outcome="opened",purpose="credentials"}') == 12
    started = world.control.one("SELECT count(*) FROM audit.event WHERE action = 'run.started'")
    assert started == 6
    doubled = (
        "SELECT count(*) FROM (SELECT FROM audit.event WHERE action = 'run.dispatched' "
        "GROUP BY target_id HAVING count(*) > 1) AS d"
    )
    assert world.control.one(doubled) == 0
    assert checksums(world)[0] == checksums(world)[1]


def test_a_taken_metrics_port_refuses_the_start_and_says_so(world):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fleet = Fleet(world, workers=0, metrics=[taken.getsockname()[1]], supervised=False)
        (child,) = fleet.supervisor.children
        child.start(fleet.supervisor.log_of(child))
        assert child.process is not None
        assert child.process.wait(timeout=20) == 78
    assert "choose another SYNCWARD_METRICS_PORT" in fleet.supervisor.log_of(child).read_text()
