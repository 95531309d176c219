"""Real servers for the tests: embedded Postgres and Valkey, one pair per worker."""

import gc
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import psycopg
import pytest
from hypothesis import settings
from psycopg import sql

from cli import main as program
from cli.checks import base
from crypto import fingerprint
from embedded.postgres import Cluster
from embedded.valkey import Server
from schemas.audit import Principal
from storage import migrate
from storage.engine import open_engine
from storage.keystore import Keystore
from storage.roles import create_login
from tests.rest_api import Api
from tests.sealed_log import SealedLog
from tests.world import Control, Pair, World

#: `make test` must say of a change what it said before: it tries the same examples each time.
#: `make test-full` looks for new ones.
#: Neither has a deadline for one example: on a machine that is busy any takes long now and then.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile("random")

#: A test that may take longer than this is a long one.
_LONG_S = 180
TEST_PRINCIPAL = Principal("operator", "test")


def pytest_configure() -> None:
    """Nothing that is made while tests are collected can be thrown away."""
    gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that may take longest, or one process is left with them at the end."""

    def allowed(item: pytest.Item) -> int:
        marker = item.get_closest_marker("timeout")
        seconds = 0 if marker is None else int(marker.args[0])
        return -seconds if seconds > _LONG_S else 0

    items.sort(key=allowed)


def pytest_collection_finish() -> None:
    """Leave what was collected alone: to look through it again and again costs a tenth of a run."""
    gc.collect()
    gc.freeze()
    gc.enable()


#: Where files live in memory on Linux, and how much of it must be free to use it.
_MEMORY, _MEMORY_MIN = Path("/dev/shm"), 4 * 2**30  # noqa: S108 - a private directory below it
#: Of each of the servers that tests start side by side: little log, and passwords that cost nothing
#: to prove, for tests open tens of thousands of sessions.
_CHEAP = {"max_wal_size": "256MB", "scram_iterations": "1"}


@pytest.fixture(scope="session")
def server_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the shared server keeps its data: memory, or a disk where there is too little of it.

    A database is three hundred files, and each test that asks for a world makes and drops three.
    """
    if not os.access(_MEMORY, os.W_OK) or shutil.disk_usage(_MEMORY).free < _MEMORY_MIN:
        yield tmp_path_factory.mktemp("pg")
        return
    with tempfile.TemporaryDirectory(prefix="syncward-tests-", dir=_MEMORY) as root:
        yield Path(root)


@pytest.fixture(scope="session")
def cluster(server_root: Path) -> Iterator[Cluster]:
    root = server_root / "postgres"
    with Cluster(root, durable=False, settings=_CHEAP, guard_parent=True) as started:
        with _superuser(started, "postgres") as db:
            password = sql.Literal(started.password)
            db.execute(sql.SQL("ALTER ROLE CURRENT_USER PASSWORD {}").format(password))
        with _superuser(started, "template1"):
            pass  # the first session of a database writes what later ones read: copies have it
        yield started


def _superuser(cluster: Cluster, database: str) -> psycopg.Connection:
    return psycopg.connect(
        host=cluster.host, port=cluster.port, user=cluster.superuser, password=cluster.password,
        dbname=database, autocommit=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("vk"), durable=False, guard_parent=True) as started:
        yield started


@pytest.fixture(scope="session")
def admin(cluster: Cluster) -> Iterator[psycopg.Connection]:
    with _superuser(cluster, "postgres") as connection:
        yield connection


@pytest.fixture(scope="session")
def template(cluster: Cluster, admin: psycopg.Connection) -> Control:
    """A migrated control database that tests copy."""
    admin.execute("CREATE DATABASE control_template")
    control = Control(cluster, "control_template", secrets.token_urlsafe(12))
    migrate.upgrade(control.admin_url, TEST_PRINCIPAL)
    with control.admin_engine().begin() as tx:
        create_login(
            tx,
            "dev",
            password=control.password,
            roles=("scheduler", "worker", "sealer", "operator"),
        )
    control.dispose()
    return control


def _database(admin: psycopg.Connection, name: str, template: str | None = None) -> None:
    # as files: half the work of copying by pages through the log, for the server and at the end
    statement = sql.SQL("CREATE DATABASE {} STRATEGY file_copy").format(sql.Identifier(name))
    if template:
        statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
    admin.execute(statement)


#: Databases of tests that have ended, the last one's last.
_LEFT: list[str] = []
_LEFT_MAX = 3


def _drop(admin: psycopg.Connection, name: str) -> None:
    """Drop those of the test before: a session that has just ended is still seen for a moment.

    The server would wait for it in steps of a tenth of a second.
    """
    _LEFT.append(name)
    while len(_LEFT) > _LEFT_MAX:
        found = sql.Identifier(_LEFT.pop(0))
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(found))


@pytest.fixture
def control(cluster: Cluster, admin: psycopg.Connection, template: Control) -> Iterator[Control]:
    """A fresh control database."""
    name = f"control_{secrets.token_hex(4)}"
    _database(admin, name, template.database)
    made = Control(cluster, name, template.password)
    yield made
    made.dispose()
    _drop(admin, name)


