"""HTTP to a Vault or OpenBao: one address, one token file, bounded waiting, no body in any error.

Whatever the server answers is either used or forgotten: bodies may hold keys.
"""

import json
import logging
import re
import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from weakref import finalize

import httpx

from crypto.errors import KeyringError, KmsDenied, KmsUnavailable
from crypto.kms import private
from schemas.redaction import REDACTOR

CONNECT_S = 3.0
READ_S = 5.0
#: For one answer as a whole, however slowly it drips.
TOTAL_S = 10.0
ANSWER_MAX = 16 * 1024 * 1024

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_TOKEN = re.compile(r"[!-~]{1,4096}")
_FORM = "vault://host:8200/mount/name?token=/path/to/token[&ca=/path/to/ca.pem]"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Vault is and how to ask it."""

    host: str  # with its port: what names the server in errors and in the ids of roots
    plain: bool
    mount: str
    name: str
    token_file: Path
    ca_file: Path | None

    @property
    def url(self) -> str:
        """The address without a path."""
        return f"{'http' if self.plain else 'https'}://{self.host}"


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """A status and what was in the document; never shown."""

    status: int
    document: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        """The part that answers the question; empty if there is none."""
        data = self.document.get("data")
        return data if isinstance(data, dict) else {}


def parse(uri: str) -> Address:
    """Take a keyring's URI apart; KeyringError shows the form it must have."""
    parts = urlsplit(uri)
    plain = parts.scheme == "vault+http"
    try:
        host, port = parts.hostname or "", parts.port or 8200
        query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise KeyringError(f"keyring vault://…: cannot be read; write {_FORM}") from None
    segments = parts.path.strip("/").split("/")
    wrong = (
        not host
        or parts.username is not None
        or parts.fragment
        or len(segments) < 2  # noqa: PLR2004 - a mount and a name
        or not all(map(_SEGMENT.fullmatch, segments))
        or not set(query) <= {"token", "ca"}
        or "token" not in query
        or not all(path.startswith("/") for path in query.values())
    )
    if wrong:
        raise KeyringError(f"keyring vault://…: cannot be read; write {_FORM}")
    if plain and not _is_loopback(host):
        raise KeyringError(
            f"keyring vault+http://{host}: without TLS only a Vault of this host is asked; "
            "use vault://"
        )
    return Address(
        host=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        plain=plain,
        mount="/".join(segments[:-1]),
        name=segments[-1],
        token_file=Path(query["token"]),
        ca_file=Path(query["ca"]) if "ca" in query else None,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Transit:
    """A connection to one server. Any thread may call it."""

    def __init__(self, address: Address) -> None:
        for name in ("httpx", "httpcore"):  # they would log each address
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        self._lock = Lock()
        self._stamp: tuple[int, ...] | None = None
        self._token = ""
        #: counts the tokens: what one may do, another may not
        self.tokens = 0
        self._read_token()
        self._client = httpx.Client(
            base_url=f"{address.url}/v1/",
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
            verify=False if address.plain else _trust(address.ca_file),
            trust_env=False,
            follow_redirects=False,
        )
        finalize(self, self._client.close)  # also for whoever asks once and forgets it

    def __repr__(self) -> str:
        return f"Transit({self.address.host})"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(self, method: str, path: str, body: object = None) -> Answer:
        """Ask once more with a new token after a refusal; KmsDenied, KmsUnavailable otherwise.

        Returns what the caller must judge: an answer of 200, or of 400 (parts of a batch failed).
        """
        self._read_token()
        answer = self._ask(method, path, body)
        if answer.status == httpx.codes.FORBIDDEN and self._read_token(anyway=True):
            answer = self._ask(method, path, body)
        host = self.address.host
        match answer.status:
            case 200 | 204 | 400:
                return answer
            case 403:
                raise KmsDenied(
                    f"KMS {host}: refuses this host's token for {path}; give it the policy "
                    "that docs/keys.md shows, or a token that has not expired"
                )
            case 404:
                raise KmsDenied(
                    f"KMS {host}: has no {path}; make it as docs/keys.md shows, or correct the URI"
                )
            case 503:
                raise KmsUnavailable(f"KMS {host}: is sealed or in maintenance; unseal it")
            case status:
                raise KmsUnavailable(f"KMS {host}: answers with status {status}; see its log")

    def _ask(self, method: str, path: str, body: object) -> Answer:
        # Raised outside of `except`: an exception of the client would carry token and body along.
        failure = ""
        for _ in range(2):
            try:
                return self._once(method, path, body)
            except httpx.TimeoutException:
                failure = "does not answer in time"
                break
            except httpx.TransportError as error:
                failure = (
                    "shows a certificate that is not trusted; give its CA as ca=FILE"
                    if _is_about_certificates(error)
                    else "cannot be reached; start it, or mend the way to it"
                )
            except (httpx.HTTPError, ValueError):
                failure = "answers what no Vault answers; correct the address"
                break
        raise KmsUnavailable(f"KMS {self.address.host}: {failure}")

    def _once(self, method: str, path: str, body: object) -> Answer:
        until = monotonic() + TOTAL_S
        headers = {"X-Vault-Token": self._token, "X-Vault-Request": "true"}
        content = bytearray()
        with self._client.stream(method, path, json=body, headers=headers) as response:
            for piece in response.iter_bytes():
                content += piece
                if monotonic() > until or len(content) > ANSWER_MAX:
                    raise httpx.ReadTimeout("too slow or too much")
        if response.status_code not in {200, 400} or not content:
            return Answer(response.status_code, {})
        document = json.loads(content)
        if not isinstance(document, dict):
            raise ValueError  # noqa: TRY004 - handled with what is no JSON at all
        return Answer(response.status_code, document)

    def _read_token(self, *, anyway: bool = False) -> bool:
        """Read the token file if it was replaced; True if there is another token now."""
        path = self.address.token_file
        with self._lock:
            now = private.stamp(path)
            if now == self._stamp and now is not None and not anyway:
                return False
            content = private.read(path, "KMS token", "let the agent of the KMS write it there")
            token = content.decode("ascii", "replace").strip()
            if not _TOKEN.fullmatch(token):
                raise KeyringError(f"KMS token {path}: holds no token; write it there, alone")
            self._stamp, before, self._token = now, self._token, token
            if token == before:
                return False
            REDACTOR.know(token)  # for as long as the process lives
            self.tokens += 1
            return True


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError:
        raise KeyringError(f"keyring vault://…: ca={ca_file} holds no certificates") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _is_about_certificates(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
