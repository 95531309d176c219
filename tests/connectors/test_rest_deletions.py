"""What an API says is gone: only its key counts, and the row's last known columns stay."""

from contextlib import closing
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from connectors.rest import manifest_files as rest_files
from connectors.rest import trial as rest_trial
from connectors.rest.manifest import Manifest
from connectors.rest.trial import remarks
from schemas.errors import ConfigError
from schemas.streams import StreamSpec
from tests.connectors.test_rest_changes import MERGE, NOW, SINCE, entry, fed, row
from tests.connectors.test_rest_run import CURSOR, MANIFEST, Shop
from tests.rest_api import Asked, Reply
from tests.rest_case import Case
from tests.world import LOOSE

FIRST, LATER = datetime(2026, 1, 10, tzinfo=UTC), datetime(2026, 1, 11, tzinfo=UTC)
SOFT = {**MERGE, "deletes": "soft"}


@pytest.fixture
def api(api):
    api.clock = lambda: NOW
    return api


def gone_of(batch: Any) -> list[Any]:
    return [] if batch.gone is None else [key for group in batch.gone.groups for key in group.rows]


# ── what the source hands over ───────────────────────────────────────────────────────────────


def told(case: Case, stream: dict[str, Any], **spec: Any) -> tuple[list[Any], list[Any]]:
    """The keys of rows that came, and of those that are gone."""
    made = StreamSpec(name="shop.orders", **{**SOFT, **spec})
    with closing(case.open(stream)) as source, source.extract(made, SINCE) as batches:
        (found,) = [
            ([row[0] for group in batch.groups for row in group.rows], gone_of(batch))
            for batch in batches
        ]
    return found


def manifest_of(case: Case, stream: dict[str, Any]) -> Manifest:
    return rest_files.parse(Path(case.write(stream)).read_bytes(), "shop")


ENTRIES = [
    entry("x.deleted", {"id": 2}), entry("x.updated", row(1, day=9)), entry("x.updated", row(2)),
    entry("x.updated", row(3)), entry("x.deleted", {"id": 3}), entry("x.deleted", {"id": 2}),
]  # fmt: skip


def test_the_newest_entry_counts_and_of_a_record_that_is_gone_its_key_alone(case):
    assert told(case, fed(case, ENTRIES)) == ([1, 3], [(2,)])
    assert told(case, fed(case, ENTRIES), deletes="ignore") == ([1, 3], [])


@pytest.mark.parametrize(
    ("deleted", "gone"),
    [({}, [1, 2, 3]), ({"field": "type"}, [1, 2]), ({"field": "type", "values": ["a"]}, [1])],
)
def test_a_list_of_what_was_deleted_needs_no_values(case, deleted, gone):
    entries = [{"type": t, "data": {"object": row(n)}} for n, t in enumerate(["a", "b", ""], 1)]
    rows, keys = told(case, fed(case, entries, deleted=deleted))
    assert ([key for (key,) in keys], rows) == (gone, [n for n in (1, 2, 3) if n not in gone])


def test_what_is_gone_in_one_list_does_not_come_back_from_the_next(case):
    stream = fed(case, [entry("x", row(1)), entry("x", row(2))], deleted=None)
    case.api.routes["/gone"] = lambda _asked: Reply(200, [{"id": 2}])
    stream["changes"].insert(0, {"path": "/gone", "deleted": {}})
    assert told(case, stream) == ([1], [(2,)])


def test_a_key_that_is_gone_is_checked_by_its_type_and_fields_of_a_stub_are_no_drift(case):
    stream = fed(case, [entry("x.deleted", {"id": "hunter2"})])
    error = case.fails(stream, since=SINCE, **SOFT)
    assert (error.code, "id of entry 1 of page 1 is no integer" in str(error)) == (
        "data_refused", True,
    )  # fmt: skip
    stream = fed(case, [entry("x.deleted", {})])
    assert "has no id, which is a part of its key" in str(case.fails(stream, since=SINCE, **SOFT))
    stream = fed(case, [entry("x.deleted", {"id": 1, "object": "thing"})])
    assert told(case, stream, drift="freeze") == ([], [(1,)])


def test_what_deleted_needs_is_said_of_the_manifest(case):
    def parsed(**more: Any) -> Any:
        return manifest_of(case, {**fed(case, []), **more})

    assert parsed(tombstone=None).streams["orders"].tombstone is None
    with pytest.raises(ConfigError, match="deleted needs a primary_key"):
        parsed(primary_key=[])
    with pytest.raises(ConfigError, match="name the field that has these values"):
        parsed(changes=[{"path": "/e", "deleted": {"values": ["x"]}}])
    assert not any("full_every" in text for text in remarks(parsed(tombstone=None)))
    assert any("full_every" in text for text in remarks(parsed(tombstone=None, changes=[
        {"path": "/e"}])))  # fmt: skip


def test_a_trial_looks_at_no_more_than_the_key_and_a_discovery_suggests_deletes(case):
    case.api.tables["orders"] = [row(1)]
    stream = fed(case, [entry("x.deleted", {"id": 2}), entry("x", row(1))])
    stream["schema"]["at"] = {"type": "timestamp", "required": True}
    del stream["tombstone"]
    found = rest_trial.attempt(
        manifest_of(case, stream), {"url": case.api.url}, {}, LOOSE, stream="orders", limit=5
    )
    assert list(found.changes) == [2]
    with closing(case.open(stream)) as source:
        assert source.discover()[0].suggestion == (
            "{mode: merge, key: [id], cursor: at, deletes: soft}"
        )


