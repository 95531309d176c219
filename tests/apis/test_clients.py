"""Vendors' own clients, fetched for these tests, read our fakes: so the fakes speak the protocol.

What that covers: paths, parameters, pages, logins and errors as these clients send and expect
them. What it does not: limits and delays of the real systems, which are built from their pages.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apis import github, hubspot, salesforce, stripe
from tests.rest_api import Api, Reply

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

_CLIENTS = [
    "stripe==16.1.0", "hubspot-api-client==12.0.0", "simple-salesforce==1.12.10",
    "pygithub==2.10.0",
]  # fmt: skip
_SCRIPT = Path(__file__).with_name("clients.py")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that has the clients and nothing of ours."""
    place = tmp_path_factory.mktemp("clients")
    uv = str(Path(sys.executable).parent / "uv")
    subprocess.run([uv, "venv", "-q", str(place)], check=True, timeout=60)
    interpreter = str(place / "bin" / "python")
    wanted = ["--python", interpreter, *_CLIENTS]
    subprocess.run([uv, "pip", "install", "--system-certs", "-q", *wanted], check=True, timeout=200)
    return interpreter


def read(python: str, api: Api, name: str, *words: object) -> Any:
    done = subprocess.run(
        [python, "-P", str(_SCRIPT), name, api.url, *map(str, words)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    api.close()
    assert done.returncode == 0, done.stderr[-3_000:]
    return json.loads(done.stdout)


def test_stripes_own_client_reads_lists_events_and_errors(python):
    api = stripe.Stripe()
    some = [api.create("customers", name=f"n{n}") for n in range(230)]
    api.edit("customers", some[3], name="edited")
    api.delete("customers", some[4])
    since = api.kept["customers"][4]["created"]
    api.script.append(Reply(503, {}))  # the client tries once more by itself
    found = read(python, api, "stripe", stripe.TOKEN, since)
    assert found == {
        "customers": [[one["id"], one["name"]] for one in api.kept["customers"]],
        "events": [["customer.deleted", some[4]], ["customer.updated", some[3]]],
        "since": 5, "missing": ["resource_missing", "starting_after"], "login": 401,
    }  # fmt: skip


def test_hubspots_own_client_reads_lists_searches_associations_and_errors(python):
    api = hubspot.HubSpot()
    some = [api.create("contacts", firstname=f"n{n}") for n in range(230)]
    firm = api.create("companies", name="Acme")
    api.relate("contacts", some[0], "companies", firm)
    api.archive("contacts", some[5])
    found = read(python, api, "hubspot", hubspot.TOKEN, some[-11], some[0])
    assert found == {
        "alive": [[i, p["firstname"]] for i, p in api.alive("contacts").items()],
        "archived": [[str(some[5]), "n5"]],
        "search": [10, [str(n) for n in some[-10:]]],
        "related": [[str(firm)]], "refused": [400, "VALIDATION_ERROR"],
    }  # fmt: skip


def test_simple_salesforce_reads_soql_bulk_results_describe_and_errors(python):
    api = salesforce.Salesforce()
    some = [api.create("Account", Name=f"n{n}") for n in range(130)]
    api.delete("Account", some[5])
    api.tokens.add("token")
    found = read(python, api, "salesforce", "token")
    names = [one["Name"] for one in api.records["Account"].values()]
    pages = found.pop("bulk")
    assert [len(page) for page in pages] == [51, 51, 30]  # each has a line of names
    assert {page[0] for page in pages} == {'"Id","Name","SystemModstamp"'}
    assert found == {
        "alive": [name for name in names if name != "n5"], "all": names,
        "fields": list(api.fields["Account"]), "refused": [400, "INVALID_FIELD"],
        "login": [401, "INVALID_SESSION_ID"],
    }  # fmt: skip


def test_pygithub_reads_pages_by_their_links(python):
    api = github.GitHub()
    some = [api.create("issues") for _ in range(230)]
    since = int(api.time().timestamp())
    api.edit("issues", some[3], title="edited")
    release = api.create("releases", name="One")
    found = read(python, api, "github", github.TOKEN, since)
    titles = [one["title"] for one in api.kept["issues"] if one["id"] != some[3]]
    assert found == {
        "issues": [*titles, "edited"], "since": [titles[-1], "edited"], "releases": [release],
        "limit": 5_000, "login": 401,
    }  # fmt: skip
