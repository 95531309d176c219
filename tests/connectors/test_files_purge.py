"""A purge of files: they go from the manifest, are kept out of sight for a while, and come back."""

import json
from contextlib import closing
from datetime import UTC, datetime

import pytest

from connectors.files.manifest import Directory
from schemas.errors import ConfigError, LeaseLost
from schemas.records import Purge
from tests.connectors.conformance.conftest import Engine
from tests.connectors.conformance.ends import DESTINATIONS, SqliteSource

ORDERS = (("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"))
NOW = datetime.now(UTC)


@pytest.fixture
def engine(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    made = Engine(SqliteSource(None, root), DESTINATIONS["files-jsonl"](None, root), root)
    made.source.create("orders", ORDERS)
    made.source.insert("orders", [(i, NOW, f"n{i}") for i in range(1, 101)])
    return made


@pytest.fixture
def spec(engine):
    made = engine.spec("orders", "merge")
    engine.sync(made)
    return made


def purge(engine, spec, how):
    request = engine.request(spec)
    with closing(engine.open_destination()) as lake:
        assert lake.claim_stream(request).result is None
        result = lake.purge(request, how)
        assert lake.claim_stream(request).result == result  # a second attempt is told
        return result


def there(engine) -> set[str]:
    folder = engine.destination.root / "acme" / "orders"
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {
        ".lock", "manifest.json",
    }  # fmt: skip


def test_files_go_out_of_sight_and_come_back_as_they_were(engine, spec):
    before = engine.destination.manifest("orders")
    names = {part["name"] for part in before["files"]}
    result = purge(engine, spec, Purge.KEEP)
    assert (result.rows_deleted, result.cursor_to) == (100, None)
    now = engine.destination.manifest("orders")
    assert (now["files"], now["cursor"]) == ([], None)
    assert there(engine) == {".purged/kept.json", *(f".purged/{name}" for name in names)}
    kept = engine.destination.root / "acme" / "orders" / ".purged"
    assert kept.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="are kept until"):
        purge(engine, spec, Purge.KEEP)
    result = purge(engine, spec, Purge.UNDO)
    assert (result.rows_inserted, result.cursor_to) == (100, before["cursor"])
    assert there(engine) == names
    after = engine.destination.manifest("orders")
    told = {"generation", "fence", "claimed_by", "run_id", "result", "retired", "updated_at"}
    assert {k: v for k, v in after.items() if k not in told} == {
        k: v for k, v in before.items() if k not in told
    }
    assert engine.same("orders")
    assert engine.sync(spec).rows_inserted == 0
    with pytest.raises(ConfigError, match="no purged rows are kept"):
        purge(engine, spec, Purge.UNDO)


def test_readers_keep_the_files_of_before_for_the_grace_unless_all_goes_at_once(engine):
    engine.destination.config["grace"] = "1h"
    spec = engine.spec("orders", "merge")
    engine.sync(spec)
    names = {part["name"] for part in engine.destination.manifest("orders")["files"]}
    purge(engine, spec, Purge.KEEP)
    assert names < there(engine)
    assert purge(engine, spec, Purge.UNDO).rows_inserted == 100
    assert there(engine) == names
    engine.source.update("orders", 5, "note", "new")
    engine.sync(engine.spec("orders", "merge", cursor=None))
    purge(engine, spec, Purge.KEEP)
    assert len(there(engine)) > len(names)
    assert purge(engine, spec, Purge.NOW).rows_deleted == 0
    assert there(engine) == set()
    assert engine.sync(spec).rows_inserted == 100
    assert engine.same("orders")


def test_what_was_loaded_since_is_not_undone_and_what_is_kept_expires(engine, spec):
    purge(engine, spec, Purge.KEEP)
    assert engine.sync(spec).rows_inserted == 100
    with pytest.raises(ConfigError, match="a run has loaded it since"):
        purge(engine, spec, Purge.UNDO)
    assert engine.same("orders")
    record = engine.destination.root / "acme" / "orders" / ".purged" / "kept.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "until": "2026-01-01T00:00Z"}))
    engine.sync(spec)
    assert not record.parent.exists()
    purge(engine, spec, Purge.NOW)
    assert engine.destination.rows("orders") == []


def test_a_stream_that_was_reset_comes_back_without_its_cursor(engine, spec):
    purge(engine, spec, Purge.KEEP)
    request = engine.request(spec)
    with closing(engine.open_destination()) as lake:
        lake.claim_stream(request)
        lake.reset(request)
    result = purge(engine, spec, Purge.UNDO)
    assert (result.rows_inserted, result.cursor_to) == (100, None)
    assert engine.sync(spec).rows_unchanged == 100


@pytest.mark.parametrize("how", [Purge.KEEP, Purge.UNDO, Purge.NOW])
def test_an_attempt_that_dies_before_the_manifest_has_done_nothing(engine, spec, how, monkeypatch):
    if how is Purge.UNDO:
        purge(engine, spec, Purge.KEEP)
    rows, replaced = engine.destination.rows("orders"), Directory._replace

    def dies(self, manifest):
        if manifest.generation > engine.destination.manifest("orders")["generation"]:
            raise KeyboardInterrupt
        replaced(self, manifest)

    with monkeypatch.context() as patched:
        patched.setattr(Directory, "_replace", dies)
        with pytest.raises(KeyboardInterrupt):
            purge(engine, spec, how)
    assert engine.destination.rows("orders") == rows
    result = purge(engine, spec, how)
    assert result.rows_deleted + result.rows_inserted == 100
    assert len(engine.destination.rows("orders")) == (100 if how is Purge.UNDO else 0)


def test_a_run_that_was_replaced_purges_nothing(engine, spec):
    old, new = engine.request(spec), engine.request(spec)
    with closing(engine.open_destination()) as lake, closing(engine.open_destination()) as later:
        lake.claim_stream(old)
        later.claim_stream(new)
        for how in (Purge.KEEP, Purge.NOW):
            with pytest.raises(LeaseLost):
                lake.purge(old, how)
    assert engine.same("orders")
    assert not (engine.destination.root / "acme" / "orders" / ".purged").exists()


def test_nothing_is_purged_of_a_stream_that_was_never_loaded(engine):
    with pytest.raises(ConfigError, match="nothing to purge"):
        purge(engine, engine.spec("orders", "merge"), Purge.KEEP)
