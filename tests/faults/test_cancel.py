"""Cancel within ten seconds, whatever a run waits for, and nothing goes on at the servers."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from cli.apply import make_so
from connectors import sources
from schemas.runs import FINAL_STATES, RunKind, RunOptions, RunState
from schemas.settings import Settings
from storage import connections, resources, runs
from storage.claims import WorkerState
from storage.engine import open_link
from tests.faults.test_processes import Fleet
from tests.world import OPERATOR
from workers import run_sync
from workers.attempt import Dependencies
from workers.heartbeat import Heartbeat

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

OURS = "SELECT query FROM pg_stat_activity WHERE application_name LIKE 'syncward:%' AND datname IN "

STREAMS = {
    "slow": "public.slow",  # a view that sleeps
    "locked": "public.locked",  # another session holds the target
    "trickle": "public.trickle",  # a row now and then
    "deaf": "public.deaf",  # the server's process is stopped: no cancel gets through
}


@pytest.fixture
def silent():
    """A host that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def document(world, silent: int) -> None:
    pair, lines = world.pair, ["account: acme", "resources:"]
    for name, role in (("shop", "source"), ("lake", "destination"), ("silent", "source")):
        (world.directory / f"{role}.pw").write_text(pair.secret(role)["password"])
        config = {**pair.config(role), **({"port": silent} if name == "silent" else {})}
        lines.append(
            f"  {name}: {{kind: postgres, config: {json.dumps(config)}, runs_max: 9, "
            f"secret: {{password: {{file: {role}.pw}}}}}}"
        )
    lines.append("connections:")
    for name, stream in {**STREAMS, "connecting": "public.slow"}.items():
        lines += [
            f"  {name}:",
            f"    source: {'silent' if name == 'connecting' else 'shop'}",
            "    destination: lake",
            "    schedule: manual",
            "    target: {schema: acme}",
            f"    streams: {{{stream}: {{mode: replace}}}}",
        ]
    path = world.directory / "doc.yaml"
    path.write_text("\n".join(lines))
    make_so(world.cli, path, write=True)


def prepared(world, silent: int) -> None:
    world.account()
    world.pair.source(
        "CREATE TABLE locked (id int PRIMARY KEY)",
        "CREATE VIEW slow AS SELECT 1 AS id FROM pg_sleep(600)",
        "CREATE VIEW deaf AS SELECT 2 AS id FROM pg_sleep(600)",
        "CREATE FUNCTION nap(g int) RETURNS text VOLATILE LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.05); RETURN repeat(md5(g::text), 300); END $$",
        "CREATE VIEW trickle AS SELECT g, nap(g) FROM generate_series(1, 100000) g",
    )
    document(world, silent)


def asked(world, name: str):
    with world.cli.inside() as (tx, _, _name):
        found = connections.get(tx, name)
        subject = connections.subject(found)
        return runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR).run_id


