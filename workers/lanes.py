"""Ranges of one stream that are kept at the same time, each in a thread of its own."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from threading import Event
from types import TracebackType
from typing import Self

from schemas.records import Batch
from workers.control import RunControl

#: Seconds between two looks at what the run was told.
_LOOK_S = 0.1
#: Seconds that ranges have to stop by themselves before what they wait for is ended, each time.
_STOP_EVERY_S = 0.5


class Lanes:
    """Used by the run's thread. Left after an error, the others are stopped and waited for.

    What they wait for then is ended at both ends: `stop` is the destination's, and each range has
    the source's. A signal does it, too, as it does for the run's own thread.
    """

    def __init__(
        self, at_once: int, control: RunControl, stop: Callable[[], None] | None = None
    ) -> None:
        self._at_once = at_once
        self._control = control
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="range")
        self._running: set[Future[None]] = set()
        self._stop = Event()
        self._stops = set() if stop is None else {stop}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        while left := [future for future in self._running if not future.done()]:
            if wait(left, _STOP_EVERY_S).not_done:
                for stop in self._stops:
                    stop()
        self._threads.shutdown(wait=True)

    def begin(self, keep: Callable[[Batch], None], batch: Batch) -> int:
        """Keep a range in a thread, once one is free; return how many have been kept meanwhile.

        The first error of any of them is raised here or in `rest`.
        """
        kept = 0
        while len(self._running) >= self._at_once:
            kept += self._reaped()
        batch.chunks = self._stoppable(batch.chunks)
        if batch.part is not None and batch.part.stop is not None:
            self._stops.add(batch.part.stop)
        self._running.add(self._threads.submit(copy_context().run, keep, batch))
        return kept

    def rest(self) -> int:
        """Wait for those that are on their way; return how many they were."""
        kept = 0
        while self._running:
            kept += self._reaped()
        return kept

    def _reaped(self) -> int:
        """Wait a moment; return how many came to their end, and raise what one of them raised."""
        self._control.check()
        done, self._running = wait(self._running, _LOOK_S, FIRST_COMPLETED)
        for future in done:
            future.result()
        return len(done)

    def _stoppable(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            if self._stop.is_set():
                raise _Stopped
            yield chunk


class _Stopped(Exception):  # noqa: N818 - another range failed, and that is what is told
    """Ends a range that is not wanted any more."""
