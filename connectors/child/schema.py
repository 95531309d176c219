"""JSON Schema of a connector's stream as the fields of a pinned schema. Start at `declared`.

Only the first level makes columns; what no column can be made of is in `raw`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from connectors.rest.manifest import RAW
from connectors.rest.parts import FieldSpec
from connectors.rest.values import Format, Type
from schemas.errors import ConfigError

#: As Postgres takes them; ours begin with another word.
_NAME_BYTES_MAX = 63
_OURS = "_syncward"
FIELDS_MAX = 1_500
_SIMPLE = {
    "string": Type.STRING, "integer": Type.INTEGER, "number": Type.NUMBER, "boolean": Type.BOOLEAN,
    "object": Type.OBJECT, "array": Type.ARRAY,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Declared:
    """A stream's schema, as rows are made by it (connectors/rest/rows.py)."""

    fields: Mapping[str, FieldSpec]
    primary_key: tuple[str, ...]
    raw: bool
    left_out: tuple[str, ...] = ()
    partition_router: None = None

    def types(self) -> dict[str, tuple[Type, Format]]:
        """Return what each column holds."""
        return {name: (field.type, field.format) for name, field in self.fields.items()}


def declared(where: str, schema: object, key: Sequence[str], *, raw: bool) -> Declared:
    """Return the columns of a JSON Schema; ConfigError if it is none of an object."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not all(isinstance(n, str) for n in properties):
        raise ConfigError(
            f"{where}: the connector sends a schema that describes no fields; use another version "
            "of it",
            code="connector_answer",
        )
    if raw and RAW in properties:
        raise ConfigError(
            f"{where}: has a field {RAW} of its own, the name of the column with the whole record; "
            "say raw: false in the resource's config",
        )
    fields: dict[str, FieldSpec] = {}
    left_out = []
    for name, described in properties.items():
        if len(fields) >= FIELDS_MAX or not _fits(name):
            left_out.append(name)
            continue
        type_, format_ = type_of(described)
        fields[name] = FieldSpec(type=type_, format=format_)
    missing = [name for name in key if name not in fields]
    if missing:
        raise ConfigError(
            f"{where}: {', '.join(missing)} is said to be its key and is no field of its schema; "
            "use another version of the connector",
            code="connector_answer",
        )
    return Declared(fields, tuple(key), raw, tuple(left_out))


def _fits(name: str) -> bool:
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= _NAME_BYTES_MAX and "\0" not in name and not name.startswith(_OURS)


def type_of(described: object) -> tuple[Type, Format]:
    """Return the narrowest type of a column that holds all that a field's schema allows."""
    found = {one for one in _alternatives(described, 0) if one is not None}
    if len(found) == 1:
        return found.pop()
    if found and {type_ for type_, _ in found} <= {Type.INTEGER, Type.NUMBER}:
        return Type.NUMBER, Format.ISO
    texts = {Type.STRING, Type.TIMESTAMP, Type.DATE}
    if found and {type_ for type_, _ in found} <= texts:
        return Type.STRING, Format.ISO
    return Type.ANY, Format.ISO


def _alternatives(described: object, depth: int) -> list[tuple[Type, Format] | None]:
    """Return the types that a schema allows; None stands for null."""
    anything: list[tuple[Type, Format] | None] = [(Type.ANY, Format.ISO)]
    if not isinstance(described, dict) or depth > 5:  # noqa: PLR2004 - deep enough for what there is
        return anything
    for word in ("anyOf", "oneOf"):
        several = described.get(word)
        if isinstance(several, list) and several:
            return [one for part in several for one in _alternatives(part, depth + 1)]
    names = described.get("type")
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not names:
        return anything
    return [_simple(name, described) for name in names]


def _simple(name: object, described: Mapping[str, Any]) -> tuple[Type, Format] | None:
    if name == "null":
        return None
    type_ = _SIMPLE.get(name) if isinstance(name, str) else None
    if type_ is None:
        return Type.ANY, Format.ISO
    if type_ is Type.NUMBER and described.get("airbyte_type") == "integer":
        return Type.INTEGER, Format.ISO
    if type_ is Type.STRING:
        match described.get("format"):
            case "date-time":
                return Type.TIMESTAMP, Format.ISO_UTC
            case "date":
                return Type.DATE, Format.ISO
            case _:
                pass
    return type_, Format.ISO
