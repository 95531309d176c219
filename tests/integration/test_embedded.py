"""The embedded servers' life: made once, found running, crashed, restarted, guarded."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest

from embedded.errors import EmbeddedError
from embedded.postgres import Cluster
from embedded.valkey import Server

pytestmark = pytest.mark.integration


def ask(cluster: Cluster, query: str):
    with psycopg.connect(
        host=cluster.host, port=cluster.port, dbname="postgres", user=cluster.superuser,
        password=cluster.password, autocommit=True,
    ) as db:  # fmt: skip
        return db.execute(query).fetchone() if query.startswith("SELECT") else db.execute(query)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A durable cluster that was started once and stopped again."""
    cluster = Cluster(tmp_path_factory.mktemp("embedded") / "pg", guard_parent=True).start()
    ask(cluster, "CREATE TABLE kept (n int)")
    yield cluster
    cluster.stop()


def test_a_second_start_finds_the_running_server(made):
    again = Cluster(made.root).start()
    assert (again.pid, again.port, again.password) == (made.pid, made.port, made.password)


def test_what_was_committed_survives_kill_9_and_the_port_stays(made):
    ask(made, "INSERT INTO kept VALUES (1)")
    before = made.port
    made.kill()
    assert made.pid is None
    made.start()
    assert made.port == before
    assert ask(made, "SELECT count(*) FROM kept WHERE n = 1") == (1,)


def test_another_server_on_its_port_makes_it_choose_another(made):
    made.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((made.host, made.port))
        other.listen()
        taken = made.port
        made.start()
        assert made.port != taken
    assert ask(made, "SELECT 1") == (1,)


def test_concurrent_starters_get_one_server(made):
    made.stop()
    with ThreadPoolExecutor(4) as pool:
        started = list(pool.map(lambda _: Cluster(made.root).start(), range(4)))
    assert len({(c.pid, c.port) for c in started}) == 1


def test_the_password_is_in_no_argument_and_no_environment(made):
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            shown = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
        except OSError:
            continue
        assert made.password.encode() not in shown
    assert (made.root / "pg_password").stat().st_mode & 0o077 == 0


def test_a_cluster_of_another_version_is_refused_by_name(tmp_path):
    root = tmp_path / "old"
    (root / "pgdata").mkdir(parents=True)
    (root / "pgdata" / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedError, match="made by Postgres 9, this is"):
        Cluster(root).start()


def test_a_wrong_password_is_refused_because_logins_are_checked(made):
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(
            host=made.host, port=made.port, user=made.superuser, password=secrets.token_hex(4),
            dbname="postgres",
        )  # fmt: skip


def test_valkey_keeps_what_it_holds_across_a_crash_and_wants_its_password(tmp_path):
    server = Server(tmp_path / "vk", guard_parent=True).start()
    try:
        value = secrets.token_hex(4)
        assert b"+OK" in server._say(f"SET k {value}")
        time.sleep(1.1)  # appendfsync everysec
        server.kill()
        assert server.pid is None
        server.start()
        assert value.encode() in server._say("GET k")
        with socket.create_connection((server.host, server.port)) as link:
            link.sendall(b"GET k\r\n")
            assert b"NOAUTH" in link.recv(100)
    finally:
        server.stop()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_guarded_server_does_not_outlive_its_parent(tmp_path, ending):
    code = (
        "import sys, time; from pathlib import Path; from embedded.valkey import Server; "
        "s = Server(Path(sys.argv[1]), guard_parent=True).start(); print(s.pid, flush=True); "
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "vk")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    parent.send_signal(ending)
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").exists():
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_nothing_is_half_made(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(small)], check=True)
    try:
        with pytest.raises(EmbeddedError, match=r"no space left .* free some"):
            Cluster(small / "pg").start()
        assert not (small / "pg" / "pgdata").exists()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_the_password_file_of_commands_is_whole_at_every_moment(tmp_path):
    cluster = Cluster(tmp_path / "pg")  # never started: only its commands are made
    cluster.root.mkdir()
    cluster.password = "w" * 40
    file = Path(cluster.tool("psql")[-1].partition("passfile=")[2])
    whole, stop = file.read_text(), Event()

    def make() -> None:
        while not stop.is_set():
            cluster.tool("psql")

    thread = Thread(target=make)
    thread.start()
    try:
        assert {file.read_text() for _ in range(800)} == {whole}
    finally:
        stop.set()
        thread.join()
    assert file.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in cluster.root.glob("pgpass.*")] == [file.name]
