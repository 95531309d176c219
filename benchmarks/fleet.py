"""What operators notice of scheduling: lateness, fairness between accounts, the cost of idling.

python -m benchmarks.fleet [--quick] [--json] [--soak MINUTES]

With --soak also 100,000 hourly connections end to end for so long, and the bytes each run leaves.
"""

import argparse
import time
from collections import Counter
from statistics import quantiles

from sqlalchemy import text

from benchmarks.control import Bench, made, note
from benchmarks.lab import cpu_seconds
from benchmarks.noops import ENDED, due, fleet, seal, until
from benchmarks.report import Case, document, show
from scheduler import ticks

LATENESS_BUDGET_S = 1.0
#: Of the time that an equal share of the slots would take.
FAIR_SHARE_BUDGET = 1.3
JAIN_LEAST = 0.95
IDLE_BUDGET_PERCENT = 2.0
#: The tables that grow with every run, each with its partitions and indexes.
_GROWING = ("runs", "slots", "run_streams", "run_logs", "run_outputs", "audit.event")


def idle(bench: Bench, seconds: float) -> float:
    """Return what scheduler and one worker use with nothing to do, in per cent of a core."""
    with fleet(bench) as supervisor:
        time.sleep(5)  # past imports and first ticks
        processes = {child.name: child.process for child in supervisor.children}
        pids = [p.pid for name, p in processes.items() if p and name in {"scheduler", "worker-1"}]
        before = sum(map(cpu_seconds, pids))
        time.sleep(seconds)
        return (sum(map(cpu_seconds, pids)) - before) / seconds * 100


_LATENESS = """
SELECT extract(epoch FROM s.finished_at - r.scheduled_for)::float8
FROM runs r JOIN run_streams s ON s.run_id = r.run_id
JOIN accounts a ON a.id = r.account_id WHERE a.name LIKE :prefix AND r.trigger = 'schedule'
"""


def lateness(bench: Bench, prefix: str, count: int, within_s: float) -> list[float]:
    """Let schedules come due one by one while slots are free; return the seconds each was late.

    Measured to the end of its (empty) stream, which is after the first row could be read.
    """
    with fleet(bench):
        time.sleep(2)
        due(bench, prefix, count, within_s=within_s)
        until(bench, ENDED, count)
    with bench.admin.connect() as db:
        found = db.execute(text(_LATENESS), {"prefix": prefix + "%"}).scalars()
        return sorted(found)


_ORDER = """
SELECT a.name FROM runs r JOIN accounts a ON a.id = r.account_id
WHERE r.kind = 'sync' AND a.name LIKE 'fair-%' ORDER BY r.finished_at
"""


def fairness(bench: Bench, *, small: int, backlog: int) -> tuple[float, float]:
    """One account with a backlog and many with 5 runs each.

    Return (when the last of the small ones was done, in parts of its fair share; Jain's index of
    the runs that accounts got while all of them had work).
    """
    each = 5
    bench.seed("fair-small-", small, each)
    bench.seed("fair-large-", 1, backlog)
    seal(bench, "fair-small-", small)
    seal(bench, "fair-large-", 1)
    due(bench, "fair-", small * each + backlog)
    while bench.tick(ticks.due_tick)[0]:
        pass
    share = (small + 1) * each
    with fleet(bench):
        done = f"{ENDED} AND account_id IN (SELECT id FROM accounts WHERE name LIKE 'fair-small-%')"
        until(bench, done, small * each, seconds=600)
    with bench.admin.connect() as db:
        order = list(db.execute(text(_ORDER)).scalars())
    last = max(n for n, name in enumerate(order, 1) if name.startswith("fair-small-"))
    served = Counter(order[:share])
    names = [f"fair-small-{n}" for n in range(1, small + 1)] + ["fair-large-1"]
    got = [served[name] for name in names]
    return last / share, sum(got) ** 2 / (len(got) * sum(n * n for n in got))


