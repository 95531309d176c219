"""JSON of an API: what the quick parser takes is what the standard library reads, to the digit."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from connectors.rest import exact_json
from connectors.rest.exact_json import NoJson, as_it_stands, parse, texts, write

ODD = [
    b"1e400", b"-0.0", b"-0", b"0.10", b"1.0", b"1E5", b"12345678901234567890", b"-" + b"9" * 50,
    b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\udc00\\ud800"', b'"\\u0000"', b'{"a":1,"a":2}',
    b"\xef\xbb\xbf{}", '{"a":1.50}'.encode("utf-16"), b' {"a" : 1 } \n', b"1e-400", b"0e999",
    b"123456789012345678901.5", b"18446744073709551616", b"-9223372036854775809", b'{"\\ud800":1}',
]  # fmt: skip
NOT_JSON = [
    b"", b"NaN", b"-Infinity", b"[1,]", b'"\xff"', b"[" * 5_000 + b"]" * 5_000, b'"\x01"', b"01",
    b"1.", b".5", b"null x", b"-", b"1e", b"tru", b"9" * 5_000, b"1e1001", b"1e-1001",
    b"0." + b"1" * 1_001, b"<html>",
]  # fmt: skip

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str)
)  # fmt: skip
DOCUMENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def slowly(body: bytes) -> Any:
    return json.loads(body, parse_float=Decimal)


def images(document: object) -> str:
    """Tell 1.0 from 1.00, -0.0 from 0.0, and a whole number from a fraction."""
    return repr(document)


def stored(text: str) -> str:
    """As a jsonb keeps it: each number with its digits, and no sign of how it was written."""
    return images(json.loads(text, parse_float=_digits, parse_int=_digits))


def _digits(text: str) -> str:
    return format(Decimal(text), "f")


@pytest.mark.parametrize("body", ODD, ids=repr)
def test_odd_documents_are_read_as_the_standard_library_reads_them(body):
    assert images(parse(body)) == images(slowly(body))


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:12]))
def test_what_is_none_is_refused_without_a_word_of_it(body):
    with pytest.raises(NoJson) as refused:
        parse(body)
    assert str(refused.value) == ""


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, st.booleans())
def test_any_document_is_read_as_the_standard_library_reads_it(document, ascii_only):
    body = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert images(parse(body)) == images(slowly(body))


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.dictionaries(st.text(), DOCUMENTS), max_size=5), spaced=st.booleans())
# a whole number, written as a fraction
@example(records=[{"a": 1.2879019119837072e16}], spaced=False)
def test_a_record_as_it_stands_says_the_same_as_one_that_is_written(records, spaced):
    separators = None if spaced else (",", ":")
    body = json.dumps({"a": {"b": records}}, separators=separators).encode()
    found = texts(body, ("a", "b"), len(records))
    assert found is not None
    for record, text in zip(slowly(body)["a"]["b"], found, strict=True):
        try:
            written = write(record)
        except NoJson:
            with pytest.raises(NoJson):
                as_it_stands(text, record)
        else:
            assert stored(as_it_stands(text, record)) == stored(written)


def test_records_that_cannot_be_told_apart_are_written_again():
    assert texts(b'{"a": {}}', ("a",), 0) is None
    assert texts(b'{"a": [1, 2]}', ("a",), 3) is None
    assert texts(b'{"b": []}', ("a",), 0) is None
    assert texts(b"\xef\xbb\xbf[]", (), 0) is None
    assert [bytes(t) for t in texts(b'{"a":[1],"a":[ {"x":1.0} ]}', ("a",), 1) or ()] == [
        b'{"x":1.0}'
    ]


@pytest.mark.parametrize("text", [b'"\\u0000"', b'{"\\u0000":1}', b'"\\ud800"'])
def test_what_no_jsonb_takes_is_refused_also_as_it_stands(text):
    (found,) = texts(b"[" + text + b"]", (), 1) or [exact_json.Text(text)]
    with pytest.raises(NoJson):
        as_it_stands(found, slowly(text))


@pytest.mark.parametrize("half", [b'{"a":"\xed\xa0\x80"}', b'{"\xed\xa0\x80":1}'], ids=repr)
def test_half_a_character_in_bytes_is_refused_and_not_quoted(half):
    body = b"[" + half + b"]"
    (found,) = texts(body, (), 1) or [exact_json.Text(half)]
    with pytest.raises(NoJson) as refused:
        as_it_stands(found, parse(body)[0])
    assert str(refused.value) == ""
