"""The manifest `salesforce` against a fake: bulk jobs, SOQL, real runs, edits, deletes, kill -9."""

from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest

from connectors import registry
from schemas.errors import ConfigError, CredentialsError, Deferral, TransientError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.apis.salesforce import CLIENT, SECRET, VERSION, Salesforce
from tests.apis.synced import Synced, at, page_of
from tests.rest_api import Asked, Reply
from tests.world import LOOSE

MERGE = {"mode": "merge", "key": ["id"], "cursor": "system_modstamp", "settle": "0s"}
MORTAL = {**MERGE, "deletes": "soft", "tombstone": "is_deleted"}


@pytest.fixture
def salesforce():
    made = Salesforce()
    yield made
    made.close()


@pytest.fixture
def synced(world, salesforce):
    parameters = {"instance_url": salesforce.url, "client_id": CLIENT}
    return Synced(world, salesforce, "salesforce", parameters, {"client_secret": SECRET})


def accounts(salesforce: Salesforce, number: int) -> list[str]:
    return [
        salesforce.create(
            "Account", Name=f'n{n}, "{n}"\nand more', NumberOfEmployees=n, AnnualRevenue=n + 0.25,
            Founded__c="1999-12-31", Notes__c="é" if n % 2 else None, Score__c=1.5e8,
        )
        for n in range(number)
    ]  # fmt: skip


def same(synced: Synced, kind: str = "Account", table: str = "accounts") -> bool:
    api: Any = synced.api
    more = ", number_of_employees, annual_revenue::float8, notes__c" if kind == "Account" else ""
    names = ["Id", "Name"] + (["NumberOfEmployees", "AnnualRevenue", "Notes__c"] if more else [])
    there = sorted(tuple(one[name] for name in names) for one in api.alive(kind))
    return synced.rows(table, f"id, name{more}") == there


def results(number: int):
    """Say of a request whether it is the one for this page of a job's results."""
    seen = 0

    def is_it(asked: Asked) -> bool:
        nonlocal seen
        seen += asked.path.endswith("/results")
        return asked.path.endswith("/results") and seen == number

    return is_it


@pytest.mark.integration
def test_what_users_do_while_salesforce_is_read_is_there_after_the_next_run(synced, salesforce):
    some = accounts(salesforce, 250)
    salesforce.create("User", Name="Ada", Username="ada@example.org", IsActive=True)
    deal = salesforce.create("Opportunity", Name="Big", Amount=5, StageName="Won")
    synced.apply({"accounts": MORTAL, "opportunities": MORTAL, "users": MERGE})

    def meanwhile() -> None:
        salesforce.edit("Account", some[2], Name="edited behind the reader")
        salesforce.edit("Account", some[240], Name="edited before it")
        salesforce.delete("Account", some[3])
        salesforce.delete("Account", some[241])
        accounts(salesforce, 1)

    at(salesforce, results(2), meanwhile)
    found = synced.sync()
    assert found["accounts"].rows_inserted == 250
    assert (salesforce.jobs, len(salesforce.jobs_removed)) == ({}, 2)
    (shown,) = synced.rows(
        "accounts", "min(founded__c)::text, count(score__c), count(owner_id), count(*)"
    )
    assert shown == ("1999-12-31", 250, 0, 250)
    salesforce.before = lambda _asked: None
    salesforce.time.pass_(hours=1)
    synced.sync()
    assert same(synced)

    salesforce.asked.clear()
    for id_ in some[10:190]:
        salesforce.edit("Account", id_, NumberOfEmployees=7)

    def meanwhile_again() -> None:
        salesforce.edit("Account", some[20], Name="again")
        salesforce.delete("Account", some[30])
        salesforce.tokens.clear()  # the session ends in the middle

    at(salesforce, lambda asked: "/query/01g" in asked.path, meanwhile_again)
    salesforce.edit("Opportunity", deal, StageName="Lost")
    salesforce.undelete("Account", some[3])
    salesforce.time.pass_(hours=1)
    found = synced.sync()
    assert (found["accounts"].rows_updated, found["opportunities"].rows_updated) == (181, 1)
    assert not [one for one in salesforce.asked if "/jobs/" in one.path]
    salesforce.before = lambda _asked: None

    salesforce.fields["Account"]["Custom__c"] = "double"
    for one in salesforce.records["Account"].values():
        one["Custom__c"] = None
    salesforce.edit("Account", some[50], Custom__c=2.5)
    salesforce.time.pass_(hours=1)
    found = synced.sync()
    assert [str(c) for c in found["accounts"].schema_changes] == ["column custom__c numeric is new"]
    assert same(synced)
    assert same(synced, "Opportunity", "opportunities")
    assert same(synced, "User", "users")

    salesforce.erase("Account", some[60])  # nothing tells of it but a full read
    synced.sync(full_refresh=True)
    assert same(synced)


