"""A whole Syncward and two Postgres clusters in one directory, for benchmarks to measure."""

import os
import resource
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from embedded.daemons import scrubbed_environment
from embedded.postgres import Cluster
from schemas.records import StreamResult
from schemas.runs import FINAL_STATES, Run, RunKind, RunOptions, RunState
from storage import accounts, connections, outputs, runs

HERE = Path(__file__).parent
#: Durable, and large enough that no checkpoint falls into a run. Vacuuming is done between the
#: runs: by itself it would begin in some contestant's.
SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "1h",
    "autovacuum": "off",
}
_MAKE_CERTIFICATES = HERE.parent / "deploy" / "tls" / "make-certificates.sh"
#: The one host of this machine that a certificate can be made out to.
TLS_HOST = "localhost"


@dataclass(slots=True)
class Usage:
    """What a piece of work cost."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the client processes; the servers are not counted
    memory_mb: float = 0.0  # the largest PSS seen
    inside_seconds: float = 0.0  # of ours: from the claim of the run to its end
    server_cpu_seconds: float = 0.0  # of source and destination together


@dataclass(frozen=True, slots=True)
class Link:
    """A connection of ours: one stream of `public` into a schema, over TLS or not."""

    name: str
    stream: str  # its specification, as a document has it
    table: str = "events"
    tls: bool = False

    @property
    def target(self) -> str:
        return f"ours_{self.name}"


class Lab:
    """Source `events`, a destination, and scheduler, sealer and worker as processes."""

    def __init__(self, root: Path, *, bindir: Path | None = None) -> None:
        """Start the servers. With a `bindir` source and destination are its programs, with TLS."""
        self.root = root
        self.authority = certificates(root) if bindir else None
        self.source = self._cluster("source", bindir)
        self.destination = self._cluster("destination", bindir)
        self.cli = Cli(account="bench")
        self.instance = dev.start(root / "syncward", self.cli.principal, guard_parent=True)
        self.cli.__dict__["settings"] = dev.settings(self.instance)
        self.supervisor = Supervisor(self.instance.children(), self.instance.log_dir, print)
        self._stop = Event()
        self._thread = Thread(target=self.supervisor.run, args=(self._stop,), daemon=True)

    def _cluster(self, name: str, bindir: Path | None) -> Cluster:
        tls = {}
        home = self.root / name
        if bindir:
            home.mkdir(mode=0o700)
            tls = {
                "ssl": "on",
                "ssl_cert_file": f"{home}/tls.crt",
                "ssl_key_file": f"{home}/tls.key",
            }
        made = Cluster(home, settings={**SETTINGS, **tls}, bindir=bindir, guard_parent=True)
        for kind in ("crt", "key") if bindir else ():
            shutil.copy(self.root / "certificates" / f"{TLS_HOST}.{kind}", home / f"tls.{kind}")
            (home / f"tls.{kind}").chmod(0o600)
            made._own(home / f"tls.{kind}")  # noqa: SLF001 - the server reads it as its own user
        return made.start()

    def start(self, rows: int, links: Sequence[Link]) -> None:
        """Fill the source, apply the document, start the processes."""
        self.psql(self.source, "-v", f"n={rows}", "-f", str(HERE / "dataset.sql"))
        with self.cli.transaction() as tx:
            accounts.create(tx, "bench", company="", plan="unlimited", principal=self.cli.principal)
        self.define(links)
        self._thread.start()

    def define(self, links: Sequence[Link]) -> None:
        """Apply a document with these connections."""
        lines = ["account: bench", "resources:"]
        for tls in sorted({link.tls for link in links}):
            for name, cluster in (("shop", self.source), ("lake", self.destination)):
                lines.append(self._resource(name, cluster, tls=tls))
        lines.append("connections:")
        for link in links:
            end = "_tls" if link.tls else ""
            lines.append(
                f"  {link.name}: {{source: shop{end}, destination: lake{end}, schedule: manual, "
                f"target: {{schema: {link.target}}}, "
                f"streams: {{public.{link.table}: {link.stream}}}}}"
            )
        path = self.root / "bench.yaml"
        path.write_text("\n".join(lines), encoding="utf-8")
        make_so(self.cli, path, write=True)

    def _resource(self, name: str, cluster: Cluster, *, tls: bool) -> str:
        password = self.login(cluster, name)
        link = f"host: {cluster.host}, sslmode: disable"
        if tls:
            link = f"host: {TLS_HOST}, sslmode: verify-full, sslrootcert: {self.authority}"
        return (
            f"  {name}{'_tls' if tls else ''}: {{kind: postgres, config: {{{link}, "
            f"port: {cluster.port}, database: postgres, user: {name}}}, "
            f"secret: {{password: {{file: {password.name}}}}}}}"
        )

    def login(self, cluster: Cluster, name: str) -> Path:
        """Return the file with a login's password, making both the first time."""
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

    def one(self, cluster: Cluster, query: str) -> tuple[object, ...]:
        """Return the one row of a query."""
        with self.session(cluster) as db:
            row = db.execute(query).fetchone()
        if row is None:
            raise RuntimeError(f"no row: {query}")
        return row

    def settle(self) -> None:
        """Write out what earlier work left in memory, so that it is not paid for later."""
        for cluster in (self.source, self.destination):
            self.act(cluster, "CHECKPOINT")

    def server_cpu_seconds(self) -> float:
        """Return the processor time of source and destination since they were started."""
        pids = (self.source.pid, self.destination.pid)
        return sum(tree_cpu_seconds(pid) for pid in pids if pid is not None)

    def by_hand(
        self, query: str, *, before: Sequence[str], into: str, after: Sequence[str]
    ) -> Usage:
        """Pipe psql COPY into psql COPY; the writer has its statements before and after that."""
        copy = [*before, f"COPY {into} FROM STDIN (FORMAT binary)", *after]
        writer = ["-X", "-q", "-1", "-v", "ON_ERROR_STOP=1"]
        for statement in copy:
            writer += ["-c", statement]
        return measured(
            self.source.tool("psql", "-X", "-q", "-c", f"COPY ({query}) TO STDOUT (FORMAT binary)"),
            self.destination.tool("psql", *writer),
            log=self.root / "psql.log",
        )

    def run(self, connection: str) -> tuple[Run, StreamResult, Usage]:
        """Ask for a run as an operator would, wait for its end; RuntimeError unless it succeeds."""
        pid = self.worker_pid
        cpu, started = cpu_seconds(pid), time.monotonic()
        with Watch([pid]) as watch:
            with self.cli.inside() as (tx, _, _name):
                found = connections.get(tx, connection)
                asked = runs.enqueue(
                    tx, connections.subject(found), RunKind.SYNC, RunOptions(),
                    self.cli.principal,
                )  # fmt: skip
            run = self._ended(asked.run_id)
        usage = Usage(time.monotonic() - started, cpu_seconds(pid) - cpu, watch.memory_mb)
        if run.state is not RunState.SUCCEEDED:
            raise RuntimeError(f"{run.state}: {run.error}")
        if run.started_at and run.finished_at:
            usage.inside_seconds = (run.finished_at - run.started_at).total_seconds()
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
def lab(rows: int, links: Sequence[Link], *, bindir: Path | None = None) -> Iterator[Lab]:
    """Build a lab, and take it away at the end."""
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="syncward-bench-")))
        made = Lab(root, bindir=bindir)
        stack.callback(made.close)
        made.start(rows, links)
        yield made


