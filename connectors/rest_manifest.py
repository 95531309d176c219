"""A manifest: one YAML file that says how an API is asked. Start at `Manifest`.

Its words are those of the Airbyte low-code schema where that has one. docs/rest.md shows how to
write one. What is wrong with one is said with its place, and never with a value.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from connectors import authority, rest_text
from connectors.rest_values import Format, Type
from schemas.errors import ConfigError
from schemas.secret import looks_secret
from schemas.streams import Duration

FILE_MAX = 1 << 20
RAW = "raw"
_NAME = r"^[a-z][a-z0-9_]{0,62}$"
_HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
#: Headers that the connector sets itself.
_OWN_HEADERS = {"host", "authorization", "content-length", "accept-encoding", "connection"}

Name = Annotated[str, Field(pattern=_NAME)]
Place = Annotated[tuple[str, ...], BeforeValidator(rest_text.place), Field(max_length=20)]
Scalar = str | int | bool


def _with_holes(text: str) -> str:
    rest_text.holes(text)
    return text


Text = Annotated[str, AfterValidator(_with_holes), Field(max_length=2_000)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Parameter(_Part):
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


# ── who asks ─────────────────────────────────────────────────────────────────────────────────


class NoAuth(_Part):
    type: Literal["NoAuth"] = "NoAuth"


class Bearer(_Part):
    """`Authorization: Bearer`, with the secret `token`."""

    type: Literal["BearerAuthenticator"]
    scheme: str = Field("Bearer", pattern=r"^[A-Za-z]{1,20}$")


class Basic(_Part):
    """`Authorization: Basic`, with the secret `password`."""

    type: Literal["BasicHttpAuthenticator"]
    username: Text


class ApiKey(_Part):
    """A header of the API's own, with the secret `api_key`."""

    type: Literal["ApiKeyAuthenticator"]
    header: str

    @field_validator("header")
    @classmethod
    def _one(cls, value: str) -> str:
        if not _HEADER.fullmatch(value) or value.lower() in _OWN_HEADERS - {"authorization"}:
            raise ValueError("is no header that a key could be in")
        return value


class OAuth(_Part):
    """A token of a token endpoint, with the secret `client_secret`."""

    type: Literal["OAuthAuthenticator"]
    grant_type: Literal["client_credentials"] = "client_credentials"
    token_refresh_endpoint: Text
    client_id: Text
    scopes: tuple[str, ...] = ()
    #: where the client's login goes: into the body, or into a Basic header
    client_login: Literal["body", "header"] = "body"


Authenticator = Annotated[NoAuth | Bearer | Basic | ApiKey | OAuth, Field(discriminator="type")]
#: The secrets that each kind of login needs.
SECRETS = {
    "NoAuth": (),
    "BearerAuthenticator": ("token",),
    "BasicHttpAuthenticator": ("password",),
    "ApiKeyAuthenticator": ("api_key",),
    "OAuthAuthenticator": ("client_secret",),
}


# ── what comes back ──────────────────────────────────────────────────────────────────────────


class Filter(_Part):
    """What an answer means, before the usual rules: the first filter that fits counts."""

    http_codes: tuple[int, ...] = ()
    body_path: Place = ()  # a place in the answer, and what must be there
    equals: Scalar | None = None  # unset: anything at all but null, false and ""
    action: Literal["IGNORE", "RETRY", "FAIL", "RATE_LIMITED", "READ"]
    failure_type: Literal["config_error", "transient_error", "credentials_error"] = "config_error"
    error_message: str = Field("", max_length=200)  # written by whoever wrote the manifest

    @model_validator(mode="after")
    def _looks_at_something(self) -> Self:
        if not self.http_codes and not self.body_path:
            raise ValueError("name http_codes or a body_path")
        return self


class ErrorHandler(_Part):
    response_filters: tuple[Filter, ...] = ()
    max_retries: int = Field(3, ge=0, le=10)  # in place, of what time may mend


class RateLimit(_Part):
    """No more calls than this, by this worker."""

    calls: int = Field(ge=1, le=100_000)
    per: Duration


class FieldSpec(_Part):
    """A field of a record, which becomes a column."""

    type: Type
    field: Place | None = None  # where it is in the record; its own name if unset
    format: Format = Format.ISO
    required: bool = False

    @model_validator(mode="after")
    def _format_is_of_times(self) -> Self:
        if self.format is not Format.ISO and self.type is not Type.TIMESTAMP:
            raise ValueError("format is for timestamps")
        return self


def _field_spec(value: object) -> object:
    return {"type": value} if isinstance(value, str) else value


ShortField = Annotated[FieldSpec, BeforeValidator(_field_spec)]


# ── pages ────────────────────────────────────────────────────────────────────────────────────


class Option(_Part):
    """Where a value goes into a request."""

    field_name: str = Field(min_length=1, max_length=200)
    inject_into: Literal["request_parameter", "body_json", "header"] = "request_parameter"

    @model_validator(mode="after")
    def _no_header_of_ours(self) -> Self:
        if self.inject_into == "header" and (
            not _HEADER.fullmatch(self.field_name) or self.field_name.lower() in _OWN_HEADERS
        ):
            raise ValueError(f"{self.field_name} is no header that a manifest may set")
        return self


