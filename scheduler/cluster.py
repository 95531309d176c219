"""Cluster-wide gauges: read on a timer by one elected scheduler, never by a scrape."""

from collections.abc import Iterable
from time import monotonic

from prometheus_client.core import GaugeHistogramMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection

from storage import gauges
from storage.gauges import FRESHNESS_BUCKETS, ConnectionGauges, Freshness, Gauges

#: Seconds between two scans of all schedules: about a second of work per million.
SCAN_EVERY_S = 60.0


class ClusterGauges(Collector):
    """Holds the last reading; a scheduler that is not the elected one shows nothing."""

    def __init__(self) -> None:
        self._values: Gauges | None = None
        self._scanned_at = float("-inf")

    def read(self, tx: Connection) -> None:
        """Take a new reading; what needs a scan of all schedules only once a minute."""
        before = self._values
        fresh = monotonic() - self._scanned_at < SCAN_EVERY_S
        known = before.connections if before is not None and fresh else None
        self._values = gauges.read(tx, known)
        if known is None:
            self._scanned_at = monotonic()

    def show(self, values: Gauges | None) -> None:
        """Replace what the next scrape gets."""
        self._values = values

    def describe(self) -> Iterable[Metric]:
        """Name no series ahead of time: there is nothing to name until this one is elected."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the last reading as metric families."""
        return families(self._values) if self._values is not None else ()


def families(values: Gauges) -> Iterable[Metric]:
    """Turn one reading into metric families; docs/metrics.md lists them."""
    yield _labelled("queue_depth", "Live runs by state.", "state", values.queue_depth)
    yield _plain(
        "queue_oldest_seconds", "Wait of the oldest ready run.", values.queue_oldest_seconds
    )
    yield _plain(
        "schedule_lateness_seconds",
        "How late the oldest unclaimed slot is.",
        values.schedule_lateness_seconds,
    )
    yield _labelled("worker_slots", "Slots of live workers.", "state", values.worker_slots)
    yield _plain(
        "accounts_at_cap", "Accounts with work that a cap holds back.", values.accounts_at_cap
    )
    yield _plain("stuck_runs", "Runs without progress for 15 minutes.", values.stuck_runs)
    yield _plain("queue_up", "Whether any scheduler reaches Redis.", values.queue_up)
    yield _labelled(
        "invariant_violations",
        "Rows that contradict each other; must be 0.",
        "invariant",
        values.invariant_violations,
    )
    yield _plain(
        "active_runs_dead_rows",
        "Dead rows in the hot table; grows when vacuum is held back.",
        values.active_runs_dead_rows,
    )
    yield _plain("audit_last_event", "Number of the newest audit event.", values.audit_last_event)
    yield from _connections(values.connections)


def _connections(values: ConnectionGauges) -> Iterable[Metric]:
    yield _labelled("connections", "Connections by state.", "state", values.states)
    yield _labelled("connections_paused", "Paused connections by reason.", "reason", values.pauses)
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


def _plain(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"syncward_{name}", about, value=value)


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
