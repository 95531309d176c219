"""Bytes from one connection to another and back, until both have ended. Start at `Relay.run`."""

import select
import socket
from collections.abc import Callable
from contextlib import suppress

_PIECE = 65_536
#: Seconds without a byte in either direction; and after one side has ended.
_SILENCE_S, _LINGERS_S = 300.0, 30.0
#: The first byte of TLS: a record of a handshake.
_TLS = 0x16


class Cut(Exception):  # noqa: N818 - an event more than an error
    """The connection is ended by us, for the reason that `code` says (docs/errors.md)."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class _Lost(Exception):  # noqa: N818 - an event more than an error
    """One of the two connections broke."""

    def __init__(self, whose: socket.socket) -> None:
        super().__init__()
        self.whose = whose


class _Way:
    """One direction: a piece is read when the one before it is gone."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.waiting = b""
        self.ended = False

    def read(self) -> int:
        """Take a piece, if there is one; return its size."""
        try:
            self.waiting = self.source.recv(_PIECE)
        except BlockingIOError:
            return 0
        except OSError:
            raise _Lost(self.source) from None
        if not self.waiting:
            self.ended = True
            with suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)
        return len(self.waiting)

    def write(self) -> None:
        """Pass on as much as is taken now."""
        try:
            self.waiting = self.waiting[self.sink.send(self.waiting) :]
        except BlockingIOError:
            return
        except OSError:
            raise _Lost(self.sink) from None


class Relay:
    """What goes between a child and one host. `spend` is told of every piece and may raise Cut."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self.up = 0  # bytes from the child
        self.down = 0
        self._asked = False  # whether the child said something since the host did

    def run(self, near: socket.socket, far: socket.socket, first: bytes, *, tls: bool) -> None:
        """Relay until both sides have ended; Cut if it ends otherwise.

        `near` is the child's side, which may go whenever it likes; `first` came from there.
        """
        near.settimeout(0)
        far.settimeout(0)
        up, down = _Way(near, far), _Way(far, near)
        try:
            if first:
                self._went(first, tls=tls)
                up.waiting = first
            while not (up.ended and down.ended):
                ready = self._wait(up, down)
                if ready is None:
                    return
                self._move(up, down, ready, tls=tls)
        except _Lost as lost:
            if lost.whose is far and not up.ended:
                raise Cut("connection_lost") from None

    def _move(self, up: _Way, down: _Way, ready: set[int], *, tls: bool) -> None:
        if up.waiting:
            up.write()
        elif not up.ended and up.source.fileno() in ready and up.read():
            self._went(up.waiting, tls=tls)
            up.write()
        if down.waiting:
            down.write()
        elif not down.ended and down.source.fileno() in ready and (size := down.read()):
            self._spend(size)
            self.down += size
            self._asked = False
            down.write()

    def _went(self, piece: bytes, *, tls: bool) -> None:
        if tls and not self.up and piece[0] != _TLS:
            raise Cut("tls_too_weak")
        self._spend(len(piece))
        self.up += len(piece)
        self._asked = True

    def _wait(self, up: _Way, down: _Way) -> set[int] | None:
        """Wait until something can be read or written; None, or Cut, if nothing can for too long.

        A connection that a child keeps for later and does not use is ended without a fuss.
        """
        poll = select.poll()
        wanted: dict[int, int] = {}
        for way in (up, down):
            if way.waiting:
                wanted[way.sink.fileno()] = wanted.get(way.sink.fileno(), 0) | select.POLLOUT
            elif not way.ended:
                wanted[way.source.fileno()] = wanted.get(way.source.fileno(), 0) | select.POLLIN
        for number, events in wanted.items():
            poll.register(number, events)
        one_ended = up.ended or down.ended
        ready = poll.poll((_LINGERS_S if one_ended else _SILENCE_S) * 1_000)
        if ready:
            return {number for number, _ in ready}
        if self._asked and not one_ended:
            raise Cut("timeout")
        return None
