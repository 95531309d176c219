"""What an API that is broken or hostile may send: heads, bodies, waits, documents, keys."""

import gzip
import json
import resource
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from connectors.http_link import Bounds, Link
from connectors.rest import asking, limits
from connectors.rest.reading import Once
from connectors.rest.trial import schema_of
from schemas.errors import ConfigError, Deferral, SyncwardError, TransientError
from tests.connectors.test_http_link import raw_server
from tests.connectors.test_rest_csv import job, lines
from tests.connectors.test_rest_run import MANIFEST, Shop
from tests.rest_api import Asked, Reply
from tests.rest_case import everything
from tests.world import LOOSE

OK = b"HTTP/1.1 200 OK\r\n"
MIB = 2**20


def answered(answer: Callable[[Any], None]) -> SyncwardError | bytes:
    """What comes of a server that does this with a connection, and how much memory it took."""
    bounds = Bounds(body_max=MIB, total_s=5, read_s=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def once(one: Any) -> None:
        one.recv(4_096)
        answer(one)

    found: SyncwardError | bytes
    with raw_server(once) as server, closing(Link(LOOSE, bounds=bounds)) as link:
        try:
            found = link.call("GET", f"http://127.0.0.1:{server.getsockname()[1]}/").body
        except SyncwardError as error:
            found = error
    assert isinstance(found, bytes) or "canary" not in everything(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1_024
    return found


def endless(begin: bytes, more: bytes) -> Callable[[Any], None]:
    def send(one: Any) -> None:
        one.sendall(begin)
        with suppress(OSError):
            while True:
                one.sendall(more)

    return send


# ── heads and bodies ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (OK, b"X-More: canary\r\n" * 100),
        (OK + b"Link: <", b"canary" * 1_000),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n[]\r\n0\r\n", b"X-More: canary\r\n" * 100),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2;", b"canary" * 1_000),
    ],
    ids=["headers", "one header", "trailers", "chunk"],
)
def test_a_head_that_does_not_end_is_no_lost_link(begin, more):
    error = answered(endless(begin, more))
    assert isinstance(error, ConfigError)
    assert (error.code, "more than 100 KiB of headers" in str(error)) == ("api_answer", True)


def packed(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


def zipped(begin: bytes, more: bytes) -> Callable[[Any], None]:
    return endless(OK + b"Content-Encoding: gzip\r\n\r\n" + begin, more)


@pytest.mark.parametrize(
    ("begin", "more", "says"),
    [
        (packed(b"[]"), b"canary" * 10_000, "says gzip and sends something else"),
        (packed(b"[]"), bytes(60_000), "more than 1 MiB"),
        (packed(b"[]"), packed(b"") * 3_000, "more than 1 MiB"),
        (b"", packed(b"x" * 1_000) * 100, "more than 1 MiB"),
    ],
    ids=["garbage", "zeros", "empty ones", "ones"],
)
def test_what_comes_behind_gzip_fills_no_memory(begin, more, says):
    error = answered(zipped(begin, more))
    assert isinstance(error, ConfigError)
    assert says in str(error)


def sent(head: bytes, body: bytes) -> Callable[[Any], None]:
    return lambda one: one.sendall(OK + head + b"\r\n\r\n" + body)


def test_gzip_of_several_is_whole_and_one_in_another_is_no_json(case):
    body = packed(b'[{"id":1},') + packed(b'{"id":2}]') + bytes(512)
    assert answered(sent(b"Content-Encoding: gzip", body)) == b'[{"id":1},{"id":2}]'
    cut = answered(sent(b"Content-Encoding: gzip", packed(b"[") + packed(b"1" * 99)[:-9]))
    assert isinstance(cut, TransientError)
    case.api.routes["/all/orders"] = lambda _asked: Reply(
        200, packed(packed(b"[]")), {"Content-Encoding": "gzip"}
    )
    assert "what is no JSON" in str(case.fails(case.stream()))


def test_csv_that_ends_with_the_connection_could_be_a_part(case):
    case.api.routes["/jobs/j1/results"] = lambda _asked: Reply(200, [])
    stream = job(case, lines(0, 5))
    with raw_server(lambda one: (one.recv(4_096), one.sendall(OK + b"\r\n" + lines(0, 5)))) as bare:
        url = f"http://127.0.0.1:{bare.getsockname()[1]}/"
        with closing(Link(LOOSE)) as link:
            assert link.call("GET", url).whole is False
    real = asking.Asker.answer

    def cut(self: Any, where: str, ask: Any, handler: Any) -> Any:
        answer = real(self, where, ask, handler)
        if ask.route.endswith("/results"):
            object.__setattr__(answer, "whole", False)
        return answer

    assert len(case.rows(stream)) == 5
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asking.Asker, "answer", cut)
        error = case.fails(stream)
    assert (error.code, "a part would be taken for all" in str(error)) == ("api_unavailable", True)


