"""The script that ships with exports, run as often as forgeries need it.

An auditor starts an interpreter for it. Hundreds of tests do, too, and most of what that costs is
starting and importing what the script wants of others. So one interpreter per test process stays:
isolated, with nothing of ours on its path or among its modules, and forked for each run. That the
script runs when it is started plainly, tests/security/test_hostile_exports.py tries.
"""

import atexit
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

#: Forked once per line; the script itself, and what lies beside it, is read anew each time.
_PROGRAM = """
import argparse, base64, collections, contextlib, datetime, functools, hashlib, json, os, pathlib
import re, runpy, signal, sys, tempfile, types
import cryptography.exceptions, cryptography.hazmat.primitives.asymmetric.ed25519

def run(words, directory, streams):
    signal.alarm(60)
    os.chdir(directory)
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream.fileno(), number)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")

for line in sys.stdin:
    asked = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(asked["words"], asked["directory"], (out, err))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode())
    print(json.dumps([code, *said]), flush=True)
"""


@cache
def _interpreter() -> "subprocess.Popen[str]":
    started = subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", _PROGRAM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def stop() -> None:
        started.communicate()

    atexit.register(stop)
    return started


def run(script: Path, *words: str | Path, directory: Path) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of the script, run in a directory."""
    asked = {"words": [str(script), *map(str, words)], "directory": str(directory)}
    process = _interpreter()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{json.dumps(asked)}\n")
    process.stdin.flush()
    code, out, err = json.loads(process.stdout.readline())
    return code, out, err
