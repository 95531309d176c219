"""`resource authorize`: a person's consent, from the browser to a worker; and who else knocks."""

import http.client
import json
import re
import socket
import sys
import webbrowser
from base64 import urlsafe_b64encode
from contextlib import closing, suppress
from hashlib import sha256
from urllib.parse import urlencode

import click
import pytest

from cli.consent import LONGEST, Declined, Expected, Loopback, Refused, pasted
from crypto import keyring as keyrings
from crypto.errors import CryptoError
from crypto.roots import WrapContext, Wrapped
from crypto.tickets import Refusal, Tickets, proof
from schemas.errors import ConfigError
from schemas.secret import Secret
from storage import connections
from tests.oauth_world import OAuthWorld
from tests.rest_api import Api, Reply
from tests.world import OPERATOR

pytestmark = pytest.mark.integration


@pytest.fixture
def shop(world):
    api = Api()
    yield OAuthWorld(world, api, 2)
    api.close()


@pytest.fixture
def browser(shop, monkeypatch):
    """A browser of this host: a program that follows an address, as $BROWSER names it."""
    program = shop.world.directory / "browser.py"
    program.write_text("import sys, urllib.request as u\nu.urlopen(sys.argv[1], timeout=20).read()")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {program} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    return program


@pytest.mark.usefixtures("browser")
def test_a_login_that_has_died_is_authorised_again_and_what_waited_for_it_goes_on(
    shop, shell, caplog
):
    shop.apply()
    shop.issuer.revoke()
    died = shop.sync("c0")
    assert died.error_code == "needs_reauth"
    assert "authorise it again: syncward resource authorize shop (POST " in (died.error or "")
    assert set(shop.states().values()) == {("paused", "needs_reauth")}
    with shop.world.cli.inside() as (tx, account, _):
        connections.pause(tx, account, connections.get(tx, "c1"), OPERATOR)
    with shop.world.working():
        code, out, err = shell("resource", "authorize", "shop", "--browser")
    assert code == 0, err
    where = f"shop at 127.0.0.1:{shop.api.port}"  # which is a part of the address that was sealed
    assert f"resource shop is authorised; shop: {where}, TLS none" in out
    asked = next(one.query for one in shop.api.asked if one.path == "/authorize")
    assert (asked["client_id"], asked["scope"]) == ("app", "orders:read")
    assert asked["access_type"] == "offline"
    assert asked["redirect_uri"].startswith("http://127.0.0.1:")
    assert shop.issuer.granted == ["authorization_code"]
    assert shop.states() == {"c0": ("active", None), "c1": ("paused", "operator")}
    assert shop.sync("c0").error is None
    assert shop.versions()["authorization"] == 2  # the second says that it is used
    everything = out + err + caplog.text + "".join(shop.world.events())
    assert not re.search(r"(code|access|refresh|client)-canary", everything)
    assert shop.count("connection.resumed") == 1


@pytest.mark.usefixtures("browser")
def test_the_operators_host_opens_nothing_of_what_it_has_sealed(shop, shell):
    """With every file and right that this host has, code, verifier and tokens stay closed."""
    shop.apply(secrets={})
    with shop.world.working():
        code, out, err = shell("resource", "authorize", "shop", "--browser", "--json")
    assert (code, json.loads(out)["authorized"]) == (0, "shop"), err
    opened = keyrings.load(shop.world.cli.settings.keyring)
    rows = shop.world.control.all(
        "SELECT c.account_id, d.id, d.root_id, d.wrapped FROM credentials c "
        "JOIN keystore.dek d ON d.id = key_of(c.envelope)"
    )
    assert len(rows) == 5  # client_secret, authorization twice, access_token, refresh_token
    for account, dek, root, wrapped in rows:
        context = WrapContext(account, "credentials", dek)
        (answer,) = opened.unwrap_many([(Wrapped(root, bytes(wrapped)), context)])
        assert isinstance(answer, CryptoError)


