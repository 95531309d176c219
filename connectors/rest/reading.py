"""The records of one stream, page after page, as groups of rows. Start at `Reading.groups`."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from itertools import islice
from typing import cast

from connectors.rest import jobs
from connectors.rest import schema as rest_schema
from connectors.rest import text as rest_text
from connectors.rest import window as rest_window
from connectors.rest.asking import Asker, named
from connectors.rest.manifest import Incremental, Manifest, Parent, Stream
from connectors.rest.pages import Ask
from connectors.rest.parts import Option
from connectors.rest.requests import Changes, Groups, Requester
from connectors.rest.rows import Rows, shown_key, type_of_partition
from connectors.rest.turning import REMEMBERED, Page, Read, Record, time_in, turned
from connectors.rest.values import Misfit, Type
from connectors.rest.window import Window
from connectors.row_groups import Grouping, sizes, sizes_of_all
from connectors.swept_keys import KeyFile
from schemas.errors import ConfigError, ReadAgain
from schemas.records import Row, RowGroup
from schemas.streams import Mode, StreamSpec

#: So many records may have changed; beyond that it is shorter to read all of them.
_CHANGED_MAX = 2 * REMEMBERED
#: Records that become rows together, and about how many bytes of their answer: memory holds their
#: rows beside the whole page.
_TOGETHER, _BYTES_TOGETHER = 1_000, 2**20


class Once:
    """Lets a record through that moved to a later page while it was read, the first time only.

    Two of one key on the same page are no move: the key is none, and the destination says so.
    Memory is bounded: what was read long ago is forgotten. `feed`: what comes are changes, of
    which the first of a key counts wherever the others are, so nothing may be forgotten.
    """

    def __init__(self, *, feed: bool = False) -> None:
        self.feed = feed
        self._page: set[bytes | int] = set()
        self._recent: set[bytes | int] = set()
        self._older: set[bytes | int] = set()
        self.moved = 0  # records that came once more
        self.new = 0

    def turn(self) -> None:
        """Begin another page."""
        self._recent |= self._page
        self._page = set()
        if self.feed and len(self._recent) > _CHANGED_MAX:
            raise ReadAgain(f"more than {_CHANGED_MAX:,} records have changed")
        if not self.feed and len(self._recent) >= REMEMBERED:
            self._older, self._recent = self._recent, set()

    def is_new(self, key: Row) -> bool:
        """Say whether this key was on no page before."""
        token = _token(key)
        if token in self._recent or token in self._older:
            self.moved += 1
            return False
        if self.feed and token in self._page:
            return False
        self.new += 1
        self._page.add(token)
        return True

    def new_ones(self, rows: list[Row], places: Sequence[int]) -> list[Row]:
        """Return the rows of a page whose keys were on no page before."""
        if not places:
            return rows
        if len(places) == 1 and not self.feed:  # nearly always, and nearly always all are new
            values = [row[places[0]] for row in rows]
            if set(map(type, values)) == {int}:
                tokens = cast("set[bytes | int]", set(values))
                if self._recent.isdisjoint(tokens) and self._older.isdisjoint(tokens):
                    self.new += len(rows)
                    self._page |= tokens
                    return rows
        return [row for row in rows if self.is_new(tuple([row[i] for i in places]))]


def _token(key: Row) -> bytes | int:
    """Return what stands for a key: itself, if it is small and no other's."""
    if len(key) == 1 and isinstance(key[0], int):
        return key[0]
    plain = [_digits(value) if isinstance(value, Decimal) else value for value in key]
    return hashlib.blake2b(repr(plain).encode(), digest_size=12).digest()


