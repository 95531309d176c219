"""When to come back: what answers say of limits, and waiting for a moment in place.

A short wait is waited; a long one defers the run, which frees the worker. The budget of calls that
all workers share is asked in `Pace.before`.
"""

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from threading import Event
from time import monotonic

from schemas.errors import Deferral, TransientError
from schemas.quotas import Quota, Quotas, Shown, unseen

#: A wait up to this is waited in place, and so many seconds of them in one read.
SHORT_S, IN_PLACE_S = 10.0, 60.0
#: A longer one, too, if reading again would take longer; but never one beyond this.
IN_PLACE_LONGEST_S = 300.0
#: Nobody is told to wait for longer than a year.
_LONGEST_S = 366 * 86_400
#: A reset beyond this is a moment since 1970, below it a number of seconds.
_EPOCH_FROM = 1_000_000_000
#: Some count that in milliseconds: as seconds it would be the year 5138.
_EPOCH_MS_FROM = 100_000_000_000
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
            if seconds >= _EPOCH_MS_FROM:
                seconds /= 1_000
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
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        return None


class Pace:
    """Turns and waits of one source; another thread may end them.

    A wait that costs less than reading again what nobody has kept yet is waited in place.
    """

    def __init__(self, where: str, quotas: Quotas, ended: Event, shown: Shown = unseen) -> None:
        self._where = where
        self._shown = shown
        self._quotas = quotas
        self._ended = ended
        self._waited = 0.0
        self._closed_until: float | None = None
        self._begun = monotonic()
        self._calls: Counter[Quota] = Counter()

    def kept(self) -> None:
        """Note that what was read before is loaded: only what comes now would be read again."""
        self._begun = monotonic()
        self._calls.clear()

    def before(self, quota: Quota | None) -> None:
        """Wait until the next call may be made."""
        if self._closed_until is not None:
            until, self._closed_until = self._closed_until, None
            self.wait(max(until - monotonic(), 0.0))
        if quota is not None:
            self._quotas.take(quota, patience=self._patience(quota), ended=self._ended)
            self._calls[quota] += 1
        self.check()

    def _patience(self, quota: Quota | None) -> float:
        """Return how long a wait may be: not longer than reading again would take."""
        lost = monotonic() - self._begun
        if quota is not None:
            turns = [rate.per.total_seconds() / rate.calls for rate in quota.rates]
            lost = max([lost, *(self._calls[quota] * turn for turn in turns)])
        return max(SHORT_S, min(lost, IN_PLACE_LONGEST_S))

    def after(self, headers: Mapping[str, str], quota: Quota | None) -> None:
        """Remember that an answer was the last one for now."""
        seconds = told(headers) if used_up(headers) else None
        if seconds is None:
            return
        if quota is not None:
            self._quotas.close(quota, seconds)
        else:
            self._closed_until = monotonic() + seconds

    def limited(self, seconds: float, quota: Quota | None) -> None:
        """Wait as an answer says: everybody who shares the quota, or this source alone."""
        if quota is not None:
            self._quotas.close(quota, seconds)
        else:
            self.wait(seconds)

    def wait(self, seconds: float) -> None:
        """Wait in place; Deferral if that is for too long."""
        too_often = seconds <= SHORT_S and self._waited + seconds > IN_PLACE_S
        if too_often or seconds > self._patience(None):
            raise Deferral(
                f"{self._where}: its rate limit is reached; it says to wait for {seconds:.0f} s",
                retry_after=timedelta(seconds=seconds),
            )
        self._waited += seconds if seconds <= SHORT_S else 0.0
        with self._shown(f"{self._where}: is asked again then", seconds):
            self._ended.wait(seconds)
        self.check()

    def check(self) -> None:
        """End where somebody asked for it."""
        if self._ended.is_set():
            raise TransientError(f"{self._where}: the read was cancelled", code="cancelled_there")
