"""The clock of a fake: it stands still until a test moves it."""

from datetime import UTC, datetime, timedelta

BEGIN = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    """Called for the time; each change of a record takes a second."""

    def __init__(self) -> None:
        self.now = BEGIN

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **units: float) -> None:
        self.now += timedelta(**units)

    def tick(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def iso(at: datetime) -> str:
    """A time as HubSpot writes it."""
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z"


def moment(text: str) -> datetime:
    """A time that a client sent: in milliseconds, or ISO 8601."""
    if text.isdecimal():
        return datetime.fromtimestamp(int(text) / 1000, UTC)
    return datetime.fromisoformat(text)
