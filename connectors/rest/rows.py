"""Records as rows: typed columns by the schema of the manifest, and the whole record beside them.

A value that does not fit ends the read with its stream, field and key, and is never shown.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

from connectors.rest import exact_json
from connectors.rest import text as rest_text
from connectors.rest.manifest import RAW, Parent, Stream
from connectors.rest.parts import FieldSpec
from connectors.rest.values import (
    Convert,
    ConvertAll,
    Format,
    Misfit,
    Type,
    all_converter,
    column,
    converter,
    each,
)
from schemas.errors import ConfigError
from schemas.records import Column, Row, StreamShape, Value
from schemas.streams import Drift, StreamSpec

#: A key that tells nothing but which record it is.
_PLAIN_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}")
_PLAIN_NAME = re.compile(r"[0-9A-Za-z_.$@-]{1,63}")
_NEW_FIELDS_MAX = 20


class Declared(Protocol):
    """What is declared of a stream's records: by a manifest, or by a connector of others."""

    @property
    def fields(self) -> Mapping[str, FieldSpec]: ...
    @property
    def primary_key(self) -> tuple[str, ...]: ...
    @property
    def raw(self) -> bool: ...
    @property
    def partition_router(self) -> Parent | None: ...


@dataclass(frozen=True, slots=True)
class Words:
    """Who sends records, and where their schema is put right."""

    sender: str = "the API"
    mend: str = "the schema in the manifest"
    add: str = "add them to the manifest"


