"""Every metric of a worker, in one place; docs/metrics.md explains them."""

from prometheus_client import Counter, Gauge, Histogram

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
RUN_ATTEMPTS = Counter("syncward_run_attempts", "Attempts by how they ended.", ["reason"])
ROWS = Counter("syncward_rows", "Rows extracted and loaded.", ["connector", "direction"])
BYTES = Counter("syncward_bytes", "Bytes relayed.", ["connector"])
CLAIMS = Counter(
    "syncward_claims", "Jobs taken from the queue, by what the claim said.", ["result"]
)
DECRYPTS = Counter("syncward_decrypts", "Data keys used to open something.", ["purpose", "outcome"])
LEASES_LOST = Counter("syncward_leases_lost", "Runs of this worker whose lease went elsewhere.")
GUARDS_TRIPPED = Counter("syncward_guards_tripped", "Runs that a guard stopped.", ["guard"])
RUNNING = Gauge("syncward_running_runs", "Runs that this worker executes now.")
