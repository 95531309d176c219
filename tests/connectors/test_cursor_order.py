"""Cursors of numbers, texts and uuids: what they promise, what they say, and what mends them."""

from uuid import UUID

import pytest
from pydantic import ValidationError

from schemas.errors import ConfigError
from schemas.streams import StreamSpec
from tests.connectors.followed import followed

pytestmark = pytest.mark.integration

#: The type of a cursor, and values of it in their order.
ORDERED = {
    "bigint": ["-5", "9", "10", "9223372036854775807"],
    "numeric": ["-0.5", "9.99", "10.00", "1e40"],
    "double precision": ["-1e-300", "9.5", "10", "1e300"],
    "text": ["", "9", "a", "ab"],
    "varchar(9)": ["A", "B", "C", "D"],
    "uuid": [str(UUID(int=i)) for i in (0, 9, 10, 2**127)],
}


def merge(cursor: str = "c") -> dict[str, object]:
    return {"mode": "merge", "key": ("id",), "cursor": cursor}


@pytest.mark.parametrize("type_", sorted(ORDERED))
def test_rows_from_the_largest_value_on_are_read_as_the_server_orders_them(pair, type_):
    pair.source(f"CREATE TABLE t (id int PRIMARY KEY, c {type_})")
    stream = followed(pair, "t", **merge())
    assert stream.read() == []
    values = ORDERED[type_]
    for i, value in enumerate(values):
        pair.source(f"INSERT INTO t VALUES ({i}, '{value}')")
        fresh = sorted(stream.read())
        assert fresh == ([0] if i == 0 else [i - 1, i]), "the last value again, and what is new"
    pair.source(f"INSERT INTO t VALUES (90, '{values[-1]}')")  # an equal one that came later
    assert 90 in stream.read()
    assert all(note.startswith("inexact") for note in stream.notes)


def test_numbers_that_commit_out_of_order_are_missed_by_number_and_not_by_xmin_or_time(pair):
    """Two sessions with a cached part of a sequence each, and one that commits late."""
    pair.source(
        "CREATE SEQUENCE numbers CACHE 100",
        "CREATE TABLE t (id int PRIMARY KEY DEFAULT nextval('numbers'), "
        "at timestamptz DEFAULT now())",
    )
    by_number, by_xmin, by_time = (
        followed(pair, "t", **merge("id")),
        followed(pair, "t", mode="append", cursor="xmin"),
        followed(pair, "t", mode="append", cursor="at"),
    )
    with pair.connect("source") as one, pair.connect("source") as two:
        one.execute("INSERT INTO t DEFAULT VALUES")  # 1
        two.execute("INSERT INTO t DEFAULT VALUES")  # 101
        for stream in (by_number, by_xmin, by_time):
            stream.until({1, 101})
        one.execute("INSERT INTO t DEFAULT VALUES")  # 2
        for stream in (by_xmin, by_time):
            stream.until({2})
            assert sorted(stream.seen) == [1, 2, 101]
    by_number.read()
    assert 2 not in by_number.seen
    assert by_number.notes[0].startswith("inexact: rows whose id commits out of order are missed")


def test_uuids_of_times_are_in_order_but_for_those_that_commit_late(pair):
    """They carry the clock of whoever makes them: nothing proves when the last below is here."""
    pair.source("CREATE TABLE t (id uuid PRIMARY KEY DEFAULT uuidv7(), n int)")
    with pytest.raises(ConfigError, match="append by id could miss rows"):
        followed(pair, "t", mode="append", cursor="id").read()
    stream = followed(pair, "t", **merge("id"))
    with pair.connect("source", autocommit=False) as slow:
        slow.execute("INSERT INTO t (n) VALUES (1)")
        pair.source("INSERT INTO t (n) VALUES (2)")
        assert len(stream.read()) == 1
        slow.commit()
    pair.source("INSERT INTO t (n) VALUES (3)")
    stream.read()
    ids = dict(pair.rows("source", "SELECT n, id FROM t"))
    assert set(stream.seen) == {ids[2], ids[3]}
    assert stream.notes[0].startswith("inexact")
    # what mends it: a full read, which `full_every` brings
    stream.cursor = None
    assert set(stream.read()) == set(ids.values())


def test_a_largest_value_that_is_deleted_hides_nothing_that_is_new(pair):
    pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1), (100)")
    stream = followed(pair, "t", **merge("id"))
    stream.until({1, 100})
    pair.source("DELETE FROM t WHERE id = 100")
    stream.read()
    pair.source("INSERT INTO t VALUES (50)")
    assert 50 in stream.read()


@pytest.mark.parametrize("cursor", [["updated_at", "id"], ("at",), []])
def test_a_cursor_of_several_columns_is_refused_with_the_reason(cursor):
    with pytest.raises(ValidationError, match=r"cursor takes one column: .* equal values"):
        StreamSpec.model_validate(
            {"name": "public.t", "mode": "merge", "key": ["id"], "cursor": cursor}
        )


def test_what_has_no_order_is_no_cursor(pair):
    pair.source("CREATE TABLE t (id int PRIMARY KEY, c jsonb, d boolean, e bytea)")
    for column in ("c", "d", "e"):
        with pytest.raises(ConfigError, match="no order; use cursor: xmin"):
            followed(pair, "t", **merge(column)).read()
