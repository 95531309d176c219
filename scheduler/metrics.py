"""Every metric of a scheduler, in one place; docs/metrics.md explains them."""

from prometheus_client import Counter, Gauge, Histogram

#: What `tick` may say: the loops of scheduler/main.py, and the reading of the cluster's gauges.
TICKS = ("due", "dispatch", "reap", "presence", "upkeep", "retention", "leave", "gauges")

TICK_DURATION = Histogram(
    "syncward_scheduler_tick_duration_seconds",
    "Time of one tick.",
    ["tick"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
TICK_ITEMS = Counter(
    "syncward_scheduler_items", "Schedules claimed, jobs sent, runs recovered.", ["tick"]
)
TICK_LAST = Gauge(
    "syncward_scheduler_last_tick_timestamp_seconds", "When a tick last succeeded.", ["tick"]
)
LEASES_EXPIRED = Counter(
    "syncward_leases_expired", "Runs taken back from workers that went silent."
)
TICKS_FAILED = Counter("syncward_scheduler_ticks_failed", "Ticks that failed.", ["tick"])
RECOVERED = Counter(
    "syncward_runs_recovered", "Runs that the reaper moved on, by what was lost.", ["reason"]
)
DISPATCHES = Counter(
    "syncward_dispatches", "Jobs given to Redis, by whether it took them.", ["result"]
)

for _tick in TICKS:
    TICK_DURATION.labels(_tick)
    TICK_ITEMS.labels(_tick)
    TICKS_FAILED.labels(_tick)
for _tick in ("due", "dispatch", "reap", "presence", "upkeep", "retention", "gauges"):
    TICK_LAST.labels(_tick)
for _reason in ("lease", "undelivered", "overdue", "stuck"):
    RECOVERED.labels(_reason)
for _result in ("sent", "error"):
    DISPATCHES.labels(_result)
