"""Backfill, reset and purge, of every source with every destination."""

from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from schemas.errors import ConfigError, LeaseLost
from schemas.records import Between, Purge

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
TABLE = (("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"))


def made(engine):
    engine.source.create("t", TABLE)
    days = [(i, BEGIN + timedelta(days=i), f"n{i}") for i in range(1, 31)]
    engine.source.insert("t", days)
    spec = engine.spec("t", "merge", cursor="changed")
    engine.sync(spec)
    return spec


def note(engine, value, *ids):
    """Change rows without their cursor."""
    engine.source.alter(f"UPDATE t SET note = {value} WHERE id IN ({', '.join(map(str, ids))})")


def backfill(engine, spec, lower, upper):
    request = engine.request(spec, backfill=True)
    with closing(engine.open_source()) as source, closing(engine.open_destination()) as lake:
        wire = next(w for w in source.wires if w in lake.wires)
        known = lake.claim_stream(request)
        assert known.cursor is not None
        between = Between(lower=lower, upper=upper)
        with source.extract(spec, None, wire, between=between) as batches:
            (batch,) = batches
            result = lake.load(request, batch)
        again = lake.claim_stream(request)
        assert (again.result, again.cursor) == (result, known.cursor)  # after a kill
        return result


def test_a_window_is_merged_and_the_cursor_stays(engine):
    spec = made(engine)
    note(engine, "'corrected'", 1, 9, 10, 12, 13, 20)
    # rows of the 11th to the 13th: ids 10, 11, 12
    result = backfill(engine, spec, "2026-01-11", "2026-01-14 00:00:00")
    counted = (result.rows_extracted, result.rows_updated, result.rows_unchanged)
    assert (*counted, result.rows_inserted, result.rows_deleted) == (3, 2, 1, 0, 0)
    for i in (1, 9, 13, 20):
        note(engine, f"'n{i}'", i)
    assert engine.same("t")
    assert engine.sync(spec).rows_updated == 0
    for lower, upper in (("soon", "2026-01-14"), ("2026-01-14", "2026-01-14")):
        with pytest.raises(ConfigError):
            backfill(engine, spec, lower, upper)
    uncut = spec.model_copy(update={"cursor": None})
    between = Between(lower="1", upper="2")
    with closing(engine.open_source()) as source:
        batches = source.extract(uncut, None, source.wires[0], between=between)
        with pytest.raises(ConfigError, match="full-refresh"):
            batches.__enter__()


def test_a_number_as_cursor_is_read_as_one(engine, source_kind):
    if engine.source.kind == "rest":
        pytest.skip("an API is asked by time only")
    made(engine)
    spec = engine.spec("t", "merge", cursor="id")
    engine.sync(spec)
    note(engine, "'corrected'", 9)
    result = backfill(engine, spec, "9", "11")
    assert (result.rows_extracted, result.rows_updated) == (2, 1)
    with pytest.raises(ConfigError, match="cursor column id"):
        backfill(engine, spec, "nine", "11")
    if source_kind != "mariadb":  # which compares numbers of any size
        with pytest.raises(ConfigError, match="--to is no"):
            backfill(engine, spec, "9", "99999999999999999999")
    assert engine.same("t")


def test_a_reset_stream_is_read_from_its_beginning_and_a_zombie_cannot_reset(engine):
    spec = made(engine)
    request = engine.request(spec)
    with closing(engine.open_destination()) as lake, closing(engine.open_destination()) as later:
        assert lake.claim_stream(request).cursor is not None
        later.claim_stream(engine.request(spec))
        with pytest.raises(LeaseLost):
            lake.reset(request)
        request = engine.request(spec)
        known = later.claim_stream(request)
        assert later.reset(request).cursor_from == known.cursor
        again = later.claim_stream(request)
        assert (again.cursor, again.result.cursor_to) == (None, None)
    assert engine.same("t")
    result = engine.sync(spec)
    assert (result.rows_extracted, result.rows_unchanged) == (30, 30)


def test_purged_rows_can_be_brought_back_with_their_cursor(engine):
    spec = made(engine)
    with closing(engine.open_destination()) as lake:
        request = engine.request(spec)
        cursor = lake.claim_stream(request).cursor
        assert lake.purge(request, Purge.KEEP).rows_deleted == 30
        assert engine.destination.rows("t") == []
        request = engine.request(spec)
        assert lake.claim_stream(request).cursor is None
        assert lake.purge(request, Purge.UNDO).cursor_to == cursor
    assert engine.same("t")


def test_a_comparison_needs_no_claim_and_shows_what_is_new(engine):
    spec = engine.spec("t", "merge", cursor=None)
    engine.source.create("t", TABLE)
    engine.source.insert("t", [(1, BEGIN, "n")])
    with closing(engine.open_source()) as source, closing(engine.open_destination()) as lake:
        wire = next(w for w in source.wires if w in lake.wires)
        with source.extract(spec, None, wire) as batches:
            shape = next(batches).shape
        assert lake.compare(engine.request(spec), shape).columns is None
        engine.sync(spec)
        view = lake.compare(engine.request(spec), shape)
        assert ([c.name for c in view.columns], view.changes) == (["id", "changed", "note"], ())
