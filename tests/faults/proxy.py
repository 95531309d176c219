"""A TCP proxy that misbehaves on command: between our processes and Postgres or Redis.

Each connection has a thread per direction. A fault holds for what is open and for what comes, until
the next command.
"""

import select
import socket
import time
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Literal, Self

#: pass: honest; hole: bytes are taken and vanish, both ways; mute: requests pass, answers vanish;
#: trickle: answers pass at one byte a second; half_open: nothing is read, nothing is closed.
Mode = Literal["pass", "hole", "mute", "trickle", "half_open"]

_BLOCK = 65_536


class Proxy:
    """Listens on a loopback port of its own and relays to `host:port`."""

    host = "127.0.0.1"

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._mode: Mode = "pass"
        self._refusing = False
        self._then: Mode = "pass"
        self._awaited: list[bytes] = []
        self._lock = Lock()
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._stop = Event()
        self.hit = Event()  # a request was seen that the fault waits for
        self._server = socket.create_server((self.host, 0))
        self.port = int(self._server.getsockname()[1])
        self._thread = Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ── commands ─────────────────────────────────────────────────────────────────────────────

    def set(self, mode: Mode) -> None:
        """Behave so from now on, for all connections."""
        self.hit.clear()
        self._awaited, self._mode = [], mode

    def after(self, mode: Mode, *requests: bytes) -> None:
        """Be honest until requests with these bytes were seen in this order; the last passes."""
        self.hit.clear()
        self._mode, self._then, self._awaited = "pass", mode, list(requests)

    def cut(self, *, refuse: bool = False) -> None:
        """Reset every connection; with `refuse` new ones are closed at once, until `set`."""
        self._refusing = refuse
        with self._lock:
            links, self._links = self._links, []
        for pair in links:
            for end in pair:
                _reset(end)

    def heal(self) -> None:
        """Be honest again. What was swallowed is gone: connections that hang are cut."""
        self._refusing = False
        hurt = self._mode != "pass"
        self.set("pass")
        if hurt:
            self.cut()

    def close(self) -> None:
        self._stop.set()
        self._server.close()
        self.cut()
        self._thread.join(timeout=5)

    # ── relaying ─────────────────────────────────────────────────────────────────────────────

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                if not select.select([self._server], [], [], 0.2)[0]:
                    continue
                client, _ = self._server.accept()
            except (OSError, ValueError):
                return  # closed
            if self._refusing:
                _reset(client)
                continue
            try:
                upstream = socket.create_connection(self._target, timeout=5)
            except OSError:
                _reset(client)
                continue
            for end in (client, upstream):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._links.append((client, upstream))
            for pair, answers in (((client, upstream), False), ((upstream, client), True)):
                Thread(target=self._relay, args=(*pair, answers), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:  # noqa: FBT001 - a thread's argument
        with suppress(OSError, ValueError):
            while not self._stop.is_set():
                if self._holds():
                    time.sleep(0.02)
                    continue
                if not select.select([source], [], [], 0.2)[0] or self._holds():
                    continue
                data = source.recv(_BLOCK)
                if not data:
                    break
                self._pass(data, sink, answers=answers)
        for end in (source, sink):
            _reset(end)

    def _holds(self) -> bool:
        return self._mode == "half_open"

    def _pass(self, data: bytes, sink: socket.socket, *, answers: bool) -> None:
        if self._mode == "hole" or (answers and self._mode == "mute"):
            return
        if not answers:
            self._watch(data)
        if self._mode == "trickle" and answers:
            self._trickle(data, sink)
        else:
            sink.sendall(data)

    def _watch(self, request: bytes) -> None:
        """Begin the fault with the answer to the last awaited request."""
        while self._awaited and (place := request.find(self._awaited[0])) >= 0:
            request = request[place + len(self._awaited.pop(0)) :]
            if not self._awaited:
                self._mode = self._then
                self.hit.set()

    def _trickle(self, data: bytes, sink: socket.socket) -> None:
        for place in range(len(data)):
            if self._mode != "trickle" or self._stop.wait(1.0):
                sink.sendall(data[place:])
                return
            sink.sendall(data[place : place + 1])


def _reset(end: socket.socket) -> None:
    """Close so that the other side sees it at once, whatever is still in the buffers."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
