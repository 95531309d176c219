"""Logins on refresh tokens, renewed by many runs at once: they rotate, die and come back."""

import json
import threading
import time
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, ProgrammingError

from connectors import registry
from connectors.rest import oauth
from connectors.sources.rest import RestSource
from scheduler import ticks
from schemas.aid import Aid
from schemas.errors import SyncwardError
from schemas.runs import Outcome, OutcomeKind
from storage import claims, connections, tenancy
from storage.engine import transaction
from tests.faults.crash_points import DIED, Point, arm, die
from tests.oauth_world import MANIFEST, OAuthWorld, ended, forked, store, work
from tests.rest_api import Issuer, Reply
from tests.world import LOOSE, OPERATOR

pytestmark = pytest.mark.integration


@pytest.fixture
def shop(world, api):
    return OAuthWorld(world, api, 3)


def test_fifty_runs_in_five_processes_on_one_expired_rotating_token_refresh_it_once(world, api):
    shop = OAuthWorld(world, api, 50)
    shop.apply()

    def slowly(asked):  # so that the others have come by then, and have waited for the row
        time.sleep(1.1)
        return shop.issuer.proper(asked)

    asked, jobs = shop.jobs()
    shop.issuer.answers.append(slowly)
    children = [forked(world, lambda n=n: work(world, jobs[n::5])) for n in range(5)]
    assert [ended(pid) for pid in children] == [0] * 5
    assert {(run.state, run.error) for run in map(world.run, asked)} == {("succeeded", None)}
    assert shop.issuer.granted == ["refresh_token"]
    assert not shop.issuer.refused
    assert shop.versions() == {"access_token": 2, "client_secret": 1, "refresh_token": 2}
    assert shop.count("credential.sealed") == 3 + 2


def test_a_token_that_is_refused_before_its_end_is_renewed_and_a_rotating_one_stays_usable(shop):
    shop.apply()
    assert shop.sync().error is None
    for _ in range(3):
        shop.api.logins = set()  # whatever it said of its end
        assert shop.sync().error is None
    assert shop.issuer.granted == ["refresh_token"] * 4
    assert shop.versions()["refresh_token"] == 5
    kept = shop.world.control.all(
        "SELECT version FROM credentials WHERE field = 'refresh_token' ORDER BY version"
    )
    assert kept == [(1,), (4,), (5,)]  # the operator's; others are gone, keys go with backups
    unused = shop.world.control.one(
        "SELECT count(*) FROM keystore.dek WHERE unused_since IS NOT NULL"
    )
    assert unused == 2 * 2
    shop.apply()  # the document still holds the first refresh token
    assert shop.versions()["refresh_token"] == 5
    assert shop.sync().error is None  # no exchange: it is good for an hour
    assert len(shop.issuer.granted) == 4


def test_what_is_renewed_is_audited_sealed_and_never_shown(shop, caplog):
    shop.issuer.rotates = False
    shop.apply()
    run = shop.sync()
    text = shop.world.log(run.run_id) + caplog.text + "".join(shop.world.events())
    assert "canary" not in text
    rows = shop.world.control.all(
        "SELECT body::jsonb -> 'detail' ->> 'field', body::jsonb ->> 'reason', login "
        "FROM audit.event WHERE action = 'credential.sealed' "
        "AND body::jsonb ->> 'reason' = 'renewed'"
    )
    assert [(field, reason) for field, reason, _ in rows] == [("access_token", "renewed")]
    found = shop.world.control.all("SELECT envelope FROM credentials")
    assert not any(b"canary" in bytes(envelope) for (envelope,) in found)


# ── a login that dies ────────────────────────────────────────────────────────────────────────