class _Sized(_Part):
    page_size: int | None = Field(None, ge=1, le=100_000)
    page_size_option: Option | None = None

    @model_validator(mode="after")
    def _size_is_known(self) -> Self:
        if self.page_size_option is not None and self.page_size is None:
            raise ValueError("page_size_option needs a page_size")
        return self


StopOn = Literal["empty_page", "short_page"]


class NoPagination(_Part):
    type: Literal["NoPagination"] = "NoPagination"


class CursorPagination(_Sized):
    """The answer holds a token, or it is a field of the last record, that asks for what follows."""

    type: Literal["CursorPagination"]
    cursor_value: Place
    cursor_from: Literal["response", "last_record"] = "response"
    page_token_option: Option
    has_more: Place | None = None  # false there: this is the last page


class OffsetIncrement(_Sized):
    type: Literal["OffsetIncrement"]
    page_size: int = Field(ge=1, le=100_000)
    page_token_option: Option
    stop_on: StopOn = "empty_page"  # a short one may be what the API gives at most
    #: an offset beyond which the API does not go; more than that is an error, not an end
    offset_max: int | None = None


class PageIncrement(_Sized):
    type: Literal["PageIncrement"]
    page_size: int = Field(ge=1, le=100_000)
    page_token_option: Option
    start_from_page: int = Field(1, ge=0)
    stop_on: StopOn = "empty_page"


class NextLink(_Sized):
    """The answer holds the whole URL of the next page."""

    type: Literal["NextLink"]
    next_url: Place


class LinkHeader(_Sized):
    """The header `Link` has it, under rel="next"."""

    type: Literal["LinkHeader"]


PAGINATORS = (
    NoPagination,
    CursorPagination,
    OffsetIncrement,
    PageIncrement,
    NextLink,
    LinkHeader,
)
Paginator = Annotated[
    NoPagination | CursorPagination | OffsetIncrement | PageIncrement | NextLink | LinkHeader,
    Field(discriminator="type"),
]


# ── streams ──────────────────────────────────────────────────────────────────────────────────


class Incremental(_Part):
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


class Parent(_Part):
    """The stream is read once for each record of another one."""

    type: Literal["SubstreamPartitionRouter"] = "SubstreamPartitionRouter"
    parent_stream: Name
    parent_key: Place
    partition_field: Name


class Selector(_Part):
    """Where the records are in an answer; () if it is a list of them."""

    field_path: Place = ()
    one: bool = False  # what is there is one record, not a list


class Stream(_Part):
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
        if not _HEADER.fullmatch(name) or name.lower() in _OWN_HEADERS or looks_secret(name):
            raise ValueError(
                f"{name} is no header that a manifest may set; secrets are an authenticator's"
            )
        if not text.isascii() or any(ord(c) < 0x20 for c in text):  # noqa: PLR2004 - controls
            raise ValueError(f"{name} holds what no header may")
    return value


class Check(_Part):
    """What `resource test` reads a page of."""

    stream_names: tuple[Name, ...] = Field(min_length=1)


class Manifest(_Part):
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


# ── files ────────────────────────────────────────────────────────────────────────────────────


def builtin() -> dict[str, Path]:
    """Return the manifests that come with the connector."""
    folder = Path(str(resources.files("connectors"))) / "manifests"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def written_well(named: str) -> bool:
    """Say whether a manifest is named as one could be, without looking at any file."""
    if "/" not in named:
        return re.fullmatch(_NAME, named) is not None
    return authority.written_well(named) and named.endswith((".yaml", ".yml"))


def of_resource(named: str) -> Manifest:
    """Read the manifest that a resource names: one of ours, or a file of the worker.

    Whoever writes a resource chooses the path, so a file that is none is always told alike.
    """
    if "/" not in named:
        known = builtin()
        if named not in known:
            raise ConfigError(
                f"no manifest {named}; there are {', '.join(known)}, or name an absolute path"
            )
        return parse(known[named].read_bytes(), named)
    try:
        content = authority.content(named)
        return parse(content, named)
    except (OSError, ValueError, ConfigError):
        raise ConfigError(
            f"{named} is no manifest that this worker can use; put the file on every worker, and "
            f"see what is wrong with it there: syncward connector lint {named}"
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which can make a small file huge, and without keys that stand twice."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - YAML's
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} stands here twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def parse(content: bytes, where: str) -> Manifest:
    """Return a manifest; ConfigError lists what is wrong with it, a line each."""
    try:
        document = yaml.load(content.decode(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is no text in UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{where}:{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(f"{where}: not YAML") from None
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_mistakes(where, error)) from None


def _mistakes(where: str, error: ValidationError) -> str:
    lines = []
    for mistake in error.errors(include_input=False, include_url=False):
        text = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            text = "unknown key; remove it or correct its spelling"
        place = ".".join(map(str, mistake["loc"])) or "manifest"
        lines.append(f"{where}: {place}: {text}")
    return "\n".join(lines)
