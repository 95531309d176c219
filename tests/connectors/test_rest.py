"""An API as a source: pages, values, windows, limits, logins, and APIs that are broken or hostile.

Real runs: test_rest_run.py; the guard for HTTP: test_http_link.py; pairs: conformance/.
"""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import (
    booleans,
    characters,
    decimals,
    dictionaries,
    integers,
    lists,
    none,
    recursive,
    sampled_from,
    text,
)

from connectors import masking, registry
from connectors.egress import EgressRefused
from connectors.rest import exact_json
from connectors.rest.limits import told
from schemas.errors import ConfigError, CredentialsError, Deferral, SyncwardError, TransientError
from schemas.records import Between, WireFormat
from schemas.streams import StreamSpec
from tests.rest_api import Api, Asked, Reply
from tests.rest_case import PAGING, TOKEN, Case, everything
from tests.world import LOOSE


@pytest.fixture(scope="module")
def server() -> Iterator[Api]:
    made = Api()
    yield made
    made.close()


@pytest.fixture
def case(server, tmp_path):
    server.tables = {"orders": [{"id": n} for n in range(1, 6)]}
    server.script.clear()
    server.asked.clear()
    server.routes.clear()
    server.logins = None
    server.before = lambda _asked: None
    server.clock = lambda: datetime.now(UTC)
    return Case(server, tmp_path)


def page(*ids: int, **more: Any) -> dict[str, Any]:
    return {"results": [{"id": n} for n in ids], **more}


# ── pages ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("paging", sorted(PAGING))
@pytest.mark.parametrize("rows", [0, 1, 4, 5])
def test_every_way_of_paging_brings_each_record_once(case, paging, rows):
    case.api.tables["orders"] = [{"id": n} for n in range(rows)]
    assert case.rows(case.stream(paging)) == [(n,) for n in range(rows)]


def test_an_api_that_gives_shorter_pages_than_asked_for_is_read_to_its_end(case):
    paginator = {**PAGING["offset"][1], "page_size": 100}
    case.api.before = lambda asked: asked.query.update(limit="2")
    assert len(case.rows(case.stream("offset", paginator=paginator))) == 5


def test_pages_are_asked_for_in_a_body_where_the_api_wants_it(case):
    paginator = {
        **PAGING["cursor"][1], "page_size": 2,
        "page_token_option": {"field_name": "after", "inject_into": "body_json"},
        "page_size_option": {"field_name": "limit", "inject_into": "body_json"},
    }  # fmt: skip
    stream = case.stream(
        "cursor", paginator=paginator, http_method="POST",
        request_body_json={"filter": {"url": "{{ config.url }}"}},
    )  # fmt: skip
    assert len(case.rows(stream)) == 5
    assert [one.method for one in case.api.asked] == ["POST"] * 3
    body = exact_json.parse(case.api.asked[1].body)
    assert body == {"filter": {"url": case.api.url}, "limit": 2, "after": "2"}


def test_a_child_is_read_for_each_record_of_its_parent(case):
    case.api.tables["lines"] = [{"id": n, "parent": n % 3, "at": "x/../y"} for n in range(7)]
    child = case.stream(
        "cursor", path="/cursor/orders/{{ partition.order_id }}/lines",
        partition_router={
            "parent_stream": "orders", "parent_key": "id", "partition_field": "order_id",
        },
    )  # fmt: skip
    found = case.rows(case.stream("cursor"), child, name="lines")
    assert sorted(found) == [(1, 1), (2, 2), (4, 1), (5, 2)]


@pytest.mark.parametrize(("key", "path"), [("a/b?c=d", "/cursor/orders/a%2Fb%3Fc%3Dd/lines")])
def test_a_parents_key_stays_inside_its_part_of_the_path(case, key, path):
    case.api.tables |= {"orders": [{"id": key}], "lines": []}
    router = {"parent_stream": "orders", "parent_key": "id", "partition_field": "order_id"}
    child = case.stream(
        "cursor", path="/cursor/orders/{{ partition.order_id }}/lines", partition_router=router
    )
    parent = case.stream("cursor", schema={"id": "string"})
    assert case.rows(parent, child, name="lines") == []
    assert case.api.paths()[-1] == path
    case.api.tables["orders"] = [{"id": ".."}]
    assert case.fails(parent, child, name="lines").code == "data_refused"


