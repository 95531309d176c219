"""A world whose source is one of the manifests that come with it, against the fake of its API."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from scheduler import ticks
from schemas.records import StreamResult
from schemas.runs import Run
from tests.rest_api import Api, Asked
from tests.world import World


@dataclass
class Synced:
    """One connection from an API to the pair's destination."""

    world: World
    api: Api
    manifest: str
    parameters: dict[str, str]
    secrets: dict[str, str]

    def apply(self, streams: dict[str, dict[str, Any]]) -> None:
        world, directory = self.world, self.world.directory
        lake = world.pair.secret("destination")["password"]
        for name, value in {**self.secrets, "lake": lake}.items():
            (directory / f"{name}.secret").write_text(value)
        document = {
            "account": "acme",
            "resources": {
                "api": {
                    "kind": "rest",
                    "config": {"manifest": self.manifest, "parameters": self.parameters},
                    "secret": {name: {"file": f"{name}.secret"} for name in self.secrets},
                },
                "lake": {
                    "kind": "postgres", "config": world.pair.config("destination"),
                    "secret": {"password": {"file": "lake.secret"}},
                },
            },
            "connections": {
                "shop-to-lake": {
                    "source": "api", "destination": "lake", "schedule": "manual",
                    "target": {"schema": "acme"},
                    "streams": {f"{self.manifest}.{n}": spec for n, spec in streams.items()},
                },
            },
        }  # fmt: skip
        path = directory / "doc.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        if not world.control.all("SELECT 1 FROM accounts WHERE name = 'acme'"):
            world.account()
        world.apply_file(path)

    def sync(self, **options: Any) -> dict[str, StreamResult]:
        """Run, and say what each stream did; the run must be a success."""
        run, streams = self.world.sync(**options)
        assert (run.state, run.error) == ("succeeded", None), self.world.log(run.run_id)
        return streams

    def rows(self, table: str, columns: str) -> list[tuple[Any, ...]]:
        """What the destination serves: rows that are not stamped as deleted."""
        stamped = self.world.pair.rows(
            "destination",
            "SELECT 1 FROM information_schema.columns WHERE table_schema = 'acme' AND "
            f"table_name = '{table}' AND column_name = '_syncward_deleted_at'",
        )
        where = "WHERE _syncward_deleted_at IS NULL" if stamped else ""
        return self.world.pair.rows(
            "destination", f"SELECT {columns} FROM acme.{table} {where} ORDER BY 1"
        )

    def killed_at(self, when: Callable[[Asked], bool]) -> Run:
        """Run in a process that is killed while the API answers the request `when` picks.

        Its lease ends, and the run is executed once more, here.
        """
        asked_for = self.world.enqueue()
        (job,) = self.world.dispatch()
        settings = self.world.cli.settings
        assert settings.database_url is not None
        assert settings.redis_url is not None
        environment = {
            **os.environ,  # noqa: TID251 - a process of a test's own
            "SYNCWARD_PROFILE": "development",
            "SYNCWARD_DATABASE_URL": settings.database_url.get_secret_value(),
            "SYNCWARD_REDIS_URL": settings.redis_url.get_secret_value(),
            "SYNCWARD_EGRESS_ALLOW": self.world.control.opening,
            "SYNCWARD_KEYRING": str(self.world.directory / "keys" / "worker.json"),
            "SYNCWARD_DATA_DIR": str(self.world.directory),
        }
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.apis.worker", job.model_dump_json()],
            env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        before = self.api.before

        def killing(asked: Asked) -> None:
            if child.returncode is None and when(asked):
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
            before(asked)

        self.api.before = killing
        _, told = child.communicate(timeout=60)
        self.api.before = before
        assert child.returncode == -signal.SIGKILL, told
        self.world.expire_leases()
        ticks.reap_tick(self.world.scheduler)
        self.world.control.act("UPDATE active_runs SET not_before = now()")
        self.world.step()
        return self.world.run(asked_for.run_id)


def page_of(number: int, path: str) -> Callable[[Asked], bool]:
    """Return what says of a request whether it is the one for this page of a path."""
    seen = 0

    def is_it(asked: Asked) -> bool:
        nonlocal seen
        seen += asked.path == path
        return asked.path == path and seen == number

    return is_it


def at(api: Api, when: Callable[[Asked], bool], act: Callable[[], None]) -> None:
    """Do something, once, while the API answers the first request that `when` picks."""
    done = False

    def before(asked: Asked) -> None:
        nonlocal done
        if not done and when(asked):
            done = True
            act()

    api.before = before
