"""Logins that workers renew, attacked: a KMS that goes away, settings that change, lies."""

import json
import re
import sys
import time
import webbrowser
from base64 import urlsafe_b64encode
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import yaml
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cli.apply import make_so
from connectors.rest import oauth
from schemas.consent import FIELD
from schemas.errors import TransientError
from schemas.redaction import REDACTOR
from storage import resources, tenancy
from tests.oauth_world import EXPIRED, OAuthWorld, ended, forked, store, work
from tests.rest_api import Reply

pytestmark = pytest.mark.integration

VERIFIER = "verifier-canary-" + "v" * 40


@pytest.fixture
def shop(world, api):
    return OAuthWorld(world, api, 2)


@pytest.fixture
def browser(monkeypatch, tmp_path):
    """A browser in a process of its own that opens an address, and where that leads."""
    program = tmp_path / "browser.py"
    program.write_text("import sys, urllib.request as u\nu.urlopen(sys.argv[1], timeout=20).read()")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {program} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)


def consented(shop: OAuthWorld, code: str = "code-canary-9") -> None:
    """Store what `resource authorize` does, for a code that the API knows."""
    challenge = urlsafe_b64encode(sha256(VERIFIER.encode()).digest()).rstrip(b"=").decode()
    uri = "http://127.0.0.1:8765/callback"
    shop.issuer.codes[code] = challenge, uri
    pending = {"code": code, "verifier": VERIFIER, "redirect_uri": uri}
    store(shop.world, FIELD, json.dumps(pending))


def bare(shop: OAuthWorld, **parameters: str) -> None:
    """Apply the document without any secret."""
    path = shop.document(secrets={}, **parameters)
    document = yaml.safe_load(path.read_text())
    del document["resources"]["shop"]["secret"]
    path.write_text(yaml.safe_dump(document))
    shop.world.apply_file(path)
    shop.world.deps.heartbeat.beat()


# ── between the exchange and the commit ──────────────────────────────────────────────────────


class KmsThatGoesAway:
    """The keyring of a worker whose KMS does not wrap credentials from some moment on."""

    def __init__(self, real: Any) -> None:
        self._real, self.away = real, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def wrap(self, purpose: str, *given: Any) -> Any:
        if self.away and purpose == "credentials":
            raise TransientError("the KMS is away; tried again")
        return self._real.wrap(purpose, *given)


@pytest.mark.parametrize("by_code", [False, True], ids=["refreshed", "authorized"])
def test_a_kms_that_goes_away_during_an_exchange_costs_no_login(shop, by_code):
    shop.apply()
    if by_code:
        consented(shop)
    kms = KmsThatGoesAway(shop.world.deps.keyring)
    shop.world.deps = replace(shop.world.deps, keyring=kms)

    def leaves(asked):
        kms.away = True
        return shop.issuer.proper(asked)

    shop.issuer.answers.append(leaves)
    run = shop.sync()
    assert run.error is None
    assert len(shop.issuer.granted) == 1
    assert shop.versions()["refresh_token"] == 2


# ── who may store what ───────────────────────────────────────────────────────────────────────


def test_a_worker_stores_only_what_connectors_renew_and_not_without_an_event(shop):
    shop.apply()
    shop.enqueue("c0")
    (job,) = shop.world.dispatch()
    claim = shop.world.claim(job)
    shop_id = shop.world.control.one("SELECT id FROM resources WHERE name = 'shop'")
    call = text(
        "SELECT store_renewed(:run, :lease, :id, :field, :version, 'SYx', 'x', false, ''::bytea)"
    )

    def stored(field, version):
        with shop.world.deps.engine.begin() as tx:
            tenancy.enter(tx, claim.account_id)
            given = {"run": claim.run_id, "lease": claim.token, "id": shop_id}
            tx.execute(call, {**given, "field": field, "version": version})

    for field, version in (("client_secret", 2), ("password", 1), ("token", 1)):
        with pytest.raises(DBAPIError, match="no worker stores"):
            stored(field, version)
    for field in (*oauth.RENEWED, "config"):
        version = shop.versions().get(field, 0) + 1
        with pytest.raises(DBAPIError, match="event"):  # the guard refuses the commit
            stored(field, version)
    assert shop.versions() == {"access_token": 1, "client_secret": 1, "refresh_token": 1}


