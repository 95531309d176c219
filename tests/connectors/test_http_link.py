"""The guard for HTTP: where calls may lead, what may come back, and what a token never leaves."""

import gzip
import resource
import socket
import threading
import time
import zlib
from contextlib import closing, suppress

import pytest

from connectors.egress import EgressRefused
from connectors.http_link import Bounds, Link, check_origin, origin_of, same_origin
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError, TransientError
from tests.rest_api import Api, Reply
from tests.tls_proxy import TlsProxy, certificate
from tests.world import LOOSE

TOKEN = {"Authorization": "Bearer tok-canary-1234"}


@pytest.fixture
def link():
    with closing(Link(LOOSE, bounds=Bounds(body_max=1 << 20, total_s=5, read_s=2))) as made:
        yield made


def refused(link, url, **more) -> SyncwardError:
    with pytest.raises(SyncwardError) as caught:
        link.call("GET", url, headers=TOKEN, **more)
    assert "canary" not in repr(caught.value)
    return caught.value


# ── where a call leads ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "//host/x", "ftp://host/x", "file:///etc/passwd", "https://u:p@host/x",
        "https://u@host/", "https://ho st/", "https://host\\@evil/", "https://host/\nx",
        "https://host:99999/", "https://[::1/", "https:///x", "https://a,b/",
    ],
)  # fmt: skip
def test_what_is_no_plain_url_is_refused_without_being_shown(url):
    with pytest.raises(ConfigError) as caught:
        origin_of(url)
    assert len(url) < 4 or url not in str(caught.value)


def test_plain_http_is_refused_where_links_must_be_secured():
    with pytest.raises(ConfigError) as caught:
        check_origin("http://api.example.com/", LinkPolicy())
    assert caught.value.code == "tls_too_weak"
    assert check_origin("https://API.example.com", LinkPolicy()).shown == "api.example.com"


@pytest.mark.parametrize(
    ("link", "whole"),
    [
        ("/y", "https://h.example/y"), ("?page=2", "https://h.example/a/x?page=2"),
        ("https://H.example:443/y", "https://H.example:443/y"), ("//h.example/y", None),
        ("http://h.example/y", None), ("https://h.example:8443/y", None),
        ("//evil.example/y", None), ("https://h.example@evil.example/", None),
        ("https://h.example.evil.example/", None), ("\\\\evil.example\\y", None),
    ],
)  # fmt: skip
def test_a_link_is_followed_to_the_same_origin_only(link, whole):
    found = same_origin("https://h.example/a/x", link, origin_of("https://h.example/"))
    assert found == ("https://h.example/y" if link == "//h.example/y" else whole)


def test_a_forbidden_address_is_refused_before_anything_is_sent(api):
    with closing(Link(LinkPolicy(tls_required=False))) as link, pytest.raises(EgressRefused):
        link.call("GET", f"{api.url}/x")
    assert api.asked == []


@pytest.mark.parametrize("address", ["169.254.169.254", "10.0.0.1", "::ffff:10.0.0.1"])
def test_every_address_of_a_name_must_pass(address):
    policy = LinkPolicy(loopback=True, tls_required=False)
    with (
        closing(Link(policy, lookup=lambda _h, _p: ["127.0.0.1", address])) as link,
        pytest.raises(EgressRefused),
    ):
        link.call("GET", "http://api.example/")


def test_a_name_is_looked_up_once_and_the_link_stays_pinned(api):
    asked = []

    def lookup(host, port):
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    api.routes["/x"] = lambda _: Reply(200, [], {"Connection": "close"})
    with closing(Link(LOOSE, lookup=lookup)) as link:
        for _ in range(3):
            assert link.call("GET", f"http://api.example:{api.port}/x").status == 200
    assert asked == [("api.example", api.port)]
    assert {one.headers["host"] for one in api.asked} == {f"api.example:{api.port}"}


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    """A server with TLS in the name of api.example, and its authority's file."""
    directory = tmp_path_factory.mktemp("tls")
    file, key = certificate(directory, "api.example")
    with closing(Api()) as api:
        api.routes["/x"] = lambda _: Reply(200, [])
        with TlsProxy(("127.0.0.1", api.port), (file, key), begin="at_once") as proxy:
            yield proxy, file


def test_tls_checks_the_name_and_not_the_address(secured):
    proxy, file = secured
    policy = LinkPolicy(loopback=True)

    def call(host, trusted):
        with closing(Link(policy, trusted=trusted, lookup=lambda _h, _p: ["127.0.0.1"])) as link:
            return link.call("GET", f"https://{host}:{proxy.port}/x", headers=TOKEN)

    assert call("api.example", str(file)).tls in {"TLSv1.2", "TLSv1.3"}
    for host, trusted in (("other.example", str(file)), ("api.example", "system")):
        with pytest.raises(ConfigError) as caught:
            call(host, trusted)
        assert caught.value.code == "tls_refused"
    with pytest.raises(ConfigError) as caught:
        call("api.example", "/etc/passwd")
    assert caught.value.code == "tls_refused"


def test_a_server_without_tls_where_there_should_be_is_said_to_be(api):
    with closing(Link(LOOSE)) as link:
        assert refused(link, f"https://127.0.0.1:{api.port}/x").code == "tls_refused"


# ── redirects ────────────────────────────────────────────────────────────────────────────────


