"""The URL that names Sentinels: what becomes of each of its parts. No socket is opened."""

from typing import Any

import pytest
import redis

from schemas.errors import ConfigError, TransientError
from workers import sentinels
from workers.enqueue import open_client


def made(url: str):
    """Return (Sentinels, what they are asked with, what the server is asked with)."""
    client = open_client(url)
    pool: Any = client.connection_pool
    hosts = [s.connection_pool.connection_kwargs for s in pool.sentinel_manager.sentinels]
    return pool, hosts, pool.connection_kwargs


def test_every_sentinel_of_the_url_is_asked_for_the_master_by_its_name():
    pool, hosts, _ = made("redis+sentinel://one:26380,two,[::1]:26381/0?master=syncward")
    assert [(h["host"], h["port"]) for h in hosts] == [
        ("one", 26380),
        ("two", 26379),
        ("::1", 26381),
    ]
    assert (pool.service_name, pool.is_master) == ("syncward", True)


def test_the_login_is_the_servers_and_sentinels_have_their_own():
    url = "redis+sentinel://me:p%40ss@one/3?master=m"
    _, hosts, server = made(url)
    assert (server["username"], server["password"], server["db"]) == ("me", "p@ss", 3)
    assert (hosts[0].get("username"), hosts[0].get("password")) == (None, None)
    _, hosts, server = made(f"{url}&sentinel_username=s&sentinel_password=q%26")
    assert (hosts[0]["username"], hosts[0]["password"]) == ("s", "q&")
    assert (server["username"], server["password"]) == ("me", "p@ss")


def test_server_and_sentinels_have_the_timeouts_and_no_retries():
    _, hosts, server = made("redis+sentinel://one/0?master=m")
    for options in (server, *hosts):
        assert (options["socket_timeout"], options["socket_connect_timeout"]) == (5, 3)
        assert options["retry"].get_retries() == 0


def test_tls_goes_to_both_with_its_options():
    pool, hosts, server = made("rediss+sentinel://one/0?master=m&ssl_ca_certs=/ca.pem")
    assert pool.connection_class.__name__ == "SentinelManagedSSLConnection"
    assert server["ssl_ca_certs"] == hosts[0]["ssl_ca_certs"] == "/ca.pem"
    sentinel = pool.sentinel_manager.sentinels[0].connection_pool
    assert sentinel.connection_class.__name__ == "SSLConnection"
    plain, _, _ = made("redis+sentinel://one/0?master=m")
    assert plain.connection_class.__name__ == "SentinelManagedConnection"


def test_people_are_told_the_masters_name_and_no_password():
    client = open_client("redis+sentinel://me:geheim@one/0?master=syncward&sentinel_password=auch")
    assert sentinels.whom(client) == "Redis master syncward behind Sentinels"
    assert sentinels.whom(open_client("redis://one/0")) is None


class Answering:
    """What redis-py's link to one Sentinel would answer."""

    def __init__(self, master: str | None, *replicas: str, talks: bool = True) -> None:
        self.master, self.replicas, self.talks = master, replicas, talks
        self.restricted = False

    def sentinel_masters(self) -> dict[str, dict[str, object]]:
        if not self.talks:
            raise redis.ConnectionError
        return {"m": {"ip": self.master, "port": 6379}} if self.master else {}

    def sentinel_slaves(self, name: str) -> list[dict[str, object]]:
        assert name == "m"
        if self.restricted:
            raise redis.exceptions.NoPermissionError
        return [{"ip": host, "port": 6380} for host in self.replicas]


def asked(*sentinels_: Answering):
    client = open_client("redis+sentinel://one,two/0?master=m")
    pool: Any = client.connection_pool
    pool.sentinel_manager.sentinels = list(sentinels_)
    return sentinels.servers(client), pool


def test_the_servers_behind_sentinels_are_known_before_and_after_a_failover():
    """What a link may not lead to: the master of now, of before, and those that may be it next."""
    dead, one = Answering(None, talks=False), Answering("10.0.0.9", "10.0.0.8")
    servers, _ = asked(dead, one)
    before = {("10.0.0.9", 6379), ("10.0.0.8", 6380)}
    assert servers() == before
    one.master, one.replicas = "redis-3.example", ("10.0.0.9",)
    assert servers() == before | {("redis-3.example", 6379), ("10.0.0.9", 6380)}
    one.talks = False  # what is known stays known
    assert servers() == before | {("redis-3.example", 6379), ("10.0.0.9", 6380)}


def test_while_no_sentinel_has_ever_answered_nobody_knows_and_that_is_said():
    servers, pool = asked(Answering(None, talks=False), Answering(None))
    with pytest.raises(TransientError):
        servers()
    pool.proxy.master_address = ("10.0.0.7", 6379)  # whom the client itself is linked to
    assert servers() == {("10.0.0.7", 6379)}


def test_a_login_that_may_not_ask_for_replicas_still_learns_of_the_master():
    one = Answering("10.0.0.9", "10.0.0.8")
    one.restricted = True
    assert asked(one)[0]() == {("10.0.0.9", 6379)}


def test_without_sentinels_no_server_is_looked_for():
    assert sentinels.servers(open_client("redis://one/0"))() == frozenset()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+sentinel://me:geheim@one:26379/0", "which master?"),
        ("redis+sentinel://me:geheim@/0?master=m", "name the Sentinels"),
        ("redis+sentinel://me:geheim@one,,two/0?master=m", "name the Sentinels"),
        ("redis+sentinel://me:geheim@one:port/0?master=m", "not a URL"),
        ("redis+sentinel://me:geheim@one/0?master=m&socket_timeout=soon", "not a URL"),
        ("sentinel://me:geheim@one/0?master=m", "not a URL"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_in_one_line_without_quoting_it(url, says):
    with pytest.raises(ConfigError, match="SYNCWARD_REDIS_URL") as caught:
        open_client(url)
    text = str(caught.value)
    assert says in text
    assert "geheim" not in text
    assert "\n" not in text
