"""Fields that an API lists itself: they join the schema of the manifest when a stream is read."""

import re
from typing import Any

from connectors.rest import answers
from connectors.rest import text as rest_text
from connectors.rest.asking import Asker
from connectors.rest.manifest import RAW, Manifest, Stream
from connectors.rest.pages import Ask
from connectors.rest.parts import NAME, FieldSpec
from connectors.rest.requests import SchemaLoader
from connectors.rest.turning import fits, path_of
from schemas.errors import ConfigError

#: More than any table has.
_FIELDS_MAX = 1_500


def loaded(asker: Asker, manifest: Manifest, name: str) -> Stream:
    """Return a stream with all of its fields; the API is asked where the manifest says so."""
    stream = manifest.streams[name]
    loader, where = stream.schema_loader, f"{manifest.name}.{name}"
    if loader is None:
        return stream
    headers = {k: rest_text.filled(v, asker.names) for k, v in manifest.request_headers.items()}
    path = path_of(where, loader.path, asker.names)
    ask = Ask("GET", asker.base + path, loader.path, {}, headers)
    answered = asker.ask(where, ask, stream.error_handler or manifest.error_handler)
    document = None if answered is None else answered[1]
    listed = answers.records(where, document, loader.field_path, one=False)
    fields = _joined(where, stream, loader, listed)
    return stream.model_copy(update={"schema_": fields})


def names_of(stream: Stream) -> dict[str, object]:
    """Return what `{{ schema.NAME }}` stands for."""
    places = [".".join(spec.field or (name,)) for name, spec in stream.fields.items()]
    return {"fields": ",".join(places)}


def _joined(
    where: str, stream: Stream, loader: SchemaLoader, listed: list[dict[str, Any]]
) -> dict[str, FieldSpec]:
    fields = dict(stream.fields)
    known = {spec.field or (name,) for name, spec in fields.items()}
    types = {word: one for one in loader.types_mapping for word in one.current_type}
    for entry in listed:
        if loader.record_filter is not None and not fits(entry, loader.record_filter):
            continue
        key = rest_text.found(entry, loader.key_pointer)
        mapped = types.get(str(rest_text.found(entry, loader.type_pointer)))
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", key):
            raise ConfigError(
                f"{where}: a field in the API's list has no name at "
                f"{'.'.join(loader.key_pointer)}; correct schema_loader",
                code="api_answer",
            )
        if mapped is None or (key,) in known:
            continue
        column = column_of(key)
        if column in fields or column == RAW or not re.fullmatch(NAME, column):
            raise ConfigError(
                f"{where}: field {key} would be column {column}, which is another's; name one of "
                "them in the manifest's schema"
            )
        fields[column] = FieldSpec(type=mapped.target_type, field=(key,), format=mapped.format)
    if len(fields) > _FIELDS_MAX:
        raise ConfigError(f"{where}: the API lists more than {_FIELDS_MAX:,} fields")
    return fields


def column_of(name: str) -> str:
    """Return the column of a field: OwnerId is owner_id, My_Field__c is my_field__c."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
