"""Every pair of connectors keeps what an operator is told about modes, resuming and types."""

import itertools
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from connectors import registry
from schemas.errors import ConfigError, LeaseLost
from schemas.guards import DataGuardTripped
from schemas.records import WireFormat
from tests.connectors.conformance.ends import DESTINATIONS, SOURCES

pytestmark = pytest.mark.integration

ORDERS = (
    ("id", "bigint"), ("changed", "timestamp with time zone"), ("note", "text"),
)  # fmt: skip
THEN = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


def test_every_connector_has_its_fixture():
    assert set(SOURCES) == registry.sources()
    assert {cls.kind for cls in DESTINATIONS.values()} == registry.destinations()


@pytest.fixture
def orders(engine):
    engine.source.create("orders", ORDERS)
    engine.source.insert("orders", [(i, THEN, f"n{i}") for i in range(1, 11)])
    return engine


# ── modes ────────────────────────────────────────────────────────────────────────────────────


def test_replace_holds_what_the_source_holds_and_nothing_else(orders):
    spec = orders.spec("orders", "replace")
    assert orders.sync(spec).rows_inserted == 10
    assert orders.same("orders")
    orders.source.delete("orders", 3)
    orders.source.update("orders", 4, "note", "changed")
    orders.source.insert("orders", [(11, THEN, None)])
    result = orders.sync(spec)
    assert orders.same("orders")
    if orders.compares_rows:
        assert (result.rows_inserted, result.rows_updated, result.rows_unchanged) == (1, 1, 8)
        assert result.rows_deleted == 1


def test_replace_without_a_key_holds_every_row_as_often_as_the_source(engine):
    engine.source.create("bag", (("a", "bigint"), ("b", "text")), key=None)
    engine.source.insert("bag", [(1, "x"), (1, "x"), (2, None)])
    for more in ([], [(3, "")]):
        if more:
            engine.source.insert("bag", more)
        engine.sync(engine.spec("bag", "replace"))
        assert engine.same("bag")


def test_replace_of_an_emptied_table_is_empty(orders):
    spec = orders.spec("orders", "replace")
    orders.sync(spec)
    for i in range(1, 11):
        orders.source.delete("orders", i)
    assert orders.sync(spec).rows_deleted == 10
    assert orders.destination.rows("orders") == []


def test_append_brings_each_row_once(orders):
    spec = orders.spec("orders", "append")
    assert orders.sync(spec).rows_inserted == 10
    assert orders.sync(spec).rows_inserted == 0
    orders.source.insert("orders", [(11, THEN, "new")])
    assert orders.sync(spec).rows_inserted == 1
    assert orders.same("orders")


def test_merge_updates_inserts_and_leaves_the_rest(orders):
    spec = orders.spec("orders", "merge")
    assert orders.sync(spec).rows_inserted == 10
    orders.source.update("orders", 4, "note", "changed")
    orders.source.insert("orders", [(11, datetime.now(UTC), "new")])
    result = orders.sync(spec)
    assert (result.rows_inserted, result.rows_updated) == (1, 1)
    assert orders.same("orders")
    assert orders.sync(spec).rows_loaded == orders.sync(spec).rows_unchanged


def test_history_keeps_what_rows_were_or_is_refused(orders):
    spec = orders.spec("orders", "history")
    if orders.destination.kind == "files":
        with pytest.raises(ConfigError, match="history needs a table") as caught:
            orders.sync(spec)
        assert caught.value.code == "unsupported"
        assert orders.destination.left_over() == []
        return
    assert orders.sync(spec).rows_inserted == 10
    before = orders.source.rows("orders")
    orders.source.update("orders", 4, "note", "changed")
    orders.source.insert("orders", [(11, datetime.now(UTC), "new")])
    result = orders.sync(spec)
    assert (result.rows_inserted, result.rows_updated) == (1, 1)
    versions = {*before, *orders.source.rows("orders")}
    assert sorted(orders.destination.rows("orders")) == sorted(versions, key=str)
    assert orders.sync(spec).rows_loaded == orders.sync(spec).rows_unchanged