# ── waits ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("315360000", 366 * 86_400), ("9" * 400, 366 * 86_400), ("-5", None), ("0", 0.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Fri, 31 Dec 9999 23:59:59 GMT", 366 * 86_400),
        ("1e9", None), ("٣", None), ("inf", None), ("5, 10", None), ("", None),
        ("x" * 90_000, None),
    ],
)  # fmt: skip
def test_a_time_to_wait_is_bounded_whatever_is_said(header, seconds):
    assert limits.retry_after({"retry-after": header}) == seconds


def test_a_reset_in_milliseconds_is_no_wait_of_years():
    now = datetime.now(UTC).timestamp()
    found = limits.told({"x-ratelimit-reset": str(int((now + 30) * 1_000))})
    assert found == pytest.approx(30, abs=5)


@pytest.mark.parametrize("header", ["0", "Thu, 01 Jan 1970 00:00:00 GMT", "-5"])
def test_no_time_to_wait_is_not_asked_again_at_once(case, header):
    case.api.script.extend(Reply(429, {}, {"Retry-After": header}) for _ in range(2))
    case.api.tables["orders"] = [{"id": 1}]
    began = time.monotonic()
    assert case.rows(case.stream()) == [(1,)]
    assert time.monotonic() - began > 0.375 + 0.75  # the usual pauses


def test_ten_years_are_told_and_not_waited(case):
    case.api.script.append(Reply(429, {}, {"Retry-After": "315360000"}))
    error = case.fails(case.stream())
    assert isinstance(error, Deferral)
    assert error.retry_after is not None
    assert error.retry_after.days == 366


# ── documents ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [300, 900, 10_000])
def test_arrays_in_arrays_end(case, depth):
    record = b'{"id":1,"a":' + b"[" * depth + b"]" * depth + b"}"
    case.api.routes["/all/orders"] = lambda _asked: Reply(200, b"[" + record + b"]")
    stream = case.stream(schema={"id": "integer", "a": "any"}, raw=True)
    error = case.fails(stream)
    assert error.code in {"api_answer", "data_refused"}


def test_a_member_that_comes_twice_counts_as_the_last_also_as_it_stands(case):
    body = b'[{"id":1,"id":2,"\\u0069d":3,"a":{"b":1,"b":2}}]'
    case.api.routes["/all/orders"] = lambda _asked: Reply(200, body)
    ((key, a, raw),) = case.rows(case.stream(schema={"id": "integer", "a": "any"}, raw=True))
    assert (key, json.loads(str(a)), json.loads(str(raw))) == (
        3, {"b": 2}, {"id": 3, "a": {"b": 2}},
    )  # fmt: skip


def test_a_cursor_of_a_mebibyte_is_no_cursor(case):
    page = {"results": [{"id": 1}], "paging": {"next": {"after": "x" * MIB}}}
    case.api.routes["/cursor/orders"] = lambda _asked: Reply(200, page)
    assert "a cursor of more than 16 KiB" in str(case.fails(case.stream("cursor")))


def test_a_place_that_is_null_holds_nothing_unless_the_answer_tells_of_an_error(case):
    answers = {"results": None}
    case.api.routes["/cursor/orders"] = lambda _asked: Reply(200, answers)
    assert case.rows(case.stream("cursor")) == []
    one = {"field_path": "results", "one": True}
    assert case.rows(case.stream("cursor", record_selector=one)) == []
    for word in ("error", "errors", "fault"):
        answers[word] = [{"message": "canary"}]  # type: ignore[assignment]
        error = case.fails(case.stream("cursor"))
        assert (error.code, f"but `{word}`" in str(error)) == ("api_answer", True)
        del answers[word]
    answers["message"] = "OK"  # type: ignore[assignment]
    assert case.rows(case.stream("cursor")) == []


# ── keys and numbers ─────────────────────────────────────────────────────────────────────────


def test_a_key_is_the_same_however_a_number_is_written_and_a_text_is_its_letters(case):
    pages = [b'{"results":[{"id":1.0},{"id":2}],"paging":{"next":{"after":"b"}}}',
             b'{"results":[{"id":1},{"id":2.00},{"id":3e0},{"id":4E1}]}']  # fmt: skip

    def answer(asked: Asked) -> Reply:
        return Reply(200, pages["after" in asked.query])

    case.api.routes["/cursor/orders"] = answer
    assert case.rows(case.stream("cursor")) == [(1,), (2,), (3,), (40,)]
    numbers = case.rows(case.stream("cursor", schema={"id": "number"}))
    assert [str(number) for (number,) in numbers] == ["1.0", "2", "3", "4E+1"]
    case.api.routes["/cursor/orders"] = lambda _asked: Reply(
        200, {"results": [{"id": "\u00e9"}, {"id": "e\u0301"}]}
    )
    assert len(case.rows(case.stream("cursor", schema={"id": "string"}))) == 2


