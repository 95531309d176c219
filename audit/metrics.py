"""Every metric of a sealer, in one place; docs/metrics.md explains them."""

from prometheus_client import Counter, Gauge

from schemas.anchors import ANCHORS_MAX

#: An anchor's label is its place in SYNCWARD_AUDIT_ANCHORS.
ANCHORS = tuple(str(n) for n in range(1, ANCHORS_MAX + 1))

SEALED = Counter("syncward_audit_sealed_events", "Audit events that this sealer sealed.")
BATCHES = Counter("syncward_audit_batches", "Checkpoints that this sealer signed.")
STEPS_FAILED = Counter(
    "syncward_audit_steps_failed", "Steps of this sealer that failed and came again.", ["step"]
)
SEALING = Gauge("syncward_audit_sealing", "1 while this sealer is the one that seals.")
SEAL_LAG = Gauge(
    "syncward_audit_seal_lag_seconds",
    "How long the oldest committed audit event has waited to be sealed.",
)
PUBLISH_LAG = Gauge(
    "syncward_audit_publish_lag_seconds",
    "How long the oldest checkpoint has waited for all anchors.",
)
LOG_SIZE = Gauge("syncward_audit_log_size", "Audit events that are sealed.")
ANCHOR_FAILURES = Counter(
    "syncward_audit_anchor_failures", "Attempts that an anchor did not accept.", ["anchor"]
)
ANCHOR_FOREIGN = Counter(
    "syncward_audit_anchor_foreign_notes",
    "Notes that an anchor held after our newest and that none of our keys signed.",
    ["anchor"],
)
ANCHOR_LAG = Gauge(
    "syncward_audit_anchor_lag_seconds",
    "How long the oldest checkpoint has waited that an anchor does not hold.",
    ["anchor"],
)

for _anchor in ANCHORS:
    ANCHOR_FAILURES.labels(_anchor)
    ANCHOR_FOREIGN.labels(_anchor)
    ANCHOR_LAG.labels(_anchor)
for _step in ("seal", "publish", "look"):
    STEPS_FAILED.labels(_step)
