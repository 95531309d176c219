"""Read a COPY without a step of the driver for each row, which costs more than all the rest.

The driver starts the COPY and ends it; between the two `Relay` takes from libpq whatever has come,
and waits for more only where there is nothing left.
"""

from collections.abc import Iterator
from select import POLLIN, poll

from psycopg import errors
from psycopg.pq import ExecStatus

from connectors.postgres.link import Connection

#: Bytes joined before they are handed on: fewer, larger writes cost the client less.
_BLOCK = 256 * 1024


class Relay:
    """One COPY TO STDOUT that has begun on this session."""

    def __init__(self, conn: Connection) -> None:
        self._pgconn = conn.pgconn
        self._parts: list[memoryview] = []
        self.messages = 0  # so far: one a row, and two around them
        self.total: int | None = None  # rows by the server, once all have come
        self.rest = b""  # the last bytes, once all have come

    def blocks(self) -> Iterator[bytes]:
        """Yield all blocks but the last; psycopg's error if the server did not say it is complete.

        The driver holds the session for the COPY meanwhile. So the last one, which is the only one
        of a small table, is left in `rest`, for when the session is free.
        """
        more = poll()
        more.register(self._pgconn.socket, POLLIN)
        held: list[bytes] = []
        size = 0
        while True:
            open_ = self._take()
            if self._parts:
                held.append(b"".join(self._parts))
                size += len(held[-1])
                self.messages += len(self._parts)
                self._parts.clear()
            if size >= _BLOCK:
                yield b"".join(held)
                held.clear()
                size = 0
            if not open_:
                break
            more.poll()
            self._pgconn.consume_input()
        self._end()
        self.rest = b"".join(held)

    def _take(self) -> bool:
        """Take the messages that are here; False once no more will come."""
        get, add = self._pgconn.get_copy_data, self._parts.append
        while True:
            size, data = get(1)
            if size <= 0:
                return size == 0
            add(data)

    def _end(self) -> None:
        """Hear how it ended, and leave the session ready for the next statement."""
        results = []
        while (result := self._pgconn.get_result()) is not None:
            results.append(result)
        for result in results:
            if result.status != ExecStatus.COMMAND_OK:
                raise errors.error_from_result(result)
        if not results:
            raise errors.OperationalError("the COPY ended without an answer")
        self.total = results[0].command_tuples
