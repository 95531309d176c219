"""What an answer means: records, nothing, once more, or an error of the right class."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from connectors.http_link import Answer
from connectors.rest import exact_json, limits
from connectors.rest import text as rest_text
from connectors.rest.parts import ErrorHandler, Filter
from schemas.errors import ConfigError, CredentialsError, SyncwardError, TransientError

_NO_CONTENT = 204
_LOGIN, _FORBIDDEN, _NOT_FOUND, _TOO_MANY = 401, 403, 404, 429
_LATER = {408, 425}
_ERRORS, _SERVERS = 400, 500
_MULTIPLE = 300


class Meaning(Enum):
    """What is done next."""

    READ = auto()
    NOTHING = auto()
    AGAIN = auto()  # in place; an error if that does not help
    LIMITED = auto()
    LOGIN = auto()  # the token is refused
    EXPIRED = auto()  # what came before is not known there any more; from the first page on


def meaning(answer: Answer, handler: ErrorHandler) -> tuple[Meaning, Filter | None]:
    """Read an answer by the manifest's filters, then by the usual rules."""
    for one in handler.response_filters:
        if _fits(one, answer):
            return _of_filter(one), one
    return _usual(answer), None


def _of_filter(one: Filter) -> Meaning:
    if one.action == "FAIL":
        return Meaning.AGAIN if one.failure_type == "transient_error" else Meaning.READ
    return {
        "IGNORE": Meaning.NOTHING, "RETRY": Meaning.AGAIN, "RATE_LIMITED": Meaning.LIMITED,
        "READ": Meaning.READ, "RESET_PAGINATION": Meaning.EXPIRED,
    }[one.action]  # fmt: skip


def _fits(one: Filter, answer: Answer) -> bool:
    if one.http_codes and answer.status not in one.http_codes:
        return False
    if not one.body_path:
        return True
    try:
        value = rest_text.found(exact_json.parse(answer.body), one.body_path)
    except exact_json.NoJson:
        return False
    if one.equals is None:
        return not (value is rest_text.MISSING or value is None or value is False or value == "")
    return type(value) is type(one.equals) and bool(value == one.equals)


def _usual(answer: Answer) -> Meaning:
    status, headers = answer.status, answer.headers
    limited = limits.used_up(headers) or "retry-after" in headers
    if status == _TOO_MANY or (status == _FORBIDDEN and limited):
        return Meaning.LIMITED
    if status == _LOGIN:
        return Meaning.LOGIN
    if status >= _SERVERS or status in _LATER:
        return Meaning.AGAIN
    return Meaning.NOTHING if status == _NO_CONTENT else Meaning.READ


def refused(where: str, answer: Answer, one: Filter | None, resource: str) -> SyncwardError | None:
    """Return the error that an answer is; None if it is to be read. Nothing of it is quoted."""
    if one is not None and one.action == "FAIL":
        text = one.error_message or "the API says that it failed"
        return _failure(f"{where}: {text}", one)
    status = answer.status if one is None or one.action != "READ" else 0
    if status >= _SERVERS or status in _LATER or (one is not None and one.action == "RETRY"):
        return TransientError(
            f"{where}: answers with status {status}; tried again", code="api_unavailable"
        )
    if status >= _MULTIPLE:
        return _client_error(where, status, resource)
    return None


def _client_error(where: str, status: int, resource: str) -> ConfigError:
    if status == _LOGIN:
        return CredentialsError(
            f"{where}: refuses the login (status 401); store the secret again with: syncward "
            f"resource rotate {resource}"
        )
    if status < _ERRORS:
        return ConfigError(
            f"{where}: answers with status {status}, which is no page", code="api_answer"
        )
    more = {
        _FORBIDDEN: "the login may not read this; give it the right there",
        _NOT_FOUND: "there is no such thing; correct the parameters or the path",
    }.get(status, "correct the manifest or the parameters")
    return ConfigError(f"{where}: refused with status {status}: {more}", code="api_refused")


def _failure(text: str, one: Filter) -> SyncwardError:
    match one.failure_type:
        case "credentials_error":
            return CredentialsError(text)
        case "transient_error":
            return TransientError(text, code="api_unavailable")
        case _:
            return ConfigError(text, code="api_refused")


def document(where: str, answer: Answer) -> Any:  # noqa: ANN401 - JSON
    """Return an answer's JSON; ConfigError says what it is instead."""
    try:
        return exact_json.parse(answer.body)
    except exact_json.NoJson:
        begins = answer.body[:64].lstrip()[:1]
        html = begins == b"<" or "html" in answer.headers.get("content-type", "")
        what = "HTML (a login page, or a proxy?)" if html else "what is no JSON"
        raise ConfigError(
            f"{where}: answers with {what}; look at url_base and path, and at what stands between",
            code="api_answer",
        ) from None


def records(where: str, found: Any, steps: Sequence[str], *, one: bool) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON
    """Return the records of an answer, at the place that the manifest names."""
    value = rest_text.found(found, steps)
    place = f"at {'.'.join(steps)}" if steps else "as a whole"
    said = _error_in(found)
    if value is None and not said:
        return []  # there is none
    if value is rest_text.MISSING or value is None or (one and not isinstance(value, dict)):
        raise ConfigError(
            f"{where}: the answer has no records {place}{_own_words(found)}; correct field_path",
            code="api_answer",
        )
    rows = [value] if one else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f"{where}: what the answer has {place} is no list of records{_own_words(found)}; "
            "correct field_path",
            code="api_answer",
        )
    return rows


def _error_in(found: Any) -> str:  # noqa: ANN401 - JSON
    """Return the member of an answer that tells of an error; "" if there is none."""
    names = ("error", "errors", "fault")
    return next((n for n in names if isinstance(found, dict) and found.get(n)), "")


def _own_words(found: Any) -> str:  # noqa: ANN401 - JSON
    said = _error_in(found)
    if not said and isinstance(found, dict) and found.get("message"):
        said = "message"
    return f", but `{said}`: an error under a good status" if said else ""
