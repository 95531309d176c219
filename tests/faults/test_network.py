"""Networks that misbehave: black holes, lost answers, half-open and trickling connections."""

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Thread

import pytest
from sqlalchemy import text

from scheduler import ticks
from schemas.errors import SyncwardError, TransientError
from schemas.runs import Claim, RunState
from storage import claims, runs, silence
from storage.engine import transaction
from tests.faults.proxy import Proxy
from tests.world import OPERATOR, Control, World
from workers import run_sync
from workers.control import clock

pytestmark = [pytest.mark.integration, pytest.mark.timeout(150)]

#: An append would show a row that was written twice.
STREAMS = {
    "public.log": "{mode: append, cursor: xmin}",
    "public.t": "{mode: merge, key: [id], cursor: xmin}",
}
CURSOR = b"UPDATE _syncward.state SET cursor"


class FarControl(Control):
    """The control database behind a proxy."""

    proxy: Proxy

    @property
    def url(self) -> str:
        c = self.cluster
        return f"postgresql://dev:{self.password}@{c.host}:{self.proxy.port}/{self.database}"


@dataclass
class Far:
    """A stepped world whose worker and scheduler reach everything through proxies."""

    world: World
    proxies: dict[str, Proxy]

    def execute(self) -> Thread:
        """Dispatch what waits; execute it in a thread, as a worker does."""
        (job,) = self.world.dispatch()

        def work() -> None:
            try:
                run_sync.execute(job, self.world.deps)
            except SyncwardError:
                return  # the control database is away: dead-lettered

        thread = Thread(target=work)
        thread.start()
        return thread

    def converge(self) -> None:
        for _ in range(8):
            self.world.expire_leases()
            self.world.control.act(
                "UPDATE active_runs SET not_before = now() - interval '1 s', "
                "dispatch_deadline = dispatch_deadline - interval '1 min'"
            )
            with suppress(TransientError):  # a pooled connection may have been cut
                ticks.reap_tick(self.world.scheduler)
                self.world.step()
            if not self.world.control.all("SELECT 1 FROM active_runs"):
                return
        raise AssertionError(self.world.control.all("SELECT state, error FROM active_runs"))

    def same(self) -> bool:
        return self.world.pair.same("log") and self.world.pair.same("t")


