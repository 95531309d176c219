"""A process dies at each numbered point of a run's way; what is left converges by itself."""

import ast
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler import ticks
from schemas.errors import Draining
from schemas.runs import Claim, RunState
from storage import claims, runs
from storage.engine import transaction
from tests.faults.crash_points import DIED, POINTS, Act, Point, arm, die
from tests.faults.test_processes import Fleet
from tests.world import OPERATOR, Control, World
from workers import heartbeat, run_sync
from workers.control import RunControl

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

#: Doubled rows would show in the first, which appends; the second is recorded with the outcome.
STREAMS = {
    "public.log": "{mode: append, cursor: xmin}",
    "public.t": "{mode: merge, key: [id], cursor: xmin}",
}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE log (n bigserial, v text)",
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO log (v) SELECT 'l' || g FROM generate_series(1, 50) g",
        "INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 50) g",
    )
    world.apply(STREAMS, schedule="{every: 1h}")
    world.sync()
    return world


# ── what a process does when it dies ────────────────────────────────────────────────────────────


def _due(world: World) -> None:
    ticks.due_tick(world.scheduler)


def _dispatch(world: World) -> None:
    world.deps.heartbeat.beat()
    ticks.dispatch_tick(world.scheduler)


def _execute(world: World) -> None:
    for job in world.jobs.take():
        run_sync.execute(job, world.deps)


def _beat(world: World) -> None:
    (job,) = world.jobs.take()
    claim = world.claim(job)
    assert isinstance(claim, Claim)
    with world.deps.heartbeat.hold(claim):
        world.deps.heartbeat.beat()


class _Stopping(RunControl):
    """Of a worker that is told to stop as soon as it holds a run."""

    def __init__(self, claim: Claim, asked_at: float | None = None) -> None:
        super().__init__(claim, asked_at)
        self.signal(Draining("The worker is stopping."))


def _drain(world: World) -> None:
    vars(heartbeat)["RunControl"] = _Stopping  # this process ends here, and so does the change
    _execute(world)
    with transaction(world.deps.engine) as tx:
        claims.sign_off(tx, world.deps.worker_id)


def _reap(world: World) -> None:
    ticks.reap_tick(world.scheduler)


def _forget_fences(world: World) -> None:
    world.control.act("UPDATE cursors SET fence = 0")


def _restore(world: World) -> None:
    """The destination has seen later runs than the control database; a person approves."""
    world.pair.session("destination").execute("UPDATE _syncward.state SET fence = fence + 100")
    _execute(world)
    ((run_id,),) = world.control.all("SELECT run_id FROM active_runs")
    with world.cli.inside() as (tx, _, _name):
        runs.approve(tx, run_id, OPERATOR)
    _dispatch(world)


def _lose_worker(world: World) -> None:
    (job,) = world.jobs.take()
    assert isinstance(world.claim(job), Claim)
    world.expire_leases()


def _lose_job(world: World) -> None:
    world.jobs.take()
    _time_passes(world)


def _time_passes(world: World) -> None:
    """Leases end, deadlines pass, waits are over; nobody repairs anything."""
    world.expire_leases()
    world.control.act(
        "UPDATE active_runs SET not_before = now() - interval '1 s', "
        "dispatch_deadline = dispatch_deadline - interval '1 min'"
    )


#: Act -> what others did before it, and the act itself.
ACTS: dict[Act, tuple[tuple[Callable[[World], None], ...], Callable[[World], None]]] = {
    "due": ((), _due),
    "dispatch": ((_due,), _dispatch),
    "execute": ((_due, _dispatch), _execute),
    "doubt": ((_due, _dispatch, _forget_fences), _execute),
    "restored": ((_due, _dispatch, _restore), _execute),
    "beat": ((_due, _dispatch), _beat),
    "drain": ((_due, _dispatch), _drain),
    "reap_lease": ((_due, _dispatch, _lose_worker), _reap),
    "reap_job": ((_due, _dispatch, _lose_job), _reap),
}


def _dies(world: World, point: Point, act: Callable[[World], None]) -> int:
    """Let a forked process with connections of its own act until it dies; return its exit code."""
    child = os.fork()
    if child == 0:
        try:
            old = world.control
            control = Control(old.cluster, old.database, old.password)
            worker_file = world.directory / "keys" / "worker.json"
            own = replace(
                world,
                control=control,
                scheduler=replace(
                    world.scheduler, engine=control.engine("scheduler"), sight=ticks.Sight()
                ),
                deps=World._deps(control, world.cli.settings, worker_file),
            )
            arm(point, die)
            act(own)
        finally:
            os._exit(0)  # never reached: without this it would go on as a second test runner
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _converge(world: World) -> None:
    for _ in range(6):
        _time_passes(world)
        ticks.due_tick(world.scheduler)
        ticks.reap_tick(world.scheduler)
        world.step()
        if not world.control.all("SELECT 1 FROM active_runs"):
            return
    raise AssertionError(world.control.all("SELECT state, attempt, error FROM active_runs"))


