"""Calls wait in the worker while they cannot be stored: bounded, in order, none is stored twice."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY

from connectors.rest.text import route_of
from schemas.calls import STATUS_CLASSES, Call, status_class
from schemas.errors import TransientError
from schemas.redaction import REDACTOR
from storage.calls import RunCall
from tests.unit.test_outcomes import claim
from workers import call_list
from workers.call_list import CallWriter, RunCalls


class Store:
    """Takes calls, or is away."""

    def __init__(self) -> None:
        self.kept: list[RunCall] = []
        self.sizes: list[int] = []
        self.away = False

    def __call__(self, calls):
        if self.away:
            raise TransientError("away")
        self.kept += calls
        self.sizes.append(len(calls))


def call(number: int = 0, route: str = "/orders", status: int | None = 200, **more) -> Call:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    return Call(at, "GET", "api.example", route, status, more.get("error"), 0, number, 5)


def numbers(calls) -> list[int]:
    return [one.call.response_bytes for one in calls]


@pytest.fixture
def store():
    return Store()


def test_calls_that_could_not_be_written_come_before_later_ones(store, monkeypatch):
    monkeypatch.setattr(call_list, "BATCH", 2)
    writer = CallWriter(store)
    store.away = True
    for n in range(3):
        writer.add(RunCall(uuid4(), uuid4(), 1, call(n)))
    with pytest.raises(TransientError):
        writer.flush()
    writer.settle()  # says nothing: the next write brings them
    writer.add(RunCall(uuid4(), uuid4(), 1, call(3)))
    store.away = False
    writer.flush()
    writer.flush()
    assert (numbers(store.kept), store.sizes) == ([0, 1, 2, 3], [2, 2])


def test_of_too_many_the_oldest_are_given_up_and_counted(store, monkeypatch):
    monkeypatch.setattr(call_list, "CALLS_KEPT_MAX", 3)
    before = REGISTRY.get_sample_value("syncward_api_calls_lost_total") or 0
    writer = CallWriter(store)
    for n in range(5):
        writer.add(RunCall(uuid4(), uuid4(), 1, call(n)))
    store.away = True
    with pytest.raises(TransientError):
        writer.flush()
    store.away = False
    writer.flush()
    assert numbers(store.kept) == [2, 3, 4]
    assert REGISTRY.get_sample_value("syncward_api_calls_lost_total") == before + 2


def test_a_writer_that_stops_has_written_everything(store):
    writer = CallWriter(store)
    writer.start()
    for n in range(100):
        writer.add(RunCall(uuid4(), uuid4(), 1, call(n)))
    writer.stop()
    assert numbers(store.kept) == list(range(100))


def test_what_is_noted_is_counted_by_class_and_passes_the_sink(store):
    writer, held = CallWriter(store), claim()
    noted = RunCalls(writer, held, "rest")
    labels = {"connector": "rest", "class": "4xx"}
    before = REGISTRY.get_sample_value("syncward_api_calls_total", labels) or 0
    with REDACTOR.holder() as secrets:
        secrets.know("tok-canary-8271")
        noted.note(call(1, route="/a/tok-canary-8271/b\0", status=404))
    noted.note(call(2, route="/" + "x" * 1_000, status=404))
    writer.flush()
    assert {(c.run_id, c.account_id, c.attempt) for c in store.kept} == {
        (held.run_id, held.account_id, held.attempt)
    }
    first, second = (c.call.route for c in store.kept)
    assert "canary" not in first
    assert "\0" not in first
    assert len(second) <= 300
    noted.note(call(3, route="/half-\ud800", status=404))  # would keep the others from Postgres
    writer.flush()
    assert store.kept.pop().call.route.encode() == b"/half-?"
    assert REGISTRY.get_sample_value("syncward_api_calls_total", labels) == before + 3


def test_every_status_has_a_class_and_failures_are_known():
    assert {status_class(s) for s in (None, 0, 100, 204, 301, 404, 599, 999)} == set(STATUS_CLASSES)
    assert [call(status=s).failed for s in (None, 200, 302, 400, 500)] == [
        True, False, False, True, True,
    ]  # fmt: skip
    assert call(error="api_answer").failed


@pytest.mark.parametrize(
    ("url", "route"),
    [
        ("https://api.example/oauth/token?x=1#y", "/oauth/token"),
        ("https://{{ config.host }}/{{ config.area }}/token", "/{{ config.area }}/token"),
        ("{{ config.endpoint }}", "{{ config.endpoint }}"),
        ("https://api.example", "/"),
    ],
)
def test_the_route_of_a_url_is_its_path_as_it_is_written(url, route):
    assert route_of(url) == route
