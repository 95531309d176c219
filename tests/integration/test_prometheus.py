"""A real Prometheus over real processes: rules, alerts and every query of the dashboard."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.supervisor import child_environment
from schemas.runs import RunState
from tests.faults.test_processes import Fleet, ports
from tests.sealers import SealerProcess
from tests.test_deploy import PROMETHEUS, alerts, dashboard

pytestmark = [pytest.mark.integration, pytest.mark.full, pytest.mark.timeout(600)]

#: Queries of the dashboard that answer nothing while all is well (docs/metrics.md names them).
EMPTY_WHEN_HEALTHY = {'ALERTS{alertname=~"Syncward.*", alertstate="firing"}'}


@pytest.fixture(scope="session")
def prometheus_installed() -> None:
    if shutil.which("prometheus") and shutil.which("promtool"):
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("Prometheus is missing, and only root of a Debian can install it")
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "prometheus"]
    subprocess.run(["env", "DEBIAN_FRONTEND=noninteractive", *install], check=True)


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["promtool", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROMETHEUS)


@pytest.mark.usefixtures("prometheus_installed")
def test_the_rules_are_valid_and_fire_as_their_tests_say():
    for words in (
        ("check", "rules", "alerts.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "alerts_test.yml"),
    ):
        answer = promtool(*words)
        assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.usefixtures("prometheus_installed")
def test_the_tests_of_the_rules_notice_every_alert_that_never_fires(tmp_path):
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = f"({rule['expr']}) > 1e300"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    shutil.copy(PROMETHEUS / "alerts_test.yml", tmp_path)
    answer = promtool("test", "rules", tmp_path / "alerts_test.yml")
    assert answer.returncode != 0
    said = answer.stdout + answer.stderr
    assert {alert["alert"] for alert in alerts() if alert["alert"] not in said} == set()


class Prometheus:
    """A server of our own on a loopback port, with the repository's rules and scrape example."""

    def __init__(self, directory: Path, targets: dict[str, list[int]], token: Path) -> None:
        (self.port,) = ports(1)
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
        for job in config["scrape_configs"]:
            mine = targets[job["job_name"]]
            job["authorization"]["credentials_file"] = str(token)
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in mine]}]
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=error",
            ]
        )

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def ask(self, query: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return found

    def wait(self, query: str, holds: Callable[[float], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        values: list[float] = []
        while time.monotonic() < deadline:
            try:
                values = [float(sample["value"][1]) for sample in self.ask(query)]
            except OSError:  # it is just starting
                values = []
            if values and all(map(holds, values)):
                return
            time.sleep(0.5)
        raise AssertionError(f"{query}: {values} after {seconds} s")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=30)


@pytest.fixture
def watched(prometheus_installed, world, tmp_path):  # noqa: ARG001 - installs it
    """Two schedulers, two workers, a sealer, `metrics --serve`, and a Prometheus over them."""
    world.close()
    world.control.act("DELETE FROM workers")
    chosen = ports(6)
    token = tmp_path / "metrics.token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    fleet = Fleet(world, workers=2, schedulers=2, metrics=chosen[:4])
    keys = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "metrics", "--serve"],
        env=child_environment(
            world.directory,
            SYNCWARD_KEYRING=str(world.directory / "keys" / "operator.json"),
            SYNCWARD_METRICS_PORT=str(chosen[4]),
            SYNCWARD_METRICS_TOKEN_FILE=str(token),
        ),
    )
    sealer = SealerProcess(
        world, "sealer", (tmp_path / "log.anchor").as_uri(), SYNCWARD_METRICS_PORT=str(chosen[5])
    )
    server = Prometheus(
        tmp_path,
        {
            "syncward-scheduler": chosen[:2],
            "syncward-worker": chosen[2:4],
            "syncward-keys": chosen[4:5],
            "syncward-sealer": chosen[5:],
        },
        token,
    )
    yield fleet, server
    server.stop()
    sealer.terminate()
    keys.terminate()
    keys.wait(timeout=10)
    fleet.stop()


def runs_with_failures(fleet: Fleet) -> None:
    """Three runs that succeed, one that fails because a table is gone."""
    world = fleet.world
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "CREATE TABLE gone (id int PRIMARY KEY)",
        "INSERT INTO t SELECT g, 'v' FROM generate_series(1, 1000) g",
    )
    spec = "{mode: merge, key: [id], cursor: xmin}"
    world.apply({"public.t": spec, "public.gone": spec})
    for _ in range(3):
        fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
    world.pair.source("DROP TABLE gone")
    fleet.wait(world.enqueue().run_id, RunState.FAILED)


def as_prometheus_sees_it(expression: str) -> str:
    return expression.replace("$__rate_interval", "30s").replace("$__range", "10m")


def test_every_query_of_the_dashboard_and_every_alert_finds_its_series(watched):
    fleet, server = watched
    server.wait("count(syncward_queue_up)", lambda n: n == 1)
    server.wait('count(up{job=~"syncward-.*"} == 1)', lambda n: n == 6)
    runs_with_failures(fleet)
    server.wait('sum(syncward_runs_total{state="failed"})', lambda n: n == 1)
    server.wait("max(syncward_connections_never_succeeded)", lambda n: n == 0, 90)  # a scan was
    empty = {
        target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
        if not server.ask(as_prometheus_sees_it(target["expr"]))
    }
    assert empty == EMPTY_WHEN_HEALTHY
    for alert in alerts():
        for selector in re.findall(r"\b(?:syncward_\w+|up)(?:\{[^}]*\})?", alert["expr"]):
            assert server.ask(selector), f"{alert['alert']}: {selector} selects nothing"
    loaded = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in loaded} == {
        alert["alert"]: "ok" for alert in alerts()
    }


def test_when_the_exporter_is_killed_another_one_takes_over_and_none_is_doubled(watched):
    fleet, server = watched
    server.wait("count(syncward_queue_up)", lambda n: n == 1)
    (before,) = server.ask("syncward_queue_up")
    elected = before["metric"]["instance"]
    victim = next(
        child.process.pid
        for child in fleet.supervisor.children
        if child.environment.get("SYNCWARD_METRICS_PORT") == elected.split(":")[1]
    )
    os.kill(victim, signal.SIGKILL)
    server.wait(f'absent(syncward_queue_up{{instance="{elected}"}})', lambda n: n == 1)
    server.wait("count(syncward_queue_up)", lambda n: n == 1, seconds=60)
    (after,) = server.ask("syncward_queue_up")
    assert after["metric"]["instance"] != elected
    time.sleep(7)  # the killed one is back by now, and knows that it is the younger one
    (most,) = server.ask("max_over_time(count(syncward_queue_up)[2m:1s])")
    assert float(most["value"][1]) == 1
    assert server.ask("count(syncward_queue_up)")[0]["value"][1] == "1"