@pytest.mark.parametrize("paging", ["page", "offset", "next", "link"])
def test_what_slips_through_when_a_record_moves_is_read_once_more(case, paging):
    def moved_to_the_end(asked: Asked) -> None:
        if len(case.api.asked) == 2 and asked.path == f"/{paging}/orders":
            case.api.tables["orders"].append(case.api.tables["orders"].pop(0))

    case.api.before = moved_to_the_end
    assert sorted(case.rows(case.stream(paging))) == [(n,) for n in range(1, 6)]


def test_a_record_that_moves_comes_once_and_a_key_that_is_none_twice(case):
    def moves(_asked: Asked) -> None:
        if len(case.api.asked) == 2:
            case.api.tables["orders"].insert(0, {"id": 0})

    case.api.before = moves
    assert sorted(case.rows(case.stream("page"))) == [(n,) for n in range(6)]
    case.api.before = lambda _asked: None
    case.api.tables["orders"] = [{"id": 1}, {"id": 1}, {"id": 2}]
    assert case.rows(case.stream("page")) == [(1,), (1,), (2,)]


# ── values ───────────────────────────────────────────────────────────────────────────────────


def one(case: Case, type_: Any, written: str) -> Any:
    body = f'[{{"id": 7, "odd": {written}}}]'.encode()
    case.api.script.append(Reply(200, body))
    return case.rows(case.stream(schema={"id": "integer", "odd": type_}))[0][1]


