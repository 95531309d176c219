"""Plans: what an account pays for, as limits that are enforced."""

from dataclasses import dataclass
from datetime import timedelta

from schemas.errors import ConfigError
from schemas.streams import format_duration


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    shortest_schedule: timedelta
    runs_max: int  # at once, over all connections of the account
    retention_days: int


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("standard", timedelta(seconds=60), runs_max=10, retention_days=30),
        Plan("unlimited", timedelta(seconds=1), runs_max=1_000, retention_days=365),
    )
}


def plan(name: str) -> Plan:
    """Return the plan of that name; ConfigError lists the plans there are."""
    try:
        return PLANS[name]
    except KeyError:
        known = ", ".join(sorted(PLANS))
        raise ConfigError(f"plan {name}: no such plan; choose one of {known}") from None


def check_interval(chosen: Plan, every: timedelta) -> None:
    """Refuse a schedule that is shorter than the plan allows."""
    if every < chosen.shortest_schedule:
        raise ConfigError(
            f"schedule every {format_duration(every)}: plan {chosen.name} allows "
            f"{format_duration(chosen.shortest_schedule)} at the shortest; "
            "choose a longer interval or another plan"
        )