def test_a_dead_login_pauses_all_its_connections_with_one_event_and_comes_back_by_itself(
    shop, shell
):
    shop.apply()
    assert shop.sync().error is None
    shop.issuer.revoke()
    asked, jobs = shop.jobs()
    with shop.world.cli.inside() as (tx, account, _):  # one is stopped by hand, its run goes on
        connections.pause(tx, account, connections.get(tx, "c2"), OPERATOR)
    work(shop.world, jobs)
    ended_ = [shop.world.run(run_id) for run_id in asked]
    assert {(run.state, run.error_code) for run in ended_} == {("failed", "needs_reauth")}
    assert shop.count("credential.expired") == 1
    assert shop.issuer.refused == ["refresh_token"]
    assert shop.states() == {
        "c0": ("paused", "needs_reauth"), "c1": ("paused", "needs_reauth"),
        "c2": ("paused", "operator"),
    }  # fmt: skip

    _, out, _ = shell("resource", "list")
    assert "needs reauth" in out
    _, out, _ = shell("resource", "show", "shop")
    assert "syncward resource authorize shop" in out
    waits = shop.enqueue("c0")
    _, out, _ = shell("run", "explain", str(waits))
    assert "syncward resource authorize shop" in out

    with shop.world.cli.inside() as (tx, account, _):  # a stop by hand in between stays
        assert connections.pause(tx, account, connections.get(tx, "c1"), OPERATOR)
    shop.issuer.refresh = "refresh-canary-new"
    shop.rotate("refresh_token", "refresh-canary-new", shell)
    assert shop.states() == {
        "c0": ("active", None), "c1": ("paused", "operator"), "c2": ("paused", "operator"),
    }  # fmt: skip
    due = shop.world.control.one(
        "SELECT next_due_at <= now() AND failures = 0 FROM schedules s JOIN connections c "
        "ON c.id = s.connection_id WHERE c.name = 'c0'"
    )
    assert due
    shop.world.step()
    assert shop.world.run(waits).error is None
    assert shop.world.control.all("SELECT * FROM dead_logins") == []


def test_a_login_that_was_stored_again_and_is_refused_again_is_no_second_event(shop, shell):
    shop.apply()
    shop.issuer.revoke()
    assert shop.sync().error_code == "needs_reauth"
    with shop.world.cli.inside() as (tx, account, _):  # by hand, without a new login: asks nobody
        found = connections.get(tx, "c0")
        connections.resume(tx, account, found, next_due_at=None, principal=OPERATOR)
    assert shop.sync().error_code == "needs_reauth"
    assert shop.states()["c0"] == ("paused", "needs_reauth")
    assert (shop.count("credential.expired"), len(shop.issuer.refused)) == (1, 1)
    shop.rotate("refresh_token", "another that is none", shell)
    assert shop.states()["c0"] == ("active", None)
    assert shop.sync().error_code == "needs_reauth"
    assert (shop.count("credential.expired"), len(shop.issuer.refused)) == (2, 2)


@pytest.mark.parametrize(("dead", "state"), [(True, "paused"), (False, "active")])
def test_a_run_that_met_a_dead_login_pauses_nothing_that_was_authorised_meanwhile(
    shop, dead, state
):
    shop.apply()
    asked = shop.enqueue("c0")
    (job,) = shop.world.dispatch()
    claim = shop.world.claim(job)
    if dead:  # the connection was resumed by hand, after the login had died
        shop.world.control.act(
            "INSERT INTO dead_logins SELECT id, account_id, :run, '{}' FROM resources "
            "WHERE name = 'shop'",
            run=asked,
        )
    with transaction(shop.world.deps.engine) as tx:
        outcome = Outcome(OutcomeKind.FAILED, "needs_reauth", "It is dead.")
        claims.finish(tx, claim, outcome, shop.world.deps.principal)
    assert shop.states()["c0"][0] == state


# ── a token endpoint that lies, hangs or is away ─────────────────────────────────────────────

LIES = [
    (Reply(200, b"<html>canary</html>", {"Content-Type": "text/html"}), "status 200 and no token"),
    (Reply(200, {"error": "canary"}), "status 200 and no token"),
    (Reply(400, {"error": ["invalid_grant"]}), "status 400 and no token"),
    (Reply(200, {"access_token": "a\nb"}), "without an access_token"),
    (Reply(200, {"access_token": "canary-9", "refresh_token": 7}), "refresh_token that is none"),
    (Reply(200, {"access_token": "canary-9", "token_type": "mac"}), "no bearer token"),
    (Reply(302, b"", {"Location": "http://10.0.0.1/token"}), "redirects"),
    (Reply(200, b"x" * (2 << 20)), "more than 1 MiB"),
    (Reply(401, {"error": "invalid_client"}), "refuses this client"),
    (Reply(503, b"canary"), "answers with status 503; tried again"),
    (Reply(drop=True), "tried again"),
]  # fmt: skip