@pytest.mark.parametrize(
    ("type_", "written", "value"),
    [
        ("string", '"\\u00e9"', "é"), ("integer", "9223372036854775807", 2**63 - 1),
        ("number", "0.10", Decimal("0.10")), ("number", "1e2", Decimal("1e2")),
        ("number", "12345678901234567890.123", Decimal("12345678901234567890.123")),
        ("number", "3", Decimal(3)), ("boolean", "true", True), ("string", "null", None),
        ("date", '"2026-02-28"', date(2026, 2, 28)),
        ("timestamp", '"2026-01-02T03:04:05.678+02:00"',
         datetime(2026, 1, 2, 1, 4, 5, 678_000, tzinfo=UTC)),
        ("timestamp", '"2026-01-02T03:04:05.123456789Z"',
         datetime(2026, 1, 2, 3, 4, 5, 123_456, tzinfo=UTC)),
        ({"type": "timestamp", "format": "iso_utc"}, '"2026-01-02 03:04"',
         datetime(2026, 1, 2, 3, 4, tzinfo=UTC)),
        ({"type": "timestamp", "format": "epoch"}, "1767323045.5",
         datetime(2026, 1, 2, 3, 4, 5, 500_000, tzinfo=UTC)),
        ({"type": "timestamp", "format": "epoch_ms"}, '"1767323045000"',
         datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("object", '{"b": 1.50, "a": [18446744073709551616]}',
         '{"b":1.50,"a":[18446744073709551616]}'),
        ("array", "[]", "[]"),
        ({"type": "string", "field": "id.deep"}, "null", None),
    ],
)  # fmt: skip
def test_a_value_of_a_type_arrives_exact(case, type_, written, value):
    found = one(case, type_, written)
    assert found == value
    assert isinstance(found, type(value))


@pytest.mark.parametrize(
    ("type_", "written"),
    [
        ("string", "4711"), ("integer", '"4711"'), ("integer", "4711.5"), ("integer", "true"),
        ("integer", "9223372036854775808"), ("number", '"4711"'), ("number", "false"),
        ("boolean", "1"), ("boolean", '"4711"'), ("date", '"2026-02-30"'), ("date", "4711"),
        ("timestamp", '"2026-01-02T03:04:05"'), ("timestamp", "4711"),
        ("timestamp", '"2026-13-02T03:04:05Z"'), ("object", "[4711]"), ("array", '"4711"'),
        ({"type": "timestamp", "format": "epoch"}, "4711471147114711"), ("string", '"47\\u000011"'),
        ("string", '"47\\ud80011"'), ("object", '{"a": "47\\u000011"}'),
        ({"type": "string", "required": True}, "null"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_named_by_stream_field_and_key_and_not_shown(
    case, type_, written
):
    with pytest.raises(ConfigError) as caught:
        one(case, type_, written)
    assert caught.value.code == "data_refused"
    assert str(caught.value).startswith("shop.orders: ")
    assert "odd" in str(caught.value)
    assert "record with id 7" in str(caught.value)
    said = re.sub(r"127\.0\.0\.1:\d+", "", str(caught.value))  # a port may have any digits
    assert "47" not in said.replace("id 7", "")


@pytest.mark.parametrize("number", ["1e99999", "1" * 5000, "NaN", "Infinity", "1" * 5000 + ".5"])
def test_a_number_that_would_be_a_long_text_is_no_json(case, number):
    with pytest.raises(ConfigError) as caught:
        one(case, "number", number)
    assert caught.value.code == "api_answer"


def test_the_whole_record_is_kept_with_the_digits_it_came_with(case):
    case.api.script.append(Reply(200, b'[{"id": 1, "price": 1.10, "n": {"x": null}}]'))
    ((_, raw),) = case.rows(case.stream(raw=True))
    assert raw == '{"id": 1, "price": 1.10, "n": {"x": null}}'


@given(
    recursive(
        none() | booleans() | integers(-(10**30), 10**30) | decimals(-(10**9), 10**9)
        | text(characters(exclude_categories=["Cs"], exclude_characters="\x00")),
        lambda inner: lists(inner, max_size=3) | dictionaries(text("ab", max_size=2), inner),
        max_leaves=8,
    )
)  # fmt: skip
def test_a_document_is_written_as_it_was_read(document):
    written = exact_json.write(document)
    assert exact_json.parse(written.encode()) == document


def test_a_record_whose_key_may_tell_something_is_named_by_its_place(case):
    case.api.script.append(Reply(200, [{"id": "ada@example.org", "odd": 1}]))
    stream = case.stream(schema={"id": "string", "odd": "string"})
    error = case.fails(stream)
    assert "record 1 of page 1" in str(error)
    assert "ada" not in str(error)


def test_new_fields_are_told_kept_in_raw_or_refused_as_drift_says(case):
    case.api.tables["orders"] = [{"id": 1, "nick": "x", "a b": 1}]
    stream = case.stream(raw=True)
    ((batch, _),) = case.batches(stream)
    assert batch.notes == (
        "fields that the schema does not have, only in raw: nick, one with an odd name",
    )
    error = case.fails(stream, drift="freeze")
    assert error.code == "schema_drift"
    ((batch, _),) = case.batches(stream, drift="ignore")
    assert batch.notes == ()


# ── broken and hostile ───────────────────────────────────────────────────────────────────────


def test_a_page_that_repeats_for_ever_ends(case):
    case.api.routes["/cursor/orders"] = lambda _: Reply(
        200, page(len(case.api.asked), paging={"next": {"after": "x"}})
    )
    assert "cursor of a page before" in str(case.fails(case.stream("cursor")))
    case.api.routes["/offset/orders"] = lambda _: Reply(200, {"data": [{"id": 1}, {"id": 2}]})
    error = case.fails(case.stream("offset"))
    assert error.code == "api_answer"
    assert "page 2 has the same records as a page before" in str(error)
    case.api.routes["/next/orders"] = lambda asked: Reply(
        200, {"records": [{"id": len(case.api.asked)}], "next": asked.path}
    )
    assert "next link of a page before" in str(case.fails(case.stream("next")))
    case.api.routes["/page/orders"] = lambda _: Reply(200, {"items": [{"id": len(case.api.asked)}]})
    assert "more than 10 pages" in str(case.fails(case.stream("page", pages_max=10)))


@pytest.mark.parametrize(
    "link",
    [
        "https://evil.example/x", "//evil.example/x", "http://127.0.0.1:1/x", "https:/x",
        "http://user@127.0.0.1:{port}/x", "file:///etc/passwd", "http://127.0.0.1:{port}\\@evil/",
        "http://[::1", "javascript:alert(1)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("paging", ["next", "link"])
def test_a_next_link_to_another_host_is_not_followed(case, paging, link):
    link = link.replace("{port}", str(case.api.port))
    case.manifest["authenticator"] = {"type": "BearerAuthenticator"}
    body = {"records": [{"id": 1}], "next": link} if paging == "next" else [{"id": 1}]
    case.api.script.append(Reply(200, body, {"Link": f'<{link}>; rel="next"'}))
    error = case.fails(case.stream(paging), secrets={"token": TOKEN})
    assert error.code == "api_answer"
    assert "another host" in str(error)
    assert len(case.api.asked) == 1


@pytest.mark.parametrize(
    ("reply", "code", "says"),
    [
        (Reply(200, b"<html><body>hunter2</body></html>"), "api_answer", "HTML"),
        (Reply(200, b"hunter2"), "api_answer", "no JSON"),
        (Reply(200, b""), "api_answer", "no JSON"),
        (Reply(200, b'{"results": [{"id": 1}'), "api_answer", "no JSON"),
        (Reply(200, b"[" * 100_000), "api_answer", "no JSON"),
        (Reply(200, {"error": "hunter2"}), "api_answer", "`error`"),
        (Reply(200, {"results": {"id": 1}}), "api_answer", "no list of records"),
        (Reply(200, {"results": ["hunter2"]}), "api_answer", "no list of records"),
        (Reply(200, {"results": [{"name": "hunter2"}]}), "data_refused", "has no id"),
        (Reply(400, {"message": "hunter2"}), "api_refused", "status 400"),
        (Reply(403, {"message": "hunter2"}), "api_refused", "may not read"),
        (Reply(404, {"message": "hunter2"}), "api_refused", "no such thing"),
        (Reply(401, {"message": "hunter2"}), "credentials", "refuses the login"),
        (Reply(304), "api_answer", "status 304"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error_that_says_what_it_is(case, reply, code, says):
    case.api.script.append(reply)
    error = case.fails(case.stream("cursor"))
    assert isinstance(error, ConfigError)
    assert (error.code, says in str(error)) == (code, True)
    assert "hunter2" not in everything(error)


def test_errors_that_time_may_mend_are_tried_again_and_then_end_the_attempt(case):
    at_once = {"Retry-After": "0"}
    case.api.script.extend([Reply(503, b"", at_once), Reply(drop=True), Reply(500, b"", at_once)])
    assert len(case.rows(case.stream("cursor"))) == 5
    limits = {**at_once, "X-RateLimit-Remaining": "9", "X-RateLimit-Reset": "3600"}
    case.api.script.extend([Reply(502, b"hunter2", limits)] * 4)
    error = case.fails(case.stream("cursor"))
    assert (type(error), error.code) == (TransientError, "api_unavailable")
    assert len(case.api.script) == 0


def test_a_good_status_with_an_error_inside_is_read_as_the_manifest_says(case):
    def filtered(**more: Any) -> dict[str, Any]:
        what = {"body_path": "ok", "equals": False, "action": "FAIL", **more}
        return case.stream("cursor", error_handler={"response_filters": [what], "max_retries": 0})

    def answer() -> None:
        case.api.script.append(Reply(200, {"ok": False, "results": [{"id": 1}]}))

    answer()
    assert case.fails(filtered(error_message="no such list")).public.startswith(
        "shop.orders: no such list ("
    )
    answer()
    dead = case.fails(filtered(failure_type="credentials_error"))
    assert isinstance(dead, CredentialsError)
    answer()
    late = case.fails(filtered(failure_type="transient_error"))
    assert isinstance(late, TransientError)
    answer()
    assert case.rows(filtered(action="IGNORE")) == []
    gone = {"http_codes": [404], "action": "IGNORE"}
    case.api.script.append(Reply(404))
    assert case.rows(case.stream("cursor", error_handler={"response_filters": [gone]})) == []


ANYTHING = recursive(
    none() | booleans() | integers(-(2**70), 2**70) | text(max_size=5) | decimals(-9, 9)
    | sampled_from(["2026-01-01T00:00:00Z", "//evil.example", "\x00", "\ud800"]),
    lambda inner: lists(inner, max_size=3)
    | dictionaries(sampled_from(["id", "at", "results", "next", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=ANYTHING, rows=ANYTHING)
def test_whatever_comes_is_rows_or_an_error_of_ours(case, document, rows):
    def answer(_asked: Asked) -> Reply:
        whole = {"results": rows, "next": document} if len(case.api.asked) % 2 else document
        return Reply(200, json.dumps(whole, default=float).encode())

    case.api.routes["/next/orders"] = answer
    fields = {"id": "integer", "at": "timestamp", "x": "object"}
    selector = {"record_selector": {"field_path": "results"}}
    stream = case.stream("next", schema=fields, raw=True, pages_max=3, **selector)
    with suppress(SyncwardError):
        for row in case.rows(stream):
            assert isinstance(row[0], int)


# ── limits ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"Retry-After": "3600"}),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "3600"}),
        (403, {"Retry-After": "3600"}),
    ],
)
def test_a_long_wait_defers_the_run(case, status, headers):
    case.api.script.append(Reply(status, {"message": "slow down"}, headers))
    error = case.fails(case.stream("cursor"))
    assert isinstance(error, Deferral)
    assert error.retry_after == timedelta(hours=1)


def test_a_short_wait_is_waited_in_place(case):
    case.api.script.extend([Reply(429, {}, {"Retry-After": "0"})] * 5)
    assert len(case.rows(case.stream("cursor"))) == 5


def test_a_limit_that_is_used_up_defers_before_the_next_call(case):
    used = {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "900"}
    case.api.script.append(Reply(200, page(1, paging={"next": {"after": "1"}}), used))
    assert isinstance(case.fails(case.stream("cursor")), Deferral)
    assert len(case.api.asked) == 1


def test_what_headers_say_of_waiting_is_read_by_the_other_clock():
    then = "Wed, 21 Oct 2026 07:28:00 GMT"
    assert told({"date": then, "retry-after": "Wed, 21 Oct 2026 07:29:30 GMT"}) == 90
    reset = str(int(datetime(2026, 10, 21, 7, 30, tzinfo=UTC).timestamp()))
    assert told({"date": then, "x-ratelimit-reset": reset}) == 120
    assert told({"date": then, "retry-after": "Wed, 21 Oct 2020 07:28:00 GMT"}) == 0
    for odd in ("soon", "-1", "1e9", "nan", "inf", "٣", ""):
        assert told({"retry-after": odd}) is None
    assert told({"retry-after": "9" * 400}) == 366 * 86_400
    assert told({"date": "Fri, 31 Dec 9999 23:59:59 -1400", "retry-after": "7"}) == 7
    assert told({"retry-after": "Fri, 31 Dec 9999 23:59:59 -1400"}) is None


def test_calls_keep_to_the_rate_of_the_manifest(case):
    case.manifest["rate_limit"] = {"calls": 1_000, "per": "1s"}
    assert len(case.rows(case.stream("cursor"))) == 5


# ── logins ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("authenticator", "secrets", "header", "value"),
    [
        ({"type": "BearerAuthenticator"}, {"token": TOKEN}, "authorization", f"Bearer {TOKEN}"),
        ({"type": "BasicHttpAuthenticator", "username": "ada"}, {"password": "pw"},
         "authorization", "Basic YWRhOnB3"),
        ({"type": "ApiKeyAuthenticator", "header": "X-Api-Key"}, {"api_key": TOKEN}, "x-api-key",
         TOKEN),
        ({"type": "NoAuth"}, {}, "authorization", None),
    ],
)  # fmt: skip
def test_each_login_sends_what_it_says(case, authenticator, secrets, header, value):
    case.manifest["authenticator"] = authenticator
    assert len(case.rows(case.stream("cursor"), secrets=secrets)) == 5
    assert {one.headers.get(header) for one in case.api.asked} == {value}
    if secrets:
        assert case.fails(case.stream("cursor"), secrets={}).code == "no_credentials"
        broken = dict.fromkeys(secrets, f"{TOKEN}\r\nX-Other: 1")
        assert isinstance(case.fails(case.stream(), secrets=broken), CredentialsError)


@pytest.fixture
def oauth(case):
    case.manifest["authenticator"] = {
        "type": "OAuthAuthenticator", "client_id": "app", "scopes": ["read", "more"],
        "token_refresh_endpoint": "{{ config.url }}",
    }  # fmt: skip
    case.given = 0

    def token(_asked: Asked) -> Reply:
        case.given += 1
        value = f"{TOKEN}-{case.given}"
        case.api.logins = {f"Bearer {value}"}
        return Reply(200, {"access_token": value, "token_type": "Bearer", "expires_in": 3600})

    case.api.routes["/"] = token
    return case


def test_a_token_is_asked_for_once_and_again_when_it_is_refused(oauth):
    calls = 0

    def ends_early(asked: Asked) -> None:
        nonlocal calls
        calls += asked.path != "/"
        if calls == 2:
            oauth.api.logins = set()

    oauth.api.before = ends_early
    assert len(oauth.rows(oauth.stream("cursor"), secrets={"client_secret": TOKEN})) == 5
    assert oauth.given == 2
    asked = next(one for one in oauth.api.asked if one.path == "/")
    assert (
        asked.body
        == (
            f"grant_type=client_credentials&scope=read+more&client_id=app&client_secret={TOKEN}"
        ).encode()
    )


def test_a_new_token_that_is_refused_at_once_is_a_dead_login(oauth):
    oauth.api.before = lambda _asked: setattr(oauth.api, "logins", set())
    oauth.api.routes["/"] = lambda _: Reply(
        200, {"access_token": f"{TOKEN}-{len(oauth.api.asked)}"}
    )
    error = oauth.fails(oauth.stream("cursor"), secrets={"client_secret": TOKEN})
    assert isinstance(error, CredentialsError)


@pytest.mark.parametrize(
    ("reply", "type_", "code"),
    [
        (Reply(200, {"access_token": None}), ConfigError, "api_answer"),
        (Reply(200, {"access_token": "a\r\nX: y"}), ConfigError, "api_answer"),
        (Reply(200, {"access_token": "x" * 20_000}), ConfigError, "api_answer"),
        (Reply(200, {"access_token": "abc", "token_type": "mac"}), ConfigError, "api_answer"),
        (Reply(200, {"error": "server_error"}), ConfigError, "api_answer"),
        (Reply(200, b"<html>hunter2"), ConfigError, "api_answer"),
        (Reply(200, ["hunter2"]), ConfigError, "api_answer"),
        (Reply(302, b"", {"Location": "https://evil.example/"}), ConfigError, "api_answer"),
        (Reply(200, {"error": "invalid_client"}), CredentialsError, "credentials"),
        (Reply(400, {"error": "invalid_grant"}), CredentialsError, "credentials"),
        (Reply(401, b"no"), CredentialsError, "credentials"),
        (Reply(503, b"hunter2"), TransientError, "api_unavailable"),
    ],
)  # fmt: skip
def test_a_token_endpoint_that_lies_is_named_and_tells_nothing(oauth, reply, type_, code):
    oauth.api.script.append(reply)
    error = oauth.fails(oauth.stream("cursor"), secrets={"client_secret": TOKEN})
    assert (type(error), error.code) == (type_, code)
    assert "hunter2" not in everything(error)
    assert oauth.api.paths() == ["/"]


@pytest.mark.parametrize("said", [None, "soon", -1, 0, 10**30, True, "3600", 1.5, [1]])
def test_a_life_of_a_token_that_cannot_be_is_not_believed(oauth, said):
    real = oauth.api.routes["/"]

    def lying(asked: Asked) -> Reply:
        reply = real(asked)
        reply.body["expires_in"] = said
        return reply

    oauth.api.routes["/"] = lying
    assert len(oauth.rows(oauth.stream("cursor"), secrets={"client_secret": TOKEN})) == 5
    assert oauth.given == 1


# ── windows ──────────────────────────────────────────────────────────────────────────────────

TIMED = {"id": "integer", "updated_at": "timestamp"}
EVERY_DAY = {
    "cursor_field": "updated_at", "start_datetime": "2026-01-01T00:00:00Z",
    "start_time_option": {"field_name": "updated_since"},
    "end_time_option": {"field_name": "updated_until"}, "step": "1d",
}  # fmt: skip
MERGE = {"mode": "merge", "key": ("id",), "cursor": "updated_at"}
APPEND = {"mode": "append", "cursor": "updated_at"}
DAY_4 = datetime(2026, 1, 4, 0, 1, tzinfo=UTC)


@pytest.fixture
def timed(case):
    case.api.clock = lambda: DAY_4
    case.api.tables["orders"] = [
        {"id": 1, "updated_at": "2026-01-01T10:00:00Z"},
        {"id": 2, "updated_at": "2026-01-02T00:00:00Z"},
        {"id": 3, "updated_at": "2026-01-03T10:00:00Z"},
    ]
    return case


def ids(rows: list[tuple[Any, ...]]) -> list[int]:
    return [row[0] for row in rows]


def test_a_first_read_comes_in_windows_each_with_its_cursor(timed):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    found = list(timed.batches(stream, **APPEND))
    days = [(b.lower and b.lower["value"][:10], b.upper["value"][:10], b.more) for b, _ in found]
    assert days == [
        (None, "2026-01-02", True), ("2026-01-02", "2026-01-03", True),
        ("2026-01-03", "2026-01-04", False),
    ]  # fmt: skip
    assert [ids(rows) for _, rows in found] == [[1], [2], [3]]  # the API gives 2 twice
    assert [b.full for b, _ in found] == [True, False, False]
    asked = [(o.query["updated_since"], o.query["updated_until"]) for o in timed.api.asked]
    assert asked[0] == ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")


def test_the_next_read_goes_on_from_the_cursor_with_overlap_in_a_merge(timed):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    cursor = {"kind": "window", "value": "2026-01-03T12:00:00+00:00"}
    ((batch, rows),) = timed.batches(stream, since=cursor, **MERGE)
    assert (ids(rows), batch.lower, batch.full) == ([], cursor, False)
    ((batch, rows),) = timed.batches(stream, since=cursor, overlap="6h", **MERGE)
    assert ids(rows) == [3]


def test_a_full_refresh_is_one_batch_and_brings_the_keys_for_deletes(timed):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    ((batch, rows),) = timed.batches(stream, sweep=True, **MERGE, deletes="hard")
    assert (sorted(set(ids(rows))), batch.full, batch.more) == ([1, 2, 3], True, False)
    keys = [row for group in batch.keys.groups for row in group.rows]
    assert [c.name for c in batch.keys.columns] == ["id"]
    assert {key[0] for key in keys} == {1, 2, 3}


def test_a_backfill_brings_exactly_the_records_between_two_times(timed):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    spec = StreamSpec(name="shop.orders", **MERGE)
    between = Between(lower="2026-01-01T12:00", upper="2026-01-03 10:00:00")
    with (
        closing(timed.open(stream)) as source,
        source.extract(spec, None, WireFormat.ROWS, between=between) as batches,
    ):
        (batch,) = batches
        assert [row[0] for group in batch.groups for row in group.rows] == [2]
    assert (batch.full, batch.lower["value"]) == (False, "2026-01-01T12:00:00+00:00")
    assert batch.upper["value"] == "2026-01-03T10:00:00+00:00"


def test_what_changes_while_all_is_read_is_not_taken_for_gone(timed):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    timed.api.tables["orders"].append({"id": 4, "updated_at": "2026-01-04T00:00:40Z"})
    ((batch, rows),) = timed.batches(stream, sweep=True, **MERGE, deletes="hard")
    assert batch.upper["value"] == "2026-01-04T00:00:00+00:00"
    assert 4 in ids(rows)
    assert (4,) in [row for group in batch.keys.groups for row in group.rows]
    assert sorted(timed.rows(stream)) == sorted(rows)


def test_the_bound_is_the_earlier_clock_and_never_the_newest_record(timed):
    how = {k: v for k, v in EVERY_DAY.items() if k not in {"step", "end_time_option"}}
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=how)
    timed.api.tables["orders"].append({"id": 9, "updated_at": "2031-01-01T00:00:00Z"})
    ((batch, _),) = timed.batches(stream, **MERGE)
    assert batch.upper["value"] == "2026-01-04T00:00:00+00:00"
    ((batch, rows),) = timed.batches(stream, **APPEND)
    assert ids(rows) == [1, 2, 3]
    timed.api.clock = lambda: datetime(2100, 1, 1, tzinfo=UTC)
    ((batch, _),) = timed.batches(stream, **MERGE)
    assert datetime.fromisoformat(batch.upper["value"]) < datetime.now(UTC)


def test_a_clock_that_goes_back_does_not_take_the_cursor_with_it(timed):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    cursor = {"kind": "window", "value": "2026-02-01T00:00:00+00:00"}
    timed.api.tables["orders"].append({"id": 4, "updated_at": "2026-01-04T00:00:30Z"})
    ((batch, _),) = timed.batches(stream, since=cursor, **APPEND)
    assert batch.upper == cursor
    assert "clock there went back" in batch.notes[0]


def test_a_record_without_its_time_cannot_be_appended(timed):
    timed.api.tables["orders"].append({"id": 4, "updated_at": None})
    timed.api.routes["/cursor/orders"] = lambda _: Reply(200, {"results": [{"id": 4}]})
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    assert timed.fails(stream, **APPEND).code == "data_refused"


# ── what a connection may ask for ────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"mask": {"updated_at": "redact"}}, "no field that can be masked"),
        ({"mask": {"other": "redact"}}, "no field that can be masked"),
        ({"where": "id > 1"}, "request_parameters"), ({"name": "other"}, "no such stream"),
        ({**MERGE, "cursor": "id"}, "cursor id is none"), ({**MERGE, "key": ("x",)}, "no column x"),
        ({**MERGE, "deletes": "hard", "key_sweep": 2}, "no list of keys"),
    ],
)  # fmt: skip
def test_what_an_api_cannot_do_is_refused_before_it_is_asked(timed, spec, says):
    stream = timed.stream("cursor", schema=TIMED, incremental_sync=EVERY_DAY)
    assert says in str(timed.fails(stream, **spec))
    assert timed.api.asked == []


def test_what_is_left_out_or_masked_is_in_no_row(case):
    case.api.tables["orders"] = [{"id": 7, "mail": "ada@example.org", "ssn": "078-05-1120"}]
    fields = {"id": "integer", "mail": "string", "ssn": "string"}
    hidden: dict[str, Any] = {
        "columns": {"exclude": ("ssn", "raw")}, "mask": {"mail": "truncate(3)", "id": "redact"},
    }  # fmt: skip
    stream = case.stream(schema=fields, primary_key=[], raw=True)
    spec = StreamSpec(name="shop.orders", mode="replace", **hidden)
    with (
        closing(case.open(stream)) as source,
        source.extract(spec, None, WireFormat.ROWS) as batches,
    ):
        (batch,) = batches
        masking.masked(batch, spec, None)
        assert [c.name for c in batch.shape.columns] == ["id", "mail"]
        assert [row for group in batch.groups for row in group.rows] == [("[redacted]", "ada")]
    assert "leave it out, too" in str(case.fails(stream, mask={"mail": "redact"}))


def test_a_forbidden_host_is_refused_when_the_resource_is_opened(case):
    config = {"manifest": case.write(case.stream()), "parameters": {"url": "http://10.0.0.1/"}}
    with pytest.raises(EgressRefused):
        registry.open_source("rest", config, {}, LOOSE)


def test_a_cancelled_read_ends(case):
    with closing(case.open(case.stream("cursor"))) as source:
        source.cancel()
        with pytest.raises(TransientError) as caught:
            source.test()
    assert caught.value.code == "cancelled_there"


def test_a_compressed_answer_is_read(case):
    body = gzip.compress(b'[{"id": 1}]')
    case.api.script.append(Reply(200, body, {"Content-Encoding": "gzip"}))
    assert case.rows(case.stream()) == [(1,)]
