"""What ranges at the same time bring: a first load with 1, 2 and 4, near and over a slow link.

python -m benchmarks.ranges [--rows N] [--rounds N] [--link MB]

Source and destination are servers of their own; the table is that of the other benchmarks. The slow
link lets each connection of the source have so many MB a second, as one of long distance does.
What counts is the time from the claim of the stream to its commit.
"""

import argparse
import multiprocessing
import os
import platform
import socket
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from threading import Thread
from time import monotonic, sleep
from uuid import uuid4

from benchmarks.lab import HERE, SETTINGS
from connectors import registry
from embedded.postgres import Cluster
from schemas.egress import LinkPolicy
from schemas.records import LoadRequest, Ranges
from schemas.streams import StreamSpec

_AT_ONCE = (1, 2, 4)
_RANGES = 10
_AWAY = """
SET client_min_messages = warning;
DROP SCHEMA IF EXISTS acme CASCADE;
DROP SCHEMA IF EXISTS _syncward CASCADE
"""
_BLOCK = 65_536
_POLICY = LinkPolicy(loopback=True, tls_required=False, superuser_refused=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--link", type=float, default=20.0, help="MB a second of a connection")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="syncward-bench-") as root,
        Cluster(Path(root) / "source", settings=SETTINGS, guard_parent=True) as source,
        Cluster(Path(root) / "lake", settings=SETTINGS, guard_parent=True) as lake,
    ):
        fill = ("-X", "-q", "-v", f"n={arguments.rows}", "-f", HERE / "dataset.sql")
        multiprocessing.set_start_method("spawn")
        _psql(source, *fill)
        server = socket.create_server(("127.0.0.1", 0))
        link = multiprocessing.Process(
            target=_slow_link, args=(server, source.port, arguments.link * 1e6), daemon=True
        )
        link.start()
        ports = {"near": source.port, "slow link": int(server.getsockname()[1])}
        found: dict[tuple[str, int], list[float]] = {}
        for number in range(arguments.rounds):
            for where, port in ports.items():
                for at_once in _AT_ONCE if number % 2 else _AT_ONCE[::-1]:
                    _psql(lake, "-X", "-q", "-c", _AWAY, "-c", "CHECKPOINT")
                    seconds = _load(source, port, lake, arguments.rows, at_once)
                    found.setdefault((where, at_once), []).append(seconds)
        link.terminate()
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPUs, Python {platform.python_version()}: "
        f"{arguments.rows:,} rows in {_RANGES} ranges; slow link: {arguments.link:g} MB/s each"
    )
    for (where, at_once), each in sorted(found.items()):
        rounds = ", ".join(f"{s:.2f}" for s in each)
        print(f"{where}, {at_once} at once: {median(each):.2f} s ({rounds})")


def _psql(cluster: Cluster, *arguments: str | Path) -> None:
    subprocess.run(cluster.tool("psql", *map(str, arguments)), check=True)


def _load(source: Cluster, port: int, lake: Cluster, rows: int, at_once: int) -> float:
    """Load everything into a new table; return the seconds."""
    spec = StreamSpec.model_validate(
        {"name": "public.events", "mode": "replace", "range_rows": max(100, rows // _RANGES)}
    )
    shared = {"host": source.host, "database": "postgres", "sslmode": "disable"}
    reading = {**shared, "port": port, "user": source.superuser}
    writing = {**shared, "port": lake.port, "user": lake.superuser}
    request = LoadRequest(uuid4(), uuid4(), 1, 1, spec, "acme")
    with (
        closing(registry.open_source(
            "postgres", reading, {"password": source.password}, _POLICY)) as shop,
        closing(registry.open_destination(
            "postgres", writing, {"password": lake.password}, _POLICY)) as target,
    ):  # fmt: skip
        began = monotonic()
        keep = target.claim_stream(request).keep
        ranges = Ranges(spec.range_rows, at_once=at_once)
        if keep is None:
            raise RuntimeError("the destination keeps no ranges")
        with (
            shop.extract(spec, None, shop.wires[0], ranges=ranges) as batches,
            ThreadPoolExecutor(at_once) as lanes,
        ):
            kept, loaded = [], 0
            for batch in batches:
                if batch.part is None:
                    raise RuntimeError("the table is not read in ranges")
                if not batch.part.is_end and at_once > 1:
                    kept.append(lanes.submit(keep, batch))
                elif not batch.part.is_end:
                    keep(batch)
                else:
                    for range_ in kept:
                        range_.result()
                    loaded = target.load(request, batch).rows_inserted
        if loaded != rows:
            raise RuntimeError(f"{loaded} rows were loaded of {rows}")
        return monotonic() - began


def _slow_link(server: socket.socket, port: int, rate: float) -> None:
    """Relay connections, each with so many bytes a second for the answers; until terminated."""
    while True:
        client, _ = server.accept()
        upstream = socket.create_connection(("127.0.0.1", port))
        for read, write, limit in ((client, upstream, 0.0), (upstream, client, rate)):
            Thread(target=_relay, args=(read, write, limit), daemon=True).start()


def _relay(read: socket.socket, write: socket.socket, rate: float) -> None:
    free_at = monotonic()
    with suppress(OSError):
        while data := read.recv(_BLOCK):
            write.sendall(data)
            if rate:
                free_at = max(free_at, monotonic() - 0.01) + len(data) / rate
                sleep(max(0.0, free_at - monotonic()))
    for end in (read, write):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
