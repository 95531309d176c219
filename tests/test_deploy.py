"""Alerts and dashboard name what exists; each alert is tested, and says what to type."""

import json
import re
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values

from schemas.profiles import Process, all_reasons
from schemas.settings import Settings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
PROMETHEUS = ROOT / "deploy" / "prometheus"
#: What Prometheus' clients append to the name of a family.
SUFFIXES = ("", "_bucket", "_sum", "_count", "_gsum", "_gcount")


def documented() -> set[str]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `(syncward_\w+)` \|", text, re.MULTILINE))


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "deploy" / "grafana" / "syncward.json").read_text(encoding="utf-8"))


def queries() -> list[str]:
    return [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", ())]


@pytest.mark.parametrize(
    "text",
    [*(alert["expr"] for alert in alerts()), *queries()],
)
def test_every_metric_of_an_alert_or_a_panel_is_documented(text):
    known = {name + suffix for name in documented() for suffix in SUFFIXES}
    assert set(re.findall(r"\bsyncward_\w+", text)) - known == set()


def test_every_documented_metric_is_on_the_dashboard():
    shown = " ".join(queries())
    assert {name for name in documented() if not re.search(rf"\b{name}", shown)} == set()


def test_every_alert_has_a_severity_a_meaning_a_runbook_and_a_test():
    tests = (PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8")
    names = [alert["alert"] for alert in alerts()]
    assert len(names) == len(set(names)) > 20
    for alert in alerts():
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert set(alert["annotations"]) == {"summary", "meaning", "runbook"}
        fires = rf'alertname="{alert["alert"]}".*value: 1|alertname: {alert["alert"]}\n'
        assert re.search(fires, tests), alert["alert"]


def test_every_command_of_a_runbook_exists():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for alert in alerts():
        runbook = " ".join(alert["annotations"].values())
        for noun, verb in re.findall(r"\bsyncward ([a-z]+)(?: ([a-z]+))?", runbook):
            rows = [line for line in page.splitlines() if f"`syncward {noun}" in line]
            assert rows, f"syncward {noun}"
            if noun in {"account", "audit", "connection", "db", "keys", "resource", "run"}:
                assert any(re.search(rf"\b{verb}\b", row) for row in rows), f"{noun} {verb}"


def test_the_panels_of_the_dashboard_do_not_overlap_and_have_descriptions():
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"]


def test_the_scrape_example_loads_the_alerts():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    assert config["rule_files"] == ["alerts.yml"]
    assert all(job["job_name"].startswith("syncward-") for job in config["scrape_configs"])
    for job in config["scrape_configs"]:
        assert job["authorization"]["credentials_file"].endswith(".token")


# ── production, as the examples set it up ───────────────────────────────────────────────────────

SERVICES: dict[str, Process] = {
    "scheduler": "scheduler", "worker": "worker", "metrics": "metrics", "migrate": "operator",
    "sealer": "sealer",
}  # fmt: skip
KEYS = {"operator.json", "worker.json"}


def settings(*parts: dict[str, Any]) -> Settings:
    merged = {name: value for part in parts for name, value in part.items()}
    named = {name.removeprefix("SYNCWARD_").lower(): value for name, value in merged.items()}
    assert set(named) <= set(Settings.model_fields)
    return Settings.model_validate({k: str(v) for k, v in named.items()})


def example(name: str) -> dict[str, Any]:
    return dict(dotenv_values(DEPLOY / "env" / f"{name}.env.example"))


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def service(name: str) -> tuple[Settings, dict[str, Any]]:
    found = compose()["services"][name]
    return settings(example(found["env_file"].removesuffix(".env")), found["environment"]), found


def test_every_service_of_compose_starts_in_production():
    assert set(compose()["services"]) == set(SERVICES)
    for name, process in SERVICES.items():
        made, _ = service(name)
        assert made.profile == "production"
        assert all_reasons(made, process) == [], name


@pytest.mark.parametrize(
    ("old", "new"),
    [("sslmode=verify-full", "sslmode=require"), ("rediss:", "redis:"), ("LOGIN", "postgres")],
)
def test_a_service_that_is_made_less_safe_does_not_start(old, new):
    found = compose()["services"]["worker"]
    spoilt = {name: value.replace(old, new) for name, value in example("worker").items()}
    assert len(all_reasons(settings(spoilt, found["environment"]), "worker")) == 1


def test_each_service_is_given_its_own_half_of_the_keys_and_every_file_that_it_names():
    given = {}
    for name in SERVICES:
        made, found = service(name)
        files = {secret["target"] for secret in found["secrets"]}
        given[name] = {Path(file).name for file in files} & KEYS
        assert {secret["source"] for secret in found["secrets"]} <= set(compose()["secrets"])
        url = made.database_url.get_secret_value() if made.database_url else ""
        named = [
            *re.findall(r"(?:sslrootcert|ssl_ca_certs)=([^&]+)", url),
            *([made.keyring.removeprefix("file://")] if made.keyring and given[name] else []),
            *([str(made.metrics_token_file)] if made.metrics_token_file else []),
        ]
        assert named
        assert set(named) <= files
        assert found["ulimits"] == {"core": 0}
    assert given == {
        "worker": {"worker.json"}, "metrics": {"operator.json"}, "scheduler": set(),
        "migrate": set(), "sealer": set(),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "process"), [("scheduler", "scheduler"), ("worker", "worker"), ("cli", "operator"),
                          ("cli", "metrics"), ("migrate", "operator"), ("sealer", "sealer")],
)  # fmt: skip
def test_every_example_of_an_environment_starts_in_production(name, process):
    assert all_reasons(settings(example(name)), process) == []


@pytest.mark.parametrize(
    "path", sorted((DEPLOY / "systemd").glob("*.service")), ids=lambda p: p.name
)
def test_a_unit_dumps_no_core_and_stays_down_when_it_refuses_to_start(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {"LimitCORE=0", "RestartPreventExitStatus=78", "NoNewPrivileges=yes"} <= set(lines)
    (named,) = {line.partition("=/")[2] for line in lines if line.startswith("EnvironmentFile=/")}
    assert f"/{named} " in (DEPLOY / "systemd" / "README.md").read_text(encoding="utf-8")


def make_certificates(directory: Path, *names: str) -> None:
    script = DEPLOY / "tls" / "make-certificates.sh"
    subprocess.run([script, directory, *names], check=True, capture_output=True)


def shake_hands(directory: Path, name: str) -> None:
    """Serve with the certificate of db.example.com; connect as somebody who expects this name."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(directory / "db.example.com.crt", directory / "db.example.com.key")
    client = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    here, there = socket.socketpair()

    def serve() -> None:
        try:
            server.wrap_socket(there, server_side=True).close()
        except OSError:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(here, server_hostname=name).close()
    finally:
        here.close()
        thread.join()


def test_the_script_makes_an_authority_and_certificates_that_hold_for_their_names_only(tmp_path):
    make_certificates(tmp_path, "db.example.com", "redis.example.com")
    shake_hands(tmp_path, "db.example.com")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(tmp_path, "redis.example.com")
    assert {p.stat().st_mode & 0o777 for p in tmp_path.glob("*.key")} == {0o600}
    authority = (tmp_path / "ca.crt").read_bytes()
    first = (tmp_path / "db.example.com.crt").read_bytes()
    make_certificates(tmp_path, "db.example.com")
    assert (tmp_path / "ca.crt").read_bytes() == authority
    assert (tmp_path / "db.example.com.crt").read_bytes() != first
    shake_hands(tmp_path, "db.example.com")
    with pytest.raises(subprocess.CalledProcessError):
        make_certificates(tmp_path, "db example.com")


def test_a_shell_reads_the_example_of_an_operators_environment_as_it_is(tmp_path):
    """`set -a; . ./cli.env`: an `&` of a URL must not end the line."""
    text = (DEPLOY / "env" / "cli.env.example").read_text(encoding="utf-8")
    everything = re.sub(r"(?m)^#(?=SYNCWARD_)", "", text)
    (tmp_path / "cli.env").write_text(everything, encoding="utf-8")
    done = subprocess.run(
        ["/bin/sh", "-c", "set -a; . ./cli.env; set +a; env -0"],
        cwd=tmp_path, env={}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = dict(
        one.split("=", 1) for one in done.stdout.split("\0") if one.startswith("SYNCWARD_")
    )
    assert found == dict(dotenv_values(tmp_path / "cli.env"))
