"""Limits that an API declares: the part `api_budget` of a manifest, and which of them a call is in.

Its words are those of the Airbyte low-code schema. The first policy that fits a call counts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from connectors.rest import text as rest_text
from connectors.rest.parts import (
    ApiKey,
    Authenticator,
    Basic,
    Bearer,
    Name,
    OAuth,
    Part,
    RateLimit,
)
from schemas.quotas import Quota, Rate
from schemas.streams import Duration

_LONGEST = timedelta(days=31)
_SHORTEST = timedelta(seconds=1)


def _period(value: timedelta) -> timedelta:
    if not _SHORTEST <= value <= _LONGEST:
        raise ValueError("is between 1s and 31d")
    return value


class Matcher(Part):
    """Calls with this method, and a path (as the manifest writes it) that the pattern finds."""

    type: Literal["HttpRequestRegexMatcher"] = "HttpRequestRegexMatcher"
    method: Literal["GET", "POST", "DELETE"] | None = None
    url_path_pattern: str = Field("", max_length=500)

    @field_validator("url_path_pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error:
            raise ValueError("is no regular expression") from None
        return value

    def fits(self, method: str, route: str) -> bool:
        """Say whether a call is one of these."""
        if self.method is not None and self.method != method:
            return False
        return re.search(self.url_path_pattern, route) is not None


class _Policy(Part):
    name: Name | None = None  # what people are told that a run waits for
    matchers: tuple[Matcher, ...] = Field((), max_length=20)  # none: every call

    def fits(self, method: str, route: str) -> bool:
        """Say whether it holds for a call."""
        return not self.matchers or any(one.fits(method, route) for one in self.matchers)


class CallRate(Part):
    type: Literal["Rate"] = "Rate"
    limit: int = Field(ge=1, le=10_000_000)
    interval: Duration

    @field_validator("interval")
    @classmethod
    def _in_reason(cls, value: timedelta) -> timedelta:
        return _period(value)


class MovingWindow(_Policy):
    """In any stretch of each interval at most its limit."""

    type: Literal["MovingWindowCallRatePolicy"]
    rates: tuple[CallRate, ...] = Field(min_length=1, max_length=5)

    def of_quota(self) -> tuple[Rate, ...]:
        """Return the rates of its quota."""
        return tuple(Rate(one.limit, one.interval) for one in self.rates)


class FixedWindow(_Policy):
    """In each full period of the clock at most so many."""

    type: Literal["FixedWindowCallRatePolicy"]
    period: Duration
    call_limit: int = Field(ge=1, le=10_000_000)

    @field_validator("period")
    @classmethod
    def _in_reason(cls, value: timedelta) -> timedelta:
        return _period(value)

    def of_quota(self) -> tuple[Rate, ...]:
        """Return the rate of its quota."""
        return (Rate(self.call_limit, self.period, fixed=True),)


class Unlimited(_Policy):
    """Nothing is counted, but what the API says of waiting holds for all."""

    type: Literal["UnlimitedCallRatePolicy"]

    def of_quota(self) -> tuple[Rate, ...]:
        """Return no rate."""
        return ()


Policy = Annotated[MovingWindow | FixedWindow | Unlimited, Field(discriminator="type")]


class ApiBudget(Part):
    """What all calls with one login share."""

    type: Literal["HTTPAPIBudget"] = "HTTPAPIBudget"
    policies: tuple[Policy, ...] = Field(min_length=1, max_length=20)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [one.name for one in self.policies if one.name is not None]
        if len(set(names)) < len(names):
            raise ValueError("two policies have the same name; they would share their calls")
        return self


@dataclass(frozen=True, slots=True)
class Budget:
    """The quotas of one resource; the first that fits a call counts."""

    quotas: tuple[tuple[_Policy, Quota], ...] = ()

    def quota_of(self, method: str, route: str) -> Quota | None:
        """Return the quota that a call is in; None if it is in none."""
        return next((quota for policy, quota in self.quotas if policy.fits(method, route)), None)


def budget_of(
    provider: str,
    declared: ApiBudget | RateLimit | None,
    holder: tuple[str, ...],
) -> Budget:
    """Return what a manifest declares; its short form is one moving window for all calls."""
    if declared is None:
        return Budget()
    if isinstance(declared, RateLimit):
        rate = Rate(declared.calls, max(declared.per, _SHORTEST))
        return Budget(((_Policy(), Quota(provider, "rate_limit", (rate,), holder)),))
    return Budget(
        tuple(
            (policy, Quota(provider, policy.name or f"policy {n}", policy.of_quota(), holder))
            for n, policy in enumerate(declared.policies, 1)
        )
    )


def holder_of(
    authenticator: Authenticator, secrets: Mapping[str, str], names: rest_text.Names
) -> tuple[str, ...]:
    """Return what tells a login from others, wherever it is stored; () if that would not last.

    A token that is renewed is another one the next time; without a login there is nothing to tell.
    """
    match authenticator:
        case Bearer():
            return ("bearer", secrets["token"])
        case Basic() as one:
            return ("basic", rest_text.filled(one.username, names), secrets["password"])
        case ApiKey():
            return ("key", secrets["api_key"])
        case OAuth() as one if one.grant_type == "client_credentials":
            client = rest_text.filled(one.client_id, names)
            return ("client", client, secrets["client_secret"])
        case _:
            return ()
