"""A whole instance in one process, stepped by hand instead of by clocks."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql
from sqlalchemy import Engine, create_engine, text

from audit.sealer import Sealer
from cli.apply import make_so
from cli.context import Cli
from cli.records import OpenedLine, Reader
from crypto import keyring as keyrings
from crypto import signing
from embedded.postgres import Cluster
from embedded.valkey import Server
from scheduler import ticks
from schemas.audit import Principal
from schemas.egress import LinkPolicy
from schemas.jobs import Job
from schemas.records import StreamResult
from schemas.runs import Claim, Run, RunKind, RunOptions
from schemas.settings import Settings
from storage import accounts, audit_tail, claims, connections, logs, outputs, runs, sealing
from storage.claims import WorkerState
from storage.engine import Process, open_engine, open_link, transaction
from storage.keystore import Keystore
from workers import run_sync
from workers.attempt import Dependencies
from workers.call_list import CallWriter, write_calls
from workers.enqueue import open_client
from workers.heartbeat import Heartbeat
from workers.key_upkeep import KeyUpkeep
from workers.quotas import SharedQuotas
from workers.records import RecordSealer, write_sealed
from workers.refusals import JobRefusals
from workers.run_log import LogWriter

OPERATOR = Principal("operator", "test")

#: For connectors that a test opens itself: on loopback, with or without TLS, as superuser too.
LOOSE = LinkPolicy(loopback=True, tls_required=False, superuser_refused=False)


@dataclass
class Control:
    """One control database and engines in each role."""

    cluster: Cluster
    database: str
    password: str
    _engines: dict[str, Engine] = field(default_factory=dict)

    @property
    def admin_url(self) -> str:
        c = self.cluster
        return f"postgresql://{c.superuser}:{c.password}@{c.host}:{c.port}/{self.database}"

    @property
    def url(self) -> str:
        c = self.cluster
        return f"postgresql://dev:{self.password}@{c.host}:{c.port}/{self.database}"

    @property
    def opening(self) -> str:
        """What SYNCWARD_EGRESS_ALLOW says where sources share the control database's server."""
        return f"{self.cluster.host}/32:{self.cluster.port}"

    def admin_engine(self) -> Engine:
        if "admin" not in self._engines:
            url = self.admin_url.replace("postgresql:", "postgresql+psycopg:")
            self._engines["admin"] = create_engine(url)
        return self._engines["admin"]

    def engine(self, process: Process) -> Engine:
        if process not in self._engines:
            self._engines[process] = open_engine(self.url, process, pool_size=4)
        return self._engines[process]

    def all(self, query: str, **parameters: object) -> Sequence[tuple[Any, ...]]:
        """Ask as superuser, past every policy."""
        with self.admin_engine().begin() as tx:
            return [tuple(row) for row in tx.execute(text(query), parameters)]

    def one(self, query: str, **parameters: object) -> object:
        return self.all(query, **parameters)[0][0]

    def act(self, statement: str, **parameters: object) -> None:
        """Change something behind the back of the program (as superuser, triggers off)."""
        with self.admin_engine().begin() as tx:
            tx.execute(text("SET LOCAL session_replication_role = replica"))
            tx.execute(text(statement), parameters)

    def act_plainly(self, statements: str) -> None:
        """Change something as superuser with every trigger on."""
        with self.admin_engine().begin() as tx:
            for statement in statements.split("; "):
                tx.execute(text(statement))

    def disconnect(self) -> None:
        """Close every idle connection; the engines go on."""
        for engine in self._engines.values():
            engine.dispose()

    def dispose(self) -> None:
        self.disconnect()
        self._engines.clear()


