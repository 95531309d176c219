"""An API of our own on loopback: tables of records, every way of paging, limits, logins, faults.

    /PAGING/TABLE?…      PAGING is cursor, offset, page, next, link, or all (one page)
    /token               a token endpoint, if an Issuer is put there
    /PAGING/TABLE/ID/SUB?… the records of SUB whose `parent` is ID

`updated_since` and `updated_until` select by `updated_at`. What a test puts into `script` is
answered first, in that order.
"""

import json
from base64 import urlsafe_b64encode
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    values: dict[str, list[str]] = field(default_factory=dict)  # of the query, all of them


@dataclass
class Reply:
    status: int = 200
    body: Any = None  # JSON; bytes as they are
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False  # end the connection without an answer


Route = Callable[[Asked], Reply]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up: tests make them."""


class Issuer:
    """The token endpoint of an Api: it rotates, expires, revokes; `answers` goes first."""

    def __init__(self, api: "Api", *, rotates: bool = True) -> None:
        self.api, self.rotates = api, rotates
        self.client = ("app", "client-canary-5678")
        self.refresh = "refresh-canary-0"
        self.life: object = 3600
        self.codes: dict[str, tuple[str, str]] = {}  # code -> challenge, redirect_uri
        self.granted: list[str] = []  # grant types, one for each token that was given
        self.refused: list[str] = []
        self.answers: deque[Reply | Route] = deque()
        self._lock = Lock()
        self.back: dict[str, str] = {}  # what else it sends back
        api.routes["/token"] = self._answer
        api.routes["/authorize"] = self.authorize
        api.logins = set()

    def _answer(self, asked: Asked) -> Reply:
        with self._lock:
            if self.answers:
                first = self.answers.popleft()
                return first if isinstance(first, Reply) else first(asked)
            return self.proper(asked)

    def proper(self, asked: Asked) -> Reply:
        form = {k: v[-1] for k, v in parse_qs(asked.body.decode()).items()}
        if (form.get("client_id"), form.get("client_secret")) != self.client:
            return Reply(401, {"error": "invalid_client"})
        grant = form.get("grant_type", "")
        if not self._granted(grant, form):
            self.refused.append(grant)
            return Reply(400, {"error": "invalid_grant", "error_description": "canary-words"})
        self.granted.append(grant)
        return self.token()

    def _granted(self, grant: str, form: dict[str, str]) -> bool:
        if grant == "refresh_token":
            return form.get("refresh_token") == self.refresh
        challenge, redirect = self.codes.pop(form.get("code", ""), ("", ""))
        digest = sha256(form.get("code_verifier", "").encode()).digest()
        made = urlsafe_b64encode(digest).rstrip(b"=").decode()
        return (made, form.get("redirect_uri")) == (challenge, redirect)

    def token(self) -> Reply:
        """Give a token; the one of before is none any more."""
        number = len(self.granted)
        access = f"access-canary-{number}"
        self.api.logins = {f"Bearer {access}"}
        document = {"access_token": access, "token_type": "Bearer", "expires_in": self.life}
        if self.rotates or "authorization_code" in self.granted[-1:]:
            self.refresh = f"refresh-canary-{number}"
            document["refresh_token"] = self.refresh
        return Reply(200, document)

    def authorize(self, asked: Asked) -> Reply:
        """Grant it at once: send the browser back with a code."""
        query = asked.query
        assert (query["response_type"], query["code_challenge_method"]) == ("code", "S256")
        code = f"code-canary-{len(self.codes)}"
        self.codes[code] = query["code_challenge"], query["redirect_uri"]
        back = urlencode({**self.back, "code": code, "state": query["state"]})
        return Reply(302, b"", {"Location": f"{query['redirect_uri']}?{back}"})

    def revoke(self) -> None:
        """Forget every token."""
        self.refresh, self.api.logins = "nobody has this", set()


class Api:
    """One server; `tables` is its content."""

    def __init__(self) -> None:
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.script: deque[Reply] = deque()
        self.routes: dict[str, Route] = {}
        self.asked: list[Asked] = []
        self.before: Callable[[Asked], None] = lambda _asked: None
        self.size = 2
        self.clock: Callable[[], datetime] = lambda: datetime.now(UTC)
        self.logins: set[str] | None = None  # values of Authorization that are let in
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes

            def do_GET(self) -> None:
                api._serve(self)

            do_POST = do_DELETE = do_GET  # noqa: N815 - the server's names

            def log_message(self, *args: object) -> None:
                del args

            def date_time_string(self, timestamp: float | None = None) -> str:
                del timestamp
                return format_datetime(api.clock(), usegmt=True)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def paths(self) -> list[str]:
        return [one.path for one in self.asked]

    # ── answers ──────────────────────────────────────────────────────────────────────────────

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        values = parse_qs(parts.query, keep_blank_values=True)
        query = {k: v[-1] for k, v in values.items()}
        length = int(handler.headers.get("Content-Length") or 0)
        asked = Asked(
            handler.command, parts.path, query,
            {k.lower(): v for k, v in handler.headers.items()}, handler.rfile.read(length), values,
        )  # fmt: skip
        self.asked.append(asked)
        self.before(asked)
        reply = self._reply(asked)
        if reply.drop:
            handler.close_connection = True
            return
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"Content-Type": "application/json", **reply.headers}
        with suppress(ConnectionError):
            handler.send_response(reply.status)
            for name, value in headers.items():
                handler.send_header(name, value)
            if "Content-Length" not in headers:
                handler.send_header("Content-Length", str(len(body)))
            if headers.get("Connection") == "close":
                handler.close_connection = True
            handler.end_headers()
            handler.wfile.write(body)

    def _reply(self, asked: Asked) -> Reply:
        if self.script:
            return self.script.popleft()
        if asked.path in self.routes:
            return self.routes[asked.path](asked)
        if self.logins is not None and asked.headers.get("authorization") not in self.logins:
            return Reply(401, {"message": "who are you?"})
        _, paging, table, *below = asked.path.split("/")
        rows = self.tables.get(below[1] if below else table)
        if rows is None:
            return Reply(404, {"message": "not found"})
        if below:
            rows = [row for row in rows if str(row["parent"]) == below[0]]
        return self._page(paging, asked, self._selected(rows, asked.query))

    def _selected(self, rows: list[dict[str, Any]], query: dict[str, str]) -> list[dict[str, Any]]:
        since, until = query.get("updated_since", ""), query.get("updated_until", "~")
        return [
            row
            for row in rows
            if "updated_at" not in row or since <= str(row["updated_at"]) <= until
        ]

    def _page(self, paging: str, asked: Asked, rows: list[dict[str, Any]]) -> Reply:
        query = {**asked.query, **(json.loads(asked.body) if asked.body else {})}
        size = int(query.get("limit", self.size))
        match paging:
            case "all":
                return Reply(200, rows)
            case "cursor":
                start = int(query.get("after", 0))
                more = start + size < len(rows)
                paging_ = {"next": {"after": str(start + size)}} if more else {}
                return Reply(200, {"results": rows[start : start + size], "paging": paging_})
            case "offset":
                start = int(query.get("offset", 0))
                return Reply(200, {"data": rows[start : start + size], "total": len(rows)})
            case "page":
                start = (int(query.get("page", 1)) - 1) * size
                return Reply(200, {"items": rows[start : start + size]})
            case _:
                return self._linked(paging, asked, rows, size)

    def _linked(self, paging: str, asked: Asked, rows: list[dict[str, Any]], size: int) -> Reply:
        start = int(asked.query.get("start", 0))
        more = start + size < len(rows)
        further = {**asked.query, "start": str(start + size)}
        link = f"{self.url}{asked.path}?{urlencode(further)}" if more else None
        if paging == "next":
            return Reply(200, {"records": rows[start : start + size], "next": link})
        headers = {"Link": f'<{self.url}/x>; rel="first", <{link}>; rel="next"'} if link else {}
        return Reply(200, rows[start : start + size], headers)
