"""What streams and APIs of a manifest are made of: logins, filters of answers, ways of paging."""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from connectors.rest import text as rest_text
from connectors.rest.values import Format, Type
from schemas.streams import Duration

NAME = r"^[a-z][a-z0-9_]{0,62}$"
HEADER = re.compile(r"[A-Za-z0-9-]{1,64}")
#: Headers that the connector sets itself.
OWN_HEADERS = {"host", "authorization", "content-length", "accept-encoding", "connection"}

Name = Annotated[str, Field(pattern=NAME)]
Place = Annotated[tuple[str, ...], BeforeValidator(rest_text.place), Field(max_length=20)]
Scalar = str | int | bool


def _with_holes(text: str) -> str:
    rest_text.holes(text)
    return text


Text = Annotated[str, AfterValidator(_with_holes), Field(max_length=2_000)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


# ── who asks ─────────────────────────────────────────────────────────────────────────────────


class NoAuth(Part):
    type: Literal["NoAuth"] = "NoAuth"


class Bearer(Part):
    """`Authorization: Bearer`, with the secret `token`."""

    type: Literal["BearerAuthenticator"]
    scheme: str = Field("Bearer", pattern=r"^[A-Za-z]{1,20}$")


class Basic(Part):
    """`Authorization: Basic`, with the secret `password`."""

    type: Literal["BasicHttpAuthenticator"]
    username: Text


class ApiKey(Part):
    """A header of the API's own, with the secret `api_key`."""

    type: Literal["ApiKeyAuthenticator"]
    header: str

    @field_validator("header")
    @classmethod
    def _one(cls, value: str) -> str:
        if not HEADER.fullmatch(value) or value.lower() in OWN_HEADERS - {"authorization"}:
            raise ValueError("is no header that a key could be in")
        return value


class OAuth(Part):
    """A token of a token endpoint, with the secret `client_secret`.

    With `refresh_token` an operator stores the first one; with `authorization_code` a person
    authorises at the API (`resource authorize`), which gives it.
    """

    type: Literal["OAuthAuthenticator"]
    grant_type: Literal["client_credentials", "refresh_token", "authorization_code"] = (
        "client_credentials"
    )
    token_refresh_endpoint: Text
    authorization_endpoint: Text | None = None
    #: what the authorisation is asked for beside what the standard says (`access_type: offline`)
    authorization_parameters: dict[str, Text] = {}
    client_id: Text
    scopes: tuple[str, ...] = ()
    #: where the client's login goes: into the body, or into a Basic header; none: it has no secret
    client_login: Literal["body", "header", "none"] = "body"

    @model_validator(mode="after")
    def _fits_its_grant(self) -> Self:
        by_code = self.grant_type == "authorization_code"
        if by_code != (self.authorization_endpoint is not None):
            raise ValueError("authorization_endpoint is for authorization_code, which needs it")
        if self.authorization_parameters and not by_code:
            raise ValueError("authorization_parameters: only with grant_type authorization_code")
        if self.client_login == "none" and self.grant_type == "client_credentials":
            raise ValueError("client_login: client_credentials are a secret")
        own = sorted(set(self.authorization_parameters) & OF_THE_FLOW)
        if own:
            raise ValueError(f"authorization_parameters: {', '.join(own)} is set by the connector")
        return self

    @property
    def renews(self) -> bool:
        """Whether it lives on a refresh token, which workers store anew."""
        return self.grant_type != "client_credentials"


#: Parameters of the authorisation that nobody else sets.
OF_THE_FLOW = frozenset(
    {"response_type", "client_id", "redirect_uri", "state", "scope", "code_challenge"}
    | {"code_challenge_method"}
)

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


class Filter(Part):
    """What an answer means, before the usual rules: the first filter that fits counts."""

    http_codes: tuple[int, ...] = ()
    body_path: Place = ()  # a place in the answer, and what must be there
    equals: Scalar | None = None  # unset: anything at all but null, false and ""
    action: Literal["IGNORE", "RETRY", "FAIL", "RATE_LIMITED", "READ", "RESET_PAGINATION"]
    backoff_time: Duration | None = None  # of RATE_LIMITED, where the answer does not say
    failure_type: Literal["config_error", "transient_error", "credentials_error"] = "config_error"
    error_message: str = Field("", max_length=200)  # written by whoever wrote the manifest

    @model_validator(mode="after")
    def _looks_at_something(self) -> Self:
        if not self.http_codes and not self.body_path:
            raise ValueError("name http_codes or a body_path")
        if self.backoff_time is not None and self.action != "RATE_LIMITED":
            raise ValueError("backoff_time is how long a RATE_LIMITED waits")
        return self


class ErrorHandler(Part):
    response_filters: tuple[Filter, ...] = ()
    max_retries: int = Field(3, ge=0, le=10)  # in place, of what time may mend


class RateLimit(Part):
    """No more calls than this, by all workers: the short form of an api_budget."""

    calls: int = Field(ge=1, le=100_000)
    per: Duration


class FieldSpec(Part):
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


class Option(Part):
    """Where a value goes into a request."""

    field_name: str = Field(min_length=1, max_length=200)
    inject_into: Literal["request_parameter", "body_json", "header"] = "request_parameter"

    @model_validator(mode="after")
    def _no_header_of_ours(self) -> Self:
        if self.inject_into == "header" and (
            not HEADER.fullmatch(self.field_name) or self.field_name.lower() in OWN_HEADERS
        ):
            raise ValueError(f"{self.field_name} is no header that a manifest may set")
        return self


class _Sized(Part):
    page_size: int | None = Field(None, ge=1, le=100_000)
    page_size_option: Option | None = None

    @model_validator(mode="after")
    def _size_is_known(self) -> Self:
        if self.page_size_option is not None and self.page_size is None:
            raise ValueError("page_size_option needs a page_size")
        return self


StopOn = Literal["empty_page", "short_page"]


class NoPagination(Part):
    type: Literal["NoPagination"] = "NoPagination"


class CursorPagination(_Sized):
    """A token asks for what follows: the answer holds it, its header, or the last record."""

    type: Literal["CursorPagination"]
    cursor_value: Place  # the name of a header, if it is from one
    cursor_from: Literal["response", "last_record", "header"] = "response"
    page_token_option: Option
    has_more: Place | None = None  # false there: this is the last page
    is_last: Place | None = None  # true there: this is the last page
    end_value: str | None = None  # a token that says so, too

    @model_validator(mode="after")
    def _one_header(self) -> Self:
        if self.cursor_from == "header" and len(self.cursor_value) != 1:
            raise ValueError("cursor_value is the name of one header")
        return self


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


Paginator = Annotated[
    NoPagination | CursorPagination | OffsetIncrement | PageIncrement | NextLink | LinkHeader,
    Field(discriminator="type"),
]
