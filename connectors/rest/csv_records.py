"""CSV as an API sends it: records whose values have the types of the stream's schema.

An empty value is null. A text that is no value of its field's type stays a text, which the schema
then refuses, with its field and key.
"""

import csv
import io
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from connectors.http_link import Answer
from connectors.rest import exact_json
from connectors.rest.parts import FieldSpec
from connectors.rest.values import Type
from schemas.errors import ConfigError

# The limit is the whole process's: set once and for all, as answers are bounded themselves.
csv.field_size_limit(2**31 - 1)

_WORDS = {"true": True, "false": False}
#: One limit for all threads, so it is set once; answers are bounded as they come.
_FIELD_MAX = 2**31 - 1
csv.field_size_limit(_FIELD_MAX)
_READ_AS_JSON = {Type.INTEGER, Type.NUMBER, Type.OBJECT, Type.ARRAY}


def records(where: str, answer: Answer, fields: Mapping[str, FieldSpec]) -> list[dict[str, Any]]:
    """Return the records of an answer, by the names in its first line."""
    types = {".".join(spec.field or (name,)): spec.type for name, spec in fields.items()}
    try:
        text = answer.body.decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError  # noqa: TRY301 - one of two would be lost
        found = [_record(names, line, types) for line in lines if line]
    except (UnicodeDecodeError, csv.Error, ValueError):
        raise ConfigError(
            f"{where}: answers with what is no CSV with one line of names; look at path and "
            "decoder",
            code="api_answer",
        ) from None
    return found


def _record(names: list[str], line: list[str], types: Mapping[str, Type]) -> dict[str, Any]:
    return {name: _typed(value, types.get(name)) for name, value in zip(names, line, strict=True)}


def _typed(text: str, type_: Type | None) -> object:
    if text == "":
        return None
    if type_ is Type.BOOLEAN:
        return _WORDS.get(text.lower(), text)
    if type_ in _READ_AS_JSON:
        try:
            value = exact_json.parse(text.encode())
        except exact_json.NoJson:
            return text
        whole = type_ is Type.INTEGER and isinstance(value, Decimal) and value == int(value)
        return int(value) if whole else value
    return text
