"""How a long-running process starts: settings, logging, scrubbed environment, exit code 78."""

import ctypes
import logging
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event
from typing import NoReturn

from schemas.environment import load_settings
from schemas.errors import ConfigError, StartRefused
from schemas.log_lines import Shape, log_to_stderr
from schemas.profiles import Process
from schemas.scrub import scrub
from schemas.settings import Settings

logger = logging.getLogger(__name__)

EXIT_REFUSED = 78


#: Of prctl(2): whether the process may be dumped, or looked into by others of its user.
_PR_SET_DUMPABLE = 4


def start(run: Callable[[Settings], None], process: Process) -> None:
    """Read settings once and run; exit 78 with all reasons if the process must not start."""
    scrub()
    try:
        settings = load_settings(process=process)
    except StartRefused as error:
        _refuse(error.reasons, "people")
    log_to_stderr(settings.log_format)
    keep_memory_private(settings)
    try:
        run(settings)
    except StartRefused as error:
        _refuse(error.reasons, settings.log_format)
    except ConfigError as error:
        _refuse((error.public,), settings.log_format)


class Reasons:
    """Collects every reason against a start, so that they are told at once."""

    def __init__(self, known: Sequence[str] = ()) -> None:
        self._found = list(known)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Go on after a block that refuses; what it should have made is then not there."""
        try:
            yield
        except StartRefused as error:
            self._found += error.reasons
        except ConfigError as error:
            self._found.append(error.public)

    def refuse_if_any(self) -> None:
        """Raise StartRefused with all of them; return if there is none."""
        if self._found:
            raise StartRefused(self._found)


def keep_memory_private(settings: Settings) -> None:
    """Write no core file; in production also let nobody but root look into this process.

    A core file or a debugger of the same user would show plaintext credentials. Where cores are
    piped to a program the limit does not count, the second does. Development leaves it out:
    /proc then belongs to root, and its owner could not measure the process's memory.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.profile == "production" and sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def until_asked() -> Event:
    """Return what SIGTERM or SIGINT sets. The same signal a second time ends the process at once.

    Only the same one: a terminal's Ctrl-C reaches a supervisor and, before its SIGTERM, us.
    """
    stop = Event()

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


def _refuse(reasons: Sequence[str], shape: Shape) -> NoReturn:
    if shape == "json":
        logger.critical("start_refused", extra={"reasons": list(reasons)})
    else:
        sys.stderr.write(f"syncward: {StartRefused(reasons).public}\n")
    sys.exit(EXIT_REFUSED)
