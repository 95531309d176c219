"""The URL that names Sentinels: what becomes of each of its parts. No socket is opened."""

from typing import Any

import pytest

from schemas.errors import ConfigError
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
