"""A run's log: lines go to Postgres while the run is going, in small bounded batches.

Every line passes the sink (schemas/redaction.py) before it is cut, so that no part of a secret is
left at the cut.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from secrets import token_bytes
from threading import Event, Lock, Thread
from uuid import UUID

from schemas.limits import LOG_LINES_MAX, LOG_MESSAGE_MAX, RAW_LINES_MAX
from schemas.redaction import REDACTOR
from schemas.sealed_lines import SERIES
from storage.logs import LogLine

#: Seconds between two writes; `run logs -f` is this far behind at most.
FLUSH_EVERY_S = 0.5
#: Lines that wait here while they cannot be sealed or stored: 80 MB at worst, a few as a rule.
LINES_KEPT_MAX = 20_000
#: Runs whose lines are being counted.
_SERIES_MAX = 10_000
#: The end of an attempt waits so long for its lines that are just being written.
_IN_ORDER_S = 2.0

logger = logging.getLogger(__name__)


class LogWriter:
    """Collects the lines of all runs of a worker and writes them from one thread.

    `write` returns the lines that it could not write yet. A database or a KMS that is away keeps
    lines here; nothing waits for it. Of too many the oldest are given up, and a line says so.
    """

    def __init__(self, write: Callable[[Sequence[LogLine]], Sequence[LogLine] | None]) -> None:
        self._write = write
        self._lock = Lock()
        self._writing = Lock()
        self._lines: list[LogLine] = []
        self._series: OrderedDict[UUID, tuple[bytes, int]] = OrderedDict()
        self._wake = Event()
        self._stopping = False
        self._thread = Thread(target=self._loop, name="run-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, then end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)
        self.flush()
        if self._lines:
            logger.warning("run_log_lost", extra={"lines": len(self._lines)})

    def add(self, line: LogLine) -> None:
        """Take a line; it is written within half a second."""
        with self._lock:
            series, number = self._series.pop(line.run_id, (token_bytes(SERIES), 0))
            self._series[line.run_id] = series, number + 1
            if len(self._series) > _SERIES_MAX:
                self._series.popitem(last=False)
            self._lines.append(replace(line, series=series, number=number + 1))
            if len(self._lines) > LINES_KEPT_MAX:
                self._lines = _fewer(self._lines)

    def flush(self) -> None:
        """Write now. On failure the lines stay for the next time."""
        with self._writing:
            with self._lock:
                lines, self._lines = self._lines, []
            if not lines:
                return
            left: Sequence[LogLine] = lines
            try:
                left = self._write(lines) or ()
            finally:
                self.put_back(left)

    def put_back(self, lines: Sequence[LogLine]) -> None:
        """Take lines again that could not be written."""
        with self._lock:
            self._lines = [*lines, *self._lines]

    @contextmanager
    def taken(self, run_id: UUID) -> Iterator[Sequence[LogLine]]:
        """Hand out a run's lines, its attempt's last ones, to a caller who writes them.

        If that fails they stay here. Waits a little for those that are just being written.
        """
        idle = self._writing.acquire(timeout=_IN_ORDER_S)
        try:
            with self._lock:
                mine = [line for line in self._lines if line.run_id == run_id]
                self._lines = [line for line in self._lines if line.run_id != run_id]
            if mine:
                mine[-1] = replace(mine[-1], last=True)
            try:
                yield mine
            except BaseException:
                self.put_back(mine)
                raise
            with self._lock:
                self._series.pop(run_id, None)
        finally:
            if idle:
                self._writing.release()

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(FLUSH_EVERY_S)
            try:
                self.flush()
            except Exception:  # noqa: BLE001, S112 - kept for the next round; the run goes on
                continue


def _fewer(lines: Sequence[LogLine]) -> list[LogLine]:
    """Give up the oldest tenth; one line of each series says how many of it are gone."""
    cut = len(lines) // 10
    marks: dict[bytes, LogLine] = {}
    for line in lines[:cut]:
        before = marks.get(line.series)
        gone = line.gap + 1 + (before.gap + 1 if before else 0)
        marks[line.series] = replace(
            line, level="warning", stream=None, gap=gone - 1,
            message=f"{gone} lines could not be stored in time and are gone",
        )  # fmt: skip
    return [*marks.values(), *lines[cut:]]


class RunLog:
    """The log of one attempt; safe to call often, never raises, never blocks."""

    def __init__(self, writer: LogWriter, run_id: UUID, account_id: UUID) -> None:
        self._writer = writer
        self._run_id = run_id
        self._account_id = account_id
        self._count = 0

    def info(self, message: str, stream: str | None = None) -> None:
        self._add("info", message, stream)

    def warning(self, message: str, stream: str | None = None) -> None:
        self._add("warning", message, stream)

    def error(self, message: str, stream: str | None = None) -> None:
        self._add("error", message, stream)

    def raw(self, texts: Iterable[str], stream: str | None = None) -> None:
        """Keep what others said, masked as one text and then cut into lines; bounded."""
        sink, shown = REDACTOR.stream(), ""
        for text in texts:
            for start in range(0, len(text), LOG_MESSAGE_MAX):
                shown += sink.feed(text[start : start + LOG_MESSAGE_MAX])
                if len(shown) > RAW_LINES_MAX * LOG_MESSAGE_MAX:
                    break
        shown = f"{shown}{sink.close()}".rstrip()[: RAW_LINES_MAX * LOG_MESSAGE_MAX]
        for start in range(0, len(shown), LOG_MESSAGE_MAX):
            self._store("debug", shown[start : start + LOG_MESSAGE_MAX], stream)

    def _add(self, level: str, message: str, stream: str | None) -> None:
        self._store(level, REDACTOR.text(message, limit=LOG_MESSAGE_MAX), stream)

    def _store(self, level: str, message: str, stream: str | None) -> None:
        self._count += 1
        if self._count > LOG_LINES_MAX:
            return
        if self._count == LOG_LINES_MAX:
            level, message = "warning", f"more than {LOG_LINES_MAX} lines; the rest is not kept"
        self._writer.add(
            LogLine(
                run_id=self._run_id,
                account_id=self._account_id,
                at=datetime.now(UTC),
                level=level,
                stream=stream,
                message=_storable(message),
            )
        )


def _storable(message: str) -> str:
    """Replace what Postgres cannot hold in a text: NUL and lone surrogates."""
    return message.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
