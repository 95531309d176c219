"""What the production profile refuses, from the settings alone. Pure: it opens and reads nothing.

A reason names the setting, what is wrong with it and what to write instead; it never quotes a
value that may hold a password. What only a server can tell is in storage/logins.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Literal
from urllib.parse import parse_qs, unquote

from pydantic import SecretStr

from schemas import anchors
from schemas.settings import Settings

Process = Literal["scheduler", "worker", "sealer", "operator", "metrics"]

_NEEDED: dict[Process, tuple[str, ...]] = {
    "scheduler": ("database_url", "redis_url"),
    "worker": ("database_url", "redis_url", "keyring"),
    "sealer": ("database_url", "audit_signing_key", "audit_anchors"),
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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: What a login may be proved with; by anything else somebody else could answer, or hear it.
_PROOFS = frozenset({"scram-sha-256", "md5"})
#: What the query of a URL may hold in production. Anything else may undo what was looked at: libpq
#: takes a user, a role and files from it, redis-py ciphers and classes (docs/profiles.md).
DATABASE_NAMES = _words(
    "sslmode sslrootcert sslcert sslkey sslpassword sslcrl sslcrldir ssl_min_protocol_version "
    "require_auth channel_binding host port target_session_attrs load_balance_hosts pooler "
    "connect_timeout keepalives keepalives_idle keepalives_interval keepalives_count "
    "tcp_user_timeout"
)
REDIS_NAMES = _words(
    "ssl_ca_certs ssl_ca_path ssl_certfile ssl_keyfile ssl_password ssl_cert_reqs "
    "ssl_check_hostname ssl_min_version db username password protocol client_name master "
    "sentinel_username sentinel_password socket_timeout socket_connect_timeout socket_keepalive "
    "health_check_interval max_connections"
)
#: Other names that a reason may quote. One that nobody knows may be part of a password.
_QUOTED = _words(
    "user password dbname hostaddr passfile service servicefile options application_name "
    "fallback_application_name gssencmode gsslib gssdelegation krbsrvname requirepeer replication "
    "requiressl sslcompression sslcertmode sslsni sslnegotiation ssl_max_protocol_version "
    "client_encoding min_protocol_version max_protocol_version sslkeylogfile "
    "ssl_ciphers ssl_ca_data ssl_include_verify_flags ssl_exclude_verify_flags "
    "ssl_validate_ocsp ssl_validate_ocsp_stapled connection_class host port path timeout "
    "retry_on_timeout retry_on_error decode_responses encoding encoding_errors "
    "socket_read_size socket_type lib_name lib_version"
)
#: Said by `_names` no second time: a check of its own looks at every value.
_MANY = frozenset({"sslmode", "host", "ssl_cert_reqs"})
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
    if process == "sealer":
        found += _sealer(settings)
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
    if not all(set(value.split(",")) <= _PROOFS for value in query.get("require_auth", ())):
        found.append(
            "the server need not ask for the password as it should; leave require_auth out (or "
            "require_auth=md5 for a pooler)"
        )
    if not set(query.get("channel_binding", ())) <= {"require", "prefer"}:
        found.append("the login is not bound to TLS; leave channel_binding out")
    if not all(_is_host(host) for host in _hosts(parts["hosts"], query.get("host", []))):
        found.append("a Unix socket has no TLS; name the host, as its certificate does")
    found += _names(query, DATABASE_NAMES)
    if unquote(parts["user"] or "") in {"", "postgres"}:
        found.append(
            "no login of its own (none is named, or postgres); make one that was granted its "
            "process's role only, see docs/profiles.md"
        )
    return found


def _hosts(before: str, named: list[str]) -> list[str]:
    """Return each host of a URL: libpq tries all of a list, and a blank one is its socket."""
    lists = [unquote(before), *named] if before or not named else named
    return [host for text in lists for host in text.split(",")]


def _is_host(text: str) -> bool:
    return bool(re.sub(r":\d*$", "", text)) and not text.startswith(("/", "@"))


def _names(query: Mapping[str, Sequence[str]], allowed: frozenset[str]) -> list[str]:
    """Say which names of a query are none of those that are taken, or are there twice."""
    found = []
    if others := query.keys() - allowed:
        quoted = [f"`{name}`" for name in sorted(others & _QUOTED)]
        more = ["another name"] if others - _QUOTED else []
        found.append(
            f"its query holds {', '.join([*quoted, *more])}, which production does not take; take "
            "that out (docs/profiles.md lists what may be there)"
        )
    if twice := {name for name, values in query.items() if len(values) > 1} & (allowed - _MANY):
        found.append(f"{', '.join(sorted(twice))} is there twice; write it once")
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
    found += _names(query, REDIS_NAMES)
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


def _sealer(settings: Settings) -> list[str]:
    found = []
    key = settings.audit_signing_key
    if key is not None and key.absolute().is_relative_to(settings.data_dir.absolute()):
        found.append(
            "SYNCWARD_AUDIT_SIGNING_KEY: the key is in the data directory, which is copied and "
            "cleaned up with what is in it; keep it in a directory of its own"
        )
    if settings.audit_anchors is not None:
        uris = anchors.parse(settings.audit_anchors).anchors
        found += [f"SYNCWARD_AUDIT_ANCHORS: {why}" for why in anchors.refusals(uris)]
    return found


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
    if parts is None:
        return False
    hosts = _hosts(parts["hosts"], parse_qs(parts["query"] or "").get("host", []))
    return not all(loopback(re.sub(r":\d+$", "", host).strip("[]")) for host in hosts)


def all_reasons(settings: Settings, process: Process) -> Sequence[str]:
    """Return what is missing and what is refused, together."""
    return [*missing(settings, process), *refusals(settings, process)]
