"""Every manifest where the link is bad: errors and dropped connections in the middle of a page."""

from contextlib import closing
from typing import Any

import pytest

from connectors import registry
from schemas.errors import ConfigError, TransientError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.apis import github, hubspot, salesforce, stripe
from tests.rest_api import Api, Asked, Reply
from tests.world import LOOSE

SINCE = {"kind": "window", "value": "2026-03-01T12:00:00+00:00"}


def of_github() -> tuple[Api, dict[str, str], dict[str, str], str]:
    api = github.GitHub()
    for _ in range(250):
        api.create("issues")
    return api, {"base_url": api.url, "owner": "acme", "repository": "shop"}, {
        "token": github.TOKEN
    }, "github.issues updated_at"  # fmt: skip


def of_hubspot() -> tuple[Api, dict[str, str], dict[str, str], str]:
    api = hubspot.HubSpot()
    api.searches_a_second = 100
    for _ in range(250):
        api.create("deals")
    return api, {"base_url": api.url}, {"token": hubspot.TOKEN}, "hubspot.deals updated_at"


def of_salesforce() -> tuple[Api, dict[str, str], dict[str, str], str]:
    api = salesforce.Salesforce()
    for _ in range(250):
        api.create("Lead")
    parameters = {"instance_url": api.url, "client_id": salesforce.CLIENT}
    secrets = {"client_secret": salesforce.SECRET}
    return api, parameters, secrets, "salesforce.leads system_modstamp"


def of_stripe() -> tuple[Api, dict[str, str], dict[str, str], str]:
    api = stripe.Stripe()
    for _ in range(250):
        api.create("invoices")
    return api, {"base_url": api.url}, {"token": stripe.TOKEN}, "stripe.invoices created"


@pytest.fixture(params=[of_github, of_hubspot, of_salesforce, of_stripe])
def setting(request):
    made = request.param()
    yield made
    made[0].close()


def read(setting: Any, since: dict[str, str] | None) -> list[tuple[Any, ...]]:
    _, parameters, secrets, named = setting
    stream, cursor = named.split(" ")
    config = {"manifest": stream.split(".")[0], "parameters": parameters}
    spec = StreamSpec(name=stream, mode="merge", key=("id",), cursor=cursor, settle="0s")
    with (
        closing(registry.open_source("rest", config, secrets, LOOSE)) as source,
        source.extract(spec, since, WireFormat.ROWS) as batches,
    ):
        return [row for batch in batches for group in batch.groups for row in group.rows]


@pytest.mark.parametrize("since", [None, SINCE], ids=["first", "next"])
def test_a_server_that_stumbles_in_a_page_is_asked_once_more(setting, since):
    api = setting[0]
    pages = len(read(setting, since)) and len(api.asked)
    api.asked.clear()

    def stumbles(_asked: Asked) -> None:
        if len(api.asked) == pages - 1:
            api.script.extend([Reply(drop=True), Reply(503, b"<html>")])

    api.before = stumbles
    rows = read(setting, since)
    assert len(rows) == len({row[0] for row in rows}) == 250
    assert len(api.asked) == pages + 2


def test_an_error_page_under_a_good_status_and_one_that_stays_end_the_read(setting):
    api = setting[0]
    api.before = lambda _asked: api.script.append(Reply(200, b"<html>hunter2"))
    with pytest.raises(ConfigError) as caught:
        read(setting, SINCE)
    assert caught.value.code == "api_answer"
    assert "hunter2" not in str(caught.value)
    api.script.clear()
    api.before = lambda _asked: api.script.append(Reply(401, b"<html>hunter2"))
    with pytest.raises(ConfigError) as refused:
        read(setting, SINCE)
    assert refused.value.code == "credentials"


@pytest.mark.full
def test_a_server_that_stays_down_ends_the_attempt(setting):
    api = setting[0]
    api.before = lambda _asked: api.script.append(Reply(503))
    with pytest.raises(TransientError):
        read(setting, SINCE)