def test_a_token_endpoint_that_lies_ends_in_the_right_error_and_nothing_is_stored(shop):
    shop.apply()
    before = shop.versions()
    for reply, says in LIES:
        shop.issuer.answers.append(reply)
        run = shop.sync()
        assert says in (run.error or ""), run
        assert "canary" not in (run.error or "") + shop.world.log(run.run_id)
        assert run.state == ("queued" if "tried again" in says else "failed")
        shop.world.control.act("DELETE FROM leases")
        shop.world.control.act("DELETE FROM active_runs")
        shop.world.control.act("UPDATE schedules SET state = 'active', state_reason = NULL")
    assert shop.versions() == before
    assert shop.sync().error is None


def test_a_token_endpoint_that_hangs_costs_its_bound_once_and_holds_nothing(shop, monkeypatch):
    monkeypatch.setattr(oauth, "BOUNDS", replace(oauth.BOUNDS, total_s=1.0))
    shop.apply()
    hang, held = threading.Event(), threading.Event()

    def hangs(asked):
        held.set()
        hang.wait(20)
        return shop.issuer.proper(asked)

    shop.issuer.answers.append(hangs)
    asked, jobs = shop.jobs()
    began = time.monotonic()
    work(shop.world, jobs)
    hang.set()
    assert time.monotonic() - began < 10
    found = [shop.world.run(run_id) for run_id in asked]
    assert {(run.state, run.error_code) for run in found} <= {
        ("queued", "timeout"), ("succeeded", None),
    }  # fmt: skip
    assert "timeout" in {run.error_code for run in found}
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'"
    assert shop.world.control.one(idle) == 0


class Kept:
    """Secrets in memory, renewed at once."""

    def __init__(self, **secrets: str) -> None:
        self.stored = dict(secrets)

    def renewed(self, seen, exchange):
        del seen
        self.stored |= exchange(self.stored)
        return self.stored


def test_cancelling_leaves_an_exchange_time_to_end_and_cutting_does_not(api, tmp_path):
    issuer = Issuer(api)
    api.tables["orders"] = [{"id": 1}]
    file = tmp_path / "shop.yaml"
    file.write_text(json.dumps(MANIFEST))
    config = {"manifest": str(file), "parameters": {"port": api.port}}
    for end, survives in ((RestSource.cancel, True), (RestSource.cut, False)):
        kept = Kept(client_secret=issuer.client[1], refresh_token=issuer.refresh)
        source: Any = registry.open_source("rest", config, kept.stored, LOOSE, Aid(secrets=kept))
        came, go_on = threading.Event(), threading.Event()
        ended_: list[str] = []

        def hangs(asked, came=came, go_on=go_on):
            came.set()
            go_on.wait(20)
            return issuer.proper(asked)

        def read(source=source, ended_=ended_):
            try:
                source.test()
            except SyncwardError as error:
                ended_.append(error.code)

        issuer.answers.append(hangs)
        reading = threading.Thread(target=read)
        reading.start()
        assert came.wait(20)
        end(source)
        if survives:
            go_on.set()
        reading.join(8)
        assert not reading.is_alive()
        assert ended_ == ["cancelled_there"]
        assert ("access_token" in kept.stored) is survives
        go_on.set()
        source.close()


def test_a_login_is_renewed_beside_a_keystore_of_its_own(apart, api):
    shop = OAuthWorld(apart, api)
    shop.apply()
    for _ in range(3):
        shop.api.logins = set()
        assert shop.sync().error is None
    assert shop.versions()["refresh_token"] == 4
    with psycopg.connect(apart.keystore_url) as keys:
        unused = keys.execute("SELECT count(*) FROM keystore.dek WHERE unused_since IS NOT NULL")
        assert unused.fetchone() == (2,)


# ── deaths between the exchange and the commit ───────────────────────────────────────────────

