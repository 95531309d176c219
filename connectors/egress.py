"""The egress guard: a host is looked up once, every answer must pass, and the link is pinned to it.

For every link to a system that an operator's customer names: Postgres and MariaDB here, HTTP
later. A denial says the same whichever rule it was; the rule is for the operator's log
(`egress_refused`).
"""

import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from connectors.net import validate_host
from schemas.egress import Address, LinkPolicy, Network
from schemas.errors import ConfigError, TransientError

#: Return the addresses of a host. An argument of `resolve`, so that tests may answer as they like.
Lookup = Callable[[str, int], Sequence[str]]

_LOOKUP_S = 5.0
#: Addresses that are tried one after the other; a name with more is served by these.
_TRIED = 4


class EgressRefused(ConfigError):  # noqa: N818 - an event more than an error
    """The policy forbids this address. `rule` and `address` are for the operator only."""

    code = "egress_refused"

    def __init__(self, host: str, port: int, *, address: str, rule: str) -> None:
        super().__init__(
            f"{host}:{port}: links to this address are not allowed here; ask whoever runs this "
            "installation (docs/network.md)"
        )
        self.address = address
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Pinned:
    """A host with the checked addresses that a link may use, and no others."""

    host: str
    port: int
    addresses: tuple[str, ...]


def look_up(host: str, port: int) -> Sequence[str]:
    """Ask the system's resolver, in a thread of its own: it cannot be interrupted."""
    future: Future[list[str]] = Future()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            future.set_result([str(entry[4][0]) for entry in found])
        except (OSError, UnicodeError) as error:
            future.set_exception(error)

    Thread(target=ask, name="look-up", daemon=True).start()
    try:
        return future.result(timeout=_LOOKUP_S)
    except UnicodeError:
        raise _no_host(host, port) from None
    except socket.gaierror as error:
        if error.errno in {socket.EAI_NONAME, socket.EAI_NODATA}:
            raise _no_host(host, port) from None
        raise _dns(host, port) from None
    except (OSError, TimeoutError):
        raise _dns(host, port) from None


def _no_host(host: str, port: int) -> ConfigError:
    return ConfigError(
        f"{host}:{port}: no host of this name; correct the resource's `host`", code="no_host"
    )


def _dns(host: str, port: int) -> TransientError:
    return TransientError(
        f"{host}:{port}: the name {host} cannot be looked up just now; tried again", code="dns"
    )


def resolve(host: str, port: int, policy: LinkPolicy, *, lookup: Lookup = look_up) -> Pinned:
    """Return the addresses to connect to; EgressRefused if one of them is forbidden.

    ConfigError for what is no host, or none that exists; TransientError if nobody can say now.
    """
    name = validate_host(host)
    addresses = tuple(dict.fromkeys(lookup(name, port)))
    if not addresses:
        raise _no_host(name, port)
    own = _own(name, port, policy, lookup)
    for address in addresses:
        rule = _broken_rule(_plain(address), port, policy, own)
        if rule is not None:
            raise EgressRefused(name, port, address=address, rule=rule)
    return Pinned(name, port, addresses[:_TRIED])


def _own(name: str, port: int, policy: LinkPolicy, lookup: Lookup) -> frozenset[Address]:
    """Return the addresses that our own services have at this port now: a failover moves them."""
    found: set[Address] = set()
    try:
        moving = policy.moving()
    except TransientError:  # as below
        raise _dns(name, port) from None
    for host, own_port in (*policy.own, *moving):
        if own_port != port:
            continue
        try:
            found.update(_plain(address) for address in lookup(host, own_port))
        except ConfigError:  # a name that leads nowhere protects nothing
            continue
        except TransientError:  # not known now, so nothing may pass; without naming it
            raise _dns(name, port) from None
    return frozenset(found)


def _plain(text: str) -> Address:
    """Return the address itself: without a scope, and what an IPv6 form of IPv4 stands for."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def _networks(text: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part) for part in text.split())


#: No opening lets these through. This network, link-local, multicast, broadcast; where clouds keep
#: metadata and credentials (AWS, GCP, Azure, Alibaba, Oracle); and every IPv6 form that hides an
#: IPv4 address (compatible, NAT64, 6to4, Teredo), as somebody else would take it out again.
_NEVER = _networks(
    "0.0.0.0/8 169.254.0.0/16 224.0.0.0/4 240.0.0.0/4 168.63.129.16/32 100.100.100.200/32 "
    "192.0.0.192/32 ::/96 ::ffff:0:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 2001::/32 2002::/16 "
    "fe80::/10 fec0::/10 ff00::/8 fd00:ec2::/32 fd20:ce::/32"
)
#: Private and special ranges: an opening of the operator lets them through.
_CLOSED4 = _networks(
    "10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
    "192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24"
)
_GLOBAL6 = _networks("2000::/3")
_CLOSED6 = _networks("2001::/23 2001:db8::/32 3fff::/20 2620:4f:8000::/48")


def _in(address: Address, networks: Iterable[Network]) -> bool:
    return any(n.version == address.version and address in n for n in networks)


def _broken_rule(
    address: Address, port: int, policy: LinkPolicy, own: frozenset[Address]
) -> str | None:
    """Return the name of the rule that forbids a link; None if none does."""
    openings = [opening for opening in policy.allow if opening.admits(address, port)]
    if _is_own(address, own):
        opened = policy.own_openable and any(opening.port for opening in openings)
        return None if opened else "own_service"
    if address.is_loopback:
        return None if policy.loopback else "loopback"
    if _in(address, _NEVER):
        return "never"
    if openings:
        return None
    if address.version == 4:  # noqa: PLR2004 - IPv4
        return "private" if _in(address, _CLOSED4) else None
    return None if _in(address, _GLOBAL6) and not _in(address, _CLOSED6) else "private"


def _is_own(address: Address, own: frozenset[Address]) -> bool:
    """Match our services; one on this machine has every address of this machine."""
    return address in own or (any(_is_here(a) for a in own) and _is_here(address))


def _is_here(address: Address) -> bool:
    """Say whether an address is this machine's: nothing is sent."""
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IPv4
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
