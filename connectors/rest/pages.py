"""Requests of one read and which page comes next. Start at `first` and `Pages.after`.

A next page is asked for with the same request but for its token. A link that an answer gives leads
to the same origin or nowhere.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import orjson

from connectors.http_link import Answer, Origin, same_origin
from connectors.rest import text as rest_text
from connectors.rest.parts import (
    CursorPagination,
    LinkHeader,
    NextLink,
    NoPagination,
    OffsetIncrement,
    Option,
    PageIncrement,
    Paginator,
)
from schemas.errors import ConfigError

_LINK = re.compile(r"<([^<>]{1,8192})>([^<]{0,1024})")
_TOKEN_MAX = 16_384


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: `url` is whole but for the parameters, `route` its path as the manifest says."""

    method: str
    url: str
    route: str
    parameters: Mapping[str, str | tuple[str, ...]]
    headers: Mapping[str, str]
    body: Mapping[str, Any] = field(default_factory=dict)

    def put(self, option: Option, value: Any) -> "Ask":  # noqa: ANN401 - JSON, in a body
        """Return the request with a value where the option says."""
        match option.inject_into:
            case "request_parameter":
                return replace(self, parameters={**self.parameters, option.field_name: str(value)})
            case "header":
                return replace(self, headers={**self.headers, option.field_name: str(value)})
            case _:
                return replace(self, body=_put(self.body, option.field_name.split("."), value))

    @property
    def whole_url(self) -> str:
        """The URL with its parameters."""
        if not self.parameters:
            return self.url
        sign = "&" if "?" in self.url else "?"
        return f"{self.url}{sign}{urlencode(self.parameters, doseq=True)}"

    @property
    def content(self) -> bytes:
        """The body as it is sent."""
        return orjson.dumps(self.body) if self.method == "POST" else b""


