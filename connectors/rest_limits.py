"""When to come back: what answers say of limits, and waiting for a moment in place.

A short wait is waited; a long one defers the run, which frees the worker. A budget of calls that
all workers share will be asked in `Pace.before`.
"""

from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from threading import Event
from time import monotonic

from connectors.rest_parts import RateLimit
from schemas.errors import Deferral, TransientError

#: A wait up to this is waited in place, and so many seconds of them in one read.
SHORT_S, IN_PLACE_S = 10.0, 60.0
#: Nobody is told to wait for longer than a year.
_LONGEST_S = 366 * 86_400
#: A reset beyond this is a moment since 1970, below it a number of seconds.
_EPOCH_FROM = 1_000_000_000
_LEFT = ("x-ratelimit-remaining", "ratelimit-remaining", "x-rate-limit-remaining")
_RESET = ("x-ratelimit-reset", "ratelimit-reset", "x-rate-limit-reset")


def server_time(headers: Mapping[str, str]) -> datetime | None:
    """Return the clock of the other system."""
    return _moment(headers.get("date", ""))


def told(headers: Mapping[str, str]) -> float | None:
    """Return for how many seconds a limit says to wait; None if it does not say."""
    seconds = retry_after(headers)
    if seconds is not None:
        return seconds
    return _until_reset(headers, server_time(headers) or datetime.now(UTC))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return what the header of this name says, in seconds: of a limit or of an error."""
    text = headers.get("retry-after", "").strip()
    seconds = _number(text)
    moment = None if seconds is not None else _moment(text)
    if moment is not None:
        seconds = (moment - (server_time(headers) or datetime.now(UTC))).total_seconds()
    return None if seconds is None else min(max(seconds, 0.0), _LONGEST_S)


def _until_reset(headers: Mapping[str, str], now: datetime) -> float | None:
    for name in _RESET:
        seconds = _number(headers.get(name, ""))
        if seconds is not None:
            if seconds >= _EPOCH_FROM:
                seconds -= now.timestamp()
            return min(max(seconds, 0.0), _LONGEST_S)
    return None


def used_up(headers: Mapping[str, str]) -> bool:
    """Say whether an answer was the last one that the limit allows for now."""
    return any(_number(headers.get(name, "")) == 0 for name in _LEFT)


def _number(text: str) -> float | None:
    text = text.strip()
    if not text.isascii():
        return None
    whole = text.split(".", 1)[0]
    return float(text) if whole.isdecimal() and text.replace(".", "", 1).isdecimal() else None


def _moment(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


class Pace:
    """Waits of one read; another thread may end them."""

    def __init__(self, where: str, limit: RateLimit | None, ended: Event) -> None:
        self._where = where
        self._limit = limit
        self._ended = ended
        self._calls: deque[float] = deque()
        self._waited = 0.0
        self._closed_until: float | None = None

    def before(self) -> None:
        """Wait until the next call may be made."""
        if self._closed_until is not None:
            until, self._closed_until = self._closed_until, None
            self.wait(max(until - monotonic(), 0.0))
        if self._limit is not None:
            self._hold_back(self._limit)
        self.check()

    def _hold_back(self, limit: RateLimit) -> None:
        span, now = limit.per.total_seconds(), monotonic()
        if len(self._calls) >= limit.calls:
            free = self._calls.popleft() + span - now
            if free > 0 and self._ended.wait(free):
                self.check()
        self._calls.append(monotonic())

    def after(self, headers: Mapping[str, str]) -> None:
        """Remember that an answer was the last one for now."""
        if used_up(headers):
            seconds = told(headers)
            self._closed_until = None if seconds is None else monotonic() + seconds

    def wait(self, seconds: float) -> None:
        """Wait in place; Deferral if that is for too long."""
        if seconds > SHORT_S or self._waited + seconds > IN_PLACE_S:
            raise Deferral(
                f"{self._where}: its rate limit is reached; it says to wait for {seconds:.0f} s",
                retry_after=timedelta(seconds=seconds),
            )
        self._waited += seconds
        self._ended.wait(seconds)
        self.check()

    def check(self) -> None:
        """End where somebody asked for it."""
        if self._ended.is_set():
            raise TransientError(f"{self._where}: the read was cancelled", code="cancelled_there")
