"""Stop an embedded server once the process that wanted it is gone, however it went.

`python -m embedded.watchdog PARENT_PID KIND ROOT` waits for the parent; Linux and macOS alike.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def guard(root: Path, kind: str) -> None:
    """Start a watchdog for a server below `root` that this process has started."""
    subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "embedded.watchdog", str(os.getpid()), kind, str(root)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=Path(__file__).parent.parent,
    )


def _watch(parent: int, kind: str, root: Path) -> None:
    from embedded.postgres import Cluster  # noqa: PLC0415 - both import this module
    from embedded.valkey import Server  # noqa: PLC0415

    server = Cluster(root) if kind == "postgres" else Server(root)
    while server.pid is not None:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            server.stop()
            return
        time.sleep(0.5)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    _watch(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
