"""Parts of manifests for what pages and windows are not enough for, each against an API of its own.

Caps of a query, feeds of changes, keys in groups, lists in records, jobs, CSV, fields that the API
lists. The manifests that need them: tests/apis.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from connectors import registry
from connectors.rest import manifest_files, reading
from schemas.errors import ConfigError, ReadAgain, TransientError
from schemas.records import Between, WireFormat
from schemas.streams import StreamSpec
from tests.rest_api import Api, Asked, Reply
from tests.rest_case import TOKEN, Case, everything
from tests.world import LOOSE

MERGE: dict[str, Any] = {"mode": "merge", "key": ("id",), "cursor": "at", "settle": "0s"}
FIELDS = {"id": "integer", "at": "timestamp", "gone": "boolean"}
NOW = datetime(2026, 1, 10, tzinfo=UTC)
SINCE = {"kind": "window", "value": "2026-01-05T00:00:00+00:00"}


@pytest.fixture(scope="module")
def server() -> Iterator[Api]:
    made = Api()
    yield made
    made.close()


@pytest.fixture
def case(server, tmp_path):
    server.tables = {}
    server.script.clear()
    server.asked.clear()
    server.routes.clear()
    server.before = lambda _asked: None
    server.clock = lambda: NOW
    return Case(server, tmp_path)


def row(number: int, day: int = 1, hour: int = 0) -> dict[str, Any]:
    return {"id": number, "at": f"2026-01-{day:02}T{hour:02}:00:00Z"}


def ids(rows: list[tuple[Any, ...]]) -> list[Any]:
    return [one[0] for one in rows]


# ── windows that records leave ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("paging", ["page", "offset"])
@pytest.mark.parametrize("spec", [MERGE, {}], ids=["merge", "replace"])
def test_a_record_that_leaves_a_window_while_it_is_read_takes_no_other_along(case, paging, spec):
    rows = [{"id": n, "updated_at": f"2026-01-01T0{n}:00:00Z"} for n in range(1, 6)]
    case.api.tables["orders"] = rows

    def changed_while_read(_asked: Asked) -> None:
        if len(case.api.asked) == 2:  # the second page of the oldest window
            rows.append({**rows.pop(0), "updated_at": "2026-01-09T12:00:00Z"})

    case.api.before = changed_while_read
    how = {
        "cursor_field": "updated_at", "start_datetime": "2026-01-01", "step": "5d",
        "start_time_option": {"field_name": "updated_since"},
        "end_time_option": {"field_name": "updated_until"},
    }  # fmt: skip
    stream = case.stream(
        paging, schema={"id": "integer", "updated_at": "timestamp"}, incremental_sync=how,
    )  # fmt: skip
    spec = {**spec, "cursor": "updated_at"} if spec else spec
    assert set(ids(case.rows(stream, **spec))) == {1, 2, 3, 4, 5}


def test_what_has_no_key_is_not_read_once_more(case):
    case.api.tables["orders"] = [
        {"id": n, "updated_at": f"2026-01-01T0{n}:00:00Z"} for n in range(1, 6)
    ]
    how = {
        "cursor_field": "updated_at", "start_datetime": "2026-01-01", "step": "5d",
        "start_time_option": {"field_name": "updated_since"},
        "end_time_option": {"field_name": "updated_until"},
    }  # fmt: skip
    stream = case.stream(
        "page", schema={"id": "integer", "updated_at": "timestamp"}, incremental_sync=how,
        primary_key=[],
    )  # fmt: skip
    append = {"mode": "append", "cursor": "updated_at", "settle": "0s"}
    assert ids(case.rows(stream, **append)) == [1, 2, 3, 4, 5]


# ── caps of a query ──────────────────────────────────────────────────────────────────────────


def capped(case: Case, rows: list[dict[str, Any]], most: int) -> dict[str, Any]:
    """A stream of an API that gives so many records of a query and not one more."""

    def search(asked: Asked) -> Reply:
        since, until = asked.query["from"], asked.query["to"]
        found = [one for one in rows if since <= one["at"] <= until]
        return Reply(200, {"total": len(found), "results": found[:most]})

    case.api.routes["/search"] = search
    how = {
        "cursor_field": "at", "start_datetime": "2026-01-01",
        "start_time_option": {"field_name": "from"}, "end_time_option": {"field_name": "to"},
        "result_cap": {"records": most, "total": "total"},
    }  # fmt: skip
    return case.stream(
        path="/search", record_selector={"field_path": "results"}, schema=FIELDS,
        incremental_sync=how,
    )  # fmt: skip


def test_a_window_of_more_than_the_api_gives_is_cut_until_all_of_it_comes(case):
    rows = [row(n, day=1 + n % 9, hour=n // 5) for n in range(100)]
    stream = capped(case, rows, 25)
    assert sorted(ids(case.rows(stream, **MERGE))) == list(range(100))
    assert sorted(ids(case.rows(stream, **MERGE, since=SINCE))) == sorted(
        one["id"] for one in rows if one["at"] >= "2026-01-05"
    )
    assert sorted(ids(case.rows(stream))) == list(range(100))  # replace, too


def test_more_records_of_one_second_than_the_api_gives_are_an_error_and_no_loss(case):
    error = case.fails(capped(case, [row(n) for n in range(11)], 10), **MERGE)
    assert (error.code, "one and the same time" in str(error)) == ("api_answer", True)


def test_windows_are_not_cut_where_no_key_tells_what_both_halves_have(case):
    path = case.write(capped(case, [row(1)], 1) | {"primary_key": []})
    with pytest.raises(ConfigError, match="needs a primary_key"):
        manifest_files.parse(Path(path).read_bytes(), "shop")


def test_an_answer_that_does_not_say_how_many_there_are_is_refused(case):
    stream = capped(case, [row(1)], 10)
    stream["incremental_sync"]["result_cap"]["total"] = "elsewhere"
    assert "does not say at the total" in str(case.fails(stream, **MERGE))


def test_pages_in_the_order_of_keys_go_beyond_any_cap_and_past_what_moves(case):
    rows = [row(n) for n in range(1, 26)]

    def search(asked: Asked) -> Reply:
        above = json.loads(asked.body)["filters"][0]["value"]
        found = sorted((one for one in rows if one["id"] > int(above)), key=lambda one: one["id"])
        rows.remove(next(one for one in rows if one["id"] == 25 - len(case.api.asked)))
        return Reply(200, {"results": found[:10]})

    case.api.routes["/search"] = search
    paginator = {
        "type": "CursorPagination", "cursor_from": "last_record", "cursor_value": "id",
        "page_token_option": {"field_name": "filters.0.value", "inject_into": "body_json"},
    }  # fmt: skip
    stream = case.stream(
        path="/search", http_method="POST", record_selector={"field_path": "results"},
        request_body_json={"filters": [{"name": "id", "value": "0"}]}, paginator=paginator,
    )  # fmt: skip
    assert ids(case.rows(stream)) == [*range(1, 23), 25]
    assert json.loads(case.api.asked[1].body) == {"filters": [{"name": "id", "value": 10}]}


# ── what has changed ─────────────────────────────────────────────────────────────────────────


def fed(case: Case, entries: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A stream that is a list the first time, and from then on entries about what has changed."""
    case.api.routes["/events"] = lambda _asked: Reply(200, entries)
    feed = {
        "path": "/events", "request_parameters": {"q": "at >= {{ stream_interval.start_time }}"},
        "record_path": "data.object", "deleted": {"field": "type", "values": ["x.deleted"]}, **more,
    }  # fmt: skip
    return case.stream(
        schema=FIELDS, tombstone="gone", changes=[feed],
        incremental_sync={"cursor_field": "at", "start_datetime": "2026-01-01"},
    )  # fmt: skip


