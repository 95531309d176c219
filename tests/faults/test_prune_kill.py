"""A sealer's process is killed in the middle of a prune: all of it happens afterwards, or nothing.

A lock that the test holds stops the database where the kill shall find it.
"""

import json
import random
import time
from contextlib import contextmanager

import psycopg
import pytest

from tests import old_months
from tests.old_months import ALL, approve, partitions
from tests.sealed_log import SealedLog
from tests.sealers import SealerProcess, committed, events_of, state, until
from tests.world import Pair

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

#: What is locked, so that the sealer waits at which statement.
POINTS = {
    "the record is written, its row is not": ("audit.prune", "record_prune"),
    "before the first month is dropped": ("audit.event_202401", "carry_out_prune"),
    "between two months": ("audit.event_202402", "carry_out_prune"),
    "all months are dropped, nothing is committed": ("audit.prune", "carry_out_prune"),
}
FAST = "between two months"
#: Events that go.
GONE = 9


@pytest.fixture(scope="module")
def months(cluster, admin, template, tmp_path_factory):
    files = tmp_path_factory.mktemp("sealer") / "audit"
    with old_months.made(cluster, admin, template, files) as made:
        yield made


@pytest.fixture
def control(months, admin):
    with months.copied(admin) as copy:
        yield copy


@pytest.fixture
def pair(cluster):
    """No test here syncs anything."""
    return Pair(cluster, "none", "none", {})


@pytest.fixture
def approved(world, months, shell):
    """A log whose first two months may go; nobody seals yet."""
    months.key_to(world.directory)
    log = SealedLog(world.control, world.directory)
    export = log.export("before")
    words = ("audit", "prune", "--before", "2024-03-01", "--export", str(export), "--json")
    code, out, err = shell(*words)
    assert code == 0, err
    with months.other_operator(world.control, world.cli.settings) as second:
        approve(second, json.loads(out)["request"])
    (world.directory / "anchors").mkdir()
    return world


def sealer(world, name):
    # another must not wait for a dead one's lease
    world.control.act("UPDATE audit.log SET held_until = '-infinity'")
    anchor = world.directory / "anchors" / "log.anchor"
    return SealerProcess(world, name, anchor.as_uri())


def state_of(world):
    return world.control.one("SELECT state FROM audit.prune")


@contextmanager
def locked(world, table):
    """Hold a table so that it can be read and neither written nor dropped."""
    with psycopg.connect(world.control.admin_url) as holder:
        holder.execute(f"LOCK TABLE {table} IN SHARE MODE")
        yield
        holder.rollback()


def stuck_in(world, function):
    """Return the database process that waits for a lock within this function."""
    return world.control.all(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock' AND query LIKE '%audit.' || :function || '(%'",
        function=function,
    )


def backend_gone(world, pid):
    return not world.control.all("SELECT 1 FROM pg_stat_activity WHERE pid = :pid", pid=pid)


def killed_at(world, point, n=0):
    """Run a sealer until it waits at the point, and kill it there."""
    table, function = POINTS[point]
    if (table, function) == ("audit.prune", "carry_out_prune") and state_of(world) == "approved":
        killed_at(world, FAST, n)  # the same lock would stop the record
    with locked(world, table), sealer(world, f"killed-{n}") as one:
        ((pid,),) = until(lambda: stuck_in(world, function), about=point)
        one.kill()
        assert one.process.returncode == -9
    until(lambda: backend_gone(world, pid), about="the end of its transaction")
    assert state_of(world) == ("approved" if function == "record_prune" else "recorded")
    assert len(events_of(world, "audit.pruned")) == (function == "carry_out_prune")
    assert partitions(world.control) == ALL
    assert events_of(world, "partitions.dropped") == []


def goes_on(world):
    """Let another sealer finish; nothing is lost, doubled, or open to doubt."""
    with sealer(world, "after") as one:
        one.wait_for("sealer_ready")
        until(lambda: state_of(world) == "done", about="the drop")
        until(lambda: all_published(world), about="publishing")
        assert one.said("prune_refused") == []
        assert one.terminate() == 0
    assert partitions(world.control) == {"event_202403"}
    assert len(events_of(world, "audit.pruned")) == 1
    assert len(events_of(world, "partitions.dropped")) == 1
    intact(world)


def all_published(world):
    now = state(world)
    return now.size == now.published_size == committed(world) + GONE


def intact(world):
    log = SealedLog(world.control, world.directory)
    report = log.live(world.directory / "anchors" / "log.anchor")
    assert (report.exit_code, report.first_bad) == (0, None), report.lines


@pytest.mark.parametrize("point", [
    pytest.param(point, marks=() if point == FAST else pytest.mark.full) for point in POINTS
])  # fmt: skip
def test_killed_while_it_prunes_another_does_all_of_it(approved, point):
    killed_at(approved, point)
    goes_on(approved)


@pytest.mark.full
def test_killed_at_every_point_one_after_the_other_it_goes_on(approved):
    for n, point in enumerate(POINTS):
        killed_at(approved, point, n)
    goes_on(approved)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_moment_all_is_there_or_all_is_gone(approved, seed):
    chance = random.Random(seed)
    for n in range(4):
        with sealer(approved, f"killed-{n}") as one:
            one.wait_for("sealer_ready")
            time.sleep(chance.random() * 3)
            one.kill()
        gone = ALL - partitions(approved.control)
        assert gone in (set(), {"event_202401", "event_202402"})
        assert bool(gone) == (len(events_of(approved, "partitions.dropped")) == 1)
    goes_on(approved)