#: Where a worker dies, and whether the login survives: nobody else has what the API gave.
DEATHS = [
    (Point("execute", "before", "storage.renewals:store", "exchanged, not sealed away"), False),
    (Point("execute", "after", "storage.renewals:store", "stored, not committed"), False),
    (Point("execute", "after", "workers.renewal:StoredRenewal.renewed", "committed"), True),
]


@pytest.mark.parametrize(("point", "survives"), DEATHS, ids=[p.means for p, _ in DEATHS])
def test_a_worker_killed_around_the_commit_leaves_the_new_login_or_asks_for_another(
    shop, point, survives
):
    shop.apply()
    first = shop.enqueue("c0")
    jobs = shop.world.dispatch()

    def dying():
        arm(point, die)
        work(shop.world, jobs)

    assert ended(forked(shop.world, dying)) == DIED
    assert shop.issuer.granted == ["refresh_token"]
    assert shop.versions()["refresh_token"] == (2 if survives else 1)
    shop.world.expire_leases()
    ticks.reap_tick(shop.world.scheduler)
    shop.world.control.act("UPDATE active_runs SET not_before = now()")
    shop.world.step()
    run = shop.world.run(first)
    assert run.error_code == (None if survives else "needs_reauth")
    assert len(shop.issuer.granted) == 1
    assert shop.count("credential.expired") == (0 if survives else 1)


def test_a_commit_that_fails_after_the_exchange_is_made_again(shop):
    shop.apply()

    def cut_off(asked):
        shop.world.control.all(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state LIKE 'idle in%' "
            "AND datname = current_database() AND application_name LIKE '%worker'"
        )
        return shop.issuer.proper(asked)

    shop.issuer.answers.append(cut_off)
    assert shop.sync().error is None
    assert shop.issuer.granted == ["refresh_token"]
    assert shop.versions()["refresh_token"] == 2


def test_an_operator_who_stores_a_secret_meanwhile_waits_and_has_the_last_word(shop):
    shop.apply()
    late = threading.Thread(target=store, args=(shop.world, "refresh_token", "by-hand-canary"))

    def meanwhile(asked):
        late.start()
        deadline = time.monotonic() + 20
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        while not shop.world.control.one(waits) and time.monotonic() < deadline:
            time.sleep(0.02)
        return shop.issuer.proper(asked)

    shop.issuer.answers.append(meanwhile)
    assert shop.sync().error is None
    late.join()
    assert shop.versions() == {"access_token": 2, "client_secret": 1, "refresh_token": 3}
    shop.issuer.refresh, shop.api.logins = "by-hand-canary", set()
    assert shop.sync().error is None


def test_a_worker_stores_only_for_a_resource_of_a_run_whose_lease_it_holds(shop):
    shop.apply()
    shop.enqueue("c0")
    (job,) = shop.world.dispatch()
    claim = shop.world.claim(job)
    (shop_id,), (lake_id,) = shop.world.control.all("SELECT id FROM resources ORDER BY name DESC")
    call = text(
        "SELECT store_renewed(:run, :lease, :resource, 'authorization', :version, 'SYx', 'x', "
        "false, NULL)"
    )

    def stored(run=claim.run_id, lease=claim.token, resource=shop_id, version=1):
        with shop.world.deps.engine.begin() as tx:
            tenancy.enter(tx, claim.account_id)
            given = {"run": run, "lease": lease, "resource": resource, "version": version}
            found = tx.execute(call, given).scalar_one()
            tx.rollback()
        return found

    assert stored() == []
    assert stored(lease=uuid4()) is None
    assert stored(run=uuid4()) is None
    assert stored(resource=uuid4()) is None
    assert stored(resource=lake_id) == []  # its own other end
    with pytest.raises(DBAPIError, match="another version"):
        stored(version=2)
    shop.world.expire_leases()
    assert stored() is None
    for statement in (
        "INSERT INTO credentials SELECT * FROM credentials",
        "DELETE FROM credentials",
        "SELECT revive_login(gen_random_uuid())",
        "SELECT runs_with(gen_random_uuid(), gen_random_uuid(), gen_random_uuid())",
        "DELETE FROM dead_logins",
    ):
        refused = pytest.raises(ProgrammingError, match="permission denied")
        with refused, shop.world.deps.engine.begin() as tx:
            tx.execute(text(statement))
