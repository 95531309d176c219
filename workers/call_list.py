"""The calls of a worker's runs on their way to Postgres: noted at once, written in batches.

What waits here is bounded and is lost with a process that is killed: at most what was noted since
the last write, which comes every second and at the end of each attempt (docs/calls.md).
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Event, Lock, Thread
from uuid import UUID

from sqlalchemy import Engine

from schemas.calls import Call, status_class
from schemas.errors import SyncwardError
from schemas.redaction import REDACTOR
from schemas.runs import Claim
from storage import calls
from storage.calls import RunCall
from storage.engine import transaction
from workers.metrics import API_CALLS, API_CALLS_LOST, connector_of

#: Seconds between two writes.
FLUSH_EVERY_S = 1.0
#: Calls that wait here while they cannot be stored: about 20 MB.
CALLS_KEPT_MAX = 50_000
#: Calls of one transaction.
BATCH = 5_000
#: The end of an attempt waits so long for a write that is going on.
_PATIENCE_S = 2.0
#: Characters of a host and of a route that are kept.
_TEXT_MAX = 300


class CallWriter:
    """Collects the calls of all runs of a worker and writes them from one thread.

    A database that is away keeps calls here; nothing waits for it. Of too many the oldest are given
    up and counted.
    """

    def __init__(self, write: Callable[[Sequence[RunCall]], None]) -> None:
        self._write = write
        self._lock = Lock()
        self._writing = Lock()
        self._calls: deque[RunCall] = deque()
        self._wake = Event()
        self._stopping = False
        self._thread = Thread(target=self._loop, name="api-calls", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread, if there is one, and write what is left."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self.flush()

    def add(self, call: RunCall) -> None:
        """Take a call; it is written within a second."""
        with self._lock:
            self._calls.append(call)
            self._bound()

    def _bound(self) -> None:
        while len(self._calls) > CALLS_KEPT_MAX:
            self._calls.popleft()
            API_CALLS_LOST.inc()

    def flush(self) -> None:
        """Write now. On failure the calls stay for the next time."""
        if not self._calls or not self._writing.acquire(timeout=_PATIENCE_S):
            return
        try:
            while batch := self._batch():
                try:
                    self._write(batch)
                except BaseException:
                    with self._lock:
                        self._calls.extendleft(reversed(batch))
                        self._bound()
                    raise
        finally:
            self._writing.release()

    def settle(self) -> None:
        """Write what the end of an attempt leaves, if that is possible now."""
        with suppress(SyncwardError):
            self.flush()

    def _batch(self) -> list[RunCall]:
        with self._lock:
            return [self._calls.popleft() for _ in range(min(BATCH, len(self._calls)))]

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(FLUSH_EVERY_S)
            try:
                self.flush()
            except Exception:  # noqa: BLE001, S112 - kept for the next round; runs go on
                continue


def write_calls(engine: Engine, made: Sequence[RunCall]) -> None:
    """Store calls, in a transaction of their own."""
    with transaction(engine) as tx:
        calls.append(tx, made)


class RunCalls:
    """The list of one attempt's calls to one resource. Meets schemas.aid.Calls."""

    def __init__(self, writer: CallWriter, claim: Claim, kind: str) -> None:
        self._writer = writer
        self._run: tuple[UUID, UUID, int] = (claim.run_id, claim.account_id, claim.attempt)
        self._connector = connector_of(kind)
        self._texts: dict[str, str] = {}

    def note(self, call: Call) -> None:
        """Count a call and keep it. Its texts pass the sink, like everything that is stored."""
        API_CALLS.labels(self._connector, status_class(call.status)).inc()
        host, route = self._masked(call.host), self._masked(call.route)
        if (host, route) != (call.host, call.route):
            call = replace(call, host=host, route=route)
        self._writer.add(RunCall(*self._run, call))

    def _masked(self, text: str) -> str:
        known = self._texts.get(text)
        if known is None:
            known = REDACTOR.text(text, limit=_TEXT_MAX).replace("\0", "\ufffd")
            # half a character would keep its whole batch, of all runs, from being stored
            known = self._texts[text] = known.encode(errors="replace").decode()
        return known
