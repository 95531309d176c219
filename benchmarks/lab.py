"""A whole Syncward and two Postgres clusters in one directory, for benchmarks to measure."""

import os
import resource
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Self
from uuid import UUID

import psycopg
from psycopg import sql

from cli import dev
from cli.apply import make_so
from cli.context import Cli
from cli.supervisor import Supervisor
from embedded.postgres import Cluster
from schemas.records import StreamResult
from schemas.runs import FINAL_STATES, Run, RunKind, RunOptions, RunState
from storage import accounts, connections, outputs, runs

HERE = Path(__file__).parent
#: Durable, and large enough that no checkpoint falls into a run.
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "checkpoint_timeout": "1h"}


@dataclass(slots=True)
class Usage:
    """What a piece of work cost."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the client processes; the servers are not counted
    memory_mb: float = 0.0  # the largest PSS seen


class Lab:
    """Source `events`, a destination, and scheduler and worker as processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = Cluster(root / "source", settings=SETTINGS, guard_parent=True).start()
        self.destination = Cluster(root / "destination", settings=SETTINGS, guard_parent=True)
        self.destination.start()
        self.cli = Cli(account="bench")
        self.instance = dev.start(root / "syncward", self.cli.principal, guard_parent=True)
        self.cli.__dict__["settings"] = dev.settings(self.instance)
        self.supervisor = Supervisor(self.instance.children(), self.instance.log_dir, print)
        self._stop = Event()
        self._thread = Thread(target=self.supervisor.run, args=(self._stop,), daemon=True)

    def start(self, rows: int, stream: str) -> None:
        """Fill the source, apply the document, start scheduler and worker."""
        self.psql(self.source, "-v", f"n={rows}", "-f", str(HERE / "dataset.sql"))
        with self.cli.transaction() as tx:
            accounts.create(tx, "bench", company="", plan="unlimited", principal=self.cli.principal)
        self.define(stream)
        self._thread.start()

    def define(self, stream: str) -> None:
        """Apply a document with this specification of the one stream."""
        lines = ["account: bench", "resources:"]
        for name, cluster in (("shop", self.source), ("lake", self.destination)):
            password = self._login(cluster, name)
            lines.append(
                f"  {name}: {{kind: postgres, config: {{host: {cluster.host}, "
                f"port: {cluster.port}, database: postgres, user: {name}, sslmode: disable}}, "
                f"secret: {{password: {{file: {password.name}}}}}}}"
            )
        lines += [
            "connections:",
            "  bench:",
            "    {source: shop, destination: lake, schedule: manual, target: {schema: bench},",
            f"     streams: {{public.events: {stream}}}}}",
        ]
        path = self.root / "bench.yaml"
        path.write_text("\n".join(lines), encoding="utf-8")
        make_so(self.cli, path, write=True)

    def _login(self, cluster: Cluster, name: str) -> Path:
        path = self.root / f"{name}.pw"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_urlsafe(18), encoding="utf-8")
            role, password = sql.Identifier(name), sql.Literal(path.read_text(encoding="utf-8"))
            with self.session(cluster) as db:
                db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, password))
                db.execute(sql.SQL("GRANT pg_read_all_stats TO {}").format(role))
                db.execute(sql.SQL("GRANT pg_read_all_data TO {}").format(role))
                db.execute(sql.SQL("GRANT CREATE ON DATABASE postgres TO {}").format(role))
        return path

    @contextmanager
    def session(self, cluster: Cluster) -> Iterator[psycopg.Connection]:
        with psycopg.connect(
            host=cluster.host, port=cluster.port, dbname="postgres",
            user=cluster.superuser, password=cluster.password, autocommit=True,
        ) as connection:  # fmt: skip
            yield connection

    def act(self, cluster: Cluster, *statements: str) -> None:
        with self.session(cluster) as db:
            for statement in statements:
                db.execute(statement)

    def psql(self, cluster: Cluster, *arguments: str) -> None:
        subprocess.run(
            cluster.tool("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", *arguments),
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def settle(self) -> None:
        """Write out what earlier work left in memory, so that it is not paid for later."""
        for cluster in (self.source, self.destination):
            self.act(cluster, "CHECKPOINT")

    def by_hand(self, query: str, into: str, *, after: str = "") -> Usage:
        """Pipe psql COPY into psql COPY, then finish with one statement."""
        reader_command = self.source.tool(
            "psql", "-X", "-q", "-c", f"COPY ({query}) TO STDOUT (FORMAT binary)"
        )
        writer_command = self.destination.tool(
            "psql",
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            f"COPY {into} FROM STDIN (FORMAT binary)",
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.monotonic()
        reader = subprocess.Popen(reader_command, stdout=subprocess.PIPE)
        writer = subprocess.Popen(writer_command, stdin=reader.stdout)
        assert reader.stdout is not None
        reader.stdout.close()
        with Watch([reader.pid, writer.pid]) as watch:
            failed = writer.wait() or reader.wait()
        if failed:
            raise RuntimeError("psql by hand failed")
        if after:
            self.psql(self.destination, "-c", after)
        spent = time.monotonic() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        return Usage(spent, cpu, watch.memory_mb)

    def run(self, **options: object) -> tuple[Run, StreamResult, Usage]:
        """Ask for a run as an operator would, wait for its end; RuntimeError unless it succeeds."""
        pid = self.worker_pid
        cpu, started = cpu_seconds(pid), time.monotonic()
        with Watch([pid]) as watch:
            with self.cli.inside() as (tx, _, _name):
                found = connections.get(tx, "bench")
                asked = runs.enqueue(
                    tx, connections.subject(found), RunKind.SYNC, RunOptions(**options),
                    self.cli.principal,
                )  # fmt: skip
            run = self._ended(asked.run_id)
        usage = Usage(time.monotonic() - started, cpu_seconds(pid) - cpu, watch.memory_mb)
        if run.state is not RunState.SUCCEEDED:
            raise RuntimeError(f"{run.state}: {run.error}")
        with self.cli.inside() as (tx, _, _name):
            return run, outputs.streams(tx, run.run_id)[0], usage

    def _ended(self, run_id: UUID) -> Run:
        while True:
            with self.cli.inside() as (tx, _, _name):
                run = runs.get(tx, run_id)
            if run.state in FINAL_STATES:
                return run
            time.sleep(0.02)

    @property
    def worker_pid(self) -> int:
        """The worker's pid, once it runs."""
        for _ in range(300):
            process = next(
                c.process for c in self.supervisor.children if c.name.startswith("worker")
            )
            if process is not None:
                return process.pid
            time.sleep(0.1)
        raise RuntimeError("the worker did not start")

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=30)
        self.cli.close()
        self.instance.stop()
        self.source.stop()
        self.destination.stop()


@contextmanager
def lab(rows: int, stream: str) -> Iterator[Lab]:
    """Build a lab, and take it away at the end."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="syncward-bench-")))
        made = Lab(root)
        stack.callback(made.close)
        made.start(rows, stream)
        yield made


class Watch:
    """Samples the memory of processes until it is left."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._stop = Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self.memory_mb = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.memory_mb = max(self.memory_mb, sum(map(pss_mb, self._pids)))
            if self._stop.wait(0.05):
                return


def pss_mb(pid: int) -> float:
    """Return a process's proportional share of memory; 0 if it is gone."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return sum(int(ln.split()[1]) for ln in rollup.splitlines() if ln.startswith("Pss:")) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the processor time a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
