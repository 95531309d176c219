"""Further sessions of one end, for ranges that are read and loaded at the same time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from connectors.postgres import Connection, Line
from schemas.errors import TransientError


class Sessions:
    """Opened when they are needed; each is lent to one thread at a time."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._lock = Lock()
        self._free: list[Connection] = []
        self._lines: dict[Connection, Line] = {}
        self._ended = False

    @contextmanager
    def one(self) -> Iterator[Connection]:
        """Lend a session; one whose borrower failed is closed, as a COPY may be half way."""
        with self._lock:
            conn = self._free.pop() if self._free else None
        if conn is None:
            conn = self._opened()
        try:
            yield conn
        except BaseException:
            with self._lock:
                line = self._lines.pop(conn, None)
            if line is not None:
                line.close()
            raise
        with self._lock:
            self._free.append(conn)

    def _opened(self) -> Connection:
        conn = self._connect()
        line = Line(conn)
        with self._lock:
            self._lines[conn] = line
            ended = self._ended
        if ended:  # while it was being opened
            self.close()
            raise TransientError("the session was cancelled", code="cancelled_there")
        return conn

    def cancel(self) -> None:
        """End whatever the server does for these sessions, and open none any more."""
        self._ended = True
        for line in self._all():
            with suppress(Exception):  # one that is gone needs no cancelling
                line.cancel()

    def cut(self) -> None:
        """End the links under whatever waits on them; for another thread."""
        self._ended = True
        for line in self._all():
            with suppress(Exception):  # as above
                line.cut()

    def close(self) -> None:
        """Close all of them; the server rolls back what was open."""
        with self._lock:
            lines, self._lines, self._free = list(self._lines.values()), {}, []
        for line in lines:
            line.close()

    def _all(self) -> list[Line]:
        with self._lock:
            return list(self._lines.values())
