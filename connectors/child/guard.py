"""Between a child and the network: every connection that it has ends here. Start at `Guard`.

Its launcher gives it one end of a connection for each socket that it asks for, and passes the other
end to us (launcher.py). There it must say CONNECT, as to any proxy for HTTP. The host must be
one that its resource lists; it is looked up once, and its addresses must pass the egress guard.
What goes through is counted, never read, but for the first byte: TLS has to begin with it.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import BoundedSemaphore, Event, Lock, Thread
from time import monotonic

from connectors.child.hosts import Listed, entry_for, parted, shown
from connectors.child.relay import Cut, Relay
from connectors.egress import EgressRefused, Lookup, Pinned, look_up, resolve
from connectors.net import validate_host
from schemas.aid import Calls, NotedNowhere
from schemas.calls import Call
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError, TransientError

#: What a child is told in its environment. Nothing listens there: whatever it connects to is here.
PROXY = "http://127.0.0.1:3128"
#: Seconds for its request, and for a connection to one address.
_ASKS_WITHIN_S, _CONNECTS_WITHIN_S = 10.0, 10.0
_REQUEST_MAX = 8_192
#: Connections at once.
CONNECTIONS_MAX = 64
#: Names that one resource's children may ask for, and lines about what they may not have.
_NAMES_MAX, _TOLD_MAX = 1_000, 100
_PIECE = 65_536
#: Errors that a connection may have caused which it did not get.
_ITS_OWN = frozenset(
    {"connector_failed", "connector_refused", "connector_incomplete", "connector_answer"}
)


class _No(Exception):  # noqa: N818 - an answer more than an error
    """A child gets no connection. `code` as in docs/errors.md; "": it asked for nothing proper."""

    def __init__(self, status: int, reason: str, code: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.code = status, reason, code


@dataclass(slots=True)
class _Name:
    """A host that was asked for, and what came of it; nobody asks twice."""

    lock: Lock = field(default_factory=Lock)
    pinned: Pinned | None = None
    refused: EgressRefused | None = None


class Reach:
    """What the children of one resource may reach, and what they were refused. For all threads."""

    def __init__(
        self,
        connector: str,
        hosts: tuple[Listed, ...],
        policy: LinkPolicy,
        *,
        calls: Calls | None = None,
        say: Callable[[str], None] = lambda _text: None,
        refused: Callable[[str, str], None] = lambda _address, _rule: None,
        lookup: Lookup = look_up,
    ) -> None:
        self.connector = connector
        self.hosts = hosts
        self._policy = policy
        self.tls_required = policy.tls_required
        self.calls: Calls = calls or NotedNowhere()
        self._say = say
        self._refused = refused
        self._lookup = lookup
        self._lock = Lock()
        self._names: dict[tuple[str, int], _Name] = {}
        self._told: set[str] = set()
        #: what ends a read, whatever the child makes of it
        self.failure: SyncwardError | None = None
        self._unlisted = False

    def entry(self, host: str, port: int) -> Listed:
        """Return the entry of the list that allows a connection; _No if none does."""
        found = entry_for(self.hosts, host, port)
        if found is None:
            self._unlisted = True
            self.tell(f"it asks for {shown(host, port)}, which is none of its resource's `hosts`")
            raise _No(403, "the host is none of the resource's hosts")
        return found

    def pinned(self, entry: Listed, host: str, port: int) -> Pinned:
        """Look a host up and check it, once; errors of connectors/egress.py."""
        with self._lock:
            if (host, port) not in self._names and len(self._names) >= _NAMES_MAX:
                raise _No(403, "asks for too many hosts", "connector_limit")
            name = self._names.setdefault((host, port), _Name())
        with name.lock:
            if name.refused is not None:
                raise name.refused
            if name.pinned is None:
                try:
                    name.pinned = resolve(host, port, self._policy, lookup=self._lookup)
                except EgressRefused as error:
                    # what the child says stays out
                    shows = f"*.{entry.host}" if entry.below else host
                    name.refused = EgressRefused(
                        shows, port, address=error.address, rule=error.rule
                    )
                    self._refused(error.address, error.rule)
                    raise name.refused from None
            return name.pinned

    def tell(self, text: str) -> None:
        """Say something in the run's log, once."""
        with self._lock:
            if text in self._told or len(self._told) >= _TOLD_MAX:
                return
            self._told.add(text)
        self._say(text)

    def check(self) -> None:
        """Raise what ends a read."""
        if self.failure is not None:
            raise self.failure

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Prefer our own reason to how a child failed, and name what it did not get."""
        try:
            yield
        except SyncwardError as error:
            if error is self.failure or error.code == "cancelled_there":
                raise
            if self.failure is not None:
                raise self.failure from error
            if self._unlisted and error.code in _ITS_OWN:
                error.public += (
                    "; it asked for hosts that the resource's `hosts` do not list: `run logs` "
                    "names them (docs/child-connectors.md)"
                )
                error.args = (error.public,)
            raise


class Guard:
    """All connections of one child."""

    def __init__(self, reach: Reach, traffic_max: int, stop: Callable[[], None]) -> None:
        self._reach = reach
        self._left = traffic_max
        self._traffic_max = traffic_max
        self._stop = stop
        self._here, self._there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[Thread] = []
        self._places = BoundedSemaphore(CONNECTIONS_MAX)
        self._ended = Event()
        self._started = False

    def start(self) -> int:
        """Begin to take connections; return the descriptor through which a launcher gives them."""
        self._started = True
        Thread(target=self._take, name="child-guard", daemon=True).start()
        return self._there.fileno()

    def launched(self) -> None:
        """Let go of the launcher's end, which it has by now, or never will."""
        self._there.close()

    def close(self) -> None:
        """End every connection, and wait a moment until they are noted."""
        self._ended.set()
        self.launched()
        with suppress(OSError):
            self._here.shutdown(socket.SHUT_RDWR)
        if not self._started:
            self._here.close()
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        until = monotonic() + 2
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))

    def _fail(self, error: SyncwardError) -> None:
        """End the child: what it did is none of the things that it may try again."""
        if self._reach.failure is None:
            self._reach.failure = error
        self._stop()

    # ── one after the other ──────────────────────────────────────────────────────────────────

    def _take(self) -> None:
        """Take what the launcher passes, until it is gone."""
        with self._here, suppress(OSError):
            while not self._ended.is_set():
                said, numbers, _, _ = socket.recv_fds(self._here, 16, 1, socket.MSG_CMSG_CLOEXEC)
                if not said:
                    return
                for number in numbers:
                    self._begin(socket.socket(fileno=number))

    def _begin(self, near: socket.socket) -> None:
        if not self._places.acquire(blocking=False):
            self._reach.tell(f"it has more than {CONNECTIONS_MAX} connections at once")
            with near, suppress(OSError):
                near.settimeout(0)
                near.send(_answer(503, "too many connections at once"))
            return
        thread = Thread(target=self._serve, args=(near,), name="child-link", daemon=True)
        with self._lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        try:
            with near:
                self._opened(near)
                self._talk(near)
        except OSError:
            return
        finally:
            with self._lock:
                self._open.discard(near)
            self._places.release()

    def _opened(self, one: socket.socket) -> None:
        with self._lock:
            self._open.add(one)
        if self._ended.is_set():
            raise ConnectionAbortedError

    # ── one connection ───────────────────────────────────────────────────────────────────────

    def _talk(self, near: socket.socket) -> None:
        """Hear what the child asks for; give it that, or say why not."""
        try:
            host, port, rest = _asked(near)
            entry = self._reach.entry(host, port)
        except _No as no:
            if not no.code and no.status != 403:  # noqa: PLR2004 - it was told that one already
                self._reach.tell(f"its connection got none: {no.reason}")
            _say_no(near, no)
            return
        at, began, relay = datetime.now(UTC), monotonic(), Relay(self._spend)
        status: int | None = None
        error: str | None = "internal"
        try:
            with self._reached(entry, host, port) as far:
                status = 200
                with suppress(OSError):  # it is gone: the relay finds that out
                    near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                relay.run(near, far, rest, tls=self._reach.tls_required)
            error = None
        except _No as no:
            error = no.code
            _say_no(near, no)
        except Cut as cut:
            error = cut.code
            self._was_cut(cut.code, entry)
        finally:
            if error != EgressRefused.code:
                self._reach.calls.note(
                    Call(
                        at=at, method="CONNECT", host=entry.shown, route="", status=status,
                        error=error, request_bytes=relay.up, response_bytes=relay.down,
                        milliseconds=round((monotonic() - began) * 1_000),
                    )
                )  # fmt: skip

    @contextmanager
    def _reached(self, entry: Listed, host: str, port: int) -> Iterator[socket.socket]:
        """Connect to one of a host's checked addresses; _No says why there is none."""
        try:
            pinned = self._reach.pinned(entry, host, port)
        except EgressRefused as refused:
            self._fail(refused)
            raise _No(403, "links to this address are not allowed", refused.code) from None
        except (ConfigError, TransientError) as error:
            raise _No(502, "the host cannot be looked up", error.code) from None
        far = self._connected(pinned)
        try:
            yield far
        finally:
            with self._lock:
                self._open.discard(far)
            far.close()

    def _connected(self, pinned: Pinned) -> socket.socket:
        no = _No(502, "no way to the host", "unreachable")
        for address in pinned.addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            far = socket.socket(family, socket.SOCK_STREAM)
            try:
                self._opened(far)
                far.settimeout(_CONNECTS_WITHIN_S)
                far.connect((address, pinned.port))
                far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                with self._lock:
                    self._open.discard(far)
                far.close()
                no = _why_not(error)
            else:
                return far
        raise no

    def _spend(self, size: int) -> None:
        """Count bytes; Cut when there are more than a child may move."""
        with self._lock:
            self._left -= size
            left = self._left
        if left < 0:
            raise Cut("connector_limit")

    def _was_cut(self, code: str, entry: Listed) -> None:
        if code == "connector_limit":
            self._fail(
                ConfigError(
                    f"{self._reach.connector}: moved more than {self._traffic_max >> 20:,} MiB "
                    "over its connections and was ended; read less at a time, or raise "
                    "SYNCWARD_CONNECTORS_TRAFFIC",
                    code=code,
                )
            )
        elif code == "tls_too_weak":
            self._fail(
                ConfigError(
                    f"{self._reach.connector}: sends something else than TLS to {entry.shown}, "
                    "which everybody on the way could read; use a setting of it, or a connector, "
                    "that does not",
                    code=code,
                )
            )


