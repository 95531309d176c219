"""JSON as an API sends it: parsed without losing a digit, written again for a column of jsonb."""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec
import orjson

#: Digits and size of the largest fraction; beyond, a few bytes would be written as a long text.
_DIGITS_MAX, _EXPONENT_MAX = 1_000, 1_000
#: A fraction that is certainly within both.
_SHORT = 100
_INT8 = 2**63


#: A document as it stands in a larger one.
Text = msgspec.Raw


class NoJson(ValueError):  # noqa: N818 - says what it is
    """Not a JSON document, or one that holds what no column takes."""


def parse(body: bytes) -> Any:  # noqa: ANN401 - JSON
    """Return the document, with fractions as decimals; NoJson says nothing of what it holds."""
    try:
        return _QUICK.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        pass  # what it refuses may still be JSON: another encoding, half a character
    try:
        return json.loads(body, parse_float=_decimal, parse_constant=_constant)
    except (ValueError, RecursionError):
        raise NoJson from None


def _decimal(text: str) -> Decimal:
    if len(text) <= _SHORT and "e" not in text and "E" not in text:
        return Decimal(text)
    if len(text) > _DIGITS_MAX:
        raise NoJson
    number = Decimal(text)
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or abs(exponent) > _EXPONENT_MAX:
        raise NoJson
    return number


_QUICK = msgspec.json.Decoder(float_hook=_decimal)
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


def texts(body: bytes, path: Sequence[str], count: int) -> Sequence[Text] | None:
    """Return the items of the array at a path, as they stand in a document that was parsed.

    None if they cannot be told apart there, or are not so many.
    """
    found: bytes | Text = body
    try:
        for step in path:
            found = _MEMBERS.decode(found)[step]
        items = _ITEMS.decode(found)
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError):
        return None
    return items if len(items) == count else None


def as_it_stands(text: Text, document: object) -> str:
    """Return the text of a document for a jsonb, without writing it again; NoJson as `write`."""
    try:
        found = str(text, "utf-8")
    except UnicodeDecodeError:  # half a character, written as bytes
        return write(document)
    if "\\u" in found:  # what jsonb does not take is written so
        return write(document)
    return found


def all_as_they_stand(texts: Sequence[Text] | None, documents: Sequence[object]) -> list[str]:
    """Return the texts of documents, as they stand where that is known; NoJson as `write`."""
    if texts is None:
        return list(map(write, documents))
    return [as_it_stands(text, document) for text, document in zip(texts, documents, strict=True)]


def _constant(_text: str) -> None:
    raise NoJson


def write(document: object) -> str:
    """Return a document as the text of a jsonb, with the numbers as they came.

    NoJson for what jsonb does not take: a NUL, half a character, nesting without end.
    """
    try:
        text = orjson.dumps(document, default=_decimal_as_it_is).decode()
    except (TypeError, ValueError):  # orjson's own error is a TypeError
        text = _written_slowly(document)
    if "\\u0000" in text and _holds_nul(document):
        raise NoJson
    return text


def _decimal_as_it_is(value: object) -> orjson.Fragment:
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value).encode())
    raise TypeError


def _written_slowly(document: object) -> str:
    """Write a document that holds whole numbers of more than 64 bits, if that is what it is."""
    try:
        return orjson.dumps(_wrapped(document), default=_decimal_as_it_is).decode()
    except (TypeError, ValueError, RecursionError):
        raise NoJson from None


def _wrapped(document: object) -> object:
    if isinstance(document, dict):
        return {name: _wrapped(value) for name, value in document.items()}
    if isinstance(document, list):
        return [_wrapped(value) for value in document]
    if isinstance(document, int) and not -_INT8 <= document < _INT8:
        return orjson.Fragment(str(document).encode())
    return document


def _holds_nul(document: object) -> bool:
    if isinstance(document, str):
        return "\x00" in document
    if isinstance(document, list):
        return any(map(_holds_nul, document))
    if isinstance(document, dict):
        return any("\x00" in name or _holds_nul(value) for name, value in document.items())
    return False
