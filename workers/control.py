"""What stands between a run and the outside: lease, cancel and drain, seen by one object."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from schemas.errors import Draining, LeaseLost, RunCancelled, TransientError
from schemas.records import Batch
from schemas.runs import Claim
from storage.claims import Beat
from workers.metrics import LEASES_LOST

logger = logging.getLogger(__name__)


def _clock() -> float:
    """Return seconds that go on while the machine sleeps, so that a lease ends then, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RunControl:
    """Signals for one running run. The heartbeat thread raises them, the run's thread checks them.

    `check()` is called between steps and per chunk; for a thread that sits inside a server call
    the registered `cancel` functions end that call.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self._lock = Lock()
        self._cancels: list[Callable[[], None]] = []
        self._signal: LeaseLost | RunCancelled | Draining | TransientError | None = None
        self._stream: str | None = None
        self._rows = 0
        self._bytes = 0
        self._lost = False
        self._renewed_at = _clock()

    def check(self) -> None:
        """Raise what this run was told; also LeaseLost when no renewal got through in time."""
        if _clock() - self._renewed_at > 0.8 * self.claim.lease.total_seconds():
            self.lost("no_heartbeat", "no heartbeat got through")
        if self._signal is not None:
            raise self._signal

    def renewed(self) -> None:
        """Note a successful renewal of the lease."""
        self._renewed_at = _clock()

    def lost(self, reason: str, sentence: str = "another worker owns it") -> None:
        """Stop because the lease is gone; counted and logged once, however often it is noticed."""
        with self._lock:
            first, self._lost = not self._lost, True
        if first:
            LEASES_LOST.labels(reason).inc()
            logger.warning("lease_lost", extra={"run_id": self.claim.run_id, "reason": reason})
        self.signal(LeaseLost(f"run {self.claim.run_id}: {sentence}"))

    def signal(self, reason: LeaseLost | RunCancelled | Draining | TransientError) -> None:
        """Tell the run to stop and end what it is waiting for. The first reason stays."""
        with self._lock:
            if self._signal is not None:
                return
            self._signal = reason
            cancels = list(self._cancels)
        for cancel in cancels:
            with suppress(Exception):  # a connection that is gone needs no cancelling
                cancel()

    @property
    def signalled(self) -> bool:
        return self._signal is not None

    def on_signal(self, cancel: Callable[[], None]) -> None:
        """Register how to end a blocking call; called at once if the signal came first."""
        with self._lock:
            self._cancels.append(cancel)
            late = self._signal is not None
        if late:
            with suppress(Exception):  # as above
                cancel()

    def beat(self) -> Beat:
        """Return what the next heartbeat says about this run."""
        return Beat(self.claim.token, self._stream, self._rows, self._bytes)

    def begin_stream(self, name: str) -> None:
        """Show a stream as the one being worked on."""
        self._stream, self._rows, self._bytes = name, 0, 0

    def watch(self, batch: Batch) -> Batch:
        """Return the batch with its chunks counted and every chunk a chance to stop."""
        chunks = batch.chunks

        def counted() -> object:
            for chunk in chunks:
                self.check()
                self._bytes += len(chunk)
                self._rows = batch.rows()
                yield chunk

        batch.chunks = counted()  # type: ignore[assignment]  # a generator is an iterator
        return batch
