"""Redis or Valkey behind Sentinels: one URL names them all, they name the master.

`redis+sentinel://user:password@one:26379,two:26379/0?master=syncward`, or `rediss+sentinel` with
TLS to both. The user is the server's; Sentinels that want a login of their own get it as
`sentinel_username` and `sentinel_password`. Other options are redis-py's.
"""

from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlencode, urlsplit

import redis
from redis.connection import parse_url
from redis.sentinel import Sentinel, SentinelConnectionPool

from schemas.egress import Endpoint
from schemas.errors import ConfigError, TransientError
from schemas.urls import split

_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
_PORT = 26379
_OWN = ("master", "sentinel_username", "sentinel_password")


def named_in(url: str) -> bool:
    """Say whether a URL leads to Sentinels."""
    return url.partition("://")[0].lower() in _SCHEMES


def open_client(url: str, **options: Any) -> redis.Redis:  # noqa: ANN401 - redis-py's options
    """Return a client that asks the Sentinels for the master whenever it connects.

    ConfigError without a master's name or hosts; ValueError if it is no URL at all.
    """
    parts = split(url)
    query = parse_qs(parts.query)
    own = {name: query.pop(name)[0] for name in _OWN if name in query}
    if "master" not in own:
        raise ConfigError(
            "SYNCWARD_REDIS_URL: which master? write redis+sentinel://…?master=NAME, "
            "the name in `sentinel monitor NAME …`"
        )
    server = {**options, **_server(parts, query)}
    theirs = {name: value for name, value in server.items() if name not in _SERVERS_OWN}
    for name in ("username", "password"):
        if f"sentinel_{name}" in own:
            theirs[name] = own[f"sentinel_{name}"]
    sentinels = Sentinel(_hosts(parts), sentinel_kwargs=theirs, **server)  # type: ignore[no-untyped-call]  # redis-py has no types here
    client: redis.Redis = sentinels.master_for(own["master"])  # type: ignore[no-untyped-call]  # as above
    return client


def whom(client: redis.Redis) -> str | None:
    """Name the master that a client asks Sentinels for, to people; None if it asks none."""
    pool = client.connection_pool
    if not isinstance(pool, SentinelConnectionPool):
        return None
    return f"Redis master {pool.service_name} behind Sentinels"


def servers(client: redis.Redis) -> Callable[[], frozenset[Endpoint]]:
    """Return what tells the servers that Sentinels name now; nothing without Sentinels.

    The master and every replica, as the next failover makes one of them the master, and all that
    were ever named: one that comes back is ours, too. TransientError while none is known.
    """
    pool = client.connection_pool
    known: set[Endpoint] = set()
    lock = Lock()

    def named() -> frozenset[Endpoint]:
        if not isinstance(pool, SentinelConnectionPool):
            return frozenset()
        found = _ask(pool)
        if pool.master_address:  # whom we are linked to, whatever the Sentinels say
            found.add(_endpoint(*pool.master_address))
        with lock:
            known.update(found)
            if not known:
                raise TransientError("no Sentinel says just now where our Redis is")
            return frozenset(known)

    return named


def _ask(pool: SentinelConnectionPool) -> set[Endpoint]:
    """Ask the first Sentinel that answers; redis-py keeps the one that named the master first."""
    for sentinel in list(pool.sentinel_manager.sentinels):
        try:
            master = sentinel.sentinel_masters().get(pool.service_name)
        except redis.RedisError:
            continue
        if not master:
            continue
        found = {_endpoint(master["ip"], master["port"])}
        with suppress(redis.RedisError):  # a login may be allowed the master only
            replicas = sentinel.sentinel_slaves(pool.service_name)
            found |= {_endpoint(one["ip"], one["port"]) for one in replicas}
        return found
    return set()


def _endpoint(host: str | bytes, port: int | str) -> Endpoint:
    return (host.decode() if isinstance(host, bytes) else host), int(port)


#: What is said to the server only: Sentinels have a login of their own, or none, and no databases.
_SERVERS_OWN = frozenset({"username", "password", "db"})


def _hosts(parts: SplitResult) -> list[tuple[str, int]]:
    found = []
    for host in parts.netloc.rpartition("@")[2].split(","):
        one = urlsplit(f"//{host}")
        if not one.hostname:
            raise ConfigError(
                "SYNCWARD_REDIS_URL: name the Sentinels: redis+sentinel://one:26379,two:26379/0?…"
            )
        found.append((one.hostname, one.port or _PORT))
    return found


def _server(parts: SplitResult, query: dict[str, list[str]]) -> dict[str, Any]:
    """Return what redis-py makes of the same URL with one host, without that host."""
    login, at, _ = parts.netloc.rpartition("@")
    scheme = _SCHEMES[parts.scheme]
    plain = f"{scheme}://{login}{at}host{parts.path}?{urlencode(query, doseq=True)}"
    known: dict[str, Any] = parse_url(plain)  # type: ignore[no-untyped-call]  # as above
    known.pop("host")
    known.pop("connection_class", None)
    return {**known, **({"ssl": True} if scheme == "rediss" else {})}
