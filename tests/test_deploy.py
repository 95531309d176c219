"""Alerts and dashboard name what exists; each alert is tested, and says what to type."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
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