def entry(type_: str, record: object) -> dict[str, Any]:
    return {"type": type_, "created": 1_767_700_000, "data": {"object": record}}


def test_the_newest_entry_of_a_record_counts_also_on_the_same_page(case):
    case.api.tables["orders"] = [row(1), row(2)]
    entries = [
        entry("x.deleted", row(2)), entry("x.updated", row(1, day=9)), entry("x.updated", row(2)),
        entry("x.created", row(1)),
    ]  # fmt: skip
    stream = fed(case, entries)
    ((batch, rows),) = case.batches(stream, **MERGE)
    assert (ids(rows), batch.full, batch.upper["value"][:10]) == ([1, 2], True, "2026-01-10")
    ((batch, rows),) = case.batches(stream, since=SINCE, **MERGE)
    assert [one[:2] for one in rows] == [(1, datetime(2026, 1, 9, tzinfo=UTC))]
    assert (batch.full, batch.lower, batch.upper["value"][:10]) == (False, SINCE, "2026-01-10")
    assert case.api.asked[-1].query == {"q": "at >= 2026-01-05T00:00:00Z"}


def test_a_list_that_cannot_be_asked_by_time_is_read_to_the_window(case):
    entries = [{"data": {"object": row(n)}, "archived": f"2026-01-0{n}T00:00:00Z"} for n in (4, 6)]
    stream = fed(case, entries, changed_at="archived", deleted=None)
    assert ids(case.rows(stream, since=SINCE, **MERGE)) == [6]
    broken = [{"data": {"object": row(1)}, "archived": "hunter2"}]
    error = case.fails(fed(case, broken, changed_at="archived"), since=SINCE, **MERGE)
    assert (error.code, "hunter2" in everything(error)) == ("api_answer", False)


