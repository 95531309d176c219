"""Another's program as a child: started, read line by line, ended with all that it has started.

Its documents (config, catalog, state) are memory that it inherits as `/dev/fd/N`: nothing is in
its arguments, its environment or on a disk. What it writes waits in its pipe until it is read, so a
slow destination slows it down. launcher.py sets the limits, and kills it when the worker is
gone.
"""

import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Self

from connectors.child.guard import PROXY, Guard, Reach
from connectors.child.installed import Installed
from connectors.child.voice import Voice
from schemas.children import ChildPolicy
from schemas.errors import ConfigError, SyncwardError, TransientError

#: Of one message.
LINE_MAX = 16 * 2**20
#: A document that the child may have written: its config.
DOCUMENT_MAX = 2**20
_PIECE = 2**18
#: After the end of its output it ends within so many seconds, and after being killed.
_ENDS_WITHIN_S, _DIES_WITHIN_S = 20.0, 3.0
#: Some programs look for the one, some for the other.
_PROXY_NAMES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
_LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, slots=True)
class Ending:
    """What became of a child: its exit code, or the signal or the limit that ended it."""

    code: int | None = None
    signal: int | None = None
    limit: str = ""
    stopped: bool = False


class Child:
    """One process, from its start to its end; a context. `cancel` comes from other threads."""

    def __init__(
        self,
        installed: Installed,
        policy: ChildPolicy,
        voice: Voice,
        gone: "Callable[[Child], None]" = lambda _child: None,
        reach: Reach | None = None,
    ) -> None:
        self.shown = installed.shown
        self._installed = installed
        self._policy = policy
        self.voice = voice
        self._gone = gone
        self._reach = reach  # None: whatever the host can reach
        self._guard: Guard | None = None
        self._given: dict[str, bytes] = {}
        self._lock = Lock()
        self._cancelled = False
        self._launcher: subprocess.Popen[bytes] | None = None
        self._documents: dict[str, int] = {}
        self._wake, self._waker = os.pipe()
        self._status = -1
        self._scratch: Path | None = None
        self._listener: Thread | None = None
        self.received = 0  # bytes of its output
        self._rest = b""  # a last line without an end

    # ── its life ─────────────────────────────────────────────────────────────────────────────

    def start(self, arguments: Sequence[str], documents: Mapping[str, bytes]) -> Self:
        """Start it; `{NAME}` among the arguments is where it finds the document NAME."""
        try:
            self._start(arguments, documents)
        except OSError as error:
            self.close()
            raise TransientError(
                f"{self.shown}: this worker cannot start a process now ({error.strerror}); tried "
                "again",
                code="connector_failed",
            ) from error
        except BaseException:
            self.close()
            raise
        return self

    def _start(self, arguments: Sequence[str], documents: Mapping[str, bytes]) -> None:
        self._scratch = self._made_scratch()
        for name, content in documents.items():
            self._documents[name], self._given[name] = _memory(name, content), content
        places = {name: f"/dev/fd/{number}" for name, number in self._documents.items()}
        self._status, status = os.pipe()
        passed = [status, *self._documents.values()]
        guard: int | None = None
        if self._reach is not None:
            self._guard = Guard(self._reach, self._policy.traffic, self._end)
            guard = self._guard.start()
            passed.append(guard)
        order = {
            "command": [*self._installed.command, *(a.format(**places) for a in arguments)],
            "environment": self._environment(),
            "directory": str(self._scratch),
            "keep": list(self._documents.values()),
            "status": status,
            "guard": guard,
            "memory": self._policy.memory,
            "cpu": self._policy.cpu.total_seconds(),
            "user": self._policy.user,
            "confined": self._policy.confined,
            "readable": [*map(str, self._installed.readable), *map(str, self._policy.readable)],
        }
        try:
            launcher = subprocess.Popen(  # noqa: S603 - our own program; what it starts was verified
                [sys.executable, "-I", "-S", "-B", str(_LAUNCHER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                pass_fds=passed, env={}, cwd=self._scratch,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        finally:
            os.close(status)
            if self._guard is not None:
                self._guard.launched()
        with self._lock:
            self._launcher = launcher
        assert launcher.stdin is not None  # noqa: S101 - a pipe
        with suppress(ValueError):  # cancelled meanwhile, which closed it: the first read says so
            launcher.stdin.write(json.dumps(order).encode() + b"\n")
        self._listener = Thread(target=self._listen, name="child-stderr", daemon=True)
        self._listener.start()

    def _made_scratch(self) -> Path:
        made = Path(tempfile.mkdtemp(prefix="syncward-child-"))
        if self._policy.user is not None:
            try:
                entry = pwd.getpwnam(self._policy.user)
                os.chown(made, entry.pw_uid, entry.pw_gid)
            except (KeyError, PermissionError) as error:
                made.rmdir()
                raise ConfigError(
                    f"{self.shown}: this worker cannot run it as {self._policy.user}, the login of "
                    "SYNCWARD_CONNECTORS_USER: there is no such login, or the worker may not "
                    "switch to it",
                    code="connector_off",
                ) from error
        return made

    def _environment(self) -> dict[str, str]:
        home = str(self._scratch)
        proxy = {} if self._reach is None else dict.fromkeys(_PROXY_NAMES, PROXY)
        return {
            "PATH": f"{self._installed.bin}:/usr/bin:/bin",
            "HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "LANG": "C.UTF-8", "TZ": "UTC",
            "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1",
            "MALLOC_ARENA_MAX": "2", "DO_NOT_TRACK": "1", **proxy,
        }  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End it and all that it has started, now; more than once does no harm."""
        with self._lock:
            self._cancelled = True
            with suppress(OSError):
                os.write(self._waker, b"x")
            self._let_go()

    def _end(self) -> None:
        """End it, for a reason that is told when its output has ended."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        """Close what the launcher waits on: it kills them all."""
        if self._launcher is not None and self._launcher.stdin is not None:
            with suppress(OSError):
                self._launcher.stdin.close()

    def close(self) -> None:
        """Leave nothing behind: no process, no file, no descriptor."""
        launcher = self._launcher
        with self._lock:
            self._let_go()
        if launcher is not None:
            try:
                launcher.wait(_DIES_WITHIN_S)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()
            if self._listener is not None:
                self._listener.join(_DIES_WITHIN_S)
            for pipe in (launcher.stdout, launcher.stderr):
                if pipe is not None:
                    pipe.close()
        if self._guard is not None:
            self._guard.close()
        self.voice.close()
        with self._lock:
            self._launcher = None
            for number in (self._wake, self._waker, self._status, *self._documents.values()):
                if number >= 0:
                    with suppress(OSError):
                        os.close(number)
            self._wake = self._waker = self._status = -1
            self._documents = {}
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        self._gone(self)

    # ── what it says ─────────────────────────────────────────────────────────────────────────

    def lines(self) -> Iterator[bytes]:
        """Yield each line of its output without its end; blank ones are left out."""
        parts: list[bytes] = []
        waiting = 0
        while piece := self._read():
            *lines, last = piece.split(b"\n")
            for line in lines:
                whole = b"".join([*parts, line]) if parts else line
                parts, waiting = [], 0
                if whole and not whole.isspace():
                    yield whole
            if last:
                parts.append(last)
                waiting += len(last)
            if waiting > LINE_MAX:
                raise ConfigError(
                    f"{self.shown}: sent a line of more than {LINE_MAX >> 20} MiB; read less of "
                    "each record, or use another connector",
                    code="connector_limit",
                )
        self._rest = b"".join(parts)

    @property
    def torn(self) -> bool:
        """Whether its output ended in the middle of a line."""
        return bool(self._rest.strip())

    def _read(self) -> bytes:
        """Return what there is, as soon as there is something; b"" at the end of its output."""
        launcher = self._launcher
        if launcher is None or launcher.stdout is None:
            raise RuntimeError("a child is read before it is started, or after it is closed")
        number = launcher.stdout.fileno()
        self._wait(number, self._policy.silence.total_seconds(), "said nothing for")
        piece = os.read(number, _PIECE)
        self.received += len(piece)
        return piece

    def _wait(self, number: int, seconds: float, what: str) -> None:
        poll = select.poll()
        poll.register(number, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        ready = [found for found, _ in poll.poll(seconds * 1_000)]
        if self._cancelled:
            raise TransientError(f"{self.shown}: was cancelled", code="cancelled_there")
        if not ready:
            raise TransientError(
                f"{self.shown}: {what} {seconds:.0f} s and was ended; tried again",
                code="connector_failed",
            )

    def ending(self) -> Ending:
        """Return what became of it, after the end of its output."""
        seconds = min(_ENDS_WITHIN_S, self._policy.silence.total_seconds())
        self._wait(self._status, seconds, "closed its output, went on for")
        told = os.read(self._status, 4_096)
        if self._listener is not None:
            self._listener.join(_DIES_WITHIN_S)  # so that its last words are there
        self.voice.close()
        if self._reach is not None:
            self._reach.check()
        if not told:
            return Ending(signal=signal.SIGKILL)  # the launcher itself was killed
        found = json.loads(told)
        return Ending(found["code"], found["signal"], found["limit"], found["stopped"])

    def rewritten(self, name: str) -> bytes | None:
        """Return a document that the child has written anew since the last look; None if not."""
        number = self._documents.get(name)
        content = None if number is None else os.pread(number, DOCUMENT_MAX + 1, 0)
        if content is None or content == self._given[name]:
            return None
        self._given[name] = content
        return content

    def _listen(self) -> None:
        launcher = self._launcher
        if launcher is None or launcher.stderr is None:
            return
        with suppress(OSError, ValueError):
            while piece := os.read(launcher.stderr.fileno(), _PIECE):
                self.voice.feed(piece)

    def whole_output(self, most: int) -> bytes:
        """Return all lines of its output, for what answers with one document."""
        found = bytearray()
        for line in self.lines():
            found += line + b"\n"
            if len(found) > most:
                raise ConfigError(
                    f"{self.shown}: answers with more than {most >> 20} MiB",
                    code="connector_limit",
                )
        return bytes(found + self._rest)


def _memory(name: str, content: bytes) -> int:
    number = os.memfd_create(name)
    os.truncate(number, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(number, content[written:], written)
    return number


def check_ending(child: Child, ending: Ending) -> None:
    """Raise what an end that is none of success means; says nothing of what the child said."""
    failed: SyncwardError | None = None
    shown, hint = child.shown, "`run logs` shows what it said"
    if ending.limit == "guard":
        failed = ConfigError(
            f"{shown}: the kernel does not let this worker guard it (is the worker itself under a "
            "seccomp filter that asks somebody?); docs/child-connectors.md",
            code="connector_off",
        )
    elif ending.limit:
        what = {"memory": "took more memory than", "cpu": "computed for longer than"}.get(
            ending.limit, "started more processes than"
        )
        failed = ConfigError(
            f"{shown}: {what} this installation allows and was ended (docs/child-connectors.md)",
            code="connector_limit",
        )
    elif ending.stopped:
        failed = TransientError(f"{shown}: was stopped; tried again", code="connector_failed")
    elif ending.signal is not None:
        failed = TransientError(
            f"{shown}: was ended by signal {ending.signal}; {hint}", code="connector_failed"
        )
    elif ending.code != 0:
        failed = TransientError(
            f"{shown}: ended with exit code {ending.code}; {hint}", code="connector_failed"
        )
    if failed is not None:
        raise failed
