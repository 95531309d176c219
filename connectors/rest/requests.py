"""What asks for records, in the words of a manifest: requests, feeds of changes, jobs, schemas.

A stream is a `Requester` with a schema (manifest.py). The others here are asked beside it or
instead of it.
"""

import re
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from connectors.rest import text as rest_text
from connectors.rest.parts import (
    HEADER,
    OWN_HEADERS,
    Name,
    NoPagination,
    Option,
    Paginator,
    Part,
    Place,
    Scalar,
    Text,
)
from connectors.rest.values import Format, Type
from schemas.secret import looks_secret
from schemas.streams import Duration

#: What `{{ stream_interval.NAME }}` may name: where the window that is read begins and ends.
INTERVAL = {"start_time", "end_time"}

TimeFormat = Literal["iso", "epoch", "epoch_ms", "date"]


# ── where the records are ────────────────────────────────────────────────────────────────────


class Expander(Part):
    """Each record holds a list, and its items are what is read."""

    expand_records_from_field: Place = Field(min_length=1)
    remain_original_record: bool = False  # kept in each item as `original_record`
    #: where a record says that its list goes on elsewhere; there it must say nothing
    incomplete: Place = ()


class RecordFilter(Part):
    """Records that count: those with this value there, or with any but null, false and ""."""

    field: Place = Field(min_length=1)
    equals: Scalar | None = None


class Selector(Part):
    """Where the records are in an answer; () if it is a list of them."""

    field_path: Place = ()
    one: bool = False  # what is there is one record, not a list
    record_filter: RecordFilter | None = None
    record_expander: Expander | None = None
    remove_fields: tuple[str, ...] = ()  # of each record, before anything looks at it


# ── requests ─────────────────────────────────────────────────────────────────────────────────


def _several(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


#: A value of the URL; several are sent under one name, one after the other.
Value = Annotated[Text | int | bool | tuple[Text, ...], BeforeValidator(_several)]


class Requester(Part):
    """One kind of request below url_base, page after page."""

    path: Text
    http_method: Literal["GET", "POST"] = "GET"
    request_parameters: dict[str, Value] = {}
    request_headers: dict[str, Text] = {}
    request_body_json: dict[str, Any] = {}
    record_selector: Selector = Selector()
    paginator: Paginator = NoPagination()

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        return inside(value)

    @field_validator("request_headers")
    @classmethod
    def _headers(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_headers(value)

    @model_validator(mode="after")
    def _body_is_sent(self) -> Self:
        if self.request_body_json and self.http_method == "GET":
            raise ValueError("request_body_json: needs http_method: POST")
        return self


def inside(value: str) -> str:
    """Return a path if it lies below url_base; ValueError otherwise."""
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


def checked_headers(value: dict[str, str]) -> dict[str, str]:
    """Return headers that a manifest may set; ValueError names one that it may not."""
    for name, text in value.items():
        if not HEADER.fullmatch(name) or name.lower() in OWN_HEADERS or looks_secret(name):
            raise ValueError(
                f"{name} is no header that a manifest may set; secrets are an authenticator's"
            )
        if not text.isascii() or any(ord(c) < 0x20 for c in text):  # noqa: PLR2004 - controls
            raise ValueError(f"{name} holds what no header may")
    return value


# ── what has changed ─────────────────────────────────────────────────────────────────────────


class Deleted(Part):
    """Entries that say that their record is gone: with one of these values there.

    Without values those with any but null, false and "", and without a field all of them: a list of
    what was deleted.
    """

    field: Place = ()
    values: tuple[Scalar, ...] = ()

    @model_validator(mode="after")
    def _values_are_somewhere(self) -> Self:
        if self.values and not self.field:
            raise ValueError("deleted: name the field that has these values")
        return self

    def says(self, entry: object) -> bool:
        """Say whether an entry's record is gone."""
        if not self.field:
            return True
        value = rest_text.found(entry, self.field)
        return value in self.values if self.values else not rest_text.is_nothing(value)


class Changes(Requester):
    """What is asked for from the second read on, instead of the stream's own request.

    The answer is a list of entries. The newest of a record comes first, and counts.
    """

    start_time_option: Option | None = None
    end_time_option: Option | None = None
    datetime_format: TimeFormat = "iso"
    record_path: Place = ()  # where an entry holds its record
    changed_at: Place = ()  # a time in an entry; what is older than the window is left out
    deleted: Deleted | None = None  # of such an entry only the key counts
    #: how far back the API knows; a cursor before that reads everything again
    retention: Duration | None = None


# ── keys in groups ───────────────────────────────────────────────────────────────────────────


class Groups(Part):
    """The stream is read once for so many records of another one, by their keys."""

    type: Literal["GroupingPartitionRouter"] = "GroupingPartitionRouter"
    parent_stream: Name
    parent_key: Place
    group_size: int = Field(ge=1, le=10_000)
    group_option: Option
    group_item: str = ""  # in a body: each key as an object with this member


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────


class StatusMapping(Part):
    """What a job says of itself. Any other word is an error."""

    running: tuple[str, ...] = Field(min_length=1)
    completed: tuple[str, ...] = Field(min_length=1)
    failed: tuple[str, ...] = ()


class Polling(Part):
    """One request about a job."""

    path: Text

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        return inside(value)


class Download(Requester):
    """The results of a job, page after page."""

    decoder: Literal["JsonDecoder", "CsvDecoder"] = "JsonDecoder"


class AsyncRetriever(Part):
    """The stream's own request makes a job; its records come when that is done.

    `{{ creation_response.NAME }}` stands for a member of the answer that made it.
    """

    type: Literal["AsyncRetriever"] = "AsyncRetriever"
    status_extractor: Place = Field(min_length=1)  # in the answers about the job
    status_mapping: StatusMapping
    polling_requester: Polling
    download_requester: Download
    delete_requester: Polling | None = None  # asked, with DELETE, when everything is read
    polling_interval: Duration = timedelta(seconds=5)  # it begins with less
    polling_job_timeout: Duration = timedelta(minutes=30)


# ── schemas that the API knows ───────────────────────────────────────────────────────────────


class TypeMapping(Part):
    """What the API's types are here."""

    current_type: tuple[str, ...] = Field(min_length=1)
    target_type: Type
    format: Format = Format.ISO


class SchemaLoader(Part):
    """A request that lists the fields of the stream: those that its schema does not have join it.

    `{{ schema.fields }}` names all of them, with commas.
    """

    type: Literal["DynamicSchemaLoader"] = "DynamicSchemaLoader"
    path: Text
    field_path: Place = ()  # where the list is
    key_pointer: Place = Field(min_length=1)  # in one of it: the name of the field
    type_pointer: Place = Field(min_length=1)
    types_mapping: tuple[TypeMapping, ...] = Field(min_length=1)  # fields of others are left out
    record_filter: RecordFilter | None = None

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        return inside(value)
