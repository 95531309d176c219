"""One quota for all workers, on a real Redis: its rate holds, and its pauses are everybody's.

A Redis that is away or empty stops nobody.
"""

import hashlib
import hmac
import json
import multiprocessing
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import redis
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from scheduler import ticks
from schemas.quotas import Hold, Quota, Rate, Windows
from schemas.runs import Rule, Run, RunKind, RunOptions
from storage import connections, runs
from storage import explain as explanations
from tests.rest_api import Api, Reply
from tests.world import OPERATOR
from workers import quotas
from workers.enqueue import open_client
from workers.quotas import ALONE_SHARE, RunQuotas, SharedQuotas

pytestmark = pytest.mark.integration

HOUR = timedelta(hours=1)
KEY = "syncward:quota:test"


def quota(*rates: Rate) -> Quota:
    return Quota("api", "all", rates)


@pytest.fixture
def client(valkey):
    valkey.flush()
    made = open_client(valkey.url)
    yield made
    made.close()


# ── the script ───────────────────────────────────────────────────────────────────────────────

RATES = st.lists(
    st.builds(
        lambda calls, per, fixed: Rate(calls, timedelta(milliseconds=per), fixed=fixed),
        st.integers(1, 6), st.sampled_from([100, 1_000, 7_000]), st.booleans(),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RATES, st.lists(st.integers(-300, 900), max_size=25))
def test_the_script_counts_as_the_windows_do_and_stays_bounded_when_the_clock_goes_back(
    client, rates, steps
):
    """The script as it is but for the clock, beside the same rules in Python."""
    clock = "{string.sub(ARGV[#ARGV], 1, -4), string.sub(ARGV[#ARGV], -3) * 1000}"
    script = client.register_script(quotas._SCRIPT.replace("redis.call('TIME')", clock))
    key, windows, now, latest, made = f"{KEY}:{uuid4()}", Windows(rates), 1_800_000_000_000, 0, []
    for step in steps:
        now += step
        arguments: list[Any] = ["", "era", 0, len(rates)]
        for rate in rates:
            arguments += [rate.calls, rate.width, rate.behind, 0, 0]
        wait, which, _, _ = script(keys=[key], args=[*arguments, now])
        if now < latest:  # it went back: what is of the future counts as of now
            assert int(wait) <= max(2 * r.width * (r.behind + 1) for r in rates)
            return
        hold = windows.hold(now)
        assert int(wait) == (0 if hold is None else round(hold.seconds * 1_000))
        if hold is not None:
            assert rates[int(which) - 1].per == (hold.rate or rates[0]).per
            continue
        windows.add(now)
        made.append(now)
        latest = max(latest, now)
    assert client.exists(key) == bool(made)
    if made:
        assert 0 < client.pttl(key) <= max((r.behind + 1) * r.width + 1_000 for r in rates)


class Recorded(SharedQuotas):
    """Notes by Redis' clock when each call counted."""

    def _asked(self, key: str, quota: Quota, *, closing: int) -> tuple[int, int, int]:
        answer = super()._asked(key, quota, closing=closing)
        if not closing and not answer[0]:
            self.__dict__.setdefault("made", []).append(answer[2])
        return answer


def crowd(url: str, threads: int, processes: int) -> list[int]:
    """Ask from many threads as often as possible; return when calls counted."""
    client = open_client(url)
    shared = Recorded(client)
    client.rpush("ready", 1)
    while client.llen("ready") < processes:
        time.sleep(0.01)
    until = time.time() + 1.5

    def ask(_: int) -> None:
        while time.time() < until:
            hold = shared.hold(KEY, quota(BUSY))
            if hold is not None:
                time.sleep(min(hold.seconds, 0.02))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    client.close()
    made: list[int] = shared.__dict__.get("made", [])
    return made


BUSY = Rate(25, timedelta(milliseconds=300))


def test_many_processes_and_threads_never_exceed_the_rate(valkey, client):
    """By Redis' own clock, in every stretch of the window's length."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        others = [pool.apply_async(crowd, (valkey.url, 4, 3)) for _ in range(2)]
        made = crowd(valkey.url, 4, 3)
        made += [at for other in others for at in other.get(60)]
    made.sort()
    period = BUSY.per // timedelta(milliseconds=1)
    most = max(sum(begin <= at < begin + period for at in made) for begin in made)
    assert most <= BUSY.calls
    assert len(made) >= 2 * BUSY.calls, "nor is it starved"
    assert client.pttl(KEY) in {-2, *range(1, 2_000)}, "it goes, or is gone"


# ── a Redis that is away, or has forgotten ───────────────────────────────────────────────────


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def used(shared: SharedQuotas, one: Quota, most: int = 1_000) -> int:
    """Take as many calls as there are now."""
    for taken in range(most):
        if shared.hold(KEY, one) is not None:
            return taken
    return most


def test_without_redis_a_process_takes_a_small_part_and_tells_redis_later(valkey, client, caplog):
    clock, one = Clock(), quota(Rate(40, HOUR))
    caplog.set_level("INFO")
    shared, other = SharedQuotas(client, clock=clock), SharedQuotas(open_client(valkey.url))
    assert used(shared, one, 10) == 10
    host, port = client.connection_pool.connection_kwargs["host"], 1
    shared.client = open_client(f"redis://{host}:{port}/0")
    del shared.__dict__["_script"]
    assert used(shared, one) == 40 // ALONE_SHARE
    assert used(shared, one) == 0
    said = [record for record in caplog.records if record.message == "quotas_alone"]
    assert [record.__dict__["reason"] for record in said] == ["away"]
    assert REGISTRY.get_sample_value("syncward_quotas_alone") == 1
    assert used(other, one, 10) == 10
    shared.client = client
    del shared.__dict__["_script"]
    clock.now += 60
    assert used(shared, one) == 40 - 10 - 40 // ALONE_SHARE - 10
    assert "quotas_shared_again" in caplog.messages
    assert REGISTRY.get_sample_value("syncward_quotas_alone") == 0
    assert used(other, one) == 0
    other.client.close()


def test_an_emptied_redis_is_told_by_each_process_what_it_has_used(valkey, client):
    one = quota(Rate(20, HOUR))
    shared, other = SharedQuotas(client), SharedQuotas(open_client(valkey.url))
    assert (used(shared, one, 8), used(other, one, 8)) == (8, 8)
    client.flushall()
    client.script_flush()
    assert used(shared, one, 1) == 1  # there are 8 and this one
    assert used(other, one) == 3, "8 more, and what is left"
    assert used(shared, one) == 0
    other.client.close()


def test_a_pause_is_everybodys_and_outlives_redis(valkey, client):
    shared, other = SharedQuotas(client), SharedQuotas(open_client(valkey.url))
    one = quota(Rate(100, HOUR))
    for limited in (one, Quota("api", "told", ())):
        key = f"{KEY}:{limited.name}"
        assert other.hold(key, limited) is None
        shared.close(key, limited, 900)
        shared.close(key, limited, 10)  # the longest counts
        hold = other.hold(key, limited)
        assert hold is not None
        assert (hold.rate, 890 < hold.seconds <= 900) == (None, True)
        assert client.pttl(key) > 880_000
        client.flushall()
        assert other.hold(key, limited) is None, "Redis has forgotten it, and asks the API again"
    other._gone(redis.ConnectionError())
    other._ask_at = float("inf")
    assert isinstance(other.hold(f"{KEY}:all", one), Hold), "of what it was told itself it knows"
    shared.close(KEY, one, 400 * 86_400)
    assert client.pttl(KEY) <= 86_401_000, "a wrong answer closes no API for a year"
    client.hset(KEY, "closed", 4_000_000_000_000)
    assert shared.hold(KEY, one) is None, "a clock that went back by years closes none, either"
    other.client.close()


def test_an_older_login_counts_alone_and_says_why(valkey, client, caplog):
    """Rights that came with quotas (docs/network.md) are missing until somebody grants them."""
    client.execute_command(
        "ACL", "SETUSER", "older", "reset", "on", ">word", "~syncward:*", "+evalsha",
        "+script|load", "+hmget", "+hset",
    )  # fmt: skip
    login = open_client(valkey.url.replace(f":{valkey.password}@", "older:word@"))
    shared = SharedQuotas(login)
    assert used(shared, quota(Rate(16, HOUR))) == 16 // ALONE_SHARE
    said = [r.__dict__["reason"] for r in caplog.records if r.message == "quotas_alone"]
    assert said == ["denied"]
    login.close()
    client.execute_command("ACL", "DELUSER", "older")
    shared._back()


def test_a_key_tells_no_login_and_accounts_share_none(client):
    def of(holder: tuple[str, ...], resource=None, account: bytes = b"a") -> str:
        def token(value: bytes) -> bytes:
            return hmac.digest(account, value, hashlib.sha256).hex()[:32].encode()

        one = RunQuotas(SharedQuotas(client), resource or uuid4(), "rest", token_of=lambda: token)
        return one._key(Quota("api", "all", (), holder))

    login = ("bearer", "tok-canary-1")
    assert of(login) == of(login), "two resources with one login"
    assert of(login) != of(("bearer", "tok-canary-2"))
    assert of(("a", "bc")) != of(("ab", "c"))
    assert of(login, account=b"b") != of(login)
    one = uuid4()
    assert (of((), one) == of((), one), of(()) == of(())) == (True, False)
    assert re.fullmatch(r"syncward:quota:[0-9a-f]{32}", of(login))
    assert re.fullmatch(r"syncward:quota:[0-9a-f]{32}", of(()))


# ── real runs ────────────────────────────────────────────────────────────────────────────────

FIELDS = {"id": "integer"}
PAGING = {
    "type": "CursorPagination", "cursor_value": "paging.next.after",
    "page_token_option": {"field_name": "after"},
}  # fmt: skip


def manifest(**budget: object) -> dict[str, Any]:
    return {
        "version": "1",
        "name": "shop",
        "url_base": "{{ config.url }}",
        "parameters": {"url": {}},
        "authenticator": {"type": "BearerAuthenticator"},
        "check": {"stream_names": ["orders"]},
        **budget,
        "streams": {
            "orders": {
                "path": "/cursor/orders", "record_selector": {"field_path": "results"},
                "primary_key": ["id"], "schema": FIELDS, "paginator": PAGING,
            },
        },
    }  # fmt: skip


class Shop:
    """A world with three connections from one API: two with one login, one with another."""

    def __init__(self, world, api: Api) -> None:
        self.world, self.api = world, api

    def apply(self, declared: dict[str, Any]) -> None:
        directory, pair = self.world.directory, self.world.pair
        file = directory / "shop.yaml"
        file.write_text(json.dumps(declared))
        (directory / "lake.pw").write_text(pair.secret("destination")["password"])
        config = {"manifest": str(file), "parameters": {"url": self.api.url}}
        resources: dict[str, Any] = {
            "lake": {
                "kind": "postgres", "config": pair.config("destination"),
                "secret": {"password": {"file": "lake.pw"}},
            },
        }  # fmt: skip
        made: dict[str, Any] = {}
        for name, token in (("one", "tok-canary-a"), ("two", "tok-canary-a"), ("three", "tok-b")):
            (directory / f"{name}.txt").write_text(token)
            resources[name] = {
                "kind": "rest", "config": config, "secret": {"token": {"file": f"{name}.txt"}},
            }  # fmt: skip
            made[name] = {
                "source": name, "destination": "lake", "schedule": "manual",
                "target": {"schema": name}, "streams": {"shop.orders": {"mode": "replace"}},
            }  # fmt: skip
        path = directory / "doc.yaml"
        document = {"account": "acme", "resources": resources, "connections": made}
        path.write_text(yaml.safe_dump(document))
        if not self.world.control.all("SELECT 1 FROM accounts WHERE name = 'acme'"):
            self.world.account()
        self.world.apply_file(path)

    def sync(self, name: str) -> Run:
        with self.world.cli.inside() as (tx, _, _name):
            subject = connections.subject(connections.get(tx, name))
            asked = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR)
        self.world.step()
        return self.world.run(asked.run_id)

    def go_on(self) -> None:
        """Let the time pass that deferred runs wait for."""
        self.world.control.act("UPDATE active_runs SET not_before = now() - interval '1 s'")
        self.world.control.act("UPDATE account_queues SET has_work = true, at_cap = false")
        self.world.step()

    def calls(self) -> int:
        return len(self.api.asked)


@pytest.fixture
def api():
    made = Api()
    made.tables["orders"] = [{"id": n} for n in range(6)]
    yield made
    made.close()


@pytest.fixture
def shop(world, api, client):
    assert client.keys("*") == []
    return Shop(world, api)


def keys(client) -> list[bytes]:
    return list(client.scan_iter("syncward:quota:*"))


def test_a_used_up_quota_defers_every_run_of_its_login_and_no_other(shop, client, shell):
    window = {"type": "MovingWindowCallRatePolicy", "name": "burst"}
    rates = {"rates": [{"limit": 4, "interval": "1h"}]}
    shop.apply(manifest(api_budget={"policies": [{**window, **rates}]}))
    client.config_resetstat()
    before = REGISTRY.get_sample_value("syncward_quota_deferrals_total", {"connector": "rest"})
    assert shop.sync("one").error is None
    assert shop.calls() == 3
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] <= 3 + 1, (
        "one trip for each call"
    )
    held = shop.sync("two")
    assert (held.state, held.attempt, held.error_code) == ("queued", 0, "deferred")
    assert shop.calls() == 4, "the one that was left"
    assert shop.sync("three").error is None
    assert shop.calls() == 7
    after = REGISTRY.get_sample_value("syncward_quota_deferrals_total", {"connector": "rest"})
    assert (after or 0) - (before or 0) == 1
    ticks.presence_tick(shop.world.scheduler)
    with shop.world.cli.inside() as (tx, _, _name):
        why = explanations.explain(tx, held.run_id, runs_max=100)
    assert why.rule is Rule.NOT_BEFORE
    assert "quota burst is used up: 4 calls per 1h, until " in why.sentence
    assert why.expected_start is not None
    left = (why.expected_start - held.queued_at).total_seconds()
    assert 3_500 < left < 3_600 * 1.2
    shop.world.deps.heartbeat.beat()
    code, out, _ = shell("run", "explain", "two")
    assert (code, "quota burst is used up" in out) == (0, True)
    found = keys(client)
    assert len(found) == 2
    for key in found:
        assert re.fullmatch(rb"syncward:quota:[0-9a-f]{32}", key)
        assert 0 < client.pttl(key) <= 3_725_000
        for field, value in client.hgetall(key).items():
            assert re.fullmatch(rb"[0-9a-f: ]*", value), field
        client.delete(key)
    shop.world.deps.quotas._known.clear()
    shop.go_on()
    ended = shop.world.run(held.run_id)
    assert (ended.error, ended.state, ended.attempt) == (None, "succeeded", 1)


def test_what_one_run_is_told_holds_all_of_its_login_back_before_they_ask(shop):
    shop.apply(manifest(api_budget={"policies": [{"type": "UnlimitedCallRatePolicy"}]}))
    shop.api.script.append(Reply(429, {}, {"Retry-After": "3600"}))
    assert shop.sync("one").error_code == "deferred"
    assert shop.calls() == 1
    second = shop.sync("two")
    assert (second.error_code, shop.calls()) == ("deferred", 1)
    assert "closed, as it told us" in (second.error or "")
    used_up = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "3600"}
    shop.api.script.append(Reply(200, {"results": []}, used_up))
    assert shop.sync("three").error is None, "its own calls are over"
    assert shop.calls() == 2
    assert shop.sync("three").error_code == "deferred"
    assert shop.calls() == 2


def test_a_manifest_without_a_quota_asks_redis_nothing(shop, client):
    shop.apply(manifest())
    client.config_resetstat()
    assert shop.sync("one").error is None
    assert "cmdstat_evalsha" not in client.info("commandstats")
    assert keys(client) == []
    assert shop.world.control.all("SELECT 1 FROM keystore.dek WHERE purpose = 'pseudonyms'") == []


def test_a_short_wait_is_waited_in_place_and_counted(shop):
    shop.apply(manifest(rate_limit={"calls": 2, "per": "1s"}))
    waits = [f"syncward_quota_{what}_total" for what in ("waits", "waited_seconds")]
    before = [REGISTRY.get_sample_value(name, {"connector": "rest"}) or 0 for name in waits]
    assert shop.sync("one").error is None
    assert shop.calls() == 3
    after = [REGISTRY.get_sample_value(name, {"connector": "rest"}) or 0 for name in waits]
    assert after[0] - before[0] == 1
    assert 0.5 < after[1] - before[1] < 2


def test_a_run_goes_on_while_redis_is_away(shop, client):
    shop.apply(manifest(rate_limit={"calls": 800, "per": "1h"}))
    shared = shop.world.deps.quotas
    shared.client = open_client("redis://127.0.0.1:1/0")
    with suppress(KeyError):
        del shared.__dict__["_script"]
    assert shop.sync("one").error is None
    assert shop.calls() == 3
    assert keys(client) == []
    shared._back()
