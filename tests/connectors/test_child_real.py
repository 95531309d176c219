"""Connectors of others as they come from PyPI: installed by the command, read into Postgres."""

import json
from contextlib import closing
from datetime import timedelta
from uuid import uuid4

import pytest

from cli import connector_install
from connectors import registry
from schemas.egress import LinkPolicy
from schemas.errors import Conflict
from schemas.records import LoadRequest, WireFormat
from schemas.streams import StreamSpec
from tests.children.installing import policy_of
from workers.outcomes import joined

pytestmark = [pytest.mark.integration, pytest.mark.full, pytest.mark.timeout(900)]


class Sync:
    """One connector and one Postgres, without the runs."""

    def __init__(self, world, root, kind, connector, settings) -> None:
        self.pair, self.kind = world.pair, kind
        self.config = {"connector": connector, "settings": settings}
        self.policy = LinkPolicy(
            loopback=True, tls_required=False, superuser_refused=False, files_root=root.parent,
            children=policy_of(root, unguarded=False, silence=timedelta(minutes=3)),
        )  # fmt: skip
        self.connection, self.fence = uuid4(), 0

    def open(self):
        return registry.open_source(self.kind, self.config, {}, self.policy)

    def run(self, spec):
        self.fence += 1
        request = LoadRequest(self.connection, uuid4(), 1, self.fence, spec, "acme")
        pair, result = self.pair, None
        lake = registry.open_destination(
            "postgres", pair.config("destination"), pair.secret("destination"), self.policy
        )
        with closing(self.open()) as source, closing(lake):
            cursor = lake.claim_stream(request).cursor
            with source.extract(spec, cursor, WireFormat.ROWS) as batches:
                for batch in batches:
                    loaded = lake.load(request, batch)
                    result = loaded if result is None else joined(result, loaded)
        assert result is not None
        return result


@pytest.fixture
def root(world, tmp_path):
    made = tmp_path / "connectors"
    made.mkdir()
    world.cli.settings.connectors_dir = made
    return made


def installed(world, connector) -> None:
    connector_install.install(
        world.cli, connector, None, None, from_source=False, again=False
    )  # fmt: skip


def test_tap_jsonl_from_pypi(world, root, tmp_path):
    installed(world, "tap-jsonl==0.3.1")
    with pytest.raises(Conflict, match="--again"):
        installed(world, "tap-jsonl==0.3.1")
    events = "SELECT body::json->'detail'->>'kind' FROM audit.event WHERE action = :action"
    assert world.control.all(events, action="connector.installed") == [("singer",)]
    files = tmp_path / "files"
    files.mkdir()
    some = [{"id": n, "name": f"n{n}", "price": 1.5, "tags": ["a"]} for n in range(1, 1_201)]
    (files / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = {"path": f"{files}/*.jsonl", "primary_keys": ["id"]}
    sync = Sync(world, root, "singer", "tap-jsonl==0.3.1", settings)
    with closing(sync.open()) as source:
        assert source.test().missing == ()  # it is confined and guarded, too
        (found,) = source.discover()
    assert (found.name, found.key) == ("tap-jsonl.jsonl", ("id",))
    spec = StreamSpec(name="tap-jsonl.jsonl", mode="merge", key=("id",), cursor="state")
    assert sync.run(spec).rows_inserted == 1_200
    rows = world.pair.rows(
        "destination", "SELECT count(*), sum(id), min(raw->>'name'), max(price) FROM acme.jsonl"
    )
    assert rows == [(1_200, 1_200 * 1_201 // 2, "n1", 1.5)]
    again = sync.run(spec)
    assert (again.rows_inserted, again.rows_updated) == (0, 0)
    whole = StreamSpec(name="tap-jsonl.jsonl", mode="replace", key=("id",))
    (files / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some[:1_100]))
    result = sync.run(whole)
    assert (result.rows_extracted, result.rows_deleted) == (1_100, 100)


def test_airbyte_source_faker_from_pypi(world, root):
    installed(world, "airbyte-source-faker==7.2.1")
    settings = {
        "count": 2_500, "seed": 1, "parallelism": 2, "records_per_slice": 500,
        "always_updated": False,
    }  # fmt: skip
    sync = Sync(world, root, "airbyte", "airbyte-source-faker==7.2.1", settings)
    with closing(sync.open()) as source:
        assert source.test().missing == ()
        found = {one.name: one for one in source.discover()}
    assert set(found) == {f"airbyte-source-faker.{n}" for n in ("users", "products", "purchases")}
    users = found["airbyte-source-faker.users"]
    assert (users.key, users.cursors) == (("id",), ("updated_at",))
    spec = StreamSpec(name=users.name, mode="merge", key=("id",), cursor="updated_at")
    assert sync.run(spec).rows_inserted == 2_500
    rows = world.pair.rows(
        "destination", "SELECT count(*), sum(id), count(raw->'address'->>'city') FROM acme.users"
    )
    assert rows == [(2_500, 2_500 * 2_501 // 2, 2_500)]
    again = sync.run(spec)
    assert (again.rows_inserted, again.rows_updated) == (0, 0)
    whole = StreamSpec(name="airbyte-source-faker.products", mode="replace", key=("id",))
    assert sync.run(whole).rows_inserted == 100
    again = sync.run(whole)  # with another time in each row
    assert (again.rows_inserted, again.rows_loaded, again.rows_deleted) == (0, 100, 0)
