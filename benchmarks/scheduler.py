"""What scheduling costs: a million connections, due, dispatch, and runs that move nothing.

python -m benchmarks.scheduler [--quick] [--json]
"""

import argparse
import time
from statistics import median, quantiles

from benchmarks.control import Bench, made, note
from benchmarks.noops import bare_dramatiq, noop_runs
from benchmarks.report import Case, document, show
from embedded.valkey import Server
from schemas.ids import new_id
from schemas.jobs import Job
from workers.enqueue import JobQueue, open_client

#: Budgets of one scheduler, in milliseconds for 1,000 of a thing.
DUE_BUDGET_MS = 1_000 / 2.5
DISPATCH_BUDGET_MS = 1_000 / 5.0
TICK_P99_BUDGET_MS = 250.0
GROWTH_BUDGET = 1.3
NOOP_BUDGET_MS = 1_000 / 0.15


def sends_per_second(valkey: Server) -> float:
    queue = JobQueue(open_client(valkey.url))
    started = time.monotonic()
    for number in range(2_000):
        queue.send(Job(run_id=new_id(), dispatch=number + 1))
    rate = 2_000 / (time.monotonic() - started)
    queue.close()
    valkey.flush()
    return rate


def measure(bench: Bench, *, quick: bool) -> tuple[list[Case], dict[str, str]]:
    rounds, due, many = (1, 2_000, 100) if quick else (3, 10_000, 9_900)
    note("10,000 connections")
    bench.seed("small-", 100, 100)
    small = median(rest(bench, min(due, 5_000)) for _ in range(rounds))
    note(f"{(100 + many) * 100:,} connections")
    bench.seed("large-", many, 100)
    bench.ticks_ms.clear()
    claims, dispatches = [], []
    for _ in range(rounds):
        claims.append(bench.due(due))
        dispatches.append(bench.dispatch(400))
        note(f"due {claims[-1]:.0f} ms, dispatch {dispatches[-1]:.0f} ms per 1,000")
        bench.clear()
    p99 = quantiles(bench.ticks_ms, n=100)[98]
    cases = [
        Case("due_claim", median(claims), DUE_BUDGET_MS, "ms per 1,000"),
        Case("dispatch", median(dispatches), DISPATCH_BUDGET_MS, "ms per 1,000"),
        Case("tick_p99", p99, TICK_P99_BUDGET_MS, "ms"),
        Case("due_cost_1m_over_10k", median(claims) / small, GROWTH_BUDGET, "x the cost at 10k"),
    ]
    sends = sends_per_second(bench.instance.valkey)
    found = noop_runs(bench, 300 if quick else 3_000)
    bare = bare_dramatiq(bench.instance.valkey, 300 if quick else 3_000)
    cases.append(Case("noop_runs", 1_000_000 / found, NOOP_BUDGET_MS, "ms per 1,000"))
    return cases, {
        "redis_sends_per_second": f"{sends:.0f}",
        "noop_runs_per_second": f"{found:.0f}",
        "bare_dramatiq_messages_per_second": f"{bare:.0f}",
    }


def rest(bench: Bench, count: int) -> float:
    cost = bench.due(count)
    bench.clear()
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 connections, once")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--only-noop", action="store_true", help="only the runs end to end")
    arguments = parser.parse_args()
    if arguments.only_noop:
        with made() as bench:
            print(f"{noop_runs(bench, 3_000):.0f} runs/s")
        return
    with made() as bench:
        cases, beside = measure(bench, quick=arguments.quick)
    show({**document(cases), "beside": beside}, cases, as_json=arguments.json)


if __name__ == "__main__":
    main()
