"""CSV of a job: records are made a few at a time, and what would fill the memory is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from connectors.http_link import Answer
from connectors.rest.csv_records import parts
from connectors.rest.parts import FieldSpec
from connectors.rest.values import Type
from schemas.errors import ConfigError
from tests.rest_api import Reply
from tests.rest_case import Case

MIB = 2**20


def read(body: bytes) -> list[tuple[list[dict[str, Any]], int]]:
    fields = {"id": FieldSpec(type=Type.INTEGER)}
    return list(parts("shop.orders", Answer(200, {}, body, "", "none"), fields))  # type: ignore[arg-type]


def job(case: Case, *results: bytes, **more: Any) -> dict[str, Any]:
    """A stream whose job has these pages of results."""
    case.api.routes["/jobs"] = lambda _asked: Reply(200, {"id": "j1", "state": "done"})

    def page(asked: Any) -> Reply:
        number = int(asked.query.get("after", "0"))
        headers = {"Next": str(number + 1)} if number + 1 < len(results) else {}
        return Reply(200, results[number], headers)

    case.api.routes["/jobs/j1/results"] = page
    retriever = {
        "status_extractor": "state", "status_mapping": {"running": ["busy"], "completed": ["done"]},
        "polling_requester": {"path": "/jobs/{{ creation_response.id }}"},
        "download_requester": {
            "path": "/jobs/{{ creation_response.id }}/results", "decoder": "CsvDecoder",
            "paginator": {
                "type": "CursorPagination", "cursor_from": "header", "cursor_value": "Next",
                "page_token_option": {"field_name": "after"},
            },
        },
    }  # fmt: skip
    return case.stream(path="/jobs", http_method="POST", retriever=retriever, **more)


def lines(first: int, count: int) -> bytes:
    return b"id,name\n" + b"".join(b"%d,n\n" % n for n in range(first, first + count))


def test_all_records_come_in_parts_that_are_bounded_by_what_they_become():
    found = read(lines(0, 2_500))
    assert [len(records) for records, _ in found] == [1_000, 1_000, 500]
    assert [record["id"] for records, _ in found for record in records] == [*range(2_500)]
    names = ",".join(f"name_that_is_rather_long_{n}" for n in range(2_000)).encode()
    found = read(b"id," + names + (b"\n1" + b"," * 2_000) * 100)
    assert sum(len(records) for records, _ in found) == 100
    assert max(len(records) for records, _ in found) < 20
    assert {record["id"] for records, _ in found for record in records} == {1}


def test_an_answer_in_parts_is_one_page(case):
    two = job(case, lines(0, 1_200), lines(1_200, 1_200))
    assert [row[0] for row in case.rows(two)] == [*range(2_400)]
    assert case.api.paths().count("/jobs") == 1  # no part is taken for pages that might slip
    twice = lines(0, 1_100) + b"3,n\n"
    assert [row[0] for row in case.rows(job(case, twice))].count(3) == 2  # which is no key
    error = case.fails(job(case, lines(0, 1_100) + b"x,n\n"))
    assert "id of record 1101 of page 1 is no integer" in str(error)
    error = case.fails(job(case, lines(0, 1_100), lines(0, 1_100)))
    assert "page 2 comes again" in str(error)


def test_filters_look_at_each_part(case):
    stream = job(case, lines(0, 1_500), raw=True)
    how = stream["retriever"]["download_requester"]
    how["record_selector"] = {"remove_fields": ["name"]}
    found = case.rows(stream)
    assert (len(found), found[-1]) == (1_500, (1_499, '{"id":1499}'))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"," * 20_000 + b"\n1", "more than 9,999 commas"),
        (b"id," + b"x" * (MIB + 1) + b"\n", "names have more than 1 MiB"),
        (b"id,n\n1," + b"x" * (16 * MIB) + b"\n", "a record has more than 16 MiB"),
        (b"id,n\n1" + b"," * 1_000_001, "more than 1,000,000 commas"),
        (b'id,n\n1,"' + b",\n" * 1_000_001 + b'"', "more than 1,000,000 commas"),
        (b"id,n\n1,2,3\n", "no CSV"),
    ],
    ids=["names", "long names", "long record", "commas", "quoted commas", "too many"],
)  # fmt: skip
def test_what_would_be_too_much_is_refused_before_it_is_made(body, says):
    with pytest.raises(ConfigError) as caught:
        read(body)
    assert says in str(caught.value)
    assert caught.value.code == "api_answer"


#: Each of them small on the wire and large once it is taken apart.
HOSTILE = """
import gzip, resource, sys
from connectors.http_link import Answer
from connectors.rest.csv_records import parts
from connectors.rest.parts import FieldSpec
from schemas.errors import ConfigError
mib = 2**20
def empty():  # eight million empty cells
    names = ",".join(f"name{n:04}" for n in range(1000)).encode()
    return names + (b"\\n" + b"," * 999) * (8 * mib // 1000)
def narrow(): return b"a\\n" + b"1\\n" * (4 * mib)
def wide(): return b"a,b\\n" + b"," * (8 * mib)
def quoted(): return b'a,b\\n"' + b'""' * (4 * mib - 10) + b'",1'
def names(): return b",".join(b"%d" % n for n in range(mib))
body = globals()[sys.argv[1]]()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    count = sum(len(records) for records, _ in parts("x", Answer(200, {}, body, "", ""), {}))
except ConfigError:
    count = -1
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    ("kind", "records"),
    [
        pytest.param("empty", 8 * MIB // 1_000, marks=pytest.mark.full),
        pytest.param("narrow", 4 * MIB, marks=pytest.mark.full),
        ("wide", -1),
        ("quoted", 1),
        ("names", -1),
    ],
)
def test_memory_is_flat_whatever_the_cells(kind, records):
    """8 MiB each: what lies beside the answer is small, the buffer of one long text apart."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, kind], cwd=root, capture_output=True, text=True, check=True
    )
    count, mib = map(int, done.stdout.split())
    assert count == records
    assert mib < (100 if kind == "quoted" else 24)