class Rows:
    """Makes rows of one stream's records."""

    def __init__(
        self,
        where: str,
        stream: Declared,
        partition: Type,
        *,
        spec: StreamSpec | None = None,
        words: Words = Words(),
    ) -> None:
        self._where = where
        self._words = words
        key = stream.primary_key if spec is None else spec.key or stream.primary_key
        self._named_key = key if stream.fields else ()
        self._stream = stream
        self._raw = stream.raw and (spec is None or spec.reads(RAW))
        self._drift = Drift.EVOLVE if spec is None else spec.drift
        self._fields: list[tuple[str, tuple[str, ...] | None, Convert, bool]] = []
        self._many: list[ConvertAll] = []  # the same of many values, field by field
        columns: list[Column] = []
        for name, field in stream.fields.items():
            if spec is not None and not spec.reads(name):
                continue
            needed = field.required or name in self._named_key
            convert, type_ = converter(field.type, field.format), field.type
            many = all_converter(field.type, field.format)
            if spec is not None and name in spec.mask:  # masks are put on texts, behind us
                convert, type_ = _as_text(convert), Type.STRING
                many = each(convert)
            columns.append(column(name, type_, nullable=not needed))
            steps = None if field.field in {None, (name,)} else field.field
            self._fields.append((name, steps, convert, needed))
            self._many.append(many)
        self._partition = converter(partition, Format.ISO)
        self._parent = stream.partition_router
        if self._parent is not None:
            columns.append(column(self._parent.partition_field, partition, nullable=False))
        if self._raw:
            columns.append(column(RAW, Type.OBJECT, nullable=False))
        self.columns = tuple(columns)
        names = [column.name for column in columns]
        #: where a row has its key; [] if the stream has none
        self.key_places = [names.index(name) for name in self._named_key]
        self._known = {(f.field or (name,))[0] for name, f in stream.fields.items()}
        self.new: set[str] = set()

    @property
    def shape(self) -> StreamShape:
        """The shape of all batches; an API proves no key."""
        return StreamShape(self.columns, self._named_key)

    @property
    def key_columns(self) -> tuple[Column, ...]:
        """The columns of the key, in its order."""
        return tuple(self.columns[place] for place in self.key_places)

    def key(self, record: Mapping[str, Any], above: object, place: str) -> Row:
        """Return the key of a record of which nothing else need be there."""
        values: list[Value] = []
        for at in self.key_places:
            if at >= len(self._fields):  # the parent's key
                values.append(self._partition(above))
                continue
            name, steps, convert, _ = self._fields[at]
            value = rest_text.found(record, steps or (name,))
            if value is None or value is rest_text.MISSING:
                raise self._missing(record, name, place)
            try:
                values.append(convert(value))
            except (ValueError, OverflowError):
                raise self._misfit(record, name, place) from None
        return tuple(values)

    @property
    def wants_text(self) -> bool:
        """Whether a row holds its record as it stands in the answer."""
        return self._raw

    def row(
        self,
        record: Mapping[str, Any],
        above: object,
        place: str,
        text: exact_json.Text | None = None,
    ) -> Row:
        """Return a record as a row; `above` is the value of the parent's key.

        `text` is the record as it stands in the answer, where that is known: it need not be
        written again.
        """
        values: list[Value] = []
        add, get = values.append, record.get
        for name, steps, convert, needed in self._fields:
            value = get(name) if steps is None else rest_text.found(record, steps)
            if value is None or value is rest_text.MISSING:
                if needed:
                    raise self._missing(record, name, place)
                add(None)
                continue
            try:
                add(convert(value))
            except (ValueError, OverflowError):
                raise self._misfit(record, name, place) from None
        if self._parent is not None:
            values.append(self._partition(above))
        if self._raw:
            try:
                values.append(
                    exact_json.write(record)
                    if text is None
                    else exact_json.as_it_stands(text, record)
                )
            except exact_json.NoJson:
                raise self._misfit(record, RAW, place) from None
        if self._drift is Drift.FREEZE:
            self.look([record])
        return tuple(values)

    def all_of(
        self,
        records: Sequence[Mapping[str, Any]],
        above: object,
        page: str,
        first: int = 1,
        texts: Sequence[exact_json.Text] | None = None,
    ) -> list[Row]:
        """Return records as rows, as `row` does; `first` is the number of the first on its page.

        They are made field by field, which is several times as fast. Where one does not fit, it
        is found by going through them one by one.
        """
        try:
            columns = list(self._columns_of(records, above, texts))
        except (ValueError, OverflowError):
            return [
                self.row(record, above, f"record {number} of {page}", text)
                for number, (record, text) in enumerate(
                    zip(records, texts or repeat(None), strict=False), first
                )
            ]
        if self._drift is Drift.FREEZE:
            self.look(records)
        return list(zip(*columns, strict=True))

    def _columns_of(
        self,
        records: Sequence[Mapping[str, Any]],
        above: object,
        texts: Sequence[exact_json.Text] | None,
    ) -> Iterator[Sequence[Value]]:
        """Yield the values of each column; ValueError or OverflowError if some record is amiss."""
        for (name, steps, _, needed), many in zip(self._fields, self._many, strict=True):
            if steps is None:
                values = [record.get(name) for record in records]
            else:
                found = [rest_text.found(record, steps) for record in records]
                values = [None if value is rest_text.MISSING else value for value in found]
            if None not in values:
                yield list(many(values))
                continue
            if needed:
                raise Misfit
            present = [value for value in values if value is not None]
            made = iter(many(present) if present else ())
            yield [None if value is None else next(made) for value in values]
        if self._parent is not None:
            yield [self._partition(above)] * len(records)
        if self._raw:
            yield exact_json.all_as_they_stand(texts, records)

    def check_partition(self, value: object) -> None:
        """Check a parent's key; Misfit if it is none of its type."""
        if value is None or value is rest_text.MISSING:
            raise Misfit
        self._partition(value)

    def look(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Look for fields that the schema does not have; ConfigError where nothing may change."""
        for record in records:
            new = record.keys() - self._known
            if new and self._drift is Drift.FREEZE:
                raise ConfigError(
                    f"{self._where}: {self._words.sender} sends fields that the schema does not "
                    f"have: {_names(new)}; {self._words.add}, or choose another `drift`",
                    code="schema_drift",
                )
            if len(self.new) < _NEW_FIELDS_MAX:
                self.new |= set(sorted(new)[:_NEW_FIELDS_MAX])

    def note(self) -> tuple[str, ...]:
        """Say once which fields came on the first page that the schema does not have."""
        if not self.new or self._drift is not Drift.EVOLVE:
            return ()
        where = f"only in {RAW}" if self._raw else "not kept"
        names, self.new = _names(self.new), set()
        return (f"fields that the schema does not have, {where}: {names}",)

    def _missing(self, record: Mapping[str, Any], name: str, place: str) -> ConfigError:
        part = "a part of its key" if name in self._named_key else "required"
        return ConfigError(
            f"{self._where}: {self._shown(record, place, but=name)} has no {name}, which is {part}",
            code="data_refused",
        )

    def _misfit(self, record: Mapping[str, Any], name: str, place: str) -> ConfigError:
        spec = self._stream.fields.get(name)
        what = f"is no {spec.type}" if spec else "holds what no jsonb can"
        return ConfigError(
            f"{self._where}: {name} of {self._shown(record, place, but=name)} {what}; correct it "
            f"there, or {self._words.mend}",
            code="data_refused",
        )

    def _shown(self, record: Mapping[str, Any], place: str, *, but: str) -> str:
        """Name a record by its key where that is a plain one, else by its place."""
        parts = []
        for name in self._named_key:
            spec = self._stream.fields.get(name)
            value = rest_text.found(record, (spec.field if spec else None) or (name,))
            text = str(value) if isinstance(value, str | int) else ""
            if name == but or not _PLAIN_KEY.fullmatch(text):
                return place
            parts.append(f"{name} {text}")
        return f"the record with {', '.join(parts)}" if parts else place


def shown_key(name: str, value: object) -> str:
    """Name a key by its value where that is a plain one, which tells nothing else."""
    text = str(value) if isinstance(value, str | int) else ""
    return f"{name} {text}" if _PLAIN_KEY.fullmatch(text) else f"one {name}"


def _as_text(convert: Convert) -> Convert:
    """Return what checks a value by its type and gives its text."""

    def text(value: object) -> str:
        return str(convert(value))

    return text


def _names(names: Sequence[str] | set[str]) -> str:
    shown = sorted(n if _PLAIN_NAME.fullmatch(n) else "one with an odd name" for n in names)
    return ", ".join(shown[:_NEW_FIELDS_MAX])


def type_of_partition(parent: Stream, steps: tuple[str, ...]) -> Type:
    """Return the type of a parent's key by the parent's schema; a text if it does not say."""
    for name, spec in parent.fields.items():
        if (spec.field or (name,)) == steps:
            return spec.type
    return Type.STRING
