"""What SYNCWARD_AUDIT_ANCHORS says: one URI for each place outside the database. Opens nothing.

A reason names the anchor by its number, because a URI may have been mistyped with a password in it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

Kind = Literal["file", "syslog", "s3"]
Mode = Literal["COMPLIANCE", "GOVERNANCE"]
_MODES: dict[str, Mode] = {"COMPLIANCE": "COMPLIANCE", "GOVERNANCE": "GOVERNANCE"}

#: So many at most; metrics number them.
ANCHORS_MAX = 8
_RETAIN_DAYS_MAX = 36_500
_NAME_MAX = 255
_PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class FileAnchor:
    """An append-only file, on a mount that another host serves."""

    path: Path

    @property
    def kind(self) -> Kind:
        return "file"

    @property
    def place(self) -> tuple[object, ...]:
        """What two anchors must not share."""
        return "file", self.path.parent


@dataclass(frozen=True, slots=True)
class SyslogAnchor:
    """A syslog collector over TLS."""

    host: str
    port: int
    ca: Path
    certificate: Path | None
    key: Path | None
    name: str  # what its certificate must say

    @property
    def kind(self) -> Kind:
        return "syslog"

    @property
    def place(self) -> tuple[object, ...]:
        """What two anchors must not share."""
        return "syslog", self.host.lower()


@dataclass(frozen=True, slots=True)
class S3Anchor:
    """A bucket with Object Lock in an S3-compatible store."""

    bucket: str
    prefix: str
    endpoint: str
    region: str
    retain_days: int
    mode: Mode
    ca: Path | None

    @property
    def kind(self) -> Kind:
        return "s3"

    @property
    def encrypted(self) -> bool:
        return self.endpoint.startswith("https://")

    @property
    def place(self) -> tuple[object, ...]:
        """What two anchors must not share."""
        return "s3", self.endpoint.lower(), self.bucket


AnchorUri = FileAnchor | SyslogAnchor | S3Anchor


class _WrongError(Exception):
    """Why one URI cannot be used, in our own words."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, slots=True)
class Parsed:
    """Every anchor that can be used, and why the others cannot."""

    anchors: tuple[AnchorUri, ...]
    reasons: tuple[str, ...]


def parse(text: str) -> Parsed:
    """Read the setting: URIs with spaces between them."""
    anchors: list[AnchorUri] = []
    reasons: list[str] = []
    uris = text.split()
    if not uris:
        reasons.append("it names no anchor; write file:///path, syslog+tls://… or s3://…")
    if len(uris) > ANCHORS_MAX:
        reasons.append(f"it names {len(uris)} anchors; {ANCHORS_MAX} are the most")
    for number, uri in enumerate(uris, 1):
        try:
            anchors.append(_one(uri))
        except _WrongError as error:
            reasons.append(f"anchor {number}: {error.why}")
        except ValueError:
            reasons.append(f"anchor {number}: not a URI; docs/anchors.md shows each kind")
    return Parsed(tuple(anchors), tuple(reasons))


def endpoints(text: str) -> frozenset[tuple[str, int]]:
    """Return the hosts and ports of anchors: services of our own, which are never a resource."""
    found = set()
    for anchor in parse(text).anchors:
        if isinstance(anchor, SyslogAnchor):
            found.add((anchor.host.lower(), anchor.port))
        elif isinstance(anchor, S3Anchor):
            parts = urlsplit(anchor.endpoint)
            port = parts.port or (443 if anchor.encrypted else 80)
            found.add((parts.hostname or "", port))
    return frozenset(found)


def refusals(anchors: tuple[AnchorUri, ...]) -> list[str]:
    """Say what production refuses about anchors that can be used."""
    found = []
    if len(anchors) < 2:  # noqa: PLR2004 - one may be taken over or lost with the database
        found.append(
            "production needs at least two anchors, each at a place of its own; add another "
            "(docs/anchors.md)"
        )
    places: dict[tuple[object, ...], int] = {}
    for number, anchor in enumerate(anchors, 1):
        first = places.setdefault(anchor.place, number)
        if first != number:
            found.append(
                f"anchors {first} and {number} are at the same place; whoever has it has both. Put "
                "one elsewhere"
            )
        if isinstance(anchor, S3Anchor) and not anchor.encrypted:
            found.append(f"anchor {number}: the link is not encrypted; write endpoint=https://…")
    return found


