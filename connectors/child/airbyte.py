"""Airbyte sources: their commands, catalogs and messages (protocol 0.3)."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from connectors.child.installed import Kind
from connectors.child.process import check_ending
from connectors.child.reading import KIND, STATE, STATE_MAX, How, Position, Record
from connectors.child.schema import Declared
from connectors.child.source import Offered, Order, Runs, Where, pinned, state_of
from connectors.rest import exact_json
from schemas.errors import ConfigError, Deferral, SyncwardError, TransientError
from schemas.streams import Mode

_WAIT_MAX = timedelta(days=1)
_SECRETS_MAX = 20
_Message = Mapping[str, Any]


class Airbyte:
    """Meets connectors.child.source.Dialect."""

    kind: Kind = "airbyte"

    def test(self, start: Runs, where: Where) -> tuple[str, ...]:
        """Let it check its config; say which clear settings are secrets by its own words."""
        (spec,) = _asked(start, ["spec"], "SPEC", where, config=False)
        (status,) = _asked(start, ["check", "--config", "{config}"], "CONNECTION_STATUS", where)
        found = _part(status, "connectionStatus")
        where.say(f"check: {found.get('status')}: {found.get('message') or ''}")
        if found.get("status") != "SUCCEEDED":
            raise _refused(where.shown)
        described = _part(_part(spec, "spec"), "connectionSpecification")
        return tuple(
            f"settings.{name} is a secret, by the connector's own words; put it into the secret "
            "`config`"
            for name in _secrets(described, where.settings.clear)[:_SECRETS_MAX]
        )

    def offered(self, start: Runs, where: Where) -> Sequence[Offered]:
        """Return the streams that it discovers."""
        (answer,) = _asked(start, ["discover", "--config", "{config}"], "CATALOG", where)
        entries = _part(answer, "catalog").get("streams")
        if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
            raise _wrong(where.shown, "answers discover with no catalog")
        return [_offered(entry) for entry in entries]

    def order(self, stream: Offered, how: How, where: Where) -> Order:
        """Configure a catalog of one stream."""
        arguments = ["read", "--config", "{config}", "--catalog", "{catalog}"]
        catalog = {"streams": [_configured(stream, how, where)]}
        documents = {"catalog": exact_json.write(catalog).encode()}
        state = state_of(how.cursor)
        if state:
            arguments += ["--state", "{state}"]
            documents["state"] = state.encode()
        return Order(arguments, documents, AirbyteTalk(stream, how, where))


def _part(message: _Message, name: str) -> Mapping[str, Any]:
    """Return an object inside of another one; an empty one if there is none."""
    found = message.get(name)
    return found if isinstance(found, dict) else {}


def _message(line: bytes, shown: str) -> _Message:
    try:
        message = exact_json.parse(line)
    except exact_json.NoJson:
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise _wrong(shown, "sends a line that is no message of an Airbyte source")
    return message


def _wrong(shown: str, what: str) -> ConfigError:
    return ConfigError(
        f"{shown}: the connector {what}; use another version of it, or report it to its authors",
        code="connector_answer",
    )


def _refused(shown: str) -> ConfigError:
    return ConfigError(
        f"{shown}: the connector refuses its config; correct the resource's settings or its "
        "secret, `run logs` shows what it said",
        code="connector_refused",
    )


def _asked(
    start: Runs, arguments: Sequence[str], wanted: str, where: Where, *, config: bool = True
) -> Sequence[_Message]:
    """Run a command that answers with one message, and return that."""
    found: list[_Message] = []
    heard = Heard(where)
    with start(arguments, {}, config=config) as child:
        for line in child.lines():
            message = _message(line, child.shown)
            heard.take(message)
            if message["type"] == wanted:
                found.append(message)
        ending = child.ending()
        heard.check()
        check_ending(child, ending)
    if len(found) != 1:
        raise TransientError(
            f"{where.shown}: ended without an answer to {arguments[0]}", code="connector_incomplete"
        )
    return found


class Heard:
    """What a connector says beside its data: logs, errors, another config."""

    def __init__(self, where: Where) -> None:
        self._where = where
        self._failure: str | None = None
        #: until when it was told to wait, in milliseconds since 1970
        self.reset: float | None = None

    def take(self, message: _Message) -> None:
        """Take a message that is no record and no state."""
        match message["type"]:
            case "LOG":
                log = _part(message, "log")
                self._where.say(f"{log.get('level')}: {log.get('message')}")
                if log.get("stack_trace"):
                    self._where.say(str(log["stack_trace"]))
            case "CONTROL":
                control = _part(message, "control")
                config = _part(control, "connectorConfig").get("config")
                if control.get("type") == "CONNECTOR_CONFIG" and isinstance(config, dict):
                    self._where.rewritten(config)
            case "TRACE":
                self._error(_part(_part(message, "trace"), "error"))
            case _:
                pass

    def _error(self, error: Mapping[str, Any]) -> None:
        if not error:
            return
        for name in ("message", "internal_message", "stack_trace"):
            if error.get(name):
                self._where.say(f"error: {error[name]}")
        # the first one is the cause, unless a later one names a person
        if self._failure is None or error.get("failure_type") == "config_error":
            self._failure = str(error.get("failure_type") or "system_error")

    def check(self) -> None:
        """Raise what its errors mean, whatever its exit code says."""
        if self._failure is not None:
            raise self._meant()

    def _meant(self) -> SyncwardError:
        shown = self._where.shown
        if self._failure == "config_error":
            return _refused(shown)
        wait = self._wait()
        if wait is not None:
            return Deferral(f"{shown}: was told to wait by what it reads", retry_after=wait)
        return TransientError(
            f"{shown}: says that it failed; `run logs` shows its words", code="connector_failed"
        )

    def _wait(self) -> timedelta | None:
        if self.reset is None:
            return None
        left = timedelta(seconds=self.reset / 1_000 - datetime.now(UTC).timestamp())
        return min(left, _WAIT_MAX) if left > timedelta(0) else None

    def incomplete(self, why: str) -> SyncwardError:
        """Return the error of a read that did not come to its end."""
        wait = self._wait()
        if wait is not None:
            return Deferral(
                f"{self._where.shown}: was told to wait by what it reads", retry_after=wait
            )
        return TransientError(why, code="connector_incomplete")


def _secrets(described: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return which of the given settings a specification marks as secret."""
    found: list[str] = []
    waiting: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [("", described, given)]
    while waiting:
        above, schema, values = waiting.pop()
        several = [one for word in ("oneOf", "anyOf") for one in schema.get(word) or ()]
        waiting += [(above, one, values) for one in several if isinstance(one, dict)]
        for name, one in _part(schema, "properties").items():
            if not isinstance(one, dict) or name not in values:
                continue
            if one.get("airbyte_secret") is True:
                found.append(f"{above}{name}")
            elif isinstance(values[name], dict):
                waiting.append((f"{above}{name}.", one, values[name]))
    return sorted(set(found))


