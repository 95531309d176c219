"""From the version before to this one under load: nothing fails, is lost, or is done twice."""

import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest
from psycopg import sql
from pydantic import ValidationError

from embedded.valkey import Server
from scheduler import ticks
from schemas.runs import RunState
from storage import revision
from tests.upgrade.versions import ROOT, Version, make_next, unpack_previous
from tests.world import Control, Pair, World
from workers import run_sync

pytestmark = [pytest.mark.integration, pytest.mark.timeout(170)]

CONNECTIONS = 4
SPEC = "{mode: merge, key: [id], cursor: xmin}"


@pytest.fixture(scope="session")
def previous_tree(tmp_path_factory):
    return unpack_previous(tmp_path_factory.mktemp("code") / "previous")


class Rolling:
    """A database as the version before made it, and both versions' processes."""

    def __init__(
        self, control: Control, valkey: Server, directory: Path, trees: tuple[Path, Path]
    ) -> None:
        self.control = control
        data, logs, admin = (directory / name for name in ("data", "logs", "admin"))
        for place, url in ((data, control.url), (admin, control.admin_url)):
            place.mkdir()
            (place / "dev.env").write_text(
                "SYNCWARD_PROFILE=development\n"
                f"SYNCWARD_REDIS_URL={valkey.url}\nSYNCWARD_DATABASE_URL={url}\n"
                f"SYNCWARD_EGRESS_ALLOW={control.opening}\n"
            )
        logs.mkdir()
        self.data, self.admin = data, str(admin)
        extra = {
            "SYNCWARD_KEYRING": str(data / "keys" / "worker.json"),
            "SYNCWARD_LEASE": "15s",
            "SYNCWARD_HEARTBEAT": "1s",
            "SYNCWARD_DRAIN_GRACE": "15s",
            "SYNCWARD_WORKER_THREADS": "2",
        }
        self.old = Version(trees[0], data, logs, extra)
        self.new = Version(trees[1], data, logs, extra)
        self._stop = Event()
        self._writer = Thread(target=self._write)
        self.upgrade(self.old)

    def upgrade(self, version: Version) -> None:
        done = version.cli("db", "upgrade", SYNCWARD_DATA_DIR=self.admin)
        assert done.returncode == 0, done.stderr

    def inhabit(self, pair: Pair, valkey: Server) -> None:
        """Make keys and two databases known; the processes of this test do the rest."""
        self.world = World.build(self.control, pair, valkey, self.data)
        self.world.close()
        self.control.act("DELETE FROM workers")
        # the version before lets first loads meet where they make the schema
        pair.session("destination").execute("CREATE SCHEMA acme AUTHORIZATION writer")

    def populate(self) -> None:
        """Let the version before make the account and its connections: due every second."""
        world = self.world
        operator = str(self.data / "keys" / "operator.json")
        world.pair.source(
            *(f"CREATE TABLE t{n} (id int PRIMARY KEY, v text)" for n in range(CONNECTIONS)),
            *(f"INSERT INTO t{n} VALUES (0, 'first')" for n in range(CONNECTIONS)),
        )
        path = world.document({"public.t0": SPEC}, schedule="{every: 1s}")
        head, body = path.read_text().split("  shop-to-lake:\n")
        blocks = [
            f"  c{n}:\n" + body.replace("public.t0", f"public.t{n}") for n in range(CONNECTIONS)
        ]
        path.write_text(head + "\n".join(blocks))
        for words in (
            ("account", "create", "acme", "--plan", "unlimited"),
            ("apply", "-f", str(path)),
        ):
            done = self.old.cli(*words, SYNCWARD_KEYRING=operator)
            assert done.returncode == 0, done.stderr

    def slow_down(self) -> None:
        """Make each load last: runs must be in flight whenever something is stopped."""
        session = self.world.pair.session("destination")
        session.execute(
            "CREATE FUNCTION acme.slow() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$"
        )
        for n in range(CONNECTIONS):
            session.execute(
                f"CREATE TRIGGER slow AFTER INSERT OR UPDATE ON acme.t{n} "
                "FOR EACH STATEMENT EXECUTE FUNCTION acme.slow()"
            )

    def start_writing(self) -> None:
        self._writer.start()

    def _write(self) -> None:
        with self.world.pair.connect("source") as link:
            number = 0
            while not self._stop.wait(0.05):
                number += 1
                for n in range(CONNECTIONS):
                    link.execute(f"INSERT INTO t{n} VALUES (%s, 'new')", (number,))
                    link.execute(f"UPDATE t{n} SET v = %s WHERE id = %s", (number, number // 2))

    def settle(self) -> None:
        """Stop writing; then every connection needs one more run that began after that."""
        self._stop.set()
        self._writer.join()
        now = self.control.one("SELECT clock_timestamp()")
        done = (
            "SELECT count(DISTINCT subject_id) FROM runs WHERE state = 'succeeded' "
            "AND started_at > :now"
        )
        self.until(lambda: self.control.one(done, now=now) == CONNECTIONS)
        # A transaction of the control database, which shares the server, may have been open when a
        # run looked: what is younger than it is the next run's.
        self.until(lambda: all(self.world.pair.same(f"t{n}") for n in range(CONNECTIONS)))

    def until(self, met: Callable[[], object], seconds: float = 40) -> None:
        deadline = time.monotonic() + seconds
        while not met():
            if time.monotonic() > deadline:
                processes = [*self.old.processes, *self.new.processes]
                raise AssertionError(
                    "\n".join(f"{p.name}: {p.output()[-2500:]}" for p in processes)
                )
            time.sleep(0.05)

    def said(self, wrong: object) -> str:
        processes = (*self.old.processes, *self.new.processes)
        return "\n".join([str(wrong), *(process.said() for process in processes)])

    def in_flight(self, worker: str) -> None:
        """Wait until a worker holds a run."""
        query = "SELECT count(*) FROM leases WHERE worker_id = :worker"
        self.until(lambda: self.control.one(query, worker=worker))

    def does(self, worker: str, runs: int) -> None:
        """Wait until a worker has ended so many runs from now on."""
        query = "SELECT 1 FROM runs WHERE worker_id = :worker AND state = 'succeeded'"
        before = len(self.control.all(query, worker=worker))
        self.until(lambda: len(self.control.all(query, worker=worker)) >= before + runs)

    def close(self) -> None:
        self._stop.set()
        if self._writer.ident is not None:
            self._writer.join()
        self.old.stop()
        self.new.stop()


@pytest.fixture
def empty(cluster, admin, template):
    """A control database that nobody has migrated."""
    name = f"control_{secrets.token_hex(4)}"
    admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    made = Control(cluster, name, template.password)
    yield made
    made.dispose()
    admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def rolling(empty, pair, valkey, tmp_path, previous_tree):
    yield from started(Rolling(empty, valkey, tmp_path, (previous_tree, ROOT)), pair, valkey)


@pytest.fixture
def to_next(empty, pair, valkey, tmp_path):
    trees = (ROOT, make_next(tmp_path / "next"))
    yield from started(Rolling(empty, valkey, tmp_path, trees), pair, valkey)


def started(made: Rolling, pair: Pair, valkey: Server) -> Iterator[Rolling]:
    valkey.flush()
    made.inhabit(pair, valkey)
    yield made
    made.close()


LOST = "body::jsonb ->> 'reason' = 'lost_lease'"
WORKER = "(body::jsonb -> 'detail' ->> 'worker')"


def ledger(control: Control, old: list[str]) -> dict[str, object]:
    """What must all be nothing at the end.

    Workers of the version before (`old`) are forgiven what the upgrade itself does to them: it
    adds a column to active_runs, which breaks their prepared `RETURNING *`, once per connection.
    They end that run as an internal error or lose its lease; this version tries again instead.
    """
    questions = {
        "failed": "SELECT run_id, state, error FROM runs WHERE state <> 'succeeded' "
        "AND NOT (error_code = 'internal' AND worker_id = ANY(:old))",
        "attempts raised": "SELECT run_id, attempt FROM runs r WHERE attempt <> 1 + (SELECT "
        "count(*) FROM audit.event e WHERE e.target_id = r.run_id "
        f"AND {LOST} AND {WORKER} = ANY(:old))",
        "leases lost": f"SELECT body FROM audit.event WHERE {LOST} AND {WORKER} <> ALL(:old)",
        "lost slots": "SELECT s.* FROM slots s WHERE s.outcome <> 'skipped' AND NOT EXISTS "
        "(SELECT FROM runs r WHERE r.run_id = s.run_id) AND NOT EXISTS (SELECT FROM active_runs a "
        "WHERE s.run_id IN (a.run_id, a.again_run_id))",
        "slots left out": "SELECT * FROM (SELECT connection_id, scheduled_for - lag(scheduled_for) "
        "OVER (PARTITION BY connection_id ORDER BY scheduled_for) AS gap FROM slots) AS g "
        "WHERE gap >= interval '2 s'",
        "ended twice": "SELECT run_id FROM runs GROUP BY run_id HAVING count(*) > 1",
        "started more often than handed back": "SELECT target_id FROM audit.event "
        "WHERE action IN ('run.started', 'run.requeued') GROUP BY target_id HAVING "
        "count(*) FILTER (WHERE action = 'run.started') > 1 + count(*) FILTER "
        f"(WHERE action = 'run.requeued' AND (body::jsonb ->> 'reason' = 'draining' OR ({LOST} AND "
        f"{WORKER} = ANY(:old))))",
    }
    found = {
        name: control.all(query, **({"old": old} if ":old" in query else {}))
        for name, query in questions.items()
    }
    return {name: rows for name, rows in found.items() if rows}


@pytest.mark.full
@pytest.mark.parametrize("rounds", [1, 12])
def test_a_rolling_upgrade_from_the_version_before_loses_and_doubles_nothing(rolling, rounds):
    forgiven = roll(rolling, rounds)
    wrong = ledger(rolling.control, forgiven)
    assert not wrong, rolling.said(wrong)


@pytest.mark.full
def test_a_rolling_upgrade_to_the_next_version_costs_no_run_not_even_an_attempt(to_next):
    """From this version on: busy tables get a column while runs are in flight."""
    roll(to_next, 3)
    wrong = ledger(to_next.control, [])
    assert not wrong, to_next.said(wrong)


def roll(rolling: Rolling, rounds: int) -> list[str]:
    """Replace everything, one by one; return the names of the old workers."""
    old, new, control = rolling.old, rolling.new, rolling.control
    before = control.one("SELECT version_num FROM alembic_version")
    rolling.populate()
    old_scheduler, old_workers = old.start("scheduler"), [old.start("workers") for _ in range(2)]
    first, second = (worker.id() for worker in old_workers)
    rolling.does(first, 1)
    rolling.until(lambda: control.one("SELECT count(DISTINCT subject_id) FROM runs") == CONNECTIONS)
    rolling.slow_down()
    rolling.start_writing()
    rolling.does(second, rounds)

    rolling.in_flight(first)
    rolling.upgrade(new)  # expand: the processes of the version before do not notice
    assert control.one("SELECT version_num FROM alembic_version") != before
    rolling.does(first, rounds)

    new_worker = new.start("workers")
    rolling.does(new_worker.id(), rounds)  # the old scheduler's jobs
    assert old_scheduler.drain() == 0
    new_scheduler = new.start("scheduler")
    for worker in (first, second, new_worker.id()):
        rolling.does(worker, rounds)  # the new scheduler's jobs

    rolling.in_flight(first)
    assert old_workers[0].drain() == 0
    another = new.start("workers")
    rolling.in_flight(second)
    assert old_workers[1].drain() == 0
    rolling.does(another.id(), rounds)
    rolling.in_flight(new_worker.id())
    assert new_worker.drain() == 0
    rolling.settle()
    assert [another.drain(), new_scheduler.drain()] == [0, 0]

    assert all(rolling.world.pair.same(f"t{n}") for n in range(CONNECTIONS))
    assert len(control.all("SELECT 1 FROM runs")) >= 6 * rounds
    assert control.one("SELECT count(*) FROM leases") == 0
    return [first, second]


@pytest.mark.parametrize("module", ["scheduler", "workers"])
def test_this_version_refuses_to_start_on_the_schema_of_the_one_before(rolling, module):
    process = rolling.new.start(module)
    assert process.popen.wait(timeout=30) == 78
    assert "schema 0001 is older than this version" in process.output()
    assert "run: syncward db upgrade" in process.output()


def test_an_upgrade_lets_go_of_its_locks_while_a_run_holds_what_it_needs(rolling):
    """Whoever queues behind the upgrade waits for less than a second, however long the run does."""
    control = rolling.control
    holder = psycopg.connect(control.admin_url)
    holder.execute("LOCK TABLE active_runs IN ROW EXCLUSIVE MODE")
    upgrade = Thread(target=rolling.upgrade, args=(rolling.new,))
    upgrade.start()
    waits = []
    with psycopg.connect(control.admin_url, autocommit=True) as worker:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            started = time.monotonic()
            worker.execute("SELECT count(*) FROM active_runs, accounts")
            waits.append(time.monotonic() - started)
            time.sleep(0.01)
    assert control.one("SELECT version_num FROM alembic_version") == "0001"
    holder.close()
    upgrade.join(timeout=60)
    assert control.one("SELECT version_num FROM alembic_version") == revision.wanted()
    assert 0.2 < max(waits) < 3, "it waited behind the upgrade, and not for long"


def test_a_column_added_under_a_running_worker_costs_no_attempt(world):
    """Its prepared statements break then, once each; the server says so before it does anything."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": SPEC})
    for _ in range(8):  # psycopg prepares a statement when it comes for the sixth time
        assert world.sync()[0].state is RunState.SUCCEEDED
    asked = world.enqueue()
    (job,) = world.dispatch()
    for table in ("active_runs", "schedules", "connections"):
        world.control.act(f"ALTER TABLE {table} ADD COLUMN of_the_next_version int")
    run_sync.execute(job, world.deps)
    run = world.run(asked.run_id)
    assert (run.state, run.attempt) == (RunState.SUCCEEDED, 1)


def test_a_run_with_options_of_a_newer_version_is_left_for_others(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": SPEC})
    asked = world.enqueue()
    world.control.act("""UPDATE active_runs SET options = '{"only_after": "2030-01-01"}'""")
    (job,) = world.dispatch()
    with pytest.raises(ValidationError):  # to ignore it would do more than was asked for
        run_sync.execute(job, world.deps)
    world.control.act("UPDATE active_runs SET dispatch_deadline = now() - interval '1 s'")
    ticks.reap_tick(world.scheduler)
    world.control.act("UPDATE active_runs SET options = '{}'")  # what a newer worker understands
    world.step()
    run = world.run(asked.run_id)
    assert (run.state, run.attempt) == (RunState.SUCCEEDED, 1)