def test_an_entry_without_a_record_is_an_error(case):
    error = case.fails(fed(case, [entry("x", None)]), since=SINCE, **MERGE)
    assert "an entry has no record at data.object" in str(error)


def test_what_the_feed_does_not_know_any_more_is_read_as_a_whole(case, monkeypatch):
    stream = fed(case, [entry("x", row(n)) for n in range(5)], retention="4d")
    assert isinstance(case.fails(stream, since=SINCE, **MERGE), ReadAgain)
    stream["changes"][0]["retention"] = "6d"
    assert len(case.rows(stream, since=SINCE, **MERGE)) == 5
    monkeypatch.setattr(reading, "_CHANGED_MAX", 3)
    pages = [[entry("x", row(n))] for n in range(6)]
    case.api.routes["/events"] = lambda asked: Reply(200, pages[int(asked.query["page"]) - 1])
    stream["changes"][0]["paginator"] = {
        "type": "PageIncrement", "page_size": 1, "page_token_option": {"field_name": "page"},
    }  # fmt: skip
    assert isinstance(case.fails(stream, since=SINCE, **MERGE), ReadAgain)


def test_an_append_and_a_backfill_are_of_the_streams_own_request(case):
    case.api.tables["orders"] = [row(n, day=n) for n in (1, 4, 6)]
    stream = fed(case, [entry("x", row(9))])
    append = {"mode": "append", "cursor": "at"}
    assert "comes as it is now" in str(case.fails(stream, since=SINCE, **append))
    stream["incremental_sync"]["start_time_option"] = {"field_name": "updated_since"}
    assert ids(case.rows(stream, since=SINCE, settle="0s", **append)) == [6]
    spec = StreamSpec(name="shop.orders", **MERGE)
    between = Between(lower="2026-01-02", upper="2026-01-05")
    with (
        closing(case.open(stream)) as source,
        source.extract(spec, None, WireFormat.ROWS, between=between) as batches,
    ):
        (batch,) = batches
        assert [one[0] for group in batch.groups for one in group.rows] == [4]


def test_the_suggestion_for_a_stream_with_a_tombstone_uses_it(case):
    with closing(case.open(fed(case, []))) as source:
        (found,) = source.discover()
    assert found.suggestion == (
        "{mode: merge, key: [id], cursor: at, deletes: soft, tombstone: gone}"
    )


def test_pages_that_begin_again_need_a_key_to_tell_what_came_before(case):
    case.api.tables["orders"] = [row(n) for n in range(5)]
    handler = {"response_filters": [{"http_codes": [410], "action": "RESET_PAGINATION"}]}

    def gone(_asked: Asked) -> None:
        if len(case.api.asked) == 2:
            case.api.script.append(Reply(410))

    case.api.before = gone
    stream = case.stream("cursor", error_handler=handler)
    assert ids(case.rows(stream)) == [0, 1, 2, 3, 4]
    case.api.asked.clear()
    error = case.fails(case.stream("cursor", error_handler=handler, primary_key=[]))
    assert isinstance(error, TransientError)


