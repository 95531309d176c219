"""What the chaos run attacks: servers, processes, accounts with connections, rows that change."""

import json
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from threading import Event, Thread
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from cli.apply import make_so
from cli.context import Cli
from cli.supervisor import child_environment
from crypto import keyring as keyrings
from embedded.daemons import HOST, free_port
from embedded.postgres import Cluster
from embedded.valkey import Server
from schemas.audit import Principal
from schemas.runs import RunKind, RunOptions
from schemas.settings import DEV_ENV_FILE, Settings
from schemas.start import EXIT_REFUSED
from storage import accounts, connections, migrate, runs
from storage.roles import create_login
from tests.faults import recording
from tests.faults.history import Outage, Stream
from tests.world import Control, Pair

OPERATOR = Principal("operator", "chaos")
LEASE_S = 3
#: The instance's cap: fewer than there are connections, so that accounts compete.
RUNS_MAX = 6
#: Accounts whose backlogs must be served equally, and one whose plan allows two runs at once.
EQUALS = ("ada", "bob", "cyd")
CAPPED, CAP = "dot", 2
ACCOUNTS = (*EQUALS, CAPPED)
RESTART_AFTER_S = 0.3
_STARTED = re.compile(r"worker_started worker=(\S+)")

#: connection -> its schedule and streams; `{a}` is the account.
CONNECTIONS = {
    "items": ("{every: 2s}", {"{a}_items": "{mode: merge, key: [id], cursor: xmin}"}),
    "log": ("{every: 3s}", {"{a}_log": "{mode: append, cursor: xmin}"}),
    "wide": (
        "manual",
        {"{a}_wide": "{mode: replace, key: [id]}", "{a}_slow": "{mode: replace, key: [id]}"},
    ),
    "both": (
        "manual",
        {
            "{a}_left": "{mode: merge, key: [id], cursor: xmin}",
            "{a}_right": "{mode: merge, key: [id], cursor: xmin}",
        },
    ),
}
#: A view that takes its time in the middle of a copy, so that faults meet runs.
SLOW = (
    "CREATE VIEW {a}_slow AS SELECT id, v, n FROM {a}_right "
    "WHERE id % 100 <> 0 OR pg_sleep(0.3) IS NOT NULL"
)
#: table -> how many rows at first, and how wide.
TABLES = {"items": (2_000, 20), "log": (500, 20), "left": (500, 20), "right": (500, 20)}
WIDE = (9_000, 900)  # of the first account: over 8 MB, so that there is a middle to be killed in


@dataclass
class Program:
    """One process of ours; started again shortly after it has died."""

    name: str
    module: str
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    died_at: float = float("-inf")
    log_is_full: bool = False

    @property
    def pid(self) -> int | None:
        return None if self.process is None or self.process.poll() is not None else self.process.pid

    def tend(self) -> None:
        """Start what is not running; a refused start is a defect of the arena."""
        if self.process is not None and self.process.poll() is not None:
            if self.process.returncode == EXIT_REFUSED:
                raise RuntimeError(f"{self.name} refused to start; see {self.log}")
            self.process, self.died_at = None, time.monotonic()
        if self.process is None and time.monotonic() - self.died_at > RESTART_AFTER_S:
            place = "/dev/full" if self.log_is_full else self.log
            with open(place, "ab") as output:  # noqa: PTH123 - a device or a file
                self.process = subprocess.Popen(
                    [sys.executable, "-m", self.module],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    env=dict(self.environment),
                )  # fmt: skip

    def worker_id(self) -> str | None:
        """Who this process is in the database, as its log says."""
        found = _STARTED.findall(self.log.read_text()) if self.log.exists() else []
        return found[-1] if found and not self.log_is_full else None