def test_a_full_refresh_of_an_append_does_not_double_its_rows(orders):
    spec = orders.spec("orders", "append")
    orders.sync(spec)
    request = orders.request(spec, rewrite=True)
    source, destination = orders.open_source(), orders.open_destination()
    destination.claim_stream(request)
    wire = next(w for w in source.wires if w in destination.wires)
    with source.extract(spec, None, wire) as batches:
        destination.load(request, next(batches))
    source.close()
    destination.close()
    assert orders.same("orders")


def test_another_definition_of_the_stream_reads_everything_again(orders):
    orders.sync(orders.spec("orders", "append"))
    result = orders.sync(orders.spec("orders", "replace"))
    assert result.rows_extracted == 10
    assert orders.same("orders")


# ── resuming ─────────────────────────────────────────────────────────────────────────────────


class Crash(Exception):  # noqa: N818 - an event
    """The worker died here."""


def crash_at(number):
    steps = itertools.count()

    def step(_name):
        if next(steps) == number:
            raise Crash

    return step


@pytest.mark.parametrize("mode", ["append", "merge", "replace"])
def test_a_crash_at_each_step_repeats_nothing_and_skips_nothing(orders, mode):
    spec = orders.spec("orders", mode)
    orders.sync(spec)
    for number in range(100):
        orders.source.insert("orders", [(100 + number, datetime.now(UTC), "x")])
        before = orders.destination.rows("orders")
        try:
            orders.sync(spec, step=crash_at(number))
        except Crash:
            after = orders.destination.rows("orders")
            assert after == before or orders.same("orders")
        else:
            break
        orders.sync(spec)
        assert orders.same("orders")
    assert number > 5
    assert orders.same("orders")
    assert orders.destination.left_over() == []


def test_the_next_attempt_of_a_run_finds_what_the_dead_one_committed(orders):
    spec = orders.spec("orders", "append")
    request = orders.request(spec)
    with pytest.raises(Crash):
        orders.sync(spec, run_id=request.run_id, step=_after_load)
    again = orders.sync(spec, run_id=request.run_id, attempt=2)
    assert (again.rows_inserted, again.attempt) == (10, 1)
    assert orders.same("orders")


def _after_load(name):
    if name == "loaded":
        raise Crash


def test_a_zombie_cannot_write(orders):
    spec = orders.spec("orders", "append")
    orders.sync(spec)
    orders.source.insert("orders", [(11, THEN, "new")])
    source, zombie = orders.open_source(), orders.open_destination()
    old = orders.request(spec)
    cursor = zombie.claim_stream(old).cursor
    orders.sync(spec)
    wire = next(w for w in source.wires if w in zombie.wires)
    with source.extract(spec, cursor, wire) as batches, pytest.raises(LeaseLost):
        zombie.load(old, next(batches))
    assert zombie.highest_fence(orders.connection_id) == orders.fence
    source.close()
    zombie.close()
    orders.sync(spec)
    assert orders.same("orders")
    assert orders.destination.left_over() == []


# ── deletes and guards ───────────────────────────────────────────────────────────────────────


def test_a_merge_that_reads_everything_deletes_what_is_gone_if_told_to(orders):
    spec = orders.spec("orders", "merge", cursor=None)
    orders.sync(spec)
    orders.source.delete("orders", 3)
    assert orders.sync(spec).rows_deleted == 0
    assert len(orders.destination.rows("orders")) == 10
    spec = orders.spec("orders", "merge", cursor=None, deletes="hard")
    orders.sync(spec)
    assert orders.same("orders")


def test_a_key_sweep_finds_deletes_or_is_refused(orders):
    spec = orders.spec("orders", "merge", deletes="hard", key_sweep=1)
    refusals = {"files": "files follow deletes only where", "rest": "no list of keys"}
    refusals |= dict.fromkeys(("singer", "airbyte"), "no list of keys")
    for end in (orders.destination, orders.source):
        if end.kind in refusals:
            with pytest.raises(ConfigError, match=refusals[end.kind]):
                orders.sync(spec)
            return
    orders.sync(spec)
    orders.source.delete("orders", 3)
    assert orders.sync(spec).rows_deleted == 1
    assert orders.same("orders")


