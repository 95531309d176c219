"""What stands between a run and the outside: lease, cancel and drain, seen by one object.

A run that was told to stop climbs a ladder until its thread has ended: the thread looks at each
step and chunk; the server calls of both ends are cancelled again and again; then their links are
cut; a thread that still hangs is given up, and its process ends as soon as nothing else runs in it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Event, Lock, Thread
from typing import TypeVar

from schemas.errors import Draining, LeaseLost, RunCancelled, SyncwardError, TransientError
from schemas.limits import CANCEL_EVERY_S, CUT_AFTER_S, GIVE_UP_AFTER_S, GIVE_UP_UNASKED_S
from schemas.records import Batch, KeySweep
from schemas.redaction import REDACTOR
from schemas.runs import Claim
from storage.claims import Beat
from workers.metrics import LEASES_LOST

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two looks at the signal while a connection is being opened.
_LOOK_S = 0.1
#: Characters of what a run waits for.
_WAITS_MAX = 500


def clock() -> float:
    """Return seconds that go on while the machine sleeps, so that a lease ends then, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


Signal = LeaseLost | RunCancelled | Draining | TransientError


class RunControl:
    """Signals for one running run. The heartbeat thread raises them, the run's thread checks them.

    `check()` is called between steps and per chunk; for a thread that sits inside a server call
    the registered `cancel` and `cut` functions end that call.
    """

    def __init__(self, claim: Claim, asked_at: float | None = None) -> None:
        self.claim = claim
        #: what this run has unsealed: masked until the run has written its last line
        self.secrets = REDACTOR.holder()
        self._lock = Lock()
        self._counting = Lock()
        self._ends: list[tuple[Callable[[], None], Callable[[], None]]] = []
        self._signal: Signal | None = None
        self._ended = Event()
        self._give_up: Callable[[Signal], None] | None = None
        self._stream: str | None = None
        self._rows = 0
        self._bytes = 0
        self._lost = False
        self._waits: tuple[str, datetime] | None = None  # for what, and until when
        self._renewed_at = clock() if asked_at is None else asked_at

    def check(self) -> None:
        """Raise what this run was told; also LeaseLost when no renewal got through in time."""
        self.fence()
        if self._signal is not None:
            raise self._signal

    def fence(self) -> None:
        """Stop this run if no renewal got through in time; safe to call from another thread."""
        if clock() - self._renewed_at > 0.8 * self.claim.lease.total_seconds():
            self.lost("no_heartbeat", "no heartbeat got through")

    def renewed(self, asked_at: float) -> None:
        """Note a renewal of the lease: it counts from when we asked, for answers may take long."""
        self._renewed_at = asked_at

    def lost(self, reason: str, sentence: str = "another worker owns it") -> None:
        """Stop because the lease is gone; counted and logged once, however often it is noticed."""
        with self._lock:
            first, self._lost = not self._lost, True
        if first:
            LEASES_LOST.labels(reason).inc()
            logger.warning("lease_lost", extra={"run_id": self.claim.run_id, "reason": reason})
        self.signal(LeaseLost(f"run {self.claim.run_id}: {sentence}"))

    def signal(self, reason: Signal) -> None:
        """Tell the run to stop and begin to end what it waits for; returns at once.

        The first reason stays. Whoever calls renews leases too and must not wait for servers.
        """
        with self._lock:
            if self._signal is not None:
                return
            self._signal = reason
            ends = list(self._ends)
        for cancel, cut in ends:
            self._climb(cancel, cut)
        Thread(target=self._watch, args=(reason,), name="give-up", daemon=True).start()

    @property
    def signalled(self) -> bool:
        return self._signal is not None

    def on_signal(self, cancel: Callable[[], None], cut: Callable[[], None]) -> None:
        """Register how to end a blocking call; begun at once if the signal came first."""
        with self._lock:
            self._ends.append((cancel, cut))
            late = self._signal is not None
        if late:
            self._climb(cancel, cut)

    def on_give_up(self, give_up: Callable[[Signal], None]) -> None:
        """Register what becomes of the run if its thread cannot be ended."""
        self._give_up = give_up

    def ended(self) -> None:
        """Note that the run's thread has left the run: nothing more is to be cancelled."""
        self._ended.set()

    def _climb(self, cancel: Callable[[], None], cut: Callable[[], None]) -> None:
        Thread(target=self._end, args=(cancel, cut), name="end-call", daemon=True).start()

    def _end(self, cancel: Callable[[], None], cut: Callable[[], None]) -> None:
        """Cancel until it helps (one may come between two statements), then cut the link."""
        deadline = time.monotonic() + CUT_AFTER_S
        while time.monotonic() < deadline and not self._ended.is_set():
            with suppress(Exception):  # a connection that is gone needs no cancelling
                cancel()
            self._ended.wait(CANCEL_EVERY_S)
        if not self._ended.is_set():
            with suppress(Exception):  # as above
                cut()

    def _watch(self, reason: Signal) -> None:
        asked = isinstance(reason, RunCancelled | TransientError)  # somebody waits for it
        patience = GIVE_UP_AFTER_S if asked else GIVE_UP_UNASKED_S
        if not self._ended.wait(patience) and self._give_up is not None:
            self._give_up(reason)

    def opening(self, connect: Callable[[], T]) -> "Future[T]":
        """Begin to connect in a thread: a name lookup or a silent host cannot be interrupted."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(connect())
            except BaseException as error:  # noqa: BLE001 - it is raised in the run's thread
                future.set_exception(error)

        Thread(target=work, name="connect", daemon=True).start()
        return future

    def opened(self, future: "Future[T]", close: Callable[[T], None]) -> T:
        """Wait for what was begun to be opened.

        A signal leaves it behind; should it still succeed, what it opened is closed.
        """
        while not wait((future,), timeout=_LOOK_S).done:
            try:
                self.check()
            except SyncwardError:
                left_behind(future, close)
                raise
        return future.result()

    def beat(self) -> Beat:
        """Return what the next heartbeat says about this run."""
        waits_for, until = self._waits or (None, None)
        return Beat(self.claim.token, self._stream, self._rows, self._bytes, waits_for, until)

    @contextmanager
    def waiting(self, what: str, seconds: float) -> Iterator[None]:
        """Show in heartbeats that the run waits in place, while the block lasts."""
        until = datetime.now(UTC) + timedelta(seconds=seconds)
        self._waits = REDACTOR.text(what, limit=_WAITS_MAX), until
        try:
            yield
        finally:
            self._waits = None

    def begin_stream(self, name: str) -> None:
        """Show a stream as the one being worked on."""
        self._stream, self._rows, self._bytes = name, 0, 0

    def _checked(self, parts: Iterator[T]) -> Iterator[T]:
        for part in parts:
            self.check()
            yield part

    def watch(self, batch: Batch) -> Batch:
        """Return the batch with its chunks and groups counted, each of them a chance to stop."""
        batch.keys, batch.gone = self._watched(batch.keys), self._watched(batch.gone)
        batch.chunks = self._counted(batch, batch.chunks, len)
        batch.groups = self._counted(batch, batch.groups, lambda group: group.size)
        return batch

    def _watched(self, keys: KeySweep | None) -> KeySweep | None:
        if keys is None:
            return None
        return replace(keys, chunks=self._checked(keys.chunks), groups=self._checked(keys.groups))

    def _counted(self, batch: Batch, parts: Iterator[T], size: Callable[[T], int]) -> Iterator[T]:
        counted = 0
        if batch.part is None:
            self._rows = 0
        elif batch.part.kept is not None:  # the stream's rows are those of all its ranges
            self._rows = max(self._rows, batch.part.kept.rows)
        for part in self._checked(parts):
            with self._counting:  # ranges may come at the same time
                self._bytes += size(part)
                self._rows, counted = self._rows + batch.rows() - counted, batch.rows()
            yield part
        with self._counting:
            self._rows += batch.rows() - counted


def left_behind(future: "Future[T]", close: Callable[[T], None]) -> None:
    """Close what is opened by a thread that nobody waits for any more, now or when it is there."""

    def late(done: "Future[T]") -> None:
        if done.exception() is None:
            close(done.result())

    future.add_done_callback(late)
