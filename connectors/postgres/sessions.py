"""Further sessions of one end, for ranges that are read and loaded at the same time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from threading import Lock, Thread

from connectors.postgres.link import Connection, Line
from schemas.errors import TransientError

#: Seconds between two looks at whether a session that is being opened is still wanted.
_LOOK_S = 0.1


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
        """Open one in a thread of its own: nothing interrupts a look-up or a silent server."""
        future: Future[Connection] = Future()
        Thread(target=self._open, args=(future,), name="connect", daemon=True).start()
        while not wait((future,), timeout=_LOOK_S).done:
            if self._ended:
                future.add_done_callback(_close_late)
                raise _cancelled()
        conn = future.result()
        line = Line(conn)
        with self._lock:
            ended = self._ended
            if not ended:
                self._lines[conn] = line
        if ended:  # while it was being opened; the others are ended by whoever ended them
            line.close()
            raise _cancelled()
        return conn

    def _open(self, future: "Future[Connection]") -> None:
        try:
            future.set_result(self._connect())
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            future.set_exception(error)

    def stop(self) -> None:
        """End what the server does for those that are lent, and nothing else; for any thread."""
        with self._lock:
            lines = [line for conn, line in self._lines.items() if conn not in self._free]
        _cancel(lines)

    def cancel(self, first: Line) -> None:
        """End what the server does for these and the first session, and open none any more."""
        self._ended = True
        _cancel([first, *self._all()])

    def cut(self) -> None:
        """End the links under whatever waits on them; for another thread."""
        self._ended = True
        for line in self._all():
            with suppress(Exception):  # one that is gone needs no cutting
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


def _cancel(lines: Iterable[Line]) -> None:
    """Cancel all at the same time: a server that is silent costs each its whole patience."""

    def cancel(line: Line) -> None:
        with suppress(Exception):  # one that is gone needs no cancelling
            line.cancel()

    threads = [Thread(target=cancel, args=(line,), name="cancel", daemon=True) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _cancelled() -> TransientError:
    return TransientError("the session was cancelled", code="cancelled_there")


def _close_late(done: "Future[Connection]") -> None:
    if done.exception() is None:
        done.result().close()
