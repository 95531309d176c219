"""The manifest `hubspot` against a fake of the CRM: real runs, edits between pages, kill -9."""

from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from connectors import registry
from connectors.rest import manifest_files
from connectors.rest import trial as rest_trial
from schemas.errors import ConfigError, CredentialsError, Deferral
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.apis.hubspot import TOKEN, HubSpot
from tests.apis.synced import Synced, at, page_of
from tests.world import LOOSE

MERGE = {
    "mode": "merge", "key": ["id"], "cursor": "updated_at", "settle": "0s", "deletes": "soft",
    "tombstone": "archived",
}  # fmt: skip


@pytest.fixture
def hubspot():
    made = HubSpot()
    yield made
    made.close()


@pytest.fixture
def synced(world, hubspot):
    parameters = {"base_url": hubspot.url, "contact_properties": "hobby,shoe_size"}
    return Synced(world, hubspot, "hubspot", parameters, {"token": TOKEN})


def contacts(hubspot: HubSpot, number: int) -> list[int]:
    return [
        hubspot.create("contacts", email=f"c{n}@example.org", firstname=f"f{n}", hobby=f"h{n}")
        for n in range(number)
    ]


def same(synced: Synced, kind: str = "contacts") -> bool:
    """Whether the destination serves what is not archived there, with what it is now."""
    api: Any = synced.api
    name = {"contacts": "firstname", "companies": "name", "deals": "dealname"}[kind]
    there = sorted((i, p.get(name), p.get("hobby")) for i, p in api.alive(kind).items())
    return synced.rows(kind, f"id, {name}, properties->>'hobby'") == there


@pytest.mark.integration
def test_contacts_companies_and_deals_follow_what_users_do_while_they_are_read(synced, hubspot):
    hubspot.searches_a_second = 100
    some = contacts(hubspot, 250)
    firm = hubspot.create("companies", name="Acme", domain="acme.example")
    deal = hubspot.create("deals", dealname="Big", amount="1000.50")
    hubspot.relate("deals", deal, "companies", firm)
    hubspot.relate("deals", deal, "contacts", *some[:3])
    hubspot.relate("contacts", some[0], "companies", firm)
    everything = {"mode": "replace"}
    synced.apply(
        {
            "contacts": MERGE, "companies": MERGE, "deals": MERGE,
            "deal_companies": everything, "deal_contacts": everything,
            "contact_companies": everything,
        }
    )  # fmt: skip
    path = "/crm/v3/objects/contacts"

    def meanwhile() -> None:
        hubspot.edit("contacts", some[5], firstname="edited behind the reader")
        hubspot.edit("contacts", some[220], firstname="edited before it")
        hubspot.archive("contacts", some[7])
        hubspot.archive("contacts", some[230])
        contacts(hubspot, 1)

    at(hubspot, page_of(2, path), meanwhile)
    found = synced.sync()
    assert found["contacts"].rows_inserted == 250
    assert synced.rows("deal_companies", "deal_id, company_id") == [(str(deal), firm)]
    assert synced.rows("deal_contacts", "contact_id") == [(n,) for n in some[:3]]
    assert synced.rows("contact_companies", "contact_id, types->0->>'typeId'") == [
        (str(some[0]), "1")
    ]

    hubspot.before = lambda _asked: None
    hubspot.time.pass_(hours=1)
    synced.sync()
    assert same(synced)
    assert same(synced, "companies")
    assert same(synced, "deals")

    hubspot.asked.clear()
    hubspot.edit("deals", deal, dealname="Bigger")
    hubspot.edit("contacts", some[9], firstname="x")
    hubspot.relate("deals", deal, "contacts", some[4])
    hubspot.time.pass_(hours=1)
    found = synced.sync()
    assert (found["contacts"].rows_updated, found["contacts"].rows_inserted) == (1, 0)
    assert (found["deals"].rows_updated, found["deal_contacts"].rows_deleted) == (1, 3)
    assert path in {one.path for one in hubspot.asked if one.query.get("archived") == "true"}
    assert same(synced)
    assert same(synced, "deals")
    assert synced.rows("deal_contacts", "contact_id") == [(some[4],)]

    hubspot.restore("contacts", some[7])
    hubspot.archive("contacts", some[8])
    hubspot.time.pass_(hours=1)
    synced.sync()
    assert same(synced)
    assert synced.rows("contacts", "id") == sorted((i,) for i in hubspot.alive("contacts"))


