"""A connector of others as the source of real runs: states, sealed logs, audit events."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import connector_install
from connectors.child.installed import Kind, place
from schemas.errors import ConfigError, NotFound
from schemas.runs import RunKind
from tests.children.installing import install, policy_of
from tests.connectors.test_child import LOGIN, TABLE
from tests.integration.test_files import asked

pytestmark = pytest.mark.integration


class Shop:
    """A world whose source is a fake connector with the table `t`."""

    def __init__(self, world, directory: Path, kind: Kind) -> None:
        self.world, self.directory, self.kind = world, directory, kind
        self.data = directory / "data"
        self.data.mkdir()
        self.root = directory / "connectors"
        self.connector = install(self.root, kind)
        self.package = self.connector.partition("==")[0]
        policy = replace(world.deps.policy, children=policy_of(self.root, readable=(self.data,)))
        world.deps = replace(world.deps, policy=policy)
        (self.data / "t.json").write_text(json.dumps(TABLE))
        self.fill(3)

    def fill(self, count: int) -> None:
        lines = (f'{n}\t\t{{"id":{n},"note":"n{n}"}}\n' for n in range(1, count + 1))
        (self.data / "t.rows").write_text("".join(lines))

    def apply(
        self, stream: dict[str, Any], misbehave: str = "", hosts: tuple[str, ...] = (), **more: Any
    ) -> None:
        (self.directory / "login.json").write_text(json.dumps({"login": LOGIN}))
        (self.directory / "lake.pw").write_text(self.world.pair.secret("destination")["password"])
        settings = {"directory": str(self.data), "misbehave": misbehave, **more}
        document: dict[str, Any] = {
            "account": "acme",
            "resources": {
                "shop": {
                    "kind": self.kind,
                    "config": {
                        "connector": self.connector, "settings": settings, "hosts": list(hosts),
                    },
                    "secret": {"config": {"file": "login.json"}},
                },
                "lake": {
                    "kind": "postgres", "config": self.world.pair.config("destination"),
                    "secret": {"password": {"file": "lake.pw"}},
                },
            },
            "connections": {
                "shop-to-lake": {
                    "source": "shop", "destination": "lake", "schedule": "manual",
                    "target": {"schema": "acme"}, "streams": {f"{self.package}.t": stream},
                },
            },
        }  # fmt: skip
        path = self.directory / "doc.yaml"
        path.write_text(yaml.safe_dump(document))
        if not self.world.control.all("SELECT 1 FROM accounts WHERE name = 'acme'"):
            self.world.account()
        self.world.apply_file(path)

    def ids(self) -> list[int]:
        return [
            n for (n,) in self.world.pair.rows("destination", "SELECT id FROM acme.t ORDER BY 1")
        ]

    def cursor(self) -> dict[str, Any]:
        ((found,),) = self.world.pair.rows("destination", "SELECT cursor FROM _syncward.state")
        return found


BY_STATE = {"mode": "merge", "key": ["id"], "cursor": "state"}


def test_a_tap_is_read_from_state_to_state_and_what_it_says_is_sealed(world, tmp_path):
    shop = Shop(world, tmp_path, "singer")
    shop.apply(BY_STATE)
    assert asked(world, "shop", RunKind.TEST)["server_version"] == "tap-fake==1.0"
    (found,) = asked(world, "shop", RunKind.DISCOVER)["streams"]
    assert (found["name"], found["key"], found["cursors"]) == ("tap-fake.t", ["id"], ["id"])
    run, streams = world.sync()
    assert (run.state, run.error, streams["t"].rows_inserted) == ("succeeded", None, 3)
    assert json.loads(shop.cursor()["state"]) == {"bookmarks": {"t": {"at": 3}}}
    shop.fill(5)
    _, streams = world.sync()
    assert (streams["t"].rows_extracted, streams["t"].rows_inserted) == (2, 2)
    before = shop.cursor()
    shop.apply(BY_STATE, "show_config")
    run, streams = world.sync()
    assert (run.state, streams["t"].state) == ("failed", "failed")
    assert "sends a line that is no message of a tap" in streams["t"].error
    assert (shop.ids(), shop.cursor()) == ([1, 2, 3, 4, 5], before)
    log = world.log(run.run_id)
    assert "tap-fake: my config is" in log
    assert "***" in log
    assert LOGIN not in log
    shop.apply(BY_STATE, "rotate")
    assert [world.sync()[0].state for _ in "ab"] == ["succeeded", "succeeded"]
    versions = "SELECT max(version) FROM credentials WHERE field = 'config'"
    assert world.control.one(versions) == 5  # two applies with other settings, two renewals
    before = shop.cursor()
    shop.apply(BY_STATE, "exit_1_after_all_rows")
    run, _ = world.sync()
    assert (run.state, run.error_code) == ("queued", "connector_failed")
    assert (shop.ids(), shop.cursor()) == ([1, 2, 3, 4, 5], before)


def test_what_is_installed_is_listed_and_its_removal_is_an_event(world, tmp_path, capsys):
    root = tmp_path / "connectors"
    connector = install(root, "singer")
    world.cli.settings.connectors_dir = root
    connector_install.list_(world.cli)
    assert "as installed" in capsys.readouterr().out
    script = place(root, connector) / "venv" / "bin" / "tap-fake"
    script.write_text(script.read_text() + "#")
    connector_install.list_(world.cli)
    assert "changed: bin/tap-fake" in capsys.readouterr().out
    connector_install.remove(world.cli, connector)
    assert not place(root, connector).exists()
    events = "SELECT body::json->'detail'->>'package' FROM audit.event WHERE action = :action"
    assert world.control.all(events, action="connector.removed") == [("tap-fake",)]
    with pytest.raises(NotFound, match="connector list"):
        connector_install.remove(world.cli, connector)
    with pytest.raises(ConfigError, match="exact version"):
        connector_install.remove(world.cli, "tap-fake")
