"""`syncward metrics`: cluster-wide values from Postgres in Prometheus' text format."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

import click
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cli.context import Cli, command
from cli.credentials import open_keyring
from storage import gauges
from storage.gauges import Gauges


@click.group()
def _group() -> None:
    """Only here to register the command."""


commands = _group.commands


@command(_group)
@click.option("--serve", is_flag=True, help="Serve on SYNCWARD_METRICS_HOST and _PORT.")
def metrics(cli: Cli, *, serve: bool) -> None:
    """Print cluster-wide metrics once, or serve them."""
    registry = CollectorRegistry()
    registry.register(_Cluster(cli))
    if not serve:
        text = generate_latest(registry).decode()
        cli.answer({"metrics": text}, text.rstrip)
        return
    host, port = cli.settings.metrics_host, cli.settings.metrics_port or 9464
    start_http_server(port, addr=host, registry=registry)
    cli.note(f"serving on http://{host}:{port}/metrics")
    while True:
        time.sleep(3600)


class _Cluster(Collector):
    """Reads Postgres when it is scraped; every label is from a closed set."""

    def __init__(self, cli: Cli) -> None:
        self._cli = cli

    def collect(self) -> Iterable[GaugeMetricFamily]:
        with self._cli.transaction() as tx:
            values = gauges.read(tx)
        yield from families(values, key_ages=self._key_ages())

    def _key_ages(self) -> dict[str, float]:
        if self._cli.settings.keyring is None:
            return {}
        now = datetime.now(UTC)
        return {
            root.purpose: (now - root.created_at).total_seconds()
            for root in open_keyring(self._cli).status()
        }


def families(values: Gauges, *, key_ages: dict[str, float]) -> Iterable[GaugeMetricFamily]:
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
    yield _labelled(
        "stream_freshness_seconds_max",
        "Time since the last success of the stalest active connection.",
        "plan",
        values.stream_freshness_seconds_max,
    )
    yield _labelled("connections", "Connections by state.", "state", values.connections)
    yield _plain(
        "audit_last_event", "Number of the newest audit event.", float(values.audit_last_event)
    )
    yield _labelled("keys_age_seconds", "Age of the active root by purpose.", "purpose", key_ages)


def _plain(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"syncward_{name}", about, value=value)


def _labelled(
    name: str, about: str, label: str, values: dict[str, int] | dict[str, float]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"syncward_{name}", about, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
