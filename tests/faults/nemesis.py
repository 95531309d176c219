"""The faults, each a small function, drawn by a seeded die and written down as they are made."""

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from threading import Timer
from uuid import UUID

import psycopg

from embedded.postgres import Cluster
from schemas.errors import SyncwardError
from schemas.jobs import QUEUE, Job
from storage import runs
from tests.faults.arena import LEASE_S, OPERATOR, Arena, Program, now
from tests.faults.history import Facts, Kill, Outage
from workers.enqueue import JobQueue, open_client

#: After the database came back the reaper waits so long before it takes a lease from anybody.
AMNESTY = timedelta(seconds=1.5 * LEASE_S + 1)
#: Looks for a run to hit before a fault takes what there is.
WAIT_FOR_PREY = 40
#: Bytes that a file of the destination may have while its disk is "full": more than a WAL segment.
FILE_LIMIT = 16 * 1024 * 1024


@dataclass
class Nemesis:
    """Makes one fault after the other; `heal()` undoes what lasts."""

    arena: Arena
    random: Random
    facts: Facts
    made: Counter[str] = field(default_factory=Counter)
    _timers: list[Timer] = field(default_factory=list)
    _stopped: set[int] = field(default_factory=set)
    _filler: Path | None = None

    def strike(self) -> None:
        """Make one fault. One that finds nothing to hit is not counted."""
        self.revive()
        names, weights = zip(*((f, w) for f, w in FAULTS.items()), strict=True)
        (fault,) = self.random.choices(names, weights)
        try:
            if fault(self):
                self.made[fault.__name__.removeprefix("_")] += 1
        except (psycopg.Error, SyncwardError, OSError):
            pass  # a server that another fault has just taken down

    def revive(self) -> None:
        """Start servers that did not come back by themselves, as on a disk that was full then."""
        for server in (self.arena.base, self.arena.data, self.arena.valkey):
            if server.pid is None:
                with suppress(SyncwardError, OSError):
                    server.start(server.port)

    def heal(self) -> None:
        """Undo everything that lasts, until everything is up: from here on nothing is wrong."""
        self.let_go()
        for server in (self.arena.base, self.arena.data, self.arena.valkey):
            server.start(server.port)
        self.arena.wait_until_up()

    def let_go(self) -> None:
        """Resume what is frozen, free what is full."""
        for timer in self._timers:
            timer.cancel()
        for pid in list(self._stopped):
            self.resume(pid)
        self.free_disk()
        for program in self.arena.programs:
            program.log_is_full = False

    # ── helpers of the faults ────────────────────────────────────────────────────────────────

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        timer = Timer(seconds, work)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def living(self, module: str) -> Program | None:
        found = [p for p in self.arena.of(module) if p.pid and p.pid not in self._stopped]
        return self.random.choice(found) if found else None

    def busy_worker(self) -> Program | None:
        """A worker that holds a run, so that the fault hits the middle of something; or any."""
        names = {p.worker_id(): p for p in self.arena.of("workers") if p.pid}
        with psycopg.connect(self.arena.control.admin_url, autocommit=True) as link:
            for _look in range(WAIT_FOR_PREY):
                held = [row[0] for row in link.execute("SELECT worker_id FROM leases").fetchall()]
                busy = [names[w] for w in held if w in names and names[w].pid not in self._stopped]
                if busy:
                    return self.random.choice(busy)
                time.sleep(0.02)
        return self.living("workers")

    def freeze(self, program: Program) -> float:
        """SIGSTOP for longer than a lease."""
        assert program.pid is not None
        pid, seconds = program.pid, LEASE_S + self.random.uniform(0.5, 2.5)
        os.kill(pid, signal.SIGSTOP)
        self._stopped.add(pid)
        self.later(seconds, lambda: self.resume(pid))
        return seconds

    def resume(self, pid: int) -> None:
        self._stopped.discard(pid)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def outage(self, begin: datetime, after: timedelta) -> None:
        self.facts.outages.append(Outage(begin, now() + after))

    def processes(self, cluster: Cluster) -> Iterator[int]:
        """The postmaster and its children."""
        postmaster = cluster.pid
        if postmaster is None:
            return
        yield postmaster
        for status in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
                if parent == postmaster:
                    yield int(status.parent.name)

    def limit_files(self, limit: int) -> None:
        for pid in self.processes(self.arena.data):
            with suppress(OSError):
                hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, hard))

    def free_disk(self) -> None:
        if self._filler is not None:
            self._filler.unlink(missing_ok=True)
            self._filler = None
        self.limit_files(resource.RLIM_INFINITY)


def _kill_worker(nemesis: Nemesis) -> bool:
    program = nemesis.busy_worker()
    if program is None or program.pid is None:
        return False
    worker, pid = program.worker_id(), program.pid
    os.kill(pid, signal.SIGKILL)
    if worker is not None:
        nemesis.facts.kills.append(Kill(worker, now()))
    return True


def _kill_scheduler(nemesis: Nemesis) -> bool:
    program = nemesis.living("scheduler")
    if program is None or program.pid is None:
        return False
    os.kill(program.pid, signal.SIGKILL)
    return True


def _freeze_worker(nemesis: Nemesis) -> bool:
    program = nemesis.busy_worker()
    if program is None:
        return False
    nemesis.freeze(program)
    return True


