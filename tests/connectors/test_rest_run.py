"""An API as the source of real runs: pages, windows, crashes, limits, logins, drift."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import yaml

from schemas.runs import RunKind
from schemas.streams import StreamSpec
from tests.connectors.conformance.conftest import Engine
from tests.connectors.conformance.ends import PostgresDestination, RestSource
from tests.connectors.conformance.test_limits import child
from tests.integration.test_files import asked
from tests.rest_api import Api, Reply

pytestmark = pytest.mark.integration

CURSOR = {
    "type": "CursorPagination", "cursor_value": "paging.next.after", "page_size": 2,
    "page_token_option": {"field_name": "after"}, "page_size_option": {"field_name": "limit"},
}  # fmt: skip
FIELDS = {
    "id": "integer", "name": "string", "price": "number", "updated_at": "timestamp",
    "tags": "array",
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "version": "1",
    "name": "shop",
    "url_base": "{{ config.url }}",
    "parameters": {"url": {}},
    "authenticator": {"type": "BearerAuthenticator"},
    "check": {"stream_names": ["orders"]},
    "streams": {
        "orders": {
            "path": "/cursor/orders", "record_selector": {"field_path": "results"},
            "primary_key": ["id"], "schema": FIELDS, "paginator": CURSOR,
        },
    },
}  # fmt: skip


def order(number: int, **more: object) -> dict[str, object]:
    at = f"2026-01-{number:02}T00:00:00Z"
    return {"id": number, "name": f"n{number}", "price": 1.5, "updated_at": at, "tags": [], **more}


@pytest.fixture
def api():
    made = Api()
    made.logins = {"Bearer tok-canary-1234"}
    made.tables["orders"] = [order(n) for n in range(1, 6)]
    yield made
    made.close()


class Shop:
    """A world whose source is the API."""

    def __init__(self, world, api, directory) -> None:
        self.world, self.api, self.directory = world, api, directory

    def apply(self, manifest, streams, url: str = "", *, secret: bool = True) -> None:
        file = self.directory / "shop.yaml"
        file.write_text(json.dumps(manifest))
        (self.directory / "token.txt").write_text("tok-canary-1234")
        (self.directory / "lake.pw").write_text(self.world.pair.secret("destination")["password"])
        lake = self.world.pair.config("destination")
        document: dict[str, Any] = {
            "account": "acme",
            "resources": {
                "shop": {
                    "kind": "rest",
                    "config": {"manifest": str(file), "parameters": {"url": url or self.api.url}},
                    "secret": {"token": {"file": "token.txt"}},
                },
                "lake": {
                    "kind": "postgres", "config": lake, "secret": {"password": {"file": "lake.pw"}},
                },
            },
            "connections": {
                "shop-to-lake": {
                    "source": "shop", "destination": "lake", "schedule": "manual",
                    "target": {"schema": "acme"}, "streams": streams,
                },
            },
        }  # fmt: skip
        if not secret:
            del document["resources"]["shop"]["secret"]
        path = self.directory / "doc.yaml"
        path.write_text(yaml.safe_dump(document))
        if not self.world.control.all("SELECT 1 FROM accounts WHERE name = 'acme'"):
            self.world.account()
        self.world.apply_file(path)

    def rows(self, table: str, columns: str = "id") -> list[tuple[Any, ...]]:
        return self.world.pair.rows(
            "destination", f"SELECT {columns} FROM acme.{table} ORDER BY 1, 2"
            if "," in columns else f"SELECT {columns} FROM acme.{table} ORDER BY 1"
        )  # fmt: skip


@pytest.fixture
def shop(world, api, tmp_path):
    return Shop(world, api, tmp_path)


def test_a_manifest_with_cursor_pages_is_read_into_postgres(shop):
    shop.apply(MANIFEST, {"shop.orders": {"mode": "replace"}})
    run, streams = shop.world.sync()
    assert (run.state, run.error) == ("succeeded", None)
    assert streams["orders"].rows_loaded == 5
    found = shop.rows("orders", "id, name, price, updated_at::text, tags, raw->>'price'")
    assert found[0] == (1, "n1", pytest.approx(1.5), "2026-01-01 00:00:00+00", [], "1.5")
    assert [row[0] for row in found] == [1, 2, 3, 4, 5]
    assert [one.query for one in shop.api.asked] == [
        {"limit": "2"}, {"limit": "2", "after": "2"}, {"limit": "2", "after": "4"},
    ]  # fmt: skip
    shop.api.tables["orders"] = [order(n) for n in (1, 2, 4, 5)] + [order(6)]
    _, streams = shop.world.sync()
    result = streams["orders"]
    assert (result.rows_inserted, result.rows_deleted, result.rows_unchanged) == (1, 1, 4)


WINDOWED = {
    **MANIFEST["streams"]["orders"],
    "incremental_sync": {
        "cursor_field": "updated_at", "start_datetime": "2026-01-01T00:00:00Z", "step": "2d",
        "start_time_option": {"field_name": "updated_since"},
        "end_time_option": {"field_name": "updated_until"},
    },
}  # fmt: skip
BY_TIME = {"mode": "merge", "key": ["id"], "cursor": "updated_at", "settle": "0s"}


def state(shop, stream: str) -> tuple[Any, ...]:
    (found,) = shop.world.pair.rows(
        "destination",
        f"SELECT cursor->>'value', result IS NOT NULL FROM _syncward.state "
        f"WHERE stream = 'shop.{stream}'",
    )
    return tuple(found)


def test_a_window_that_is_loaded_counts_and_the_next_attempt_goes_on_behind_it(shop):
    api = shop.api
    api.clock = lambda: datetime(2026, 1, 9, tzinfo=UTC)
    manifest = {**MANIFEST, "streams": {"orders": WINDOWED}}
    shop.apply(manifest, {"shop.orders": BY_TIME})

    def third_window(asked):
        if asked.query["updated_since"] == "2026-01-05T00:00:00Z":
            api.script.append(Reply(429, {}, {"Retry-After": "1800"}))

    api.before = third_window
    waiting = shop.world.enqueue()
    shop.world.step()
    run = shop.world.run(waiting.run_id)
    assert (run.state, run.error_code) == ("queued", "deferred")
    assert shop.rows("orders") == [(n,) for n in range(1, 6)]
    assert state(shop, "orders") == ("2026-01-05T00:00:00+00:00", False)

    api.before = lambda _asked: None
    api.asked.clear()
    api.tables["orders"][4]["name"] = "changed meanwhile"
    shop.world.control.act("UPDATE active_runs SET not_before = now()")
    shop.world.step()
    run = shop.world.run(waiting.run_id)
    assert (run.state, run.error, run.attempt) == ("succeeded", None, 1)
    assert api.asked[0].query["updated_since"] == "2026-01-05T00:00:00Z"
    assert state(shop, "orders") == ("2026-01-09T00:00:00+00:00", True)
    assert shop.rows("orders", "id, name")[4] == (5, "changed meanwhile")

    api.clock = lambda: datetime(2026, 1, 10, tzinfo=UTC)
    api.tables["orders"] += [order(9), order(10)]
    _, streams = shop.world.sync()
    assert streams["orders"].rows_inserted == 2
    _, streams = shop.world.sync(full_refresh=True)
    assert (streams["orders"].cursor_from, streams["orders"].rows_unchanged) == (None, 7)


def test_a_stream_that_fails_leaves_what_is_served_and_the_others_go_on(shop):
    other = {**MANIFEST["streams"]["orders"], "path": "/cursor/lines"}
    manifest = {**MANIFEST, "streams": {"orders": MANIFEST["streams"]["orders"], "lines": other}}
    shop.api.tables["lines"] = [order(1)]
    both = {f"shop.{name}": {"mode": "replace"} for name in ("orders", "lines")}
    shop.apply(manifest, both)
    shop.world.sync()
    shop.api.tables["orders"] = [order(1), order(2), order(3, price="12.50")]
    shop.api.tables["lines"] = [order(1), order(2)]
    run, streams = shop.world.sync()
    assert run.error_code == "streams"
    assert "price of the record with id 3 is no number" in (streams["orders"].error or "")
    assert (len(shop.rows("orders")), len(shop.rows("lines"))) == (5, 2)

    columns = {**FIELDS, "nick": "string"}
    grown = {**MANIFEST["streams"]["orders"], "schema": columns}
    shop.api.tables["orders"] = [order(1, nick="x"), order(2)]
    shop.apply({**manifest, "streams": {"orders": grown, "lines": other}}, both)
    _, streams = shop.world.sync()
    assert [str(c) for c in streams["orders"].schema_changes] == ["column nick text is new"]
    assert shop.rows("orders", "id, nick") == [(1, "x"), (2, None)]


def test_a_dead_login_pauses_the_connection_and_no_token_is_written_anywhere(shop):
    shop.apply(MANIFEST, {"shop.orders": {"mode": "replace"}})
    shop.apply(MANIFEST, {"shop.orders": {"mode": "replace"}}, url=f"{shop.api.url}/")
    run, _ = shop.world.sync()
    assert run.state == "succeeded"
    shop.apply(MANIFEST, {"shop.orders": {"mode": "replace"}}, url="http://10.0.0.1")
    run, _ = shop.world.sync()
    assert (run.state, run.error_code) == ("failed", "egress_refused")
    assert "egress.refused" in shop.world.events(run.run_id)
    shop.apply(MANIFEST, {"shop.orders": {"mode": "replace"}})
    shop.api.logins = set()
    run, _ = shop.world.sync()
    assert (run.state, run.error_code) == ("failed", "credentials")
    assert "connection.paused" in shop.world.events()
    text = shop.world.log(run.run_id)
    assert "refuses the login" in text
    assert "canary" not in text


def test_an_api_without_a_login_is_tested_discovered_and_read_without_any_secret(shop):
    shop.api.logins = None
    manifest = {**MANIFEST, "authenticator": {"type": "NoAuth"}}
    shop.apply(manifest, {"shop.orders": {"mode": "replace"}}, secret=False)
    run, streams = shop.world.sync()
    assert (run.error, streams["orders"].rows_inserted) == (None, 5)
    assert {one.headers.get("authorization") for one in shop.api.asked} == {None}
    assert asked(shop.world, "shop", RunKind.TEST)["login"] == "NoAuth"
    (stream,) = asked(shop.world, "shop", RunKind.DISCOVER)["streams"]
    assert (stream["name"], stream["key"]) == ("shop.orders", ["id"])
    assert stream["columns"][-1] == {"name": "raw", "type": "jsonb", "nullable": False}


# ── kill -9 between two windows ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("mode", "kill_at", "after", "left"),
    [("append", "taken", 3, 2), ("merge", "loaded", 3, 4)],  # a merge takes what lies on a bound,
)
def test_a_worker_killed_between_two_windows_repeats_nothing_and_skips_nothing(  # noqa: PLR0917
    pair, tmp_path, mode, kill_at, after, left
):
    (tmp_path / "files").mkdir()
    source = RestSource(pair, tmp_path / "files")
    source.step, source.page = "1000d", 1
    engine = Engine(source, PostgresDestination(pair, tmp_path / "files"), tmp_path / "files")
    columns = (("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"))
    source.create("orders", columns)
    source.insert(
        "orders",
        [(n, datetime(2000, 1, 1, tzinfo=UTC) + timedelta(days=1_000 * n), "x") for n in range(8)],
    )
    key = {"key": ("id",)} if mode == "merge" else {}
    spec = StreamSpec(name="shop.orders", mode=mode, cursor="changed", **key)
    assert child(engine, spec, kill_at=kill_at, kill_after=after) is None
    assert len(engine.destination.rows("orders") or []) == left
    assert engine.sync(spec).rows_inserted <= 8 - left
    assert engine.same("orders")
    assert engine.sync(spec).rows_inserted == 0


@pytest.mark.parametrize("mode", ["append", "merge"])
def test_a_first_read_in_windows_meets_a_refresh_and_what_an_earlier_life_has_left(
    pair, tmp_path, mode
):
    (tmp_path / "files").mkdir()
    source = RestSource(pair, tmp_path / "files")
    source.step = "1000d"
    engine = Engine(source, PostgresDestination(pair, tmp_path / "files"), tmp_path / "files")
    source.create("orders", (("id", "bigint"), ("changed", "timestamp with time zone")))
    begin = datetime(2006, 1, 1, tzinfo=UTC)  # behind two windows without a record
    source.insert("orders", [(n, begin + timedelta(days=300 * n)) for n in range(20)])
    key = {"key": ("id",)} if mode == "merge" else {}
    spec = StreamSpec(name="shop.orders", mode=mode, cursor="changed", **key)
    engine.sync(spec, rewrite=mode == "append")
    assert engine.same("orders")
    if mode == "append":
        engine.sync(spec, rewrite=True)
        assert engine.same("orders")
        return
    pair.session("destination").execute("DELETE FROM _syncward.state")
    source.delete("orders", 3)
    engine.sync(spec)
    assert len(engine.destination.rows("orders") or []) == 20
    assert engine.sync(spec).rows_inserted == 0
