"""The manifest `github` against a fake of its API: real runs, edits between pages, kill -9."""

from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest

from connectors import registry
from schemas.errors import CredentialsError, Deferral
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.apis.github import TOKEN, GitHub, slow_down
from tests.apis.synced import Synced, at, page_of
from tests.world import LOOSE

ISSUES = "/repos/acme/shop/issues"
MERGE = {"mode": "merge", "key": ["id"], "cursor": "updated_at", "settle": "0s"}


@pytest.fixture
def github():
    made = GitHub()
    yield made
    made.close()


@pytest.fixture
def synced(world, github):
    parameters = {"base_url": github.url, "owner": "acme", "repository": "shop"}
    return Synced(world, github, "github", parameters, {"token": TOKEN})


def same(synced: Synced, table: str = "issues", field: str = "title", kind: str = "issues") -> bool:
    api: Any = synced.api
    there = sorted((one["id"], one[field]) for one in api.kept[kind])
    return synced.rows(table, f"id, {field}") == there


@pytest.mark.integration
def test_what_users_do_while_github_is_read_is_there_after_the_next_run(synced, github):
    some = [github.create("issues", state="open" if n % 3 else "closed") for n in range(250)]
    words = [github.create("comments", body=f"b{n}", issue_url="x") for n in range(3)]
    one, two = github.create("releases", name="One"), github.create("releases", name="Two")
    asset = {"name": "a.zip", "size": 2**40, "download_count": 3}
    github.assets[one] = [{"id": 11, **asset}]
    github.assets[two] = [{"id": 12, **asset}]
    github.empty = True
    synced.apply(
        {
            "issues": {**MERGE, "deletes": "hard"}, "issue_comments": MERGE,
            "releases": {"mode": "replace"}, "release_assets": {"mode": "replace"},
            "commits": {"mode": "replace"},
        }
    )  # fmt: skip

    def meanwhile() -> None:
        github.edit("issues", some[1], title="edited behind the reader")  # moves to the end
        github.edit("issues", some[240], title="edited before it")
        github.create("issues")
        github.delete("releases", two)

    at(github, page_of(2, ISSUES), meanwhile)
    found = synced.sync()
    assert (found["issues"].rows_rejected, found["commits"].rows_loaded) == (0, 0)
    assert synced.rows("release_assets", "id, release_id") == [(11, one)]
    github.time.pass_(hours=1)
    synced.sync()
    assert same(synced)

    github.asked.clear()
    github.edit("issues", some[7], title="x", state="closed")
    github.edit("comments", words[1], body="y")
    github.create("commits", sha="abc", commit={
        "message": "m", "author": {"name": "ada", "date": "2026-01-01T00:00:00Z"},
        "committer": {"date": "2026-01-01T00:00:00Z"}}, parents=[])  # fmt: skip
    github.empty = False
    github.time.pass_(hours=1)
    found = synced.sync()
    assert (found["issues"].rows_updated, found["issue_comments"].rows_updated) == (1, 1)
    assert len([asked for asked in github.asked if asked.path == ISSUES]) == 1
    assert same(synced)
    assert same(synced, "issue_comments", "body", "comments")
    assert same(synced, "releases", "name", "releases")
    assert synced.rows("commits", "sha, message") == [("abc", "m")]

    github.delete("issues", some[8])  # nothing tells of it but a full read
    synced.sync(full_refresh=True)
    assert same(synced)


@pytest.mark.integration
@pytest.mark.full
@pytest.mark.parametrize("first", [True, False])
def test_a_worker_killed_in_a_page_loses_nothing_and_repeats_nothing(synced, github, first):
    some = [github.create("issues") for _ in range(250)]
    synced.apply({"issues": MERGE})
    if not first:
        synced.sync()
        github.time.pass_(hours=1)
        for number in some[:150]:
            github.edit("issues", number, title="changed")
    run = synced.killed_at(page_of(2, ISSUES))
    assert (run.state, run.attempt, run.error) == ("succeeded", 2, None)
    assert same(synced)
    assert synced.sync()["issues"].rows_updated == 0


def read(github: GitHub) -> list[tuple[Any, ...]]:
    parameters = {"base_url": github.url, "owner": "acme", "repository": "shop"}
    config = {"manifest": "github", "parameters": parameters}
    spec = StreamSpec(name="github.issues", **MERGE)
    with (
        closing(registry.open_source("rest", config, {"token": TOKEN}, LOOSE)) as source,
        source.extract(spec, None, WireFormat.ROWS) as batches,
    ):
        return [row for batch in batches for group in batch.groups for row in group.rows]


def test_limits_of_github_are_waited_for_or_defer_the_run(github):
    for _ in range(250):
        github.create("issues")
    github.script.append(slow_down(0))
    assert len(read(github)) == 250
    github.left = 1
    with pytest.raises(Deferral) as caught:
        read(github)
    assert caught.value.retry_after is not None
    assert timedelta(minutes=29) < caught.value.retry_after <= timedelta(minutes=30)
    github.left = 5_000
    github.script.append(slow_down(60))
    with pytest.raises(Deferral):
        read(github)


def test_github_is_tested_and_discovered(github):
    parameters = {"base_url": github.url, "owner": "acme", "repository": "shop"}
    config = {"manifest": "github", "parameters": parameters}
    with closing(registry.open_source("rest", config, {"token": TOKEN}, LOOSE)) as source:
        assert source.test().login == "BearerAuthenticator"
        assert source.discover()[0].name == "github.issues"
    assert {one.headers["accept"] for one in github.asked} == {"application/vnd.github+json"}
    assert {one.headers["x-github-api-version"] for one in github.asked} == {"2022-11-28"}


def test_a_token_that_was_revoked_is_a_dead_login(github):
    github.token = "github_pat_other"  # noqa: S105 - not one
    with pytest.raises(CredentialsError):
        read(github)
