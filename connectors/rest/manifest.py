"""A manifest: one YAML file that says how an API is asked. Start at `Manifest`.

Its words are those of the Airbyte low-code schema where that has one. docs/rest.md shows how to
write one; manifest_files.py reads it.
"""

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from connectors.rest import text as rest_text
from connectors.rest.budget import ApiBudget
from connectors.rest.parts import (
    SECRETS,
    Authenticator,
    ErrorHandler,
    FieldSpec,
    Name,
    NoAuth,
    OAuth,
    Option,
    Part,
    Place,
    RateLimit,
    Scalar,
    ShortField,
    Text,
)
from connectors.rest.requests import (
    INTERVAL,
    AsyncRetriever,
    Changes,
    Groups,
    Requester,
    SchemaLoader,
    TimeFormat,
    checked_headers,
)
from connectors.rest.values import Type
from schemas.errors import ConfigError
from schemas.secret import looks_secret
from schemas.streams import Duration

RAW = "raw"

#: The keys that lead to a place in a manifest, and what is wrong there.
Steps = tuple[str, ...]
Mistake = tuple[Steps, str]


class Parameter(Part):
    """A clear setting that each resource gives."""

    default: Scalar | None = None
    pattern: str | None = None  # of the whole value
    help: str = ""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error:
            raise ValueError("is no regular expression") from None
        return value


# ── streams ──────────────────────────────────────────────────────────────────────────────────


class ResultCap(Part):
    """So many records at most the API gives of one query: a window of more is cut in two."""

    records: int = Field(ge=1)
    total: Place = Field(min_length=1)  # where an answer says how many there are


class Incremental(Part):
    """A window of time that the API can be asked for."""

    type: Literal["DatetimeBasedCursor"] = "DatetimeBasedCursor"
    cursor_field: Name
    start_datetime: Text  # of the first read
    start_time_option: Option | None = None
    end_time_option: Option | None = None
    datetime_format: TimeFormat = "iso"
    lookback_window: Duration = timedelta(0)  # read again in a merge: rows show up late
    step: Duration | None = None  # one window in the destination at a time; needs an end
    result_cap: ResultCap | None = None

    @model_validator(mode="after")
    def _steps_have_an_end(self) -> Self:
        if self.step is not None and self.end_time_option is None:
            raise ValueError("step needs an end_time_option: a window without an end is all")
        if self.step is not None and self.step < timedelta(minutes=1):
            raise ValueError("step is at least a minute")
        if self.result_cap is not None and self.end_time_option is None:
            raise ValueError("result_cap cuts windows, which needs an end_time_option")
        return self


class Parent(Part):
    """The stream is read once for each record of another one."""

    type: Literal["SubstreamPartitionRouter"] = "SubstreamPartitionRouter"
    parent_stream: Name
    parent_key: Place
    partition_field: Name


class Stream(Requester):
    """One kind of record."""

    primary_key: tuple[Name, ...] = ()
    schema_: dict[Name, ShortField] = Field({}, alias="schema")
    schema_loader: SchemaLoader | None = None
    tombstone: Name | None = None  # the column that says that a record is deleted
    raw: bool = True  # the whole record, too, in a column of this name
    retriever: AsyncRetriever | None = None
    incremental_sync: Incremental | None = None
    changes: tuple[Changes, ...] = ()
    partition_router: Parent | None = None
    grouping_router: Groups | None = None
    error_handler: ErrorHandler | None = None  # instead of the manifest's
    pages_max: int = Field(100_000, ge=1)

    @model_validator(mode="after")
    def _columns_are_there(self) -> Self:
        fields = dict(self.schema_)
        own = {self.partition_router.partition_field} if self.partition_router else set()
        if self.raw and RAW in fields:
            raise ValueError(f"{RAW} is the whole record; rename the field, or say raw: false")
        if own & set(fields):
            raise ValueError("the partition_field is a column already; leave it out of the schema")
        missing = set(self.primary_key) - set(fields) - own if fields else set()
        if missing:
            raise ValueError(f"primary_key: no field {', '.join(sorted(missing))} in the schema")
        if self.incremental_sync is not None and fields:
            cursor = fields.get(self.incremental_sync.cursor_field)
            if cursor is None or cursor.type not in {Type.TIMESTAMP, Type.DATE}:
                raise ValueError("cursor_field: is no timestamp or date of the schema")
        if self.tombstone is not None and fields and self.tombstone not in fields:
            raise ValueError(f"tombstone: no field {self.tombstone} in the schema")
        return self

    @model_validator(mode="after")
    def _parts_fit_each_other(self) -> Self:
        how = self.incremental_sync
        if self.changes and how is None:
            raise ValueError("changes: needs an incremental_sync, whose cursor they move")
        if how is not None and how.start_time_option is None and not self._asks_by_time(how):
            raise ValueError("incremental_sync: needs a start_time_option, or changes")
        if how is not None and how.result_cap is not None and not self.primary_key:
            raise ValueError(
                "result_cap: needs a primary_key, which tells what both halves of a window have"
            )
        if any(one.deleted for one in self.changes) and not self.primary_key:
            raise ValueError("changes: deleted needs a primary_key, which tells what is gone")
        if self.partition_router is not None and self.grouping_router is not None:
            raise ValueError("a stream has a partition_router or a grouping_router, not both")
        if self.schema_loader is not None and not self.schema_:
            raise ValueError("schema_loader: adds to a schema; name at least the key there")
        if self.retriever is not None and self.paginator.type != "NoPagination":
            raise ValueError("retriever: its pages are those of the download_requester")
        return self

    def _asks_by_time(self, how: Incremental) -> bool:
        return bool(self.changes) and how.end_time_option is None and how.step is None

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """The schema's fields by the name of their column."""
        return self.schema_

    @property
    def parent(self) -> str | None:
        """The stream whose keys this one is asked by."""
        router = self.partition_router or self.grouping_router
        return None if router is None else router.parent_stream


