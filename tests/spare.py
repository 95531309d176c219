"""Interpreters that have imported already, forked for each program that a test runs.

Most of what a short program costs is to start an interpreter and to import. Where that is not the
question, a test takes a fork of one that has done both. The program gets arguments, environment,
directory and streams of its own, as if it had been started; what kills it kills the fork alone.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PATIENCE_S = 120

#: Asked over its socket: a link for each program, with its streams and what to run.
_SERVER = """
import gc, json, os, runpy, socket, sys
asked = socket.socket(fileno=int(sys.argv[1]))

def serve(link):
    streams = socket.recv_fds(link, 1, 3)[1]
    order = json.loads(link.makefile().readline())
    pid = os.fork()
    if pid == 0:
        asked.close()
        link.close()
        become(order, streams)
    link.sendall(f"{os.waitpid(pid, 0)[1]}\\n".encode())
    os._exit(0)

def become(order, streams):
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(order["directory"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [order["program"], *order["words"]]
    if order["is_module"]:
        sys.modules.pop(order["program"], None)
        runpy.run_module(order["program"], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(order["program"], run_name="__main__")
    sys.exit()

def bury():
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return

gc.freeze()
while True:
    _, links, _, _ = socket.recv_fds(asked, 1, 1)
    if not links:
        break
    bury()
    if os.fork() == 0:
        serve(socket.socket(fileno=links[0]))
    os.close(links[0])
"""


class Spare:
    """One interpreter that waits; it ends with the process that made it."""

    def __init__(self, imports: Sequence[str], *flags: str) -> None:
        self._asked, theirs = socket.socketpair()
        first = f"import {', '.join(imports)}\n"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", first + _SERVER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=ROOT,
                env={"PATH": os.defpath},
            )  # fmt: skip

    def run(
        self,
        program: str | Path,
        *words: str | Path,
        directory: Path = ROOT,
        environment: Mapping[str, str] | None = None,
        given: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a module, or a script if it is a path, to its end."""
        order = {
            "program": str(program), "is_module": not isinstance(program, Path),
            "words": [str(word) for word in words], "directory": str(directory),
            "environment": dict(environment or {"PATH": os.defpath}),
        }  # fmt: skip
        ours, theirs = socket.socketpair()
        with (
            ours,
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
        ):
            stdin.write(given.encode())
            stdin.seek(0)
            with theirs:
                socket.send_fds(self._asked, [b"."], [theirs.fileno()])
            socket.send_fds(ours, [b"."], [stdin.fileno(), stdout.fileno(), stderr.fileno()])
            ours.sendall(f"{json.dumps(order)}\n".encode())
            ours.settimeout(_PATIENCE_S)
            with ours.makefile() as answers:
                status = int(answers.readline())
            said = []
            for stream in (stdout, stderr):
                stream.seek(0)
                said.append(stream.read().decode())
        return subprocess.CompletedProcess(
            [str(program), *map(str, words)], os.waitstatus_to_exitcode(status), *said
        )


@cache
def auditor() -> Spare:
    """Isolated, with nothing of ours on its path or among its modules: for scripts of exports."""
    wanted = (
        "argparse", "base64", "collections", "contextlib", "datetime", "functools", "hashlib",
        "re", "types", "pathlib", "cryptography.exceptions",
        "cryptography.hazmat.primitives.asymmetric.ed25519",
    )  # fmt: skip
    return Spare(wanted, "-I", "-B")


@cache
def ours() -> Spare:
    """With the command line, a worker, a scheduler and what they import."""
    wanted = (
        "cli.main", "cli.apply", "cli.runs", "cli.resources", "workers.main", "scheduler.main",
        "tests.connectors.conformance.child",
    )  # fmt: skip
    return Spare(wanted)
