"""The drill of docs/backup.md: an older control database meets destinations that went on."""

import subprocess
import time
from threading import Thread

import pytest
from psycopg import sql

from cli.apply import make_so
from scheduler import ticks
from schemas.errors import LeaseLost
from schemas.runs import Outcome, OutcomeKind, RunKind, RunOptions, RunState
from storage import claims, connections, runs
from storage.engine import transaction
from workers import run_sync

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

STREAMS = {
    "public.orders": "{mode: merge, key: [id], cursor: xmin}",
    "public.events": "{mode: append, cursor: xmin}",
    "public.regions": "{mode: replace}",
}
TABLES = ("orders", "events", "regions")


class Backup:
    """What an operator does by hand: pg_dump into a file, pg_restore into an empty database."""

    def __init__(self, world, admin) -> None:
        self._world = world
        self._admin = admin
        self._file = world.directory / "control.dump"

    def take(self) -> None:
        self._run("pg_dump", "--format=custom", f"--file={self._file}", "--dbname")

    def restore(self) -> None:
        """As after an outage: nothing of ours is connected, and no worker has called in yet."""
        control = self._world.control
        self._world.deps.heartbeat.drop_link()
        control.disconnect()
        name = sql.Identifier(control.database)
        self._admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
        self._admin.execute(sql.SQL("CREATE DATABASE {}").format(name))
        self._run("pg_restore", "--exit-on-error", str(self._file), "--dbname")

    def _run(self, program: str, *arguments: str) -> None:
        control = self._world.control
        command = control.cluster.tool(program, *arguments, database=control.database)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE orders (id int PRIMARY KEY, note text)",
        "CREATE TABLE events (what text)",
        "CREATE TABLE regions (code text PRIMARY KEY)",
    )
    more(world, 10)
    world.apply(STREAMS)
    return world


@pytest.fixture
def backup(shop, admin):
    return Backup(shop, admin)


def more(world, rows: int) -> None:
    world.pair.source(
        "INSERT INTO orders SELECT g, 'new' FROM generate_series("
        f"(SELECT coalesce(max(id), 0) + 1 FROM orders), "
        f"(SELECT coalesce(max(id), 0) + {rows} FROM orders)) g",
        "UPDATE orders SET note = 'changed' WHERE id <= 3",
        f"INSERT INTO events SELECT gen_random_uuid() FROM generate_series(1, {rows})",
        "INSERT INTO regions SELECT gen_random_uuid()",
    )


def go_on(world, times: int) -> None:
    for _ in range(times):
        more(world, 5)
        assert world.sync()[0].state is RunState.SUCCEEDED


def same(world) -> list[bool]:
    return [world.pair.same(table) for table in TABLES]


def fences(world) -> tuple[int, int]:
    """(control database, destination)"""
    there = world.pair.rows("destination", "SELECT max(fence) FROM _syncward.state")[0][0]
    return world.control.one("SELECT max(fence) FROM schedules"), there


def decide(world, run_id, decision) -> None:
    with world.cli.inside() as (tx, _, _name):
        decision(tx, run_id, world.cli.principal)


def reasons(world, action: str) -> list[object]:
    query = "SELECT body::jsonb ->> 'reason' FROM audit.event WHERE action = :action ORDER BY seq"
    return [row[0] for row in world.control.all(query, action=action)]


@pytest.mark.parametrize("lost_runs", [1, 4])
def test_a_destination_that_is_ahead_awaits_approval_then_goes_on_exactly(shop, backup, lost_runs):
    go_on(shop, 2)
    backup.take()
    go_on(shop, lost_runs)
    served = [shop.pair.content("destination", table) for table in TABLES]
    ahead_by = fences(shop)[1]
    backup.restore()
    assert fences(shop)[0] == 2 < ahead_by
    more(shop, 5)

    stopped, _ = shop.sync()

    assert (stopped.state, stopped.error_code) == (RunState.AWAITING_APPROVAL, "control_restored")
    assert "docs/backup.md" in stopped.error
    assert [shop.pair.content("destination", table) for table in TABLES] == served
    assert reasons(shop, "run.awaiting_approval") == ["control_restored"]

    decide(shop, stopped.run_id, runs.approve)
    shop.step()

    assert shop.run(stopped.run_id).state is RunState.SUCCEEDED
    assert same(shop) == [True, True, True]
    here, there = fences(shop)
    assert here == there > ahead_by
    assert reasons(shop, "run.approved") == ["control_restored"]
    # with one lost run, the approved attempt's own fence is the higher one already
    assert shop.events(stopped.run_id).count("run.fence_raised") == (lost_runs > 1)

    go_on(shop, 2)  # and no question any more
    assert same(shop) == [True, True, True]


