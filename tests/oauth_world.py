"""A world whose source is an API with a token endpoint: for tests of logins that workers renew."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID

import yaml

from cli import credentials
from schemas.jobs import Job
from schemas.runs import Run, RunKind, RunOptions
from schemas.secret import Secret
from storage import connections, resources, runs
from storage.runs import Subject
from tests.rest_api import Api, Issuer
from tests.world import OPERATOR, World
from workers import run_sync

MANIFEST: dict[str, Any] = {
    "version": "1",
    "name": "shop",
    "url_base": "http://127.0.0.1:{{ config.port }}",
    "parameters": {"port": {}, "site": {"default": "x"}},
    "authenticator": {
        "type": "OAuthAuthenticator", "grant_type": "authorization_code",
        "token_refresh_endpoint": "http://127.0.0.1:{{ config.port }}/token",
        "authorization_endpoint": "http://127.0.0.1:{{ config.port }}/authorize",
        "authorization_parameters": {"access_type": "offline"},
        "client_id": "app", "scopes": ["orders:read"],
    },
    "error_handler": {"max_retries": 0},
    "check": {"stream_names": ["orders"]},
    "streams": {
        "orders": {
            "path": "/all/orders", "primary_key": ["id"], "schema": {"id": "integer"}, "raw": False,
        },
    },
}  # fmt: skip

#: What an operator could have stored: the access token has ended.
EXPIRED = {"refresh_token": "refresh-canary-0", "access_token": "1000000000 access-canary-old"}


class OAuthWorld:
    """Connections c0, c1, … from one login to files."""

    def __init__(self, world: World, api: Api, count: int = 1) -> None:
        self.world, self.api, self.issuer = world, api, Issuer(api)
        self.names = [f"c{n}" for n in range(count)]
        api.tables["orders"] = [{"id": 1}, {"id": 2}]
        root = world.directory / "root"
        root.mkdir()
        world.deps.settings.__dict__["files_root"] = root
        world.deps = replace(world.deps, policy=world.deps.settings.link_policy())
        world.account()
        self.manifest = world.directory / "shop.yaml"
        self.manifest.write_text(json.dumps(MANIFEST))

    def document(self, secrets: dict[str, str] | None = None, **parameters: str) -> Path:
        given = {
            "client_secret": self.issuer.client[1],
            **(EXPIRED if secrets is None else secrets),
        }
        for field, value in given.items():
            (self.world.directory / f"{field}.txt").write_text(value)
        config = {
            "manifest": str(self.manifest),
            "parameters": {"port": self.api.port, **parameters},
        }
        written = {
            "account": "acme",
            "resources": {
                "shop": {
                    "kind": "rest", "config": config, "runs_max": 100,
                    "secret": {field: {"file": f"{field}.txt"} for field in given},
                },
                "lake": {
                    "kind": "files", "config": {"path": "lake", "format": "jsonl"}, "runs_max": 100,
                },
            },
            "connections": {
                name: {
                    "source": "shop", "destination": "lake", "schedule": {"every": "1h"},
                    "target": {"schema": name}, "streams": {"shop.orders": {"mode": "replace"}},
                }
                for name in self.names
            },
        }  # fmt: skip
        path = self.world.directory / "oauth.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    def apply(self, secrets: dict[str, str] | None = None, **parameters: str) -> None:
        self.world.apply_file(self.document(secrets, **parameters))
        self.world.deps.heartbeat.beat()
        self.world.control.act("UPDATE workers SET slots = 100")

    def enqueue(self, name: str) -> UUID:
        with self.world.cli.inside() as (tx, _, _name):
            subject = connections.subject(connections.get(tx, name))
            return runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR).run_id

    def ask(self, kind: RunKind = RunKind.TEST) -> UUID:
        with self.world.cli.inside() as (tx, account, _name):
            found = resources.get(tx, "shop")
            subject = Subject(found.resource_id, account.account_id, found.resource_id)
            return runs.enqueue(tx, subject, kind, RunOptions(), OPERATOR).run_id

    def sync(self, name: str = "c0") -> Run:
        run_id = self.enqueue(name)
        self.world.step()
        return self.world.run(run_id)

    def jobs(self) -> tuple[list[UUID], list[Job]]:
        """Ask for a run of every connection; return the runs and their jobs."""
        asked = [self.enqueue(name) for name in self.names]
        jobs = self.world.dispatch()
        while len(jobs) < len(asked):
            jobs += self.world.dispatch()
        return asked, jobs

    def rotate(self, field: str, value: str, shell: Any) -> None:
        file = self.world.directory / "new.txt"
        file.write_text(value)
        code, _, err = shell("resource", "rotate", "shop", "--secret-file", f"{field}={file}")
        assert code == 0, err

    def versions(self) -> dict[str, int]:
        with self.world.cli.inside() as (tx, _, _name):
            return resources.get(tx, "shop").secret_versions

    def states(self) -> dict[str, tuple[str, str | None]]:
        with self.world.cli.inside() as (tx, _, _name):
            return {c.spec.name: (c.state, c.state_reason) for c in connections.listing(tx)}

    def count(self, action: str) -> int:
        return self.world.events().count(action)


def work(world: World, jobs: Sequence[Job]) -> None:
    """Execute jobs at once, a thread each."""
    threads = [Thread(target=run_sync.execute, args=(job, world.deps)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.deps.logs.flush()


def forked(world: World, act: Any) -> int:
    """Do something in a process of its own, with connections of its own; return its pid."""
    world.control.disconnect()
    world.deps.heartbeat.drop_link()
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - nothing of pytest may run in the child
        os._exit(1)


def ended(pid: int) -> int:
    """Wait for a process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def store(world: World, field: str, value: str) -> None:
    """Store a secret of the shop as `resource rotate` does."""
    with world.cli.inside() as (tx, account, _name):
        resources.lock(tx, "shop")
        found = resources.get(tx, "shop")
        credentials.store(
            world.cli, tx, account, credentials.open_keyring(world.cli),
            resource_id=found.resource_id, field=field,
            version=found.secret_versions.get(field, 0) + 1, secret=Secret(value),
        )  # fmt: skip
