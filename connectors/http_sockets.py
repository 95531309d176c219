"""Connections of the HTTP guard: made to checked addresses only, and cut from another thread.

httpcore asks `Sockets` for every connection that it needs. The certificate is checked against the
name of the host, the connection goes to the addresses that `connectors/egress.py` let pass once.
"""

import select
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock
from time import monotonic
from typing import Any

import httpcore

from connectors.egress import Lookup, Pinned, resolve
from schemas.egress import LinkPolicy
from schemas.errors import TransientError


class NotConnected(httpcore.ConnectError):
    """No connection; `reason` is what the system or TLS said, which httpcore would drop."""

    def __init__(self, reason: OSError) -> None:
        super().__init__("not connected")
        self.reason = reason


class Sockets(httpcore.NetworkBackend):
    """Opens connections and knows those that are open."""

    def __init__(self, policy: LinkPolicy, lookup: Lookup) -> None:
        self._policy = policy
        self.lookup = lookup
        self._pins: dict[tuple[str, int], Pinned] = {}
        self._open: set[socket.socket] = set()
        self._lock = Lock()
        self.ended = False
        self.until = float("inf")  # by our clock: when the call that goes on must have ended

    def left(self, timeout: float | None) -> float:
        """Return how long a step may wait: a peer that drips does not stretch the call."""
        left = self.until - monotonic()
        if left <= 0:
            raise TimeoutError("the call took too long")
        return left if timeout is None else min(timeout, left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect to one of the host's checked addresses; they are looked up once."""
        del local_address, socket_options  # nobody gives them here
        failed: Exception = httpcore.ConnectError("no address")
        for address in self.pinned(host, port).addresses:
            try:
                return self._connected(address, port, timeout)
            except TimeoutError:
                failed = httpcore.ConnectTimeout("no connection in time")
            except OSError as error:
                failed = NotConnected(error)
        raise failed

    def pinned(self, host: str, port: int) -> Pinned:
        """Return the checked addresses of a host; EgressRefused if one is forbidden."""
        if (host, port) not in self._pins:
            self._pins[host, port] = resolve(host, port, self._policy, lookup=self.lookup)
        return self._pins[host, port]

    def _connected(self, address: str, port: int, timeout: float | None) -> httpcore.NetworkStream:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        one = socket.socket(family, socket.SOCK_STREAM)
        try:
            self.opened(one)
            one.settimeout(self.left(timeout))
            one.connect((address, port))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self.closed(one)
            raise
        return _Stream(one, self)

    def opened(self, one: socket.socket) -> None:
        """Take a socket into the list; TransientError if the link has been cut."""
        with self._lock:
            self._open.add(one)
        if self.ended:
            raise TransientError("the call was cancelled", code="cancelled_there")

    def closed(self, one: socket.socket) -> None:
        """Close a socket and forget it."""
        with self._lock:
            self._open.discard(one)
        one.close()

    def cut(self) -> None:
        """End whatever waits on a connection, now; none is opened any more."""
        self.ended = True
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    # that of the class below: TLS would drop its state under the other thread
                    socket.socket.shutdown(one, socket.SHUT_RDWR)


class _Stream(httpcore.NetworkStream):
    """One connection, plain or with TLS."""

    def __init__(self, one: socket.socket, sockets: Sockets) -> None:
        self._socket = one
        self._sockets = sockets

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            self._socket.settimeout(self._sockets.left(timeout))
            return self._socket.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout("no answer in time") from error
        except OSError as error:
            raise httpcore.ReadError("lost while reading") from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            self._socket.settimeout(self._sockets.left(timeout))
            self._socket.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout("not taken in time") from error
        except OSError as error:
            raise httpcore.WriteError("lost while writing") from error

    def close(self) -> None:
        self._sockets.closed(self._socket)

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        """Begin TLS, without the handshake while the new socket is not in the list."""
        try:
            self._socket.settimeout(self._sockets.left(timeout))
            secured = ssl_context.wrap_socket(
                self._socket, server_hostname=server_hostname, do_handshake_on_connect=False
            )
            self._sockets.closed(self._socket)  # it is an empty shell by now
            self._socket = secured
            self._sockets.opened(secured)
            secured.do_handshake()
        except TimeoutError as error:
            self.close()
            raise httpcore.ConnectTimeout("no connection in time") from error
        except OSError as error:
            self.close()
            raise NotConnected(error) from error
        return self

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401 - httpcore's signature
        if info == "ssl_object" and isinstance(self._socket, ssl.SSLSocket):
            return self._socket
        if info == "is_readable":
            return _is_readable(self._socket)
        return None


def _is_readable(one: socket.socket) -> bool:
    """Say whether an idle connection has something to read, which can only be its end."""
    if one.fileno() < 0:
        return True
    poll = select.poll()
    poll.register(one.fileno(), select.POLLIN)
    return bool(poll.poll(0))