# ── catalogs ─────────────────────────────────────────────────────────────────────────────────


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str)


def _offered(entry: Mapping[str, Any]) -> Offered:
    namespace = entry.get("namespace")
    key = entry.get("source_defined_primary_key")
    columns = [_column(path) for path in key] if isinstance(key, list) else []
    if None in columns:
        columns = []  # a part of it lies deeper in the record, where there is no column
    cursors: tuple[str, ...] = ()
    if "incremental" in (entry.get("supported_sync_modes") or ()):
        default = entry.get("default_cursor_field")
        cursors = (_column(default) or STATE,)
    return Offered(
        name=f"{namespace}.{entry['name']}" if namespace else entry["name"],
        entry=entry,
        schema=entry.get("json_schema"),
        key=tuple(name for name in columns if name is not None),
        cursors=cursors,
    )


def _column(path: object) -> str | None:
    """Return the column that a path of one step names; None for others."""
    one = path[0] if isinstance(path, list) and len(path) == 1 else None
    return one if isinstance(one, str) else None


def _configured(stream: Offered, how: How, where: Where) -> dict[str, Any]:
    """Return the entry of a configured catalog; ConfigError for what the source cannot do."""
    spec, entry = how.spec, stream.entry
    mode = "incremental" if how.incremental else "full_refresh"
    if mode not in (entry.get("supported_sync_modes") or ("full_refresh",)):
        can = "remove the cursor" if how.incremental else "name a cursor: state"
        raise ConfigError(
            f"{spec.name}: {where.shown} does not read it so ({mode}); {can}", code="unsupported"
        )
    default = entry.get("default_cursor_field") or []
    cursor = default
    if how.incremental and spec.cursor != STATE:
        cursor = [spec.cursor]
        if entry.get("source_defined_cursor") and cursor != default:
            own = _column(default) or STATE
            raise ConfigError(f"{spec.name}: its cursor is the connector's own; say cursor: {own}")
    written = {Mode.APPEND: "append", Mode.REPLACE: "overwrite"}.get(spec.mode, "append_dedup")
    return {
        "stream": entry, "sync_mode": mode, "destination_sync_mode": written,
        "cursor_field": cursor, "primary_key": [[name] for name in spec.key or stream.key],
        "generation_id": 1, "minimum_generation_id": 0, "sync_id": 1,
    }  # fmt: skip


