"""Stop an embedded server once the process that wanted it is gone, however it went.

`python -m embedded.watchdog PARENT_PID PID_FILE PROGRAM SIGNAL` waits for the parent.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from embedded.daemons import alive, end, spawn


def guard(pid_file: Path, program: str, stop_by: signal.Signals) -> None:
    """Start a watchdog for a server that this process has started."""
    parts = (str(os.getpid()), str(pid_file), program, stop_by.name)
    spawn(sys.executable, "-m", "embedded.watchdog", *parts)


def _server(pid_file: Path, program: str) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        pid = int(pid_file.read_text(encoding="utf-8").split("\n")[0])
        return pid if alive(pid, program) else None
    return None


def _watch(parent: int, pid_file: Path, program: str, stop_by: signal.Signals) -> None:
    while (pid := _server(pid_file, program)) is not None:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            end(pid, program, stop_by, signal.SIGKILL)
            return
        time.sleep(0.5)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    _watch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], signal.Signals[sys.argv[4]])
