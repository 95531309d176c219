"""How a long-running process starts: settings, logging, scrubbed environment, exit code 78."""

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Event

from schemas.environment import load_settings
from schemas.errors import ConfigError, StartRefused
from schemas.settings import Settings

EXIT_REFUSED = 78

#: What a library may read behind our back: it would redirect connections (PGHOSTADDR) or traffic.
_SCRUBBED = ("PG", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

_KNOWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class _Formatter(logging.Formatter):
    """Static event name plus fields, for people or as one JSON object a line."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self._json = shape == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields = {k: v for k, v in record.__dict__.items() if k not in _KNOWN}
        at = datetime.fromtimestamp(record.created, UTC)
        event = record.getMessage()
        if self._json:
            line = {"at": at.isoformat(), "level": record.levelname.lower(), "event": event}
            return json.dumps({**line, **fields}, default=str)
        extra = "".join(f" {k}={v}" for k, v in fields.items())
        return f"{at:%H:%M:%S} {record.levelname.lower():<7} {event}{extra}"


def start(run: Callable[[Settings], None]) -> None:
    """Read settings once and run; exit 78 with all reasons if the process must not start."""
    for name in list(os.environ):  # noqa: TID251 - scrubbing the environment is the purpose here
        if name.upper().startswith(_SCRUBBED):
            del os.environ[name]  # noqa: TID251 - as above
    try:
        settings = load_settings()
        _log_to_stderr(settings.log_format)
        run(settings)
    except StartRefused as error:
        _refuse(error.public)
    except ConfigError as error:
        _refuse(f"refuses to start: {error.public}")


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


def _refuse(reason: str) -> None:
    sys.stderr.write(f"syncward: {reason}\n")
    sys.exit(EXIT_REFUSED)


def _log_to_stderr(shape: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(shape))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in ("dramatiq", "httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
