"""What scheduler and worker write: one shape, run ids, no secret, also when all goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.supervisor import Supervisor, child_environment
from schemas.runs import RunState
from tests.faults.test_processes import Fleet

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
PEOPLE = re.compile(
    r"\d\d:\d\d:\d\d (info|warning|error|critical) +[a-z_]+( [a-z_]+=(\S+|\".*\"))*"
)


class Logged(Fleet):
    """A scheduler and a worker, each logging in a shape of its own."""

    def __init__(self, world, scheduler: str, worker: str, **changes: str) -> None:
        super().__init__(world, workers=1, supervised=False)
        self.shapes: dict[str, str] = {}
        for child, shape in zip(self.supervisor.children, (scheduler, worker), strict=True):
            child.environment = {**child.environment, "SYNCWARD_LOG_FORMAT": shape, **changes}
            self.shapes[child.name] = shape
        self._thread.start()

    def lines(self, shape: str) -> list[str]:
        (name,) = {n for n, s in self.shapes.items() if s == shape}
        log = self.logs / f"{name}.log"
        return log.read_text().splitlines() if log.exists() else []

    def until(self, shape: str, event: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not any(event in line for line in self.lines(shape)):
            assert time.monotonic() < deadline, (event, self.lines(shape))
            time.sleep(0.1)


def secrets(world) -> list[str]:
    settings = world.cli.settings
    urls = (settings.database_url, settings.redis_url)
    return [
        *(url.get_secret_value().split(":")[2].split("@")[0] for url in urls),
        *world.pair.logins.values(),
    ]


def test_lines_have_one_shape_name_their_run_and_carry_no_secret(world):
    world.close()
    world.control.act("DELETE FROM workers")
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id], cursor: xmin}"})
    fleet = Logged(world, scheduler="people", worker="json")
    try:
        run = fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
        world.pair.source("DROP TABLE t")
        failed = fleet.wait(world.enqueue().run_id, RunState.FAILED)
    finally:
        fleet.stop()
    of_worker = [json.loads(text) for text in fleet.lines("json")]
    assert all({"at", "level", "event"} <= set(line) for line in of_worker)
    assert len(fleet.lines("people")) >= 2
    assert [text for text in fleet.lines("people") if not PEOPLE.fullmatch(text)] == []
    for run_id, outcome in ((run.run_id, "succeeded"), (failed.run_id, "failed")):
        mine = [line for line in of_worker if line.get("run_id") == str(run_id)]
        assert [line["event"] for line in mine] == ["run_claimed", "run_ended"]
        assert mine[1]["outcome"] == outcome
    everything = "".join([*fleet.lines("people"), *fleet.lines("json")])
    assert not any(secret in everything for secret in secrets(world))


def test_with_both_servers_away_the_lines_say_so_without_passwords(world):
    world.close()
    settings = world.cli.settings
    database, redis = (
        re.sub(r":\d+/", ":1/", url.get_secret_value())
        for url in (settings.database_url, settings.redis_url)
    )
    away = {
        "SYNCWARD_PROFILE": "development",
        "SYNCWARD_DATABASE_URL": database,
        "SYNCWARD_REDIS_URL": redis,
    }
    fleet = Logged(world, scheduler="json", worker="people", **away)
    try:
        fleet.until("json", "tick_failed")
        fleet.until("people", "heartbeat_failed")
        fleet.until("people", "library logger=dramatiq")
    finally:
        fleet.stop()
    failed = [json.loads(t) for t in fleet.lines("json") if "tick_failed" in t]
    assert all("not reachable" in line["reason"] for line in failed)
    assert [text for text in fleet.lines("people") if not PEOPLE.fullmatch(text)] == []
    everything = "".join([*fleet.lines("people"), *fleet.lines("json")])
    assert not any(secret in everything for secret in secrets(world))


def test_what_nobody_caught_is_one_line_without_its_text():
    code = (
        "from schemas.log_lines import log_to_stderr; import threading; log_to_stderr('json'); "
        "t = threading.Thread(target=lambda: {}['secret']); t.start(); t.join(); int('secret')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ended.returncode == 1
    found = [json.loads(text) for text in ended.stderr.splitlines()]
    assert [line["error"] for line in found] == ["KeyError", "ValueError"]
    assert all(line["event"] == "crashed" and line["where"] for line in found)
    assert "secret" not in ended.stderr


def test_a_refused_start_is_one_json_line_with_all_reasons(world):
    environment = child_environment(world.directory / "nowhere", SYNCWARD_LOG_FORMAT="json")
    fleet = Fleet(world, workers=1, supervised=False)
    child = fleet.supervisor.children[1]
    child.environment = environment
    log = Supervisor([child], fleet.logs, print).log_of(child)
    child.start(log)
    assert child.process is not None
    assert child.process.wait(timeout=30) == 78
    (text,) = log.read_text().splitlines()
    found = json.loads(text)
    assert found["event"] == "start_refused"
    assert len(found["reasons"]) == 3


@pytest.mark.full
def test_up_writes_one_shape_and_hands_it_on_to_its_processes(tmp_path):
    data = tmp_path / "data"
    environment = child_environment(data, SYNCWARD_LOG_FORMAT="json")
    with (tmp_path / "up.log").open("wb") as log:
        up = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "up", "--dev"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, env=environment,
        )  # fmt: skip
    try:
        worker = wait_for_line(data / "logs" / "worker-1.log", "worker_started")
        assert json.loads(worker)["event"] == "worker_started"
        os.kill(child_of(up.pid, "workers.process"), signal.SIGKILL)
        found = json.loads(wait_for_line(tmp_path / "up.log", "worker-1"))
        assert found["event"] == "process_ended"
        assert found["about"] == "worker-1 ended (signal 9); starting it again"
    finally:
        up.terminate()
        up.wait(timeout=60)


def wait_for_line(log: Path, wanted: str, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while True:
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines:
            if wanted in line:
                return line
        assert time.monotonic() < deadline, lines
        time.sleep(0.1)


def child_of(parent: int, module: str) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (found,) = [c for c in children if module in Path(f"/proc/{c}/cmdline").read_text()]
    return int(found)
