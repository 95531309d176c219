"""What the production profile refuses, from the settings alone. Pure: it opens and reads nothing.

A reason names the setting, what is wrong with it and what to write instead; it never quotes a
value that may hold a password. What only a server can tell is in storage/logins.py.
"""

import re
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from typing import Literal
from urllib.parse import parse_qs, unquote

from pydantic import SecretStr

from schemas.settings import Settings

Process = Literal["scheduler", "worker", "operator", "metrics"]

_NEEDED: dict[Process, tuple[str, ...]] = {
    "scheduler": ("database_url", "redis_url"),
    "worker": ("database_url", "redis_url", "keyring"),
    "operator": ("database_url",),
    "metrics": ("database_url",),
}

#: scheme://[user[:password]@]hosts[/path][?query]; a password may hold anything but "@".
_URL = re.compile(
    r"(?P<scheme>[\w+]+)://(?:(?P<user>[^:/@]*)(?::(?P<password>[^@]*))?@)?"
    r"(?P<hosts>[^/?]*)(?:/[^?]*)?(?:\?(?P<query>.*))?",
    re.DOTALL,
)
#: Of libpq; without a value there is no lowest version.
_TLS_OLD = frozenset({"", "tlsv1", "tlsv1.1"})
_TRUE = frozenset({"true", "1", "yes"})
#: ssl.TLSVersion.TLSv1_2, as redis-py takes it.
_TLS_1_2 = 771


def missing(settings: Settings, process: Process) -> list[str]:
    """Name every setting that the process cannot do without, whatever the profile."""
    return [
        f"SYNCWARD_{name.upper()} is not set; see docs/settings.md"
        for name in _NEEDED[process]
        if getattr(settings, name) is None
    ]


def refusals(settings: Settings, process: Process) -> list[str]:
    """Return every reason why a process must not start with these settings; [] in development."""
    if settings.profile != "production":
        return []
    found: list[str] = []
    if settings.embedded:
        found.append(
            "SYNCWARD_DATA_DIR: its dev.env names embedded servers, which production does not use; "
            "set SYNCWARD_DATABASE_URL and SYNCWARD_REDIS_URL, or use an empty data directory"
        )
    for name, check in _URLS.items():
        url: SecretStr | None = getattr(settings, name, None)
        if url is not None and (name != "redis_url" or process in {"scheduler", "worker"}):
            found += [f"SYNCWARD_{name.upper()}: {why}" for why in check(url.get_secret_value())]
    return found + _keyring(settings.keyring) + _metrics(settings, process)


def _database(url: str) -> list[str]:
    parts = _URL.fullmatch(url)
    if parts is None:
        return ["not a URL; write postgresql://login:password@host:5432/database"]
    query = parse_qs(parts["query"] or "", keep_blank_values=True)
    found = []
    if query.get("sslmode") != ["verify-full"]:
        found.append(
            "the link to the control database is not protected; add sslmode=verify-full (and "
            "sslrootcert=FILE, or sslrootcert=system)"
        )
    old = {value.lower() for value in query.get("ssl_min_protocol_version", ())} & _TLS_OLD
    if old:
        found.append("TLS before 1.2 is allowed; leave ssl_min_protocol_version out")
    hosts = [unquote(parts["hosts"]), *query.get("host", ())]
    if any(host.startswith(("/", "@")) for host in hosts) or not any(hosts):
        found.append("a Unix socket has no TLS; name the host, as its certificate does")
    if unquote(parts["user"] or "") in {"", "postgres"}:
        found.append(
            "no login of its own (none is named, or postgres); make one that was granted its "
            "process's role only, see docs/profiles.md"
        )
    return found


def _redis(url: str) -> list[str]:
    parts = _URL.fullmatch(url)
    if parts is None:
        return ["not a URL; write rediss://user:password@host:6379/0"]
    query = parse_qs(parts["query"] or "", keep_blank_values=True)
    found = []
    if parts["scheme"].lower() not in {"rediss", "rediss+sentinel"}:
        found.append(
            "the link to Redis is not encrypted; write rediss:// (or rediss+sentinel://) and "
            "ssl_ca_certs=FILE"
        )
    if query.get("ssl_cert_reqs", ["required"]) != ["required"]:
        found.append("Redis' certificate is not verified; leave ssl_cert_reqs out")
    if not {value.lower() for value in query.get("ssl_check_hostname", ["true"])} <= _TRUE:
        found.append("the name in Redis' certificate is not checked; leave ssl_check_hostname out")
    if not all(_tls_1_2(value) for value in query.get("ssl_min_version", ())):
        found.append("TLS before 1.2 is allowed; leave ssl_min_version out")
    user = unquote(parts["user"] or "") or "".join(query.get("username", ()))
    if user in {"", "default"}:
        found.append(
            "no user of its own (none is named, or default); make one with the ACL line of "
            "docs/network.md"
        )
    return found


def _tls_1_2(value: str) -> bool:
    return value.isdecimal() and int(value) >= _TLS_1_2


_URLS: dict[str, Callable[[str], list[str]]] = {
    "database_url": _database,
    "keystore_url": _database,
    "redis_url": _redis,
}


def _keyring(uri: str | None) -> list[str]:
    scheme = (uri or "").partition("://")[0].lower()
    if scheme not in {"vault+http", "http"}:
        return []
    return ["SYNCWARD_KEYRING: keys would travel in the clear; write vault:// (over TLS) instead"]


def _metrics(settings: Settings, process: Process) -> list[str]:
    serves = bool(settings.metrics_port) if process != "operator" else False
    if process == "metrics":
        serves = True  # it has a port of its own where none is set
    if not serves or settings.metrics_token_file is not None or loopback(settings.metrics_host):
        return []
    why = "metrics would be served to other hosts without a token"
    return [f"SYNCWARD_METRICS_HOST: {why}; set SYNCWARD_METRICS_TOKEN_FILE, or 127.0.0.1"]


def loopback(host: str) -> bool:
    """Say whether only this host reaches an address; a name other than localhost may lead out."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def link_faults(name: str, url: str) -> list[str]:
    """Say what the production profile would refuse about one URL, whatever the profile."""
    return _URLS[name](url)


def leads_out(url: str) -> bool:
    """Say whether a URL leads to another host than this one."""
    parts = _URL.fullmatch(url)
    hosts = [] if parts is None else parts["hosts"].split(",")
    return not all(loopback(re.sub(r":\d+$", "", host).strip("[]")) for host in hosts)


def all_reasons(settings: Settings, process: Process) -> Sequence[str]:
    """Return what is missing and what is refused, together."""
    return [*missing(settings, process), *refusals(settings, process)]