def _digits(value: Decimal) -> str:
    """Write a number so that 1.0 and 1 are the same, and no digit of a long one is lost."""
    text = format(value, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


class Reading:
    """One read of one stream."""

    def __init__(
        self,
        asker: Asker,
        manifest: Manifest,
        name: str,
        spec: StreamSpec | None,
        *,
        stream: Stream | None = None,
    ) -> None:
        self._asker = asker
        self._manifest = manifest
        self._stream: Stream = stream or manifest.streams[name]  # with the fields that were loaded
        self._spec = spec
        self.where = f"{manifest.name}.{name}"
        parent = self._stream.partition_router or self._stream.grouping_router
        above = Type.STRING
        if parent is not None:
            above = type_of_partition(manifest.streams[parent.parent_stream], parent.parent_key)
        self.rows = Rows(self.where, self._stream, above, spec=spec)
        #: takes the keys of what the API says is gone; None: nobody asks for them
        self.gone: KeyFile | None = None

    # ── groups ───────────────────────────────────────────────────────────────────────────────

    def groups(
        self, window: Window | None, pages: Iterator[Page], once: Once
    ) -> Iterator[RowGroup]:
        """Yield the rows of the pages in bounded groups; memory holds one page."""
        grouping = Grouping(sizes(self.rows.columns))
        size_of_all = sizes_of_all(self.rows.columns)
        for page in pages:
            if not page.before:
                once.turn()
            places = [] if self._set_apart(page, once) else self.rows.key_places
            for some in self._rows_of(page, window):
                rows = once.new_ones(some, places)
                yield from grouping.add_all(rows, size_of_all(rows))
            page.records, page.texts = (), None
            self._asker.check()
        yield from grouping.rest()

    def _set_apart(self, page: Page, once: Once) -> bool:
        """Note the keys of what is gone, and leave the records that count, if a page has both."""
        if not page.gone:
            return False
        with named(page.of):
            self._sort_out(page, once)
        return True

    def _sort_out(self, page: Page, once: Once) -> None:
        alive: list[Record] = []
        keys: list[Row] = []
        for number, (record, gone) in enumerate(zip(page.records, page.gone, strict=True), 1):
            key = self.rows.key(record, page.above, f"entry {number} of page {page.number}")
            if not once.is_new(key):
                continue
            if gone:
                keys.append(key)
            else:
                alive.append(record)
        page.records = alive
        if keys and self.gone is not None:
            self.gone.add(keys)

    def _rows_of(self, page: Page, window: Window | None) -> Iterator[list[Row]]:
        """Yield the rows of a page, some of them at a time."""
        with named(page.of):
            yield from self._made_of(page, window)

    def _made_of(self, page: Page, window: Window | None) -> Iterator[list[Row]]:
        appends = self._spec is not None and self._spec.mode is Mode.APPEND
        exact = window if window is not None and (appends or window.exact) else None
        where, count = f"page {page.number}", len(page.records)
        step = max(1, min(_TOGETHER, _BYTES_TOGETHER * count // max(1, page.size)))
        for first in range(0, count, step):
            texts = None if page.texts is None else page.texts[first : first + step]
            records = page.records[first : first + step]
            rows = self.rows.all_of(records, page.above, where, page.before + first + 1, texts)
            if exact is not None:
                rows = [
                    row
                    for number, row in enumerate(rows, page.before + first + 1)
                    if self._belongs(row, exact, f"record {number} of {where}")
                ]
            yield rows

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

    def first_look(self) -> Iterator[Page]:
        """Yield the pages of a trial: asked for as a run asks, where the API wants a time."""
        how, window = self._stream.incremental_sync, None
        if how is not None:
            start = rest_text.filled(how.start_datetime, self._asker.names)
            begin = rest_window.start_of(self.where, start)
            window = rest_window.tried(self.where, how, begin, datetime.now(UTC))
        return self.pages(window)

    def pages(self, window: Window | None) -> Iterator[Page]:
        """Yield the pages of the stream: for a child those of each of the parent's records."""
        stream, parent, groups = self._stream, self._stream.partition_router, None
        if parent is None:
            groups = stream.grouping_router
        if parent is not None:
            for key in self._keys(parent):
                read = self._read(stream, self.where, {parent.partition_field: key})
                part = shown_key(parent.partition_field, key)
                yield from self._windowed(replace(read, above=key, part=part), window)
        elif groups is not None:
            for some in _in_groups(self._keys(groups), groups.group_size):
                read = replace(self._read(stream, self.where, {}), part=f"for {len(some)} keys")
                yield from self._windowed(_with_keys(read, groups, some), window)
        else:
            yield from self._windowed(self._read(stream, self.where, {}), window)

    def _keys(self, router: Parent | Groups) -> Iterator[object]:
        """Yield the keys of the parent's records."""
        where = f"{self._manifest.name}.{router.parent_stream}"
        above = self._manifest.streams[router.parent_stream]
        for page in self._all_of(above, self._read(above, where, {})):
            for number, record in enumerate(page.records, 1):
                with named(page.of):
                    key = self._key_of(
                        router, record, where, f"record {number} of page {page.number}"
                    )
                yield key

    def _key_of(self, router: Parent | Groups, record: Record, where: str, place: str) -> object:
        value = rest_text.found(record, router.parent_key)
        try:
            self.rows.check_partition(value)
        except (Misfit, ValueError):
            raise ConfigError(
                f"{where}: {place} has no {'.'.join(router.parent_key)} of its type, which "
                f"{self.where} is read by",
                code="data_refused",
            ) from None
        return value

    def _windowed(self, read: Read, window: Window | None) -> Iterator[Page]:
        """Yield the pages of a window, cut in two where the API would not give all of it."""
        how = self._stream.incremental_sync
        if window is None or how is None or how.start_time_option is None:
            yield from self._all_of(self._stream, read)
            return
        left = [(window.since, window.until)]
        while left:
            since, until = left.pop()
            part = _part(how.end_time_option, since, until, read.part)
            asked = replace(read, more=partial(_between, how, since, until, read.more), part=part)
            pages = self._all_of(self._stream, asked)
            first = next(pages, None)
            if first is None:
                continue
            if how.result_cap is not None and _exceeds(how, first, self.where):
                left += reversed(self._halves(how, since, until))
                continue
            yield first
            yield from pages

    def _halves(
        self, how: Incremental, since: datetime, until: datetime
    ) -> list[tuple[datetime, datetime]]:
        middle = rest_window.middle(since, until, how)
        if middle is None:
            raise ConfigError(
                f"{self.where}: more records have one and the same time than the API gives of a "
                "query; ask for them in the order of their keys (cursor_from: last_record)",
                code="api_answer",
            )
        return [(since, middle), (middle, until)]

    def _all_of(self, stream: Stream, read: Read) -> Iterator[Page]:
        if stream.retriever is not None:
            yield from jobs.records(self._asker, stream, stream.retriever, read)
        else:
            yield from turned(self._asker, read)

    def _read(self, requester: Requester, where: str, partition: Mapping[str, object]) -> Read:
        stream = requester if isinstance(requester, Stream) else self._stream
        fields = rest_schema.names_of(stream)
        return Read(
            where,
            requester,
            {**self._asker.names, "partition": partition, "schema": fields},
            stream.error_handler or self._manifest.error_handler,
            stream.pages_max,
            self._manifest.request_headers,
            _identity_of(stream),
            texts=requester is self._stream and self.rows.wants_text,
        )

    # ── changes ──────────────────────────────────────────────────────────────────────────────

    def changed(self, window: Window) -> Iterator[Page]:
        """Yield what the API says has changed since a window's begin, as pages of records.

        Where two feeds have the same record the first one's counts: of the end of a record, say,
        before the others, which may still show it.
        """
        for one in self._stream.changes:
            yield from self.changes_of(one, window)

    def changes_of(self, one: Changes, window: Window) -> Iterator[Page]:
        """Yield what one request says has changed."""
        interval = {
            "start_time": rest_window.written_as(window.since, one.datetime_format),
            "end_time": rest_window.written_end_as(window.until, one.datetime_format),
        }
        read = self._read(one, self.where, {})
        read = replace(
            read, names={**read.names, "stream_interval": interval}, key=repr,
            more=partial(_put_times, one, interval),
            part=_part(one.end_time_option, window.since, window.until),
        )  # fmt: skip
        for page in turned(self._asker, read):
            with named(page.of):
                self._taken_out(one, page, window)
            yield page

    def _taken_out(self, one: Changes, page: Page, window: Window) -> None:
        """Leave on a page the records that its entries hold, and note which are gone."""
        entries = [
            entry
            for entry in page.records
            if not one.changed_at or time_in(self.where, entry, one.changed_at) >= window.since
        ]
        page.records = [self._record_of(one, entry) for entry in entries]
        if one.deleted is not None:
            page.gone = [one.deleted.says(entry) for entry in entries]

    def _record_of(self, how: Changes, entry: Record) -> Record:
        record = rest_text.found(entry, how.record_path)
        if not isinstance(record, dict):
            raise ConfigError(
                f"{self.where}: an entry has no record at {'.'.join(how.record_path)}; correct "
                "record_path",
                code="api_answer",
            )
        return record


def _part(ends: Option | None, since: datetime, until: datetime, within: str = "") -> str:
    """Say which window a request is of, as errors name it."""
    begin = f"from {rest_window.written_as(since, 'iso')}"
    span = begin if ends is None else f"{begin} to {rest_window.written_end_as(until, 'iso')}"
    return f"{within}, {span}" if within else span


def _put_times(how: Changes, interval: Mapping[str, str], ask: Ask) -> Ask:
    for option, name in ((how.start_time_option, "start_time"), (how.end_time_option, "end_time")):
        if option is not None:
            ask = ask.put(option, interval[name])
    return ask


def _between(
    how: Incremental, since: datetime, until: datetime, more: Callable[[Ask], Ask], ask: Ask
) -> Ask:
    if how.start_time_option is not None:
        ask = ask.put(how.start_time_option, rest_window.written(since, how))
    if how.end_time_option is not None:
        ask = ask.put(how.end_time_option, rest_window.written_end(until, how))
    return more(ask)


def _exceeds(how: Incremental, page: Page, where: str) -> bool:
    """Say whether a query has more records than the API gives of one."""
    cap = how.result_cap
    total = None if cap is None else rest_text.found(page.document, cap.total)
    if cap is None or isinstance(total, bool) or not isinstance(total, int):
        raise ConfigError(
            f"{where}: an answer does not say at the total of result_cap how many records there "
            "are; correct it",
            code="api_answer",
        )
    return total > cap.records


def _in_groups(keys: Iterator[object], size: int) -> Iterator[list[object]]:
    while some := list(islice(keys, size)):
        yield some


def _with_keys(read: Read, how: Groups, keys: Sequence[object]) -> Read:
    """Return a read that asks for some of the parent's keys."""
    option = how.group_option
    value: object = ",".join(map(str, keys))
    if option.inject_into == "body_json":
        value = [{how.group_item: key} if how.group_item else key for key in keys]
    return replace(read, more=lambda ask: ask.put(option, value))


def _identity_of(stream: Stream) -> Callable[[Record], object] | None:
    """Return what tells a record from others: the values of its key as they came."""
    places = []
    for name in stream.primary_key:
        spec = stream.fields.get(name)
        places.append((spec.field if spec else None) or (name,))
    if len(places) == 1 and len(places[0]) == 1:  # nearly always
        (name,) = places[0]
        return lambda record: record.get(name, rest_text.MISSING)
    if not places:
        return None
    return lambda record: [rest_text.found(record, place) for place in places]


def now_of(asker: Asker) -> datetime:
    """Return the earlier of both clocks: what is not over there cannot be read yet."""
    here = datetime.now(UTC)
    return here if asker.clock is None else min(here, asker.clock)