def test_a_redirect_is_followed_on_the_same_host_with_the_login(api, link):
    api.routes["/a"] = lambda _: Reply(302, b"", {"Location": "/b?x=1"})
    api.routes["/b"] = lambda asked: Reply(200, asked.headers["authorization"])
    assert b"canary" in link.call("GET", f"{api.url}/a", headers=TOKEN).body


def test_a_redirect_to_another_host_gets_nothing(api, link):
    with closing(Api()) as other:
        for where in (f"{other.url}/b", f"//127.0.0.1:{other.port}/b", "https://evil.example/"):
            api.routes["/a"] = lambda _, where=where: Reply(307, b"", {"Location": where})
            error = refused(link, f"{api.url}/a")
            assert (error.code, "another host" in str(error)) == ("api_answer", True)
        assert other.asked == []


def test_redirects_end(api, link):
    api.routes["/a"] = lambda _: Reply(302, b"", {"Location": "/a"})
    assert "more than 5 times" in str(refused(link, f"{api.url}/a"))
    assert len(api.asked) == 6


def test_a_body_is_not_sent_again_where_the_redirect_means_another_request(api, link):
    api.routes["/a"] = lambda _: Reply(302, b"", {"Location": "/b"})
    with pytest.raises(ConfigError, match="has a body"):
        link.call("POST", f"{api.url}/a", content=b"{}")


# ── what comes back ──────────────────────────────────────────────────────────────────────────


def test_a_body_over_the_bound_is_refused(api, link):
    api.routes["/a"] = lambda _: Reply(200, b"x" * (1 << 20))
    assert len(link.call("GET", f"{api.url}/a").body) == 1 << 20
    api.routes["/a"] = lambda _: Reply(200, b"x" * ((1 << 20) + 1))
    assert "more than 1 MiB" in str(refused(link, f"{api.url}/a"))


def test_a_bomb_is_refused_while_it_is_decompressed(api, link):
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(zeros.compress(bytes(1 << 20)) for _ in range(64)) + zeros.flush()
    api.routes["/a"] = lambda _: Reply(200, bomb, {"Content-Encoding": "gzip"})
    before = max_rss()
    assert "more than 1 MiB" in str(refused(link, f"{api.url}/a"))
    assert max_rss() - before < 40 * 2**20


def max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("body", "encoding", "type_"),
    [
        (b"no gzip", "gzip", ConfigError), (b"x", "br", ConfigError),
        (b"x", "gzip, gzip", ConfigError),
        (gzip.compress(b"x" * 999, mtime=0)[:-9], "gzip", TransientError),
        (gzip.compress(b"x" * 999, mtime=0)[:10], "gzip", TransientError),
    ],
)  # fmt: skip
def test_an_encoding_that_is_none_is_refused(api, link, body, encoding, type_):
    api.routes["/a"] = lambda _: Reply(200, body, {"Content-Encoding": encoding})
    assert type(refused(link, f"{api.url}/a")) is type_


def test_a_body_that_ends_early_is_no_body(api, link):
    api.routes["/a"] = lambda _: Reply(
        200, b"[1, 2", {"Content-Length": "100", "Connection": "close"}
    )
    error = refused(link, f"{api.url}/a")
    assert (type(error), error.code) in [
        (TransientError, "connection_lost"),
        (TransientError, "timeout"),
    ]


# ── time ─────────────────────────────────────────────────────────────────────────────────────


def raw_server(answer):
    """A server that does with each connection what `answer` does."""
    listening = socket.create_server(("127.0.0.1", 0))

    def handle(one):
        with one, suppress(OSError):
            answer(one)

    def serve():
        while True:
            try:
                one, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(one,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listening


@pytest.mark.parametrize(
    "begins", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-One: "]
)
def test_an_answer_that_drips_for_ever_ends_with_the_time_of_a_call(begins):
    done = threading.Event()

    def drip(one):
        one.recv(4096)
        one.sendall(begins)
        while not done.wait(0.05):
            one.sendall(b"x")

    with raw_server(drip) as server, closing(Link(LOOSE, bounds=Bounds(total_s=0.4))) as link:
        error = refused(link, f"http://127.0.0.1:{server.getsockname()[1]}/")
    done.set()
    assert (type(error), error.code) == (TransientError, "timeout")


def cut_then(link, came):
    came.wait(10)
    link.cut()


def test_a_silent_server_ends_when_the_link_is_cut():
    came = threading.Event()

    def silent(one):
        one.recv(4096)
        came.set()
        one.recv(4096)

    with raw_server(silent) as server, closing(Link(LOOSE)) as link:
        threading.Thread(target=cut_then, args=(link, came)).start()
        url, began = f"http://127.0.0.1:{server.getsockname()[1]}/", time.monotonic()
        error = refused(link, url)
        assert time.monotonic() - began < 5
        assert (type(error), error.code) == (TransientError, "cancelled_there")
        assert (
            refused(link, f"http://127.0.0.1:{server.getsockname()[1]}/").code == "cancelled_there"
        )


def test_nothing_that_listens_is_a_refused_connection(link):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    error = refused(link, f"http://127.0.0.1:{port}/")
    assert (type(error), error.code) == (TransientError, "connection_refused")


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "é"])
def test_a_header_that_would_be_two_is_not_sent(api, link, value):
    with pytest.raises(ConfigError) as caught:
        link.call("GET", f"{api.url}/a", headers={"X-One": value})
    assert caught.value.code == "api_answer"
    assert api.asked == []
