"""One thread per worker that renews all leases at once, on a connection of its own."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Event, Lock, Thread
from typing import Any
from uuid import UUID

import psycopg

from schemas.errors import Draining, RunCancelled, SyncwardError, TransientError
from schemas.runs import Claim
from storage.claims import WorkerState, heartbeat
from workers.control import RunControl
from workers.metrics import LEASE_RENEWALS

logger = logging.getLogger(__name__)


class Heartbeat:
    """Holds the runs of this process; tells each of them when it was lost or cancelled."""

    def __init__(
        self,
        open_link: Callable[[], psycopg.Connection[tuple[Any, ...]]],
        worker: Callable[[], WorkerState],
        interval_s: float,
    ) -> None:
        self._open_link = open_link
        self._worker = worker
        self._interval_s = interval_s
        self._lock = Lock()
        self._held: dict[UUID, RunControl] = {}
        self._wake = Event()
        self._stopping = False
        self._link: psycopg.Connection[tuple[Any, ...]] | None = None
        self._thread = Thread(target=self._loop, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Beat once, so that the dispatcher knows this worker, then go on in a thread."""
        self.beat()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and its connection."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)
        self.drop_link()

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[RunControl]:
        """Renew this claim's lease for as long as the block runs."""
        control = RunControl(claim)
        with self._lock:
            self._held[claim.token] = control
        try:
            yield control
        finally:
            with self._lock:
                self._held.pop(claim.token, None)

    def signal_all(self, reason: Draining) -> None:
        """Tell every run of this process to stop at its next chance."""
        for control in self._controls():
            control.signal(reason)

    @property
    def running(self) -> int:
        return len(self._held)

    def beat(self) -> None:
        """Renew now. A failure costs this beat; runs stop by themselves before the lease ends."""
        controls = self._controls()
        try:
            if self._link is None:
                self._link = self._open_link()
            lease = max((c.claim.lease for c in controls), default=timedelta(0))
            cancelled = heartbeat(self._link, self._worker(), [c.beat() for c in controls], lease)
        except (psycopg.Error, SyncwardError, OSError):
            logger.warning("heartbeat_failed", extra={"runs": len(controls)})
            LEASE_RENEWALS.labels("failed").inc(len(controls))
            self.drop_link()
            return
        for control in controls:
            self._tell(control, cancelled)

    def _tell(self, control: RunControl, cancelled: dict[UUID, bool]) -> None:
        token = control.claim.token
        if token not in cancelled:
            if token in self._held:  # else it finished while the beat was on its way
                LEASE_RENEWALS.labels("lost").inc()
                control.lost("taken")
            return
        LEASE_RENEWALS.labels("renewed").inc()
        control.renewed()
        if cancelled[token]:
            control.signal(RunCancelled("Cancelled."))
        deadline = control.claim.deadline
        if deadline is not None and datetime.now(UTC) > deadline:
            control.signal(TransientError("No answer within 30 s.", code="deadline"))

    def _controls(self) -> list[RunControl]:
        with self._lock:
            return list(self._held.values())

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(self._interval_s)
            if not self._stopping:
                self.beat()

    def drop_link(self) -> None:
        """Close the connection; the next beat opens another."""
        if self._link is not None:
            self._link.close()
            self._link = None
