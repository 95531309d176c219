"""Hears that somebody asked for a run, so that dispatch looks at once: see storage/bell.py."""

from collections.abc import Callable
from contextlib import closing, suppress
from threading import Event, Thread

import psycopg

from schemas.errors import SyncwardError
from storage import bell
from storage.bell import Link

#: Seconds between two attempts to listen, while the database is away.
_AGAIN_S = 5.0
#: Seconds of one wait: how soon the thread notices that it is to end.
_WAIT_S = 1.0


class Bell:
    """One thread that listens; the scheduler's loop sleeps on it."""

    def __init__(self, open_link: Callable[[], Link]) -> None:
        self._open_link = open_link
        self._rung = Event()
        self._leaving = Event()
        self._thread = Thread(target=self._loop, name="bell", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Sleep until somebody rings; say whether somebody did."""
        rung = self._rung.wait(seconds)
        self._rung.clear()
        return rung

    def close(self) -> None:
        """End the thread and its connection."""
        self._leaving.set()
        self._thread.join(timeout=2 * _WAIT_S)

    def _loop(self) -> None:
        heard = True
        while heard and not self._leaving.is_set():
            with suppress(psycopg.Error, SyncwardError, OSError):  # the ticks say so, with a reason
                heard = self._listen()
            self._leaving.wait(_AGAIN_S)

    def _listen(self) -> bool:
        """Listen until it is time to leave; False if nobody can be heard here, ever."""
        with closing(self._open_link()) as link:
            if not bell.attend(link):
                return False
            while not self._leaving.is_set():
                if bell.heard(link, _WAIT_S):
                    self._rung.set()
        return True