def _asked(near: socket.socket) -> tuple[str, int, bytes]:
    """Return the host and port that a child asks for, and what it has sent behind that."""
    until, came = monotonic() + _ASKS_WITHIN_S, b""
    while True:
        if not b"CONNECT ".startswith(came[:8]):
            raise _No(405, "it speaks something else than CONNECT, as if there were no proxy")
        if b"\r\n\r\n" in came:
            break
        if len(came) > _REQUEST_MAX:
            raise _No(431, "its request is too long")
        near.settimeout(max(0.001, until - monotonic()))
        try:
            piece = near.recv(_REQUEST_MAX)
        except TimeoutError:
            if not came:
                raise  # one that it keeps for later, or does not need
            raise _No(408, "it sent no whole request in time") from None
        if not piece:
            raise ConnectionAbortedError  # it did not need that socket
        came += piece
    head, _, rest = came.partition(b"\r\n\r\n")
    words = head.partition(b"\r\n")[0].split(b" ")
    if [*words[:1], len(words)] != [b"CONNECT", 3] or not words[2].startswith(b"HTTP/1."):
        raise _No(400, "its request cannot be read")
    try:
        host, port = parted(words[1].decode("ascii"))
        return validate_host(host), port, rest
    except (ConfigError, ValueError):
        raise _No(400, "its request names no host and port") from None


def _why_not(error: OSError) -> _No:
    if isinstance(error, TimeoutError):
        return _No(504, "the host does not answer in time", "timeout")
    if isinstance(error, ConnectionRefusedError):
        return _No(502, "nothing listens there", "connection_refused")
    if isinstance(error, ConnectionAbortedError):
        return _No(503, "the child is ended", "cancelled_there")
    return _No(502, "no way to the host", "unreachable")


def _answer(status: int, reason: str) -> bytes:
    text = f"HTTP/1.1 {status} {reason}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    return text.encode("ascii")


def _say_no(near: socket.socket, no: _No) -> None:
    """Answer, and hear the child out for a moment: else the answer might be lost."""
    with suppress(OSError):
        near.settimeout(1)
        near.sendall(_answer(no.status, no.reason))
        near.shutdown(socket.SHUT_WR)
        until = monotonic() + 1
        while monotonic() < until and near.recv(_PIECE):
            pass
