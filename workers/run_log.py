"""A run's log: lines go to Postgres while the run is going, in small bounded batches.

Every line passes the sink (schemas/redaction.py) before it is cut, so that no part of a secret is
left at the cut.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Event, Lock, Thread
from uuid import UUID

from schemas.limits import LOG_LINES_MAX, LOG_MESSAGE_MAX, RAW_LINES_MAX
from schemas.redaction import REDACTOR
from storage.logs import LogLine

#: Seconds between two writes; `run logs -f` is this far behind at most.
FLUSH_EVERY_S = 0.5


class LogWriter:
    """Collects the lines of all runs of a worker and writes them from one thread.

    A database that is away keeps the lines here, bounded per run; nothing waits for it.
    """

    def __init__(self, write: Callable[[Sequence[LogLine]], None]) -> None:
        self._write = write
        self._lock = Lock()
        self._lines: list[LogLine] = []
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

    def add(self, line: LogLine) -> None:
        """Take a line; it is written within half a second."""
        with self._lock:
            self._lines.append(line)

    def flush(self) -> None:
        """Write now. On failure the lines stay for the next time."""
        with self._lock:
            lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            self._write(lines)
        except Exception:
            with self._lock:
                self._lines = lines + self._lines
            raise

    @contextmanager
    def taken(self, run_id: UUID) -> Iterator[Sequence[LogLine]]:
        """Hand out a run's lines to a caller who writes them; if it fails they stay here."""
        with self._lock:
            mine = [line for line in self._lines if line.run_id == run_id]
            self._lines = [line for line in self._lines if line.run_id != run_id]
        try:
            yield mine
        except BaseException:
            with self._lock:
                self._lines = mine + self._lines
            raise

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(FLUSH_EVERY_S)
            try:
                self.flush()
            except Exception:  # noqa: BLE001, S112 - kept for the next round; the run goes on
                continue


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
