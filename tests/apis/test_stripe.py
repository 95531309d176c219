"""The manifest `stripe` against a fake of lists and events: real runs, edits, deletes, kill -9."""

from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest

from connectors import registry
from schemas.errors import CredentialsError, Deferral, ReadAgain, TransientError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.apis.stripe import TOKEN, Stripe, limited
from tests.apis.synced import Synced, at, page_of
from tests.rest_api import Asked
from tests.world import LOOSE

MERGE = {"mode": "merge", "key": ["id"], "cursor": "created", "settle": "0s"}
MORTAL = {**MERGE, "deletes": "hard"}


@pytest.fixture
def stripe():
    made = Stripe()
    yield made
    made.close()


@pytest.fixture
def synced(world, stripe):
    return Synced(world, stripe, "stripe", {"base_url": stripe.url}, {"token": TOKEN})


def customers(stripe: Stripe, number: int) -> list[str]:
    return [
        stripe.create("customers", email=f"c{n}@example.org", name=f"n{n}", balance=n)
        for n in range(number)
    ]


def same(synced: Synced, kind: str = "customers", field: str = "name") -> bool:
    api: Any = synced.api
    there = sorted((one["id"], one.get(field)) for one in api.kept[kind])
    return synced.rows(kind, f"id, {field}") == there


@pytest.mark.integration
def test_what_users_do_while_stripe_is_read_is_there_after_the_next_run(synced, stripe):
    some = customers(stripe, 230)
    product = stripe.create("products", name="Tea", active=True)
    ended = stripe.create("subscriptions", customer=some[0], status="active", items={"data": []})
    stripe.create("balance_transactions", amount=100, fee=3, net=97, currency="eur")
    synced.apply(
        {
            "customers": MORTAL, "subscriptions": MERGE,
            "products": {**MORTAL, "mode": "history", "deletes": "soft"},
            "balance_transactions": {**MERGE, "mode": "append", "key": []},
        }
    )  # fmt: skip

    def meanwhile() -> None:
        stripe.edit("customers", some[229], name="edited behind the reader")
        stripe.edit("customers", some[3], name="edited before it")
        stripe.delete("customers", some[228])
        stripe.delete("customers", some[4])
        stripe.delete("customers", some[130])  # the last of the first page: the next begins there
        customers(stripe, 1)

    at(stripe, page_of(2, "/v1/customers"), meanwhile)
    stripe.time.pass_(seconds=5)
    found = synced.sync()
    assert found["customers"].rows_loaded >= 228
    stripe.before = lambda _asked: None
    stripe.time.pass_(hours=1)
    synced.sync()
    assert same(synced)

    stripe.asked.clear()
    stripe.edit("customers", some[10], name="first")
    stripe.edit("customers", some[10], name="second", same_second=True)
    stripe.edit("customers", some[11], name="last words")
    stripe.delete("customers", some[11])
    stripe.edit("products", product, name="Coffee", active=False)
    stripe.edit("subscriptions", ended, status="canceled")
    stripe.create("balance_transactions", amount=200, fee=6, net=194, currency="eur")
    stripe.time.pass_(hours=1)
    found = synced.sync()
    done = found["customers"]
    assert (done.rows_inserted, done.rows_updated, done.rows_deleted) == (0, 1, 1)
    assert {one.path for one in stripe.asked} == {"/v1/events", "/v1/balance_transactions"}
    assert same(synced)
    versions = "name, active, _syncward_valid_to IS NULL"
    assert synced.rows("products", versions) == [("Coffee", False, True), ("Tea", True, False)]
    assert same(synced, "subscriptions", "status")
    assert same(synced, "balance_transactions", "amount")

    stripe.edit("customers", some[12], name="forgotten by the events")
    stripe.delete("customers", some[13])
    stripe.time.pass_(days=40)
    stripe.edit("customers", some[14], name="new")
    run, _ = synced.world.sync()
    assert (run.state, run.error) == ("succeeded", None)
    assert "does not know any more what has changed since then" in synced.world.log(run.run_id)
    assert same(synced)


@pytest.mark.integration
@pytest.mark.full
@pytest.mark.parametrize("first", [True, False])
def test_a_worker_killed_in_a_page_loses_nothing_and_repeats_nothing(synced, stripe, first):
    some = customers(stripe, 230)
    synced.apply({"customers": MORTAL})
    if not first:
        synced.sync()
        stripe.time.pass_(hours=1)
        for id_ in some[:150]:
            stripe.edit("customers", id_, name="changed")
        stripe.delete("customers", some[160])
    run = synced.killed_at(page_of(2, "/v1/customers" if first else "/v1/events"))
    assert (run.state, run.attempt, run.error) == ("succeeded", 2, None)
    assert same(synced)
    assert synced.sync()["customers"].rows_updated == 0


# ── limits, logins, places that are gone ─────────────────────────────────────────────────────


SINCE = {"kind": "window", "value": "2026-03-01T12:00:00+00:00"}


def read(stripe: Stripe, since: dict[str, str] | None = None) -> list[tuple[Any, ...]]:
    config = {"manifest": "stripe", "parameters": {"base_url": stripe.url}}
    spec = StreamSpec(name="stripe.customers", **MORTAL)
    with (
        closing(registry.open_source("rest", config, {"token": TOKEN}, LOOSE)) as source,
        source.extract(spec, since, WireFormat.ROWS) as batches,
    ):
        return [row for batch in batches for group in batch.groups for row in group.rows]


def test_the_newest_event_of_an_object_counts_and_an_end_is_one(stripe):
    one, two = customers(stripe, 2)
    for number in range(250):
        stripe.edit("customers", one, name=f"v{number}")
    stripe.delete("customers", two)
    rows = {row[0]: row for row in read(stripe, SINCE)}
    assert (rows[one][2], two in rows) == ("v249", False)


def test_a_place_in_the_list_that_is_gone_begins_the_pages_again(stripe):
    some = customers(stripe, 150)
    at(stripe, page_of(2, "/v1/customers"), lambda: stripe.delete("customers", some[50]))
    rows = read(stripe)
    assert sorted(row[0] for row in rows) == sorted(some)
    assert [one.query.get("starting_after") for one in stripe.asked] == [
        None, some[50], None, some[49]
    ]  # fmt: skip


def test_a_list_whose_places_are_always_gone_is_read_another_time(stripe):
    some = iter(customers(stripe, 150)[50:])

    def always(asked: Asked) -> None:
        if "starting_after" in asked.query:
            stripe.delete("customers", asked.query["starting_after"])
            next(some)

    stripe.before = always
    with pytest.raises(TransientError) as caught:
        read(stripe)
    assert caught.value.code == "api_unavailable"


def test_some_limits_are_waited_out(stripe):
    some = customers(stripe, 3)
    stripe.script.append(limited())
    assert len(read(stripe)) == len(some)


@pytest.mark.full  # it waits longer each time
def test_a_storm_of_limits_defers_the_run(stripe):
    stripe.script.extend(limited() for _ in range(50))
    with pytest.raises(Deferral) as caught:
        read(stripe)
    assert caught.value.retry_after is not None
    assert timedelta(seconds=10) < caught.value.retry_after < timedelta(minutes=1)


def test_a_cursor_from_before_the_events_reads_everything(stripe):
    customers(stripe, 3)
    with pytest.raises(ReadAgain):
        read(stripe, {"kind": "window", "value": "2026-01-01T00:00:00+00:00"})


def test_a_key_that_was_rolled_is_a_dead_login(stripe):
    stripe.token = "rk_live_another"  # noqa: S105 - not one
    with pytest.raises(CredentialsError):
        read(stripe)