@pytest.mark.parametrize("decision", ["reject", "worker lost"])
def test_the_guard_does_not_wear_off_with_attempts(shop, backup, decision):
    go_on(shop, 1)
    backup.take()
    go_on(shop, 2)
    served = [shop.pair.content("destination", table) for table in TABLES]
    backup.restore()
    more(shop, 5)
    for _ in range(5):  # more than the fences are apart
        if decision == "worker lost":  # an attempt that never reached the destination
            shop.enqueue()
            (job,) = shop.dispatch()
            assert shop.claim(job).fence
            shop.expire_leases()
            shop.control.act("UPDATE active_runs SET lost_leases = 0")
            ticks.reap_tick(shop.scheduler)
            shop.control.act("UPDATE active_runs SET not_before = now()")
            continue
        stopped, _ = shop.sync()
        assert stopped.error_code == "control_restored"
        decide(shop, stopped.run_id, runs.reject)
        assert shop.run(stopped.run_id).state is RunState.CANCELLED
    assert fences(shop)[0] > 3

    stopped = live(shop) or shop.sync()[0].run_id
    shop.step()

    assert shop.run(stopped).error_code == "control_restored"
    assert [shop.pair.content("destination", table) for table in TABLES] == served


def live(world):
    found = world.control.all("SELECT run_id FROM active_runs")
    return found[0][0] if found else None


def test_only_the_connection_whose_destination_is_ahead_is_stopped(shop, backup):
    text = (shop.directory / "doc.yaml").read_text()
    head, body = text.split("  shop-to-lake:\n")
    second = body.replace("schema: acme", "schema: second")
    (shop.directory / "doc.yaml").write_text(
        f"{head}  shop-to-lake:\n{body}\n  shop-to-second:\n{second}"
    )
    make_so(shop.cli, shop.directory / "doc.yaml", write=True)
    go_on(shop, 1)
    assert second_run(shop).state is RunState.SUCCEEDED
    backup.take()
    go_on(shop, 2)
    backup.restore()
    more(shop, 5)

    assert second_run(shop).state is RunState.SUCCEEDED
    assert shop.sync()[0].error_code == "control_restored"
    here = sorted(shop.pair.rows("source", "SELECT what FROM events"))
    assert sorted(shop.pair.rows("destination", "SELECT what FROM second.events")) == here


def second_run(world):
    with world.cli.inside() as (tx, _, _name):
        subject = connections.subject(connections.get(tx, "shop-to-second"))
        asked = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), world.cli.principal)
    world.step()
    return world.run(asked.run_id)


def test_nothing_is_asked_when_the_backup_is_as_new_as_the_destination(shop, backup):
    go_on(shop, 2)
    backup.take()
    backup.restore()
    go_on(shop, 2)
    assert same(shop) == [True, True, True]
    assert reasons(shop, "run.awaiting_approval") == []


def test_a_run_that_was_running_in_the_backup_is_executed_again_under_a_new_fence(shop, backup):
    go_on(shop, 1)
    more(shop, 5)
    holder = shop.pair.connect("destination", autocommit=False)
    holder.execute("LOCK TABLE acme.regions IN EXCLUSIVE MODE")  # the last stream waits
    asked = shop.enqueue()
    (job,) = shop.dispatch()
    worker = Thread(target=run_sync.execute, args=(job, shop.deps))
    worker.start()
    waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'acme.regions'::regclass"
    deadline = time.monotonic() + 30
    while not shop.pair.rows("destination", waiting):
        assert time.monotonic() < deadline, "the run never came to its last stream"
        time.sleep(0.02)
    backup.take()
    holder.close()
    worker.join(timeout=30)
    assert shop.run(asked.run_id).state is RunState.SUCCEEDED
    assert same(shop) == [True, True, True]
    old_fence = fences(shop)[1]
    backup.restore()
    more(shop, 5)  # a run that finds its own results must not read again
    assert shop.run(asked.run_id).state is RunState.RUNNING

    shop.expire_leases()
    ticks.reap_tick(shop.scheduler)
    shop.control.act("UPDATE active_runs SET not_before = now()")
    shop.step()

    run = shop.run(asked.run_id)
    assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2)
    assert fences(shop) == (old_fence + 1, old_fence + 1)
    assert shop.log(asked.run_id).count("not read again") == 3
    go_on(shop, 1)
    assert same(shop) == [True, True, True]


def test_a_worker_from_before_the_restore_cannot_write_any_more(shop, backup):
    go_on(shop, 1)
    backup.take()
    go_on(shop, 1)
    asked = shop.enqueue()
    (job,) = shop.dispatch()
    held = shop.claim(job)
    backup.restore()
    with pytest.raises(LeaseLost), transaction(shop.deps.engine) as tx:
        claims.finish(tx, held, Outcome(OutcomeKind.SUCCEEDED), shop.deps.principal)
    assert shop.control.all("SELECT 1 FROM runs WHERE run_id = :id", id=asked.run_id) == []
