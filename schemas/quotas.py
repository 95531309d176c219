"""How often another system may be called: what is declared, and the counting of calls in windows.

A window counts in slices of a sixtieth of its length, and lets the slice fall out in which a call
may be that is just young enough. So no stretch of time of that length, wherever it begins, has more
calls than the rate; a full window opens again up to two slices later than it could.
workers/quotas.py counts by the same rules in Redis.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import random
from threading import Event, Lock
from time import monotonic
from typing import Protocol

from schemas.errors import Deferral
from schemas.streams import format_duration

#: Slices of a moving window.
SLICES = 60
#: One call waits so long for its turn in place, in all, unless its caller has more patience.
TURN_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many calls in any stretch of this length.

    `fixed`: in each full period of the clock (hours of UTC, days from midnight on) instead.
    """

    calls: int
    per: timedelta
    fixed: bool = False

    @property
    def width(self) -> int:
        """Milliseconds of a slice."""
        period = max(self.per // timedelta(milliseconds=1), 1)
        return period if self.fixed else -(-period // SLICES)

    @property
    def behind(self) -> int:
        """Slices before the present one that count."""
        return 0 if self.fixed else -(-(self.per // timedelta(milliseconds=1)) // self.width)

    def __str__(self) -> str:
        return f"{self.calls:,} calls per {format_duration(self.per)}"


@dataclass(frozen=True, slots=True)
class Quota:
    """What calls are counted by: the API, a name within it, and whose calls they are.

    `holder` are values that tell one login from others, secrets among them; () if there are none,
    or none that last: then the resource itself is meant. Without a rate the quota only holds calls
    back where the API asks for it.
    """

    provider: str
    name: str
    rates: tuple[Rate, ...] = ()
    holder: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Hold:
    """No call now, but in so many seconds; `rate` is the one that is used up, None: it was told."""

    seconds: float
    rate: Rate | None


class Quotas(Protocol):
    """Turns for calls. Any thread may ask."""

    def take(self, quota: Quota, *, patience: float, ended: Event) -> None:
        """Wait until one call may be made, and count it; or until `ended` is set.

        Deferral where that would take longer than `patience` seconds: then nothing was counted.
        """
        ...

    def close(self, quota: Quota, seconds: float) -> None:
        """Let nobody call for so many seconds: an answer said so."""
        ...


class Windows:
    """The calls of one quota, by a clock that its user reads."""

    def __init__(self, rates: Sequence[Rate]) -> None:
        self._rates = tuple(rates)
        self._slices: list[dict[int, int]] = [{} for _ in rates]  # slice -> calls, oldest first

    def hold(self, now_ms: int) -> Hold | None:
        """Say how long the next call has to wait; None if it need not."""
        found = None
        for rate, counts in zip(self._rates, self._slices, strict=True):
            self._forget(rate, counts, now_ms)
            left = sum(counts.values())
            if left < rate.calls:
                continue
            for begin, calls in counts.items():
                left -= calls
                if left < rate.calls:
                    wait = (begin + rate.behind + 1) * rate.width - now_ms
                    if found is None or wait > found.seconds * 1_000:
                        found = Hold(wait / 1_000, rate)
                    break
        return found

    def add(self, now_ms: int) -> None:
        """Count a call."""
        for rate, counts in zip(self._rates, self._slices, strict=True):
            present = now_ms // rate.width
            counts[present] = counts.get(present, 0) + 1

    def counts(self, now_ms: int) -> list[int]:
        """Return how many calls count now, for each rate."""
        for rate, counts in zip(self._rates, self._slices, strict=True):
            self._forget(rate, counts, now_ms)
        return [sum(counts.values()) for counts in self._slices]

    @staticmethod
    def _forget(rate: Rate, counts: dict[int, int], now_ms: int) -> None:
        first = now_ms // rate.width - rate.behind
        for begin in [begin for begin in counts if begin < first]:
            del counts[begin]


#: Shows that something waits in place: for what, and for how many seconds at most.
Shown = Callable[[str, float], AbstractContextManager[None]]


@contextmanager
def unseen(_what: str, _seconds: float) -> Iterator[None]:
    """Show nothing: nobody looks."""
    yield


def in_turn(
    ask: Callable[[], Hold | None],
    quota: Quota,
    *,
    patience: float,
    ended: Event,
    shown: Shown = unseen,
) -> float:
    """Ask until there is no hold; return how long that took. Deferral as `Quotas.take` says."""
    waited = 0.0
    while not ended.is_set():
        hold = ask()
        if hold is None:
            break
        if hold.seconds > patience or waited + hold.seconds > max(patience, TURN_MAX_S):
            raise Deferral(
                _sentence(quota, hold), retry_after=timedelta(seconds=max(hold.seconds, 0.001))
            )
        seconds = hold.seconds * (1 + random() / 10)  # noqa: S311 - not all at once
        with shown(_sentence(quota, hold), seconds):
            ended.wait(seconds)
        waited += seconds
    return waited


def _sentence(quota: Quota, hold: Hold) -> str:
    until = datetime.now(UTC) + timedelta(seconds=hold.seconds)
    what = "closed, as it told us" if hold.rate is None else f"used up: {hold.rate}"
    return (
        f"{quota.provider}: quota {quota.name} is {what}, until {until:%Y-%m-%d %H:%M:%S} UTC, for "
        "all runs with this login"
    )


class Unshared:
    """Counts for one reader, where there is no worker: `connector try`, tests."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._windows: dict[Quota, Windows] = {}
        self._closed: dict[Quota, float] = {}

    def take(self, quota: Quota, *, patience: float, ended: Event) -> None:
        """Wait for the turn among the calls of this reader."""
        in_turn(lambda: self._ask(quota), quota, patience=patience, ended=ended)

    def close(self, quota: Quota, seconds: float) -> None:
        """Hold this reader back."""
        with self._lock:
            self._closed[quota] = max(self._closed.get(quota, 0.0), monotonic() + seconds)

    def _ask(self, quota: Quota) -> Hold | None:
        now = monotonic()
        with self._lock:
            left = self._closed.get(quota, 0.0) - now
            if left > 0:
                return Hold(left, None)
            windows = self._windows.setdefault(quota, Windows(quota.rates))
            hold = windows.hold(int(now * 1_000))
            if hold is None:
                windows.add(int(now * 1_000))
            return hold
