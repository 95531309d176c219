"""Errors of a page name their stream, request and part of it, and never a value of the URL."""

from collections.abc import Callable
from typing import Any

import pytest

from connectors.rest import batches as rest_batches
from connectors.rest import manifest_files as rest_files
from connectors.rest import trial as rest_trial
from schemas.errors import SyncwardError
from tests.connectors.test_rest_changes import MERGE, NOW, SINCE, entry, fed, row
from tests.connectors.test_rest_run import MANIFEST, WINDOWED, Shop, order
from tests.rest_api import Api, Asked, Reply
from tests.rest_case import Case
from tests.world import LOOSE


@pytest.fixture
def api(api):
    api.clock = lambda: NOW
    return api


def on(number: int, reply: Reply) -> Callable[[Api], None]:
    """Let the so-manieth request be answered so."""

    def prepare(api: Api) -> None:
        def before(_asked: Asked) -> None:
            if len(api.asked) == number:
                api.script.append(reply)

        api.before = before

    return prepare


def place_of(error: SyncwardError, case: Case) -> str:
    text = error.public.removesuffix(")").rpartition(" (")[2]
    assert str(error) == error.public
    assert "canary" not in error.public
    return text.replace(f"127.0.0.1:{case.api.port}", "HOST")


PARAMETERS = {"request_parameters": {"q": "canary", "token": "canary"}}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(404), Reply(400, {"error": "canary"}), Reply(200, b"<html>canary"),
        Reply(200, {"results": "canary"}), Reply(200, {"canary": 1}),
        Reply(200, {"results": [{"id": "canary"}]}), Reply(200, {"results": [{}]}),
        Reply(302, b"", {"Location": "https://canary.example.com/"}),
        Reply(200, {"results": [{"id": 1}], "paging": {"next": {"after": "2"}}}),
    ],
)  # fmt: skip
def test_whatever_is_wrong_with_a_page_says_which_it_was(case, reply):
    case.api.tables["orders"] = [{"id": n} for n in range(1, 6)]
    on(2, reply)(case.api)
    error = case.fails(case.stream("cursor", **PARAMETERS))
    assert error.public.startswith(("shop.orders: ", f"127.0.0.1:{case.api.port}: "))
    assert place_of(error, case) == "GET HOST/cursor/orders, page 2"


def test_a_window_and_a_parents_key_are_named_and_an_odd_key_is_not(case):
    case.api.tables["orders"] = [{"id": "a1"}, {"id": "jane@canary.example"}]
    case.api.tables["lines"] = []
    child = case.stream(
        path="/all/orders/{{ partition.order_id }}/lines",
        partition_router={
            "parent_stream": "orders", "parent_key": "id", "partition_field": "order_id",
        },
    )  # fmt: skip
    parent = case.stream(schema={"id": "string"})
    route = "/all/orders/{{ partition.order_id }}/lines"
    for number, shown in ((2, "order_id a1"), (3, "one order_id")):
        case.api.asked.clear()
        on(number, Reply(404))(case.api)
        error = case.fails(parent, child, name="lines")
        assert place_of(error, case) == f"GET HOST{route}, page 1, {shown}"

    case.api.tables["orders"] = [order(n) for n in range(1, 9)]
    case.api.asked.clear()
    on(3, Reply(404))(case.api)
    stream = case.stream(**{**WINDOWED, "path": "/cursor/orders"})
    spec = {**MERGE, "cursor": "updated_at"}
    assert place_of(case.fails(stream, **spec), case) == (
        "GET HOST/cursor/orders, page 1, from 2026-01-03T00:00:00Z to 2026-01-05T00:00:00Z"
    )
    error = case.fails(fed(case, [entry("x", None)]), since=SINCE, **MERGE)
    assert place_of(error, case) == "GET HOST/events, page 1, from 2026-01-05T00:00:00Z"


