"""A MariaDB server for tests: Debian's binaries in a cache, nothing of the system is touched.

It listens on loopback with a certificate of its own, and ends with the test process.
"""

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pymysql
import pytest

from embedded import watchdog
from tests.tls_proxy import certificate

_CACHE = Path(tempfile.gettempdir()) / f"syncward-mariadb-{os.getuid()}"
#: The server, and what of its libraries a small system lacks.
_PACKAGES = ("mariadb-server-core", "liburing2", "libaio1", "libnuma1", "libpcre2-8-0")
_ADMIN = ("keeper", "keeper-of-tests")
_numbers = count(1)


@dataclass(frozen=True)
class MariaDb:
    """A running server."""

    port: int
    authority: Path
    directory: Path

    def connect(self, database: str | None = None, **more) -> pymysql.Connection:
        """Return an administrator's session in Standard SQL's quotes, times in UTC."""
        return pymysql.connect(
            host="127.0.0.1", port=self.port, user=_ADMIN[0], password=_ADMIN[1],
            database=database, charset="utf8mb4", autocommit=True, sql_mode="ANSI_QUOTES",
            init_command="SET time_zone = '+00:00'", ssl_disabled=True, **more,
        )  # fmt: skip

    def database(self) -> tuple[str, dict[str, object], dict[str, str]]:
        """Make a database and a login that can read it; return its name, config and secrets."""
        name = f"shop{next(_numbers)}"
        password = f"reader-{name}-secret"
        with self.connect() as admin, admin.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{name}" CHARACTER SET utf8mb4')
            cursor.execute(f"CREATE USER '{name}'@'%%' IDENTIFIED BY %s REQUIRE SSL", (password,))
            cursor.execute(f"GRANT SELECT, SHOW VIEW ON \"{name}\".* TO '{name}'@'%'")
            cursor.execute(f"GRANT PROCESS ON *.* TO '{name}'@'%'")
        config = {
            "host": "localhost", "port": self.port, "database": name, "user": name,
            "sslrootcert": str(self.authority),
        }  # fmt: skip
        return name, config, {"password": password}

    def forget(self, login: str) -> None:
        """Give a login another password than the one that was handed out."""
        with self.connect() as admin, admin.cursor() as cursor:
            cursor.execute(f"ALTER USER '{login}'@'%' IDENTIFIED BY 'another'")


@functools.cache
def _binaries() -> Path | str:
    """Return where the packages are unpacked, or why they cannot be had."""
    done = _CACHE / "unpacked"
    if done.exists():
        return done
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "no apt-get here"
    _CACHE.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        # as whoever may not update the lists: they may be new enough
        subprocess.run(["apt-get", "update", "-qq"], check=False, capture_output=True)
        got = subprocess.run(
            ["apt-get", "download", "-qq", *_PACKAGES],
            cwd=scratch, check=False, capture_output=True, text=True,
        )  # fmt: skip
        if got.returncode != 0:
            return "apt-get cannot download it"
        target = Path(scratch) / "unpacked"
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, target], check=True)
        try:
            target.rename(done)
        except OSError:  # another test process was faster
            assert done.exists()
    return done


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def server() -> MariaDb:
    """Start the one server of this test process; skips where there can be none."""
    tree = _binaries()
    if isinstance(tree, str):
        pytest.skip(f"needs Debian's MariaDB: {tree}")
    directory = Path(tempfile.mkdtemp(prefix="syncward-mariadb-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    directory.chmod(0o755)
    data = directory / "data"
    data.mkdir()
    tls, key = certificate(directory, "localhost")
    owner = "nobody" if os.getuid() == 0 else None
    if owner:  # the server refuses to be root's
        for path in (directory, data, key, tls):
            shutil.chown(path, owner)
    libraries = [p.parent for p in tree.rglob("lib*.so.*")]
    # a zone of its own, so that nothing works by being in UTC
    environment = {
        "LD_LIBRARY_PATH": ":".join(dict.fromkeys(map(str, libraries))),
        "TZ": "America/New_York",
    }
    port = _free_port()
    share = tree / "usr" / "share" / "mysql"
    common = [
        str(tree / "usr" / "sbin" / "mariadbd"), "--no-defaults", f"--datadir={data}",
        f"--lc-messages-dir={share}", f"--character-sets-dir={share / 'charsets'}",
        "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--innodb-use-native-aio=0",
        f"--pid-file={directory / 'pid'}", f"--socket={directory / 'socket'}",
        *([f"--user={owner}"] if owner else []),
    ]  # fmt: skip
    _bootstrap(common, environment, share, directory)
    first = directory / "first.sql"
    first.write_text(
        f"CREATE OR REPLACE USER '{_ADMIN[0]}'@'%' IDENTIFIED BY '{_ADMIN[1]}';\n"
        f"GRANT ALL ON *.* TO '{_ADMIN[0]}'@'%' WITH GRANT OPTION;\n"
    )
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [
                *common, f"--port={port}", "--bind-address=127.0.0.1", f"--ssl-cert={tls}",
                f"--ssl-key={key}", "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0",
                f"--init-file={first}", "--skip-log-bin", "--max-connections=200",
                f"--plugin-dir={tree}/usr/lib/mysql/plugin",
            ],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    watchdog.guard(directory / "pid", "mariadbd", signal.SIGTERM)
    atexit.register(_stop, process)
    made = MariaDb(port, tls, directory)
    _wait(made, process)
    return made


def _bootstrap(
    common: list[str], environment: dict[str, str], share: Path, directory: Path
) -> None:
    """Make the system's tables."""
    parts = ["CREATE DATABASE mysql;\nUSE mysql;\nSET @current_hostname = 'localhost';\n"]
    for name in ("system_tables", "performance_tables", "system_tables_data"):
        parts += [(share / f"mysql_{name}.sql").read_text()]
    done = subprocess.run(
        [*common, "--bootstrap", "--skip-log-bin", "--loose-skip-wsrep-on"],
        input="".join(parts), env=environment, capture_output=True, text=True, check=False,
        cwd=directory,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]


def _wait(made: MariaDb, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            made.connect().close()
        except pymysql.MySQLError:
            log = (made.directory / "log").read_text()
            assert process.poll() is None, log[-3_000:]
            assert time.monotonic() < end, log[-3_000:]
            time.sleep(0.1)
        else:
            return


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
