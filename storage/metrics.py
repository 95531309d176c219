"""Metrics that are counted where SQL is spoken, by schedulers and workers; docs/metrics.md."""

from prometheus_client import Counter, Gauge

BUILD = Gauge("syncward_build_info", "Always 1; the version is the label.", ["version"])
SLOTS = Counter("syncward_slots", "Slots of schedules, by what became of them.", ["outcome"])

for _outcome in ("queued", "merged", "skipped"):
    SLOTS.labels(_outcome)
