"""Records as rows: those that are made together are those that are made one by one, to the type."""

from decimal import Decimal
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from connectors.portable import travels_as
from connectors.rest import exact_json, reading
from connectors.rest.manifest import Manifest, Stream
from connectors.rest.reading import Once
from connectors.rest.rows import Rows
from connectors.rest.values import Type
from connectors.row_groups import BYTES_MAX, ROWS_MAX, Grouping, sizes, sizes_of_all
from schemas.errors import ConfigError
from schemas.records import Row, RowGroup
from schemas.streams import StreamSpec

MANIFEST = yaml.safe_load("""
version: "1"
name: crm
url_base: https://crm.example
check: {stream_names: [things]}
streams:
  things:
    path: /things
    record_selector: {field_path: data}
    primary_key: [id]
    schema:
      id: integer
      name: string
      amount: number
      active: boolean
      at: timestamp
      naive: {type: timestamp, format: iso_utc}
      since: {type: timestamp, format: epoch}
      day: date
      thing: object
      list: array
      zip: {type: string, field: thing.zip}
""")
STREAM = Manifest.model_validate(MANIFEST).streams["things"]

#: Values that come close to what a field takes, from both sides.
ODD: dict[str, list[Any]] = {
    "id": [0, -1, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, True, Decimal("1.0"), "1"],
    "name": ["", "a", "ü", "\x00", "a\x00b", "\ud800", "x" * 3_000, 1, False, ["a"]],
    "amount": [Decimal("-0.0"), Decimal("1.00"), Decimal("1E-400"), 10**40, 7, True, "1.5"],
    "active": [True, False, 0, 1, "true"],
    "at": [
        "2026-01-31T23:59:59Z", "2026-01-31T23:59:59.123Z", "2026-01-31T23:59:59.123456Z",
        "2026-01-31T23:59:59.1Z", "2026-01-31T23:59:59+02:00", "2026-01-31T23:59:59-0930",
        "2026-01-31T24:00:00Z", "2026-02-30T00:00:00Z", "0000-01-01T00:00:00Z",
        "2026-W05-6T23:59:59Z", "20260131T235959Z0000", "2026-01-31T23:59:59z",
        "2026-01-31 23:59:59Z", "2026-01-31T23:59:59", "٢026-01-31T23:59:59Z",
        "2026-01-31/23:59:59Z", "2026-01-31T23:59:59Z/026", "9999-12-31T23:59:59-14:00", 5, "",
    ],
    "day": [
        "2026-01-31", "2026-02-30", "0000-00-00", "9999-12-31", "20260131", "2026/01/31",
        "2026-1-31/", "٢026-01-31", 20260131, "",
    ],
    "thing": [{}, {"zip": "1"}, {"zip": 1}, {"a": {"b": [None, Decimal("0.10")]}}, {"\x00": 1},
              {"a": "\ud800"}, [], "{}"],
    "list": [[], [1, [2]], ["\x00"], {}, "[]"],
}  # fmt: skip
ODD["naive"] = ODD["at"]
ODD["since"] = [0, -1, 10**10, Decimal("1.5"), "12.25", "x", 10**30, True]
RECORDS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={name: st.none() | st.sampled_from(values) for name, values in ODD.items()}
        | {"unknown": st.integers()},
    ),
    max_size=6,
)
#: One with nothing amiss, so that whole columns are taken together.
WELL: dict[str, list[Any]] = {
    "id": [0, -1, 2**63 - 1, -(2**63)],
    "name": ["", "a", "x" * 3_000],
    "amount": [Decimal("-0.0"), Decimal("1.00"), Decimal("1E-400"), 10**40],
    "active": [True, False],
    "at": ODD["at"][:6],
    "naive": [*ODD["at"][:6], "2026-01-31T23:59:59"],
    "since": [0, -1, Decimal("1.5"), "12.25"],
    "day": ["2026-01-31", "9999-12-31"],
    "thing": [{}, {"zip": "1"}, {"a": {"b": [None, Decimal("0.10")]}}],
    "list": [[], [1, [2]]],
}
WELL_FORMED = st.fixed_dictionaries({name: st.sampled_from(some) for name, some in WELL.items()})


def rows_of(spec: dict[str, Any] | None = None, stream: Stream = STREAM) -> Rows:
    given = None if spec is None else StreamSpec.model_validate({"name": "crm.things", **spec})
    return Rows("crm.things", stream, Type.STRING, spec=given)


def outcome(make: Any) -> tuple[Any, ...]:
    """Return rows as their types and exact images, or the words of the error."""
    try:
        made = make()
    except ConfigError as error:
        return (error.code, error.public)
    return tuple((type(value), repr(value)) for row in made for value in row)


