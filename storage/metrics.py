"""Metrics that are counted where SQL is spoken, by schedulers and workers; docs/metrics.md."""

from prometheus_client import Counter, Gauge

from schemas.redaction import LAYERS, REDACTOR

BUILD = Gauge("syncward_build_info", "Always 1; the version is the label.", ["version"])
SLOTS = Counter("syncward_slots", "Slots of schedules, by what became of them.", ["outcome"])
REDACTIONS = Counter(
    "syncward_redactions", "Places masked in texts, by what found them.", ["layer"]
)

for _outcome in ("queued", "merged", "skipped"):
    SLOTS.labels(_outcome)
for _layer in LAYERS:
    REDACTIONS.labels(_layer)
REDACTOR.count_with(lambda layer, places: REDACTIONS.labels(layer).inc(places))
