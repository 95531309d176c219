"""Every call of a run over HTTP is a row: what it was, and nothing that it carried."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from sqlalchemy import text

from scheduler import ticks
from schemas.runs import Run
from storage import calls, retention, tenancy
from storage.engine import transaction
from storage.rowset import rowset
from tests.rest_api import Api, Reply

pytestmark = pytest.mark.integration

SECRET, PLANTED = "client-canary-5512", "canary"
ALL = "SELECT method, route, status, error FROM api_calls ORDER BY at, seq"
MANIFEST: dict[str, Any] = {
    "version": "1",
    "name": "shop",
    "url_base": "{{ config.url }}",
    "parameters": {"url": {}, "area": {}, "login_url": {}},
    "authenticator": {
        "type": "OAuthAuthenticator", "token_refresh_endpoint": "{{ config.login_url }}",
        "client_id": "id-canary",
    },
    "request_headers": {"X-Area": "{{ config.area }}"},
    "check": {"stream_names": ["orders"]},
    "streams": {
        "orders": {
            "path": "/next/{{ config.area }}", "record_selector": {"field_path": "records"},
            "primary_key": ["id"], "schema": {"id": "string"}, "paginator": {
                "type": "NextLink", "next_url": "next",
            },
            "request_parameters": {"q": "query-canary"},
        },
        "items": {
            "path": "/all/{{ config.area }}/{{ partition.order }}/items", "http_method": "POST",
            "request_body_json": {"wanted": "body-canary"}, "primary_key": ["order", "id"],
            "schema": {"id": "string"}, "partition_router": {
                "parent_stream": "orders", "parent_key": "id", "partition_field": "order",
            },
        },
    },
}  # fmt: skip


@pytest.fixture
def api():
    made = Api()
    made.logins = {"Bearer token-canary-77"}
    token = {"access_token": "token-canary-77", "token_type": "bearer"}
    made.routes["/token"] = lambda _: Reply(200, token)
    made.tables["area-canary"] = [{"id": f"o-canary-{n}"} for n in range(3)]
    made.tables["items"] = [{"id": "i-canary-1", "parent": "o-canary-0"}]
    yield made
    made.close()


class Shop:
    """A world whose source is an API of which everything is a canary."""

    def __init__(self, world, api: Api) -> None:
        self.world, self.api = world, api

    def sync(self, *streams: str) -> Run:
        """Read these streams as a run of their own; return how it ended."""
        directory, lake = self.world.directory, self.world.pair.config("destination")
        file = directory / "shop.yaml"
        file.write_text(json.dumps(MANIFEST))
        (directory / "secret.txt").write_text(SECRET)
        (directory / "lake.pw").write_text(self.world.pair.secret("destination")["password"])
        parameters = {
            "url": self.api.url, "area": "area-canary",
            "login_url": f"{self.api.url}/token?a=canary",
        }  # fmt: skip
        document: dict[str, Any] = {
            "account": "acme",
            "resources": {
                "shop": {
                    "kind": "rest", "config": {"manifest": str(file), "parameters": parameters},
                    "secret": {"client_secret": {"file": "secret.txt"}},
                },
                "lake": {
                    "kind": "postgres", "config": lake, "secret": {"password": {"file": "lake.pw"}},
                },
            },
            "connections": {
                "shop-to-lake": {
                    "source": "shop", "destination": "lake", "schedule": "manual",
                    "target": {"schema": "acme"},
                    "streams": {f"shop.{name}": {"mode": "replace"} for name in streams},
                },
            },
        }  # fmt: skip
        path = directory / "doc.yaml"
        path.write_text(yaml.safe_dump(document))
        if not self.world.control.all("SELECT 1 FROM accounts WHERE name = 'acme'"):
            self.world.account()
        self.world.apply_file(path)
        run, _ = self.world.sync()
        return run

    def rows(self) -> list[tuple[Any, ...]]:
        return list(self.world.control.all(ALL))

    def clear(self) -> None:
        self.world.control.act("DELETE FROM api_calls")


@pytest.fixture
def shop(world, api):
    return Shop(world, api)


TOKEN = ("POST", "{{ config.login_url }}", 200, None)
ORDERS = ("GET", "/next/{{ config.area }}", 200, None)
ITEMS = ("POST", "/all/{{ config.area }}/{{ partition.order }}/items", 200, None)


def test_each_call_of_a_run_is_a_row_without_anything_that_it_carried(shop, shell):
    """Tokens, pages behind links, children, redirects, retries, links that end in the middle."""
    api, world = shop.api, shop.world
    run = shop.sync("orders", "items")
    assert run.error is None
    pages = [ORDERS, ORDERS]
    child = [ORDERS, ITEMS, ITEMS, ORDERS, ITEMS]
    assert shop.rows() == [TOKEN, *child, *pages]
    row = world.control.all("SELECT * FROM api_calls WHERE route LIKE '%items' ORDER BY seq DESC")[
        0
    ]
    assert (row[1], row[3], row[4]) == (run.run_id, run.account_id, 1)
    assert row[10] == len(json.dumps({"wanted": "body-canary"}, separators=(",", ":")))
    assert row[11] == len(b"[]")
    assert 0 <= row[12] < 60_000
    api.script.extend([
        Reply(200, {"access_token": "token-canary-77"}),
        Reply(302, {}, {"Location": "/next/area-canary?start=0&moved=canary"}),
        Reply(503, {"canary": "body"}),
        Reply(drop=True),
        Reply(429, {}, {"Retry-After": "0"}),
    ])  # fmt: skip
    shop.clear()
    assert shop.sync("orders").error is None
    failed = [(*ORDERS[:2], 503, None), (*ORDERS[:2], None, "connection_lost")]
    assert shop.rows() == [
        TOKEN, (*ORDERS[:2], 302, None), *failed, (*ORDERS[:2], 429, None), *pages
    ]  # fmt: skip
    whole = world.control.all("SELECT to_jsonb(c)::text FROM api_calls c")
    assert len(whole) == 7
    assert [line for (line,) in whole if PLANTED in line] == []
    assert [line for (line,) in whole if "?" in line] == []
    code, out, _ = shell("run", "calls", "shop-to-lake", "--failed")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["503", "connection_lost", "429"]
    _, out, _ = shell("run", "calls", "acme/shop-to-lake", "--json", "--limit", "2")
    assert [(c["method"], c["route"], c["status"]) for c in json.loads(out)] == [ORDERS[:3]] * 2
    assert set(json.loads(out)[0]) == {
        "at", "attempt", "method", "host", "route", "status", "error", "request_bytes",
        "response_bytes", "milliseconds",
    }  # fmt: skip
    assert world.events().count("calls.read") == 2


def test_calls_of_an_attempt_that_fails_are_there_and_belong_to_its_account_alone(shop):
    api, world = shop.api, shop.world
    world.account("other")
    api.script.extend([
        Reply(200, {"access_token": "token-canary-77"}),
        Reply(200, b"<html>canary", {"Content-Type": "text/html"}),
    ])  # fmt: skip
    run = shop.sync("orders")
    assert run.error_code == "streams"
    assert shop.rows() == [TOKEN, ORDERS]
    api.logins = set()
    shop.clear()
    run = shop.sync("orders")
    assert (run.error_code, shop.rows()) == (
        "credentials", [TOKEN, (*ORDERS[:2], 401, None), TOKEN],
    )  # fmt: skip
    shown = "SELECT count(*) FROM api_calls"
    with world.cli.inside("other/") as (tx, _, _name):
        assert calls.listing(tx, run.run_id) == []
    with world.cli.inside("acme/") as (tx, _, _name):
        assert len(calls.listing(tx, run.run_id)) == 3
        with pytest.raises(Exception, match="permission denied"):
            tx.execute(text("DELETE FROM api_calls"))
    with world.cli.transaction() as tx:
        assert tx.execute(text(shown)).scalar_one() == 0, "in no account"
    for statement in (shown, "UPDATE api_calls SET status = 200", "DELETE FROM api_calls"):
        with world.deps.engine.connect() as tx:
            tenancy.enter(tx, run.account_id)
            with pytest.raises(Exception, match="permission denied"):
                tx.execute(text(statement))
    (other,) = world.control.all("SELECT id FROM accounts WHERE name = 'other'")[0]
    made = calls.RunCall(run.run_id, run.account_id, 1, _stored(world, run).call)
    with world.deps.engine.connect() as tx:
        tenancy.enter(tx, other)
        with pytest.raises(Exception, match="row-level security"):
            tx.execute(calls._APPEND, {"calls": rowset([calls._row(made)])})


def _stored(world, run: Run) -> calls.RunCall:
    with world.cli.inside("acme/") as (tx, _, _name):
        return calls.listing(tx, run.run_id)[0]


def test_calls_go_with_their_run_and_with_their_month(shop, shell):
    world, control = shop.world, shop.world.control
    old, kept = shop.sync("orders"), shop.sync("orders")
    control.act("UPDATE accounts SET plan = 'standard'")
    control.act(
        "UPDATE runs SET finished_at = now() - interval '31 days' WHERE run_id = :id",
        id=old.run_id,
    )
    assert shell("retention")[0] == 0
    left = control.all("SELECT DISTINCT run_id FROM api_calls")
    assert left == [(kept.run_id,)]
    control.act(
        "CREATE TABLE api_calls_202401 PARTITION OF api_calls "
        "FOR VALUES FROM ('2024-01-01') TO ('2024-02-01')"
    )
    control.act("ALTER TABLE api_calls_202401 OWNER TO syncward_owner")
    with transaction(world.scheduler.engine) as tx:
        assert retention.drop_months(tx, world.scheduler.principal) == ["api_calls_202401"]
    parts = "SELECT relname FROM pg_class WHERE relname ~ '^api_calls_[0-9]{6}$'"
    ahead = len(control.all(parts))
    assert ahead == 4
    control.act("DROP TABLE " + max(name for (name,) in control.all(parts)))
    ticks.upkeep_tick(world.scheduler)
    assert len(control.all(parts)) == ahead
    made = _stored(world, kept)
    ahead_of_time = replace(made.call, at=datetime(2099, 1, 1, tzinfo=UTC), route="/late")
    with world.deps.engine.begin() as tx:
        calls.append(tx, [replace(made, call=ahead_of_time)])
    assert control.all(
        "SELECT at < now() + interval '2 days' FROM api_calls WHERE route = '/late'"
    ) == [(True,)]
    assert control.all("SELECT FROM api_calls_default") == [], "or no later month could be made"


def test_a_database_that_takes_no_calls_keeps_no_run_from_its_end(shop):
    """They wait in the worker, and come with the next write."""
    control = shop.world.control
    control.act("REVOKE INSERT ON api_calls FROM syncward_worker")
    assert shop.sync("orders").error is None
    assert shop.rows() == []
    control.act("GRANT INSERT ON api_calls TO syncward_worker")
    shop.world.deps.calls.flush()
    assert shop.rows() == [TOKEN, ORDERS, ORDERS]