@dataclass
class Arena:
    """Everything of one seed, below one directory."""

    root: Path
    seed: int
    workers: int = 3
    schedulers: int = 2
    lost_leases_max: int = 100
    tablespace: Path | None = None
    programs: list[Program] = field(default_factory=list)
    clis: dict[str, Cli] = field(default_factory=dict)
    connection_ids: dict[str, UUID] = field(default_factory=dict)  # account/name -> id
    account_ids: dict[str, UUID] = field(default_factory=dict)
    asked: set[UUID] = field(default_factory=set)
    secrets: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    _stop: Event = field(default_factory=Event)
    _threads: list[Thread] = field(default_factory=list)
    failed: list[BaseException] = field(default_factory=list)

    # ── servers ──────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Bring up the servers and the instance; no processes of ours yet."""
        kept = {"synchronous_commit": "on"}  # a kill of the server must not lose what it promised
        self.base = Cluster(
            self.root / "control", durable=False, settings=kept, guard_parent=True
        ).start()
        self.data = Cluster(
            self.root / "data", durable=False, settings=kept, guard_parent=True
        ).start()
        self.valkey = Server(self.root / "valkey", durable=False, guard_parent=True).start()
        self._make_control()
        self._make_data()
        self._make_accounts()
        self._make_programs()

    def _make_control(self) -> None:
        with self._admin(self.base) as admin:
            admin.execute("CREATE DATABASE control")
        self.control = Control(self.base, "control", secrets.token_urlsafe(12))
        migrate.upgrade(self.control.admin_url, OPERATOR)
        with self.control.admin_engine().begin() as tx:
            create_login(
                tx,
                "dev",
                password=self.control.password,
                roles=("scheduler", "worker", "sealer", "operator"),
            )
        with psycopg.connect(self.control.admin_url, autocommit=True) as link:
            recording.record_moves(link)

    @contextmanager
    def _admin(self, cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(
            host=HOST, port=cluster.port, user=cluster.superuser, password=cluster.password,
            dbname="postgres", autocommit=True,
        ) as admin:  # fmt: skip
            yield admin

    def _make_data(self) -> None:
        logins = {name: secrets.token_urlsafe(12) for name in ("reader", "writer")}
        with self._admin(self.data) as admin:
            for name, password in logins.items():
                admin.execute(
                    sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                        sql.Identifier(name), sql.Literal(password)
                    )
                )
            admin.execute("GRANT pg_read_all_stats TO reader")
            admin.execute("CREATE DATABASE shop")
            where = sql.SQL("")
            if self.tablespace is not None:
                place = sql.Literal(str(self.tablespace))
                admin.execute(sql.SQL("CREATE TABLESPACE small LOCATION {}").format(place))
                where = sql.SQL(" TABLESPACE small")
            admin.execute(sql.SQL("CREATE DATABASE lake") + where)
            admin.execute("GRANT CREATE ON DATABASE lake TO writer")
        self.pair = Pair(self.data, "shop", "lake", logins)
        with self.pair.connect("source") as shop:
            for account in ACCOUNTS:
                wide = WIDE if account == EQUALS[0] else (300, 100)
                for table, (rows, width) in {**TABLES, "wide": wide}.items():
                    shop.execute(
                        f"CREATE TABLE {account}_{table} (id bigserial PRIMARY KEY, v text, n int)"
                    )
                    shop.execute(
                        f"INSERT INTO {account}_{table} (v, n) "
                        f"SELECT rpad('v' || g, {width}, 'x'), 0 FROM generate_series(1, {rows}) g"
                    )
                shop.execute(SLOW.format(a=account))
            shop.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")

    def _make_accounts(self) -> None:
        operator_file, self.worker_key = keyrings.init(self.root / "keys")
        self.settings = Settings(
            profile="development", database_url=self.control.url, redis_url=self.valkey.url,
            keyring=str(operator_file), data_dir=self.root, resource_runs_max=4,
        )  # fmt: skip
        (self.root / DEV_ENV_FILE).write_text(
            "SYNCWARD_PROFILE=development\n"
            f"SYNCWARD_DATABASE_URL={self.control.url}\nSYNCWARD_REDIS_URL={self.valkey.url}\n"
        )
        for account in ACCOUNTS:
            cli = Cli(account=account)
            cli.__dict__["settings"] = self.settings
            cli.__dict__["engine"] = self.control.engine("operator")
            self.clis[account] = cli
            with cli.transaction() as tx:
                accounts.create(tx, account, company="", plan="unlimited", principal=OPERATOR)
            make_so(cli, self._document(account), write=True)
        self.control.act(
            "UPDATE account_queues SET runs_max = :cap WHERE account_id = "
            "(SELECT id FROM accounts WHERE name = :name)", cap=CAP, name=CAPPED,
        )  # fmt: skip
        for account, name, account_id, connection in self.control.all(
            "SELECT a.name, c.name, a.id, c.id FROM connections c JOIN accounts a "
            "ON a.id = c.account_id"
        ):
            self.connection_ids[f"{account}/{name}"] = connection
            self.account_ids[account] = account_id
        self.secrets = {
            **{f"password of {role}": self.pair.secret(role)["password"]
               for role in ("source", "destination")},
            "password of the control database": self.control.password,
        }  # fmt: skip

    def _document(self, account: str) -> Path:
        for role in ("source", "destination"):
            (self.root / f"{role}.pw").write_text(self.pair.secret(role)["password"])
        resources = {
            name: {"kind": "postgres", "config": self.pair.config(role),
                   "secret": {"password": {"file": f"{role}.pw"}}}
            for name, role in (("shop", "source"), ("lake", "destination"))
        }  # fmt: skip
        lines = [f"account: {account}", f"resources: {json.dumps(resources)}", "connections:"]
        for name, (schedule, streams) in CONNECTIONS.items():
            specs = ", ".join(f"public.{s.format(a=account)}: {m}" for s, m in streams.items())
            lines.append(
                f"  {name}: {{source: shop, destination: lake, schedule: {schedule}, "
                f"target: {{schema: {account}}}, streams: {{{specs}}}}}"
            )
        path = self.root / f"{account}.yaml"
        path.write_text("\n".join(lines))
        return path

    # ── processes ────────────────────────────────────────────────────────────────────────────

    def _make_programs(self) -> None:
        logs = self.root / "logs"
        logs.mkdir()
        modules = ["scheduler"] * self.schedulers + ["workers"] * self.workers
        self.ports = [free_port(None) for _ in modules]
        common = {
            "SYNCWARD_LEASE": f"{LEASE_S}s", "SYNCWARD_HEARTBEAT": "1s",
            "SYNCWARD_DRAIN_GRACE": "5s", "SYNCWARD_WORKER_THREADS": "2",
            "SYNCWARD_RUNS_MAX": str(RUNS_MAX), "SYNCWARD_KEYRING": str(self.worker_key),
            "SYNCWARD_LOST_LEASES_MAX": str(self.lost_leases_max),
        }  # fmt: skip
        for number, (module, port) in enumerate(zip(modules, self.ports, strict=True)):
            name = f"{module}-{number}"
            environment = child_environment(self.root, SYNCWARD_METRICS_PORT=str(port), **common)
            self.programs.append(
                Program(name, f"{module}.process", environment, logs / f"{name}.log")
            )

    def of(self, module: str) -> list[Program]:
        return [p for p in self.programs if p.name.startswith(module)]

    def run_programs(self) -> None:
        self._thread(self._tend)

    def _tend(self) -> None:
        while not self._stop.wait(0.1):
            for program in self.programs:
                program.tend()

    def _thread(self, work: Any) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # the main thread raises it
                self.failed.append(error)
                raise

        thread = Thread(target=guarded, daemon=True)
        thread.start()
        self._threads.append(thread)

    def stop_programs(self) -> None:
        """Drain everything, as a deploy would; what does not end is killed and reported."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=20)
        living = [p.process for p in self.programs if p.process is not None]
        for process in living:
            process.terminate()
        for process in living:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.failed.append(RuntimeError(f"process {process.pid} did not end on SIGTERM"))

    def watch_schedulers(self, outages: list[Outage]) -> None:
        """Write down when no scheduler answered: killed, frozen, or still starting."""
        self._thread(lambda: self._watch(outages))

    def _watch(self, outages: list[Outage]) -> None:
        seen = now()
        while not self._stop.wait(0.2):
            if any(answers(port) for port in self.ports[: self.schedulers]):
                at = now()
                if at - seen > timedelta(seconds=1):
                    outages.append(Outage(seen, at + timedelta(seconds=1)))  # until its first tick
                seen = at

    def wait_until_up(self) -> None:
        """Wait until every process of ours answers."""
        deadline = time.monotonic() + 120
        while not all(answers(port) for port in self.ports):
            if time.monotonic() > deadline or self.failed:
                raise RuntimeError(f"not every process came up: {self.failed}")
            time.sleep(0.1)

    # ── people and applications ──────────────────────────────────────────────────────────────

    def change_rows(self, random: Random, quiet: Event) -> None:
        """Small transactions on the source, some of them open for a while."""
        self._thread(lambda: self._change(random, quiet))

    def _change(self, random: Random, quiet: Event) -> None:
        shop: psycopg.Connection[Any] | None = None
        while not (quiet.is_set() or self._stop.is_set()):
            try:
                if shop is None or shop.closed:
                    shop = self.pair.connect("source", autocommit=False)
                _change_once(shop, random)
            except (psycopg.Error, OSError):
                shop = None
                time.sleep(0.1)
        if shop is not None:
            shop.close()

    def ask(self, random: Random, quiet: Event) -> None:
        """Operators want runs, now and again all of them at once."""
        self._thread(lambda: self._ask(random, quiet))

    def _ask(self, random: Random, quiet: Event) -> None:
        while not (quiet.is_set() or self._stop.is_set()):
            wave = random.random() < 0.5
            names = sorted(self.connection_ids)
            for name in names if wave else random.sample(names, 2):
                with suppress(Exception):  # an answer that did not come promised nothing
                    self.enqueue(name)
            time.sleep(random.uniform(0.2, 1.0))

    def enqueue(self, name: str) -> UUID:
        account, short = name.split("/")
        with self.clis[account].inside() as (tx, _, _name):
            subject = connections.subject(connections.get(tx, short))
            promised = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR).run_id
        self.asked.add(promised)
        return promised

    # ── what is there ────────────────────────────────────────────────────────────────────────

    def streams(self) -> list[Stream]:
        """Compare every stream on both sides, row by row, as multisets."""
        found = []
        with self.pair.connect("source") as shop, self.pair.connect("destination") as lake:
            for name, connection in self.connection_ids.items():
                account, short = name.split("/")
                for stream in CONNECTIONS[short][1]:
                    table = stream.format(a=account)
                    rows = table.replace("_slow", "_right")  # the same rows, without its sleep
                    here = shop.execute(f"SELECT id, v, n FROM {rows}").fetchall()
                    there = lake.execute(f"SELECT id, v, n FROM {account}.{table}").fetchall()
                    found.append(
                        Stream(connection, table, _minus(here, there), _minus(there, here))
                    )
        return found

    def close(self) -> None:
        """End whatever is left, servers last."""
        self._stop.set()
        for program in self.programs:
            if program.process is not None:
                program.process.kill()
                program.process.wait()
        self.control.dispose()
        self.pair.close()
        self.valkey.stop()
        self.data.stop()
        self.base.stop()


def answers(port: int) -> bool:
    """Say whether a process serves its metrics; one that is frozen does not."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=1) as answer:
            return bool(answer.read())
    except OSError:
        return False


def _minus(some: list[tuple[Any, ...]], others: list[tuple[Any, ...]]) -> int:
    return sum((Counter(some) - Counter(others)).values())


def _change_once(shop: psycopg.Connection[Any], random: Random) -> None:
    account = random.choice(ACCOUNTS)
    with shop.transaction():
        for table in random.sample(("items", "left", "right"), 2):
            top = TABLES[table][0]
            ids = [random.randint(1, top) for _ in range(20)]
            shop.execute(f"UPDATE {account}_{table} SET n = n + 1 WHERE id = ANY(%s)", (ids,))
        shop.execute(
            f"INSERT INTO {account}_log (v, n) SELECT 'more', g FROM generate_series(1, 5) g"
        )
        if random.random() < 0.1:
            shop.execute(f"UPDATE {account}_wide SET n = n + 1 WHERE id % 10 = 0")
            time.sleep(random.uniform(0, 0.3))
    time.sleep(random.uniform(0.01, 0.1))


def now() -> datetime:
    return datetime.now(UTC)
