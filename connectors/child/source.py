"""A connector of others as a source: what Singer taps and Airbyte sources have in common.

What differs is a `Dialect` (singer.py, airbyte.py): the arguments, the documents
and the messages. docs/child-connectors.md tells operators what may run and what holds it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any, Protocol

from connectors.child.config import SECRET, ChildConfig, Settings
from connectors.child.guard import Reach
from connectors.child.hosts import listed
from connectors.child.installed import Kind, can_be_guarded, installed
from connectors.child.launcher import landlock
from connectors.child.process import DOCUMENT_MAX, Child
from connectors.child.reading import KIND, STATE, How, Reading, Talk
from connectors.child.schema import Declared, declared
from connectors.child.voice import Voice
from connectors.discovery import discovered
from connectors.rest import exact_json
from connectors.rest.values import column
from connectors.row_reads import no_cursor_to_backfill, refuse
from schemas.aid import Aid
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, TransientError
from schemas.records import (
    Batch,
    Between,
    Cursor,
    DiscoveredStream,
    Ranges,
    ServerReport,
    WireFormat,
)
from schemas.streams import StreamSpec

#: Name -> content of what a child inherits; `{NAME}` among its arguments is where it is.
Documents = Mapping[str, bytes]


_UNCONFINED = (
    "it is not confined on this worker and may read and write what its login may "
    "(docs/child-connectors.md)"
)
_UNGUARDED = (
    "its connections pass no egress guard on this worker, and `run calls` does not show them "
    "(docs/child-connectors.md)"
)


@dataclass(frozen=True, slots=True)
class Offered:
    """One stream that a connector says it has."""

    name: str  # behind the dot
    entry: Mapping[str, Any]  # as its catalog has it
    schema: object
    key: tuple[str, ...]
    cursors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """How a child is asked for one stream, and what understands its answer."""

    arguments: Sequence[str]
    documents: Documents
    talk: Talk


class Runs(Protocol):
    """Runs the connector, with its config among its documents unless told otherwise."""

    def __call__(
        self, arguments: Sequence[str], documents: Documents, *, config: bool = True
    ) -> Child: ...


class Dialect(Protocol):
    """A protocol that connectors speak."""

    kind: Kind

    def test(self, start: Runs, where: "Where") -> tuple[str, ...]:
        """Let it try its config; an error says what is wrong, a sentence what is better changed."""
        ...

    def offered(self, start: Runs, where: "Where") -> Sequence[Offered]:
        """Return the streams that it has with this config."""
        ...

    def order(self, stream: Offered, how: How, where: "Where") -> Order:
        """Return how it is asked for a stream from a cursor on."""
        ...


@dataclass(frozen=True, slots=True)
class Where:
    """What a read needs besides its stream."""

    shown: str
    raw: bool
    settings: Settings
    rewritten: Callable[[Mapping[str, Any]], None]  # keeps a config that the child has changed
    say: Callable[[str], None]


class ChildSource:
    """One connector with one config. Meets schemas.records.Source."""

    wires = (WireFormat.ROWS,)

    def __init__(
        self,
        dialect: Dialect,
        config: ChildConfig,
        secrets: Mapping[str, str],
        policy: LinkPolicy,
        aid: Aid,
    ) -> None:
        self._dialect = dialect
        self._config = config
        self._settings = Settings(config, secrets)
        files = () if policy.files_root is None else (policy.files_root,)
        allowed = policy.children
        self._policy = replace(allowed, readable=(*allowed.readable, *files))
        self._aid = aid
        hosts = tuple(listed(one) for one in config.hosts)
        self._reach = Reach(
            config.connector, hosts, policy, calls=aid.calls, say=self._heard, refused=aid.refused
        )
        self._guarded = can_be_guarded(allowed) and bool(hosts or not allowed.unguarded)
        self._lock = Lock()
        self._children: set[Child] = set()
        self._cancelled = False
        self._known: Sequence[Offered] | None = None
        self._begun: set[str] = set()
        self.shown = config.connector
        self._package = config.connector.partition("==")[0]
        self._check_installed()

    def _check_installed(self) -> None:
        installed(self._policy, self._dialect.kind, self._config.connector, self._config.executable)

    # ── questions ────────────────────────────────────────────────────────────────────────────

    def test(self) -> ServerReport:
        """Let the connector try its config."""
        with self._where() as where, self._reach.explaining():
            missing = self._dialect.test(self._started, where)
        if not (self._policy.confined and landlock()):
            missing += (_UNCONFINED,)
        if not self._guarded:
            missing += (_UNGUARDED,)
        own = "known to the connector alone"
        return ServerReport(server_version=self.shown, tls=own, login=own, missing=missing)

    def discover(self) -> Sequence[DiscoveredStream]:
        """List the streams that the connector says it has."""
        return [self._discovered(stream) for stream in self._offered()]

    def _discovered(self, stream: Offered) -> DiscoveredStream:
        name = f"{self._package}.{stream.name}"
        made = declared(name, stream.schema, stream.key, raw=False)
        columns = [
            column(n, field.type, nullable=n not in stream.key) for n, field in made.fields.items()
        ]
        suggestion = "{mode: replace}"
        if stream.key and stream.cursors:
            keys = ", ".join(stream.key)
            suggestion = f"{{mode: merge, key: [{keys}], cursor: {stream.cursors[0]}}}"
        return DiscoveredStream(
            name=name,
            columns=discovered(columns),
            key=stream.key,
            cursors=stream.cursors,
            rows_estimated=0,
            suggestion=suggestion,
        )

    def _offered(self) -> Sequence[Offered]:
        if self._known is None:
            with self._where() as where, self._reach.explaining():
                self._known = self._dialect.offered(self._started, where)
        return self._known

    @contextmanager
    def _where(self) -> Iterator["Where"]:
        """Return what a dialect works with; what it says is bounded like a child's own words."""
        voice = Voice(self._heard)
        try:
            yield Where(
                self.shown, self._config.raw, self._settings, self._rewritten,
                lambda text: voice.feed(f"{text}\n".encode("utf-8", "replace")),
            )  # fmt: skip
        finally:
            voice.close()

    # ── reading ──────────────────────────────────────────────────────────────────────────────

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
        """Yield the batches of a stream: one ends where the connector says how far it is."""
        del wire, ranges  # rows, in one piece
        _check_settings(stream)
        if between is not None and stream.cursor in {None, STATE}:
            raise no_cursor_to_backfill(stream)
        offered = self._named(stream)
        again = sweep or stream.name in self._begun
        self._begun.add(stream.name)
        one = stream.cursor is None or between is not None or (cursor is None and again)
        how = How(stream, _resumed(stream, cursor), one, between)
        with ExitStack() as opened:
            where = opened.enter_context(self._where())
            order = self._dialect.order(offered, how, where)
            child = opened.enter_context(self._started(order.arguments, order.documents))
            look = partial(self._look, child)
            try:
                reading = Reading(
                    child, order.talk, how, opened=opened, look=look,
                    explaining=self._reach.explaining,
                    notes=() if self._guarded else (f"{self.shown}: {_UNGUARDED}",),
                )  # fmt: skip
                yield reading.batches()
            finally:
                look()

    def _named(self, stream: StreamSpec) -> Offered:
        offered = self._offered()
        found = [one for one in offered if one.name == stream.table_name]
        if stream.schema_name != self._package or len(found) != 1:
            some = ", ".join(f"{self._package}.{one.name}" for one in offered[:20])
            raise ConfigError(
                f"{stream.name}: the connector has no such stream; it has {some or 'none'}"
                f"{' and more' if len(offered) > 20 else ''}",  # noqa: PLR2004 - fits a line or two
                code="missing_object",
            )
        return found[0]

    # ── children ─────────────────────────────────────────────────────────────────────────────

    def _started(
        self, arguments: Sequence[str], documents: Documents, *, config: bool = True
    ) -> Child:
        """Start the connector; its files are looked at each time."""
        found = installed(
            self._policy, self._dialect.kind, self._config.connector, self._config.executable
        )
        reach = self._reach if self._guarded else None
        child = Child(found, self._policy, Voice(self._heard), self._gone, reach)
        with self._lock:
            self._children.add(child)
            cancelled = self._cancelled
        if cancelled:
            child.close()
            raise TransientError(f"{self.shown}: was cancelled", code="cancelled_there")
        own = {"config": self._settings.document()} if config else {}
        return child.start(arguments, {**own, **documents})

    def _heard(self, line: str) -> None:
        self._aid.say(f"{self._package}: {line}")

    def _gone(self, child: Child) -> None:
        with self._lock:
            self._children.discard(child)

    def _look(self, child: Child) -> None:
        """Keep the config as a credential if the child has written it anew."""
        content = child.rewritten("config")
        if content is None:
            return
        try:
            config = exact_json.parse(content) if len(content) <= DOCUMENT_MAX else None
        except exact_json.NoJson:
            return  # it is just being written
        if isinstance(config, dict):
            self._rewritten(config)

    def _rewritten(self, config: Mapping[str, Any]) -> None:
        renewed = self._settings.renewed(config)
        if renewed is None:
            return
        seen = self._settings.secrets
        stored = self._aid.secrets.renewed(seen, lambda _newest: {SECRET: renewed})
        if stored.get(SECRET) != renewed:
            self._aid.say(
                f"{self.shown} has changed its login, and another run had changed it before: what "
                "this one brought is not kept; let one run at a time read this resource"
            )
        self._settings.take(stored, self.shown)

    def cancel(self) -> None:
        """End the children there are, with all that they have started; for another thread."""
        with self._lock:
            self._cancelled = True
            children = list(self._children)
        for child in children:
            child.cancel()

    def cut(self) -> None:
        """Do the same: it is the most that can be done."""
        self.cancel()

    def close(self) -> None:
        """Leave nothing running."""
        with self._lock:
            children = list(self._children)
        for child in children:
            child.close()


def _check_settings(stream: StreamSpec) -> None:
    """Refuse settings of a stream that no connector of others can follow."""
    refuse(stream, "where", instead="ask the connector for less in its own settings")
    alone = "a connector has no list of keys alone: find deletes with full_every or a tombstone"
    refuse(stream, "key_sweep", instead=alone)


def _resumed(stream: StreamSpec, cursor: Cursor | None) -> Cursor | None:
    if cursor is not None and cursor.get("kind") != KIND:
        raise ConfigError(
            f"{stream.name}: its cursor is none of this connector's; read everything again with: "
            "syncward run enqueue CONNECTION --full-refresh"
        )
    return cursor


def state_of(cursor: Cursor | None) -> str:
    """Return the state that a cursor holds, as JSON; "" if there is none yet."""
    return "" if cursor is None else cursor.get("state", "")


def pinned(where: Where, stream: StreamSpec, schema: object, key: Sequence[str]) -> Declared:
    """Return the schema of a read; the stream's own key counts more than the connector's."""
    return declared(stream.name, schema, stream.key or key, raw=where.raw)
