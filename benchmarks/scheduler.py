"""What scheduling costs: a million connections, due, dispatch, and runs that move nothing.

python -m benchmarks.scheduler [--quick] [--json]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

from sqlalchemy import create_engine, text

from benchmarks.noops import bare_dramatiq, noop_runs
from benchmarks.report import Case, document, show
from cli import dev
from embedded.valkey import Server
from scheduler import ticks
from schemas.audit import Principal
from schemas.ids import new_id
from schemas.jobs import Job
from storage.engine import open_engine, parse_url
from workers.enqueue import JobQueue, open_client

PRINCIPAL = Principal("scheduler", "bench")
#: Budgets of one scheduler, in milliseconds for 1,000 of a thing.
DUE_BUDGET_MS = 1_000 / 2.5
DISPATCH_BUDGET_MS = 1_000 / 5.0
TICK_P99_BUDGET_MS = 250.0
GROWTH_BUDGET = 1.3
NOOP_BUDGET_MS = 1_000 / 0.15


class Nowhere:
    """A queue that takes every job and keeps none: measures decisions, not Redis."""

    def alive(self) -> bool:
        return True

    def send(self, job: Job) -> bool:
        del job
        return True

    def close(self) -> None:
        return


class Bench:
    """A durable control database that is filled by its owner, and a scheduler's ticks."""

    def __init__(self, root: Path) -> None:
        self.instance = dev.start(root, PRINCIPAL, guard_parent=True)
        settings = dev.settings(self.instance)
        assert settings.database_url is not None
        self.url = settings.database_url.get_secret_value()
        self.admin = create_engine(parse_url(dev.admin_url(self.instance.postgres, "syncward")))
        self.scheduler = ticks.Scheduler(
            open_engine(self.url, "scheduler", pool_size=2),
            Nowhere(),
            settings.model_copy(update={"runs_max": 1_000_000}),
            PRINCIPAL,
        )
        self.ticks_ms: list[float] = []

    def seed(self, prefix: str, accounts: int, each: int) -> None:
        with self.admin.begin() as tx:
            for name, value in (("prefix", prefix), ("accounts", accounts), ("each", each)):
                tx.execute(text(f"SET LOCAL bench.{name} = '{value}'"))
            script = (Path(__file__).parent / "seed.sql").read_text(encoding="utf-8")
            tx.connection.driver_connection.execute(script)  # type: ignore[union-attr]
        self.act("VACUUM ANALYZE")

    def act(self, *statements: str) -> None:
        with self.admin.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(text("SET session_replication_role = replica"))
            for statement in statements:
                db.execute(text(statement))
            db.execute(text("SET session_replication_role = origin"))

    def make_due(self, count: int) -> None:
        self.act(
            "UPDATE schedules SET next_due_at = now() - random() * interval '1 s' WHERE "
            "connection_id IN (SELECT connection_id FROM schedules ORDER BY random() "
            f"LIMIT {count})"
        )

    def tick(self, function: Callable[[ticks.Scheduler], int]) -> tuple[int, float]:
        """Run one tick; return (what it did, seconds)."""
        started = time.monotonic()
        done = function(self.scheduler)
        spent = time.monotonic() - started
        self.ticks_ms.append(spent * 1_000)
        return done, spent

    def due(self, count: int) -> float:
        """Make so many schedules due and claim them all; return ms per 1,000."""
        self.make_due(count)
        self.act("CHECKPOINT")
        total, seconds = 0, 0.0
        while total < count:
            done, spent = self.tick(ticks.due_tick)
            assert done, "fewer schedules were due than were made"
            total, seconds = total + done, seconds + spent
        return seconds / total * 1_000_000

    def dispatch(self, slots: int) -> float:
        """Dispatch everything that waits, freeing the slots between ticks; return ms per 1,000."""
        self.act(
            "DELETE FROM workers",
            f"INSERT INTO workers (worker_id, version, slots) VALUES ('bench', '0', {slots})",
        )
        total, seconds = 0, 0.0
        while True:
            self.act("UPDATE workers SET seen_at = clock_timestamp()")
            done, spent = self.tick(ticks.dispatch_tick)
            if not done:
                break
            total, seconds = total + done, seconds + spent
            self.act(
                "DELETE FROM active_runs WHERE state = 'dispatched'",
                "UPDATE account_queues SET at_cap = false WHERE at_cap",
            )
        return seconds / total * 1_000_000

    def clear(self) -> None:
        self.act("DELETE FROM active_runs", "UPDATE account_queues SET has_work = false", "VACUUM")

    def close(self) -> None:
        self.admin.dispose()
        self.scheduler.engine.dispose()
        self.instance.stop()


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


@contextmanager
def made() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="syncward-bench-") as directory:
        bench = Bench(Path(directory))
        try:
            yield bench
        finally:
            bench.close()


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
    found = {**document(cases), "beside": beside}
    show(found, cases, as_json=arguments.json)
    if not arguments.json:
        print("\nbeside: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in beside.items()))


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
