"""What keeping a history costs: all rows changed, in mode history beside mode merge, in turns.

python -m benchmarks.history [--rows N] [--rounds N]

Both read the same table of a Postgres of its own, and write to another database of it. What counts
is the time from the claim of the stream to its commit; before each round all rows are changed.
"""

import argparse
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import monotonic
from uuid import uuid4

import psycopg

from connectors import registry
from embedded.postgres import Cluster
from schemas.egress import LinkPolicy
from schemas.records import Destination, LoadRequest, Source
from schemas.streams import StreamSpec

_MODES = ("merge", "history")
_TABLE = """
CREATE TABLE people AS SELECT g::bigint AS id, 'person' || g || '@example.com' AS email,
  'First Last ' || g AS name, 'Amsterdam' AS city, g / 7.0::float8 AS amount,
  now() - g * interval '1 s' AS created, true AS flag, repeat('a note ', 6) AS note
FROM generate_series(1, {}) g; ALTER TABLE people ADD PRIMARY KEY (id)
"""
_CHANGE = "UPDATE people SET amount = amount + 1"


class Run:
    """One connection of each mode, with a target of its own."""

    def __init__(self, source: Source, destination: Destination) -> None:
        self._source, self._destination = source, destination
        self._ids = {mode: uuid4() for mode in _MODES}
        self._fence = 0

    def load(self, mode: str) -> float:
        """Read everything and load it; return the seconds."""
        stream = StreamSpec.model_validate({"name": "public.people", "mode": mode, "key": ("id",)})
        self._fence += 1
        request = LoadRequest(self._ids[mode], uuid4(), 1, self._fence, stream, f"by_{mode}")
        began = monotonic()
        self._destination.claim_stream(request)
        wire = self._source.wires[0]
        with self._source.extract(stream, None, wire) as batches:
            for batch in batches:
                self._destination.load(request, batch)
        return monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as root,
        Cluster(Path(root) / "pg", durable=True, guard_parent=True) as cluster,
        psycopg.connect(
            host=cluster.host, port=cluster.port, user=cluster.superuser,
            password=cluster.password, dbname="postgres", autocommit=True,
        ) as session,
    ):  # fmt: skip
        session.execute("CREATE DATABASE lake")
        session.execute(_TABLE.format(int(arguments.rows)))
        config = {
            "host": cluster.host, "port": cluster.port, "user": cluster.superuser,
            "sslmode": "disable",
        }  # fmt: skip
        secret = {"password": cluster.password}
        policy = LinkPolicy(loopback=True, tls_required=False, superuser_refused=False)
        run = Run(
            registry.open_source("postgres", {**config, "database": "postgres"}, secret, policy),
            registry.open_destination("postgres", {**config, "database": "lake"}, secret, policy),
        )
        first = {mode: run.load(mode) for mode in _MODES}
        same = {mode: run.load(mode) for mode in _MODES}
        changed: dict[str, list[float]] = {mode: [] for mode in _MODES}
        for number in range(arguments.rounds):
            session.execute(_CHANGE)
            session.execute("VACUUM ANALYZE people")
            session.execute("CHECKPOINT")
            for mode in _MODES if number % 2 else _MODES[::-1]:
                changed[mode].append(run.load(mode))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPUs, Python {platform.python_version()}: "
        f"{arguments.rows:,} rows, seconds (history / merge)"
    )
    middle = {mode: median(seconds) for mode, seconds in changed.items()}
    for what, found in (("first load", first), ("none changed", same), ("all changed", middle)):
        merge, history = found["merge"], found["history"]
        print(f"{what}: {history:.3f} / {merge:.3f} = {history / merge:.2f}")
    for mode, seconds in changed.items():
        print(f"  each round, {mode}: {', '.join(f'{s:.3f}' for s in seconds)}")


if __name__ == "__main__":
    main()
