"""What an instance weighs: bytes of control database per connection and per run, memory, sessions.

python -m benchmarks.sizes [--quick] [--json]

Sizes, not times: they can be measured on a busy machine.
"""

import argparse
import json

from sqlalchemy import text

from benchmarks.control import Bench, made, note
from benchmarks.lab import pss_mb
from benchmarks.noops import ENDED, due, fleet, seal, until
from benchmarks.report import document

#: What a connection leaves in the control database when it is made, and when it runs.
MADE = ("connections", "streams", "schedules", "resources", "resource_queues")
RUNS = ("audit.event", "run_logs", "runs", "run_streams", "slots", "run_outputs")
#: Once per stream, by its first run.
FIRST = ("cursors",)


def sizes(bench: Bench, names: tuple[str, ...]) -> dict[str, int]:
    """Return the bytes of tables with their partitions, indexes and toasted values."""
    query = text("SELECT sum(pg_total_relation_size(t.relid)) FROM pg_partition_tree(:name) AS t")
    plain = text("SELECT pg_total_relation_size(CAST(:name AS regclass))")
    with bench.admin.connect() as db:
        return {
            name: int(
                db.execute(query, {"name": name}).scalar()
                or db.execute(plain, {"name": name}).scalar_one()
            )
            for name in names
        }


def each(before: dict[str, int], after: dict[str, int], count: int) -> dict[str, int]:
    return {name: round((after[name] - before[name]) / count) for name in before}


def sessions(bench: Bench) -> dict[str, int]:
    """Count who is connected to the control database, by what they call themselves."""
    query = (
        "SELECT application_name, count(*) FROM pg_stat_activity "
        "WHERE application_name LIKE 'syncward-control:%' GROUP BY 1"
    )
    with bench.admin.connect() as db:
        return {row[0].partition(":")[2]: int(row[1]) for row in db.execute(text(query))}


def measure(bench: Bench, *, quick: bool) -> dict[str, object]:
    accounts, runs = (100, 400) if quick else (1_000, 4_000)
    note(f"{accounts * 100:,} connections")
    before = sizes(bench, MADE)
    bench.seed("sizes-", accounts, 100)
    connection = each(before, sizes(bench, MADE), accounts * 100)
    note(f"{runs:,} runs of one stream")
    seal(bench, "sizes-", accounts)
    before = sizes(bench, RUNS + FIRST)
    with fleet(bench) as supervisor:
        due(bench, "sizes-", runs)
        until(bench, ENDED, runs // 2, seconds=1_200)
        connected = sessions(bench)
        memory = {c.name: round(pss_mb(c.process.pid)) for c in supervisor.children if c.process}
        until(bench, ENDED, runs, seconds=1_200)
    bench.act("CHECKPOINT")
    run = each(before, sizes(bench, RUNS + FIRST), runs)
    connection |= {name: run.pop(name) for name in FIRST}
    with bench.admin.connect() as db:
        events = int(db.execute(text("SELECT count(*) FROM audit.event")).scalar_one())
    note(f"{events:,} audit events in all")
    return {
        "bytes_per_connection": {**connection, "all": sum(connection.values())},
        "bytes_per_run": {**run, "all": sum(run.values())},
        "sessions_in_the_middle": connected,
        "memory_mb_in_the_middle": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="10,000 connections, 400 runs")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    with made() as bench:
        found = measure(bench, quick=arguments.quick)
    if arguments.json:
        print(json.dumps({**document([]), **found}, indent=2))
        return
    for title, values in found.items():
        print(f"\n{title.replace('_', ' ')}")
        assert isinstance(values, dict)
        for name, value in values.items():
            print(f"  {name:<28}{value:>10,}")


if __name__ == "__main__":
    main()