def one_by_one(rows: Rows, records: list[Any], texts: Any = None) -> list[Row]:
    return [
        rows.row(record, None, f"record {number} of page 3", texts and texts[number - 7])
        for number, record in enumerate(records, 7)
    ]


def both(spec: dict[str, Any] | None, records: list[Any], texts: Any = None) -> None:
    """Make rows both ways and compare them, and what was found to be new on the way."""
    together, alone = rows_of(spec), rows_of(spec)
    made = outcome(lambda: together.all_of(records, None, "page 3", 7, texts))
    assert made == outcome(lambda: one_by_one(alone, records, texts))
    assert together.new == alone.new


#: Without the whole record, in which odd values are found as well.
BARE: dict[str, Any] = {"mode": "merge", "key": ["id"], "columns": {"exclude": ["raw"]}}
SPECS: list[dict[str, Any] | None] = [
    None,
    BARE,
    {"mode": "merge", "key": ["id"], "drift": "freeze"},
    {**BARE, "mask": {"id": "hmac", "name": "hmac"}},
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SPECS), RECORDS)
def test_odd_records_end_alike_made_together_and_one_by_one(spec, records):
    both(spec, records)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.lists(WELL_FORMED, min_size=1, max_size=6))
def test_well_formed_records_are_the_same_made_together_and_one_by_one(spec, records):
    both(spec, records)


@pytest.mark.parametrize("name", ODD)
def test_each_odd_value_ends_alike_beside_one_that_is_none(name):
    for value in ODD[name]:
        record = {"id": 1, name: value}
        both(BARE, [{"id": 5}, record])
        both(BARE, [record, record])


def test_a_record_that_is_amiss_is_named_among_those_that_are_not():
    records = [{"id": number, "name": "a"} for number in range(5)]
    records[3]["name"] = "\x00"
    with pytest.raises(ConfigError, match="name of the record with id 3 is no string"):
        rows_of().all_of(records, None, "page 3", 7)


def test_records_stand_in_raw_as_they_stood_in_the_answer():
    body = b'{"data": [{"id": 1, "amount": 1.50}, {"id": 2,  "name": "\\u00fc"}, {"id":3}]}'
    records = exact_json.parse(body)["data"]
    texts = exact_json.texts(body, ("data",), 3)
    made = rows_of().all_of(records, None, "page 3", 7, texts)
    assert [row[-1] for row in made] == [
        '{"id": 1, "amount": 1.50}', '{"id":2,"name":"ü"}', '{"id":3}',
    ]  # fmt: skip
    both(None, records, texts)


# ── keys that were there before ──────────────────────────────────────────────────────────────


def seen(pages: list[list[Row]], *, feed: bool, together: bool) -> tuple[Any, ...]:
    once = Once(feed=feed)
    found: list[Row] = []
    for page in pages:
        once.turn()
        if together:
            found += once.new_ones(page, [0])
        else:
            found += [row for row in page if once.is_new(row[:1])]
    return found, once.new, once.moved


NUMBERS = st.lists(st.tuples(st.integers(0, 9)), min_size=1, max_size=3)
MIXED = st.lists(st.tuples(st.integers(0, 3) | st.sampled_from(["a", True, None])), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(NUMBERS | MIXED, max_size=6), st.booleans())
def test_rows_that_moved_are_left_out_alike_together_and_one_by_one(pages, feed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", 4)  # beyond, keys grow old and are forgotten
        assert seen(pages, feed=feed, together=True) == seen(pages, feed=feed, together=False)


# ── groups ───────────────────────────────────────────────────────────────────────────────────


def grouped(pages: list[list[Row]], *, together: bool) -> list[tuple[list[Row], int]]:
    columns = rows_of().columns
    grouping = Grouping(sizes(columns))
    found: list[RowGroup] = []
    for page in pages:
        if together:
            found += grouping.add_all(page, sizes_of_all(columns)(page))
        else:
            found += [group for group in map(grouping.add, page) if group is not None]
    return [(group.rows, group.size) for group in [*found, *grouping.rest()]]


@pytest.mark.parametrize(
    ("length", "pages"),
    [(10, [3, 0, 4_000, 1_500]), (10, [ROWS_MAX, 1]), (9_000, [400, 400]), (BYTES_MAX, [1, 2])],
)
def test_groups_are_bounded_alike_however_rows_come(length, pages):
    columns = rows_of().columns
    text = "x" * length
    row = tuple(text if travels_as(c) == "text" and c.name == "name" else None for c in columns)
    come = [[row] * count for count in pages]
    made = grouped(come, together=True)
    assert made == grouped(come, together=False)
    assert all(len(rows) <= ROWS_MAX and size <= BYTES_MAX + 2 * length for rows, size in made)
