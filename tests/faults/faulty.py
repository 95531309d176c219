"""Seeded faults around the storage functions: an error before, an error after the commit, a delay.

An error after the commit is the unkind one: what was asked for has happened, and nobody knows.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, Engine

import scheduler.ticks
import storage.engine
import workers.heartbeat
import workers.run_sync
from connectors.destinations.postgres import PostgresDestination
from schemas.errors import TransientError
from storage import claims
from storage.engine import transaction
from tests.faults.crash_points import POINTS

#: Every module that opens transactions on the way of a run.
OPENERS = (storage.engine, scheduler.ticks, workers.run_sync)
DELAY_S = 0.01

Transaction = Callable[[Engine], AbstractContextManager[Connection]]


class Faults:
    """Decides, by its seed, what goes wrong where; counts it."""

    def __init__(self, seed: int, rate: float) -> None:
        self._random = random.Random(seed)
        self.rate = rate
        self.active = True
        self.made: Counter[str] = Counter()

    def wrap(self, name: str, function: Callable[..., Any], error: type[Exception]) -> Any:
        """Return the function with a fault before or after it now and then."""

        def faulty(*args: Any, **kwargs: Any) -> Any:
            fault = self._throw()
            if fault == "before":
                self._fail(f"before {name}", error)
            answer = function(*args, **kwargs)
            if fault == "after":
                self._fail(f"after {name}", error)
            return answer

        return faulty

    @contextmanager
    def transaction(self, engine: Engine) -> Iterator[Connection]:
        """Stand for `storage.engine.transaction`: its commit may fail, or seem to."""
        fault = self._throw()
        with transaction(engine) as tx:
            yield tx
            if fault == "before":
                self._fail("before commit", TransientError)
        if fault == "after":
            self._fail("after commit", TransientError)

    def _throw(self) -> str | None:
        if not self.active or self._random.random() > self.rate:
            return None
        fault = self._random.choice(("before", "after", "delay"))
        if fault == "delay":
            self.made["delay"] += 1
            time.sleep(DELAY_S)
        return fault

    def _fail(self, where: str, error: type[Exception]) -> None:
        self.made[where] += 1
        raise error(f"fault: {where}")


def install(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the faults around every commit, the storage functions, the heartbeat and the load."""
    for module in OPENERS:
        monkeypatch.setattr(module, "transaction", faults.transaction)
    for name in sorted({p.function for p in POINTS if p.function.startswith("storage.")}):
        target = name.replace(":", ".")
        monkeypatch.setattr(target, faults.wrap(name, _resolve(target), TransientError))
    beat = faults.wrap("heartbeat", claims.heartbeat, psycopg.OperationalError)
    monkeypatch.setattr(workers.heartbeat, "heartbeat", beat)
    load = faults.wrap("load", PostgresDestination.load, TransientError)
    monkeypatch.setattr(PostgresDestination, "load", load)


def _resolve(target: str) -> Any:
    import importlib

    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)
