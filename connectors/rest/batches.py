"""Batches of a read: one for all, or one for each window of time, each with its cursor.

A window that is loaded counts, whatever becomes of the next one. Only a read that must show all or
nothing (replace, a full refresh) comes as one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain

from connectors.rest import text as rest_text
from connectors.rest import window as rest_window
from connectors.rest.asking import Asker
from connectors.rest.manifest import Incremental, Stream
from connectors.rest.parts import CursorPagination
from connectors.rest.reading import Once, Reading, now_of
from connectors.rest.turning import REMEMBERED, Page
from connectors.rest.window import Window
from connectors.swept_keys import KeyFile, noted
from schemas.errors import ReadAgain
from schemas.records import Batch, Between, Cursor, KeySweep, RowGroup, WireFormat
from schemas.streams import Deletes, StreamSpec

#: How often a stream whose records move is read once more in one run.
_READS_MAX = 3
#: Records of a window that is read once more for what left it: all of them are still remembered.
_SLIPS_MAX = REMEMBERED // 2
#: So many windows without a record are passed over before the first that counts.
_EMPTY_MAX = 100


@dataclass(slots=True)
class _Count:
    rows: int = 0
    pages: int = 0


class Batches:
    """Makes the batches of one extract."""

    def __init__(
        self,
        asker: Asker,
        reading: Reading,
        stream: Stream,
        spec: StreamSpec,
        *,
        opened: ExitStack,
    ) -> None:
        self._opened = opened  # what is closed when the read has ended
        self._asker = asker
        self._reading = reading
        self._stream = stream
        self._spec = spec
        self._shape = reading.rows.shape
        self._unsettled: list[str] = []  # begins of windows that moved as often as they were read

    def everything(self) -> Iterator[Batch]:
        """Yield all records as one batch without a cursor."""
        how = self._stream.incremental_sync
        windows: list[Window | None] = [None]
        # an API that gives no more than a window
        if how is not None and (how.step is not None or how.result_cap is not None):
            now = datetime.now(UTC)
            windows = [*rest_window.windows(self._spec, how, self._start(how), now)]
        pages = self._begun(self._reading.pages(windows[0]))
        yield self._batch(pages, windows, None, None, full=True)

    def since(
        self, how: Incremental, cursor: Cursor | None, *, whole: bool, keys: bool = False
    ) -> Iterator[Batch]:
        """Yield a batch for each window from the cursor on; `whole`: one for all of them.

        The first page is asked for before any bound is fixed: it brings the other clock.
        """
        lower = rest_window.resumed(self._spec, cursor) or self._start(how)
        asked = next(rest_window.windows(self._spec, how, lower, datetime.now(UTC)))
        pages = self._begun(self._reading.pages(asked))
        now = now_of(self._asker)
        notes = rest_window.went_back(self._spec, lower, now)
        windows = list(rest_window.windows(self._spec, how, lower, now))
        before = cursor
        if whole or len(windows) == 1:
            full = cursor is None
            batch = self._batch(pages, windows, before, windows[-1], full=full, keys=keys)
            batch.notes += notes
            yield batch
            return
        for number, window in enumerate(windows):
            come = pages if number == 0 else self._begun(self._reading.pages(window))
            if before is None and number < _EMPTY_MAX and not window.last:
                come, empty = _looked_into(come)
                if empty:
                    continue
            # the first one finds nothing, or what an earlier life of the stream has left
            batch = self._batch(come, [window], before, window, full=before is None)
            batch.notes += notes
            batch.more, notes = not window.last, ()
            yield batch
            before = batch.upper

    def changes(self, how: Incremental, cursor: Cursor) -> Iterator[Batch]:
        """Yield one batch: what the API says has changed since the cursor, each record once.

        ReadAgain where it does not know that any more.
        """
        lower = rest_window.resumed(self._spec, cursor) or self._start(how)
        whole = how.model_copy(update={"step": None})
        asked = next(rest_window.windows(self._spec, whole, lower, datetime.now(UTC)))
        if self._spec.deletion is not Deletes.IGNORE:
            self._reading.gone = KeyFile(self._reading.rows.key_columns, self._opened)
        pages = self._begun(self._reading.changed(asked))
        now = now_of(self._asker)
        self._check_known(asked, now)
        window = next(rest_window.windows(self._spec, whole, lower, now))
        batch = self._batch(pages, [window], cursor, window, full=False, feed=True)
        batch.notes += rest_window.went_back(self._spec, lower, now)
        batch.gone = None if self._reading.gone is None else self._reading.gone.keys
        yield batch

    def _check_known(self, window: Window, now: datetime) -> None:
        for one in self._stream.changes:
            if one.retention is not None and now - window.since > one.retention:
                raise ReadAgain("the API does not know any more what has changed since then")

    def between(self, how: Incremental, between: Between) -> Iterator[Batch]:
        """Yield the records whose time lies between two, as one batch that is no full read."""
        windows = rest_window.windows_between(self._spec, how, between)
        pages = self._begun(self._reading.pages(windows[0]))
        lower = rest_window.stored(windows[0].lower)
        yield self._batch(pages, windows, lower, windows[-1], full=False)

    def _start(self, how: Incremental) -> datetime:
        text = rest_text.filled(how.start_datetime, self._asker.names)
        return rest_window.start_of(self._spec.name, text)

    def _begun(self, pages: Iterator[Page]) -> Iterator[Page]:
        """Ask for the first page now, before the destination begins anything.

        Whoever asks for more has loaded what came before.
        """
        self._asker.kept()
        first = next(pages, None)
        if first is not None:
            self._reading.rows.look(first.alive)
        return chain(() if first is None else (first,), pages)

    def _batch(
        self,
        pages: Iterator[Page],
        windows: Sequence[Window | None],
        lower: Cursor | None,
        last: Window | None,
        *,
        full: bool,
        keys: bool = False,
        feed: bool = False,
    ) -> Batch:
        count = _Count()
        groups = self._counted(self._groups(pages, windows, Once(feed=feed)), count)
        batch = Batch(
            shape=self._shape,
            wire=WireFormat.ROWS,
            chunks=iter(()),
            rows=lambda: count.rows,
            lower=lower,
            upper=None if last is None else rest_window.stored(last.upper),
            full=full,
            notes=self._reading.rows.note(),
        )
        batch.groups = groups = self._with_warnings(groups, batch)
        deletes = self._spec.deletion is not Deletes.IGNORE and self._spec.key
        if keys and deletes and not batch.everything:
            batch.groups, batch.keys = self._with_keys(groups)
        return batch

    def _with_warnings(self, groups: Iterator[RowGroup], batch: Batch) -> Iterator[RowGroup]:
        yield from groups
        begins, self._unsettled = self._unsettled, []
        if begins:
            first = "its pages" if begins[0] == "all" else f"the window from {begins[0]} on"
            more = f" and {len(begins) - 1:,} more" if len(begins) > 1 else ""
            text = (
                f"inexact: {first}{more} brought new records each of the {_READS_MAX} times that "
                "they were read once more: one that moved meanwhile may be missing until the next "
                "full read (full_every). Read at a quieter time, or in smaller windows (step)"
            )
            batch.warnings = (text,)

    def _groups(
        self, pages: Iterator[Page], windows: Sequence[Window | None], once: Once
    ) -> Iterator[RowGroup]:
        """Yield the first window's pages, which are asked for already, then the others'."""
        first, *others = windows
        counted = not isinstance(self._stream.paginator, CursorPagination) and not once.feed
        come: Iterator[tuple[Window | None, Iterator[Page]]] = chain(
            [(first, pages)], ((window, self._reading.pages(window)) for window in others)
        )
        for window, its_pages in come:
            seen, moved, new = _Count(), once.moved, once.new
            yield from self._reading.groups(window, _counting(its_pages, seen), once)
            slips = once.moved > moved or (
                seen.pages > 1 and 0 < once.new - new <= _SLIPS_MAX and self._is_left(window)
            )
            if counted and slips:
                yield from self._missed(window, once)

    def _is_left(self, window: Window | None) -> bool:
        """Say whether a record that changes leaves the window: then none comes once more."""
        how = self._stream.incremental_sync
        ends = how is not None and how.end_time_option is not None
        return ends and window is not None and window.until <= window.upper

    def _missed(self, window: Window | None, once: Once) -> Iterator[RowGroup]:
        """Read once more for what slipped through between two pages when a record moved.

        Pages that are counted lose one record for each that leaves an earlier page.
        """
        for _ in range(_READS_MAX):
            before = once.new
            yield from self._reading.groups(window, self._reading.pages(window), once)
            if once.new == before:
                return
        since = None if window is None else window.since
        self._unsettled.append("all" if since is None else rest_window.written_as(since, "iso"))

    @staticmethod
    def _counted(groups: Iterator[RowGroup], count: _Count) -> Iterator[RowGroup]:
        for group in groups:
            count.rows += len(group.rows)
            yield group

    def _with_keys(self, groups: Iterator[RowGroup]) -> tuple[Iterator[RowGroup], KeySweep]:
        """Note the key of each row beside the read: what is not among them is gone there."""
        return noted(groups, self._shape.columns, self._spec, self._opened)


def _counting(pages: Iterator[Page], count: _Count) -> Iterator[Page]:
    """Count pages; an empty one counts behind others: a record may just have slipped from it."""
    for page in pages:
        count.pages += not page.before and (bool(page.records) or count.pages > 0)
        yield page


def _looked_into(pages: Iterator[Page]) -> tuple[Iterator[Page], bool]:
    """Say whether these pages, the first of which is here, have no record at all."""
    first = next(pages, None)
    if first is None or first.records:
        return chain(() if first is None else (first,), pages), first is None
    second = next(pages, None)
    return chain((first,) if second is None else (first, second), pages), second is None
