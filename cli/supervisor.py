"""Keeps a scheduler and workers running on this machine and restarts what dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from schemas.errors import StartRefused
from schemas.start import EXIT_REFUSED

#: A child that dies is started again after so long; doubled up to the longest while it keeps dying.
_RESTART_FIRST_S = 0.5
_RESTART_LONGEST_S = 15.0
#: A child that lived so long is healthy: its next death starts from the first delay again.
_HEALTHY_AFTER_S = 30.0


@dataclass(slots=True)
class Child:
    """One process of ours, and when it may be started (again)."""

    name: str
    module: str
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_after: float = 0.0
    delay_s: float = _RESTART_FIRST_S

    def start(self, log: Path) -> None:
        """Start the process; its output goes to `log`, its environment carries no secret."""
        with log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", self.module],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(self.environment),
            )
        self.started_at = time.monotonic()

    def died(self) -> int | None:
        """Return the exit code once, when the process has ended since the last look."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is None:
            return None
        self.process = None
        lived = time.monotonic() - self.started_at
        healthy = lived > _HEALTHY_AFTER_S
        self.delay_s = _RESTART_FIRST_S if healthy else min(self.delay_s * 2, _RESTART_LONGEST_S)
        self.start_after = time.monotonic() + self.delay_s
        return code


class Supervisor:
    """Runs children until told to stop. Use `tick()` in a loop, or `run()`."""

    def __init__(self, children: list[Child], logs: Path, say: Callable[[str], None]) -> None:
        self.children = children
        self._logs = logs
        self._say = say

    def tick(self) -> None:
        """Start what should run and does not; StartRefused if a child refuses its configuration."""
        for child in self.children:
            code = child.died()
            if code == EXIT_REFUSED:
                raise StartRefused([f"{child.name}: see {self.log_of(child)}"])
            if code is not None:
                self._say(f"{child.name} ended ({_named(code)}); starting it again")
            if child.process is None and time.monotonic() >= child.start_after:
                child.start(self.log_of(child))

    def log_of(self, child: Child) -> Path:
        """Return the file that holds a child's output."""
        return self._logs / f"{child.name}.log"

    def run(self, stop: Event) -> None:
        """Supervise until `stop` is set, then end the children in order."""
        try:
            while not stop.is_set():
                self.tick()
                stop.wait(0.2)
        finally:
            self.stop()

    def stop(self, grace_s: float = 30.0) -> None:
        """Ask all children to drain; kill what has not ended within the grace."""
        living = [c.process for c in self.children if c.process is not None]
        for process in living:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        for process in living:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for child in self.children:
            child.process = None


def _named(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def child_environment(data_dir: Path, **extra: str) -> dict[str, str]:
    """Return an environment without secrets: children read those from the data directory's file."""
    kept = {k: v for k, v in os.environ.items() if k in {"PATH", "HOME", "LANG", "TZ", "TMPDIR"}}  # noqa: TID251 - passing on four harmless variables
    return {**kept, "SYNCWARD_DATA_DIR": str(data_dir), "PYTHONUNBUFFERED": "1", **extra}