@pytest.mark.usefixtures("browser")
def test_a_consent_that_the_api_does_not_take_leaves_the_login_of_before(shop, shell):
    shop.apply()
    shop.issuer.answers.append(Reply(400, {"error": "invalid_grant"}))
    with shop.world.working():
        code, _, err = shell("resource", "authorize", "shop", "--browser")
    assert code == 1
    assert "the last authorisation was refused; the login of before is used" in err
    assert shop.issuer.granted == ["refresh_token"]
    assert shop.sync("c0").error is None


def test_what_is_authorised_elsewhere_is_pasted(shop, shell, monkeypatch):
    shop.apply(secrets={})
    found: list[str] = []

    class Person:
        """Reads the address from the screen, and pastes where the browser ended."""

        def readline(self, *_: object) -> str:
            with closing(http.client.HTTPConnection("127.0.0.1", shop.api.port)) as link:
                link.request("GET", found[0])
                return f"{link.getresponse().headers['Location']}\n"

    monkeypatch.setattr("sys.stdin", Person())
    echo = click.echo

    def watched(message=None, *given, **named):
        address = re.search(r"http://127\.0\.0\.1:\d+(/authorize\S+)", str(message))
        if address:
            found.append(address[1])
        return echo(message, *given, **named)

    monkeypatch.setattr(click, "echo", watched)
    with shop.world.working():
        code, _, err = shell("resource", "authorize", "shop", "--paste")
    assert code == 0, err
    assert shop.issuer.granted == ["authorization_code"]


@pytest.mark.usefixtures("browser")
def test_an_answer_that_says_no_and_a_resource_with_nothing_to_authorise(shop, shell):
    shop.apply()
    shop.issuer.back = {"error": "access_denied", "error_description": "canary-words"}
    code, _, err = shell("resource", "authorize", "shop", "--browser")
    assert code == 1
    assert "did not grant it (access_denied)" in err
    assert "canary" not in err.replace("code-canary", "")
    code, _, err = shell("resource", "authorize", "lake")
    assert code == 1
    assert "nothing to authorise" in err
    assert "authorization" not in shop.versions()


# ── the listener: whoever knocks ─────────────────────────────────────────────────────────────


