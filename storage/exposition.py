"""Serve metrics over HTTP, to readers with a token where there is one: GET only, nothing else.

It stands here because worker, scheduler and CLI all may import it, and schemas/ is plain data.
"""

import hmac
import os
import socket
import stat
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app

from schemas.errors import ConfigError, StartRefused
from schemas.secret import Secret
from schemas.settings import Settings

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

#: Shorter ones can be guessed; `openssl rand -hex 32` makes 64 characters.
_TOKEN_MIN = 16
#: Seconds that a reader has to say what it wants.
_READER_S = 10


def read_token(settings: Settings) -> Secret | None:
    """Return the token that readers must show; None where there is none.

    ConfigError if its file must not be used: missing, of somebody else, readable by others, short.
    """
    path = settings.metrics_token_file
    if path is None:
        return None
    token = _private(path).decode("ascii", errors="replace").strip()
    if len(token) < _TOKEN_MIN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"metrics token {path}: needs at least {_TOKEN_MIN} characters on one line; "
            f"make one with: openssl rand -hex 32 > {path}"
        )
    return Secret(token)


def serve(
    settings: Settings, *, port: int | None = None, registry: CollectorRegistry = REGISTRY
) -> None:
    """Serve a registry in a thread until the process ends; StartRefused if the port is taken."""
    host, port = settings.metrics_host, port or settings.metrics_port
    app = _guarded(make_wsgi_app(registry), read_token(settings))
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        kind = type("_Server", (_Server,), {"address_family": family})
        server: _Server = kind(address[:2], _Handler)
    except OSError as error:
        raise StartRefused(
            [f"metrics on {host}:{port}: {error.strerror}; choose another SYNCWARD_METRICS_PORT"]
        ) from None
    server.set_app(app)
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = _READER_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its signature
        """Say nothing: a request is no event."""


def _guarded(app: "WSGIApplication", token: Secret | None) -> "WSGIApplication":
    """Let GET requests through that show the token."""

    def answer(environ: "WSGIEnvironment", respond: "StartResponse") -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "GET":
            return _no(respond, HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET"))
        if token is not None and not _shown(environ.get("HTTP_AUTHORIZATION", ""), token):
            return _no(respond, HTTPStatus.UNAUTHORIZED, ("WWW-Authenticate", "Bearer"))
        return app(environ, respond)

    return answer


def _shown(header: str, token: Secret) -> bool:
    """Compare in a time that says nothing about where they differ."""
    scheme, _, shown = header.partition(" ")
    same = hmac.compare_digest(shown.strip().encode(), token.reveal().encode())
    return same and scheme.lower() == "bearer"


def _no(
    respond: "Callable[..., object]", status: HTTPStatus, header: tuple[str, str]
) -> Iterable[bytes]:
    respond(f"{status.value} {status.phrase}", [header, ("Content-Type", "text/plain")])
    return [f"{status.phrase}\n".encode()]


def _private(path: Path) -> bytes:
    """Read a file that nobody else can read; looks at the opened file, not at the name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise ConfigError(
            f"metrics token {path}: cannot be opened (missing, a symbolic link, or no "
            f"permission); make it with: (umask 077; openssl rand -hex 32 > {path})"
        ) from None
    with os.fdopen(descriptor, "rb", closefd=True) as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise ConfigError(
                f"metrics token {path}: not a file of this user; run: chown {os.geteuid()} {path}"
            )
        if about.st_mode & 0o077:
            raise ConfigError(
                f"metrics token {path}: others can read it; make a new one and: chmod 600 {path}"
            )
        return file.read(4096)
