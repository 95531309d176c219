"""The bytes of an event: canonical JSON, the same for everybody who writes it again.

The profile of RFC 8785: objects with keys of [a-z0-9_], lists, texts, integers that every reader
holds exactly, truth values and nothing. No floats and no lone surrogates, so that there is one way
to write each value. Start at `body_of`.
"""

import re
from typing import Final

import orjson

from schemas.audit import AuditEvent
from schemas.audit_details import DETAILS, INTEGER_MAX

VERSION: Final = 2

#: What the database takes (a CHECK of audit.event).
BODY_MAX = 65_536
#: Bytes of an operator's name (a CHECK of audit.principal).
NAME_MAX = 1_024
#: Characters of a reason; what a person typed may be longer and is cut.
REASON_MAX = 2_000

Scalar = str | int | bool | None

_KEY = re.compile(r"[a-z0-9_]+")
_OUTCOMES = frozenset({"success", "attempted", "denied", "error"})


class OutOfProfile(ValueError):  # noqa: N818 - reads best where it is raised
    """A value that has no canonical bytes: our bug, because texts from outside are escaped."""


def canonical(value: object) -> bytes:
    """Return the canonical bytes of a value; OutOfProfile says what is wrong with it."""
    _check(value)
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _check(value: object) -> None:
    match value:
        case str():
            _check_text(value)
        case dict():
            for key, item in value.items():
                _check_key(key)
                _check(item)
        case None | bool():
            return
        case int():
            if not -INTEGER_MAX <= value <= INTEGER_MAX:
                raise OutOfProfile("audit: an integer is beyond 2^53 - 1")
        case list() | tuple():
            for item in value:
                _check(item)
        case _:
            raise OutOfProfile(f"audit: a {type(value).__name__} has no canonical bytes")


def _check_key(key: object) -> None:
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise OutOfProfile("audit: a key is not of a-z, 0-9 and _")


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OutOfProfile("audit: a text holds a lone surrogate") from None


def escaped(text: str) -> str:
    r"""Return a text from outside as one that can be written: what cannot becomes `\udcff`, `\x00`.

    Nothing that people or other systems call themselves may keep an event from being written.
    """
    if type(text) is not str:  # of an enumeration
        text = str(text)
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\0", "\\x00") if "\0" in text else text


def cut(reason: str) -> str:
    """Return a reason no longer than is kept."""
    text = escaped(reason)
    return text if len(text) <= REASON_MAX else f"{text[: REASON_MAX - 1]}…"


def checked(event: AuditEvent) -> dict[str, Scalar]:
    """Return the detail of an event as it is written: within the profile, its texts escaped.

    Raises ValueError, which is our bug, for a detail or an outcome that its action cannot have.
    """
    detail = {
        name: escaped(value) if isinstance(value, str) else value
        for name, value in event.detail.items()
    }
    DETAILS[event.action].__pydantic_validator__.validate_python(detail)
    if event.outcome not in _OUTCOMES:
        raise ValueError(f"audit: {event.action} has no outcome {event.outcome!r}")
    return detail


def body_of(event: AuditEvent, detail: dict[str, Scalar], principal: str) -> str:
    """Return the body of an event: its detail as `checked`, its principal named as given.

    Each part is within the profile by now, so it is not looked at again (a test does). Raises
    ValueError, which is our bug, for a body that is too large.
    """
    body: dict[str, object] = {
        "detail": detail,
        "outcome": event.outcome,
        "principal": principal,
        "v": VERSION,
    }
    if event.change:
        body["change"] = [
            {"after": one.after, "before": one.before, "field": escaped(one.field)}
            for one in event.change
        ]
    if event.reason is not None:
        body["reason"] = cut(event.reason)
    if event.run_id is not None:
        body["run_id"] = str(event.run_id)
    if event.principal.request is not None:
        body["request"] = event.principal.request
    made = orjson.dumps(body, option=orjson.OPT_SORT_KEYS | orjson.OPT_STRICT_INTEGER)
    if len(made) > BODY_MAX:
        raise ValueError(f"audit: {event.action} is {len(made)} bytes, more than {BODY_MAX}")
    return made.decode()
