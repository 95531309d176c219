"""Manifests as files: those that come with the connector, and those of a worker's disk."""

import re
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from connectors import authority
from connectors.rest.manifest import Manifest
from connectors.rest.parts import NAME
from schemas import yaml_text
from schemas.errors import ConfigError

FILE_MAX = 1 << 20


def builtin() -> dict[str, Path]:
    """Return the manifests that come with the connector."""
    folder = Path(str(resources.files("connectors"))) / "manifests"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def written_well(named: str) -> bool:
    """Say whether a manifest is named as one could be, without looking at any file."""
    if "/" not in named:
        return re.fullmatch(NAME, named) is not None
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


def parse(content: bytes, where: str) -> Manifest:
    """Return a manifest; ConfigError lists what is wrong with it, a line each."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: is no text in UTF-8") from None
    read = yaml_text.read(text, where, aliases=False)
    try:
        manifest = Manifest.model_validate(read.raw)
    except ValidationError as error:
        raise read.mistakes(error, whole="manifest") from None
    found = manifest.mistakes()
    if found:
        raise read.said(found)
    return manifest
