"""Pages of one request, one after the other, and the records on them. Start at `turned`.

A place in the pages may be forgotten over there while it is read; then they begin again.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from connectors.http_link import Answer
from connectors.rest import answers, csv_records, exact_json
from connectors.rest import text as rest_text
from connectors.rest.asking import Asker, PagesExpired, named
from connectors.rest.pages import Ask, Pages, first
from connectors.rest.parts import ErrorHandler, Scalar
from connectors.rest.requests import Expander, RecordFilter, Requester
from connectors.rest.values import Format, Type, converter
from schemas.errors import ConfigError, TransientError

Record = Mapping[str, Any]

#: Keys of a read that are remembered at least: about 20 MB with those that are on their way out.
REMEMBERED = 100_000
#: So often the pages of one read begin again.
_RESETS_MAX = 3


@dataclass(slots=True)
class Page:
    """Some records, the value of the parent's key they belong to, and which page they were.

    `texts` are the same records as they stand in the answer, where they were asked for and found.
    Whoever has read the records lets go of them: the next page comes into the same memory.
    """

    records: Sequence[Record]
    above: object
    number: int
    document: object = None  # what else the answer says
    texts: Sequence[exact_json.Text] | None = None
    size: int = 0  # bytes of the answer
    before: int = 0  # records of the same answer that came before: a part of it is a page, too
    of: str = ""  # the request, as errors name it
    gone: Sequence[bool] = ()  # which of the records are those of rows that are gone; (): none

    @property
    def alive(self) -> Sequence[Record]:
        """The records of rows that are not gone."""
        if not self.gone:
            return self.records
        pairs = zip(self.records, self.gone, strict=True)
        return [record for record, gone in pairs if not gone]


@dataclass(frozen=True, slots=True)
class Read:
    """One request, and how its answers are read."""

    where: str
    requester: Requester
    names: rest_text.Names
    handler: ErrorHandler
    pages_max: int
    headers: Mapping[str, str]  # of the whole manifest
    key: Callable[[Record], object] | None  # what no two pages have alike; None: anything may
    csv: Callable[[str, Answer], Iterator[csv_records.Part]] | None = None  # None: it is JSON
    above: object = None
    texts: bool = False  # records are wanted as they stand, too
    part: str = ""  # which part of the stream: a window, a parent's key
    #: adds what only the reader knows: a window, keys
    more: Callable[[Ask], Ask] = lambda ask: ask


def turned(asker: Asker, read: Read) -> Iterator[Page]:
    """Yield the pages of a request; where they begin again, records come once more."""
    resets, rows = 0, 0
    while True:
        try:
            for page in _through(asker, read):
                rows += len(page.records)
                yield page
        except PagesExpired:
            resets += 1
        else:
            return
        if resets > _RESETS_MAX or rows > REMEMBERED or read.key is None:
            raise TransientError(
                f"{read.where}: the place in its pages is not known there any more; read again",
                code="api_unavailable",
            )


def _through(asker: Asker, read: Read) -> Iterator[Page]:
    requester, where = read.requester, read.where
    ask: Ask | None = first(read.more(asked(asker, read)), requester.paginator)
    assert ask is not None  # noqa: S101 - there is a first page
    pages = Pages(where, asker.origin, ask, requester.paginator, read.pages_max)
    while ask is not None:
        of = ", ".join(
            part for part in (asker.shown(ask), f"page {pages.number}", read.part) if part
        )
        with named(of):
            answer = asker.answer(where, ask, read.handler)
        if answer is None:
            return
        if read.csv is not None:
            ask = yield from _in_parts(read, read.csv(where, answer), answer, pages, of)
            continue
        with named(of):
            page, ask = _page(read, answer, pages)
        del answer
        page.of = of
        yield page
        page.document = None


def _in_parts(
    read: Read, parts: Iterator[csv_records.Part], answer: Answer, pages: Pages, of: str
) -> Generator[Page, None, Ask | None]:
    """Yield the records of an answer some at a time; return the request of the next page."""
    number, count, last = pages.number, 0, cast("Record", {})
    if not answer.whole:
        error = TransientError(
            f"{read.where}: answers with CSV and does not say how long it is, so a part would be "
            "taken for all; tried again",
            code="api_unavailable",
        )
        error.at(of)
        raise error
    while True:
        with named(of):
            part = next(parts, None)
            if part is None:
                break
            if not count:
                pages.seen(hashlib.sha256(answer.body).digest(), "comes again")
        records, size = part
        page = Page(_selected(read, records), read.above, number, size=size, before=count, of=of)
        count, last = count + len(records), records[-1]
        del part, records
        yield page
    if not count:
        yield Page((), read.above, number, of=of)
    with named(of):
        return pages.after(answer, None, count, last)


def _page(read: Read, answer: Answer, pages: Pages) -> tuple[Page, Ask | None]:
    """Return a page and the request of the next one."""
    where, selector = read.where, read.requester.record_selector
    document = answers.document(where, answer)
    records = answers.records(where, document, selector.field_path, one=selector.one)
    number = pages.number
    key = repr if selector.record_expander is not None else read.key
    if records and key is not None:
        keys = [key(record) for record in records]
        pages.seen(keys, "has the same records as a page before")
    after = pages.after(answer, document, len(records), records[-1] if records else {})
    texts = _as_they_stand(read, answer, len(records))
    made = Page(_selected(read, records), read.above, number, document, texts, len(answer.body))
    return made, after


# ── the request ──────────────────────────────────────────────────────────────────────────────


def asked(asker: Asker, read: Read) -> Ask:
    """Return the request with its values, without a page."""
    requester, names = read.requester, read.names
    headers = {**read.headers, **requester.request_headers}
    return Ask(
        requester.http_method,
        asker.base + path_of(read.where, requester.path, names),
        requester.path,
        {k: _value(v, names) for k, v in requester.request_parameters.items()},
        {k: rest_text.filled(v, names) for k, v in headers.items()},
        _body(requester.request_body_json, names),
    )


def path_of(where: str, path: str, names: rest_text.Names) -> str:
    """Return a path with its values; ConfigError for one that would leave its place."""
    try:
        return rest_text.filled_path(path, names)
    except ValueError as error:
        raise ConfigError(f"{where}: path: {error}", code="data_refused") from None


def _value(value: Scalar | tuple[str, ...], names: rest_text.Names) -> str | tuple[str, ...]:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return tuple(made for one in value for made in _items(one, names))
    return rest_text.filled(value, names) if isinstance(value, str) else str(value)


def _body(value: Any, names: rest_text.Names) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {name: _body(one, names) for name, one in value.items()}
    if isinstance(value, list):
        return [made for one in value for made in _items(one, names)]
    return rest_text.filled(value, names) if isinstance(value, str) else value


def _items(value: Any, names: rest_text.Names) -> list[Any]:  # noqa: ANN401 - JSON
    """Return an item of a list: several, where it is a value with commas and nothing else."""
    parts = rest_text.listed(value, names) if isinstance(value, str) else None
    return [_body(value, names)] if parts is None else parts


# ── the records ──────────────────────────────────────────────────────────────────────────────


def _as_they_stand(read: Read, answer: Answer, count: int) -> Sequence[exact_json.Text] | None:
    """Return the text of each record, where the records are those of the answer and no others."""
    how = read.requester.record_selector
    others = how.one or how.record_filter is not None or how.record_expander is not None
    if others or how.remove_fields or not read.texts:
        return None
    return exact_json.texts(answer.body, how.field_path, count)


def _selected(read: Read, records: list[dict[str, Any]]) -> Sequence[Record]:
    selector = read.requester.record_selector
    if selector.record_filter is not None:
        records = [record for record in records if fits(record, selector.record_filter)]
    found: Sequence[Record] = records
    if selector.record_expander is not None:
        one = selector.record_expander
        found = [item for record in records for item in _expanded(read.where, record, one)]
    if selector.remove_fields:
        gone = set(selector.remove_fields)
        found = [{n: v for n, v in record.items() if n not in gone} for record in found]
    return found


def fits(record: Record, wanted: RecordFilter) -> bool:
    """Say whether a record counts."""
    value = rest_text.found(record, wanted.field)
    if wanted.equals is None:
        return not rest_text.is_nothing(value)
    return type(value) is type(wanted.equals) and bool(value == wanted.equals)


def _expanded(where: str, record: Record, how: Expander) -> Iterator[Record]:
    items = rest_text.found(record, how.expand_records_from_field)
    place = ".".join(how.expand_records_from_field)
    if items is None or items is rest_text.MISSING:
        return
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConfigError(
            f"{where}: what a record has at {place} is no list of records; correct "
            "expand_records_from_field",
            code="api_answer",
        )
    if how.incomplete and not rest_text.is_nothing(rest_text.found(record, how.incomplete)):
        raise ConfigError(
            f"{where}: a record's list at {place} goes on elsewhere, and a part of it would be "
            "taken for all; read these records as a stream of their own",
            code="api_answer",
        )
    first_step = how.expand_records_from_field[0]
    kept = {name: value for name, value in record.items() if name != first_step}
    for item in items:
        yield {**item, "original_record": kept} if how.remain_original_record else item


def time_in(where: str, entry: Record, steps: Sequence[str]) -> datetime:
    """Return the time at a place of an entry: ISO 8601, or seconds since 1970."""
    value = rest_text.found(entry, steps)
    for format_ in (Format.ISO, Format.EPOCH):
        try:
            found = converter(Type.TIMESTAMP, format_)(value)
        except (ValueError, OverflowError):
            continue
        if isinstance(found, datetime):
            return found
    raise ConfigError(
        f"{where}: an entry has no time at {'.'.join(steps)}; correct changed_at",
        code="api_answer",
    )