@pytest.fixture(scope="session")
def grown(
    cluster: Cluster, admin: psycopg.Connection, template: Control, tmp_path_factory
) -> Callable[[tuple[int, ...]], SealedLog]:
    """Return a sealed log of so many events a batch, which tests copy."""

    @cache
    def make(counts: tuple[int, ...]) -> SealedLog:
        name = f"grown_{'_'.join(map(str, counts))}"
        _database(admin, name, template.database)
        made = SealedLog(Control(cluster, name, template.password), tmp_path_factory.mktemp(name))
        made.grow(*counts)
        made.control.dispose()
        return made

    return make


@pytest.fixture
def grown_log(
    cluster: Cluster,
    admin: psycopg.Connection,
    grown: Callable[[tuple[int, ...]], SealedLog],
    tmp_path: Path,
) -> Iterator[Callable[..., SealedLog]]:
    """Return a log of one's own that has grown by so many events a batch; one for each test."""
    opened: list[Control] = []

    def copy(*counts: int) -> SealedLog:
        first = grown(counts)
        name = f"control_{secrets.token_hex(4)}"
        _database(admin, name, first.control.database)
        opened.append(Control(cluster, name, first.control.password))
        shutil.copytree(first.key.parent, tmp_path / first.key.parent.name)
        return SealedLog(opened[-1], tmp_path, account=first.account)

    yield copy
    for made in opened:
        made.dispose()
        _drop(admin, made.database)


@pytest.fixture(scope="session")
def logins(admin: psycopg.Connection) -> dict[str, str]:
    """The least logins of docs/postgres.md; one password each, made here."""
    passwords = {name: secrets.token_urlsafe(12) for name in ("reader", "writer")}
    for name, password in passwords.items():
        admin.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(
                sql.Identifier(name), sql.Literal(password)
            )
        )
    admin.execute("GRANT pg_read_all_stats TO reader")
    return passwords


@pytest.fixture
def pair(cluster: Cluster, admin: psycopg.Connection, logins: dict[str, str]) -> Iterator[Pair]:
    """A fresh source and a fresh destination database."""
    yield from _pair(cluster, admin, logins)


@pytest.fixture(scope="module")
def shared_pair(
    cluster: Cluster, admin: psycopg.Connection, logins: dict[str, str]
) -> Iterator[Pair]:
    """A pair for all tests of a file, each with tables of its own."""
    yield from _pair(cluster, admin, logins)


def _pair(cluster: Cluster, admin: psycopg.Connection, logins: dict[str, str]) -> Iterator[Pair]:
    suffix = secrets.token_hex(4)
    source, destination = f"shop_{suffix}", f"lake_{suffix}"

    def make() -> None:
        for name in (source, destination):
            _database(admin, name)
        admin.execute(
            sql.SQL("GRANT CREATE ON DATABASE {} TO writer").format(sql.Identifier(destination))
        )

    made = Pair(cluster, source, destination, logins, make)
    yield made
    made.close()
    if made.is_made:
        for name in (source, destination):
            _drop(admin, name)


@pytest.fixture
def world(
    control: Control,
    pair: Pair,
    valkey: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[World]:
    """Everything in one process, stepped by hand: control database, keyring, two databases."""
    # what makes guessing dear for others makes two seconds of processor time of twenty tests
    monkeypatch.setitem(fingerprint._COST, "n", 2**4)
    made = World.build(control, pair, valkey, tmp_path)
    yield made
    made.close()


@pytest.fixture
def api() -> Iterator[Api]:
    """An API on loopback without a record."""
    made = Api()
    yield made
    made.close()


@pytest.fixture
def apart(world: World, admin: psycopg.Connection, cluster: Cluster) -> Iterator[World]:
    """The world with its keystore in a database of its own."""
    name = f"keystore_{secrets.token_hex(4)}"
    _database(admin, name)
    host = f"{cluster.host}:{cluster.port}/{name}"
    world.keystore_url = f"postgresql://{cluster.superuser}:{cluster.password}@{host}"
    world.keystore_login = f"postgresql://dev:{world.control.password}@{host}"
    migrate.upgrade_keystore(world.keystore_url)
    operators, workers = (
        open_engine(world.keystore_login, process, pool_size=2, database="keystore")
        for process in ("operator", "worker")
    )
    world.cli.__dict__["keystore"] = Keystore(world.cli.engine, operators)
    world.use(Keystore(world.deps.engine, workers))
    yield world
    for engine in (operators, workers):
        engine.dispose()
    _drop(admin, name)


@pytest.fixture
def shell(world, monkeypatch, capsys):
    """Type a command; get (exit code, stdout, stderr)."""
    settings = world.cli.settings
    monkeypatch.setenv("SYNCWARD_PROFILE", settings.profile)
    monkeypatch.setenv("SYNCWARD_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("SYNCWARD_REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("SYNCWARD_KEYRING", settings.keyring)
    monkeypatch.setenv("SYNCWARD_DATA_DIR", str(world.directory))
    # `doctor` finds 50 ms slow, which a machine that is busy with tests takes now and then
    monkeypatch.setattr(base, "_SLOW_S", 30.0)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["syncward", *words])
        code = 0
        try:
            program.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run
