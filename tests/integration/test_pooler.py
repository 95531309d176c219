"""The control database through a pooler in transaction mode; PgBouncer itself under `full`."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import closing
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import text

from schemas.errors import ConfigError, TransientError
from schemas.runs import RunState
from storage import accounts, migrate
from storage.claims import WorkerState, heartbeat
from storage.engine import open_engine, open_link, transaction
from storage.pooler import together
from tests.conftest import TEST_PRINCIPAL
from tests.faults.test_processes import Fleet, big, checksums

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]

POOLED = "?pooler=transaction"
SETTINGS = {
    "role": "syncward_worker",
    "search_path": "public",
    "TimeZone": "UTC",
    "lock_timeout": "10s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "1min",
}
ASK = "SELECT " + ", ".join(f"current_setting('{name}')" for name in SETTINGS)
PREPARED = "SELECT count(*) FROM pg_prepared_statements"


@pytest.fixture
def opened():
    """Open engines that are closed at the end."""
    engines = []

    def make(url, process, **options):
        engines.append(open_engine(url, process, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


@pytest.mark.parametrize("way", ["", POOLED])
def test_each_transaction_has_the_role_and_the_limits(control, opened, way):
    engine = opened(control.url + way, "worker")
    for _ in range(2):
        with transaction(engine) as tx:
            assert tuple(tx.execute(text(ASK)).one()) == tuple(SETTINGS.values())
            assert tx.execute(text("SELECT current_user")).scalar_one() == "syncward_worker"


def test_a_pooled_transaction_leaves_nothing_in_its_session(control, opened):
    pooled = opened(control.url + POOLED, "worker", pool_size=1)
    direct = opened(control.url, "worker", pool_size=1)
    for engine in (pooled, direct):
        with transaction(engine) as tx:
            tx.execute(text("SET LOCAL lock_timeout = '1s'"))
            for number in range(12):
                tx.execute(text("SELECT CAST(:n AS int)"), {"n": number})
    with closing(pooled.raw_connection()) as link:
        driver = link.driver_connection
        assert isinstance(driver, psycopg.Connection)
        found = driver.execute("SELECT current_user, current_setting('lock_timeout')").fetchone()
        assert found == ("dev", "0")
        assert driver.execute(PREPARED).fetchone() == (0,)
    with transaction(direct) as tx:
        assert tx.execute(text(PREPARED)).scalar_one() > 0, "the check above could not fail"


def round_trips(engine, path) -> int:
    """Count how often a short transaction waits: turns from F (we speak) to B (Postgres does)."""
    with path.open("w") as file:
        with closing(engine.raw_connection()) as link:
            pgconn = link.driver_connection.pgconn
        pgconn.trace(file.fileno())
        with transaction(engine) as tx:
            tx.execute(text("SELECT 1"))
        pgconn.untrace()
    sides = [line.split("\t")[1] for line in path.read_text().splitlines()]
    return sum(now + after == "FB" for now, after in pairwise(sides))


def test_pooled_settings_cost_no_round_trip_of_their_own(control, opened, tmp_path):
    direct = opened(control.url, "worker", pool_size=1)
    pooled = opened(control.url + POOLED, "worker", pool_size=1)
    for engine in (direct, pooled):
        with transaction(engine) as tx:
            tx.execute(text("SELECT 1"))
    counts = [round_trips(engine, tmp_path / "trace") for engine in (direct, pooled)]
    assert counts == [3, 3], "BEGIN (with the settings), SELECT, COMMIT"


def test_a_pooled_role_cannot_do_what_it_could_not_do_directly(control, opened):
    engine = opened(control.url + POOLED, "scheduler")
    with pytest.raises(ConfigError, match="permission denied"), transaction(engine) as tx:
        tx.execute(text("SELECT * FROM keystore.dek"))
    with transaction(engine) as tx:
        assert tx.execute(text("SELECT current_user")).scalar_one() == "syncward_scheduler"


def test_a_pooled_login_without_the_role_is_refused(control, admin, opened):
    admin.execute(f"CREATE ROLE outsider LOGIN PASSWORD '{control.password}'")
    try:
        url = control.url.replace("//dev:", "//outsider:")
        for way in ("", POOLED):
            engine = opened(url + way, "worker")
            with pytest.raises(ConfigError, match="role"), transaction(engine) as tx:
                tx.execute(text("SELECT 1"))
            engine.dispose()
    finally:
        admin.execute("DROP ROLE outsider")


def test_a_heartbeat_through_a_pooler_has_its_role_and_ends_its_transaction(control):
    worker = WorkerState("w9", "test", 4, draining=False)
    with open_link(control.url + POOLED, "worker") as link:
        with together(link):
            found = link.execute("SELECT current_user, current_setting('statement_timeout')")
            assert found.fetchone() == ("syncward_worker", "5s")
        assert heartbeat(link, worker, [], timedelta(seconds=30)) == {}
        assert link.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert link.execute("SELECT current_user").fetchone() == ("dev",)
    assert control.all("SELECT worker_id, slots FROM workers") == [("w9", 4)]


def test_a_heartbeat_without_the_right_changes_nothing(control):
    worker = WorkerState("w9", "test", 4, draining=False)
    with (
        open_link(control.url + POOLED, "scheduler") as link,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        heartbeat(link, worker, [], timedelta(seconds=30))
    assert control.all("SELECT worker_id FROM workers") == []


def test_a_pooled_connection_that_died_fails_one_transaction_and_is_replaced(control, opened):
    engine = opened(control.url + POOLED, "worker", pool_size=1)
    with transaction(engine) as tx:
        pid = tx.execute(text("SELECT pg_backend_pid()")).scalar_one()
    control.all("SELECT pg_terminate_backend(:pid, 5000)", pid=pid)
    with pytest.raises(TransientError), transaction(engine) as tx:  # used just now: not asked
        tx.execute(text("SELECT 1"))
    with transaction(engine) as tx:
        assert tx.execute(text("SELECT pg_backend_pid()")).scalar_one() != pid


def test_a_pooler_that_does_not_exist_is_refused_without_quoting_the_url(control):
    for url in (control.url + "?pooler=session", control.url + "?pooler=a&pooler=b"):
        with pytest.raises(ConfigError, match="pooler can be transaction only") as caught:
            open_engine(url, "worker")
        assert control.password not in str(caught.value)


def _program() -> str:
    """Return the PgBouncer of the system, brought by apt where we may."""
    places = "/usr/sbin:/usr/bin:/usr/local/bin"
    if not shutil.which("pgbouncer", path=places):
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip("needs PgBouncer; install it with: sudo apt-get install pgbouncer")
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "pgbouncer"]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    return str(shutil.which("pgbouncer", path=places))


class PgBouncer:
    """A PgBouncer in transaction mode before the test cluster, as an unprivileged user."""

    def __init__(self, directory: Path, control, servers: int, **settings: str) -> None:
        self.control = control
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = directory / "pgbouncer.log"
        self._write(directory / "users.txt", self._users())
        lines = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(self.port),
            "auth_type": "scram-sha-256",
            "auth_file": str(directory / "users.txt"),
            "pool_mode": "transaction",
            "default_pool_size": str(servers),
            "max_client_conn": "200",
            "unix_socket_dir": "",
            "logfile": str(self.log),
            **settings,
        }
        ini = "\n".join(f"{name} = {value}" for name, value in lines.items())
        target = f"host={control.cluster.host} port={control.cluster.port}"
        self._write(directory / "pgbouncer.ini", f"[databases]\n* = {target}\n[pgbouncer]\n{ini}\n")
        self.process = subprocess.Popen(
            [_program(), "-q", str(directory / "pgbouncer.ini")],
            user=self._owner(directory) if os.getuid() == 0 else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @staticmethod
    def _write(path: Path, content: str) -> None:
        path.write_text(content)
        path.chmod(0o600)

    @staticmethod
    def _owner(directory: Path) -> str:
        """It refuses to run as root: hand its directory to nobody."""
        nobody = pwd.getpwnam("nobody")
        for path in (directory, *directory.iterdir()):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        return "nobody"

    def _users(self) -> str:
        """The logins with the verifiers that Postgres keeps: no password is written down."""
        found = self.control.all(
            "SELECT rolname, rolpassword FROM pg_authid WHERE rolpassword LIKE 'SCRAM%'"
        )
        return "".join(f'"{name}" "{verifier}"\n' for name, verifier in found)

    def url(self, direct: str, way: str = POOLED) -> str:
        return direct.replace(f":{self.control.cluster.port}/", f":{self.port}/") + way

    def wait(self) -> None:
        deadline = time.monotonic() + 15
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, "PgBouncer did not start"
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=10)


@pytest.fixture
def pgbouncer(control):
    """Start PgBouncers before the control database, in directories that `nobody` can reach."""
    started = []
    directories = []

    def start(servers: int = 4, **settings: str) -> PgBouncer:
        directories.append(tempfile.TemporaryDirectory(prefix="pgbouncer-"))
        started.append(PgBouncer(Path(directories[-1].name), control, servers, **settings))
        started[-1].wait()
        return started[-1]

    yield start
    for one in started:
        one.stop()
    for directory in directories:
        directory.cleanup()


@pytest.mark.full
@pytest.mark.parametrize("servers", [4, 1])
def test_a_fleet_works_over_few_server_connections(world, pgbouncer, servers):
    bouncer = pgbouncer(servers=servers)
    world.close()
    world.control.act("DELETE FROM workers")
    pooled = bouncer.url(world.control.url)
    world.cli.settings = world.cli.settings.model_copy(update={"database_url": SecretStr(pooled)})
    world.cli.__dict__["engine"] = open_engine(pooled, "operator")
    fleet = Fleet(world, workers=2)
    most = 0
    try:
        big(world, 20_000)
        for number in range(6):
            world.pair.source(f"UPDATE big SET v = 'round {number}'")
            fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
            most = max(most, _servers(world.control))
        clients = world.control.one("SELECT count(*) FROM workers")
    finally:
        fleet.stop()
        world.cli.engine.dispose()
    assert clients == 2
    assert 1 <= most <= servers
    assert checksums(world)[0] == checksums(world)[1]
    assert world.control.one("SELECT count(*) FROM runs WHERE state = 'succeeded'") == 6
    assert world.control.one("SELECT count(*) FROM workers") == 0, "both signed off"
    assert [p.name for p in fleet.logs.iterdir() if "failed" in p.read_text()] == []


def _servers(control) -> int:
    """Count the sessions of the fleet's login at the control database itself."""
    found = control.one(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND usename = 'dev'"
    )
    assert isinstance(found, int)
    return found