def test_every_so_many_runs_everything_is_read(orders):
    spec = orders.spec("orders", "merge", full_every=3)
    read = [orders.sync(spec).cursor_from is None for _ in range(7)]
    assert read == [True, False, False, True, False, False, True]


@pytest.fixture
def many(engine):
    engine.source.create("orders", ORDERS)
    engine.source.insert("orders", [(i, THEN, "x") for i in range(1, 201)])
    return engine


@pytest.mark.parametrize(("gone", "guard"), [(100, "delete_ratio"), (200, "zero_rows")])
def test_guards_keep_what_is_served_until_a_person_has_approved(many, gone, guard):
    spec = many.spec("orders", "replace")
    many.sync(spec)
    before = many.destination.rows("orders")
    for i in range(1, gone + 1):
        many.source.delete("orders", i)
    with pytest.raises(DataGuardTripped) as caught:
        many.sync(spec)
    assert caught.value.code == guard
    assert many.destination.rows("orders") == before
    assert many.destination.left_over() == []
    found = tuple(preview.finding for preview in caught.value.previews)
    assert (found[0].before, found[0].after, found[0].to_delete) == (200, 200 - gone, gone)
    deleted = many.sync(spec, approvals=found).rows_deleted
    assert deleted == gone or not many.compares_rows
    assert many.same("orders")


def test_a_cursor_that_is_far_ahead_asks_a_person(orders):
    if orders.source.kind == "rest":
        pytest.skip("what is ahead is not known before everything is read, and moves no cursor")
    if orders.source.kind in {"singer", "airbyte"}:
        pytest.skip("its cursor is the connector's own, which a row is never compared with")
    orders.source.insert("orders", [(11, datetime.now(UTC) + timedelta(days=30), "x")])
    spec = orders.spec("orders", "merge", cursor="changed")
    with pytest.raises(DataGuardTripped) as caught:
        orders.sync(spec)
    assert caught.value.code == "future_cursor"


# ── values ───────────────────────────────────────────────────────────────────────────────────


def naive(*parts: int) -> datetime:
    year, month, day, hour, minute, second, micro = (*parts, 0, 0, 0, 0)[:7]
    return datetime(year, month, day, hour, minute, second, micro, tzinfo=UTC).replace(tzinfo=None)


TYPES = (
    ("id", "bigint"), ("flag", "boolean"), ("ratio", "double precision"),
    ("price", "numeric(12,2)"), ("amount", "numeric"), ("name", "text"), ("raw", "bytea"),
    ("day", "date"), ("clock", "time without time zone"), ("at", "timestamp without time zone"),
    ("changed", "timestamp with time zone"), ("ref", "uuid"), ("doc", "json"),
)  # fmt: skip
VALUES = [
    (1, True, 0.1, Decimal("1234567890.12"), Decimal("12345.678"), "plain", b"\x00\xff",
     date(2026, 2, 28), time(23, 59, 59, 999_999), naive(2026, 1, 2, 3, 4, 5, 1),
     datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
     UUID("00000000-0000-0000-0000-00000000abcd"), '{"b": 1,  "a": [null, "\\u00e9"]}'),
    (2, False, -1e-300, Decimal("0.00"), Decimal("-0.5"), "", b"", date(1, 1, 1), time(0, 0),
     naive(1, 1, 1), datetime(9999, 12, 31, tzinfo=UTC),
     UUID("ffffffff-ffff-ffff-ffff-ffffffffffff"), "{}"),
    (9_223_372_036_854_775_807, None, None, None, None, None, None, None, None, None, None, None,
     None),
    (-9_223_372_036_854_775_808, True, 1.7976931348623157e308, Decimal("-9999999999.99"),
     Decimal(7), "quote '\" \\ tab\t newline\n \u2028 é 漢 🙂 NULL \\N", b"\\N", date(9999, 12, 31),
     time(12, 30), naive(9999, 12, 31, 23, 59, 59, 999_999), THEN,
     UUID("12345678-1234-5678-1234-567812345678"), "[1.0, 1.00]"),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["replace", "merge"])