# ── one read ─────────────────────────────────────────────────────────────────────────────────


class AirbyteTalk:
    """What a source says while one stream is read. Meets connectors.child.reading.Talk."""

    def __init__(self, stream: Offered, how: How, where: Where) -> None:
        self._where = where
        self._name = stream.entry["name"]
        self._namespace = stream.entry.get("namespace") or None
        self._shown = how.spec.name
        self._heard = Heard(where)
        self._others = False
        self._status: str | None = None
        self._silent = True  # it has said nothing of this stream
        self._records = 0
        self._before_state = 0  # of these records
        self._counted, self._counts = 0, True  # by the source, if it counts
        self._kinds: Mapping[str, Callable[[_Message], Record | Position | None]] = {
            "RECORD": self._record, "STATE": self._at, "TRACE": self._trace,
        }  # fmt: skip
        self.declared: Declared | None = pinned(where, how.spec, stream.schema, stream.key)

    def take(self, line: bytes) -> Record | Position | None:
        """Take a message; unknown types are allowed and mean nothing."""
        message = _message(line, self._shown)
        kind = self._kinds.get(message["type"])
        if kind is not None:
            return kind(message)
        self._heard.take(message)
        return None

    def _is_ours(self, name: object, namespace: object) -> bool:
        ours = name == self._name and (namespace or None) == self._namespace
        if ours:
            self._silent = False
        return ours

    def _record(self, message: _Message) -> Record | None:
        record = _part(message, "record")
        if not self._is_ours(record.get("stream"), record.get("namespace")):
            if not self._others:
                self._others = True
                self._where.say("it sends streams, too, that were not asked for")
            return None
        data = record.get("data")
        if not isinstance(data, dict):
            raise _wrong(self._shown, "sends a record that is no object")
        self._records += 1
        return data

    def _at(self, message: _Message) -> Position | None:
        state = _part(message, "state")
        kept = self._kept(state)
        if kept is None:
            return None
        self._count(_part(state, "sourceStats").get("recordCount"))
        try:
            text = exact_json.write(kept)
        except exact_json.NoJson:
            text = ""
        if not text or len(text) > STATE_MAX:
            raise _wrong(
                self._shown, f"sends a state that is none, or of more than {STATE_MAX:,} B"
            )
        if self._where.settings.shows_a_secret(text):
            raise _wrong(self._shown, "puts a secret into its state, which is stored in clear")
        return Position({"kind": KIND, "state": text})

    def _count(self, count: object) -> None:
        """Note how many records the source says that it sent since its last state."""
        if not isinstance(count, int | float | Decimal):
            self._counts = False
            return
        self._counted += int(count)
        self._before_state = self._records

    def _kept(self, state: Mapping[str, Any]) -> object:
        """Return what `--state` takes next time; None if it is not this stream's."""
        match state.get("type"):
            case "STREAM":
                stream = _part(state, "stream")
                descriptor = _part(stream, "stream_descriptor")
                if not self._is_ours(descriptor.get("name"), descriptor.get("namespace")):
                    return None
                return [{"type": "STREAM", "stream": stream}]
            case "GLOBAL":
                self._silent = False
                return [{"type": "GLOBAL", "global": _part(state, "global")}]
            case _:
                self._silent = False
                data = state.get("data")
                return data if isinstance(data, dict) else None

    def _trace(self, message: _Message) -> None:
        trace = _part(message, "trace")
        if trace.get("type") != "STREAM_STATUS":
            self._heard.take(message)
            return
        status = _part(trace, "stream_status")
        descriptor = _part(status, "stream_descriptor")
        if not self._is_ours(descriptor.get("name"), descriptor.get("namespace")):
            return
        self._status = str(status.get("status"))
        for reason in status.get("reasons") or ():
            limited = _part(reason, "rate_limited") if isinstance(reason, dict) else {}
            if isinstance(limited.get("quota_reset"), int):
                self._heard.reset = limited["quota_reset"]

    def check_failure(self) -> None:
        """Raise what its own errors mean, whatever its exit code says."""
        self._heard.check()

    def check_complete(self) -> None:
        """Raise unless it said that the stream is complete, and counted what came."""
        if self._silent or self._status not in {None, "COMPLETE"}:
            said = "never said anything of this stream" if self._silent else "did not complete it"
            raise self._heard.incomplete(f"{self._shown}: the connector ended well and {said}")
        if self._counts and self._counted != self._before_state:
            raise TransientError(
                f"{self._shown}: the connector says that it sent {self._counted:,} records, and "
                f"{self._before_state:,} came",
                code="connector_incomplete",
            )
