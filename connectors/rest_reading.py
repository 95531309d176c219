"""The records of one stream, page after page, as groups of rows. Start at `Reading.groups`."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from connectors import rest_answers, rest_text, rest_window
from connectors.rest_asking import Asker
from connectors.rest_manifest import Manifest, Parent, Stream
from connectors.rest_pages import Ask, Pages, first
from connectors.rest_parts import Scalar
from connectors.rest_rows import Rows, type_of_partition
from connectors.rest_values import Misfit, Type
from connectors.rest_window import Window
from connectors.row_groups import Grouping, sizes
from schemas.errors import ConfigError
from schemas.records import Row, RowGroup
from schemas.streams import Mode, StreamSpec

Record = Mapping[str, Any]

#: Keys of a read that are remembered at least: about 20 MB with those that are on their way out.
_REMEMBERED = 100_000


@dataclass(slots=True)
class Page:
    """Some records, the value of the parent's key they belong to, and which page they were.

    Whoever has read the records lets go of them: the next page comes into the same memory.
    """

    records: Sequence[Record]
    above: object
    number: int


class Once:
    """Lets a record through that moved to a later page while it was read, the first time only.

    Two of one key on the same page are no move: the key is none, and the destination says so.
    Memory is bounded: what was read long ago is forgotten.
    """

    def __init__(self) -> None:
        self._page: set[bytes | int] = set()
        self._recent: set[bytes | int] = set()
        self._older: set[bytes | int] = set()
        self.moved = 0  # records that came once more
        self.new = 0

    def turn(self) -> None:
        """Begin another page."""
        self._recent |= self._page
        self._page = set()
        if len(self._recent) >= _REMEMBERED:
            self._older, self._recent = self._recent, set()

    def is_new(self, key: Row) -> bool:
        """Say whether this key was on no page before."""
        token = _token(key)
        if token in self._recent or token in self._older:
            self.moved += 1
            return False
        self.new += 1
        self._page.add(token)
        return True


def _token(key: Row) -> bytes | int:
    """Return what stands for a key: itself, if it is small and no other's."""
    if len(key) == 1 and isinstance(key[0], int):
        return key[0]
    return hashlib.blake2b(repr(key).encode(), digest_size=12).digest()


