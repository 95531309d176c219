"""The guard for HTTP: every call to a system that an operator's customer names. Start at `Link`.

A host is looked up once and its addresses are checked and pinned (connectors/egress.py); TLS
checks the host's name; a redirect is followed to the same origin only, so that what a call carries
never reaches another one; answers are bounded in bytes, after decompression, and in time.
"""

import ssl
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from urllib.parse import urljoin, urlsplit

import httpcore
import httpx

from connectors import authority
from connectors.egress import EgressRefused, Lookup, look_up
from connectors.http_sockets import NotConnected, Sockets
from connectors.net import validate_host
from schemas.aid import Calls, NotedNowhere
from schemas.calls import Call
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError, TransientError

_REDIRECTS = {301, 302, 303, 307, 308}
_KEEPS_BODY = {307, 308}
_PORTS = {"https": 443, "http": 80}
_DECODED_AT_ONCE = 1 << 20
#: Compressed, a body that may come has few bytes more than it has in the end.
_PACKED_MORE = 1 << 16
#: What the reader of HTTP says of a head, or of lines between chunks, that does not end.
_HEAD_TOO_LONG = 431


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a call may take and how much it may bring."""

    body_max: int = 8 * 2**20  # bytes, decompressed
    total_s: float = 120
    connect_s: float = 10
    read_s: float = 60  # without a byte
    redirects_max: int = 5


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a call goes: what a token must not leave."""

    scheme: str
    host: str
    port: int

    @property
    def shown(self) -> str:
        """The host, with its port where that is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if _PORTS[self.scheme] == self.port else f"{host}:{self.port}"


@dataclass(slots=True)
class _Seen:
    """How far a call came."""

    status: int | None = None
    received: int = 0  # bytes of the body, as they came


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    url: str
    origin: Origin
    headers: Mapping[str, str]
    content: bytes
    until: float  # by our clock
    seen: _Seen = field(default_factory=_Seen)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: of whatever status."""

    status: int
    headers: httpx.Headers
    body: bytes
    url: str  # the last one, after redirects
    tls: str  # the version of TLS, or none
    #: it said how long it is; else it may be a part, which ended with the connection
    whole: bool = True