def _one(uri: str) -> AnchorUri:
    parts = urlsplit(uri)
    make = _KINDS.get(parts.scheme)
    if make is None:
        raise _WrongError("an unknown kind; write file:///path, syslog+tls://… or s3://…")
    if "@" in parts.netloc:
        raise _WrongError(
            "a login does not belong into the URI; for s3 use SYNCWARD_AUDIT_S3_CREDENTIALS_FILE, "
            "for syslog+tls cert= and key="
        )
    if parts.fragment:
        raise _WrongError("it has a # in it; write %23 for one in a name")
    return make(parts, _query(parts))


def _query(parts: SplitResult) -> Mapping[str, str]:
    pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _WrongError("an option is there twice; write it once")
    known = _OPTIONS[parts.scheme]
    if not found.keys() <= known:
        allowed = ", ".join(sorted(known)) or "none"
        raise _WrongError(f"it has an option that this kind does not know; there are: {allowed}")
    return found


def _file(parts: SplitResult, _: Mapping[str, str]) -> FileAnchor:
    path = Path(unquote(parts.path))
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise _WrongError("write three slashes and an absolute path: file:///mnt/elsewhere/log")
    if parts.path.endswith("/") or ".." in path.parts or "\0" in str(path):
        raise _WrongError("name a file by its plain absolute path")
    return FileAnchor(path)


def _absolute(name: str, text: str) -> Path:
    if not text.startswith("/"):
        raise _WrongError(f"{name}= must be an absolute path")
    return Path(text)


def _syslog(parts: SplitResult, query: Mapping[str, str]) -> SyslogAnchor:
    if not parts.hostname or parts.path not in {"", "/"}:
        raise _WrongError("write syslog+tls://host:6514?ca=FILE")
    if "ca" not in query:
        raise _WrongError("ca= is missing: the file with the authority of the collector")
    if ("cert" in query) != ("key" in query):
        raise _WrongError("cert= and key= go together")
    name = query.get("name", parts.hostname)
    if not name or len(name) > _NAME_MAX:
        raise _WrongError("name= must be what the collector's certificate says")
    return SyslogAnchor(
        host=parts.hostname,
        port=parts.port or 6514,
        ca=_absolute("ca", query["ca"]),
        certificate=_absolute("cert", query["cert"]) if "cert" in query else None,
        key=_absolute("key", query["key"]) if "key" in query else None,
        name=name,
    )


def _s3(parts: SplitResult, query: Mapping[str, str]) -> S3Anchor:
    if not parts.netloc or ":" in parts.netloc:
        raise _WrongError("write s3://bucket/prefix?endpoint=https://…&region=…&retain_days=N")
    missing = [f"{name}=" for name in ("endpoint", "region", "retain_days") if name not in query]
    if missing:
        raise _WrongError(f"{', '.join(missing)} is missing")
    days = query["retain_days"]
    if not days.isascii() or not days.isdecimal() or not 1 <= int(days) <= _RETAIN_DAYS_MAX:
        raise _WrongError(f"retain_days= must be a number from 1 to {_RETAIN_DAYS_MAX}")
    mode = _MODES.get(query.get("mode", "COMPLIANCE"))
    if mode is None:
        raise _WrongError("mode= must be COMPLIANCE or GOVERNANCE")
    return S3Anchor(
        bucket=parts.netloc,
        prefix=unquote(parts.path).strip("/"),
        endpoint=_endpoint(query["endpoint"]),
        region=query["region"],
        retain_days=int(days),
        mode=mode,
        ca=_absolute("ca", query["ca"]) if "ca" in query else None,
    )


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"https", "http"} or not parts.hostname or "@" in parts.netloc:
        raise _WrongError("endpoint= must be https://host[:port], without a login")
    if parts.query or parts.fragment or parts.path not in {"", "/"}:
        raise _WrongError("endpoint= must be https://host[:port] and nothing behind it")
    if parts.port is not None and not 0 < parts.port <= _PORT_MAX:
        raise _WrongError("endpoint= has no port that exists")
    if parts.scheme == "http" and not _loopback(parts.hostname):
        raise _WrongError("endpoint= is not encrypted; only a store on this host may do without")
    return f"{parts.scheme}://{parts.netloc}"


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_KINDS: dict[str, Callable[[SplitResult, Mapping[str, str]], AnchorUri]] = {
    "file": _file,
    "syslog+tls": _syslog,
    "s3": _s3,
}
_OPTIONS: dict[str, frozenset[str]] = {
    "file": frozenset(),
    "syslog+tls": frozenset({"ca", "cert", "key", "name"}),
    "s3": frozenset({"endpoint", "region", "retain_days", "mode", "ca"}),
}
