"""A manifest: one YAML file that says how an API is asked. Start at `Manifest`.

Its words are those of the Airbyte low-code schema where that has one. docs/rest.md shows how to
write one; rest_files.py reads it.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from connectors import rest_text
from connectors.rest_parts import (
    HEADER,
    OWN_HEADERS,
    SECRETS,
    Authenticator,
    ErrorHandler,
    FieldSpec,
    Name,
    NoAuth,
    NoPagination,
    Option,
    Paginator,
    Part,
    Place,
    RateLimit,
    Scalar,
    ShortField,
    Text,
)
from connectors.rest_values import Type
from schemas.errors import ConfigError
from schemas.secret import looks_secret
from schemas.streams import Duration

RAW = "raw"


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


class Incremental(Part):
    """A window of time that the API can be asked for."""

    type: Literal["DatetimeBasedCursor"] = "DatetimeBasedCursor"
    cursor_field: Name
    start_datetime: Text  # of the first read
    start_time_option: Option
    end_time_option: Option | None = None
    datetime_format: Literal["iso", "epoch", "epoch_ms", "date"] = "iso"
    lookback_window: Duration = timedelta(0)  # read again in a merge: rows show up late
    step: Duration | None = None  # one window in the destination at a time; needs an end

    @model_validator(mode="after")
    def _steps_have_an_end(self) -> Self:
        if self.step is not None and self.end_time_option is None:
            raise ValueError("step needs an end_time_option: a window without an end is all")
        if self.step is not None and self.step < timedelta(minutes=1):
            raise ValueError("step is at least a minute")
        return self


class Parent(Part):
    """The stream is read once for each record of another one."""

    type: Literal["SubstreamPartitionRouter"] = "SubstreamPartitionRouter"
    parent_stream: Name
    parent_key: Place
    partition_field: Name


class Selector(Part):
    """Where the records are in an answer; () if it is a list of them."""

    field_path: Place = ()
    one: bool = False  # what is there is one record, not a list


class Stream(Part):
    """One kind of record."""

    path: Text
    http_method: Literal["GET", "POST"] = "GET"
    request_parameters: dict[str, Text | int | bool] = {}
    request_headers: dict[str, Text] = {}
    request_body_json: dict[str, Any] = {}
    record_selector: Selector = Selector()
    primary_key: tuple[Name, ...] = ()
    schema_: dict[Name, ShortField] = Field({}, alias="schema")
    raw: bool = True  # the whole record, too, in a column of this name
    paginator: Paginator = NoPagination()
    incremental_sync: Incremental | None = None
    partition_router: Parent | None = None
    error_handler: ErrorHandler | None = None  # instead of the manifest's
    pages_max: int = Field(100_000, ge=1)

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        bare = re.sub(r"\{\{.*?\}\}", "x", value)
        parts = bare.split("/")
        if (
            not value.startswith("/") or value.startswith("//") or {".", ".."} & set(parts)
            or any(c in bare for c in "?#\\%") or any(ord(c) <= 0x20 for c in bare)  # noqa: PLR2004
        ):  # fmt: skip
            raise ValueError(
                "is a path below url_base: begin with one slash, and put parameters into "
                "request_parameters"
            )
        return value

    @field_validator("request_headers")
    @classmethod
    def _headers(cls, value: dict[str, str]) -> dict[str, str]:
        return _checked_headers(value)

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
        if self.request_body_json and self.http_method == "GET":
            raise ValueError("request_body_json: needs http_method: POST")
        return self

    @cached_property
    def fields(self) -> Mapping[str, FieldSpec]:
        """The schema's fields by the name of their column."""
        return self.schema_

    @property
    def paging_option(self) -> Option | None:
        return getattr(self.paginator, "page_token_option", None)

    def texts(self) -> list[str]:
        """Return every text that may have holes."""
        found = [self.path, *(v for v in self.request_parameters.values() if isinstance(v, str))]
        found += [*self.request_headers.values(), *_strings(self.request_body_json)]
        if self.incremental_sync is not None:
            found.append(self.incremental_sync.start_datetime)
        return found


def _strings(value: object) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in _strings(one)]
    return [value] if isinstance(value, str) else []


def _checked_headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not HEADER.fullmatch(name) or name.lower() in OWN_HEADERS or looks_secret(name):
            raise ValueError(
                f"{name} is no header that a manifest may set; secrets are an authenticator's"
            )
        if not text.isascii() or any(ord(c) < 0x20 for c in text):  # noqa: PLR2004 - controls
            raise ValueError(f"{name} holds what no header may")
    return value


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
        return _checked_headers(value)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for name in self.parameters:
            if looks_secret(name):
                raise ValueError(f"parameters: {name} is a secret; it is an authenticator's")
        for name in self.check.stream_names:
            if name not in self.streams:
                raise ValueError(f"check: no stream {name}")
        for name, stream in self.streams.items():
            self._check_stream(name, stream)
        general = [self.url_base, *self.request_headers.values()]
        general += [v for v in self.authenticator.model_dump().values() if isinstance(v, str)]
        for text in general:
            self._check_holes("it", text, set())
        return self

    def _check_stream(self, name: str, stream: Stream) -> None:
        own: set[str] = set()
        parent = stream.partition_router
        if parent is not None:
            above = self.streams.get(parent.parent_stream)
            if above is None or above is stream or above.partition_router is not None:
                raise ValueError(f"streams.{name}: its parent is no stream without a parent")
            own.add(parent.partition_field)
        for text in stream.texts():
            self._check_holes(f"streams.{name}", text, own)

    def _check_holes(self, where: str, text: str, partition: set[str]) -> None:
        for space, name in rest_text.holes(text):
            known = set(self.parameters) if space == "config" else partition
            if name not in known:
                raise ValueError(f"{where}: no {space}.{name}")

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets that a resource must have."""
        return SECRETS[self.authenticator.type]

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