class Check(Part):
    """What `resource test` reads a page of."""

    stream_names: tuple[Name, ...] = Field(min_length=1)


class Manifest(Part):
    """One API."""

    version: Literal["1"]
    name: Name
    description: str = ""
    url_base: Text
    parameters: dict[Name, Parameter] = {}
    authenticator: Authenticator = NoAuth()
    request_headers: dict[str, Text] = {}
    error_handler: ErrorHandler = ErrorHandler()
    rate_limit: RateLimit | None = None
    api_budget: ApiBudget | None = None
    answer_max: int = Field(8, ge=1, le=64)  # MiB of one answer
    check: Check
    streams: dict[Name, Stream] = Field(min_length=1)

    @field_validator("version", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @field_validator("request_headers")
    @classmethod
    def _headers(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_headers(value)

    def mistakes(self) -> list[Mistake]:
        """Return what its parts say of each other that cannot be, each with its place."""
        found: list[Mistake] = [
            (("parameters", name), "is a secret; it is an authenticator's")
            for name in self.parameters
            if looks_secret(name)
        ]
        if self.rate_limit is not None and self.api_budget is not None:
            text = "is the short form of an api_budget; write one of them"
            found.append((("rate_limit",), text))
        for number, name in enumerate(self.check.stream_names):
            if name not in self.streams:
                found.append((("check", "stream_names", str(number)), f"no stream {name}"))
        for name, stream in self.streams.items():
            found += self._mistakes_of(("streams", name), stream)
        for key in ("url_base", "request_headers", "authenticator"):
            value = getattr(self, key)
            document = value.model_dump() if isinstance(value, Part) else value
            found += self._unknown((key,), document, {})
        return found

    def _mistakes_of(self, place: Steps, stream: Stream) -> Iterator[Mistake]:
        known: dict[str, set[str]] = {"schema": {"fields"}}
        router = "partition_router" if stream.partition_router else "grouping_router"
        if stream.parent is not None:
            above = self.streams.get(stream.parent)
            if above is None or above is stream or above.parent is not None:
                where = (*place, router, "parent_stream")
                yield where, "its parent is no stream without a parent"
        if stream.partition_router is not None:
            known["partition"] = {stream.partition_router.partition_field}
        for key, value in stream.model_dump(by_alias=True).items():
            names = {**known, "stream_interval": INTERVAL} if key == "changes" else known
            job = key == "retriever"
            if key != "error_handler":
                yield from self._unknown((*place, key), value, names, job=job)

    def _unknown(
        self, place: Steps, value: object, known: Mapping[str, set[str]], *, job: bool = False
    ) -> Iterator[Mistake]:
        """Name the holes below a place that nothing fills."""
        if isinstance(value, dict):
            for key, one in value.items():
                yield from self._unknown((*place, str(key)), one, known, job=job)
        elif isinstance(value, list | tuple):
            for number, one in enumerate(value):
                yield from self._unknown((*place, str(number)), one, known, job=job)
        elif isinstance(value, str):
            try:
                holes = rest_text.holes(value)
            except ValueError as error:
                yield place, str(error)
                return
            for space, name in sorted(holes):
                names = set(self.parameters) if space == "config" else known.get(space, set())
                if name not in names and not (job and space == "creation_response"):
                    yield place, f"no {space}.{name}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets that a resource must have."""
        who = self.authenticator
        if isinstance(who, OAuth) and who.client_login == "none":
            return ()
        return SECRETS[who.type]

    @property
    def tried_with(self) -> tuple[str, ...]:
        """The secrets for a trial, which renews nothing: there is nowhere to store it."""
        who = self.authenticator
        return ("access_token",) if isinstance(who, OAuth) and who.renews else self.secrets

    def checked(self, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Return all parameters with their defaults; ConfigError names each that is wrong."""
        unknown = sorted(set(given) - set(self.parameters))
        if unknown:
            known = ", ".join(self.parameters) or "none"
            raise ConfigError(f"{self.name}: no parameter {', '.join(unknown)}; it has {known}")
        values: dict[str, Scalar] = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if value is None:
                raise ConfigError(f"{self.name}: parameter {name} is missing {parameter.help}")
            if parameter.pattern and not re.fullmatch(parameter.pattern, str(value)):
                raise ConfigError(f"{self.name}: parameter {name} must be {parameter.pattern}")
            values[name] = value
        return values