# ── what is changed under a run ──────────────────────────────────────────────────────────────


def test_secrets_of_new_settings_are_not_sent_where_a_run_of_before_would_send_them(shop):
    shop.apply({**EXPIRED, "access_token": "access-canary-first"})
    shop.api.logins = {"Bearer access-canary-first"}

    def moved_meanwhile(_asked):
        shop.api.routes.pop("/all/orders")
        shop.apply({"refresh_token": "refresh-canary-0"}, site="y")
        return Reply(401, {})

    shop.api.routes["/all/orders"] = moved_meanwhile
    run = shop.sync()
    assert (shop.issuer.granted, shop.issuer.refused) == ([], [])
    assert run.state == "queued"
    assert "settings" in (run.error or "")
    shop.world.control.act("UPDATE active_runs SET not_before = now()")
    shop.world.step()
    assert shop.world.run(run.run_id).error is None
    assert shop.issuer.granted == ["refresh_token"]


def test_an_old_refresh_token_in_a_document_does_not_move_the_newest_one_elsewhere(shop):
    """Who knows the first one, which is worth nothing any more, does not know that of a worker."""
    shop.apply()
    assert shop.sync().error is None
    assert shop.versions()["refresh_token"] == 2
    shop.apply(site="elsewhere")
    assert shop.versions()["refresh_token"] == 3
    sent = []

    def note(asked):
        sent.append(asked.body.decode())
        return Reply(400, {"error": "invalid_grant"})

    shop.api.logins = set()
    shop.issuer.answers.append(note)
    assert shop.sync("c1").error_code == "needs_reauth"
    assert [re.findall(r"refresh_token=([\w-]+)", body) for body in sent] == [["refresh-canary-0"]]


@pytest.mark.usefixtures("browser")
def test_what_is_authorised_after_a_correction_is_not_taken_for_what_died(shop, shell):
    shop.apply(secrets={})
    shop.issuer.answers.append(Reply(400, {"error": "invalid_grant"}))
    with shop.world.working():
        code, _, err = shell("resource", "authorize", "shop", "--browser")
    assert (code, "authorise once more" in err) == (1, True), err
    shop.apply(secrets={}, site="corrected")
    assert "authorization" not in shop.versions()
    with shop.world.working():
        code, _, err = shell("resource", "authorize", "shop", "--browser")
    assert code == 0, err
    assert shop.issuer.granted == ["authorization_code"]


@pytest.mark.usefixtures("browser")
def test_the_same_for_an_app_without_a_secret_of_which_nothing_else_is_stored(shop, shell):
    manifest = json.loads(shop.manifest.read_text())
    manifest["authenticator"]["client_login"] = "none"
    shop.manifest.write_text(json.dumps(manifest))
    bare(shop)
    shop.issuer.client = ("app", None)
    shop.issuer.answers.append(Reply(400, {"error": "invalid_grant"}))
    with shop.world.working():
        assert shell("resource", "authorize", "shop", "--browser")[0] == 1
    shop.issuer.client = ("app", "unused")
    bare(shop, site="corrected")
    shop.issuer.client = ("app", None)
    assert shop.versions() == {}
    with shop.world.working():
        code, _, err = shell("resource", "authorize", "shop", "--browser")
    assert code == 0, err
    assert shop.versions()["authorization"] == 3


# ── consents that are not taken ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "refusal",
    [
        Reply(200, {"error": "bad_verification_code", "error_description": "canary"}),
        Reply(400, {"error": "invalid_request"}),
        Reply(400, b"<html>canary</html>"),
    ],
    ids=["200", "invalid_request", "html"],
)
def test_a_consent_refused_in_an_apis_own_words_leaves_the_login_of_before(shop, refusal):
    shop.apply()
    consented(shop)
    shop.issuer.answers.append(refusal)
    run = shop.sync()
    assert run.error is None
    assert shop.issuer.granted == ["refresh_token"]
    assert "canary" not in shop.world.log(run.run_id)


def test_code_and_verifier_are_masked_in_the_worker_that_exchanges_them(shop):
    shop.apply(secrets={})
    consented(shop)
    seen = []

    def looks(asked):
        shown = f"code-canary-9 {VERIFIER} http://x/?code=code-canary-9"
        seen.append(REDACTOR.text(shown))
        return shop.issuer.proper(asked)

    shop.issuer.answers.append(looks)
    assert shop.sync().error is None
    assert len(seen) == 1
    assert "canary" not in seen[0]