def certificates(root: Path) -> Path:
    """Make an authority and a certificate as docs/profiles.md says; return the authority's file."""
    directory = root / "certificates"
    subprocess.run([_MAKE_CERTIFICATES, directory, TLS_HOST], check=True, stdout=subprocess.DEVNULL)
    return directory / "ca.crt"


def measured(
    *commands: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Usage:
    """Run a pipe of processes; return what they cost with all that they start.

    RuntimeError if one fails. Its words stay in `log`: they may quote a login.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    with log.open("ab") as words:
        for number, command in enumerate(commands, 1):
            process = subprocess.Popen(
                command,
                stdin=processes[-1].stdout if processes else subprocess.DEVNULL,
                stdout=words if number == len(commands) else subprocess.PIPE,
                stderr=words,
                env=dict(environment or scrubbed_environment()),
                cwd=directory,
            )
            if processes and (pipe := processes[-1].stdout):
                pipe.close()  # the next one holds it; when that ends, this one is to notice
            processes.append(process)
        with Watch([process.pid for process in processes]) as watch:
            codes = [process.wait() for process in reversed(processes)]
    spent = time.monotonic() - started
    if any(codes):
        raise RuntimeError(f"{Path(commands[-1][0]).name} ended with {max(codes)}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return Usage(spent, cpu, watch.memory_mb)


class Watch:
    """Samples the memory of processes, and of those that they start, until it is left."""

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
            self.memory_mb = max(self.memory_mb, sum(map(tree_pss_mb, self._pids)))
            if self._stop.wait(0.05):
                return


def tree_pss_mb(pid: int) -> float:
    """Return the memory of a process and of all that it has started."""
    total = pss_mb(pid)
    with suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(tree_pss_mb(int(child)) for child in children.read_text().split())
    return total


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


def tree_cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and of all that it has started, also of the dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return 0.0  # it has just ended: its parent has its time now
    ticks = sum(map(int, stat.rsplit(") ", 1)[1].split()[11:15]))
    children = (int(child) for text in lists for child in text.split())
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(tree_cpu_seconds, children))