def test_a_job_and_a_token_endpoint_are_named_by_their_own_requests(case):
    case.api.routes["/jobs"] = lambda _asked: Reply(500)
    retriever = {
        "status_extractor": "state", "status_mapping": {"running": ["a"], "completed": ["b"]},
        "polling_requester": {"path": "/jobs/{{ creation_response.id }}"},
        "download_requester": {"path": "/jobs/{{ creation_response.id }}/results"},
    }  # fmt: skip
    handler = {"max_retries": 0}
    stream = case.stream(path="/jobs", http_method="POST", retriever=retriever,
                         error_handler=handler)  # fmt: skip
    assert place_of(case.fails(stream), case) == "POST HOST/jobs"
    case.api.routes["/jobs"] = lambda _asked: Reply(200, {"id": "canary", "state": "a"})
    case.api.routes["/jobs/canary"] = lambda _asked: Reply(404)
    assert place_of(case.fails(stream), case) == "GET HOST/jobs/{{ creation_response.id }}"

    case.manifest["authenticator"] = {
        "type": "OAuthAuthenticator", "token_refresh_endpoint": "{{ config.url }}/token",
        "client_id": "x",
    }  # fmt: skip
    case.api.routes["/token"] = lambda _asked: Reply(401, {"error": "canary"})
    error = case.fails(case.stream(), secrets={"client_secret": "canary"})
    assert place_of(error, case) == "POST HOST/token"


def test_a_trial_says_it_too(case):
    case.api.tables["orders"] = [{"id": "x"}]
    manifest = rest_files.parse(open_bytes(case, case.stream(**PARAMETERS)), "shop")
    with pytest.raises(SyncwardError) as caught:
        rest_trial.attempt(manifest, {"url": case.api.url}, {}, LOOSE, stream="orders", limit=5)
    assert place_of(caught.value, case) == "GET HOST/all/orders, page 1"


def open_bytes(case: Case, stream: dict[str, Any]) -> bytes:
    case.write(stream)
    return bytes((case.directory / "shop.yaml").read_bytes())


# ── records that move all the time ───────────────────────────────────────────────────────────


def moving(case: Case) -> dict[str, Any]:
    """A stream of pages by number, in which a new record shows up with each request."""
    rows = case.api.tables["orders"] = [row(n) for n in range(100, 104)]

    def before(_asked: Asked) -> None:
        if len(case.api.asked) < 60:
            rows.insert(0, row(100 - len(case.api.asked)))

    case.api.before = before
    return case.stream("page")


def test_records_that_never_stand_still_are_said(case):
    ((batch, rows),) = case.batches(moving(case))
    assert len(rows) > 10
    (said,) = batch.warnings
    assert "inexact: its pages brought new records each of the 3 times" in said
    case.api.before = lambda _asked: None
    ((batch, _),) = case.batches(case.stream("page"))
    assert batch.warnings == ()


def test_of_many_windows_the_first_is_named(case, monkeypatch):
    monkeypatch.setattr(rest_batches, "_READS_MAX", 0)
    rows = case.api.tables["orders"] = [order(n) for n in range(1, 10)]
    case.api.before = lambda _asked: rows.sort(key=lambda _: len(case.api.asked))
    how = {**WINDOWED["incremental_sync"], "step": "5d"}
    stream = case.stream(
        "page", schema={"id": "integer", "updated_at": "timestamp"}, incremental_sync=how
    )
    ((batch, _),) = case.batches(stream)
    (said,) = batch.warnings
    assert "the window from 2026-01-01T00:00:00Z on" in said


@pytest.mark.integration
def test_a_run_says_in_its_log_that_records_moved_on(world, api, tmp_path, caplog):
    api.clock = lambda: NOW
    case = Case(api, tmp_path)
    stream = moving(case)
    shop = Shop(world, api, tmp_path)
    shop.apply({**MANIFEST, "streams": {"orders": stream}}, {"shop.orders": {"mode": "replace"}})
    asked = world.enqueue()
    api.asked.clear()
    world.step()
    assert world.run(asked.run_id).state == "succeeded"
    assert "inexact: its pages brought new records" in world.log(asked.run_id)
    assert [one.stream for one in caplog.records if one.message == "stream_unsettled"] == [
        "shop.orders"
    ]
