"""Where links to other systems may lead and how strong they must be: policy as plain data.

`Settings.link_policy()` makes one, connectors/egress.py enforces it; docs/network.md explains it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from itertools import product
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

from schemas.children import ChildPolicy
from schemas.urls import host_lists, split

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
#: A host by name or address, and a port.
Endpoint = tuple[str, int]

_PORT_MAX = 65_535
_PORTS = {
    "postgresql": 5432, "postgres": 5432, "redis": 6379, "rediss": 6379, "redis+sentinel": 26379,
    "rediss+sentinel": 26379, "vault": 8200, "vault+http": 8200, "http": 80, "https": 443,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opening:
    """A range that the operator of the installation allows, at one port or at all."""

    network: Network
    port: int | None = None

    def admits(self, address: Address, port: int) -> bool:
        """Say whether a link to this address and port is meant."""
        fits = self.network.version == address.version and address in self.network
        return fits and self.port in {None, port}


def _nothing() -> Iterable[Endpoint]:
    return ()


@dataclass(frozen=True, slots=True)
class LinkPolicy:
    """What is left out is strict.

    `own` are Syncward's own services by name and port. They are never a resource; only where
    `own_openable` (development: one server for everything) may an opening with a port say so.
    `moving` is asked at every link for those that no setting names, because a failover moves them;
    TransientError if it cannot know.
    """

    loopback: bool = False
    allow: tuple[Opening, ...] = ()
    own: frozenset[Endpoint] = frozenset()
    moving: Callable[[], Iterable[Endpoint]] = _nothing
    own_openable: bool = False
    tls_required: bool = True
    superuser_refused: bool = True
    #: the directory below which connectors may open files; None: nowhere
    files_root: Path | None = None
    #: what of other people's connectors may be started
    children: ChildPolicy = field(default_factory=ChildPolicy)

    def for_account(self, account_id: UUID) -> Self:
        """Return what holds for the resources of one account, whose files lie apart."""
        if self.files_root is None:
            return self
        return replace(self, files_root=self.files_root / str(account_id))


def parse_openings(text: str) -> tuple[Opening, ...]:
    """Read `10.0.0.0/8, 10.1.2.3/32:5432, [fd00:1::/32]:5432`; ValueError names the wrong one."""
    return tuple(_opening(part.strip()) for part in text.split(",") if part.strip())


def _opening(text: str) -> Opening:
    network, port = text, ""
    if text.startswith("["):
        network, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        network, _, port = text.partition(":")
    wrong = f"{text}: write a range and maybe a port, 10.0.0.0/8 or 10.1.2.3/32:5432"
    try:
        opening = Opening(ip_network(network), int(port) if port else None)
    except ValueError:
        raise ValueError(wrong) from None
    if opening.port is not None and not 0 < opening.port <= _PORT_MAX:
        raise ValueError(wrong)
    return opening


def endpoints(urls: Iterable[str]) -> frozenset[Endpoint]:
    """Return every host and port that URLs of our own services name, also those of a list."""
    found: set[Endpoint] = set()
    for url in urls:
        default = _PORTS.get(split(url).scheme.partition("+psycopg")[0])
        if default is None:
            continue
        query = parse_qs(url.partition("?")[2], keep_blank_values=True)
        for hosts in host_lists(url) or {""}:
            found |= _named(unquote(hosts).split(","), query, default)
    return frozenset(found)


def _named(before: list[str], query: dict[str, list[str]], default: int) -> set[Endpoint]:
    """Return what the hosts before the path and those of the query come to."""
    found: set[Endpoint] = set()
    own = [set(_endpoint(host, default)) for host in before]
    found = found.union(*own)
    ports = [_port(text, default) for text in ",".join(query.get("port", [])).split(",")]
    if "port" not in query:  # those before the path hold for the hosts of the query, too
        ports = [port for one in own for _, port in one] or [
            _port(text.rpartition(":")[2], default) for text in before
        ]
    for hosts in (
        before,
        *(",".join(query.get(n, [])).split(",") for n in ("host", "hostaddr")),
    ):
        for host, port in _pairs(hosts, ports):
            found |= _endpoint(host, port)
    return found


def _pairs(hosts: list[str], ports: list[int]) -> Iterable[tuple[str, int]]:
    """Give each host its port, as libpq does; a list that does not fit is taken for the worst."""
    return zip(hosts, ports, strict=True) if len(hosts) == len(ports) else product(hosts, ports)


def _port(text: str, default: int) -> int:
    return int(text) if text.isdecimal() else default


def _endpoint(text: str, default: int) -> set[Endpoint]:
    """Read `host`, `host:port` or `[address]:port`; nothing for a path or a blank."""
    if not text or text.startswith("/"):
        return set()
    bare = not text.startswith("[") and text.count(":") > 1  # an IPv6 address of a query
    try:
        one = urlsplit(f"//[{text}]" if bare else f"//{text}")
        host, port = one.hostname, one.port or default
    except ValueError:  # whoever opens the link says what is wrong with it
        return set()
    return {(host, port)} if host else set()
