"""What masking costs the worker: COPY binary walked and masked beside the same bytes relayed.

python -m benchmarks.masked [--rows N] [--rounds N]

Rows are made in memory, so that it is the worker's own part: eight columns, of which two are masked
with hmac and one is truncated. The raw relay joins and counts, as a run without masks does.
"""

import argparse
import os
import platform
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from statistics import median
from time import process_time

from connectors import masking
from crypto.pseudonyms import Pseudonyms
from schemas.records import Batch, Column, StreamShape, WireFormat
from schemas.streams import StreamSpec

_BLOCK = 256 * 1024
_NAMES = ("id", "email", "name", "city", "amount", "created", "flag", "note")
_STREAM = StreamSpec(
    name="public.people",
    mode="replace",
    mask={"email": "hmac", "name": "hmac", "city": "truncate(3)"},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    blocks = list(_blocks(arguments.rows))
    raw, masked = [], []
    for _ in range(arguments.rounds):
        raw.append(_seconds(iter(blocks)))
        masked.append(_seconds(_masked(blocks)))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}"
    )
    print(f"raw relay {arguments.rows / median(raw):,.0f} rows/s of one core")
    print(f"masked    {arguments.rows / median(masked):,.0f} rows/s of one core")
    print(f"masked adds {1e6 * (median(masked) - median(raw)) / arguments.rows:.2f} µs to a row")


def _masked(blocks: list[bytes]) -> Iterator[bytes]:
    columns = tuple(Column(name, "text") for name in _NAMES)
    batch = Batch(
        StreamShape(columns), WireFormat.PG_BINARY, iter(blocks), int, None, None, full=True
    )
    return masking.masked(batch, _STREAM, Pseudonyms(bytes(range(32)), "benchmark").token).chunks


def _seconds(chunks: Iterator[bytes]) -> float:
    """Return the processor time of passing everything on."""
    begun, block, size = process_time(), bytearray(), 0
    for chunk in chunks:
        block += chunk
        size += len(chunk)
        block.clear()
    return process_time() - begun


def _blocks(rows: int) -> Iterator[bytes]:
    block = bytearray(b"PGCOPY\n\xff\r\n\x00" + bytes(8))
    for n in range(rows):
        fields = (
            struct.pack(">q", n),
            b"person%d@example.com" % n,
            b"First Last %d" % n,
            b"Amsterdam",
            struct.pack(">d", n / 7),
            struct.pack(">q", n * 1_000),
            b"\x01",
            b"a note of some forty characters, or so it is",
        )
        block += struct.pack(">h", len(fields))
        for field in fields:
            block += struct.pack(">i", len(field)) + field
        if len(block) >= _BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block) + struct.pack(">h", -1)


if __name__ == "__main__":
    main()
