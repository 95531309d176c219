"""One thread per worker that renews all leases at once, on a connection of its own."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from socket import SHUT_RDWR, socket
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any
from uuid import UUID

import psycopg

from schemas.errors import Draining, RunCancelled, SyncwardError, TransientError
from schemas.runs import Claim
from storage.claims import WorkerState, heartbeat
from workers.control import RunControl, clock
from workers.metrics import LEASE_RENEWALS

logger = logging.getLogger(__name__)


#: How often runs are compared with the clock: a fraction of the shortest lease that makes sense.
FENCE_EVERY_S = 0.25
#: A beat may take two intervals, but so long at least: the server itself gives up after 5 s.
BEAT_AT_LEAST_S = 2.0


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
        self._leaving: Draining | None = None
        self._given_up: set[UUID] = set()
        self._link: psycopg.Connection[tuple[Any, ...]] | None = None
        self._beat_began: float | None = None
        self._thread = Thread(target=self._loop, name="heartbeat", daemon=True)
        self._fence = Thread(target=self._fence_loop, name="fence", daemon=True)

    def start(self) -> None:
        """Beat once, so that the dispatcher knows this worker, then go on in a thread."""
        self.beat()
        self._thread.start()
        self._fence.start()

    def stop(self) -> None:
        """End the thread and its connection."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)
        self._fence.join(timeout=10)
        self.drop_link()

    @contextmanager
    def hold(self, claim: Claim, asked_at: float | None = None) -> Iterator[RunControl]:
        """Renew this claim's lease, which was asked for at `asked_at`, while the block runs."""
        control = RunControl(claim, asked_at)
        with self._lock:
            self._held[claim.token] = control
            leaving = self._leaving
        if leaving is not None:  # claimed while the worker was beginning to drain
            control.signal(leaving)
        try:
            yield control
        finally:
            with self._lock:
                self._held.pop(claim.token, None)

    def signal_all(self, reason: Draining) -> None:
        """Tell every run of this process, also one that begins now, to stop at its next chance."""
        with self._lock:
            self._leaving = reason
        for control in self._controls():
            control.signal(reason)

    def give_up(self, claim: Claim) -> None:
        """Renew this claim no more: its thread hangs and nothing ends it but the process's end."""
        with self._lock:
            if self._held.pop(claim.token, None) is not None:
                self._given_up.add(claim.token)

    @property
    def given_up(self) -> int:
        """How many threads of this process hang for good."""
        return len(self._given_up)

    @property
    def running(self) -> int:
        return len(self._held)

    def beat(self) -> None:
        """Renew now. A failure costs this beat; runs stop by themselves before the lease ends."""
        controls, asked_at = self._controls(), clock()
        self._beat_began = monotonic()
        try:
            if self._link is None:
                self._link = self._open_link()
            lease = max((c.claim.lease for c in controls), default=timedelta(0))
            cancelled = heartbeat(self._link, self._worker(), [c.beat() for c in controls], lease)
        except (psycopg.Error, SyncwardError, OSError):
            logger.warning("heartbeat_failed", extra={"runs": len(controls)})
            LEASE_RENEWALS.labels("failed").inc(len(controls))
            self.drop_link()
            for control in controls:
                control.fence()
            return
        finally:
            self._beat_began = None
        for control in controls:
            self._tell(control, cancelled, asked_at)

    def _tell(self, control: RunControl, cancelled: dict[UUID, bool], asked_at: float) -> None:
        token = control.claim.token
        if token not in cancelled:
            if token in self._held:  # else it finished while the beat was on its way
                LEASE_RENEWALS.labels("lost").inc()
                control.lost("taken")
            return
        LEASE_RENEWALS.labels("renewed").inc()
        control.renewed(asked_at)
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

    def _fence_loop(self) -> None:
        """Stop runs whose lease is about to end, also while a beat waits for a silent database."""
        while not self._stopping:
            for control in self._controls():
                control.fence()
            self._hang_up_on_silence()
            self._wake.wait(FENCE_EVERY_S)

    def _hang_up_on_silence(self) -> None:
        """End a beat that waits too long: a server may take what we say and never answer."""
        began = self._beat_began
        longest = max(2 * self._interval_s, BEAT_AT_LEAST_S)
        with self._lock:
            if self._link is None or began is None or monotonic() - began < longest:
                return
            with (
                suppress(OSError, psycopg.Error),
                socket(fileno=os.dup(self._link.fileno())) as line,
            ):
                line.shutdown(SHUT_RDWR)

    def drop_link(self) -> None:
        """Close the connection; the next beat opens another."""
        with self._lock:
            link, self._link = self._link, None
            if link is not None:
                link.close()
