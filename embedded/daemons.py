"""What both embedded servers need: ports, pids, private files, exclusion between starters."""

import fcntl
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedded.errors import EmbeddedError

HOST = "127.0.0.1"


def scrubbed_environment() -> dict[str, str]:
    """Return the environment of a server: nothing of ours, no PG*, UTC and UTF-8."""
    return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": "/nonexistent"}


def spawn(*command: str) -> int:
    """Start a daemon in a session of its own, without our pipes and environment; return its pid."""
    nothing = (
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    )
    return os.posix_spawn(
        command[0], command, scrubbed_environment(), file_actions=nothing, setsid=True
    )


def free_port(preferred: int | None) -> int:
    """Return the preferred port if it is free, else any free one."""
    for port in (preferred, 0):
        if port is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EmbeddedError(f"no free port on {HOST}; close something that listens there")


def answers(port: int) -> bool:
    """Say whether something accepts connections on a port."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False


def private_password(path: Path) -> str:
    """Return the password kept in a file of mode 0600, making both the first time."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text(encoding="utf-8")


def alive(pid: int, program: str) -> bool:
    """Say whether a pid is a living process of this program (a pid may have been given away)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return _alive_without_proc(pid)
    return state != "Z" and program.encode() in command


def _alive_without_proc(pid: int) -> bool:
    if Path("/proc/self").exists():
        return False
    try:  # macOS: no /proc; the pid alone must do
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def end(pid: int, program: str, *signals: signal.Signals, patience_s: float = 30) -> None:
    """Signal a process and wait until it is gone, with harsher signals when it stays."""
    for number in signals:
        if not alive(pid, program):
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        if _gone(pid, program, patience_s):
            return
    if alive(pid, program):
        raise EmbeddedError(f"{program} (pid {pid}) does not stop; end it by hand: kill -9 {pid}")


def _gone(pid: int, program: str, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        exited(pid)
        if not alive(pid, program):
            return True
        time.sleep(0.02)
    return False


def exited(pid: int) -> bool:
    """Say whether a child of ours has ended; takes its exit status, or it stays as a zombie."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Let one starter at a time work on a directory."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