def test_numbers_that_differ_far_behind_the_point_are_two_keys():
    once = Once()
    long = "0." + "1" * 60
    assert [once.is_new((Decimal(text),)) for text in (long + "1", long + "2", long + "10")] == [
        True, True, True,
    ]  # fmt: skip
    once.turn()
    assert [once.is_new((Decimal(text),)) for text in (long + "20", "0", "-0.0", "0E+5")] == [
        False, True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["1.5", "1e400", "9223372036854775808.0", "1e19", "-9.3e18"])
def test_a_fraction_or_what_is_too_large_is_no_integer(case, value):
    case.api.routes["/all/orders"] = lambda _asked: Reply(200, f'[{{"id":{value}}}]'.encode())
    assert "is no integer" in str(case.fails(case.stream()))


def test_a_price_that_is_whole_by_chance_is_not_shown_as_an_integer():
    assert schema_of([{"a": Decimal("1.0"), "b": 1}]) == {"a": "number", "b": "integer"}


#: As an API writes it, and as it is in a bigint, a numeric, a text of the masked number.
NUMBERS = [
    "0", "-0", "1", "1.0", "1e3", "-0.0", "1.2879019119837072e+16", "9223372036854775807",
    "12879019119837072", "-9.223372036854775808e18",
]  # fmt: skip
FRACTIONS = ["1e22", "1E400", "0.10", "1e-20", "-1.50", "123456789012345678901234567890", "0e999"]


@pytest.mark.integration
def test_numbers_land_as_they_are_and_are_unchanged_the_next_time(world, api, tmp_path):
    """Whether a record is kept as it stands or written anew: both are the same in the database."""

    def records() -> bytes:
        some = [
            f'{{"id":"w{n}","w":{text},"n":{text},"a":{text}}}' for n, text in enumerate(NUMBERS)
        ]
        some += [f'{{"id":"f{n}","n":{text},"a":{text}}}' for n, text in enumerate(FRACTIONS)]
        return f"[{','.join(some)}]".encode()

    api.routes["/numbers"] = lambda _asked: Reply(200, records())
    stream = {
        "path": "/numbers", "primary_key": ["id"],
        "schema": {"id": "string", "w": "integer", "n": "number", "a": "any"},
    }  # fmt: skip
    anew = {**stream, "record_selector": {"remove_fields": ["nothing"]}}
    shop = Shop(world, api, tmp_path)
    manifest = {**MANIFEST, "check": {"stream_names": ["stands"]}}
    manifest["streams"] = {"stands": stream, "anew": anew}
    merge = {"mode": "replace", "key": ["id"]}
    masked = {**merge, "mask": {"w": "hmac"}, "columns": {"exclude": ["raw"]}}
    shop.apply(manifest, {"shop.stands": merge, "shop.anew": merge})
    for loaded in (len(NUMBERS) + len(FRACTIONS), 0):
        run, streams = world.sync()
        assert (run.state, run.error) == ("succeeded", None)
        assert [one.rows_inserted for one in streams.values()] == [loaded, loaded]
        assert [one.rows_updated for one in streams.values()] == [0, 0]
    shown = "id, w::text, n::text, a::text, raw::text"
    found = shop.rows("stands", shown)
    assert found == shop.rows("anew", shown)
    for key, whole, number, any_, raw in found:
        written = (NUMBERS if key[0] == "w" else FRACTIONS)[int(key[1:])]
        exact = Decimal(written)
        assert Decimal(number) == Decimal(any_) == exact
        assert json.loads(raw, parse_float=Decimal, parse_int=Decimal)["n"] == exact
        assert whole is None or Decimal(whole) == exact

    # the same number, written in another way, is the same token
    shop.apply({**manifest, "streams": {"masked": stream}, "check": {"stream_names": ["masked"]}},
               {"shop.masked": masked})  # fmt: skip
    world.sync()
    tokens = dict(shop.rows("masked", "id, w"))
    assert tokens["w2"] == tokens["w3"] != tokens["w4"]
    assert tokens["w6"] == tokens["w8"]
    assert tokens["w0"] == tokens["w1"] == tokens["w5"]
