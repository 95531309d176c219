"""Resources that are files, through the whole machine: documents, worker, audit, refusals."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import parquet

from cli.records import opened_output
from schemas.accounts import Account
from schemas.errors import ConfigError
from schemas.records import WireFormat
from schemas.runs import RunKind, RunOptions, RunState
from storage import accounts, connections, outputs, resources, runs
from storage.runs import Subject
from storage.work import Work
from tests.connectors.conformance.ends import DESTINATIONS, SqliteSource
from tests.world import OPERATOR
from workers.ends import common_wire

pytestmark = pytest.mark.integration

DOCUMENT = """
account: acme
resources:
  shop: {kind: sqlite, config: {path: shop/orders.db}}
  lake: {kind: files, config: {path: lake, format: jsonl}}
connections:
  shop-to-lake:
    source: shop
    destination: lake
    schedule: manual
    target: {schema: acme}
    streams:
      main.orders: {mode: append, cursor: id}
"""


DOCUMENT_OF_POSTGRES = """
account: acme
resources:
  pg: {kind: postgres, config: CONFIG, secret: {password: {file: shop.pw}}}
  pq: {kind: files, config: {path: pq, format: parquet}}
connections:
  pg-to-pq:
    source: pg
    destination: pq
    schedule: manual
    target: {schema: acme}
    streams:
      public.t: {mode: merge, key: [id], cursor: xmin}
"""


@pytest.fixture
def world(world, tmp_path):
    """The world with a directory of files opened, and one connection between files."""
    root = tmp_path / "root"
    root.mkdir()
    world.deps.settings.__dict__["files_root"] = root
    world.account()
    account = account_of(world)
    world.own = root / str(account.account_id)
    world.deps = replace(world.deps, policy=world.deps.settings.link_policy())
    world.shop = SqliteSource(None, world.own)
    world.lake = DESTINATIONS["files-jsonl"](None, world.own)
    world.shop.create("orders", (("id", "bigint"), ("note", "text")))
    world.shop.insert("orders", [(1, "a"), (2, "")])
    path = world.directory / "files.yaml"
    path.write_text(DOCUMENT)
    world.apply_file(path)
    return world


def account_of(world) -> Account:
    with world.cli.transaction() as tx:
        return accounts.get(tx, "acme")


def test_a_connection_between_files_needs_no_credentials(world):
    run, streams = world.sync()
    assert run.state is RunState.SUCCEEDED
    assert streams["orders"].rows_inserted == 2
    assert world.lake.rows("orders") == world.shop.rows("orders")
    world.shop.insert("orders", [(3, None)])
    run, streams = world.sync()
    assert streams["orders"].rows_inserted == 1
    assert world.lake.rows("orders") == world.shop.rows("orders")
    assert not [e for e in world.events(run.run_id) if e.startswith("credential")]


def test_postgres_goes_into_parquet_with_its_one_credential_audited(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, tags text[], at timestamptz)",
        "INSERT INTO t VALUES (1, '{a,NULL}', '2026-01-02 03:04:05.5+00'), (2, NULL, NULL)",
    )
    (world.directory / "shop.pw").write_text(world.pair.secret("source")["password"])
    config = json.dumps(world.pair.config("source"))
    text = DOCUMENT_OF_POSTGRES.replace("CONFIG", config)
    path = world.directory / "parquet.yaml"
    path.write_text(text)
    world.apply_file(path)
    with world.cli.inside() as (tx, _, _name):
        subject = connections.subject(connections.get(tx, "pg-to-pq"))
        asked_for = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR).run_id
    world.step()
    run = world.run(asked_for)
    assert run.state is RunState.SUCCEEDED, run.error
    (found,) = (world.own / "pq" / "acme" / "t").glob("*.parquet")
    rows = parquet.read_table(found).to_pylist()
    assert [(row["id"], row["tags"]) for row in rows] == [(1, "{a,NULL}"), (2, None)]
    assert world.events(run.run_id).count("credential.unsealed") == 1


def test_without_a_directory_of_files_the_run_says_whom_to_ask(world):
    world.deps = replace(world.deps, policy=replace(world.deps.policy, files_root=None))
    run, _ = world.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "files_refused")
    assert "SYNCWARD_FILES_ROOT" in (run.error or "")


def asked(world, name: str, kind: RunKind) -> dict[str, Any]:
    """What a worker answers about a resource."""
    with world.cli.inside() as (tx, _, _name):
        found = resources.get(tx, name)
        account_id = account_of(world).account_id
        subject = Subject(found.resource_id, account_id, found.resource_id)
        run_id = runs.enqueue(tx, subject, kind, RunOptions(), OPERATOR).run_id
    world.step()
    run = world.run(run_id)
    assert run.state is RunState.SUCCEEDED, run.error
    with world.cli.inside() as (tx, _, _name):
        stored = outputs.stored(tx, run_id)
    return opened_output(world.cli, run, stored)


def test_test_and_discover_ask_the_one_role_that_there_is(world):
    source = asked(world, "shop", RunKind.TEST)
    assert str(source["server_version"]).startswith("SQLite 3.")
    assert (source["missing_as_source"], "missing_as_destination" in source) == ([], False)
    destination = asked(world, "lake", RunKind.TEST)
    assert destination["server_version"] == "files, jsonl"
    assert (destination["missing_as_destination"], "missing_as_source" in destination) == (
        [],
        False,
    )
    (stream,) = asked(world, "shop", RunKind.DISCOVER)["streams"]
    assert (stream["name"], stream["key"]) == ("main.orders", ["id"])


def test_two_ends_without_a_common_format_are_named():
    end: Any = SimpleNamespace
    work = Work("shop-to-lake", end(kind="sqlite"), end(kind="old"), "acme", (), {})
    with pytest.raises(ConfigError, match=r"kind sqlite offers .* kind old takes"):
        common_wire(work, end(wires=(WireFormat.ROWS,)), end(wires=(WireFormat.PG_BINARY,)))