def until(true, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def working(world):
    """The world's worker with a heartbeat thread at the default pace; executes in threads."""
    control = world.control
    beat = Settings().heartbeat.total_seconds()
    heartbeat = Heartbeat(
        lambda: open_link(control.url, "worker"),
        lambda: WorkerState("w1", "test", 8, draining=False),
        beat,
    )
    heartbeat.start()
    deps = Dependencies(
        **{
            **{f: getattr(world.deps, f) for f in Dependencies.__slots__},
            "heartbeat": heartbeat,
        }
    )
    threads: list[threading.Thread] = []

    def execute() -> list[threading.Thread]:
        for job in world.dispatch():
            threads.append(threading.Thread(target=run_sync.execute, args=(job, deps), daemon=True))
            threads[-1].start()
        return threads

    yield execute
    for thread in threads:
        thread.join(30)
    heartbeat.stop()


def test_cancel_ends_within_ten_seconds_whatever_the_run_waits_for(world, working, silent):
    prepared(world, silent)
    pair = world.pair
    activity = OURS + str(tuple(pair.names.values()))
    first = asked(world, "locked")
    for thread in working():
        thread.join(30)
    assert world.run(first).state is RunState.SUCCEEDED
    with pair.connect("destination", autocommit=False) as other:
        other.execute("LOCK TABLE acme.locked IN ACCESS EXCLUSIVE MODE")
        ids = {name: asked(world, name) for name in [*STREAMS, "connecting"]}
        threads = working()
        blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        sleeping = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE "
        until(lambda: pair.rows("destination", blocked) == [(1,)])
        until(lambda: pair.rows("source", sleeping + "'%slow%'"))
        until(lambda: pair.rows("source", sleeping + "'%deaf%'"))
        ((deaf,),) = pair.rows("source", sleeping + "'%deaf%'")
        os.kill(deaf, signal.SIGSTOP)
        try:
            time.sleep(0.5)  # the trickle trickles, the connecting one connects
            assert all(world.run(run_id).state is RunState.RUNNING for run_id in ids.values())
            started = time.monotonic()
            for run_id in ids.values():
                with world.cli.inside() as (tx, _, _name):
                    assert runs.cancel(tx, run_id, OPERATOR) is RunState.RUNNING
            ended: dict[str, float] = {}
            while len(ended) < len(ids) and time.monotonic() - started < 20:
                for name, run_id in ids.items():
                    if name not in ended and world.run(run_id).state in FINAL_STATES:
                        ended[name] = time.monotonic() - started
                time.sleep(0.05)
        finally:
            os.kill(deaf, signal.SIGCONT)
        assert {name: world.run(run_id).state for name, run_id in ids.items()} == dict.fromkeys(
            ids, RunState.CANCELLED
        )
        assert set(ended) == set(ids), ended
        assert max(ended.values()) < 10, ended
        assert ended["connecting"] < 7, "it waited for its own timeout"
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        until(lambda: pair.rows("source", activity) == [])  # while the lock is still held
    for run_id in ids.values():
        moves = [action for action in world.events(run_id) if action.startswith("run.")]
        assert moves[-2:] == ["run.cancel_requested", "run.cancelled"]


@pytest.mark.full  # 13 s, most of it patience
def test_a_thread_that_hangs_is_given_up_and_its_worker_replaced(world, monkeypatch):
    world.close()
    world.control.act("DELETE FROM workers")
    world.account()
    here = os.path.join(os.path.dirname(__file__), "hanging")  # noqa: PTH118, PTH120
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, f"{here}/sources"])
    (world.directory / "token").write_text("a-token")
    path = world.directory / "doc.yaml"
    path.write_text(
        "account: acme\nresources:\n"
        "  swamp: {kind: hanging, config: {}, secret: {token: {file: token}}}\n"
    )
    make_so(world.cli, path, write=True)
    fleet = Fleet(world, workers=1, supervised=False)
    fleet.supervisor.children[-1].module = "tests.faults.hanging.worker"
    fleet._thread.start()
    try:
        with world.cli.inside() as (tx, _, _name):
            found = resources.get(tx, "swamp")
            subject = runs.Subject(found.resource_id, found.account_id, found.resource_id, None)
            asked = runs.enqueue(tx, subject, RunKind.TEST, RunOptions(), OPERATOR)
        fleet.wait(asked.run_id, RunState.RUNNING)
        (before,) = world.control.all("SELECT worker_id FROM leases")
        with world.cli.inside() as (tx, _, _name):
            runs.cancel(tx, asked.run_id, OPERATOR)
        started = time.monotonic()
        run = fleet.wait(asked.run_id)
        assert (run.state, time.monotonic() - started < 10) == (RunState.CANCELLED, True)
        alive = "SELECT worker_id FROM workers WHERE seen_at > now() - interval '5 s'"
        until(lambda: world.control.all(alive) not in ([], [before]))
        assert world.control.all("SELECT count(*) FROM leases") == [(0,)]
    finally:
        fleet.stop()
    log = (fleet.logs / "workers-1.log").read_text()
    assert "worker_left_hanging_runs runs=1" in log


@pytest.mark.parametrize(
    "words", [("connection", "pause", "shop-to-lake"), ("account", "pause", "acme")]
)
def test_pause_now_cancels_what_runs_and_keeps_what_waits(world, working, shell, words):
    world.pair.source("CREATE VIEW t AS SELECT 1 AS id FROM pg_sleep(600)")
    world.apply({"public.t": "{mode: replace}"})
    first = world.enqueue()
    (thread,) = working()
    until(lambda: world.pair.rows("source", OURS + f"('{world.pair.names['source']}')"))
    after = world.enqueue()
    code, out, _ = shell(*words, "--now", "--json")
    assert (code, json.loads(out)["cancelled"], json.loads(out)["left"]) == (0, 1, 0)
    thread.join(5)
    assert world.run(first.run_id).state is RunState.CANCELLED
    assert world.run(after.run_id).state is RunState.QUEUED
    assert world.dispatch() == []
    assert shell(*words, "--now")[1].endswith("was paused already; 0 runs cancelled\n")
    assert f"{words[0]}.paused" in world.events()
    assert "run.cancel_requested" in world.events(first.run_id)
