"""What vendors' own clients read of an API: run by the interpreter of an environment of their own.

`clients.py CLIENT URL SECRET`; what it read goes to standard output as JSON. Nothing of this
project is there.
"""

import json
import sys
from typing import Any

_URL, _SECRET = sys.argv[2], sys.argv[3]


def of_stripe() -> dict[str, Any]:
    """Read with the official client of Stripe."""
    import stripe  # type: ignore[import-not-found]

    def client(key: str) -> Any:
        return stripe.StripeClient(key, base_addresses={"api": _URL}, max_network_retries=2)

    api = client(_SECRET).v1
    types = ["customer.updated", "customer.deleted"]
    events = api.events.list({"limit": 100, "types": types}).auto_paging_iter()
    found: dict[str, Any] = {
        "customers": [
            [one.id, one.name] for one in api.customers.list({"limit": 100}).auto_paging_iter()
        ],
        "events": [[one.type, one.data.object["id"]] for one in events],
        "since": len(api.customers.list({"created": {"gte": int(sys.argv[4])}}).data),
    }
    try:
        api.customers.list({"starting_after": "cus_none"})
    except stripe.InvalidRequestError as error:
        found["missing"] = [error.code, error.param]
    try:
        client("rk_live_wrong").v1.customers.list()
    except stripe.AuthenticationError as error:
        found["login"] = error.http_status
    return found


def of_hubspot() -> dict[str, Any]:
    """Read with the official client of HubSpot, generated from its published specification."""
    from hubspot import HubSpot  # type: ignore[import-not-found]
    from hubspot.crm.associations.v4 import BatchInputPublicFetchAssociationsBatchRequest  # type: ignore[import-not-found]
    from hubspot.crm.contacts import ApiException, PublicObjectSearchRequest  # type: ignore[import-not-found]

    crm = HubSpot(access_token=_SECRET).crm
    lists, search = crm.contacts.basic_api, crm.contacts.search_api
    batch = crm.associations.v4.batch_api
    for api in (lists, search, batch):
        api.api_client.configuration.host = _URL
    filters = [{"propertyName": "hs_object_id", "operator": "GT", "value": sys.argv[4]}]
    wanted = PublicObjectSearchRequest(
        filter_groups=[{"filters": filters}],
        limit=100,
        properties=["firstname"],
        sorts=[],
        after="0",
    )
    result = search.do_search(public_object_search_request=wanted)
    inputs = BatchInputPublicFetchAssociationsBatchRequest(inputs=[{"id": sys.argv[5]}])
    related = batch.get_page(
        from_object_type="contacts", to_object_type="companies",
        batch_input_public_fetch_associations_batch_request=inputs,
    )  # fmt: skip
    found: dict[str, Any] = {
        "alive": [], "archived": [], "search": [result.total, [one.id for one in result.results]],
        "related": [[to.to_object_id for to in one.to] for one in related.results],
    }  # fmt: skip
    for name, archived in (("alive", False), ("archived", True)):
        after = None
        while True:
            page = lists.get_page(
                limit=100, after=after, properties=["firstname"], archived=archived
            )
            found[name] += [[one.id, one.properties["firstname"]] for one in page.results]
            if page.paging is None:
                break
            after = page.paging.next.after
    try:
        lists.get_page(limit=1_000)
    except ApiException as error:
        found["refused"] = [error.status, json.loads(error.body)["category"]]
    return found


def of_salesforce() -> dict[str, Any]:
    """Read with simple-salesforce, which many connectors stand on; it knows https only."""
    import requests
    from requests.adapters import HTTPAdapter
    from simple_salesforce import Salesforce, SalesforceExpiredSession, SalesforceMalformedRequest  # type: ignore[import-not-found]

    class Plainly(HTTPAdapter):
        def send(self, request: Any, *args: Any, **more: Any) -> Any:
            request.url = request.url.replace("https://", "http://")
            return super().send(request, *args, **more)

    def client(token: str) -> Any:
        session = requests.Session()
        session.mount("https://", Plainly())
        return Salesforce(instance_url=_URL, session_id=token, version="61.0", session=session)

    force = client(_SECRET)
    soql = "SELECT Id, Name, SystemModstamp FROM Account ORDER BY Id"
    pages = list(force.bulk2.Account.query(soql, max_records=50))
    found: dict[str, Any] = {
        "alive": [one["Name"] for one in force.query_all_iter(soql)],
        "all": [one["Name"] for one in force.query_all_iter(soql, include_deleted=True)],
        "bulk": [page.splitlines() for page in pages],
        "fields": [one["name"] for one in force.Account.describe()["fields"]],
    }
    try:
        force.query("SELECT Nothing FROM Account")
    except SalesforceMalformedRequest as error:
        found["refused"] = [error.status, error.content[0]["errorCode"]]
    try:
        client("wrong").query(soql)
    except SalesforceExpiredSession as error:
        found["login"] = [error.status, error.content[0]["errorCode"]]
    return found


def of_github() -> dict[str, Any]:
    """Read with PyGithub."""
    from datetime import UTC, datetime

    from github import Auth, BadCredentialsException, Github  # type: ignore[import-not-found]

    def client(token: str) -> Any:
        return Github(auth=Auth.Token(token), base_url=_URL, per_page=100, retry=None, lazy=True)

    hub = client(_SECRET)
    repository = hub.get_repo("acme/shop")
    since = datetime.fromtimestamp(int(sys.argv[4]), UTC)
    issues = repository.get_issues(state="all", sort="updated", direction="asc")
    found: dict[str, Any] = {
        "issues": [one.title for one in issues],
        "since": [one.title for one in repository.get_issues(state="all", since=since)],
        "releases": [one.id for one in repository.get_releases()],
        "limit": hub.rate_limiting[1],
    }
    try:
        list(client("wrong").get_repo("acme/shop").get_issues())
    except BadCredentialsException as error:
        found["login"] = error.status
    return found


if __name__ == "__main__":
    read = {
        "stripe": of_stripe, "hubspot": of_hubspot, "salesforce": of_salesforce,
        "github": of_github,
    }  # fmt: skip
    print(json.dumps(read[sys.argv[1]]()))  # noqa: T201
