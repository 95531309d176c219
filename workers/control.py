"""What stands between a run and the outside: lease, cancel and drain, seen by one object."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock, Thread

from schemas.errors import Draining, LeaseLost, RunCancelled, TransientError
from schemas.records import Batch
from schemas.runs import Claim
from storage.claims import Beat


def clock() -> float:
    """Return seconds that go on while the machine sleeps, so that a lease ends then, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _quietly(cancel: Callable[[], None]) -> None:
    with suppress(Exception):  # a connection that is gone needs no cancelling
        cancel()


class RunControl:
    """Signals for one running run. The heartbeat thread raises them, the run's thread checks them.

    `check()` is called between steps and per chunk; for a thread that sits inside a server call
    the registered `cancel` functions end that call.
    """

    def __init__(self, claim: Claim, asked_at: float | None = None) -> None:
        self.claim = claim
        self._lock = Lock()
        self._cancels: list[Callable[[], None]] = []
        self._signal: LeaseLost | RunCancelled | Draining | TransientError | None = None
        self._stream: str | None = None
        self._rows = 0
        self._bytes = 0
        self._renewed_at = clock() if asked_at is None else asked_at

    def check(self) -> None:
        """Raise what this run was told; also LeaseLost when no renewal got through in time."""
        self.fence()
        if self._signal is not None:
            raise self._signal

    def fence(self) -> None:
        """Stop this run if no renewal got through in time; safe to call from another thread."""
        if clock() - self._renewed_at > 0.8 * self.claim.lease.total_seconds():
            self.signal(LeaseLost(f"run {self.claim.run_id}: no heartbeat got through"))

    def renewed(self, asked_at: float) -> None:
        """Note a renewal of the lease: it counts from when we asked, for answers may take long."""
        self._renewed_at = asked_at

    def signal(self, reason: LeaseLost | RunCancelled | Draining | TransientError) -> None:
        """Tell the run to stop and end what it is waiting for. The first reason stays.

        A server that is silent lets itself be waited for: whoever signals goes on meanwhile.
        """
        with self._lock:
            if self._signal is not None:
                return
            self._signal = reason
            cancels = list(self._cancels)
        for cancel in cancels:
            Thread(target=_quietly, args=(cancel,), name="cancel", daemon=True).start()

    @property
    def signalled(self) -> bool:
        return self._signal is not None

    def on_signal(self, cancel: Callable[[], None]) -> None:
        """Register how to end a blocking call; called at once if the signal came first."""
        with self._lock:
            self._cancels.append(cancel)
            late = self._signal is not None
        if late:
            _quietly(cancel)

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
