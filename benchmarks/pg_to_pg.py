"""Postgres to Postgres: this engine beside psql by hand, sling and dlt, in one run on one machine.

python -m benchmarks.pg_to_pg [--quick] [--json] [--rows N] [--rounds N] [--cases a,b]
                              [--rivals sling,dlt|none] [--cache DIR] [--write]

The cases are in races.py. Rivals are installed from the package registry the first time.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import page
from benchmarks.races import CASES, Plan, measure
from benchmarks.report import document, show
from benchmarks.rivals import CACHE, RIVALS, versions


def main() -> None:
    plan, arguments = _arguments()
    load = round(os.getloadavg()[1], 1)  # of the last five minutes, before anything of ours
    found = measure(plan)
    made = document(
        found.cases,
        **found.servers,
        **{name: number for rival in plan.rivals for name, number in versions(rival).items()},
    )
    made |= {
        "rows": plan.rows,
        "rounds": plan.rounds,
        "load_before": load,
        "beside": [case.plain() for case in found.beside],
        "start_seconds": found.starts,
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "written": [written.plain() for written in found.written],
        "left_out": found.left_out,
    }
    show(made, [*found.cases, *found.beside], as_json=arguments.json)
    if arguments.write:
        page.write(made, found)
    if any(one.contestant == "syncward" and not one.exact for one in found.written):
        sys.exit("what this engine wrote is not what the source holds")


def _arguments() -> tuple[Plan, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100,000 rows, once")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--rows", type=int, help="rows of the table (1,000,000)")
    parser.add_argument("--rounds", type=int, help="of each comparison (5)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="or none")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where rivals are kept")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md")
    arguments = parser.parse_args()
    rivals = () if arguments.rivals == "none" else tuple(arguments.rivals.split(","))
    cases = tuple(arguments.cases.split(","))
    if unknown := (set(cases) - CASES.keys()) | (set(rivals) - set(RIVALS)):
        parser.error(f"no such case or rival: {', '.join(sorted(unknown))}")
    rows, rounds = (100_000, 1) if arguments.quick else (1_000_000, 5)
    plan = Plan(
        rows=arguments.rows or rows,
        rounds=arguments.rounds or rounds,
        cases=cases,
        rivals=rivals,
        cache=arguments.cache,
    )
    return plan, arguments


if __name__ == "__main__":
    main()