# ── what becomes of the rows ─────────────────────────────────────────────────────────────────


def manifest_of_customers() -> dict[str, Any]:
    made = deepcopy(MANIFEST)
    made["check"] = {"stream_names": ["soft"]}
    stream = {
        "path": "/cursor/customers", "record_selector": {"field_path": "results"},
        "primary_key": ["id"], "paginator": CURSOR,
        "schema": {"id": "string", "name": "string", "note": "string", "at": "timestamp"},
        "incremental_sync": {"cursor_field": "at", "start_datetime": "2026-01-01"},
        "changes": [
            {"path": "/gone", "deleted": {}},
            {"path": "/changed", "record_selector": {"field_path": "results"}},
        ],
    }  # fmt: skip
    made["streams"] = dict.fromkeys(("soft", "hard", "kept", "versions", "masked"), stream)
    return made


def state_of(world: Any) -> str:
    run, _ = world.sync()
    return str(run.state)


def customer(number: int, name: str) -> dict[str, Any]:
    return {"id": f"c{number}", "name": name, "note": "x", "at": "2026-01-02T00:00:00Z"}


@pytest.mark.integration
def test_a_deletion_stamps_or_deletes_the_row_and_changes_no_column(world, api, tmp_path):
    shop = Shop(world, api, tmp_path)
    base = {"mode": "merge", "key": ["id"], "cursor": "at", "settle": "0s"}
    guards = {"delete_ratio": False}
    api.clock = lambda: FIRST
    api.tables["customers"] = [customer(n, f"n{n}") for n in range(1, 6)]
    shop.apply(manifest_of_customers(), {
        "shop.soft": {**base, "deletes": "soft", "guards": guards},
        "shop.hard": {**base, "deletes": "hard", "guards": guards},
        "shop.kept": base,
        "shop.versions": {**base, "mode": "history", "deletes": "soft", "guards": guards},
        "shop.masked": {
            **base, "deletes": "soft", "mask": {"id": "hmac"}, "columns": {"exclude": ["raw"]},
        },
    })  # fmt: skip
    assert state_of(world) == "succeeded"
    whole = shop.rows("soft", "id, name, note, raw")

    api.clock = lambda: LATER
    gone: list[dict[str, Any]] = [{"id": "c2", "deleted": True}, {"id": "c9"}]
    changed: list[dict[str, Any]] = [customer(2, "stub"), customer(4, "new")]
    api.routes["/gone"] = lambda _asked: Reply(200, gone)
    api.routes["/changed"] = lambda _asked: Reply(200, {"results": changed})
    assert state_of(world) == "succeeded"
    after = shop.rows("soft", "id, name, note, raw")
    assert [one for one in after if one[0] != "c4"] == [one for one in whole if one[0] != "c4"]
    assert after[3][1] == "new"
    stamps = dict(shop.rows("soft", "id, _syncward_deleted_at"))
    assert [one for one, at in stamps.items() if at is not None] == ["c2"]
    assert shop.rows("hard") == [("c1",), ("c3",), ("c4",), ("c5",)]
    assert len(shop.rows("kept")) == 5
    ended = shop.rows("versions", "id, name, _syncward_valid_to IS NULL")
    assert [one for one in ended if one[0] in {"c2", "c4"}] == [
        ("c2", "n2", False), ("c4", "n4", False), ("c4", "new", True),
    ]  # fmt: skip
    assert sum(at is not None for _, at in shop.rows("masked", "id, _syncward_deleted_at")) == 1

    # said once more, and nothing else: nothing happens; a record that is back is served again
    changed.clear()
    before = shop.rows("soft", "id, _syncward_synced_at, _syncward_deleted_at")
    assert state_of(world) == "succeeded"
    assert shop.rows("soft", "id, _syncward_synced_at, _syncward_deleted_at") == before
    gone[:] = []
    changed.append(customer(2, "back"))
    assert state_of(world) == "succeeded"
    assert dict(shop.rows("soft", "id, _syncward_deleted_at"))["c2"] is None
    assert ("c2", "back") in shop.rows("hard", "id, name")


@pytest.mark.integration
def test_keys_alone_are_something_to_do_and_the_guard_looks_at_them(world, api, tmp_path):
    shop = Shop(world, api, tmp_path)
    api.clock = lambda: FIRST
    api.tables["customers"] = [customer(n, f"n{n}") for n in range(10, 20)]
    made = manifest_of_customers()
    made["streams"] = {"soft": made["streams"]["soft"]}
    spec = {
        "mode": "merge", "key": ["id"], "cursor": "at", "settle": "0s", "deletes": "hard",
        "guards": {"floor": 5},
    }  # fmt: skip
    shop.apply(made, {"shop.soft": spec})
    assert state_of(world) == "succeeded"
    api.clock = lambda: LATER
    api.routes["/changed"] = lambda _asked: Reply(200, {"results": []})
    api.routes["/gone"] = lambda _asked: Reply(200, [{"id": "c10"}])
    assert state_of(world) == "succeeded"
    assert len(shop.rows("soft")) == 9

    def nearly_all(_asked: Asked) -> Reply:
        return Reply(200, [{"id": f"c{n}"} for n in range(11, 18)])

    api.routes["/gone"] = nearly_all
    assert state_of(world) == "awaiting_approval"
    assert len(shop.rows("soft")) == 9