def _put(body: Any, steps: Sequence[str], value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a document with a value at a place; a number steps into a list that is there."""
    step, *rest = steps
    if isinstance(body, list) and step.isdecimal() and int(step) < len(body):
        place = int(step)
        below = _put(body[place], rest, value) if rest else value
        return [*body[:place], below, *body[place + 1 :]]
    inside = body if isinstance(body, dict) else {}
    return {**inside, step: _put(inside.get(step), rest, value) if rest else value}


def first(ask: Ask, paginator: Paginator) -> Ask:
    """Return the request of the first page."""
    size = None if isinstance(paginator, NoPagination) else paginator.page_size
    option = None if isinstance(paginator, NoPagination) else paginator.page_size_option
    if option is not None and size is not None:
        ask = ask.put(option, size)
    if isinstance(paginator, PageIncrement):
        return ask.put(paginator.page_token_option, paginator.start_from_page)
    return ask


class Pages:
    """The way through the pages of one read; it ends, or it is an error."""

    def __init__(
        self, where: str, origin: Origin, ask: Ask, paginator: Paginator, most: int
    ) -> None:
        self._where = where
        self._origin = origin
        self._ask = ask
        self._paginator = paginator
        self._most = most
        self._seen: set[bytes] = set()
        self._rows = 0
        self.number = 1

    def after(
        self,
        answer: Answer,
        document: object,
        rows: int,
        last: Mapping[str, Any],
    ) -> Ask | None:
        """Return the request of the next page; None after the last one.

        `rows` is how many records this one has, `last` the last of them.
        """
        self._rows += rows
        asked = self._next(answer, document, rows, last)
        if asked is None:
            return None
        self.number += 1
        if self.number > self._most:
            raise self._wrong(f"has more than {self._most:,} pages; raise pages_max if that is so")
        return asked

    def seen(self, what: object, why: str) -> None:
        """Remember what never comes twice; ConfigError if it does: it would go on for ever."""
        digest = hashlib.blake2b(repr(what).encode("utf-8", "surrogatepass"), digest_size=12)
        if digest.digest() in self._seen:
            raise self._wrong(f"{why}, so it would never end; correct the paginator")
        self._seen.add(digest.digest())

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"{self._where}: page {self.number} {what}", code="api_answer")

    def _next(
        self,
        answer: Answer,
        document: object,
        rows: int,
        last: Mapping[str, Any],
    ) -> Ask | None:
        match self._paginator:
            case CursorPagination() as way:
                return self._by_cursor(way, answer, document, last)
            case OffsetIncrement() | PageIncrement() as way:
                short = way.stop_on == "short_page" and rows < way.page_size
                return None if not rows or short else self._by_count(way)
            case NextLink() as way:
                return self._linked(answer, rest_text.found(document, way.next_url))
            case LinkHeader():
                return self._linked(answer, next_of(answer.headers.get("link", "")))
            case _:
                return None

    def _by_count(self, way: OffsetIncrement | PageIncrement) -> Ask:
        if isinstance(way, PageIncrement):
            return self._ask.put(way.page_token_option, way.start_from_page + self.number)
        if way.offset_max is not None and self._rows > way.offset_max:
            raise self._wrong(
                f"lies beyond the offset of {way.offset_max:,} that this API allows; read in "
                "windows (incremental_sync with a step)"
            )
        return self._ask.put(way.page_token_option, self._rows)

    def _by_cursor(
        self,
        way: CursorPagination,
        answer: Answer,
        document: object,
        last: Mapping[str, Any],
    ) -> Ask | None:
        token = _token_of(way, answer, document, last)
        if not self._goes_on(way, document, token):
            return None
        if rest_text.is_nothing(token) or token == way.end_value:
            if way.has_more is not None:
                raise self._wrong("says that there is more, and not where")
            return None
        if isinstance(token, bool) or not isinstance(token, str | int):
            raise self._wrong("has a cursor that is neither a text nor a whole number")
        if len(str(token)) > _TOKEN_MAX:
            raise self._wrong("has a cursor of more than 16 KiB")
        self.seen(("token", token), "has the cursor of a page before")
        return self._ask.put(way.page_token_option, token)

    def _goes_on(self, way: CursorPagination, document: object, token: object) -> bool:
        """Say whether there is more, as the answer has it.

        One that does not say, and has a token, is no end: a name that is written wrong would be.
        """
        for name, place in (("has_more", way.has_more), ("is_last", way.is_last)):
            if place is None:
                continue
            said = rest_text.found(document, place)
            if said is rest_text.MISSING and not rest_text.is_nothing(token):
                raise self._wrong(
                    f"has nothing at {'.'.join(place)} and a cursor of a next page; correct {name}"
                )
            if rest_text.is_nothing(said) == (name == "has_more"):
                return False
        return True

    def _linked(self, answer: Answer, link: object) -> Ask | None:
        """Follow a link, if there is one, with nothing added to it but our headers."""
        if rest_text.is_nothing(link):
            return None
        whole = None
        if isinstance(link, str) and len(link) <= _TOKEN_MAX:
            whole = same_origin(answer.url, link, self._origin)
        if whole is None:
            raise self._wrong(
                "has a next link to another host, which gets no request and no token"
                if isinstance(link, str)
                else "has a next link that is no text"
            )
        self.seen(("link", whole), "has the next link of a page before")
        return replace(self._ask, url=whole, parameters={})


def _token_of(
    way: CursorPagination, answer: Answer, document: object, last: Mapping[str, Any]
) -> object:
    match way.cursor_from:
        case "header":
            return answer.headers.get(way.cursor_value[0])
        case "last_record":
            return rest_text.found(last, way.cursor_value)
        case _:
            return rest_text.found(document, way.cursor_value)


def next_of(header: str) -> str | None:
    """Return the target of rel="next" in a Link header."""
    for target, parameters in _LINK.findall(header):
        for parameter in parameters.split(";"):
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "rel" and "next" in value.strip(' ",').lower().split():
                return str(target)
    return None
