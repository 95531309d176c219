"""Postgres to Postgres: this engine beside `psql COPY | psql COPY`, in one run on one machine.

python -m benchmarks.pg_to_pg [--quick] [--json]
"""

import argparse
import sys
import time
from statistics import median

from benchmarks.lab import Lab, Usage, lab, pss_mb
from benchmarks.report import Case, document, show

STREAM = "{mode: merge, key: [id], cursor: xmin}"
#: Budgets: client CPU per million rows, memory of an idle worker, and what a run adds to it.
CPU_BUDGET_S = 4.0
IDLE_BUDGET_MB = 120.0
RUNNING_BUDGET_MB = 40.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 rows, once")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    rows, rounds = (100_000, 1) if arguments.quick else (1_000_000, 3)
    with lab(rows, STREAM) as made:
        cases = measure(made, rows, rounds)
        with made.session(made.source) as db:
            (server,) = db.execute("SHOW server_version").fetchone() or ("?",)
    show(document(cases, postgres=server), cases, as_json=arguments.json)


def measure(made: Lab, rows: int, rounds: int) -> list[Case]:
    """Alternate by hand and ours, so that both meet the same machine; compare the medians."""
    made.run()  # warm: interpreter, caches, connection to the control database
    time.sleep(2)
    idle = pss_mb(made.worker_pid)
    hand, ours = [], []
    for number in range(rounds):
        hand.append(first_load_by_hand(made))
        ours.append(first_load(made, rows))
        note(f"round {number + 1}: by hand {hand[-1].seconds:.2f} s, ours {ours[-1].seconds:.2f} s")
    cpu = median(u.cpu_seconds for u in ours) * 1_000_000 / rows
    return [
        Case("first_load", seconds(ours), seconds(hand), f"s per {rows:,} rows"),
        Case("first_load_cpu", cpu, CPU_BUDGET_S, "client s per 1M rows"),
        Case("idle_worker", idle, IDLE_BUDGET_MB, "MB PSS"),
        Case("running_sync", max(u.memory_mb for u in ours) - idle, RUNNING_BUDGET_MB, "MB more"),
    ]


def seconds(usages: list[Usage]) -> float:
    return median(usage.seconds for usage in usages)


def first_load_by_hand(made: Lab) -> Usage:
    """Into a logged table; its key is made afterwards, which is the faster order."""
    made.act(made.destination, "DROP SCHEMA IF EXISTS hand CASCADE", "CREATE SCHEMA hand")
    columns = (
        "id bigint NOT NULL, event_uuid uuid NOT NULL, title text NOT NULL, qty integer NOT NULL, "
        "amount numeric(12,2) NOT NULL, is_active boolean NOT NULL, updated_at timestamptz NOT "
        "NULL, event_date date NOT NULL, payload jsonb NOT NULL, note text, score double precision "
        "NOT NULL, tags text[] NOT NULL"
    )
    made.act(made.destination, f"CREATE TABLE hand.events ({columns})")
    made.settle()
    usage = made.by_hand(
        "SELECT * FROM events", "hand.events", after="ALTER TABLE hand.events ADD PRIMARY KEY (id)"
    )
    made.act(made.destination, "DROP SCHEMA hand CASCADE")
    return usage


def first_load(made: Lab, rows: int) -> Usage:
    """Forget everything at the destination, then run."""
    made.act(
        made.destination,
        "DROP SCHEMA IF EXISTS bench CASCADE",
        "DROP SCHEMA IF EXISTS _syncward CASCADE",
    )
    made.settle()
    _, result, usage = made.run()
    if result.rows_inserted != rows:
        raise RuntimeError(f"{result.rows_inserted} rows of {rows} were loaded")
    return usage


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