def _freeze_scheduler(nemesis: Nemesis) -> bool:
    program = nemesis.living("scheduler")
    if program is None:
        return False
    seconds = nemesis.freeze(program)  # it may hold locks that the other one waits for
    nemesis.outage(now(), timedelta(seconds=seconds))
    return True


def _drain_worker(nemesis: Nemesis) -> bool:
    program = nemesis.busy_worker()
    if program is None or program.pid is None:
        return False
    os.kill(program.pid, signal.SIGTERM)
    return True


def _kill_postgres(nemesis: Nemesis, cluster: Cluster) -> bool:
    pid = cluster.pid
    if nemesis.random.random() < 0.5 and pid is not None:
        os.kill(pid, signal.SIGQUIT)  # pg_ctl -m immediate
        cluster.stop()
    else:
        cluster.kill()
    cluster.start(cluster.port)
    return True


def _kill_control_database(nemesis: Nemesis) -> bool:
    begin = now()
    _kill_postgres(nemesis, nemesis.arena.base)
    nemesis.outage(begin, AMNESTY)
    return True


def _kill_data_databases(nemesis: Nemesis) -> bool:
    return _kill_postgres(nemesis, nemesis.arena.data)


def _kill_redis(nemesis: Nemesis) -> bool:
    valkey = nemesis.arena.valkey
    valkey.kill()
    time.sleep(nemesis.random.uniform(0, 0.5))
    valkey.start(valkey.port)
    return True


def _flush_redis(nemesis: Nemesis) -> bool:
    nemesis.arena.valkey.flush()
    return True


def _lose_jobs(nemesis: Nemesis) -> bool:
    """The list of messages is gone, their bodies stay: what a lost reply of Redis leaves."""
    nemesis.arena.valkey._say(f"DEL syncward:{QUEUE}")
    return True


def _repeat_jobs(nemesis: Nemesis) -> bool:
    """Deliver jobs again: those on their way, those being executed, and old ones."""
    with psycopg.connect(nemesis.arena.control.admin_url) as link:
        rows: list[tuple[UUID, int]] = link.execute(
            "SELECT run_id, greatest(dispatch - floor(random() * 2)::int, 1) FROM active_runs "
            "WHERE dispatch > 0"
        ).fetchall()
    queue = JobQueue(open_client(nemesis.arena.valkey.url))
    for run, number in rows:
        queue.send(Job(run_id=run, dispatch=number))
    queue.close()
    return bool(rows)


def _terminate_control_sessions(nemesis: Nemesis) -> bool:
    nemesis.outage(now(), timedelta(seconds=1))
    with psycopg.connect(nemesis.arena.control.admin_url) as link:
        link.execute(_TERMINATE, {"like": "syncward-control%"})
    return True


def _terminate_data_sessions(nemesis: Nemesis) -> bool:
    with nemesis.arena.pair.connect("source") as link:
        return bool(link.execute(_TERMINATE, {"like": "syncward:%"}).rowcount)


_TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
    "WHERE application_name LIKE %(like)s AND pid <> pg_backend_pid()"
)


def _cancel_run(nemesis: Nemesis) -> bool:
    with psycopg.connect(nemesis.arena.control.admin_url, autocommit=True) as link:
        rows: list[tuple[UUID, str, str]] = []
        for _look in range(WAIT_FOR_PREY):
            rows = link.execute(
                "SELECT a.run_id, n.name, a.state FROM active_runs a JOIN accounts n "
                "ON n.id = a.account_id ORDER BY (a.state = 'running') DESC, random() LIMIT 1"
            ).fetchall()
            if rows and rows[0][2] == "running":
                break
            time.sleep(0.02)
    for run, account, _state in rows:
        with nemesis.arena.clis[account].inside() as (tx, _, _name):
            runs.cancel(tx, run, OPERATOR)
    return bool(rows)


def _fill_disk(nemesis: Nemesis) -> bool:
    """The destination's disk is full for a while: really (a small file system), or by a limit."""
    place = nemesis.arena.tablespace
    if place is None:
        nemesis.limit_files(FILE_LIMIT)
    else:
        nemesis._filler = place.parent / "filler"
        with suppress(OSError), nemesis._filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65_536)
    nemesis.later(nemesis.random.uniform(0.5, 2.0), nemesis.free_disk)
    return True


def _fill_log(nemesis: Nemesis) -> bool:
    """A process starts while there is no room for a single byte of its log."""
    program = nemesis.living(nemesis.random.choice(["workers", "scheduler"]))
    if program is None or program.pid is None:
        return False
    program.log_is_full = True
    if program.name.startswith("scheduler"):
        os.kill(program.pid, signal.SIGKILL)
    nemesis.later(3.0, lambda: setattr(program, "log_is_full", False))
    return True


#: Fault -> how often, relative to the others.
FAULTS: dict[Callable[[Nemesis], bool], int] = {
    _kill_worker: 5,
    _kill_scheduler: 2,
    _freeze_worker: 3,
    _freeze_scheduler: 1,
    _drain_worker: 3,
    _kill_control_database: 1,
    _kill_data_databases: 1,
    _kill_redis: 2,
    _flush_redis: 2,
    _lose_jobs: 2,
    _repeat_jobs: 3,
    _terminate_control_sessions: 2,
    _terminate_data_sessions: 2,
    _cancel_run: 3,
    _fill_disk: 2,
    _fill_log: 1,
}
