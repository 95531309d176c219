"""The signed times of a log, and whether the times of its events fit them. Start at `Times.window`.

The sealer's clock is in the database's hands as little as its key. So a time that an event says of
itself must lie near the signed times around it; else it was inserted with a time of somebody's
choice, or a clock was wrong. What waited while nobody sealed is no such event.
"""

from datetime import datetime, timedelta

from audit.checkpoint import Checkpoint
from audit.findings import Level, Report

#: A live sealer writes at least a heartbeat a minute.
GAP = timedelta(seconds=180)
#: An event is sealed within so long, unless there was an outage.
LATE = timedelta(hours=1)
#: Clocks of two hosts may differ by so much.
SKEW = timedelta(minutes=5)

#: Catching up takes no longer, however long the outage was.
_CATCH_UP = timedelta(days=1)

_FIRST, _LAST = "", "~"  # before and after all times as they are written


class Times:
    """Follows the signed times of one log."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.last: Checkpoint | None = None  # whoever signed it
        self.newest: datetime | None = None  # of those that a trusted key signed
        self._before: datetime | None = None  # the last of them
        #: Since when events waited for a sealer, and until when it may still be catching up.
        self._outage: tuple[datetime, datetime] | None = None
        self._behind = timedelta(0)  # the sealer's clock went back by so much

    def follow(self, point: Checkpoint) -> None:
        """Note gaps, and steps of the sealer's clock."""
        before, self.last = self.last, point
        if before is None:
            return
        gap = point.signed_at - before.signed_at
        if gap > GAP:
            self._report.note(
                f"nothing was sealed for {gap.total_seconds():.0f} s before the checkpoint of "
                f"{point.size} events ({point.signed_at:%Y-%m-%d %H:%M:%S} UTC)"
            )
        elif gap < timedelta(0):
            self._report.note(
                f"the sealer's clock went back by {-gap.total_seconds():.1f} s before the "
                f"checkpoint of {point.size} events"
            )

    def window(self, signed_at: datetime, oldest: str | None) -> tuple[str, str]:
        """Return between which times events of the next trusted checkpoint must be.

        `oldest`: the first time that one of them says; it counts where nothing is known of what was
        sealed before (the log begins, or what is read of it).
        """
        before, self._before = self._before, signed_at
        self.newest = max(signed_at, self.newest or signed_at)
        if before is None:
            oldest_at = min(_time(oldest, signed_at), signed_at)
            self._outage = (oldest_at, _caught_up(oldest_at, signed_at))
            return _FIRST, _written(signed_at + SKEW)
        gap = signed_at - before
        if gap < timedelta(0):
            self._behind -= gap
        elif gap > GAP:
            self._behind = max(timedelta(0), self._behind - gap)
            self._break(before, signed_at)
        since = min(before, signed_at)
        if self._outage is not None and signed_at <= self._outage[1]:
            since = min(since, self._outage[0])
        return _written(since, -LATE), _written(signed_at + self._behind + SKEW)

    def _break(self, start: datetime, end: datetime) -> None:
        """Remember an outage; one that ends in another is one with it if both are long.

        So it is with transactions that stay open for hours one after the other. A short one that
        were joined would let whoever makes many of them extend the first for ever.
        """
        until = _caught_up(start, end)
        if self._outage is None or start > self._outage[1]:
            self._outage = (start, until)
        elif end - start > LATE:
            self._outage = (min(start, self._outage[0]), max(until, self._outage[1]))

    def judge(self, index: int, at: str, window: tuple[str, str]) -> None:
        """Report an event whose time lies outside."""
        late = at < window[0]
        self._report.add(
            Level.INCOMPLETE,
            f"the event says {at}, "
            + ("over an hour before" if late else "after")
            + f" it was sealed ({self._before:%Y-%m-%dT%H:%M:%S}Z)"
            + (", and no outage explains it" if late else "")
            + ": inserted with a time of somebody's choice, or a clock was wrong",
            index,
        )


def _caught_up(start: datetime, end: datetime) -> datetime:
    """Return until when what waited may be sealed: sealing is ten times as fast as writing."""
    return end + min(end - start, LATE + (end - start) / 10, _CATCH_UP)


def _time(written: str | None, otherwise: datetime) -> datetime:
    try:
        found = datetime.fromisoformat(written or "")
    except ValueError:
        return otherwise
    return found if found.tzinfo is not None else otherwise


def _written(time: datetime, by: timedelta = timedelta(0)) -> str:
    """Return a time as events write it, so that texts compare as times do."""
    try:
        return (time + by).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    except OverflowError:
        return _FIRST if by < timedelta(0) else _LAST