class Pair:
    """A source and a destination database with a superuser session each.

    They are made when a test first asks for one of them: most tests of commands never do.
    """

    def __init__(
        self,
        cluster: Cluster,
        source: str,
        destination: str,
        logins: dict[str, str],
        make: Callable[[], None] = lambda: None,
    ) -> None:
        self.cluster = cluster
        self._make = make
        self.is_made = False
        self._names = {"source": source, "destination": destination}
        self.logins = logins
        #: What a test says otherwise about a resource, by role.
        self.changes: dict[str, dict[str, object]] = {}
        self._sessions: dict[str, psycopg.Connection] = {}

    @property
    def names(self) -> dict[str, str]:
        """The two databases by role; whoever knows their names finds them there."""
        if not self.is_made:
            self.is_made = True
            self._make()
        return self._names

    def config(self, role: str) -> dict[str, object]:
        user = "reader" if role == "source" else "writer"
        return {
            "host": self.cluster.host,
            "port": self.cluster.port,
            "database": self.names[role],
            "user": user,
            "sslmode": "disable",
            **self.changes.get(role, {}),
        }

    def secret(self, role: str) -> dict[str, str]:
        return {"password": self.logins["reader" if role == "source" else "writer"]}

    def connect(self, role: str, *, autocommit: bool = True) -> psycopg.Connection:
        """A new superuser session."""
        return psycopg.connect(
            host=self.cluster.host, port=self.cluster.port, dbname=self.names[role],
            user=self.cluster.superuser, password=self.cluster.password,
            autocommit=autocommit,
        )  # fmt: skip

    def session(self, role: str) -> psycopg.Connection:
        if role not in self._sessions:
            self._sessions[role] = self.connect(role)
        return self._sessions[role]

    def source(self, *statements: str | sql.Composed) -> None:
        for statement in statements:
            self.session("source").execute(statement)
        self.session("source").execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")

    def rows(self, role: str, query: str | sql.Composed) -> list[tuple[Any, ...]]:
        return self.session(role).execute(query).fetchall()

    def content(self, role: str, table: str, columns: str = "") -> list[str]:
        """Every row as text, sorted: the multiset of the table without our own column."""
        schema = "public" if role == "source" else "acme"
        names = columns or self._columns(table)
        found = self.rows(role, f'SELECT ROW({names})::text FROM {schema}."{table}"')
        return sorted(row[0] for row in found)

    def _columns(self, table: str) -> str:
        found = self.session("source").execute(
            "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute "
            "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
            (f'public."{table}"',),
        )
        (names,) = found.fetchall()[0]
        return names

    def same(self, table: str) -> bool:
        return self.content("source", table) == self.content("destination", table)

    def close(self) -> None:
        for session in self._sessions.values():
            with suppress(psycopg.Error):
                session.close()


class Jobs:
    """A queue that keeps its jobs, so that a test decides what becomes of them."""

    def __init__(self) -> None:
        self.sent: list[Job] = []
        self.up = True

    def alive(self) -> bool:
        return self.up

    def send(self, job: Job) -> bool:
        self.sent.append(job)
        return True

    def take(self) -> list[Job]:
        jobs, self.sent = self.sent, []
        return jobs

    def close(self) -> None:
        return


