"""The hosts that a resource lists for another's connector: `api.example.com`, `*.example.com`.

Each may have a port, `[2001:db8::1]:8443`; without one it is that of https.
"""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from connectors.net import validate_host
from schemas.errors import ConfigError

PORT = 443
_PORT_MAX = 65_535
_ALL_BELOW = "*."


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry: a host, or all names below one."""

    host: str
    port: int
    below: bool

    @property
    def shown(self) -> str:
        """The entry as it is stored and shown."""
        return f"{_ALL_BELOW if self.below else ''}{shown(self.host, self.port)}"

    def admits(self, host: str, port: int) -> bool:
        """Say whether a connection to this host and port is meant; an address is below no name."""
        if port != self.port:
            return False
        if self.below:
            return host.endswith(f".{self.host}") and not _is_address(host)
        return host == self.host


def shown(host: str, port: int) -> str:
    """Return a host, with its port where that is not the usual one."""
    text = f"[{host}]" if ":" in host else host
    return text if port == PORT else f"{text}:{port}"


def listed(text: str) -> Listed:
    """Read an entry; ValueError says how to write one."""
    below = text.startswith(_ALL_BELOW)
    host, port = parted(text.removeprefix(_ALL_BELOW))
    try:
        host = validate_host(host)
    except ConfigError:
        raise _wrong() from None
    if below and (_is_address(host) or "." not in host):
        raise _wrong()
    return Listed(host, port, below)


def parted(text: str) -> tuple[str, int]:
    """Part a host from its port; ValueError if that is none."""
    host, port = text, ""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise _wrong()
        port = port.removeprefix(":") if port else str(PORT)
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        port = str(PORT)
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) <= _PORT_MAX):
        raise _wrong()
    return host, int(port)


def entry_for(entries: Iterable[Listed], host: str, port: int) -> Listed | None:
    """Return the first entry that admits a connection; None if none does."""
    return next((one for one in entries if one.admits(host, port)), None)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _wrong() -> ValueError:
    return ValueError(
        "write a host each, api.example.com, or all below one, *.example.com; with another port "
        "than 443: api.example.com:8443"
    )
