"""Hang up on a control database that took a statement and never answers.

Postgres ends what takes longer than `statement_timeout`. Who waits much longer than that waits for
a proxy or a machine that is gone without a word, which TCP alone may never notice. Then the call
must fail, so that a scheduler's tick comes again and a worker's thread is free again.
"""

import os
import socket
from contextlib import suppress
from threading import Lock, Thread
from time import monotonic, sleep
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from sqlalchemy import Engine, event

#: A connection that is still waiting so long after it was taken from its pool waits in vain: twice
#: the `statement_timeout` of schedulers and workers, whose transactions are short.
SILENT_AFTER_S = 60.0
#: Seconds between two looks.
LOOK_EVERY_S = 1.0

Link = psycopg.Connection[tuple[Any, ...]]


class Watch:
    """Knows every pooled connection that is in use, and since when; one thread looks at them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._taken: dict[int, tuple[Link, float]] = {}
        self._thread: Thread | None = None

    def over(self, engine: Engine) -> None:
        """Watch the connections of an engine."""
        event.listen(engine, "checkout", self._take)
        event.listen(engine, "checkin", self._give_back)
        event.listen(engine, "invalidate", self._give_back)

    def _take(self, link: Link, *_: object) -> None:
        with self._lock:
            self._taken[id(link)] = link, monotonic()
            if self._thread is None:
                self._thread = Thread(target=self._loop, name="silence", daemon=True)
                self._thread.start()

    def _give_back(self, link: Link | None, *_: object) -> None:
        """Forget a connection; the lock keeps its socket open for as long as we look at it."""
        with self._lock:
            self._taken.pop(id(link), None)

    def look(self) -> None:
        """Hang up on every connection that has waited too long."""
        with self._lock:
            for link, since in self._taken.values():
                if monotonic() - since > SILENT_AFTER_S and _waits(link):
                    with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as line:
                        line.shutdown(socket.SHUT_RDWR)

    def _loop(self) -> None:
        while True:
            sleep(LOOK_EVERY_S)
            self.look()


def _waits(link: Link) -> bool:
    return link.info.transaction_status == TransactionStatus.ACTIVE


#: One per process, for all of its engines.
WATCH = Watch()
