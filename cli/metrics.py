"""`syncward metrics`: cluster-wide values from Postgres in Prometheus' text format."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime

import click
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cli.context import Cli, command
from cli.credentials import open_keyring
from scheduler.cluster import ClusterGauges, key_ages
from schemas.profiles import all_reasons
from schemas.start import Reasons
from storage import exposition

#: Where none is set.
_PORT = 9464


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
    settings = cli.settings
    reasons = Reasons(all_reasons(settings, "metrics"))
    with reasons.collecting():
        exposition.read_token(settings)
    reasons.refuse_if_any()
    _ = cli.engine  # a login that may do too much is refused here, not when somebody scrapes
    port = settings.metrics_port or _PORT
    exposition.serve(settings, port=port, registry=registry)
    cli.note(f"serving on http://{settings.metrics_host}:{port}/metrics")
    while True:
        time.sleep(3600)


class _Cluster(Collector):
    """Reads Postgres when it is scraped, the schedules once a minute at most."""

    def __init__(self, cli: Cli) -> None:
        self._cli = cli
        self._cluster = ClusterGauges()

    def collect(self) -> Iterable[Metric]:
        self._cluster.read(self._cli.engine)
        yield from self._cluster.shown()
        yield key_ages(self._key_ages())

    def _key_ages(self) -> dict[str, float]:
        if self._cli.settings.keyring is None:
            return {}
        now = datetime.now(UTC)
        return {
            root.purpose: (now - root.created_at).total_seconds()
            for root in open_keyring(self._cli).status()
        }
