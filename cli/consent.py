"""Wait for a person's consent: on loopback, or pasted. Start at `Loopback` and `pasted`.

Whatever comes is refused unless it has the state that this command gave out, once and in time. What
is refused is neither shown nor logged, and the wait goes on: anybody on this host may knock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTP_PORT
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Self
from urllib.parse import SplitResult, parse_qsl, urlsplit

from crypto.tickets import Tickets
from schemas.consent import ERROR_NAME
from schemas.errors import ConfigError
from schemas.redaction import REDACTOR
from schemas.secret import Secret

PATH = "/callback"
#: A request with more than this in its first line is refused, and so is a pasted line.
LONGEST = 8_192
#: Seconds in which a request must be whole; and how many are answered before we give up.
_REQUEST_S, _KNOCKS_MAX = 5, 1_000


@dataclass(frozen=True, slots=True)
class Declined:
    """The API came back with an error instead of a code; `name` is one of the standard's."""

    name: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing that we asked for."""

    why: str


Came = Secret | Declined | Refused


class Expected:
    """The one answer that is waited for."""

    def __init__(self, tickets: Tickets, purpose: str) -> None:
        self._tickets = tickets
        self._purpose = purpose
        self._lock = Lock()

    def read(self, query: str) -> Came:
        """Return what a redirect brings; its state is used up with it."""
        try:
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=20, strict_parsing=True)
        except ValueError:
            return Refused("it is no redirect of an authorisation")
        given = dict(pairs)
        if len(given) != len(pairs):
            return Refused("a parameter comes twice")
        with self._lock:
            refusal = self._tickets.redeem(given.get("state", ""), self._purpose)
        if refusal is not None:
            return Refused(f"its state {refusal}")
        if "error" in given:
            known = ERROR_NAME.fullmatch(given["error"])
            return Declined(given["error"] if known else "error")
        if not given.get("code"):
            return Refused("there is no code in it")
        return Secret(REDACTOR.know(given["code"]))


def pasted(line: str, redirect_uri: str, expected: Expected) -> Came:
    """Read the address that a browser has ended at, on whatever machine."""
    line = line.strip()
    if len(line) > LONGEST:
        return Refused("it is too long")
    address, _, query = line.partition("?")
    if address != redirect_uri:
        return Refused(f"paste the whole address; it begins with {redirect_uri}?")
    return expected.read(query.partition("#")[0])


class Loopback:
    """Listens on 127.0.0.1 for the redirect. A context; nothing listens afterwards."""

    def __init__(self, port: int, expected: Expected, tell: Callable[[str], None]) -> None:
        self._came: Queue[Secret | Declined] = Queue()
        try:
            self._server = _Server(port, expected, self._came, tell)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: this host does not let us listen there (errno {error.errno}); "
                "choose another, or leave it out"
            ) from None
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def redirect_uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}{PATH}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self, seconds: float) -> Secret | Declined | None:
        """Return what came; None if nothing did in time."""
        try:
            return self._came.get(timeout=seconds)
        except Empty:
            return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(
        self,
        port: int,
        expected: Expected,
        came: "Queue[Secret | Declined]",
        tell: Callable[[str], None],
    ) -> None:
        self.expected, self.came, self.tell = expected, came, tell
        self.knocks = 0
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: its traceback could quote a request."""

    def answer(self, path: str, host: str | None) -> tuple[int, str]:
        """Return status and text for a GET of this path."""
        self.knocks += 1
        if self.knocks > _KNOCKS_MAX:
            return 429, "Too many requests came here."
        parts = self._ours(path, host)
        if parts is None:
            return self._refuse(400, "it was sent to another host")
        if parts.path != PATH:
            return 404, "Nothing is here."
        found = (
            Refused("it is too long") if len(path) > LONGEST else self.expected.read(parts.query)
        )
        if isinstance(found, Refused):
            return self._refuse(400, found.why)
        self.came.put(found)
        if isinstance(found, Declined):
            return 200, "The API did not grant it. You can close this page."
        return 200, "Received. You can close this page; the command goes on."

    def _ours(self, path: str, host: str | None) -> SplitResult | None:
        """Return what a request asks for; None if it is not for this host."""
        bare = self.server_port == HTTP_PORT  # which a browser does not write
        if host != "127.0.0.1" + ("" if bare else f":{self.server_port}"):
            return None
        try:
            parts = urlsplit(path[: LONGEST + 1])
        except ValueError:
            return None
        return None if parts.scheme or parts.netloc else parts

    def _refuse(self, status: int, why: str) -> tuple[int, str]:
        self.tell(f"a request was refused: {why}; still waiting")
        return status, f"Refused: {why}."


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_S
    server_version, sys_version = "syncward", ""

    def do_GET(self) -> None:
        self._answer(*self.server.answer(self.path, self.headers.get("Host")))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no GET, or no HTTP, without a word of it."""
        del message, explain
        self._answer(code, "Refused.")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.close_connection = True
        self.send_response_only(status)
        for name, value in (
            ("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"), ("Connection", "close"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Log nothing: the first line of a request holds the code."""