@pytest.mark.full  # 10 s
@pytest.mark.integration
def test_a_search_is_read_beyond_its_ten_thousand_and_late_results_are_found(synced, hubspot):
    some = contacts(hubspot, 20)
    synced.apply({"contacts": MERGE})
    synced.sync()
    hubspot.search_results = 200
    hubspot.searches_a_second = 100
    hubspot.time.pass_(hours=1)
    moment = hubspot.time.now
    more = contacts(hubspot, 320)
    for number in more:  # a workflow changes all of them in the same moment
        hubspot.time.now = moment
        hubspot.edit("contacts", number, firstname="all at once")

    def edited_while_it_is_read() -> None:
        hubspot.edit("contacts", more[10], firstname="again, behind")
        hubspot.edit("contacts", more[310], firstname="again, before")
        hubspot.archive("contacts", more[200])
        hubspot.archive("contacts", some[0])

    at(hubspot, page_of(3, "/crm/v3/objects/contacts/search"), edited_while_it_is_read)
    hubspot.time.pass_(minutes=1)
    found = synced.sync()
    assert found["contacts"].rows_inserted in {319, 320}
    hubspot.before = lambda _asked: None
    hubspot.lag = timedelta(seconds=90)  # the search is behind; the list of archived ones is not
    hubspot.edit("contacts", some[3], firstname="late")
    hubspot.time.pass_(seconds=30)
    synced.sync()
    assert not same(synced)
    hubspot.time.pass_(minutes=4)
    synced.sync()
    assert same(synced)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("path", "page"),
    [
        ("/crm/v3/objects/contacts/search", 2),
        pytest.param("/crm/v3/objects/contacts", 2, marks=pytest.mark.full),
    ],
)
def test_a_worker_killed_in_a_page_loses_nothing_and_repeats_nothing(synced, hubspot, path, page):
    hubspot.searches_a_second = 100
    some = contacts(hubspot, 250)
    synced.apply({"contacts": MERGE})
    if path.endswith("search"):
        synced.sync()
        hubspot.time.pass_(hours=1)
        for number in some[:150]:
            hubspot.edit("contacts", number, firstname="changed")
        hubspot.archive("contacts", some[200])
    run = synced.killed_at(page_of(page, path))
    assert (run.state, run.attempt, run.error) == ("succeeded", 2, None)
    assert same(synced)
    assert synced.sync()["contacts"].rows_updated == 0


# ── limits and logins ────────────────────────────────────────────────────────────────────────


def read(hubspot: HubSpot, since: dict[str, str] | None = None) -> list[tuple[Any, ...]]:
    config = {"manifest": "hubspot", "parameters": {"base_url": hubspot.url}}
    spec = StreamSpec(name="hubspot.contacts", **MERGE)
    with (
        closing(registry.open_source("rest", config, {"token": TOKEN}, LOOSE)) as source,
        source.extract(spec, since, WireFormat.ROWS) as batches,
    ):
        return [row for batch in batches for group in batch.groups for row in group.rows]


SINCE = {"kind": "window", "value": "2026-03-01T12:00:00+00:00"}


def test_more_searches_than_a_second_allows_are_told_to_wait_and_all_is_read(hubspot):
    contacts(hubspot, 450)
    hubspot.searches_a_second = 3
    assert len(read(hubspot, SINCE)) == 450
    answers = [one for one in hubspot.asked if one.path.endswith("/search")]
    assert len(answers) > 6, "some of them were refused"


def test_a_trial_reads_a_page_of_each_request_for_changes(hubspot):
    hubspot.time.now = datetime.now(UTC) - timedelta(hours=1)
    some = contacts(hubspot, 5)
    hubspot.archive("contacts", some[0])
    manifest, parameters = manifest_files.of_resource("hubspot"), {"base_url": hubspot.url}
    secrets = {"token": TOKEN}
    tried = rest_trial.attempt(manifest, parameters, secrets, LOOSE, stream="contacts", limit=2)
    assert (len(tried.rows), list(tried.changes)) == (2, [1, 4])
    hubspot.search_results = 0
    with pytest.raises(ConfigError) as caught:
        rest_trial.attempt(manifest, parameters, secrets, LOOSE, stream="contacts", limit=2)
    assert caught.value.code == "api_refused"


def test_a_day_that_is_used_up_defers_the_run_for_an_hour(hubspot):
    contacts(hubspot, 250)
    hubspot.daily_left = 2
    with pytest.raises(Deferral) as caught:
        read(hubspot)
    assert caught.value.retry_after is not None
    assert timedelta(minutes=59) < caught.value.retry_after <= timedelta(hours=1)


def test_a_token_that_ended_is_a_dead_login(hubspot):
    hubspot.expired = True
    with pytest.raises(CredentialsError):
        read(hubspot)
