"""A durable control database that is filled by its owner, and a scheduler's ticks by hand."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

from cli import dev
from scheduler import ticks
from schemas.audit import Principal
from schemas.jobs import Job
from storage.engine import open_engine, parse_url

PRINCIPAL = Principal("scheduler", "bench")
#: What docs/scaling.md asks of the control database for a million connections; still durable.
POSTGRES = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "autovacuum_naptime": "10s",
}


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
        self.instance = dev.start(root, PRINCIPAL, guard_parent=True, postgres=POSTGRES)
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


@contextmanager
def made() -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="syncward-bench-") as directory:
        bench = Bench(Path(directory))
        try:
            yield bench
        finally:
            bench.close()


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
