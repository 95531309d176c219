"""A manifest tried out: a few records of one stream, and the schema that they would have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from connectors.rest import schema as rest_schema
from connectors.rest import text as rest_text
from connectors.rest.asking import Asker, named
from connectors.rest.manifest import Manifest, Stream
from connectors.rest.reading import Reading
from connectors.rest.values import Type, inferred
from connectors.rest.window import Window
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.records import Row

#: Fields beyond are not shown as a schema.
_FIELDS_MAX = 200
#: How far back changes are tried.
_LATELY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it; `rows` are [] where the stream has no schema yet."""

    records: Sequence[Mapping[str, Any]]
    columns: Sequence[str]
    rows: Sequence[Row]
    schema: Mapping[str, str]  # of all fields that these records have
    new: Sequence[str]  # those that the manifest's schema does not have
    pages: int
    changes: Sequence[int] = ()  # records on the first page of each request for changes


def attempt(
    manifest: Manifest,
    parameters: Mapping[str, str],
    secrets: Mapping[str, str],
    policy: LinkPolicy,
    *,
    stream: str,
    limit: int,
) -> Trial:
    """Read so many records of a stream, with the checks of a run; nothing is stored."""
    if stream not in manifest.streams:
        known = ", ".join(manifest.streams)
        raise ConfigError(f"{manifest.name}: no stream {stream}; it has {known}")
    asker = Asker(manifest, manifest.checked(parameters), secrets, policy, trusted="system")
    try:
        return _read(asker, manifest, stream, limit)
    finally:
        asker.close()


def _read(asker: Asker, manifest: Manifest, name: str, limit: int) -> Trial:
    declared = rest_schema.loaded(asker, manifest, name)
    reading = Reading(asker, manifest, name, None, stream=declared)
    records: list[Mapping[str, Any]] = []
    rows: list[Row] = []
    pages = 0
    for page in reading.first_look():
        pages += not page.before
        for number, record in enumerate(page.records[: limit - len(records)], 1):
            records.append(record)
            if declared.fields:
                with named(page.of):
                    place = f"record {number} of page {page.number}"
                    rows.append(reading.rows.row(record, page.above, place))
        if len(records) >= limit:
            break
    schema = schema_of(records)
    known = {(spec.field or (n,))[0] for n, spec in declared.fields.items()}
    return Trial(
        records=records,
        columns=[column.name for column in reading.rows.columns],
        rows=rows,
        schema=schema,
        new=[field for field in schema if field not in known] if declared.fields else (),
        pages=pages,
        changes=_changes(reading, declared) if declared.fields else (),
    )


def _changes(reading: Reading, stream: Stream) -> list[int]:
    """Read what has changed since yesterday, a page of each request, with the checks of a run."""
    now, counts = datetime.now(UTC), []
    window = Window(now - _LATELY, now, now - _LATELY, now, last=True)
    for one in stream.changes:
        page = next(reading.changes_of(one, window), None)
        if page is None:
            counts.append(0)
            continue
        with named(page.of):
            for number, record in enumerate(page.records, 1):
                reading.rows.key(record, None, f"change {number} of page 1")
            for number, record in enumerate(page.alive, 1):
                reading.rows.row(record, None, f"change {number} of page 1")
        counts.append(len(page.records))
    return counts


def schema_of(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the narrowest type of each field; one that was always null is a string."""
    values: dict[str, list[object]] = {}
    for record in records:
        for name, value in record.items():
            seen = values.setdefault(name, [])
            if value is not None and value is not rest_text.MISSING:
                seen.append(value)
    return {
        name: str(inferred(seen) if seen else Type.STRING)
        for name, seen in list(values.items())[:_FIELDS_MAX]
    }


def remarks(manifest: Manifest) -> list[str]:
    """Say what of a manifest is right and will still stand in the way, a sentence each."""
    found = []
    for name, stream in manifest.streams.items():
        found += [f"streams.{name}: {text}" for text in _remarks(stream)]
    return found


def _remarks(stream: Stream) -> list[str]:
    found = []
    if not stream.fields:
        found.append("has no schema and cannot be read by a run; `connector try` shows one")
    if not stream.primary_key:
        found.append("has no primary_key: only mode: replace, and every row is compared")
    told = stream.tombstone is not None or any(one.deleted for one in stream.changes)
    if stream.changes and not told:
        found.append(
            "has changes that tell of no deleted record (tombstone, deleted): they are found by "
            "full_every only"
        )
    if stream.paginator.type in {"OffsetIncrement", "PageIncrement"}:
        found.append("counts its pages: a record that is deleted while it is read hides another")
    return found
