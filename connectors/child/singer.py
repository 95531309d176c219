"""Singer taps: their arguments, catalogs and messages (specification 0.3.0 and what SDKs add)."""

from collections.abc import Mapping, Sequence
from typing import Any

from connectors.child.installed import Kind
from connectors.child.process import check_ending
from connectors.child.reading import KIND, STATE, STATE_MAX, How, Position, Record
from connectors.child.schema import Declared
from connectors.child.source import Offered, Order, Runs, Where, pinned, state_of
from connectors.rest import exact_json
from schemas.errors import ConfigError, ReadAgain, TransientError
from schemas.streams import StreamSpec

_CATALOG_MAX = 32 * 2**20


class Singer:
    """Meets connectors.child.source.Dialect."""

    kind: Kind = "singer"

    def test(self, start: Runs, where: Where) -> tuple[str, ...]:
        """Discover: the one thing besides reading that every tap does."""
        self.offered(start, where)
        return ()

    def offered(self, start: Runs, where: Where) -> Sequence[Offered]:
        """Return the streams of the tap's catalog."""
        with start(["--config", "{config}", "--discover"], {}) as child:
            output = child.whole_output(_CATALOG_MAX)
            check_ending(child, child.ending())
        return [_offered(entry) for entry in _entries(where.shown, output)]

    def order(self, stream: Offered, how: How, where: Where) -> Order:
        """Select one stream of the catalog and no other."""
        arguments = ["--config", "{config}", "--catalog", "{catalog}"]
        catalog = {"streams": [_selected(stream, how)]}
        documents = {"catalog": exact_json.write(catalog).encode()}
        state = state_of(how.cursor)
        if state:
            arguments += ["--state", "{state}"]
            documents["state"] = state.encode()
        return Order(arguments, documents, SingerTalk(stream, how, where))


def _entries(shown: str, output: bytes) -> list[dict[str, Any]]:
    try:
        catalog = exact_json.parse(output)
    except exact_json.NoJson:
        catalog = None
    entries = catalog.get("streams") if isinstance(catalog, dict) else None
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ConfigError(
            f"{shown}: --discover answers with no catalog; use a version of the tap that has one",
            code="connector_answer",
        )
    return entries


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("tap_stream_id"), str)


def _metadata(entry: Mapping[str, Any], breadcrumb: list[str]) -> dict[str, Any]:
    for one in entry.get("metadata") or ():
        if isinstance(one, dict) and one.get("breadcrumb") == breadcrumb:
            found = one.get("metadata")
            return found if isinstance(found, dict) else {}
    return {}


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, list) else ()


def _offered(entry: Mapping[str, Any]) -> Offered:
    own = _metadata(entry, [])
    key = _names(own.get("table-key-properties")) or _names(entry.get("key_properties"))
    cursors = (
        *_names(own.get("replication-key")), *_names(entry.get("replication_key")),
        *_names(own.get("valid-replication-keys")),
    )  # fmt: skip
    if own.get("forced-replication-method") in {"INCREMENTAL", "LOG_BASED"} and not cursors:
        cursors = (STATE,)
    return Offered(
        name=entry["tap_stream_id"],
        entry=entry,
        schema=entry.get("schema"),
        key=key,
        cursors=tuple(dict.fromkeys(cursors)),
    )


def _selected(stream: Offered, how: How) -> dict[str, Any]:
    """Return the catalog's entry with what is to be read and how, and nothing else, selected."""
    spec, entry = how.spec, dict(stream.entry)
    own: dict[str, Any] = {"selected": True}
    if not how.incremental:
        own["replication-method"] = entry["replication_method"] = "FULL_TABLE"
    elif spec.cursor != STATE:
        own |= {"replication-method": "INCREMENTAL", "replication-key": spec.cursor}
        entry |= {"replication_method": "INCREMENTAL", "replication_key": spec.cursor}
    properties = stream.schema.get("properties") if isinstance(stream.schema, dict) else {}
    metadata = [{"breadcrumb": [], "metadata": {**_metadata(entry, []), **own}}]
    for name in properties or {}:
        before = _metadata(entry, ["properties", name])
        wanted = spec.reads(name) or before.get("inclusion") == "automatic"
        metadata.append(
            {"breadcrumb": ["properties", name], "metadata": {**before, "selected": wanted}}
        )
    return {**entry, "selected": True, "metadata": metadata}


