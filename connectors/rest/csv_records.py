"""CSV as an API sends it: records whose values have the types of the stream's schema.

An empty value is null. A text that is no value of its field's type stays a text, which the schema
then refuses, with its field and key. A line of commas is small and becomes a record with all names:
so records are made a few at a time, and what would be very many cells is refused before it is one.
"""

import csv
import io
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from connectors.http_link import Answer
from connectors.rest import exact_json
from connectors.rest.parts import FieldSpec
from connectors.rest.values import Type
from schemas.errors import ConfigError

_WORDS = {"true": True, "false": False}
#: One limit for all threads, so it is set once; records are bounded as they come.
_FIELD_MAX = 2**31 - 1
csv.field_size_limit(_FIELD_MAX)
_READ_AS_JSON = {Type.INTEGER, Type.NUMBER, Type.OBJECT, Type.ARRAY}

#: Of one record: its characters, and its commas, most of which are part of a text then.
_RECORD_MAX, _COMMAS_MAX = 16 * 2**20, 1_000_000
#: Of the line of names, which becomes a part of each record.
_NAMES_MAX, _NAMES_SIZE_MAX = 10_000, 2**20
#: Records that are made together, and about how many bytes they have with their names.
_TOGETHER, _BYTES_TOGETHER = 1_000, 2**20
#: Bytes of an empty value.
_CELL = 8

#: Some records, and about how many bytes they have.
Part = tuple[list[dict[str, Any]], int]


def parts(where: str, answer: Answer, fields: Mapping[str, FieldSpec]) -> Iterator[Part]:
    """Yield the records of an answer, some at a time, by the names in its first line."""
    types = {".".join(spec.field or (name,)): spec.type for name, spec in fields.items()}
    try:
        yield from _parts(where, answer.body, types)
    except (UnicodeDecodeError, csv.Error, ValueError):
        raise ConfigError(
            f"{where}: answers with what is no CSV with one line of names; look at path and "
            "decoder",
            code="api_answer",
        ) from None


def _too_much(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where}: answers with CSV {what}; ask for less, or for JSON", code="api_answer"
    )


class _Lines:
    """The lines of a text, counted before anybody takes them apart."""

    def __init__(self, where: str, body: bytes) -> None:
        self._where = where
        self._file = io.TextIOWrapper(io.BytesIO(body), encoding="utf-8-sig", newline="")
        self._commas_max = _NAMES_MAX - 1
        self._commas = 0
        self.size = 0  # of the record, which may have several lines

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_RECORD_MAX + 1):
            self.size += len(line)
            self._commas += line.count(",")
            if self.size > _RECORD_MAX:
                raise _too_much(
                    self._where, f"of which a record has more than {_RECORD_MAX >> 20} MiB"
                )
            if self._commas > self._commas_max:
                raise _too_much(
                    self._where, f"with more than {self._commas_max:,} commas in a record"
                )
            yield line

    def turn(self, *, commas_max: int = _COMMAS_MAX) -> None:
        """Begin another record."""
        self._commas_max = commas_max
        self.size = self._commas = 0


def _parts(where: str, body: bytes, types: Mapping[str, Type]) -> Iterator[Part]:
    lines = _Lines(where, body)
    reader = csv.reader(lines, strict=True)
    names = next(reader, [])
    if len(set(names)) < len(names):
        raise ValueError  # one of two would be lost
    if lines.size > _NAMES_SIZE_MAX:
        raise _too_much(where, f"whose names have more than {_NAMES_SIZE_MAX >> 20} MiB")
    each = lines.size + _CELL * len(names)
    kinds = [types.get(name) for name in names]
    records, size = list[dict[str, Any]](), 0
    lines.turn()
    for line in reader:
        if line:
            values = [None if text == "" else _typed(text, kind) for text, kind in
                      zip(line, kinds, strict=True)]  # fmt: skip
            records.append(dict(zip(names, values, strict=True)))
            size += each + lines.size
        lines.turn()
        if size >= _BYTES_TOGETHER or len(records) >= _TOGETHER:
            yield records, size
            records, size = [], 0
    if records:
        yield records, size


def _typed(text: str, type_: Type | None) -> object:
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
