"""Accounts, resources and connections as their owners know them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
)

from schemas.limits import FAILURES_IN_A_ROW_MAX
from schemas.mistakes import matching
from schemas.schedules import Schedule
from schemas.secret import looks_secret
from schemas.streams import StreamSpec

#: Names are used in URLs, commands and file names: plain, short, lower case.
Name = Annotated[
    str,
    matching(
        r"^[a-z0-9][a-z0-9_.-]{0,62}\Z",
        "a name has small letters, digits, dots, dashes and underscores, begins with a letter or "
        "a digit, and has 63 characters at most",
    ),
]


@dataclass(frozen=True, slots=True)
class Account:
    account_id: UUID
    name: str
    company: str
    plan: str
    state: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Resource:
    """An external system; its credentials are not here and cannot be reached from here."""

    resource_id: UUID
    account_id: UUID
    name: str
    kind: str
    config: dict[str, Any]
    secret_versions: dict[str, int]  # field -> newest version
    runs_max: int
    created_at: datetime
    updated_at: datetime
    needs_reauth_since: datetime | None = None  # its login is not renewed any more


def _never(value: object) -> object:
    return None if value == "never" else value


def _or_never(value: int | None) -> int | str:
    return "never" if value is None else value


class Target(BaseModel):
    """Where in the destination a connection writes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, hide_input_in_errors=True
    )

    schema_name: str = Field(alias="schema", min_length=1, max_length=63)


class ConnectionSpec(BaseModel):
    """A connection as its owner wrote it; resources are named, not embedded."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    source: Name
    destination: Name
    description: str = Field(default="", max_length=2_000)
    parameters: dict[str, str | int | bool] = Field(default_factory=dict)
    schedule: Schedule
    #: failed runs in a row that pause it; None (`never` in a document): it is never paused for that
    pause_after: Annotated[
        int | None, Field(ge=1, le=1_000), BeforeValidator(_never), PlainSerializer(_or_never)
    ] = FAILURES_IN_A_ROW_MAX
    target: Target
    streams: tuple[StreamSpec, ...] = Field(min_length=1, max_length=5_000)

    @field_validator("parameters")
    @classmethod
    def _no_secrets(cls, value: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name in value:
            if looks_secret(name):
                raise ValueError(
                    f"parameter {name!r} looks like a secret; "
                    "put it into the resource's `secret` field, where it is sealed"
                )
        return value

    @field_validator("streams")
    @classmethod
    def _one_target_each(cls, value: tuple[StreamSpec, ...]) -> tuple[StreamSpec, ...]:
        seen: dict[str, str] = {}
        for stream in value:
            other = seen.setdefault(stream.table_name, stream.name)
            if other != stream.name:
                raise ValueError(f"streams {other} and {stream.name} would share one target table")
        return value


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection in the control database, with what run control knows of it."""

    connection_id: UUID
    account_id: UUID
    spec: ConnectionSpec
    source_id: UUID
    destination_id: UUID
    state: str  # active | paused
    state_reason: str | None
    next_due_at: datetime | None
    last_success_at: datetime | None
    failures: int
    created_at: datetime
    updated_at: datetime