# ── keys in groups, lists in records ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("inside", ["body_json", "request_parameter"])
def test_a_stream_is_asked_for_many_keys_at_once(case, inside):
    case.api.tables["orders"] = [{"id": n} for n in range(1, 8)]
    asked_for: list[list[int]] = []

    def batch(asked: Asked) -> Reply:
        if inside == "body_json":
            keys = [one["id"] for one in json.loads(asked.body)["inputs"]]
        else:
            keys = [int(key) for key in asked.query["inputs"].split(",")]
        asked_for.append(keys)
        found = [
            {"from": {"id": k}, "to": [{"id": 10 * k + n} for n in range(k % 3)], "paging": None}
            for k in keys
        ]
        return Reply(207, {"results": found})

    case.api.routes["/batch"] = batch
    router = {
        "parent_stream": "orders", "parent_key": "id", "group_size": 3,
        "group_option": {"field_name": "inputs", "inject_into": inside},
        **({"group_item": "id"} if inside == "body_json" else {}),
    }  # fmt: skip
    expander = {
        "expand_records_from_field": "to", "remain_original_record": True, "incomplete": "paging",
    }  # fmt: skip
    child = case.stream(
        path="/batch", http_method="POST" if inside == "body_json" else "GET",
        grouping_router=router, primary_key=["order_id", "id"],
        schema={
            "order_id": {"type": "integer", "field": "original_record.from.id"}, "id": "integer",
        },
        record_selector={"field_path": "results", "record_expander": expander},
    )  # fmt: skip
    found = case.rows(case.stream("cursor"), child, name="lines")
    assert found == [(1, 10), (2, 20), (2, 21), (4, 40), (5, 50), (5, 51), (7, 70)]
    assert asked_for == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_list_in_a_record_that_is_not_whole_is_an_error(case):
    expander = {"expand_records_from_field": "lines", "incomplete": "more"}
    selector = {"field_path": "", "record_expander": expander}
    case.api.tables["orders"] = [{"id": 7, "lines": [{"id": 1}], "more": "x"}]
    assert "goes on elsewhere" in str(case.fails(case.stream(record_selector=selector)))
    case.api.tables["orders"] = [{"id": 7, "lines": "hunter2"}]
    error = case.fails(case.stream(record_selector=selector))
    assert ("is no list of records" in str(error), "hunter2" in everything(error)) == (True, False)
    case.api.tables["orders"] = [{"id": 7}, {"id": 8, "lines": None}, {"id": 9, "lines": []}]
    assert case.rows(case.stream(record_selector=selector)) == []


def test_records_and_members_that_do_not_count_are_left_out(case):
    case.api.tables["orders"] = [
        {"id": 1, "kind": "a", "links": 1}, {"id": 2, "kind": "b"}, {"id": 3}, {"id": 4, "kind": ""}
    ]  # fmt: skip
    selector = {
        "field_path": "", "record_filter": {"field": "kind", "equals": "a"},
        "remove_fields": ["links", "kind"],
    }  # fmt: skip
    assert case.rows(case.stream(record_selector=selector, raw=True)) == [(1, '{"id":1}')]
    del selector["record_filter"]  # every record of the answer, but not as it stands there
    raw = [text for _, text in case.rows(case.stream(record_selector=selector, raw=True))]
    assert raw == [f'{{"id":{number}}}' for number in (1, 2, 3, 4)]
    selector = {"field_path": "", "record_filter": {"field": "kind"}}
    assert ids(case.rows(case.stream(record_selector=selector))) == [1, 2]


def test_a_list_of_a_request_takes_several_values_and_parts_of_a_parameter(case):
    case.manifest["parameters"] = {"url": {}, "names": {"default": "a,b"}, "none": {"default": ""}}
    names = ["id", "{{ config.names }}", "{{ config.none }}"]
    case.api.tables["orders"] = []
    stream = case.stream(
        http_method="POST", request_parameters={"f[]": names}, request_body_json={"fields": names}
    )
    case.rows(stream)
    (asked,) = case.api.asked
    assert asked.values == {"f[]": ["id", "a", "b"]}
    assert json.loads(asked.body) == {"fields": ["id", "a", "b"]}


# ── jobs and CSV ─────────────────────────────────────────────────────────────────────────────


