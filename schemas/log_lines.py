"""Process logs: one line per event, a static name plus fields, for people or as JSON.

`bind(run_id=…)` adds fields to every line of this thread, from whatever module, until `unbind()`.
What an exception says is never logged, for a driver's text may quote a row or a password: a
traceback becomes its type and the places in the code, and only texts that we wrote ourselves are
shown. Of a library's line its template is shown without what it was filled with, likewise. What is
left passes schemas/redaction.py like everything that leaves a process.
"""

import json
import logging
import re
import sys
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal
from uuid import UUID

from schemas.errors import SyncwardError
from schemas.redaction import DEPTH_MAX, REDACTOR

Shape = Literal["people", "json"]

#: Loggers that are not ours: only warnings, and nothing that they were told.
LIBRARIES = ("dramatiq", "httpx", "httpcore")
#: Frames of a traceback that a line shows, innermost first.
FRAMES_MAX = 12

_bound: ContextVar[dict[str, object]] = ContextVar("bound", default={})  # noqa: B039 - never changed in place

_KNOWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def bind(**fields: object) -> None:
    """Add these fields, and no others, to every line that this thread logs from now on."""
    _bound.set(fields)


def unbind() -> None:
    """Add nothing any more."""
    _bound.set({})


class Formatter(logging.Formatter):
    """Writes one event as one line."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; never raises, whatever the fields are."""
        at = datetime.fromtimestamp(record.created, UTC)
        fields = {**_bound.get(), **_extra(record), **_exception(record)}
        event = record.getMessage()
        if record.name.startswith(LIBRARIES):
            event, fields = "library", {**fields, "logger": record.name, "about": str(record.msg)}
        event, fields = REDACTOR.text(event), _masked(fields)
        if self._shape == "json":
            head = {"at": at.isoformat(), "level": record.levelname.lower(), "event": event}
            return json.dumps(
                {**head, **{k: v for k, v in fields.items() if k not in head}}, default=str
            )
        text = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        return f"{at:%H:%M:%S} {record.levelname.lower():<7} {_one_line(event)}{text}"


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in record.__dict__.items() if name not in _KNOWN}


def _masked(fields: dict[str, object]) -> dict[str, object]:
    """Pass the fields through the sink; what is no JSON becomes text before, not after.

    Their names are words of ours, and an id says nothing: neither costs a search.
    """
    return {
        name: str(value) if isinstance(value, UUID) else REDACTOR.under(name, _plain(value))
        for name, value in fields.items()
    }


def _plain(value: object, depth: int = 0) -> object:
    match value:
        case str() | bool() | int() | float() | None:
            return value
        case Mapping() if depth < DEPTH_MAX:
            return {str(name): _plain(item, depth + 1) for name, item in value.items()}
        case list() | tuple() | set() | frozenset() if depth < DEPTH_MAX:
            return [_plain(item, depth + 1) for item in value]
        case BaseException() if not isinstance(value, SyncwardError):
            return type(value).__name__
        case _:
            return _text_of(value)


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a line is written whatever its fields are
        return f"<{type(value).__name__}>"


def _exception(record: logging.LogRecord) -> dict[str, object]:
    if not record.exc_info or record.exc_info[1] is None:
        return {}
    error = record.exc_info[1]
    found: dict[str, object] = {"error": type(error).__name__, "where": frames(error)}
    if isinstance(error, SyncwardError):
        found |= {"code": error.code, "reason": error.public}
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        found |= {"cause": type(cause).__name__, "cause_where": frames(cause)}
    return found


def frames(error: BaseException) -> list[str]:
    """Return the places of a traceback, innermost first, without source lines or values."""
    places = []
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        file = "/".join(code.co_filename.rsplit("/", 2)[-2:])
        places.append(f"{file}:{step.tb_lineno} {code.co_name}")
        step = step.tb_next
    return places[::-1][:FRAMES_MAX]


def _shown(value: object) -> str:
    """Return a field for people: quoted where it would not read as one word."""
    text = " < ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = _one_line(text)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[\s="]', text) or not text else text


def _one_line(text: str) -> str:
    """Replace what could end the line or drive a terminal."""
    return _UNSAFE.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def log_to_stderr(shape: Shape) -> None:
    """Send all logs of this process to stderr, also what nobody caught."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(shape))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for chatty in LIBRARIES:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
    )


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logging.getLogger("syncward").critical("crashed", exc_info=(kind, error, trace))