def origin_of(url: str) -> Origin:
    """Return where a URL leads; ConfigError unless it is a plain http or https URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError("the URL cannot be read; write https://HOST/PATH") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigError("the URL is no http or https URL; write https://HOST/PATH")
    if "@" in parts.netloc:
        raise ConfigError(
            "the URL holds a login, which would be stored in clear; use the secret fields"
        )
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url) or "\\" in url:  # noqa: PLR2004 - controls
        raise ConfigError("the URL holds a blank, a control character or a backslash")
    return Origin(parts.scheme, validate_host(parts.hostname), port or _PORTS[parts.scheme])


def check_origin(url: str, policy: LinkPolicy) -> Origin:
    """Return where a URL leads; ConfigError where the policy wants TLS and there is none."""
    origin = origin_of(url)
    if policy.tls_required and origin.scheme != "https":
        raise ConfigError(
            f"{origin.shown}: everybody on the way could read what is sent; use https",
            code="tls_too_weak",
        )
    return origin


def same_origin(url: str, link: str, origin: Origin) -> str | None:
    """Return a link of an answer as a whole URL; None if it leads to another origin."""
    try:
        whole = urljoin(url, link)
        return whole if origin_of(whole) == origin else None
    except (ConfigError, ValueError):
        return None


class Link:
    """Calls to any number of hosts. Used by one thread; `cut` comes from others."""

    def __init__(
        self,
        policy: LinkPolicy,
        *,
        bounds: Bounds | None = None,
        trusted: str = authority.SYSTEM,
        lookup: Lookup = look_up,
        calls: Calls | None = None,
    ) -> None:
        self._policy = policy
        self._calls = calls or NotedNowhere()
        self._bounds = bounds or Bounds()
        self._sockets = Sockets(policy, lookup)
        self._trusted = trusted
        self._pools: dict[str, httpcore.ConnectionPool] = {}

    def apart(self, bounds: Bounds) -> "Link":
        """Return another link with the same rules and bounds of its own; `cut` ends one of them."""
        return Link(
            self._policy, bounds=bounds, trusted=self._trusted, lookup=self._sockets.lookup,
            calls=self._calls,
        )  # fmt: skip

    def _pool(self, origin: Origin) -> httpcore.ConnectionPool:
        """Return the connections of a scheme; the authorities are read where there is TLS."""
        scheme = origin.scheme
        if scheme not in self._pools:
            tls = authority.context(self._trusted, origin.shown) if scheme == "https" else None
            self._pools[scheme] = httpcore.ConnectionPool(
                ssl_context=tls,
                max_connections=4,
                network_backend=self._sockets,
            )
        return self._pools[scheme]

    def reach(self, url: str) -> None:
        """Look up and check where a URL leads, and pin it; nothing is sent."""
        origin = check_origin(url, self._policy)
        self._sockets.pinned(origin.host, origin.port)

    def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes = b"",
        route: str = "",
    ) -> Answer:
        """Send one request and return the whole answer, whatever its status.

        `route` is its path as somebody wrote it, without values: what the list of calls shows, also
        for the hops of a redirect, whose paths the other system chose.
        ConfigError: forbidden, not trusted, too large, or a redirect elsewhere. TransientError:
        not there, too slow, or ended in the middle.
        """
        origin = check_origin(url, self._policy)
        until = monotonic() + self._bounds.total_s
        for _ in range(self._bounds.redirects_max + 1):
            one = _Call(method, url, origin, headers or {}, content, until)
            answer = self._noted(one, route)
            where = answer.headers.get("location")
            if answer.status not in _REDIRECTS or where is None:
                return answer
            if content and answer.status not in _KEEPS_BODY:
                raise _wrong(origin, "redirects a request that has a body")
            target = same_origin(url, where, origin)
            if target is None:
                raise _wrong(
                    origin, "redirects to another host, which gets no request and no token"
                )
            url = target
        raise _wrong(origin, f"redirects more than {self._bounds.redirects_max} times")

    def _noted(self, call: _Call, route: str) -> Answer:
        """Send one request, and note it however it ends. What may not be sent is no call."""
        at, began, error = datetime.now(UTC), monotonic(), "internal"
        try:
            answer = self._once(call)
            error = ""
        except SyncwardError as failed:
            error = failed.code
            raise
        finally:
            if error != EgressRefused.code:
                self._calls.note(
                    Call(
                        at=at,
                        method=call.method,
                        host=call.origin.shown,
                        route=route,
                        status=call.seen.status,
                        error=error or None,
                        request_bytes=len(call.content),
                        response_bytes=call.seen.received,
                        milliseconds=round((monotonic() - began) * 1_000),
                    )
                )
        return answer

    def _once(self, call: _Call) -> Answer:
        # Raised outside of `except`: an exception of the client may carry the request along.
        failed: SyncwardError
        origin = call.origin
        try:
            return self._sent(call)
        except httpcore.TimeoutException:
            failed = _late(origin)
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            failed = _lost(origin, error)
        except (httpx.InvalidURL, UnicodeError):
            failed = _wrong(origin, "cannot be asked for this URL")
        if self._sockets.ended:
            failed = TransientError(
                f"{origin.shown}: the call was cancelled", code="cancelled_there"
            )
        raise failed

    def _sent(self, call: _Call) -> Answer:
        origin, bounds = call.origin, self._bounds
        headers = {
            "Host": origin.shown,
            "Accept-Encoding": "gzip",
            "User-Agent": "syncward",
        }
        if call.content or call.method != "GET":
            headers["Content-Length"] = str(len(call.content))
        headers |= call.headers
        request = httpcore.Request(
            call.method,
            httpcore.URL(
                scheme=origin.scheme,
                host=origin.host,
                port=origin.port,
                target=httpx.URL(call.url).raw_path,
            ),
            headers=[(n.encode("ascii"), v.encode("ascii")) for n, v in headers.items()],
            content=call.content,
            extensions={
                "timeout": {
                    "connect": bounds.connect_s, "read": bounds.read_s, "write": bounds.read_s,
                    "pool": bounds.connect_s,
                }
            },
        )  # fmt: skip
        self._sockets.until = call.until
        response = self._pool(origin).handle_request(request)
        call.seen.status = response.status
        try:
            came = httpx.Headers(response.headers)
            body = b"".join(self._decoded(response.iter_stream(), came, call))
            secured = response.extensions["network_stream"].get_extra_info("ssl_object")
        finally:
            response.close()
        says = ("content-length", "transfer-encoding", "content-encoding")
        return Answer(
            response.status,
            came,
            body,
            call.url,
            secured.version() if secured else "none",
            whole=any(name in came for name in says),
        )

    def _decoded(
        self, chunks: Iterator[bytes], headers: httpx.Headers, call: _Call
    ) -> Iterator[bytes]:
        """Yield the body in pieces; the bound is looked at before a piece is decompressed whole."""
        origin = call.origin
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", "gzip", ""}:
            raise _wrong(origin, "answers in an encoding that was not asked for")
        unzip = _Unzip(origin) if encoding == "gzip" else None
        size, most = 0, self._bounds.body_max
        for chunk in chunks:
            call.seen.received += len(chunk)
            if call.seen.received > most + _PACKED_MORE:
                raise _too_large(origin, most)
            for piece in [chunk] if unzip is None else unzip.pieces(chunk):
                size += len(piece)
                if size > most:
                    raise _too_large(origin, most)
                yield piece
        if unzip is not None and call.seen.received and not unzip.ended:
            raise TransientError(
                f"{origin.shown}: the answer ended in the middle; tried again",
                code="connection_lost",
            )

    def cut(self) -> None:
        """End the call that waits, and let none begin; for another thread."""
        self._sockets.cut()

    def close(self) -> None:
        """Close the connections."""
        for pool in self._pools.values():
            pool.close()


class _Unzip:
    """A body of gzip, which may be several, one behind the other; nothing else is behind them."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._one = zlib.decompressobj(31)

    @property
    def ended(self) -> bool:
        """Whether what has come is whole."""
        return self._one.eof

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what a part of it holds, in bounded pieces; some of them may be empty."""
        while chunk:
            if self._one.eof:
                chunk = chunk.lstrip(b"\x00")  # of a block that was filled up
                if not chunk:
                    return
                self._one = zlib.decompressobj(31)
            try:
                piece = self._one.decompress(chunk, _DECODED_AT_ONCE)
            except zlib.error:
                raise _wrong(self._origin, "says gzip and sends something else") from None
            chunk = self._one.unused_data if self._one.eof else self._one.unconsumed_tail
            yield piece


def _too_large(origin: Origin, most: int) -> ConfigError:
    return _wrong(origin, f"sends more than {most >> 20} MiB in one answer; ask for smaller pages")


def _wrong(origin: Origin, what: str) -> ConfigError:
    return ConfigError(f"{origin.shown}: {what}", code="api_answer")


def _late(origin: Origin) -> TransientError:
    return TransientError(f"{origin.shown}: does not answer in time; tried again", code="timeout")


def _lost(  # noqa: PLR0911 - one return per reason reads as a table
    origin: Origin, error: BaseException
) -> SyncwardError:
    """Say how a connection failed, from what lies below httpcore's error."""
    reason = error.reason if isinstance(error, NotConnected) else None
    if isinstance(reason, ssl.SSLCertVerificationError):
        return ConfigError(
            f"{origin.shown}: its certificate is not trusted or is another host's; correct the "
            "host, or name its authority's file in sslrootcert",
            code="tls_refused",
        )
    if isinstance(reason, ssl.SSLError):
        return ConfigError(
            f"{origin.shown}: does not speak TLS 1.2 or later there", code="tls_refused"
        )
    if isinstance(reason, ConnectionRefusedError):
        return TransientError(
            f"{origin.shown}: nothing listens there; tried again", code="connection_refused"
        )
    if isinstance(error, httpcore.ConnectError):
        return TransientError(
            f"{origin.shown}: no way to it just now; tried again", code="unreachable"
        )
    if isinstance(error, httpcore.LocalProtocolError):
        return _wrong(origin, "cannot be sent this request: a header holds what no header may")
    if getattr(error.__cause__ or error.__context__, "error_status_hint", None) == _HEAD_TOO_LONG:
        return _wrong(origin, "sends more than 100 KiB of headers, or of what is no body")
    return TransientError(
        f"{origin.shown}: the connection ended in the middle; tried again", code="connection_lost"
    )
