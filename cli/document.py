"""The YAML document of `diff` and `apply`: what it may say (schemas/yaml_text.py reads it)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from schemas import yaml_text
from schemas.accounts import ConnectionSpec, Name, Target
from schemas.errors import ConfigError
from schemas.limits import FAILURES_IN_A_ROW_MAX
from schemas.mistakes import meant
from schemas.schedules import Schedule
from schemas.yaml_text import YamlText


class SecretSource(BaseModel):
    """Where a secret comes from; never the secret itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    file: str


class ResourceEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    kind: str
    config: dict[str, Any] = Field(default_factory=dict)
    secret: dict[str, SecretSource | str] = Field(default_factory=dict)
    runs_max: int | None = Field(None, ge=1)

    @field_validator("secret", mode="before")
    @classmethod
    def _from_somewhere(cls, value: object) -> object:
        if isinstance(value, dict):
            for field, source in value.items():
                if not (
                    isinstance(source, str) or (isinstance(source, dict) and {*source} == {"file"})
                ):
                    raise ValueError(f"{field}: write {{file: PATH}}, stdin or prompt")
        return value


class ConnectionEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    source: Name
    destination: Name
    description: str = ""
    parameters: dict[str, str | int | bool] = Field(default_factory=dict)
    schedule: Schedule
    pause_after: Any = FAILURES_IN_A_ROW_MAX  # ConnectionSpec checks it
    target: Target
    streams: dict[str, dict[str, Any]] = Field(min_length=1)


class Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    account: Name
    resources: dict[Name, ResourceEntry] = Field(default_factory=dict)
    connections: dict[Name, ConnectionEntry] = Field(default_factory=dict)


def spec_of(name: str, entry: ConnectionEntry) -> ConnectionSpec:
    """Make a ConnectionSpec of one entry; ValidationError names the stream."""
    return ConnectionSpec.model_validate(
        {
            **entry.model_dump(exclude={"streams", "target"}),
            "name": name,
            "target": entry.target,
            "streams": [{"name": stream, **spec} for stream, spec in entry.streams.items()],
        }
    )


def load(path: Path) -> tuple[Document, dict[str, ConnectionSpec]]:
    """Read a document; ConfigError names file, line, place and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{path}: cannot be read as UTF-8 text") from None
    read = yaml_text.read(text, str(path))
    try:
        document = Document.model_validate(read.raw)
    except ValidationError as error:
        raise read.mistakes(error, whole="document", model=Document) from None
    return document, {name: _spec(read, name, e) for name, e in document.connections.items()}


def _spec(read: YamlText, name: str, entry: ConnectionEntry) -> ConnectionSpec:
    streams = tuple(entry.streams)

    def place_of(loc: Sequence[int | str]) -> list[str]:
        """Streams are a mapping in the document and a list here: back to their names."""
        inside = [str(part) for part in loc]
        if len(loc) > 1 and loc[0] == "streams" and isinstance(loc[1], int):
            inside[1] = streams[loc[1]]
        return ["connections", name, *inside]

    try:
        return spec_of(name, entry)
    except ValidationError as error:
        raise read.mistakes(
            error, whole="document", model=ConnectionSpec, place_of=place_of
        ) from None


def connection_from_file(path: Path, name: str) -> ConnectionSpec:
    """Return one connection of a document."""
    specs = load(path)[1]
    if name not in specs:
        there = f"it has {', '.join(specs) or 'none'}"
        raise ConfigError(f"{path}: no connection {name}; {meant(name, specs, else_=there)}")
    return specs[name]
