"""Every metric of a worker, in one place; docs/metrics.md explains them.

Labels come from closed sets, and each series of a small set exists from the start: a rate over a
series that appears with its first event misses that event.
"""

from prometheus_client import Counter, Gauge, Histogram

from connectors import registry
from schemas.calls import STATUS_CLASSES
from schemas.failures import FAILURES, GUARDS
from schemas.labels import OTHER, closed
from schemas.runs import Outcome, OutcomeKind, Trigger

#: What `connector` may say: the registry's names, and `other` before a run's subject is known.
CONNECTORS = registry.sources() | registry.destinations()
_REASONS = frozenset(FAILURES) | {kind.value for kind in OutcomeKind}
_WAITS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 900, 3_600, 14_400)

RUNS = Counter(
    "syncward_runs",
    "Attempts ended by this worker, by the state they led to.",
    ["connector", "state"],
)
RUN_DURATION = Histogram(
    "syncward_run_duration_seconds",
    "Time from the claim to the end of an attempt.",
    ["connector"],
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 900, 3_600, 14_400, 43_200, 86_400),
)
QUEUE_WAIT = Histogram(
    "syncward_run_queue_wait_seconds",
    "Time from when a run was ready to its claim.",
    ["trigger"],
    buckets=_WAITS,
)
CONTROL_DURATION = Histogram(
    "syncward_run_control_duration_seconds",
    "Time of one transaction with the control database, by step of a run.",
    ["step"],
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30),
)
RUN_ATTEMPTS = Counter("syncward_run_attempts", "Attempts by how they ended.", ["reason"])
ROWS = Counter("syncward_rows", "Rows extracted, loaded and rejected.", ["connector", "direction"])
BYTES = Counter("syncward_bytes", "Bytes relayed.", ["connector"])
CLAIMS = Counter(
    "syncward_claims", "Jobs taken from the queue, by what the claim said.", ["result"]
)
DECRYPTS = Counter("syncward_decrypts", "Data keys used to open something.", ["purpose", "outcome"])
RENEWALS = Counter(
    "syncward_login_renewals", "Logins that a run wanted renewed, by what came of it.", ["outcome"]
)
KEYS_PENDING = Gauge(
    "syncward_keys_pending", "Data keys that a rotation has yet to reach, by what is due.", ["kind"]
)
KEYS_AGE = Gauge("syncward_keys_age_seconds", "Age of the active root.", ["purpose"])
SEALS = Counter("syncward_seals", "Records sealed by this worker.", ["kind"])
LEASE_RENEWALS = Counter(
    "syncward_lease_renewals", "Renewals of leases, by what the database said.", ["result"]
)
LEASES_LOST = Counter(
    "syncward_leases_lost", "Runs of this worker whose lease went elsewhere.", ["reason"]
)
GUARDS_TRIPPED = Counter("syncward_guards_tripped", "Runs that a guard stopped.", ["guard"])
API_CALLS = Counter(
    "syncward_api_calls",
    "Calls over HTTP to sources, by the class of status.",
    ["connector", "class"],
)
API_CALLS_LOST = Counter(
    "syncward_api_calls_lost", "Calls that could not be stored in time and are in no list."
)
QUOTA_WAITS = Counter(
    "syncward_quota_waits", "Calls that waited in place for their turn in a quota.", ["connector"]
)
QUOTA_WAITED = Counter(
    "syncward_quota_waited_seconds", "Time that calls waited in place for a quota.", ["connector"]
)
QUOTA_DEFERRALS = Counter(
    "syncward_quota_deferrals", "Attempts that a quota deferred.", ["connector"]
)
QUOTAS_ALONE = Gauge(
    "syncward_quotas_alone", "1 while this worker counts quotas by itself, without Redis."
)
RUNNING = Gauge("syncward_running_runs", "Runs that this worker executes now.")

for _connector in (*CONNECTORS, OTHER):
    RUN_DURATION.labels(_connector)
    BYTES.labels(_connector)
    for _kind in OutcomeKind:
        RUNS.labels(_connector, _kind.value)
    for _direction in ("extracted", "loaded", "rejected"):
        ROWS.labels(_connector, _direction)
    for _status in STATUS_CLASSES:
        API_CALLS.labels(_connector, _status)
    QUOTA_WAITS.labels(_connector)
    QUOTA_WAITED.labels(_connector)
    QUOTA_DEFERRALS.labels(_connector)
for _trigger in Trigger:
    QUEUE_WAIT.labels(_trigger.value)
for _step in ("claim", "checkpoint", "finish"):
    CONTROL_DURATION.labels(_step)
for _reason in (*_REASONS, OTHER):
    RUN_ATTEMPTS.labels(_reason)
for _result in ("claimed", "stale", "unknown"):
    CLAIMS.labels(_result)
for _outcome in ("opened", "refused"):
    DECRYPTS.labels("credentials", _outcome)
    DECRYPTS.labels("pseudonyms", _outcome)
for _outcome in ("exchanged", "found", "dead", "refused", "failed", "waited", "not_stored"):
    RENEWALS.labels(_outcome)
for _what in ("rewrap", "reseal"):
    KEYS_PENDING.labels(_what)
for _purpose in ("credentials", "records"):
    KEYS_AGE.labels(_purpose)
for _sealed in ("run_log", "run_output"):
    SEALS.labels(_sealed)
for _result in ("renewed", "lost", "failed"):
    LEASE_RENEWALS.labels(_result)
for _reason in ("taken", "no_heartbeat", "at_finish"):
    LEASES_LOST.labels(_reason)
for _guard in (*GUARDS, OTHER):
    GUARDS_TRIPPED.labels(_guard)


def connector_of(kind: str | None) -> str:
    """Return a connector's name as a label."""
    return closed(kind, CONNECTORS)


def count_end(outcome: Outcome, kind: str | None, seconds: float) -> None:
    """Count the end of an attempt that read from a resource of this kind."""
    connector = connector_of(kind)
    RUN_DURATION.labels(connector).observe(seconds)
    RUN_ATTEMPTS.labels(closed(outcome.error_code or outcome.kind, _REASONS)).inc()
    RUNS.labels(connector, outcome.kind).inc()
    if outcome.kind is OutcomeKind.AWAITING_APPROVAL:
        GUARDS_TRIPPED.labels(closed(outcome.error_code, GUARDS)).inc()