def until(condition, what: str, seconds: float = 30) -> float:
    """Wait for something; return how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.02)
    return time.monotonic() - began


@pytest.fixture
def far(world):
    old, pair = world.control, world.pair
    with ExitStack() as stack:
        host, port = old.cluster.host, old.cluster.port
        proxies = {
            name: stack.enter_context(Proxy(host, port))
            for name in ("control", "source", "destination")
        }
        plain = pair.config
        pair.config = lambda role: {**plain(role), "port": proxies[role].port}
        control = FarControl(old.cluster, old.database, old.password)
        control.proxy = proxies["control"]
        stack.callback(control.dispose)
        world.close()
        settings = world.cli.settings.model_copy(update={"lease": timedelta(seconds=8)})
        worker_file = world.directory / "keys" / "worker.json"
        world.deps = World._deps(control, settings, worker_file)
        world.scheduler = replace(world.scheduler, engine=control.engine("scheduler"))
        world.deps.heartbeat.start()
        pair.source(
            "CREATE TABLE log (n bigserial, v text)",
            "CREATE TABLE t (id int PRIMARY KEY, v text)",
            "INSERT INTO log (v) SELECT 'l' || g FROM generate_series(1, 2000) g",
            "INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 2000) g",
        )
        world.apply(STREAMS)
        yield Far(world, proxies)
        for proxy in proxies.values():
            proxy.heal()
        world.deps.heartbeat.stop()


# ── the destination and the source ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [True, False], ids=["first load", "second load"])
def test_a_lost_answer_to_the_destinations_commit_doubles_nothing(far, first):
    if not first:
        far.world.sync()
        far.world.pair.source("INSERT INTO log (v) VALUES ('new')", "UPDATE t SET v = 'new'")
    proxy = far.proxies["destination"]
    proxy.after("mute", CURSOR, b"COMMIT")
    asked = far.world.enqueue()
    worker = far.execute()
    assert proxy.hit.wait(30)
    query = "SELECT count(*) FROM _syncward.state WHERE run_id = :id".replace(
        ":id", f"'{asked.run_id}'"
    )
    until(lambda: far.world.pair.rows("destination", query) == [(1,)], "it did not commit")
    proxy.heal()  # what waits for the answer is cut
    worker.join(30)
    assert far.world.run(asked.run_id).state is RunState.QUEUED
    far.converge()
    assert far.world.run(asked.run_id).state is RunState.SUCCEEDED
    assert "already loaded by attempt 1" in far.world.log(asked.run_id)
    assert far.same()


@pytest.mark.parametrize(
    ("role", "mode", "request_"),
    [
        ("source", "hole", b"COPY (SELECT"),
        ("destination", "mute", CURSOR),
        pytest.param("source", "trickle", b"COPY (SELECT", marks=pytest.mark.full),
        pytest.param("destination", "half_open", b"FROM STDIN", marks=pytest.mark.full),
    ],
)
def test_cancel_reaches_a_run_whose_server_is_silent(far, role, mode, request_):
    proxy = far.proxies[role]
    proxy.after(mode, request_)
    asked = far.world.enqueue()
    worker = far.execute()
    assert proxy.hit.wait(30)
    began = time.monotonic()
    with far.world.cli.inside() as (tx, _, _name):
        assert runs.cancel(tx, asked.run_id, OPERATOR) is RunState.RUNNING
    worker.join(30)
    assert not worker.is_alive(), "the worker's thread is lost"
    assert time.monotonic() - began < 12, "10 s, and some for a busy machine"
    assert far.world.run(asked.run_id).state is RunState.CANCELLED
    proxy.heal()
    run, _ = far.world.sync()
    assert run.state is RunState.SUCCEEDED
    assert far.same()


@pytest.mark.parametrize("role", ["source", "destination"])
def test_a_cut_connection_is_a_retry_and_doubles_nothing(far, role):
    proxy = far.proxies[role]
    proxy.after("hole", b"COPY")
    asked = far.world.enqueue()
    worker = far.execute()
    assert proxy.hit.wait(30)
    proxy.heal()
    worker.join(30)
    run = far.world.run(asked.run_id)
    assert (run.state, run.error_code) == (RunState.QUEUED, "connection_lost")
    far.converge()
    assert far.world.run(asked.run_id).state is RunState.SUCCEEDED
    assert far.same()


# ── the control database ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["hole", pytest.param("half_open", marks=pytest.mark.full)])
def test_a_worker_stops_before_its_lease_ends_when_the_control_database_is_silent(far, mode):
    """Even inside a statement at the destination: here it waits for a lock that nobody releases."""
    world = far.world
    world.sync()
    world.pair.source("UPDATE t SET v = 'changed'")
    with world.pair.connect("destination", autocommit=False) as blocker:
        blocker.execute("LOCK TABLE acme.t")
        asked = world.enqueue()
        worker = far.execute()
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'syncward:destination' "
            "AND wait_event_type = 'Lock' AND datname = current_database()"
        )
        until(lambda: world.pair.rows("destination", waiting), "it did not wait")
        far.proxies["control"].set(mode)
        until(lambda: not world.pair.rows("destination", waiting), "it went on")
        left = world.control.one("SELECT expires_at - clock_timestamp() FROM leases")
        assert isinstance(left, timedelta)
        assert timedelta(0) < left < timedelta(seconds=5), "before the lease ended, not at once"
    far.proxies["control"].heal()
    worker.join(30)
    assert not worker.is_alive()
    far.converge()
    assert world.run(asked.run_id).state is RunState.SUCCEEDED
    assert far.same()


def test_a_renewal_whose_answer_takes_long_counts_from_when_it_was_asked_for(far):
    """Postgres sets the end of the lease when it begins; here the answer waits for a row lock."""
    world = far.world
    world.deps.heartbeat.stop()
    world.enqueue()
    (job,) = world.dispatch()
    with transaction(world.deps.engine) as tx:
        lease = timedelta(seconds=8)
        claim = claims.claim(tx, job, "w1", lease, world.deps.principal)
    assert isinstance(claim, Claim)
    with world.deps.heartbeat.hold(claim) as control:
        with world.control.admin_engine().begin() as tx:
            tx.execute(text("SELECT FROM leases FOR UPDATE"))
            beat = Thread(target=world.deps.heartbeat.beat)
            beat.start()
            time.sleep(2.5)
        beat.join()
        left = world.control.one("SELECT expires_at - clock_timestamp() FROM leases")
        assert isinstance(left, timedelta)
        stops_in = 0.8 * lease.total_seconds() - (clock() - control._renewed_at)
    assert left < timedelta(seconds=6), "else this proves nothing"
    assert stops_in < left.total_seconds(), "it would go on when the lease has ended"


def test_a_heartbeat_that_gets_no_answer_hangs_up_and_the_next_one_renews(far):
    heartbeat, proxy = far.world.deps.heartbeat, far.proxies["control"]
    seen = "SELECT max(seen_at) FROM workers"
    proxy.set("hole")
    link = heartbeat._link
    until(lambda: heartbeat._link is not link, "the silent connection was kept")
    before = far.world.control.one(seen)
    proxy.set("pass")
    until(lambda: far.world.control.one(seen) != before, "it did not come back by itself")


def test_a_tick_that_gets_no_answer_fails_and_comes_again(far, monkeypatch):
    monkeypatch.setattr(silence, "SILENT_AFTER_S", 2.0)  # a minute is long for a test
    scheduler, proxy = far.world.scheduler, far.proxies["control"]
    ticks.due_tick(scheduler)
    proxy.set("hole")
    began = time.monotonic()
    with pytest.raises(TransientError):
        ticks.due_tick(scheduler)
    assert time.monotonic() - began < 15, "two looks at the longest, and some for a busy machine"
    proxy.set("pass")
    assert ticks.due_tick(scheduler) == 0


@pytest.mark.parametrize("words", [(b"INSERT INTO leases", b"COMMIT"), (b"INSERT INTO runs",)])
def test_a_lost_answer_of_the_control_database_doubles_nothing(far, words):
    """Claimed or finished, but the worker cannot know: another attempt asks the destination."""
    far.proxies["control"].after("mute", *words)
    asked = far.world.enqueue()
    worker = far.execute()
    assert far.proxies["control"].hit.wait(30)
    time.sleep(0.2)
    far.proxies["control"].heal()
    worker.join(30)
    far.converge()
    assert far.world.run(asked.run_id).state is RunState.SUCCEEDED
    assert far.world.events(asked.run_id).count("run.succeeded") == 1
    assert far.same()
