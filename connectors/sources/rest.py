"""An API over HTTP as a source: what a manifest says, asked as a resource's parameters say."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from connectors import authority
from connectors.authority import AuthorityFile
from connectors.discovery import discovered
from connectors.rest import manifest_files, oauth
from connectors.rest import schema as rest_schema
from connectors.rest.asking import Asker, base_of
from connectors.rest.batches import Batches
from connectors.rest.manifest import RAW, Incremental, Manifest, Stream
from connectors.rest.oauth import RENEWED
from connectors.rest.parts import Scalar
from connectors.rest.reading import Reading
from connectors.rest.values import Type
from connectors.row_reads import refuse
from schemas.aid import UNAIDED, Aid
from schemas.consent import Consent
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.records import (
    Batch,
    Between,
    Cursor,
    DiscoveredStream,
    Ranges,
    ServerReport,
    WireFormat,
)
from schemas.secret import looks_secret
from schemas.streams import Mode, StreamSpec

#: Which of them a resource needs is said by its manifest's authenticator.
SECRET_FIELDS = ("token", "password", "api_key", "client_secret", *RENEWED)
#: Those that workers store anew.
RENEWED_FIELDS = RENEWED
#: A manifest may need none of them.
SECRETS_OPTIONAL = True
#: It may ask the process that runs it (schemas/aid.py).
AIDED = True


class RestConfig(BaseModel):
    """Clear settings of a resource that is an API."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    manifest: str
    parameters: dict[str, Scalar] = {}
    sslrootcert: AuthorityFile = authority.SYSTEM

    @field_validator("manifest")
    @classmethod
    def _named_well(cls, value: str) -> str:
        if not manifest_files.written_well(value):
            raise ValueError("write the name of a manifest, or the absolute path of a YAML file")
        return value

    @field_validator("parameters", mode="before")
    @classmethod
    def _of_the_command_line(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @field_validator("parameters")
    @classmethod
    def _no_secrets(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        for name in value:
            if looks_secret(name):
                raise ValueError(f"{name} is a secret; put it into the resource's secret field")
        return value

    @model_validator(mode="after")
    def _parameters_fit(self) -> "RestConfig":
        if "/" not in self.manifest:  # a file lies where the workers are
            try:
                manifest_files.of_resource(self.manifest).checked(self.parameters)
            except ConfigError as error:
                raise ValueError(error.public) from None
        return self


CONFIG = RestConfig
__all__ = ["CONFIG", "SECRET_FIELDS", "check_link", "open_source"]


def wanted_secrets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the secrets of a manifest that comes with the connector, else all there may be."""
    named = str(config.get("manifest", ""))
    if "/" not in named:
        return manifest_files.of_resource(named).secrets
    return tuple(field for field in SECRET_FIELDS if field not in RENEWED)


def check_link(config: RestConfig, policy: LinkPolicy) -> None:
    """Refuse an API without TLS where the policy wants it; a file is looked at by workers."""
    if "/" not in config.manifest:
        manifest = manifest_files.of_resource(config.manifest)
        base_of(manifest, {"config": manifest.checked(config.parameters)}, policy)


def aim(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what leads to the addresses that get a secret; of a file, which workers read, all."""
    checked = RestConfig.model_validate(dict(config))
    leading: Mapping[str, Scalar] = checked.parameters
    if "/" not in checked.manifest:
        manifest = manifest_files.of_resource(checked.manifest)
        leading = oauth.leading(manifest, manifest.checked(checked.parameters))
    return checked.manifest, json.dumps(dict(leading), sort_keys=True)


def consent(config: Mapping[str, Any], policy: LinkPolicy) -> Consent | None:
    """Return what a person is asked at the API; None if its login needs none."""
    checked = RestConfig.model_validate(dict(config))
    manifest = manifest_files.of_resource(checked.manifest)
    return oauth.consent(manifest, manifest.checked(checked.parameters), policy)


def open_source(
    config: Mapping[str, Any],
    secrets: Mapping[str, str],
    policy: LinkPolicy,
    aid: Aid = UNAIDED,
) -> "RestSource":
    """Read the manifest and make ready to ask; the first call is made when something is read."""
    checked = RestConfig.model_validate(dict(config))
    manifest = manifest_files.of_resource(checked.manifest)
    parameters = manifest.checked(checked.parameters)
    asker = Asker(manifest, parameters, secrets, policy, trusted=checked.sslrootcert, aid=aid)
    return RestSource(manifest, asker)


class RestSource:
    """One API, asked as one login. Meets schemas.records.Source."""

    wires = (WireFormat.ROWS,)

    def __init__(self, manifest: Manifest, asker: Asker) -> None:
        self._manifest = manifest
        self._asker = asker
        self._begun: set[str] = set()
        self._loaded: dict[str, Stream] = {}

    def test(self) -> ServerReport:
        """Read a page of the streams that the manifest names for it."""
        for name in self._manifest.check.stream_names:
            reading = Reading(self._asker, self._manifest, name, None, stream=self._whole(name))
            next(reading.first_look(), None)
        missing = [self._asker.problem] if self._asker.problem else []
        missing += [
            f"stream {name} has no schema; see one with: syncward connector try MANIFEST --stream "
            f"{name}"
            for name, stream in self._manifest.streams.items()
            if not stream.fields
        ]
        return ServerReport(
            server_version=f"{self._manifest.name} at {self._asker.origin.shown}",
            tls=self._asker.tls,
            login=self._manifest.authenticator.type,
            missing=tuple(missing),
        )

    def discover(self) -> Sequence[DiscoveredStream]:
        """List the streams of the manifest, as it declares them."""
        return [
            self._discovered(name, self._whole(name))
            for name, stream in self._manifest.streams.items()
            if stream.fields
        ]

    def _discovered(self, name: str, stream: Stream) -> DiscoveredStream:
        shape = Reading(self._asker, self._manifest, name, None, stream=stream).rows.shape
        how = stream.incremental_sync
        key = ", ".join(shape.key)
        suggestion = "{mode: replace}"
        if shape.key and how is not None:
            more = f", tombstone: {stream.tombstone}" if stream.tombstone else ""
            if more or any(one.deleted for one in stream.changes):
                more = f", deletes: soft{more}"
            suggestion = f"{{mode: merge, key: [{key}], cursor: {how.cursor_field}{more}}}"
        return DiscoveredStream(
            name=f"{self._manifest.name}.{name}",
            columns=discovered(shape.columns),
            key=shape.key,
            cursors=() if how is None else (how.cursor_field,),
            rows_estimated=0,
            suggestion=suggestion,
        )

    @contextmanager
    def extract(
        self,
        stream: StreamSpec,
        cursor: Cursor | None,
        wire: WireFormat = WireFormat.ROWS,
        *,
        sweep: bool = False,
        ranges: Ranges | None = None,
        between: Between | None = None,
    ) -> Iterator[Iterator[Batch]]:
        """Yield the batches of a stream: each window's own where that is safe, else one."""
        del wire, ranges  # rows, in one piece
        declared = self._declared(stream)
        how = _incremental(stream, declared)
        reading = Reading(self._asker, self._manifest, stream.table_name, stream, stream=declared)
        # what replaces rows that are served comes whole; so does what is read a second time
        again = cursor is None and (sweep or stream.name in self._begun)
        self._begun.add(stream.name)
        with ExitStack() as opened:
            batches = Batches(self._asker, reading, declared, stream, opened=opened)
            if between is not None and how is None:
                raise ConfigError(
                    f"{stream.name}: a backfill needs a cursor; read everything again with: "
                    "syncward run enqueue CONNECTION --full-refresh "
                    f"--stream {stream.name}"
                )
            if between is not None and how is not None:
                yield batches.between(how, between)
            elif how is None:
                yield batches.everything()
            elif declared.changes and cursor is not None and stream.mode is not Mode.APPEND:
                yield batches.changes(how, cursor)
            else:
                # a part of a first read would be taken for all that changes are of
                whole = again or (bool(declared.changes) and stream.mode is not Mode.APPEND)
                yield batches.since(how, cursor, whole=whole, keys=again)

    def _declared(self, stream: StreamSpec) -> Stream:
        """Return what the manifest says of a stream; ConfigError for what cannot be done."""
        name = stream.name
        less = "ask the API for less in the manifest's request_parameters"
        refuse(stream, "where", instead=less)
        alone = "an API has no list of keys alone: find deletes with full_every or a tombstone"
        refuse(stream, "key_sweep", instead=alone)
        found = self._manifest.streams.get(stream.table_name)
        if stream.schema_name != self._manifest.name or found is None:
            known = ", ".join(f"{self._manifest.name}.{n}" for n in self._manifest.streams)
            raise ConfigError(f"{name}: the manifest has no such stream; it has {known}")
        declared = self._whole(stream.table_name)
        _check_hidden(stream, declared)
        if not declared.fields:
            raise ConfigError(
                f"{name}: has no schema in the manifest; syncward connector try MANIFEST --stream "
                f"{stream.table_name} shows one to put there"
            )
        columns = set(declared.fields)
        if declared.partition_router is not None:
            columns.add(declared.partition_router.partition_field)
        missing = [n for n in (*stream.key, stream.tombstone) if n and n not in columns]
        if missing:
            raise ConfigError(f"{name}: no column {', '.join(missing)} in the manifest's schema")
        return declared

    def _whole(self, name: str) -> Stream:
        """Return a stream with the fields that the API lists itself, asked for once."""
        if name not in self._loaded:
            self._loaded[name] = rest_schema.loaded(self._asker, self._manifest, name)
        return self._loaded[name]

    def cancel(self) -> None:
        """End the call or the wait there is; for another thread."""
        self._asker.cancel()

    def cut(self) -> None:
        """End the call, and a login that is being renewed, which cancelling leaves time to end."""
        self._asker.cut()

    def close(self) -> None:
        """Close the connections."""
        self._asker.close()


#: Types whose text is the same wherever a mask is put on it.
_MASKABLE = {Type.STRING, Type.INTEGER}


def _check_hidden(stream: StreamSpec, declared: Stream) -> None:
    """Refuse columns and masks that would hide nothing, or what nobody can tell from outside."""
    hides = stream.columns is not None or stream.mask
    if hides and declared.raw and stream.reads(RAW):
        raise ConfigError(
            f"{stream.name}: raw holds the whole record and would show what columns and mask "
            "hide; leave it out, too, with columns: {exclude: [raw]}"
        )
    router = declared.partition_router
    for name in stream.mask:
        field = declared.fields.get(name)
        if field is None or field.type not in _MASKABLE:
            raise ConfigError(
                f"{stream.name}: {name} is no field that can be masked; those of type string and "
                "integer can"
            )
    if router is not None and not stream.reads(router.partition_field):
        raise ConfigError(
            f"{stream.name}: {router.partition_field} says which record a row belongs to; it "
            "cannot be left out"
        )


def _incremental(stream: StreamSpec, declared: Stream) -> Incremental | None:
    """Return how a stream is read from its cursor on; None if everything is read."""
    if stream.cursor is None:
        return None
    how = declared.incremental_sync
    if how is None or how.cursor_field != stream.cursor:
        known = f"the manifest has {how.cursor_field}" if how else "the manifest has none for it"
        raise ConfigError(f"{stream.name}: cursor {stream.cursor} is none; {known}")
    if stream.mode is Mode.APPEND and how.start_time_option is None:
        raise ConfigError(
            f"{stream.name}: what has changed comes as it is now, not as one more record; use "
            "mode: merge, or history"
        )
    if stream.mode is Mode.APPEND and declared.fields[stream.cursor].type is Type.DATE:
        raise ConfigError(
            f"{stream.name}: append by a date would miss the rest of the day; use mode: merge"
        )
    return how