@pytest.mark.integration
@pytest.mark.full
@pytest.mark.parametrize("first", [True, False])
def test_a_worker_killed_in_a_page_loses_nothing_and_repeats_nothing(synced, salesforce, first):
    some = accounts(salesforce, 250)
    synced.apply({"accounts": MORTAL})
    when = results(2)
    if not first:
        synced.sync()
        salesforce.time.pass_(hours=1)
        for id_ in some[:150]:
            salesforce.edit("Account", id_, Name="changed")
        salesforce.delete("Account", some[200])

        def when(asked: Asked) -> bool:
            return "/query/01g" in asked.path

    run = synced.killed_at(when)
    assert (run.state, run.attempt, run.error) == ("succeeded", 2, None)
    assert same(synced)
    assert synced.sync()["accounts"].rows_updated == 0


# ── limits, logins, jobs ─────────────────────────────────────────────────────────────────────


def opened(salesforce: Salesforce) -> Any:
    parameters = {"instance_url": salesforce.url, "client_id": CLIENT}
    config = {"manifest": "salesforce", "parameters": parameters}
    return registry.open_source("rest", config, {"client_secret": SECRET}, LOOSE)


def read(
    salesforce: Salesforce, since: dict[str, str] | None = None, stream: str = "accounts"
) -> list[tuple[Any, ...]]:
    spec = StreamSpec(name=f"salesforce.{stream}", **MERGE)
    with (
        closing(opened(salesforce)) as source,
        source.extract(spec, since, WireFormat.ROWS) as batches,
    ):
        return [row for batch in batches for group in batch.groups for row in group.rows]


SINCE = {"kind": "window", "value": "2026-03-01T12:00:00+00:00"}


def test_the_columns_are_the_fields_that_describe_lists(salesforce):
    accounts(salesforce, 1)
    with closing(opened(salesforce)) as source:
        report = source.test()
        found = {one.name: one for one in source.discover()}
    assert (report.missing, report.login) == ((), "OAuthAuthenticator")
    columns = {c.name: c.type for c in found["salesforce.accounts"].columns}
    assert columns["annual_revenue"] == "numeric"
    assert columns["founded__c"] == "date"
    assert "billing_address" not in columns
    assert found["salesforce.accounts"].suggestion == (
        "{mode: merge, key: [id], cursor: system_modstamp, deletes: soft, tombstone: is_deleted}"
    )


def test_a_result_that_is_forgotten_in_the_middle_is_asked_for_again(salesforce):
    accounts(salesforce, 250)
    at(salesforce, page_of(1, f"{VERSION}/query/01g000000000252-100"), salesforce.locators.clear)
    rows = read(salesforce, SINCE)
    assert len(rows) == len({row[0] for row in rows}) == 250


def test_a_day_of_calls_that_is_used_up_defers_the_run(salesforce):
    accounts(salesforce, 250)
    salesforce.calls_left = 3
    with pytest.raises(Deferral) as caught:
        read(salesforce, SINCE)
    assert caught.value.retry_after is not None
    assert timedelta(minutes=59) < caught.value.retry_after <= timedelta(hours=1)


@pytest.mark.parametrize(
    ("state", "type_", "says"),
    [
        ("Failed", TransientError, "its job failed"),
        ("Aborted", TransientError, "its job failed"),
        ("Resting", ConfigError, "a status that status_mapping does not have"),
    ],
)
def test_a_job_that_does_not_end_well_is_said_to(salesforce, state, type_, says):
    accounts(salesforce, 1)
    salesforce.questions = 2
    assert len(read(salesforce)) == 1
    assert len([one for one in salesforce.asked if "/jobs/query/750" in one.path]) == 5
    salesforce.questions = 0
    salesforce.job_ends = state
    with pytest.raises(type_) as caught:
        read(salesforce)
    assert says in str(caught.value)


def test_results_that_are_no_csv_and_values_of_another_type_are_refused(salesforce):
    accounts(salesforce, 1)

    def answers(body: bytes) -> None:
        salesforce.before = lambda asked: (
            salesforce.script.append(Reply(200, body, {"Content-Type": "text/csv"}))
            if asked.path.endswith("/results")
            else None
        )

    answers(b'"Id","Name"\n"1"\n')
    with pytest.raises(ConfigError) as caught:
        read(salesforce)
    assert caught.value.code == "api_answer"
    answers(b"Id,IsDeleted,SystemModstamp,NumberOfEmployees\n1,false,2026-01-01T00:00:00Z,canary\n")
    with pytest.raises(ConfigError) as caught:
        read(salesforce)
    assert "number_of_employees of the record with id 1 is no integer" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_a_client_that_is_refused_is_a_dead_login(salesforce):
    salesforce.secret = "another"  # noqa: S105 - not one
    with pytest.raises(CredentialsError):
        read(salesforce)
