"""Take URLs apart without judging them: `urlsplit` refuses lists of hosts that hold brackets."""

import re
from urllib.parse import SplitResult

#: RFC 3986, appendix B.
_PARTS = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)


def split(url: str) -> SplitResult:
    """Return the parts of any text, the scheme in lower case; not for `hostname` and `port`."""
    found = _PARTS.fullmatch(url)
    assert found is not None  # noqa: S101 - every part may be empty
    scheme, netloc, path, query, fragment = (part or "" for part in found.groups())
    return SplitResult(scheme.lower(), netloc, path, query, fragment)


def host_lists(url: str) -> frozenset[str]:
    """Return what may be a URL's hosts, still joined by commas: all readings, if there are two.

    A password that holds a slash ends the hosts for one reader and not for another.
    """
    rest = url.partition("://")[2]
    readings = {split(f"//{rest}").netloc, split(f"//{rest.partition('@')[2]}").netloc}
    return frozenset(netloc.rpartition("@")[2] for netloc in readings if netloc)