class Reading:
    """One read of one stream."""

    def __init__(
        self, asker: Asker, manifest: Manifest, name: str, spec: StreamSpec | None
    ) -> None:
        self._asker = asker
        self._manifest = manifest
        self._stream: Stream = manifest.streams[name]
        self._spec = spec
        self.where = f"{manifest.name}.{name}"
        parent = self._stream.partition_router
        above = Type.STRING
        if parent is not None:
            above = type_of_partition(manifest.streams[parent.parent_stream], parent.parent_key)
        self.rows = Rows(self.where, self._stream, above, spec=spec)

    # ── groups ───────────────────────────────────────────────────────────────────────────────

    def groups(
        self, window: Window | None, pages: Iterator[Page], once: Once
    ) -> Iterator[RowGroup]:
        """Yield the rows of the pages in bounded groups; memory holds one page."""
        grouping = Grouping(sizes(self.rows.columns))
        for page in pages:
            once.turn()
            for row in self._rows_of(page, window):
                key = self.rows.key(row)
                if key and not once.is_new(key):
                    continue
                group = grouping.add(row)
                if group is not None:
                    yield group
            page.records = ()
            self._asker.check()
        yield from grouping.rest()

    def _rows_of(self, page: Page, window: Window | None) -> Iterator[Row]:
        appends = self._spec is not None and self._spec.mode is Mode.APPEND
        exact = window if window is not None and (appends or window.exact) else None
        for number, record in enumerate(page.records, 1):
            place = f"record {number} of page {page.number}"
            row = self.rows.row(record, page.above, place)
            if exact is None or self._belongs(row, exact, place):
                yield row

    def _belongs(self, row: Row, window: Window, place: str) -> bool:
        """Say whether a record counts in a window: an append brings each in one only."""
        how = self._stream.incremental_sync
        name = how.cursor_field if how is not None else ""
        value = row[[c.name for c in self.rows.columns].index(name)]
        if isinstance(value, datetime):
            return window.holds(value)
        if isinstance(value, date):
            return window.holds(datetime(value.year, value.month, value.day, tzinfo=UTC))
        if window.exact:
            return False
        raise ConfigError(
            f"{self.where}: {place} has no time in {name}, so no append can tell whether it is "
            "new; use mode: merge",
            code="data_refused",
        )

    # ── pages ────────────────────────────────────────────────────────────────────────────────

    def pages(self, window: Window | None) -> Iterator[Page]:
        """Yield the pages of the stream: for a child those of each of the parent's records."""
        parent = self._stream.partition_router
        if parent is None:
            yield from self._pages(self._stream, self.where, {}, window, None)
            return
        where = f"{self._manifest.name}.{parent.parent_stream}"
        above = self._manifest.streams[parent.parent_stream]
        for page in self._pages(above, where, {}, None, None):
            for number, record in enumerate(page.records, 1):
                key = self._key_of(parent, record, where, f"record {number} of page {page.number}")
                names = {parent.partition_field: key}
                yield from self._pages(self._stream, self.where, names, window, key)

    def _key_of(self, parent: Parent, record: Record, where: str, place: str) -> object:
        value = rest_text.found(record, parent.parent_key)
        try:
            self.rows.check_partition(value)
        except (Misfit, ValueError):
            raise ConfigError(
                f"{where}: {place} has no {'.'.join(parent.parent_key)} of its type, which "
                f"{self.where} is read by",
                code="data_refused",
            ) from None
        return value

    def _pages(
        self, stream: Stream, where: str, partition: Mapping[str, object], window: Window | None,
        above: object,
    ) -> Iterator[Page]:  # fmt: skip
        handler = stream.error_handler or self._manifest.error_handler
        ask: Ask | None = self._first(stream, where, partition, window)
        if ask is None:
            return
        pages = Pages(where, self._asker.origin, ask, stream.paginator, stream.pages_max)
        selector = stream.record_selector
        while ask is not None:
            answered = self._asker.ask(where, ask, handler)
            if answered is None:
                return
            answer, document = answered
            records = rest_answers.records(where, document, selector.field_path, one=selector.one)
            number = pages.number
            if records and stream.primary_key:
                keys = [_key_of(stream, record) for record in records]
                pages.seen(keys, "has the same records as a page before")
            ask = pages.after(answer, document, records)
            page = Page(records, above, number)
            del answered, answer, document, records
            yield page

    def _first(
        self, stream: Stream, where: str, partition: Mapping[str, object], window: Window | None
    ) -> Ask:
        names = {**self._asker.names, "partition": partition}
        try:
            path = rest_text.filled_path(stream.path, names)
        except ValueError as error:
            raise ConfigError(f"{where}: path: {error}", code="data_refused") from None
        headers = {**self._manifest.request_headers, **stream.request_headers}
        ask = Ask(
            stream.http_method,
            self._asker.base + path,
            {k: _value(v, names) for k, v in stream.request_parameters.items()},
            {k: rest_text.filled(v, names) for k, v in headers.items()},
            _body(stream.request_body_json, names),
        )
        how = stream.incremental_sync
        if window is not None and how is not None:
            ask = ask.put(how.start_time_option, rest_window.written(window.since, how))
            if how.end_time_option is not None:
                ask = ask.put(how.end_time_option, rest_window.written_end(window.until, how))
        return first(ask, stream.paginator)


def _key_of(stream: Stream, record: Record) -> list[object]:
    found = []
    for name in stream.primary_key:
        spec = stream.fields.get(name)
        found.append(rest_text.found(record, (spec.field if spec else None) or (name,)))
    return found


def _value(value: Scalar, names: rest_text.Names) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return rest_text.filled(value, names) if isinstance(value, str) else str(value)


def _body(value: Any, names: rest_text.Names) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {name: _body(one, names) for name, one in value.items()}
    if isinstance(value, list):
        return [_body(one, names) for one in value]
    return rest_text.filled(value, names) if isinstance(value, str) else value


def now_of(asker: Asker) -> datetime:
    """Return the earlier of both clocks: what is not over there cannot be read yet."""
    here = datetime.now(UTC)
    return here if asker.clock is None else min(here, asker.clock)
