"""Two versions of the code beside each other: this one, and the one before from an archive."""

import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.supervisor import child_environment
from storage import revision

ROOT = Path(__file__).parent.parent.parent
#: The packages of the version before this one; `make previous REV=…` makes it at each release, in
#: the commit after its tag. Now: c9e8858, the last with migration 0001 alone.
PREVIOUS = Path(__file__).parent / "previous.tar.gz"


#: Python knows filters from 3.11.4 on; the archive is our own either way.
_FILTER: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def unpack_previous(place: Path) -> Path:
    """Unpack the version before, which the project carries: history may not be at hand."""
    with tarfile.open(PREVIOUS) as archive:
        archive.extractall(place, **_FILTER)  # noqa: S202 - the archive is our own
    return place


def make_next(place: Path) -> Path:
    """Copy this tree and give it one more migration, which adds a column to every busy table."""
    names = "cli connectors crypto embedded scheduler schemas storage workers"
    for package in names.split():
        shutil.copytree(ROOT / package, place / package)
    number = int(revision.wanted())
    versions = place / "storage" / "migrations" / "versions"
    tables = ("active_runs", "schedules", "leases", "connections", "streams", "cursors", "runs")
    adds = "\n".join(f"ALTER TABLE {table} ADD COLUMN of_next int;" for table in tables)
    newest = next(versions.glob(f"{number:04d}_*.py"))
    (versions / f"{number + 1:04d}_next.sql").write_text(adds)
    script = newest.read_text()
    for name, old in (("down_revision", number - 1), ("revision", number)):
        script = script.replace(f'\n{name} = "{old:04d}"', f'\n{name} = "{old + 1:04d}"')
    (versions / f"{number + 1:04d}_next.py").write_text(script)
    return place


@dataclass
class Process:
    """One scheduler or worker of one version, with its output in a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def said(self) -> str:
        return f"{self.name}: {self.output()[-2500:]}"

    def id(self) -> str:
        """How a worker signs what it does."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = re.search(r"worker_started worker=(\S+)", self.output())
            if found:
                return found[1]
            assert self.popen.poll() is None, self.output()
            time.sleep(0.05)
        raise AssertionError(f"{self.name} never started\n{self.output()}")

    def drain(self, seconds: float = 40) -> int:
        self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(timeout=seconds)


@dataclass
class Version:
    """A tree of the code and what runs from it. Both versions share the environment's packages."""

    tree: Path
    data: Path
    logs: Path
    extra: dict[str, str]
    processes: list[Process] = field(default_factory=list)

    @property
    def _environment(self) -> dict[str, str]:
        return child_environment(self.data, PYTHONPATH=str(self.tree), **self.extra)

    def start(self, module: str) -> Process:
        name = f"{self.tree.name}-{module}-{len(self.processes)}"
        log = self.logs / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", f"{module}.process"],
                cwd=self.tree, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output,
            )  # fmt: skip
        self.processes.append(Process(name, popen, log))
        return self.processes[-1]

    def cli(self, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        program = "from cli.main import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=self.tree, env={**self._environment, **extra}, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip

    def stop(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.kill()
                process.popen.wait()
