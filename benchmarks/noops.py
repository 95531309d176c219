"""Runs that move nothing, end to end with real processes; and Dramatiq alone beside them."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from sqlalchemy import text

from benchmarks.control import Bench, note
from cli.credentials import offer, seal_credential
from cli.supervisor import Child, Supervisor, child_environment
from crypto import keyring as keyrings
from embedded.valkey import Server
from schemas.accounts import Account
from schemas.ids import new_id
from schemas.jobs import Job
from schemas.secret import Secret
from storage import accounts, resources
from storage.engine import open_engine, transaction
from workers.enqueue import JobQueue, open_client

ACCOUNTS = 20
EACH = 200


def noop_runs(bench: Bench, count: int) -> float:
    """Let a scheduler and two workers do so many due runs; return runs per second."""
    bench.seed("noop-", ACCOUNTS, EACH)
    seal(bench, "noop-", ACCOUNTS)
    with fleet(bench):
        due(bench, "noop-", 100)
        until(bench, ENDED, 100)  # warm
        due(bench, "noop-", count)
        started = time.monotonic()
        until(bench, ENDED, 100 + count)
        return count / (time.monotonic() - started)


ENDED = "SELECT count(*) FROM runs WHERE state = 'succeeded'"


@contextmanager
def fleet(bench: Bench) -> Iterator[Supervisor]:
    """Run a scheduler and two workers of four threads as processes."""
    bench.act("DELETE FROM workers")
    supervisor = Supervisor(_children(bench), bench.instance.log_dir, note)
    stop = Event()
    thread = Thread(target=supervisor.run, args=(stop,), daemon=True)
    thread.start()
    try:
        until(bench, "SELECT count(*) FROM workers", 2)
        yield supervisor
    finally:
        stop.set()
        thread.join()


def _children(bench: Bench) -> list[Child]:
    data_dir = bench.instance.data_dir
    key = str(bench.instance.keyring_dir / "worker.json")
    common = child_environment(data_dir)
    worker = child_environment(data_dir, SYNCWARD_KEYRING=key)
    return [
        Child("scheduler", "scheduler.process", common),
        Child("worker-1", "benchmarks.noop.worker", worker),
        Child("worker-2", "benchmarks.noop.worker", worker),
    ]


def seal(bench: Bench, prefix: str, count: int) -> None:
    """Give the accounts that will run a credential each, as `resource create` would."""
    keyring = keyrings.load(str(bench.instance.keyring_dir / "operator.json"))
    engine = open_engine(bench.url, "operator", pool_size=1)
    for number in range(1, count + 1):
        with transaction(engine) as tx:
            account: Account = accounts.resolve(tx, f"{prefix}{number}")
            for name in ("from", "to"):
                resource = resources.get(tx, name)
                sealed = seal_credential(
                    keyring,
                    account_id=account.account_id,
                    resource_id=resource.resource_id,
                    field="token",
                    version=1,
                    secret=Secret(new_id().hex),
                )
                resources.store_secret(
                    tx, tx, account, resource.resource_id, sealed,
                    offer=offer(keyring), principal=bench.scheduler.principal,
                )  # fmt: skip
    engine.dispose()


def due(bench: Bench, prefix: str, count: int, *, within_s: float = 0) -> None:
    """Make so many schedules of these accounts due, at random moments of the next seconds."""
    bench.act(
        f"UPDATE schedules SET next_due_at = now() + random() * {within_s} * interval '1 s' "
        "WHERE connection_id IN (SELECT s.connection_id FROM schedules s "
        f"JOIN accounts a ON a.id = s.account_id WHERE a.name LIKE '{prefix}%' "
        f"ORDER BY s.last_success_at NULLS FIRST LIMIT {count})"
    )


def until(bench: Bench, query: str, wanted: int, *, seconds: float = 300) -> None:
    """Wait until a query counts so many; RuntimeError if it takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        with bench.admin.connect() as db:
            if int(db.execute(text(query)).scalar_one()) >= wanted:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"{query}: never reached {wanted}")
        time.sleep(0.1)


def bare_dramatiq(valkey: Server, count: int) -> float:
    """Send so many messages to two processes of Dramatiq that do nothing; return messages/s."""
    queue = JobQueue(open_client(valkey.url))
    for number in range(count):
        queue.send(Job(run_id=new_id(), dispatch=number + 1))
    command = [sys.executable, "-m", "benchmarks.noop.bare"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    taken, spent = 0, 0.0
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(valkey.url + "\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=120)
        messages, seconds = output.split()
        taken, spent = taken + int(messages), max(spent, float(seconds))
    queue.close()
    assert taken == count
    return count / spent