@dataclass
class World:
    """One account with one connection; `step()` does what scheduler and worker would."""

    control: Control
    pair: Pair
    cli: Cli
    scheduler: ticks.Scheduler
    deps: Dependencies
    jobs: Jobs
    directory: Path
    #: Of the fixture `apart`: a keystore of its own, as superuser and as everybody else.
    keystore_url: str = ""
    keystore_login: str = ""

    @classmethod
    def build(cls, control: Control, pair: Pair, valkey: Server, directory: Path) -> "World":
        operator_file, worker_file = keyrings.init(directory / "keys")
        settings = Settings(
            profile="development",
            database_url=control.url,
            redis_url=valkey.url,
            keyring=str(operator_file),
            data_dir=directory,
            egress_allow=control.opening,
        )
        jobs = Jobs()
        cli = Cli(account="acme")
        cli.__dict__["settings"] = settings
        cli.__dict__["engine"] = control.engine("operator")
        cli.__dict__["audit_engine"] = control.engine("auditor")
        scheduler = ticks.Scheduler(
            control.engine("scheduler"),
            jobs,
            # the test's server is young: an expired lease must not wait for the amnesty
            settings.model_copy(update={"lease": timedelta(milliseconds=1)}),
            Principal("scheduler", "test"),
        )
        return cls(
            control,
            pair,
            cli,
            scheduler,
            cls._deps(control, settings, worker_file),
            jobs,
            directory,
        )

    @staticmethod
    def _deps(control: Control, settings: Settings, worker_file: Path) -> Dependencies:
        engine = control.engine("worker")
        assert settings.redis_url is not None

        heartbeat = Heartbeat(
            lambda: open_link(control.url, "worker"),
            lambda: WorkerState("w1", "test", 8, draining=False),
            1.0,
        )
        heartbeat.beat()
        principal = Principal("worker", "w1")
        keyring, keystore = keyrings.load(str(worker_file)), Keystore(engine)
        records = RecordSealer(engine, keyring, keystore, principal)
        return Dependencies(
            engine=engine,
            keyring=keyring,
            keystore=keystore,
            heartbeat=heartbeat,
            logs=LogWriter(lambda lines: write_sealed(engine, records, lines)),
            records=records,
            calls=CallWriter(lambda made: write_calls(engine, made)),
            quotas=SharedQuotas(open_client(settings.redis_url.get_secret_value())),
            settings=settings,
            policy=settings.link_policy(),
            refusals=JobRefusals(engine, principal),
            worker_id="w1",
            principal=principal,
        )

    def use(self, keystore: Keystore) -> None:
        """Give the worker another keystore, also for the keys of records."""
        deps = self.deps
        records = RecordSealer(deps.engine, deps.keyring, keystore, deps.principal)
        logs = LogWriter(lambda lines: write_sealed(deps.engine, records, lines))
        self.deps = replace(deps, keystore=keystore, records=records, logs=logs)

    def close(self) -> None:
        self.deps.heartbeat.drop_link()
        self.deps.quotas.client.close()

    def key_upkeep(self) -> KeyUpkeep:
        """What the worker's thread for keys would do, a round at a time."""
        deps = self.deps
        return KeyUpkeep(deps.keyring, deps.keystore, deps.settings, deps.principal)

    # ── what operators do ────────────────────────────────────────────────────────────────────

    def account(self, name: str = "acme", plan: str = "unlimited") -> None:
        with self.cli.transaction() as tx:
            accounts.create(tx, name, company="", plan=plan, principal=OPERATOR)

    def document(self, streams: dict[str, str], schedule: str = "manual") -> Path:
        """Write the document of one connection over the pair."""
        for role in ("source", "destination"):
            secret = self.directory / f"{role}.pw"
            secret.write_text(self.pair.secret(role)["password"])
        lines = [
            "account: acme",
            "resources:",
            *(
                f"  {name}: {{kind: postgres, config: {json.dumps(self.pair.config(role))}, "
                f"secret: {{password: {{file: {role}.pw}}}}}}"
                for name, role in (("shop", "source"), ("lake", "destination"))
            ),
            "connections:",
            "  shop-to-lake:",
            "    source: shop",
            "    destination: lake",
            f"    schedule: {schedule}",
            "    target: {schema: acme}",
            "    streams:",
            *(f"      {name}: {spec}" for name, spec in streams.items()),
        ]
        path = self.directory / "doc.yaml"
        path.write_text("\n".join(lines))
        return path

    def apply(self, streams: dict[str, str], schedule: str = "manual") -> None:
        if not self.control.all("SELECT 1 FROM accounts WHERE name = 'acme'"):
            self.account()
        self.apply_file(self.document(streams, schedule))

    def apply_file(self, path: Path) -> None:
        make_so(self.cli, path, write=True)

    def enqueue(self, **options: object) -> runs.Enqueued:
        with self.cli.inside() as (tx, _, _name):
            found = connections.get(tx, "shop-to-lake")
            return runs.enqueue(
                tx, connections.subject(found), RunKind.SYNC, RunOptions(**options), OPERATOR
            )

    # ── what the processes do ────────────────────────────────────────────────────────────────

    def dispatch(self) -> list[Job]:
        self.deps.heartbeat.beat()
        ticks.dispatch_tick(self.scheduler)
        return self.jobs.take()

    def claim(self, job: Job) -> Claim | claims.ClaimRefusal:
        with transaction(self.deps.engine) as tx:
            return claims.claim(tx, job, "w1", timedelta(seconds=30), self.deps.principal)

    def step(self) -> None:
        """Dispatch what waits and execute it here."""
        for job in self.dispatch():
            run_sync.execute(job, self.deps)
            self.deps.logs.flush()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Keep a worker and a scheduler in a thread, so that commands which wait are answered."""
        stop = Event()

        def work() -> None:
            while not stop.wait(0.05):
                self.step()

        thread = Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def sync(self, **options: object) -> tuple[Run, dict[str, StreamResult]]:
        """Ask for a run, execute it, return how it ended."""
        asked = self.enqueue(**options)
        self.step()
        return self.run(asked.run_id), self.streams(asked.run_id)

    def expire_leases(self) -> None:
        # the time that a test took since its last step is no outage of the database
        self.scheduler.sight.was_blind(self.scheduler.settings.lease)
        self.control.act("UPDATE leases SET expires_at = now() - interval '1 s'")

    def sealer(self, name: str = "sealer-1") -> Sealer:
        """A sealer with the key of this world, which `seal_all` uses, too."""
        key = self.directory / "audit" / "signer.json"
        if not key.exists():
            signing.init(key)
        engine = self.control.engine("sealer")
        return Sealer(engine, signing.load(key), key, Principal("sealer", name), name)

    def seal_all(self) -> int:
        """Seal every final event; return the size of the log."""
        sealer = self.sealer()
        while sealer.step() is not None:
            pass
        sealer.close()
        with transaction(sealer.engine) as tx:
            return sealing.state(tx).size

    # ── what is there ────────────────────────────────────────────────────────────────────────

    def run(self, run_id: UUID) -> Run:
        with self.cli.inside() as (tx, _, _name):
            return runs.get(tx, run_id)

    def streams(self, run_id: UUID) -> dict[str, StreamResult]:
        with self.cli.inside() as (tx, _, _name):
            return {r.stream.split(".")[1]: r for r in outputs.streams(tx, run_id)}

    def log(self, run_id: UUID) -> str:
        """A run's log, opened as an operator does."""
        return "\n".join(x.message or f"[{x.problem}]" for x in self.lines(run_id))

    def lines(self, run_id: UUID) -> list[OpenedLine]:
        with self.cli.inside() as (tx, _, _name):
            found, lines = runs.get(tx, run_id), logs.read(tx, run_id)
        reader = Reader(self.cli, found)
        reader.require_keys()
        return reader.page(lines)

    def events(self, run_id: UUID | None = None) -> list[str]:
        with self.cli.transaction() as tx:
            found = audit_tail.newest(tx, audit_tail.Filters(), 10_000)
        wanted = str(run_id) if run_id else ""
        return [e.action for e in found if wanted in e.body]
