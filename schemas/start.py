"""How a long-running process starts: settings, logging, scrubbed environment, exit code 78."""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from threading import Event
from typing import NoReturn

from schemas.environment import load_settings
from schemas.errors import ConfigError, StartRefused
from schemas.log_lines import Shape, log_to_stderr
from schemas.scrub import scrub
from schemas.settings import Settings

logger = logging.getLogger(__name__)

EXIT_REFUSED = 78


def start(run: Callable[[Settings], None]) -> None:
    """Read settings once and run; exit 78 with all reasons if the process must not start."""
    scrub()
    try:
        settings = load_settings()
    except StartRefused as error:
        _refuse(error.reasons, "people")
    log_to_stderr(settings.log_format)
    try:
        run(settings)
    except StartRefused as error:
        _refuse(error.reasons, settings.log_format)
    except ConfigError as error:
        _refuse((error.public,), settings.log_format)


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