def soak(bench: Bench, minutes: float) -> dict[str, str]:
    """Let 100,000 hourly connections run for so long; return what an operator asks about it."""
    accounts, each = 1_000, 100
    bench.seed("soak-", accounts, each)
    seal(bench, "soak-", accounts)
    bench.act(
        "UPDATE schedules s SET next_due_at = p.due, anchor_at = p.due FROM (SELECT connection_id, "
        "now() + random() * interval '1 hour' AS due FROM schedules s JOIN accounts a "
        "ON a.id = s.account_id WHERE a.name LIKE 'soak-%') AS p "
        "WHERE p.connection_id = s.connection_id"
    )
    before = size(bench)
    with fleet(bench):
        time.sleep(minutes * 60)
    with bench.admin.connect() as db:
        late = sorted(db.execute(text(_LATENESS), {"prefix": "soak-%"}).scalars())
        slots = int(db.execute(text(_SOAK_SLOTS)).scalar_one())
        ended = int(db.execute(text(_SLOTS_SERVED)).scalar_one())
    return {
        "soak_minutes": f"{minutes:g}",
        "soak_runs": f"{len(late):,}",
        "soak_slots_without_their_run": str(slots - ended),
        "soak_lateness_p50_s": f"{quantiles(late, n=100)[49]:.2f}",
        "soak_lateness_p99_s": f"{quantiles(late, n=100)[98]:.2f}",
        "soak_bytes_per_run": f"{(size(bench) - before) / len(late):,.0f}",
    }


_SOAK_SLOTS = (
    "SELECT count(*) FROM slots t JOIN schedules s ON s.connection_id = t.connection_id "
    "JOIN accounts a ON a.id = s.account_id WHERE a.name LIKE 'soak-%'"
)
#: Those still in the queue when the time is up count as kept, not as lost.
_SLOTS_SERVED = (
    f"{_SOAK_SLOTS} AND (EXISTS (SELECT FROM runs r WHERE r.run_id = t.run_id "
    "AND r.state = 'succeeded') OR EXISTS (SELECT FROM active_runs r WHERE r.run_id = t.run_id))"
)


def size(bench: Bench) -> int:
    """Return the bytes of all that grows with runs."""
    names = ", ".join(f"('{name}')" for name in _GROWING)
    query = (
        "SELECT sum(pg_total_relation_size(t.relid)) "
        f"FROM (VALUES {names}) AS n (name), pg_partition_tree(n.name::regclass) AS t"
    )
    with bench.admin.connect() as db:
        return int(db.execute(text(query)).scalar_one())


def measure(bench: Bench, *, quick: bool) -> list[Case]:
    note("idle")
    idles = idle(bench, 5 if quick else 30)
    count, within = (60, 6) if quick else (1_200, 60)
    note(f"{count} schedules come due within {within} s")
    bench.seed("late-", 20, count // 20)
    seal(bench, "late-", 20)
    late = lateness(bench, "late-", count, within)
    small, backlog = (50, 2_000) if quick else (500, 20_000)
    note(f"one account with {backlog:,} runs, {small} with 5")
    bench.clear()
    last, jain = fairness(bench, small=small, backlog=backlog)
    note(f"Jain's index {jain:.3f}")
    return [
        Case("idle_cpu", idles, IDLE_BUDGET_PERCENT, "% of a core"),
        Case("lateness_p99", quantiles(late, n=100)[98], LATENESS_BUDGET_S, "s"),
        Case("fair_share", last, FAIR_SHARE_BUDGET, "x the fair share"),
        Case("unfairness_jain", 1 / jain, 1 / JAIN_LEAST, "1 / Jain's index"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few schedules, short")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="100,000 connections")
    arguments = parser.parse_args()
    with made() as bench:
        cases = measure(bench, quick=arguments.quick)
        beside = {}
        if arguments.soak:
            bench.clear()
            note(f"100,000 hourly connections for {arguments.soak:g} minutes")
            beside = soak(bench, arguments.soak)
    show({**document(cases), "beside": beside}, cases, as_json=arguments.json)


if __name__ == "__main__":
    main()
