"""The YAML document of `diff` and `apply`: parse it, and name the line of every mistake."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.accounts import ConnectionSpec, Name, Target
from schemas.errors import ConfigError
from schemas.limits import FAILURES_IN_A_ROW_MAX
from schemas.schedules import Schedule


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
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError:  # without a mark: a character that YAML does not take
        raise ConfigError(f"{path}: not YAML: it holds a control character") from None
    if root is not None:
        _refuse_repeated_keys(path, root)
    try:
        document = Document.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_mistakes(path, root, error)) from None
    return document, {name: _spec(path, root, name, e) for name, e in document.connections.items()}


def _spec(path: Path, root: yaml.Node | None, name: str, entry: ConnectionEntry) -> ConnectionSpec:
    try:
        return spec_of(name, entry)
    except ValidationError as error:
        raise ConfigError(_mistakes(path, root, error, name, tuple(entry.streams))) from None


def connection_from_file(path: Path, name: str) -> ConnectionSpec:
    """Return one connection of a document."""
    specs = load(path)[1]
    if name not in specs:
        raise ConfigError(f"{path}: no connection {name}; it has {', '.join(specs) or 'none'}")
    return specs[name]


def _refuse_repeated_keys(path: Path, node: yaml.Node) -> None:
    """YAML keeps the last of two equal keys silently; a duplicate name must not vanish."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_repeated_keys(path, child)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigError(
                f"{path}:{key.start_mark.line + 1}: {key.value} stands here twice; remove one"
            )
        seen.add(key.value)
        _refuse_repeated_keys(path, value)


def _mistakes(
    path: Path,
    root: yaml.Node | None,
    error: ValidationError,
    connection: str | None = None,
    streams: tuple[str, ...] = (),
) -> str:
    """Write one line per mistake; values are not quoted, one may be a misplaced secret."""
    lines = []
    for mistake in error.errors(include_input=False, include_url=False):
        # Streams are a mapping in the document and a list in a connection: back to their names.
        place = [
            *(["connections", connection] if connection else []),
            *(streams[p] if isinstance(p, int) and streams else str(p) for p in mistake["loc"]),
        ]
        line = _line_of(root, place)
        text = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            text = "unknown key; remove it or correct its spelling"
        elif mistake["type"] == "missing":
            text = "is missing"
        lines.append(f"{path}:{line}: {'.'.join(place) or 'document'}: {text}")
    return "\n".join(lines)


def _line_of(root: yaml.Node | None, place: list[str]) -> int:
    """Follow the place through the YAML nodes as far as it goes."""
    line, node = 1, root
    for part in place:
        if not isinstance(node, yaml.MappingNode):
            break
        for key, value in node.value:
            if key.value == part:
                line, node = key.start_mark.line + 1, value
                break
        else:
            break
    return line