class Waiting:
    """A listener with a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.tickets = Tickets(life_s=300, clock=lambda: self.now)
        self.said: list[str] = []
        self.expected = Expected(self.tickets, "me")
        self.loopback = Loopback(0, self.expected, self.said.append)

    def knock(self, path: str = "/callback", host: str = "", **query: str) -> tuple[int, str]:
        port = int(self.loopback.redirect_uri.split(":")[2].partition("/")[0])
        target = f"{path}?{urlencode(query)}" if query else path
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as link:
            link.request("GET", target, headers={"Host": host or f"127.0.0.1:{port}"})
            answer = link.getresponse()
            return answer.status, answer.read().decode()


@pytest.fixture
def waiting():
    made = Waiting()
    with made.loopback:
        yield made


def test_only_the_right_state_is_taken_once_and_in_time(waiting):
    state = waiting.tickets.issue("me")
    other = Tickets(life_s=300).issue("me")
    for query, why in (
        ({}, "was not given out here"),
        ({"code": "code-canary", "": ""}, "was not given out here"),
        ({"code": "code-canary"}, "was not given out here"),
        ({"code": "code-canary", "state": other}, "was not given out here"),
        ({"code": "code-canary", "state": waiting.tickets.issue("you")}, "was not given out here"),
        ({"code": "code-canary", "state": state[:-1]}, "was not given out here"),
        ({"code": "code-canary", "state": f"{state}="}, "was not given out here"),
    ):
        status, said = waiting.knock(**query)
        assert (status, why in said) == (400, True), said
        assert "canary" not in said + "".join(waiting.said)
    assert waiting.knock("/elsewhere", code="x", state=state)[0] == 404
    assert waiting.knock(host="evil.example", code="x", state=state)[0] == 400
    assert waiting.knock(f"/callback?code={'x' * LONGEST}&state={state}")[0] == 400
    assert waiting.knock(f"/callback?code=a&code=b&state={state}")[0] == 400
    assert waiting.loopback.wait(0) is None

    assert waiting.knock(code="code-canary-right", state=state)[0] == 200
    status, said = waiting.knock(code="code-canary-right", state=state)
    assert (status, "was used before" in said) == (400, True)
    came = waiting.loopback.wait(5)
    assert isinstance(came, Secret)
    assert came.reveal() == "code-canary-right"
    assert waiting.loopback.wait(0) is None

    late = waiting.tickets.issue("me")
    waiting.now += 301
    status, said = waiting.knock(code="code-canary", state=late)
    assert (status, "has expired" in said) == (400, True)


def test_a_no_with_the_right_state_ends_the_wait_and_its_words_are_not_shown(waiting):
    waiting.knock(error="access_denied", state=waiting.tickets.issue("me"))
    assert waiting.loopback.wait(5) == Declined("access_denied")
    waiting.knock(error="<canary>", state=waiting.tickets.issue("me"))
    assert waiting.loopback.wait(5) == Declined("error")


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /callback HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET http://127.0.0.1/callback?code=canary HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET http://[canary/callback HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
    ids=["post", "long", "headers", "tls", "absolute", "bracket"],
)
def test_what_is_no_redirect_is_refused_without_a_word_of_it(waiting, sent, capfd):
    port = int(waiting.loopback.redirect_uri.split(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
        link.sendall(sent)
        link.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):  # it hung up before it had read everything
            while piece := link.recv(4096):
                answer += piece
    assert b" 200 " not in answer
    assert b"canary" not in answer
    assert waiting.loopback.wait(0) is None
    out, err = capfd.readouterr()
    assert "canary" not in out + err + "".join(waiting.said)


def test_one_that_says_nothing_keeps_nobody_waiting(waiting):
    port = int(waiting.loopback.redirect_uri.split(":")[2].partition("/")[0])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    assert waiting.knock(code="code-canary", state=waiting.tickets.issue("me"))[0] == 200
    for link in silent:
        link.close()


def test_a_port_that_is_taken_is_said(waiting):
    port = int(waiting.loopback.redirect_uri.split(":")[2].partition("/")[0])
    with pytest.raises(ConfigError, match=f"--port {port}"):
        Loopback(port, waiting.expected, print)


def test_what_is_pasted_is_held_to_the_same(waiting):
    uri, state = "http://127.0.0.1:8765/callback", waiting.tickets.issue("me")
    for line in (
        "",
        "nonsense",
        f"http://evil/callback?code=x&state={state}",
        f"{uri}?",
        "x" * 9_000,
    ):
        assert isinstance(pasted(line, uri, waiting.expected), Refused)
    came = pasted(f"  {uri}?code=abc&state={state}#\n", uri, waiting.expected)
    assert isinstance(came, Secret)


def test_a_verifier_is_new_each_time_and_its_challenge_is_s256():

    (first, challenge), (second, _) = proof(), proof()
    assert first != second
    assert len(first) >= 43
    digest = urlsafe_b64encode(sha256(first.encode()).digest()).decode().rstrip("=")
    assert challenge == digest
    assert Tickets(life_s=1).redeem("é", "me") is Refusal.FOREIGN


def test_a_trial_uses_a_token_and_renews_none(shop, shell):
    token = shop.world.directory / "bare.txt"
    token.write_text("bare-canary")
    given = ("--set", f"port={shop.api.port}", "--secret-file", f"access_token={token}")
    shop.api.logins = {"Bearer bare-canary"}
    code, out, err = shell("connector", "try", str(shop.manifest), "--stream", "orders", *given)
    assert (code, "2 records" in out) == (0, True), err
    shop.api.logins = set()
    code, out, err = shell("connector", "try", str(shop.manifest), "--stream", "orders", *given)
    assert code == 1
    assert "only a worker can store what is new" in err
    assert (shop.issuer.granted, shop.issuer.refused) == ([], [])