def test_a_token_is_masked_until_the_last_line_of_its_run_not_only_while_it_is_used(shop):
    shop.apply()
    shown = []
    finish = shop.world.deps.calls.settle

    def last(*given):
        shown.append(REDACTOR.text("it says access-canary-1 and refresh-canary-1"))
        return finish(*given)

    shop.world.deps.calls.settle = last
    assert shop.sync().error is None
    assert len(shown) == 1
    assert "canary" not in shown[0]


# ── who waits for whom ───────────────────────────────────────────────────────────────────────


def test_a_person_at_a_prompt_keeps_no_worker_from_renewing(shop, shell, monkeypatch):
    shop.apply()
    looked = []

    class Person:
        def isatty(self) -> bool:
            return False

        def readline(self, *_: object) -> str:
            free = "SELECT count(*) FROM (SELECT FROM resources FOR NO KEY UPDATE SKIP LOCKED) r"
            looked.append(shop.world.control.one(free))
            return "typed-canary\n"

    monkeypatch.setattr("sys.stdin", Person())
    code, _, err = shell("resource", "rotate", "shop", "--secret-stdin", "refresh_token")
    assert code == 0, err
    path = shop.document()
    written = path.read_text()
    for one in ("client_secret", "refresh_token"):
        written = written.replace(f"\n        file: {one}.txt", " stdin")
    path.write_text(written)
    make_so(shop.world.cli, path, write=True)
    assert looked == [2] * 3


def test_an_operator_waits_for_as_long_as_an_exchange_may_take(shop):
    shop.apply()
    with shop.world.cli.inside() as (tx, _, _name):
        resources.lock(tx, "shop")
        waits = tx.execute(
            text("SELECT extract(epoch FROM current_setting('lock_timeout')::interval)")
        ).scalar_one()
    assert waits > 2 * oauth.BOUNDS.total_s


@pytest.mark.full
def test_while_an_exchange_hangs_each_process_waits_with_one_session(world, api):
    shop = OAuthWorld(world, api, 30)
    shop.apply()
    waiting = (
        "SELECT count(*) FILTER (WHERE wait_event_type = 'Lock') FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'syncward-control:worker'"
    )
    seen = []

    def hangs(asked):
        until = time.monotonic() + 8  # less than the 10 s that an exchange may take
        while time.monotonic() < until:
            seen.append(world.control.one(waiting))
        return shop.issuer.proper(asked)

    asked, jobs = shop.jobs()
    shop.issuer.answers.append(hangs)
    children = [forked(world, lambda n=n: work(world, jobs[n::5])) for n in range(5)]
    assert [ended(pid) for pid in children] == [0] * 5
    assert max(seen) == 4  # the other processes; their other runs have none
    assert {world.run(one).error for one in asked} == {None}
    assert shop.issuer.granted == ["refresh_token"]


@pytest.mark.full
def test_a_login_that_dies_under_fifty_runs_in_five_processes_is_one_event(world, api):
    shop = OAuthWorld(world, api, 50)
    shop.apply()
    shop.issuer.revoke()
    asked, jobs = shop.jobs()
    children = [forked(world, lambda n=n: work(world, jobs[n::5])) for n in range(5)]
    assert [ended(pid) for pid in children] == [0] * 5
    assert {world.run(one).error_code for one in asked} == {"needs_reauth"}
    assert shop.count("credential.expired") == 1
    assert shop.issuer.refused == ["refresh_token"]
    assert shop.count("connection.paused") == 50
    assert set(shop.states().values()) == {("paused", "needs_reauth")}


# ── the listener and the paste ───────────────────────────────────────────────────────────────


def test_what_is_pasted_and_is_no_text_is_refused_without_a_word_of_it(shop, shell, monkeypatch):
    shop.apply()

    class Person:
        def readline(self, *_: object) -> str:
            return b"canary \xff\xfe\n".decode()

    monkeypatch.setattr("sys.stdin", Person())
    code, out, err = shell("resource", "authorize", "shop", "--paste")
    assert code == 1
    assert "what was pasted is refused" in err
    assert "canary" not in out + err.replace("code-canary", "")
    assert FIELD not in shop.versions()