@pytest.mark.full
def test_the_schema_can_be_made_and_checked_through_a_pooler(control, admin, pgbouncer):
    bouncer = pgbouncer()
    name = f"{control.database}_new"
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        url = bouncer.url(control.admin_url.replace(control.database, name))
        assert migrate.upgrade(url, TEST_PRINCIPAL) == (None, migrate.head())
        assert migrate.upgrade(url, TEST_PRINCIPAL) == (migrate.head(), migrate.head())
        engine = open_engine(url, "operator")
        with transaction(engine) as tx:
            assert migrate.differences(tx) == []
            accounts.create(tx, "acme", company="", plan="standard", principal=TEST_PRINCIPAL)
        engine.dispose()
    finally:
        bouncer.stop()
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.mark.full
@pytest.mark.parametrize("settings", [{}, {"ignore_startup_parameters": "options"}])
def test_a_url_that_keeps_the_pooler_secret_is_refused_with_what_to_type(
    control, pgbouncer, settings
):
    engine = open_engine(pgbouncer(**settings).url(control.url, way=""), "worker")
    with pytest.raises(ConfigError, match=r"add \?pooler=transaction"), transaction(engine) as tx:
        tx.execute(text("SELECT 1"))
    engine.dispose()


@pytest.mark.full
def test_the_command_line_works_through_a_pooler(world, pgbouncer, monkeypatch, shell):
    direct = shell("doctor", "db", "--json")
    pooled = pgbouncer().url(world.control.url)
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", pooled)
    code, out, _ = shell("account", "create", "acme")
    assert (code, "acme" in out) == (0, True)
    code, out, err = shell("db", "check")
    assert (code, out.splitlines()[-1]) == (0, "ok"), err
    assert findings(shell("doctor", "db", "--json")) == findings(direct)


def findings(answer: tuple[int, str, str]) -> list[tuple[str, bool]]:
    """Return doctor's checks and whether something is wrong; there are some."""
    found = [(c["name"], c["wrong"] is None) for c in json.loads(answer[1])["checks"]]
    assert len(found) > 3
    return found
