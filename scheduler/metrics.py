"""Every metric of a scheduler, in one place; docs/metrics.md explains them."""

from prometheus_client import Counter, Histogram

TICK_DURATION = Histogram(
    "syncward_scheduler_tick_duration_seconds",
    "Time of one tick.",
    ["tick"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
TICK_ITEMS = Counter(
    "syncward_scheduler_items", "Schedules claimed, jobs sent, runs recovered.", ["tick"]
)
LEASES_EXPIRED = Counter(
    "syncward_leases_expired", "Runs taken back from workers that went silent."
)
TICKS_FAILED = Counter("syncward_scheduler_ticks_failed", "Ticks that failed.", ["tick"])
