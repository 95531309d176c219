"""A resource's fields and the environment cannot say more than where, as whom and how (T29)."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from psycopg import sql

from cli.supervisor import child_environment
from connectors import registry
from schemas.errors import ConfigError, SyncwardError
from schemas.runs import RunState
from schemas.scrub import scrub
from tests.world import LOOSE

ROOT = Path(__file__).parent.parent.parent

#: What libpq reads where nothing is said: each would redirect, weaken or change a session.
HOSTILE = {
    "PGHOST": "192.0.2.1", "PGHOSTADDR": "192.0.2.1", "PGPORT": "1", "PGDATABASE": "elsewhere",
    "PGUSER": "somebody", "PGPASSWORD": "hunter2-hunter2", "PGPASSFILE": "/nowhere/pgpass",
    "PGSERVICE": "evil", "PGSERVICEFILE": "/nowhere/service.conf", "PGSYSCONFDIR": "/nowhere",
    "PGOPTIONS": "-c search_path=evil", "PGSSLMODE": "disable", "PGSSLROOTCERT": "/nowhere/root",
    "PGSSLCERT": "/nowhere/cert", "PGSSLKEY": "/nowhere/key", "PGSSLCRL": "/nowhere/crl",
    "PGSSLMINPROTOCOLVERSION": "TLSv1.3", "PGREQUIREAUTH": "none", "PGCHANNELBINDING": "require",
    "PGTARGETSESSIONATTRS": "read-only", "PGGSSENCMODE": "require", "PGCONNECT_TIMEOUT": "1",
    "PGCLIENTENCODING": "latin1", "PGAPPNAME": "syncward:evil", "PGTZ": "Asia/Tokyo",
    "HTTPS_PROXY": "http://192.0.2.1:1", "all_proxy": "socks5://192.0.2.1:1",
}  # fmt: skip


@pytest.mark.parametrize(
    "host",
    ["a,b", "127.0.0.1,evil.example", "/run", "/run/postgresql", "@abstract", "x?options=-cfoo",
     "host=evil", "a b", "a'b", "a\\b", "a\x00b", "a\nb", "postgresql://evil", "user@evil",
     "a:5432", "[::1]:5432", "", "*", "..", "-evil", "evil-"],
)  # fmt: skip
def test_a_host_is_one_name_or_one_address(host):
    config = {"host": host, "database": "shop", "user": "reader"}
    with pytest.raises(ConfigError, match="host"):
        registry.validate_config("postgres", config, LOOSE)


@pytest.mark.parametrize(
    "field",
    ["dsn", "conninfo", "options", "service", "passfile", "hostaddr", "sslkey", "sslcert", "sslcrl",
     "require_auth", "gssencmode", "application_name", "replication", "target_session_attrs",
     "client_encoding", "connect_timeout", "load_balance_hosts", "sslpassword", "requirepeer"],
)  # fmt: skip
def test_a_field_that_libpq_knows_and_we_do_not_is_refused(field):
    config = {"host": "db.example", "database": "shop", "user": "reader", field: "x"}
    with pytest.raises(ConfigError, match=field):
        registry.validate_config("postgres", config, LOOSE)


CONNINFO = [
    "host=192.0.2.1", "dbname=postgres host=192.0.2.1", "postgresql://192.0.2.1/postgres",
    "postgres://evil:evil@192.0.2.1/postgres?sslmode=disable", "x' host='192.0.2.1",
    "x\\' host=192.0.2.1", "postgres?options=-csearch_path=evil", "service=evil",
]  # fmt: skip


@pytest.mark.integration
def test_a_database_or_login_that_looks_like_conninfo_is_only_a_name(pair):
    for text in CONNINFO:
        for field, code in (("database", "no_database"), ("user", "credentials")):
            config = {**pair.config("source"), field: text}
            with pytest.raises(SyncwardError) as caught:
                registry.open_source("postgres", config, pair.secret("source"), LOOSE)
            assert caught.value.code == code, text


@pytest.mark.integration
def test_a_database_with_such_a_name_is_really_read(pair, admin):
    """Not refused for its looks: it is a legal name, and passed on as nothing else."""
    name = "x' host='192.0.2.1"
    admin.execute(f'CREATE DATABASE "{name}"')
    try:
        config = {**pair.config("source"), "database": name}
        source = registry.open_source("postgres", config, pair.secret("source"), LOOSE)
        assert source.test().login == "reader"
        source.close()
    finally:
        admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.mark.integration
def test_a_password_is_a_password_whatever_it_holds(pair, admin):
    admin.execute("CREATE ROLE odd LOGIN")
    config = {**pair.config("source"), "user": "odd"}
    try:
        for word in ("x' host='192.0.2.1", "p@ss w:0rd/?#", "\\'", "%00", "🔑 é"):
            admin.execute(sql.SQL("ALTER ROLE odd PASSWORD {}").format(word))
            registry.open_source("postgres", config, {"password": word}, LOOSE).close()
            with pytest.raises(SyncwardError) as caught:
                registry.open_source("postgres", config, {"password": word + "x"}, LOOSE)
            assert caught.value.code == "credentials"
            assert word not in caught.value.public
    finally:
        admin.execute("DROP ROLE odd")


@pytest.mark.integration
def test_no_password_means_none_and_not_one_of_the_workers_home(pair, tmp_path, monkeypatch):
    passfile = tmp_path / ".pgpass"
    passfile.write_text(f"*:*:*:*:{pair.logins['reader']}\n")
    passfile.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PGPASSFILE", str(passfile))
    with pytest.raises(SyncwardError) as caught:
        registry.open_source("postgres", pair.config("source"), {}, LOOSE)
    assert caught.value.code == "credentials"


# ── the environment ──────────────────────────────────────────────────────────────────────────


def test_the_list_above_is_all_scrubbed(monkeypatch):
    for name, value in HOSTILE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SYNCWARD_ACCOUNT", "acme")
    scrub()
    left = os.environ  # noqa: TID251 - what is left is the question
    assert [name for name in HOSTILE if name in left] == []
    assert left["SYNCWARD_ACCOUNT"] == "acme"


def program(world, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = world.cli.settings
    (world.directory / "dev.env").write_text(
        "SYNCWARD_PROFILE=development\n"
        f"SYNCWARD_DATABASE_URL={settings.database_url.get_secret_value()}\n"
        f"SYNCWARD_REDIS_URL={settings.redis_url.get_secret_value()}\n"
        f"SYNCWARD_EGRESS_ALLOW={world.control.opening}\n"
    )
    return subprocess.run(
        [sys.executable, "-m", *words],
        env=child_environment(world.directory, **environment),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.integration
def test_a_command_asks_the_database_of_the_settings_whatever_the_environment_says(world):
    world.account()
    done = program(world, "cli.main", "account", "list", **HOSTILE)
    assert (done.returncode, "acme" in done.stdout) == (0, True), done.stderr


@pytest.mark.integration
def test_a_worker_reads_the_source_of_the_resource_whatever_the_environment_says(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    asked = world.enqueue()
    (job,) = world.dispatch()
    script = (
        "import sys; from schemas.start import start; from schemas.jobs import Job; "
        "from workers import main, run_sync\n"
        "def work(settings):\n"
        "    deps = main._build(settings).deps\n"
        f"    run_sync.execute(Job(run_id='{job.run_id}', dispatch={job.dispatch}), deps)\n"
        "start(work, 'worker')"
    )
    keyring = str(world.directory / "keys" / "worker.json")
    words = ("timeit", "-n", "1", "-r", "1", script)
    done = program(world, *words, **HOSTILE, SYNCWARD_KEYRING=keyring)
    assert world.run(asked.run_id).state is RunState.SUCCEEDED, done.stderr
    assert world.pair.same("t")


# ── one door each ────────────────────────────────────────────────────────────────────────────

#: Who may open a Postgres session, and what for.
DOORS = {
    "connectors/postgres/link.py": "resources",
    "storage/engine.py": "the control database",
    "storage/pooler.py": "the control database behind a pooler",
    "cli/demo_world.py": "the demo's own cluster, which it made itself",
    "connectors/http_link.py": "none: httpcore's pool, of HTTP",
    "cli/demo_guard.py": "the same, to empty the source and to look at what is served",
}
ENGINES = {
    "storage/engine.py": "the control database",
    "storage/migrate.py": "its migrations",
    "cli/dev.py": "the embedded cluster that `up --dev` made itself",
    "cli/demo_audit.py": "the same, as the superuser who rewrites an event",
}


def calls(*names: str) -> set[str]:
    """Return the files in which one of these is called, imported or subclassed."""
    found = set()
    for package in ("cli", "connectors", "crypto", "embedded", "scheduler", "schemas", "storage",
                    "workers"):  # fmt: skip
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(names)
                if called:
                    found.add(str(path.relative_to(ROOT)))
    return found


def test_postgres_sessions_are_opened_in_named_places_only():
    found = calls("psycopg.connect", "Connection.connect", "PGconn.connect", "PooledLink.connect",
                  "PGconn.connect_start", "ConnectionPool")  # fmt: skip
    assert found <= set(DOORS)
    known = {"connectors/postgres/link.py", "storage/engine.py"}
    assert known <= found, "the search must find them"
    assert calls("create_engine") <= set(ENGINES)


def test_mariadb_sessions_are_opened_in_one_place_only():
    assert calls("pymysql.connect", "pymysql.Connection") == {"connectors/mariadb/link.py"}


#: Who makes sockets, and where they lead.
SOCKETS = {
    "connectors/egress.py": "nowhere: asks whether an address is this machine's",
    "connectors/postgres/link.py": "nowhere: once more that of libpq, to be cut",
    "connectors/mariadb/link.py": "to checked addresses, for the driver",
    "connectors/http_sockets.py": "to checked addresses of APIs",
    "connectors/child/guard.py": "to checked addresses, for other people's connectors",
    "connectors/child/launcher.py": "to itself: both ends of what such a connector is given",
}


def test_sockets_of_connectors_are_made_in_named_places_only():
    made = calls("socket.socket", "socket.create_connection")
    assert {path for path in made if path.startswith("connectors/")} == set(SOCKETS)


def test_redis_is_opened_in_one_place_only():
    opened = calls("Redis.from_url", "redis.Redis", "Sentinel", "ConnectionPool.from_url")
    assert opened == {"workers/enqueue.py", "workers/sentinels.py"}