def _one_round(world: World, number: int, point: Point) -> None:
    """Change the source, make the schedule due, die at the point, converge, compare."""
    world.pair.source(
        f"INSERT INTO log (v) SELECT 'r{number}-' || g FROM generate_series(1, 20) g",
        f"UPDATE t SET v = 'r{number}' WHERE id <= 20",
        f"INSERT INTO t VALUES ({1_000 + number}, 'new')",
    )
    world.control.act("UPDATE schedules SET next_due_at = clock_timestamp()")
    known = set(world.control.all("SELECT run_id FROM runs"))
    slots = len(world.control.all("SELECT 1 FROM slots"))
    before, act = ACTS[point.act]
    for earlier in before:
        earlier(world)
    assert _dies(world, point, act) == DIED, "the point was not reached"
    if number % 2:
        world.jobs.take()  # its messages are lost; else they are delivered again
    _converge(world)
    ended = [r for r in world.control.all("SELECT run_id FROM runs") if r not in known]
    assert len(ended) == 1, f"{len(ended)} runs"
    run_id = ended[0][0]
    run = world.control.all("SELECT state, error FROM runs WHERE run_id = :id", id=run_id)
    assert run == [("succeeded", None)]
    events = "SELECT count(*) FROM audit.event WHERE target_id = :id AND action = :action"
    for action in ("run.queued", "run.succeeded"):
        assert world.control.one(events, id=run_id, action=action) == 1, action
    assert len(world.control.all("SELECT 1 FROM slots")) == slots + 1
    assert world.control.all("SELECT outcome FROM slots WHERE run_id = :id", id=run_id) == [
        ("queued",)
    ]
    assert {s.state for s in world.streams(run_id).values()} == {"succeeded"}
    assert len(world.streams(run_id)) == len(STREAMS)
    for table in ("log", "t"):
        assert world.pair.same(table), f"{table} differs"
    assert world.control.all("SELECT 1 FROM leases") == []


def test_a_process_may_die_at_every_point_and_everything_converges(shop):
    wrong = []
    for number, point in enumerate(POINTS):
        try:
            _one_round(shop, number, point)
        except AssertionError as error:
            wrong.append(f"{number}. {point}: {str(error).splitlines()[0]}")
            shop.control.act("DELETE FROM active_runs")
            shop.control.act("DELETE FROM leases")
    assert not wrong, "\n".join(wrong)


# ── the same with real processes ────────────────────────────────────────────────────────────────

#: A signal from outside, or a beat, does not meet so short a run; a restore needs a person.
NOT_MET = {"drain", "doubt", "restored"}
#: Act -> what must be lost first, so that there is something to recover.
LOST_FIRST = {"reap_lease": "claim committed", "reap_job": "committed, not sent"}


@pytest.fixture
def mortals(shop):
    shop.close()
    shop.control.act("DELETE FROM workers")
    fleet = Fleet(shop, workers=2, supervised=False)
    plans = shop.directory / "plans"
    plans.mkdir()
    for child in fleet.supervisor.children:
        role = child.module.split(".")[0]
        child.environment = {**child.environment, "CRASH_ROLE": role, "CRASH_PLAN": str(plans)}
        child.module = "tests.faults.crashing"
    fleet._thread.start()
    yield fleet, plans
    fleet.stop()


@pytest.mark.full
@pytest.mark.timeout(1_800)
def test_real_processes_may_die_at_every_point_and_everything_converges(mortals):
    fleet, plans = mortals
    world = fleet.world
    for number, point in enumerate(POINTS):
        if point.act in NOT_MET or (point.act, point.when) == ("beat", "after"):
            continue
        for child in fleet.supervisor.children:
            child.delay_s = 0.1  # the supervisor slows down what dies again and again
        world.pair.source(
            f"INSERT INTO log (v) SELECT 'r{number}-' || g FROM generate_series(1, 20) g",
            f"UPDATE t SET v = 'r{number}' WHERE id <= 20",
        )
        plan = [number]
        if point.act in LOST_FIRST:
            plan += [n for n, p in enumerate(POINTS) if p.means == LOST_FIRST[point.act]]
        for wanted in plan:
            (plans / str(wanted)).touch()
        slots = world.control.one("SELECT count(*) FROM slots")
        world.control.act("UPDATE schedules SET next_due_at = clock_timestamp()")
        deadline = time.monotonic() + 60
        while world.control.one("SELECT count(*) FROM slots") == slots or any(plans.iterdir()):
            assert time.monotonic() < deadline, f"{number}. {point}: not reached"
            time.sleep(0.05)
        run_id = world.control.one("SELECT run_id FROM slots ORDER BY scheduled_for DESC LIMIT 1")
        run = fleet.wait(run_id, seconds=90)
        assert run.state is RunState.SUCCEEDED, f"{number}. {point}: {run}"
        for table in ("log", "t"):
            assert world.pair.same(table), f"{number}. {point}: {table} differs"


# ── no step is forgotten ────────────────────────────────────────────────────────────────────────

#: Where the main path is written down.
MAIN_PATH = {
    "workers/run_sync.py": (),
    "workers/history.py": (),
    "scheduler/ticks.py": ("due_tick", "dispatch_tick", "_mark", "reap_tick"),
}


def _storage_calls(path: str, only: tuple[str, ...]) -> set[str]:
    """Name each function of storage that a module (or some of its functions) calls."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    modules = {
        name.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "storage"
        for name in node.names
    }
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    return {
        f"storage.{call.func.value.id}:{call.func.attr}"
        for function in functions
        if not only or function.name in only
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in modules
    }


#: Only reached by large tables, where it says that a part is kept: a worker is killed there in
#: tests/connectors/test_ranges.py.
_OF_LARGE_TABLES = {"storage.claims:progressed"}


@pytest.mark.parametrize("path", MAIN_PATH)
def test_every_storage_function_of_the_main_path_is_a_crash_point(path):
    called = _storage_calls(path, MAIN_PATH[path])
    assert len(called) >= 2, "the main path is written down elsewhere now"
    assert called - {point.function for point in POINTS} - _OF_LARGE_TABLES == set()


def test_points_are_named_once():
    assert len({str(point) for point in POINTS}) == len(POINTS)