def job(case: Case, results: bytes, states: list[Any], **more: Any) -> dict[str, Any]:
    answers = iter(states)
    case.api.routes |= {
        "/jobs": lambda _asked: Reply(200, {"id": "j1", "state": "new", "no": [1]}),
        "/jobs/j1": lambda asked: (
            Reply(204, b"") if asked.method == "DELETE" else Reply(200, {"state": next(answers)})
        ),
        "/jobs/j1/rows": lambda _asked: Reply(200, results, {"Content-Type": "text/csv"}),
    }
    retriever = {
        "status_extractor": "state",
        "status_mapping": {"running": ["new", "busy"], "completed": ["done"], "failed": ["bad"]},
        "polling_requester": {"path": "/jobs/{{ creation_response.id }}"},
        "download_requester": {
            "path": "/jobs/{{ creation_response.id }}/rows", "decoder": "CsvDecoder",
        },
        "delete_requester": {"path": "/jobs/{{ creation_response.id }}"}, **more,
    }  # fmt: skip
    fields = {
        "id": "integer", "price": "number", "paid": "boolean", "name": "string", "at": "timestamp",
        "tags": "array",
    }  # fmt: skip
    return case.stream(
        path="/jobs", http_method="POST", request_body_json={"a": 1}, schema=fields,
        retriever=retriever, primary_key=[],
    )  # fmt: skip


HEAD = b"id,price,paid,name,at,tags\r\n"


def test_a_job_is_made_waited_for_read_and_removed(case):
    lines = HEAD + b'1,0.10,true,"a,\n""b""",2026-01-01T00:00:00Z,"[1]"\r\n2.0,,FALSE,,,\r\n'
    rows = case.rows(job(case, b"\xef\xbb\xbf" + lines, ["busy", "done"]))
    assert [(one[0], one[1] and str(one[1]), *one[2:4], one[5]) for one in rows] == [
        (1, "0.10", True, 'a,\n"b"', "[1]"), (2, None, False, None, None),
    ]  # fmt: skip
    assert [f"{one.method} {one.path}" for one in case.api.asked] == [
        "POST /jobs", "GET /jobs/j1", "GET /jobs/j1", "GET /jobs/j1/rows", "DELETE /jobs/j1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (b"id,id\r\n1,2\r\n", "no CSV"),
        (HEAD + b"1,2\r\n", "no CSV"), (HEAD + b'1,"2', "no CSV"), (b"\xff", "no CSV"),
        (HEAD + b"x,,,,,\r\n", "id of record 1 of page 1 is no integer"),
        (HEAD + b",,maybe,,,\r\n", "paid of record 1 of page 1 is no boolean"),
        (HEAD + b"1.5,,,,,\r\n", "id of record 1 of page 1 is no integer"),
        (HEAD + b",1e99999,,,,\r\n", "price of record 1 of page 1 is no number"),
    ],
)  # fmt: skip
def test_results_that_are_not_what_they_should_be_are_refused(case, results, says):
    assert says in str(case.fails(job(case, results, ["done"])))


def test_an_empty_result_is_no_record_and_a_long_value_comes_whole(case):
    assert case.rows(job(case, b"", ["done"])) == []
    assert case.rows(job(case, HEAD, ["done"])) == []
    long = b"x" * 200_000
    assert len(case.rows(job(case, HEAD + b",,," + long + b",,\r\n", ["done"]))[0][3]) == 200_000


def test_the_limit_of_a_field_is_no_others_to_lower(case):
    """Answers of several runs are read at the same time in one process."""
    before = csv.field_size_limit()
    case.rows(job(case, HEAD, ["done"]))
    assert csv.field_size_limit() == before >= 2**30


def test_a_window_is_asked_of_the_job_and_not_of_its_results(case):
    stream = job(case, HEAD + b"1,,,,2026-01-02T00:00:00Z,\r\n", ["done"])
    stream["primary_key"] = ["id"]
    stream["incremental_sync"] = {
        "cursor_field": "at", "start_datetime": "2026-01-01",
        "start_time_option": {"field_name": "where.since", "inject_into": "body_json"},
        "end_time_option": {"field_name": "until"},
    }  # fmt: skip
    assert ids(case.rows(stream, **MERGE)) == [1]
    made, *others = case.api.asked
    assert json.loads(made.body)["where"] == {"since": "2026-01-01T00:00:00Z"}
    assert "until" in made.query
    assert [one.query for one in others] == [{}] * len(others)


def test_a_job_without_an_interval_is_not_asked_about_all_the_time(case):
    case.rows(job(case, HEAD, ["busy", "busy", "done"], polling_interval="0s"))
    assert len(case.api.asked) == 6