class SingerTalk:
    """What a tap says while one stream is read. Meets connectors.child.reading.Talk."""

    def __init__(self, stream: Offered, how: How, where: Where) -> None:
        self._how = how
        self._where = where
        self._spec: StreamSpec = how.spec
        self._names = {stream.name, stream.entry.get("stream")}
        self._id = stream.name
        self._state: object = None
        self._others = False
        self._version: object = None  # of the records of this read
        self._active = None if how.cursor is None else how.cursor.get("version")
        self.declared: Declared | None = None

    def take(self, line: bytes) -> Record | Position | None:
        """Take a message; unknown types are allowed and mean nothing."""
        try:
            message = exact_json.parse(line)
        except exact_json.NoJson:
            message = None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise self._wrong("sends a line that is no message of a tap")
        type_ = message["type"]
        if type_ == "RECORD":
            return self._record(message)
        match type_.upper():
            case "RECORD":
                return self._record(message)
            case "STATE":
                return self._at(message)
            case "SCHEMA":
                self._schema(message)
            case "ACTIVATE_VERSION":
                self._activated(message)
            case "BATCH":
                raise self._wrong("sends its records in files (BATCH); turn that off in `settings`")
            case _:
                pass
        return None

    def _record(self, message: Mapping[str, Any]) -> Record | None:
        if message.get("stream") not in self._names:
            self._other()
            return None
        record = message.get("record")
        if not isinstance(record, dict):
            raise self._wrong("sends a record that is no object")
        if self.declared is None:
            raise self._wrong("sends a record before the schema of its stream")
        version = message.get("version")
        if version is not None and version != self._version:
            if self._version is not None:
                raise TransientError(
                    f"{self._spec.name}: the tap began anew in the middle of its records; tried "
                    "again",
                    code="connector_incomplete",
                )
            self._version = version
        return record

    def _other(self) -> None:
        """Leave out what was not asked for, and say so once."""
        if not self._others:
            self._others = True
            self._where.say(f"{self._where.shown} sends streams, too, that were not selected")

    def _schema(self, message: Mapping[str, Any]) -> None:
        if message.get("stream") not in self._names:
            return
        key = _names(message.get("key_properties"))
        made = pinned(self._where, self._spec, message.get("schema"), key)
        before = self.declared
        if before is None:
            self.declared = made
            return
        types = before.types()
        now = {name: type_ for name, type_ in made.types().items() if name in types}
        if {n: t for n, t in types.items() if n in now} != now or made.primary_key != (
            before.primary_key
        ):
            raise TransientError(
                f"{self._spec.name}: the tap changed the type of a column, or the key, in the "
                "middle of its records; tried again",
                code="connector_incomplete",
            )
        if made.types().keys() != types.keys():
            self._where.say(
                f"{self._spec.name}: the tap's schema has other fields than at its beginning; the "
                "next run follows"
            )

    def _at(self, message: Mapping[str, Any]) -> Position:
        self._state = message.get("value")
        try:
            text = exact_json.write(self._state)
        except exact_json.NoJson:
            text = ""
        if not isinstance(self._state, dict) or not text or len(text) > STATE_MAX:
            raise self._wrong(f"sends a state that is no object, or of more than {STATE_MAX:,} B")
        if self._where.settings.shows_a_secret(text):
            raise self._wrong(
                "puts a secret of its config into its state, which is stored in clear"
            )
        cursor = {"kind": KIND, "state": text}
        if self._active is not None:
            cursor["version"] = str(self._active)
        return Position(cursor)

    def _activated(self, message: Mapping[str, Any]) -> None:
        """Follow a version: rows of all others are gone at the source."""
        if message.get("stream") not in self._names:
            return
        version = str(message.get("version"))
        if self._version is not None and version != str(self._version):
            raise self._wrong("activates another version than that of its records")
        if self._how.cursor is not None and version != self._active:
            raise ReadAgain(f"{self._spec.name}: the tap has begun a new version of the stream")
        self._active = version

    def check_failure(self) -> None:
        """Say nothing: a tap has no message for that."""

    def check_complete(self) -> None:
        """Raise unless the stream's schema came, and no state says that it goes on."""
        if self.declared is None:
            raise TransientError(
                f"{self._spec.name}: the tap ended well and never said anything of this stream",
                code="connector_incomplete",
            )
        state = self._state if isinstance(self._state, dict) else {}
        bookmarks = state.get("bookmarks")
        own = bookmarks.get(self._id) if isinstance(bookmarks, dict) else None
        unfinished = isinstance(own, dict) and bool(own.get("progress_markers"))
        if unfinished or state.get("currently_syncing") in self._names:
            raise TransientError(
                f"{self._spec.name}: the tap's last state says that it is not at the end",
                code="connector_incomplete",
            )

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._spec.name}: the tap {what}; use another version of it, or report it to its "
            "authors",
            code="connector_answer",
        )
