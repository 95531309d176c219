"""Schedules: an interval, a cron expression in an IANA zone, or manual."""

from datetime import timedelta
from enum import StrEnum
from typing import Literal, Self
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from schemas.streams import Duration, format_duration

#: A cron schedule may be this late on purpose at most.
JITTER_MAX = timedelta(hours=1)


class CatchUp(StrEnum):
    """What becomes of the slots that passed while nobody could claim them."""

    COALESCE = "coalesce"  # one run for all of them
    SKIP = "skip"  # none if the newest is older than the catch-up window
    ALL = "all"  # each, one after the other, up to a bound


class Overlap(StrEnum):
    """What becomes of a slot that finds the previous run still live."""

    BUFFER_ONE = "buffer_one"  # one more run afterwards
    SKIP = "skip"
    CANCEL_OTHER = "cancel_other"  # ask the live run to stop, then run


class Schedule(BaseModel):
    """Exactly one of `every`, `cron` or `manual`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    every: Duration | None = None
    cron: str | None = None
    zone: str = "UTC"
    jitter: Duration = timedelta(0)  # spreads those that share a minute; intervals spread anyway
    catch_up: CatchUp = CatchUp.COALESCE
    overlap: Overlap = Overlap.BUFFER_ONE

    @model_validator(mode="before")
    @classmethod
    def _the_word_manual(cls, value: object) -> object:
        if value == "manual":
            return {}
        if not isinstance(value, dict | Schedule):
            raise ValueError("write {every: 5m}, {cron: '15 2 * * *'} or manual")  # noqa: TRY004 - pydantic shows no TypeError
        return value

    @field_validator("zone")
    @classmethod
    def _zone_exists(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, IsADirectoryError):
            raise ValueError(
                f"zone {value!r} is not an IANA time zone, e.g. Europe/Berlin"
            ) from None
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.every is not None and self.cron is not None:
            raise ValueError("a schedule has `every` or `cron`, not both")
        if self.every is not None and self.every < timedelta(seconds=1):
            raise ValueError("every: the shortest interval is 1s")
        if self.jitter and self.cron is None:
            raise ValueError("jitter is for cron; intervals are spread by when they were made")
        if not timedelta(0) <= self.jitter <= JITTER_MAX:
            raise ValueError(f"jitter: at most {format_duration(JITTER_MAX)}")
        return self

    def offset(self, connection_id: UUID) -> timedelta:
        """Return by how much this connection is late on purpose: always the same, below `jitter`.

        The random low bits of its id decide, so that neighbours do not stay neighbours.
        """
        seconds = int(self.jitter.total_seconds())
        return timedelta(seconds=connection_id.int % seconds) if seconds else timedelta(0)

    @property
    def kind(self) -> Literal["interval", "cron", "manual"]:
        if self.every is not None:
            return "interval"
        return "cron" if self.cron is not None else "manual"

    def __str__(self) -> str:
        if self.every is not None:
            return f"every {format_duration(self.every)}"
        return f"cron {self.cron} ({self.zone})" if self.cron is not None else "manual"