def test_every_portable_type_arrives_equal_and_stays_unchanged(engine, mode):
    engine.source.create("typed", TYPES)
    engine.source.insert("typed", VALUES)
    spec = engine.spec("typed", mode, **({"cursor": None} if mode == "merge" else {}))
    assert engine.sync(spec).rows_inserted == 4
    assert engine.destination.rows("typed") == engine.source.rows("typed")
    assert engine.sync(spec).rows_unchanged == (4 if engine.compares_rows or spec.key else 0)


def test_null_is_not_an_empty_text(engine):
    engine.source.create("gaps", (("id", "bigint"), ("a", "text"), ("b", "bytea")))
    engine.source.insert("gaps", [(1, None, None), (2, "", b"")])
    engine.sync(engine.spec("gaps", "replace"))
    assert engine.destination.rows("gaps") == [("1", None, None), ("2", "", "")]


# ── drift ────────────────────────────────────────────────────────────────────────────────────


def grown(orders):
    orders.source.alter('ALTER TABLE "orders" ADD COLUMN extra text')
    orders.source.insert("orders", [(11, datetime.now(UTC), "x", "y")])


@pytest.mark.parametrize("mode", ["append", "merge", "replace"])
def test_evolve_follows_a_new_column(orders, mode):
    spec = orders.spec("orders", mode)
    orders.sync(spec)
    grown(orders)
    result = orders.sync(spec)
    assert [str(change) for change in result.schema_changes] == ["column extra text is new"]
    found = orders.destination.rows("orders")
    assert len(found) == 11
    assert [row[3] for row in found if row[0] == "11"] == ["y"]
    assert {row[3] for row in found} == {"y", None}
    assert orders.sync(spec).schema_changes == ()


@pytest.mark.parametrize("mode", ["append", "merge", "replace"])
def test_freeze_fails_on_a_new_column_and_changes_nothing(orders, mode):
    spec = orders.spec("orders", mode, drift="freeze")
    orders.sync(spec)
    before = orders.destination.rows("orders")
    grown(orders)
    with pytest.raises(ConfigError, match="extra text is new") as caught:
        orders.sync(spec)
    assert caught.value.code == "schema_drift"
    assert orders.destination.rows("orders") == before


def test_ignore_leaves_a_new_column_out(orders):
    spec = orders.spec("orders", "merge", drift="ignore")
    orders.sync(spec)
    grown(orders)
    orders.sync(spec)
    assert {len(row) for row in orders.destination.rows("orders")} == {3}
    assert len(orders.destination.rows("orders")) == 11


def test_a_column_that_is_gone_stays_at_the_destination(orders):
    spec = orders.spec("orders", "merge")
    orders.sync(spec)
    orders.source.alter('ALTER TABLE "orders" DROP COLUMN note')
    orders.source.insert("orders", [(11, datetime.now(UTC))])
    orders.sync(spec)
    assert [row[2] for row in orders.destination.rows("orders") if row[0] == "11"] == [None]
    assert len(orders.destination.rows("orders")) == 11


# ── the seam itself ──────────────────────────────────────────────────────────────────────────


def test_rows_are_bounded_groups_of_the_closed_set_of_types(source_kind, pair, root):
    end = SOURCES[source_kind](pair, root)
    end.create("typed", TYPES)
    end.insert("typed", VALUES)
    from tests.connectors.conformance.conftest import Engine

    engine = Engine(end, None, root)
    source = engine.open_source()
    assert WireFormat.ROWS in source.wires
    with source.extract(engine.spec("typed", "replace"), None, WireFormat.ROWS) as batches:
        (batch,) = batches
        groups = list(batch.groups)
        assert batch.rows() == 4
    allowed = {bool, int, float, Decimal, str, bytes, date, time, datetime, UUID, type(None)}
    assert {type(v) for g in groups for row in g.rows for v in row} <= allowed
    source.close()
