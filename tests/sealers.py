"""Sealer processes against a stepped world's database."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from crypto import signing
from storage import sealing
from storage.engine import transaction
from tests.world import World

ROOT = Path(__file__).parent.parent


def until(true: Callable[[], object], seconds: float = 20.0, about: str = "it") -> Any:
    """Wait for something; return what it was."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"{about} did not happen in {seconds} s"
        time.sleep(0.02)
    return found


class SealerProcess:
    """`python -m audit.process`, with its log."""

    def __init__(self, world: World, name: str, anchors: str, *words: str, **extra: str) -> None:
        key = world.directory / "audit" / "signer.json"
        if not key.exists():
            signing.init(key)
        url = world.cli.settings.database_url
        assert url is not None
        self.log = world.directory / f"{name}.log"
        kept = {k: os.environ[k] for k in ("PATH", "HOME") if k in os.environ}  # noqa: TID251 - handed on
        environment = {
            **kept,
            "SYNCWARD_PROFILE": "development",
            "SYNCWARD_DATABASE_URL": url.get_secret_value(),
            "SYNCWARD_AUDIT_SIGNING_KEY": str(key),
            "SYNCWARD_AUDIT_ANCHORS": anchors,
            "SYNCWARD_DATA_DIR": str(world.directory / "none"),
            "SYNCWARD_LOG_FORMAT": "json",
            **extra,
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "audit.process", *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=ROOT,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def pid(self) -> int:
        return self.process.pid

    def lines(self) -> list[dict[str, Any]]:
        text = self.log.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == event]

    def wait_for(self, event: str, seconds: float = 20.0) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            assert self.process.poll() is None or self.said(event), self.log.read_text()
            return self.said(event)

        return until(found, seconds, event)[-1]

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def refused(self, seconds: float = 30.0) -> str:
        """Wait until it has ended with 78; return why."""
        assert self.process.wait(seconds) == 78, self.log.read_text()
        return "\n".join(self.said("start_refused")[-1]["reasons"])


def state(world: World) -> sealing.LogState:
    with transaction(world.control.engine("sealer")) as tx:
        return sealing.state(tx)


def events_of(world: World, action: str) -> list[dict[str, Any]]:
    rows = world.control.all(
        "SELECT body FROM audit.event WHERE action = :action ORDER BY xid, seq", action=action
    )
    return [json.loads(body) for (body,) in rows]


def committed(world: World) -> int:
    return int(str(world.control.one("SELECT count(*) FROM audit.event")))


def settled(world: World) -> bool:
    """Whether everything is sealed and published."""
    now = state(world)
    return now.size == now.published_size == committed(world)


@contextmanager
def busy(world: World) -> Iterator[None]:
    """Events all the time, from a thread."""
    from threading import Event, Thread

    from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
    from storage import audit

    stop = Event()
    event = AuditEvent(
        AuditAction.INSTANCE_READ, TargetKind.INSTANCE, audit.INSTANCE_ID, Principal("test", "t")
    )

    def write() -> None:
        while not stop.wait(0.01):
            with world.cli.transaction() as tx:
                audit.append(tx, event)

    thread = Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
