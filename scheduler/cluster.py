"""Cluster-wide gauges: read on a timer by one elected scheduler, never by a scrape."""

import logging
from collections.abc import Iterable
from threading import Lock, Thread
from time import CLOCK_BOOTTIME, clock_gettime, monotonic

from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from scheduler import metrics
from schemas.errors import SyncwardError
from schemas.limits import SCHEDULER_SILENT_AFTER
from storage import gauges
from storage.engine import transaction
from storage.gauges import FRESHNESS_BUCKETS, ConnectionGauges, Freshness, Gauges

logger = logging.getLogger(__name__)

#: Seconds between two scans of all schedules: about a second of work per million.
SCAN_EVERY_S = 60.0
#: A reading that is older is not shown: better no series than one that lies.
READING_KEPT_S = 60.0


class ClusterGauges(Collector):
    """Holds the last reading; a scheduler that is not the elected one shows nothing.

    Readings happen in a thread, so that a slow one delays no run. An election holds for as long as
    others would wait before they elect another: one that was stopped, or cut off from the database,
    falls silent before the next one speaks, so that no series exists twice.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: Gauges | None = None
        self._connections: ConnectionGauges | None = None
        self._elected_at = self._read_at = self._scanned_at = float("-inf")
        self._thread: Thread | None = None

    def elect(self, engine: Engine) -> None:
        """Export from now on, and take a new reading unless one is on its way."""
        self._elected_at = _clock()
        if self._thread is None or not self._thread.is_alive():
            self._thread = Thread(target=self._tick, args=(engine,), name="gauges", daemon=True)
            self._thread.start()

    def lose(self) -> None:
        """Export nothing: another scheduler does."""
        self._elected_at = float("-inf")

    def wait(self, seconds: float = 30.0) -> None:
        """Wait until the reading that is on its way has ended."""
        if self._thread is not None:
            self._thread.join(seconds)

    def read(self, engine: Engine) -> None:
        """Take a new reading; what needs a scan of all schedules only once a minute."""
        with transaction(engine) as tx:
            values = gauges.read(tx)
        with self._lock:
            self._values, self._read_at = values, _clock()
        if _clock() - self._scanned_at < SCAN_EVERY_S:
            return
        self._scanned_at = _clock()  # before it succeeds: a scan that fails must not come at once
        with transaction(engine) as tx:
            connections = gauges.read_connections(tx)
        with self._lock:
            self._connections = connections

    def _tick(self, engine: Engine) -> None:
        started = monotonic()
        try:
            self.read(engine)
        except SyncwardError as error:
            metrics.TICKS_FAILED.labels("gauges").inc()
            logger.warning("tick_failed", extra={"tick": "gauges", "reason": error.public})
            return
        metrics.TICK_DURATION.labels("gauges").observe(monotonic() - started)
        metrics.TICK_LAST.labels("gauges").set_to_current_time()

    def describe(self) -> Iterable[Metric]:
        """Name no series ahead of time: there is nothing to name until this one is elected."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the last reading as metric families, while this one is elected."""
        elected = _clock() - self._elected_at < SCHEDULER_SILENT_AFTER.total_seconds()
        return self.shown() if elected else ()

    def shown(self) -> Iterable[Metric]:
        """Return the last reading as metric families unless it is too old."""
        with self._lock:
            values, connections = self._values, self._connections
            fresh = _clock() - self._read_at < READING_KEPT_S
        return families(values, connections) if values and fresh else ()


def _clock() -> float:
    """Return seconds that go on while the machine sleeps: an election ends then, too."""
    return clock_gettime(CLOCK_BOOTTIME)


def families(values: Gauges, connections: ConnectionGauges | None) -> Iterable[Metric]:
    """Turn one reading into metric families, those of connections once there was a scan."""
    for name, about in _PLAIN.items():
        yield GaugeMetricFamily(f"syncward_{name}", about, value=getattr(values, name))
    for name, (about, label) in _LABELLED.items():
        yield _labelled(name, about, label, getattr(values, name))
    if connections is not None:
        yield from _connections(connections)


_PLAIN = {
    "queue_oldest_seconds": "Wait of the oldest ready run.",
    "schedule_lateness_seconds": "How late the oldest unclaimed slot is.",
    "schedulers": "Schedulers heard of lately.",
    "instance_paused": "1 while an operator has drained the installation.",
    "accounts_at_cap": "Accounts with work that a cap holds back.",
    "stuck_runs": "Runs without progress for 15 minutes.",
    "queue_up": "Whether any scheduler reaches Redis.",
    "active_runs_dead_rows": "Dead rows in the hot table; grows when vacuum is held back.",
    "audit_last_event": "Number of the newest audit event.",
    "audit_seal_lag_seconds": "How long the oldest committed audit event has waited to be sealed.",
    "audit_publish_lag_seconds": "How long the oldest checkpoint has waited for all anchors.",
    "audit_log_size": "Audit events that are sealed.",
    "audit_sealers": "1 while a sealer holds the log, 0 if none does.",
}
_LABELLED = {
    "queue_depth": ("Live runs by state.", "state"),
    "workers": ("Workers heard of lately.", "state"),
    "worker_slots": ("Slots of live workers.", "state"),
    "invariant_violations": ("Rows that contradict each other; must be 0.", "invariant"),
}


def _connections(values: ConnectionGauges) -> Iterable[Metric]:
    yield _labelled("connections", "Connections by state.", "state", values.states)
    yield _labelled("connections_paused", "Paused connections by reason.", "reason", values.pauses)
    yield GaugeMetricFamily(
        "syncward_connections_never_succeeded",
        "Active scheduled connections without any success yet.",
        value=values.never_succeeded,
    )
    yield _labelled(
        "stream_freshness_seconds_max",
        "Time since the last success of the stalest active connection.",
        "plan",
        {plan: fresh.oldest for plan, fresh in values.freshness.items()},
    )
    yield _histogram(values.freshness)


def _histogram(freshness: dict[str, Freshness]) -> Metric:
    family = GaugeHistogramMetricFamily(
        "syncward_stream_freshness_seconds",
        "Time since the last success of active scheduled connections.",
        labels=["plan"],
    )
    for plan, fresh in freshness.items():
        bounds = [*(str(float(bound)) for bound in FRESHNESS_BUCKETS), "+Inf"]
        running, buckets = 0, []
        for bound, count in zip(bounds, fresh.buckets, strict=True):
            running += count
            buckets.append((bound, float(running)))
        family.add_metric([plan], buckets=buckets, gsum_value=fresh.total)
    return family


def _labelled(
    name: str, about: str, label: str, values: dict[str, int] | dict[str, float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"syncward_{name}", about, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def key_ages(ages: dict[str, float]) -> Metric:
    """Return the family of key ages, for those who hold a keyring."""
    return _labelled("keys_age_seconds", "Age of the active root by purpose.", "purpose", ages)