@pytest.mark.parametrize(
    ("states", "type_", "says"),
    [
        (["bad"], TransientError, "failed there"), ([None], ConfigError, "status_mapping"),
        (["busy"] * 9, TransientError, "not done in time"),
    ],
)  # fmt: skip
def test_a_job_that_is_never_done_ends(case, states, type_, says):
    error = case.fails(job(case, HEAD, states, polling_job_timeout="1s"))
    assert isinstance(error, type_)
    assert says in str(error)


def test_an_answer_that_made_no_job_and_a_name_that_climbs_are_refused(case):
    stream = job(case, HEAD, ["done"])
    for made in ({"state": "new"}, {"id": "..", "state": "new"}, {"id": [1], "state": "new"}):
        case.api.routes["/jobs"] = lambda _asked, made=made: Reply(200, made)
        assert case.fails(stream).code == "data_refused"
    case.api.routes["/jobs"] = lambda _asked: Reply(200, {"id": "a/../b", "state": "new"})
    case.fails(stream)
    assert case.api.paths()[-1] == "/jobs/a%2F..%2Fb"


def test_a_read_is_cancelled_while_a_job_runs(case):
    with closing(case.open(job(case, HEAD, ["busy"] * 99))) as source:
        case.api.before = lambda asked: source.cancel() if asked.path == "/jobs/j1" else None
        with pytest.raises(TransientError) as caught:
            source.test()
    assert caught.value.code == "cancelled_there"


# ── fields that the API lists ────────────────────────────────────────────────────────────────


def listed(case: Case, fields: list[Any], **more: Any) -> dict[str, Any]:
    case.api.routes["/fields"] = lambda _asked: Reply(200, {"fields": fields})
    loader = {
        "path": "/fields", "field_path": "fields", "key_pointer": "name", "type_pointer": "type",
        "types_mapping": [
            {"current_type": ["text", "ref"], "target_type": "string"},
            {"current_type": ["time"], "target_type": "timestamp", "format": "epoch"},
        ],
    }  # fmt: skip
    return case.stream(
        schema={"id": {"type": "integer", "field": "Id"}}, schema_loader=loader,
        request_parameters={"select": "{{ schema.fields }}"}, **more,
    )  # fmt: skip


def field(name: object, type_: str = "text") -> dict[str, object]:
    return {"name": name, "type": type_}


def test_fields_that_the_api_lists_are_columns_and_are_asked_for_once(case):
    fields = [field("Id", "ref"), field("OwnerId"), field("SeenAt", "time"), field("Blob", "bin")]
    case.api.tables["orders"] = [{"Id": 1, "OwnerId": "x", "SeenAt": 1_767_225_600}]
    stream = listed(case, fields)
    ((batch, rows),) = case.batches(stream)
    assert [(c.name, c.type) for c in batch.shape.columns] == [
        ("id", "bigint"), ("owner_id", "text"), ("seen_at", "timestamp with time zone"),
    ]  # fmt: skip
    assert rows == [(1, "x", datetime(2026, 1, 1, tzinfo=UTC))]
    assert case.api.asked[-1].query == {"select": "Id,OwnerId,SeenAt"}
    assert case.api.paths() == ["/fields", "/all/orders"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([field("OwnerId"), field("Owner_Id")], "field Owner_Id would be column owner_id"),
        ([field("Raw")], "field Raw would be column raw"), ([field(None)], "has no name at name"),
        ([field("a b; DROP")], "has no name at name"), (["hunter2"], "no list of records"),
        ([field(f"F{n}") for n in range(1_600)], "more than 1,500 fields"),
    ],
)  # fmt: skip
def test_a_list_of_fields_that_cannot_be_columns_is_refused(case, fields, says):
    case.api.tables["orders"] = []
    error = case.fails(listed(case, fields))
    assert says in str(error)
    assert "hunter2" not in everything(error)


def test_a_resource_is_opened_without_asking_for_fields(case):
    case.api.routes["/fields"] = lambda _asked: Reply(500)
    config = {"manifest": case.write(listed(case, [])), "parameters": {"url": case.api.url}}
    with closing(registry.open_source("rest", config, {"token": TOKEN}, LOOSE)):
        assert case.api.asked == []
