"""Windows of time of an incremental read, and where the next one begins.

The upper bound is the other system's clock less `settle`, never the newest record: a record may
show up later than its time says. A clock that went back does not take the cursor with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from connectors.rest.manifest import Incremental
from connectors.rest.requests import TimeFormat
from schemas.errors import ConfigError
from schemas.records import Between, Cursor
from schemas.streams import Mode, StreamSpec

#: How long after its time a record may show up.
DEFAULT_SETTLE = timedelta(seconds=60)
_KIND = "window"
#: How far the last window of a merge reaches beyond now: their clock may be ahead.
_BEYOND = timedelta(days=1)
#: So many windows at most of one read: twenty years by the day have 7,300.
_WINDOWS_MAX = 20_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The smallest step of each way to write a time.
_GRAINS = {
    "date": timedelta(days=1),
    "epoch": timedelta(seconds=1),
    "epoch_ms": timedelta(milliseconds=1),
    "iso": timedelta(seconds=1),
}


@dataclass(frozen=True, slots=True)
class Window:
    """Records of [lower, upper) count; the API is asked from `since` to `until`."""

    lower: datetime
    upper: datetime
    since: datetime
    until: datetime
    last: bool
    exact: bool = False  # whatever the mode, no other record counts

    def holds(self, at: datetime) -> bool:
        """Say whether a record of this time belongs to the window."""
        return self.lower <= at < self.upper


def stored(at: datetime) -> Cursor:
    """Return a moment as the cursor of a stream."""
    return {"kind": _KIND, "value": at.isoformat()}


def resumed(stream: StreamSpec, cursor: Cursor | None) -> datetime | None:
    """Return where a cursor resumes; None from the beginning."""
    if cursor is None:
        return None
    try:
        at = datetime.fromisoformat(cursor["value"]) if cursor["kind"] == _KIND else None
    except (KeyError, ValueError):
        at = None
    if at is None:
        raise ConfigError(
            f"{stream.name}: its cursor is none of this connector's; read everything again with: "
            "syncward run enqueue CONNECTION --full-refresh"
        )
    return at.astimezone(UTC)


def start_of(name: str, text: str) -> datetime:
    """Return the moment that a manifest's start_datetime names."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{name}: start_datetime is no time; write 2020-01-01T00:00:00Z"
        ) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def tried(name: str, how: Incremental, start: datetime, now: datetime) -> Window | None:
    """Return a window for a first look at a stream: its newest, where it is read in several."""
    if how.start_time_option is None:
        return None
    stream = StreamSpec(name=name, mode=Mode.REPLACE)
    lower = start if how.step is None else max(start, now - how.step)
    return next(windows(stream, how, lower, now))


def windows(
    stream: StreamSpec, how: Incremental, lower: datetime, now: datetime
) -> Iterator[Window]:
    """Cut the time from `lower` to now into windows, in order; there is always one."""
    settle = DEFAULT_SETTLE if stream.settle is None else stream.settle
    append = stream.mode is Mode.APPEND
    overlap = timedelta(0) if append else max(stream.overlap, how.lookback_window)
    end = now - settle
    # the clock went back: what is changed now has a time before the cursor
    since = lower if append else min(lower, end)
    top = max(lower, end)
    if how.step is not None and (top - lower) / how.step > _WINDOWS_MAX:
        raise ConfigError(f"{stream.name}: step makes more than {_WINDOWS_MAX:,} windows; raise it")
    while True:
        upper = top if how.step is None else min(lower + how.step, top)
        last = upper >= top
        # what changes while all is read is in its end, or a full read would take it for gone
        until = upper if append or not last else upper + settle + _BEYOND
        yield Window(lower, upper, _moved(since, -overlap), until, last)
        if last:
            return
        lower = since = upper
        overlap = timedelta(0)  # the window before has just been read


def _moved(at: datetime, distance: timedelta) -> datetime:
    try:
        return at + distance
    except OverflowError:
        return datetime.min.replace(tzinfo=UTC)


def windows_between(stream: StreamSpec, how: Incremental, between: Between) -> list[Window]:
    """Return the windows of a backfill, from two times that a person wrote."""
    lower, upper = _read(stream, "--from", between.lower), _read(stream, "--to", between.upper)
    if lower >= upper:
        raise ConfigError(
            f"{stream.name}: --from is not below --to; rows from the first on are read, up to and "
            "without the second"
        )
    found: list[Window] = []
    while lower < upper:
        end = upper if how.step is None else min(lower + how.step, upper)
        found.append(Window(lower, end, lower, end, last=end == upper, exact=True))
        lower = end
    return found


def _read(stream: StreamSpec, option: str, value: str) -> datetime:
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(
            f"{stream.name}: {option} is no timestamp or date, the type of its cursor column "
            f"{stream.cursor}; write a time as 2026-01-31 or 2026-01-31 12:00:00"
        ) from None
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def went_back(stream: StreamSpec, lower: datetime, now: datetime) -> tuple[str, ...]:
    """Say that the clock of the other system stands before the cursor."""
    if now >= lower:
        return ()
    kept = "" if stream.mode is Mode.MERGE else "; records of that time are missed"
    return (f"inexact: the clock there went back behind the last window{kept}",)


def written(at: datetime, how: Incremental) -> str:
    """Return a moment as the API takes it."""
    return written_as(at, how.datetime_format)


def written_end(at: datetime, how: Incremental) -> str:
    """Return the end of a window as the API takes it, never before the moment itself."""
    return written_end_as(at, how.datetime_format)


def written_as(at: datetime, format_: TimeFormat) -> str:
    """Return a moment in a format."""
    match format_:
        case "epoch":
            return str(int(at.timestamp()))
        case "epoch_ms":
            return str(int(at.timestamp() * 1_000))
        case "date":
            return at.date().isoformat()
        case _:
            return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def written_end_as(at: datetime, format_: TimeFormat) -> str:
    """Return a moment in a format, never before the moment itself."""
    return written_as(_rounded_up(at, _GRAINS[format_]), format_)


def _rounded_up(at: datetime, grain: timedelta) -> datetime:
    rounded = _EPOCH + (at - _EPOCH) // grain * grain
    return rounded if rounded == at else rounded + grain


def middle(since: datetime, until: datetime, how: Incremental) -> datetime | None:
    """Return the middle of a window, as the API can be asked for; None if it has none."""
    grain = _GRAINS[how.datetime_format]
    half = _rounded_up(since + (until - since) / 2, grain)
    return half if since < half < until else None
