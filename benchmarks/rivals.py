"""The rivals, each in an environment of its own: start at `installed`, then Sling and Dlt.

What they are is pinned with hashes in locks/. Their logins are those of the engine's document; they
read them from files of mode 0600 in the temporary directory, because neither asks for less.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson

from benchmarks.contestants import CURSOR, KEY, TABLE, Target
from benchmarks.lab import HERE, Lab, Usage, measured

LOCKS = HERE / "locks"
CACHE = Path.home() / ".cache" / "syncward" / "bench"
RIVALS = ("sling", "dlt")


class NotToBeHad(Exception):  # noqa: N818 - an answer more than an error
    """A rival (or the Postgres with TLS) could not be installed here."""


def installed(name: str, cache: Path) -> Path:
    """Return the environment of a locked set of packages, making it the first time."""
    lock = LOCKS / f"{name}.lock"
    home = cache / f"{name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:12]}"
    if (home / "complete").exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    uv = Path(sys.executable).with_name("uv")
    commands: tuple[list[str | Path], ...] = (
        [uv, "venv", "--quiet", "--python", sys.executable, home],
        [uv, "pip", "install", "--quiet", "--system-certs", "--python", home / "bin" / "python",
         "--no-deps", "--require-hashes", "-r", lock],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NotToBeHad(f"{name}: {lock.name} could not be installed ({why})")
    (home / "complete").touch()
    return home


def versions(name: str) -> dict[str, str]:
    """Return what a lock pins of the packages that its .in names."""
    wanted = (LOCKS / f"{name}.in").read_text(encoding="utf-8").splitlines()
    names = {line.split("[")[0].split("=")[0].split("<")[0].split(">")[0] for line in wanted}
    lines = (LOCKS / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split(" ")[0].split("==") for line in lines if "==" in line)
    return {found: pinned[found] for found in sorted(names)}


def tls_bindir(cache: Path) -> Path:
    """Return the programs of a Postgres that has TLS; those of the tests have none."""
    home = installed("tls", cache)
    found = sorted(home.rglob("bin/postgres"))
    if not found:
        raise NotToBeHad("tls: no server programs in its wheel")
    return found[0].parent


class Sling:
    """`sling run` with its own choice of bulk loading, a key and an update key."""

    name = "sling"

    def __init__(self, made: Lab, cache: Path) -> None:
        (self._program,) = installed("sling", cache).rglob("bin/sling-linux-amd64")
        self._made = made
        self._home = made.root / "sling"
        self._home.mkdir(mode=0o700)
        ends = {
            name: {
                "type": "postgres", "host": cluster.host, "port": cluster.port,
                "database": "postgres", "user": login, "sslmode": "disable",
                "password": made.login(cluster, login).read_text(encoding="utf-8"),
            }
            for name, login, cluster in (
                ("SHOP", "shop", made.source), ("LAKE", "lake", made.destination),
            )
        }  # fmt: skip
        private(self._home / "env.yaml", orjson.dumps({"connections": ends}).decode())

    def schema(self, target: Target) -> str:
        return f"sling_{target}"

    def forget(self, target: Target) -> None:
        schema = self.schema(target)
        self._made.act(self._made.destination, f"DROP SCHEMA IF EXISTS {schema} CASCADE")

    def load(self, target: Target, *, first: bool) -> Usage:
        path = self._home / f"{target}-{'first' if first else 'again'}.yaml"
        defaults: dict[str, object] = {
            "mode": "full-refresh" if first else "incremental",
            "primary_key": [KEY],
            "object": f"{self.schema(target)}.{TABLE}",
            "target_options": {"table_keys": {"primary": [KEY]}},
        }
        if target is Target.CHANGES:
            defaults["update_key"] = CURSOR
        document = {
            "source": "SHOP",
            "target": "LAKE",
            "defaults": defaults,
            "streams": {f"public.{TABLE}": {}},
        }
        path.write_bytes(orjson.dumps(document))  # JSON is YAML
        return self._run("run", "-r", str(path))

    def start(self) -> Usage:
        """Start it for nothing."""
        return self._run("--version")

    def _run(self, *arguments: str) -> Usage:
        return measured(
            [self._program, *arguments],
            log=self._home / "log",
            environment={
                "PATH": os.defpath,
                "HOME": str(self._home),
                "SLING_HOME_DIR": str(self._home),
                "SLING_DISABLE_TELEMETRY": "true",
            },
            directory=self._home,
        )


class Dlt:
    """dlt_load.py: connectorx, CSV into COPY, merge by key."""

    name = "dlt"

    def __init__(self, made: Lab, cache: Path) -> None:
        self._python = installed("dlt", cache) / "bin" / "python"
        self._made = made
        self._home = made.root / "dlt"
        (self._home / ".dlt").mkdir(mode=0o700, parents=True)
        sections = (
            ("sources.sql_database", "shop", made.source),
            ("destination.postgres", "lake", made.destination),
        )
        lines = []
        for section, login, cluster in sections:
            password = made.login(cluster, login).read_text(encoding="utf-8")
            lines += [
                f"[{section}.credentials]",
                'drivername = "postgresql"',
                f'host = "{cluster.host}"',
                f"port = {cluster.port}",
                'database = "postgres"',
                f'username = "{login}"',
                f'password = "{password}"',
            ]
        private(self._home / ".dlt" / "secrets.toml", "\n".join(lines))
        (self._home / ".dlt" / "config.toml").write_text(
            "[runtime]\ndlthub_telemetry = false\n[data_writer]\ndisable_compression = true\n",
            encoding="utf-8",
        )

    def schema(self, target: Target) -> str:
        return f"dlt_{target}"

    def forget(self, target: Target) -> None:
        schema = self.schema(target)
        for name in (schema, f"{schema}_staging"):
            self._made.act(self._made.destination, f"DROP SCHEMA IF EXISTS {name} CASCADE")
        shutil.rmtree(self._home / "pipelines" / schema, ignore_errors=True)

    def load(self, target: Target, *, first: bool) -> Usage:
        arguments = [self.schema(target)]
        arguments += ["--cursor"] if target is Target.CHANGES else []
        arguments += ["--first"] if first else []
        return self._run(str(HERE / "dlt_load.py"), *arguments)

    def start(self) -> Usage:
        """Start it for nothing, with its imports."""
        return self._run("-c", "import dlt, connectorx; from dlt.sources.sql_database import *")

    def _run(self, *arguments: str) -> Usage:
        return measured(
            [self._python, *arguments],
            log=self._home / "log",
            environment={"PATH": os.defpath, "HOME": str(self._home)},
            directory=self._home,
        )


def private(path: Path, text: str) -> None:
    """Write a file that nobody else can read at any moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
