"""All use-cases of run control while storage fails around them; when it stops, all converges."""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest

from scheduler import ticks
from schemas.errors import SyncwardError
from schemas.runs import RunKind, RunOptions
from storage import connections, runs
from tests.faults.faulty import Faults, install
from tests.integration.test_state_machine import NAMES, several_connections
from tests.world import OPERATOR, World
from workers import run_sync

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


class Story:
    """A seeded sequence of what operators, scheduler, Redis and workers do."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.dice = random.Random(seed)
        self.promised: set[UUID] = set()
        self.rows = 0
        self.acts: list[tuple[Callable[[], Any], int]] = [
            (self.rows_change, 3),
            (self.slot, 4),
            (self.enqueue, 3),
            (self.dispatch, 8),
            (self.execute, 8),
            (self.beat, 3),
            (self.reap, 5),
            (self.time_passes, 4),
            (self.cancel, 2),
            (self.pause, 1),
            (self.resume, 2),
        ]

    def play(self, steps: int) -> None:
        acts, weights = zip(*self.acts, strict=True)
        for act in self.dice.choices(acts, weights, k=steps):
            with suppress(SyncwardError):  # whoever asked sees an error and may ask again
                act()

    def rows_change(self) -> None:
        self.rows += 1
        self.world.pair.source(
            "INSERT INTO t SELECT max(id) + 1, 'new' FROM t",
            f"UPDATE t SET v = 'r{self.rows}' WHERE id % 7 = {self.rows % 7}",
        )

    def slot(self) -> None:
        self.world.control.act(
            "UPDATE schedules SET next_due_at = clock_timestamp() WHERE state = 'active' "
            "AND connection_id = (SELECT id FROM connections WHERE name = :name)",
            name=self.dice.choice(NAMES),
        )
        ticks.due_tick(self.world.scheduler)

    def enqueue(self) -> None:
        with self.world.cli.inside() as (tx, _, _name):
            found = connections.subject(connections.get(tx, self.dice.choice(NAMES)))
            options = RunOptions(full_refresh=self.dice.random() < 0.3)
            asked = runs.enqueue(tx, found, RunKind.SYNC, options, OPERATOR)
        self.promised.add(asked.run_id)

    def dispatch(self) -> None:
        self.world.deps.heartbeat.beat()
        ticks.dispatch_tick(self.world.scheduler)

    def execute(self) -> None:
        """Deliver what Redis holds in any order; now and then twice, or not at all."""
        jobs = self.world.jobs.take()
        self.dice.shuffle(jobs)
        for job in jobs:
            for _ in range(self.dice.choice((0, 1, 1, 1, 2))):
                with suppress(SyncwardError):
                    run_sync.execute(job, self.world.deps)

    def beat(self) -> None:
        self.world.deps.heartbeat.beat()

    def reap(self) -> None:
        ticks.reap_tick(self.world.scheduler)

    def time_passes(self) -> None:
        self.world.expire_leases()
        self.world.control.act(
            "UPDATE active_runs SET not_before = now() - interval '1 s', "
            "dispatch_deadline = dispatch_deadline - interval '1 min'"
        )

    def cancel(self) -> None:
        live = self.world.control.all("SELECT run_id FROM active_runs ORDER BY run_id")
        if live:
            with self.world.cli.inside() as (tx, _, _name):
                runs.cancel(tx, self.dice.choice(live)[0], OPERATOR)

    def pause(self) -> None:
        with self.world.cli.inside() as (tx, account, _name):
            connections.pause(tx, account, connections.get(tx, NAMES[0]), OPERATOR)

    def resume(self, name: str = NAMES[0]) -> None:
        with self.world.cli.inside() as (tx, account, _name):
            found = connections.get(tx, name)
            connections.resume(tx, account, found, next_due_at=None, principal=OPERATOR)

    def drain(self) -> None:
        """No faults any more, and nobody repairs anything: time passes and processes go on."""
        for name in NAMES:
            self.resume(name)
        for _ in range(12):
            self.time_passes()
            ticks.reap_tick(self.world.scheduler)
            self.world.step()
            if not self.world.control.all("SELECT 1 FROM active_runs"):
                return
        raise AssertionError(self.world.control.all("SELECT state, error FROM active_runs"))


def check(story: Story) -> None:
    world = story.world
    ended = [row[0] for row in world.control.all("SELECT run_id FROM runs")]
    assert len(ended) == len(set(ended)), "one row of history per run"
    assert story.promised <= set(ended), "a run that was promised never was"
    unserved = "SELECT 1 FROM slots WHERE outcome <> 'skipped' AND run_id NOT IN "
    assert not world.control.all(unserved + "(SELECT run_id FROM runs)")
    assert not world.control.all("SELECT 1 FROM leases")
    ends = (
        "SELECT target_id FROM audit.event WHERE action IN ('run.succeeded', 'run.failed', "
        "'run.cancelled') GROUP BY target_id HAVING count(*) <> 1"
    )
    assert not world.control.all(ends), "a run that ended twice"
    begun = (
        "SELECT r.run_id FROM runs r WHERE (SELECT count(*) FROM audit.event e WHERE "
        "e.target_id = r.run_id AND e.action = 'run.queued') <> 1"
    )
    assert not world.control.all(begun), "a run that was queued twice"


def play(world: World, seed: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults(seed, rate=0.05 + 0.15 * (seed % 4) / 3)
    story = Story(world, seed)
    with monkeypatch.context() as patched:
        install(faults, patched)
        story.play(steps)
    story.drain()
    check(story)
    for name in NAMES:
        with world.cli.inside() as (tx, _, _name):
            found = connections.subject(connections.get(tx, name))
            asked = runs.enqueue(tx, found, RunKind.SYNC, RunOptions(), OPERATOR)
        story.drain()
        assert world.run(asked.run_id).state == "succeeded"
        assert world.pair.same("t"), name
    return faults


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' || g FROM generate_series(1, 50) g",
    )
    several_connections(world)
    return world


def test_storage_that_fails_around_every_use_case_leaves_nothing_behind(shop, monkeypatch):
    made = sum(
        (play(shop, seed, 150, monkeypatch).made for seed in range(4)), start=Faults(0, 0).made
    )
    assert sum(made.values()) > 40, made
    assert made["after commit"] > 3, made


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100, 130))
def test_storage_that_fails_for_many_seeds(shop, monkeypatch, seed):
    play(shop, seed, 200, monkeypatch)
