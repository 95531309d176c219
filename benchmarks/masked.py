"""What masking costs a worker: a stream read with masks beside the same read relayed as it is.

python -m benchmarks.masked [--rows N] [--rounds N]

Both read the same table of a Postgres of its own, in turns; the processor time of this process is
what counts. Two of eight columns are masked with hmac and one is truncated.
"""

import argparse
import os
import platform
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import process_time

import psycopg

from connectors import masking, registry
from crypto.pseudonyms import Pseudonyms
from embedded.postgres import Cluster
from schemas.egress import LinkPolicy
from schemas.records import Source, WireFormat
from schemas.streams import StreamSpec

_RELAYED = StreamSpec(name="public.people", mode="replace")
_MASKED = _RELAYED.model_copy(
    update={"mask": {"email": "hmac", "name": "hmac", "city": "truncate(3)"}}
)
_TABLE = """
CREATE TABLE people AS SELECT g::bigint AS id, 'person' || g || '@example.com' AS email,
  'First Last ' || g AS name, 'Amsterdam' AS city, g / 7.0::float8 AS amount,
  now() - g * interval '1 s' AS created, true AS flag, repeat('a note ', 6) AS note
FROM generate_series(1, {}) g
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    relayed, masked = [], []
    with (
        tempfile.TemporaryDirectory() as root,
        Cluster(Path(root) / "pg", durable=False, guard_parent=True) as cluster,
    ):
        login = {"host": cluster.host, "port": cluster.port, "user": cluster.superuser}
        with psycopg.connect(
            host=cluster.host, port=cluster.port, user=cluster.superuser,
            password=cluster.password, dbname="postgres",
        ) as session:  # fmt: skip
            session.execute(_TABLE.format(int(arguments.rows)))
        source = registry.open_source(
            "postgres",
            {**login, "database": "postgres", "sslmode": "disable"},
            {"password": cluster.password},
            LinkPolicy(loopback=True, tls_required=False, superuser_refused=False),
        )
        for _ in range(arguments.rounds):
            relayed.append(_seconds(source, _RELAYED))
            masked.append(_seconds(source, _MASKED))
        source.close()
    python = platform.python_version()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {python}")
    print(f"relayed {arguments.rows / median(relayed):>12,.0f} rows/s of one core")
    print(f"masked  {arguments.rows / median(masked):>12,.0f} rows/s of one core")
    print(f"ratio   {median(masked) / median(relayed):>12.1f} times the processor time")


def _seconds(source: Source, stream: StreamSpec) -> float:
    """Return the processor time of reading a stream and passing it on."""
    token = Pseudonyms(bytes(range(32)), "benchmark").token
    begun = process_time()
    with source.extract(stream, None, WireFormat.PG_BINARY) as batches:
        for batch in batches:
            size = sum(len(chunk) for chunk in masking.masked(batch, stream, token).chunks)
            if not size:
                raise RuntimeError("nothing was read")
    return process_time() - begun


if __name__ == "__main__":
    main()
