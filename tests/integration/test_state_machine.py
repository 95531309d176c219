"""Run control as a state machine: Hypothesis plays operators, scheduler, Redis, workers and time.

Every step runs the real storage functions on real Postgres. After each of them the invariants are
asked of the database; at the end of an example everything must drain by the ordinary ticks alone.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cli.apply import make_so
from scheduler import ticks
from schemas.errors import LeaseLost
from schemas.jobs import Job
from schemas.records import StreamResult
from schemas.runs import MOVES, Claim, Outcome, OutcomeKind, RunKind, RunOptions
from storage import accounts, claims, connections, resources, runs
from storage.claims import Beat, ClaimRefusal, WorkerState
from storage.engine import open_link, run_script, transaction
from storage.runs import Subject
from tests.world import OPERATOR, World

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NAMES = ("buffering", "skipping", "cancelling")
ACCOUNT_CAP, RESOURCE_CAP = 2, 2

#: Every move of every run, as the table itself saw it; the program does not know that it is there.
WATCH = """
CREATE TABLE moves (n bigserial PRIMARY KEY, run_id uuid, before text, after text);
CREATE FUNCTION note_move() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
SET search_path = public AS $$ BEGIN
  INSERT INTO moves (run_id, before, after) VALUES (
    CASE WHEN TG_OP = 'DELETE' THEN OLD.run_id ELSE NEW.run_id END,
    CASE WHEN TG_OP = 'INSERT' THEN NULL ELSE OLD.state END,
    CASE WHEN TG_OP = 'DELETE' THEN NULL ELSE NEW.state END);
  RETURN NULL; END $$;
CREATE TRIGGER note_move AFTER INSERT OR DELETE OR UPDATE OF state ON active_runs
FOR EACH ROW EXECUTE FUNCTION note_move();
"""

FORGET = """
SET LOCAL session_replication_role = replica;
TRUNCATE moves, active_runs, leases, runs, slots, run_streams, cursors, run_logs, workers;
UPDATE account_queues SET has_work = false, at_cap = false, paused = false, vtime = 0;
UPDATE schedules SET state = 'active', state_reason = NULL, failures = 0, fence = 0,
  next_due_at = now() + interval '1 day';
"""

BROKEN = {
    "running and leased are the same": (
        "SELECT a.run_id FROM active_runs a FULL JOIN leases l ON l.run_id = a.run_id "
        "AND l.token = a.lease_token WHERE (a.state = 'running') IS DISTINCT FROM "
        "(l.token IS NOT NULL)"
    ),
    "no run is live and ended": "SELECT run_id FROM active_runs JOIN runs USING (run_id)",
    "a run ends once": "SELECT run_id FROM runs GROUP BY run_id HAVING count(*) > 1",
    "a dispatched run has a deadline": (
        "SELECT run_id FROM active_runs "
        "WHERE (state = 'dispatched') <> (dispatch_deadline IS NOT NULL)"
    ),
    "an account keeps to its cap": (
        "SELECT account_id FROM active_runs WHERE state IN ('dispatched', 'running') "
        f"GROUP BY account_id HAVING count(*) > {ACCOUNT_CAP}"
    ),
    "a resource keeps to its cap": (
        "SELECT r.id FROM active_runs b CROSS JOIN LATERAL (SELECT DISTINCT "
        "unnest(ARRAY[b.source_id, b.destination_id])) AS r (id) WHERE r.id IS NOT NULL "
        "AND b.state IN ('dispatched', 'running') "
        f"GROUP BY r.id HAVING count(*) > {RESOURCE_CAP}"
    ),
    "every slot is accounted for by a run that exists or is promised": (
        "SELECT scheduled_for FROM slots s WHERE outcome <> 'skipped' AND NOT EXISTS "
        "(SELECT FROM runs r WHERE r.run_id = s.run_id) AND NOT EXISTS (SELECT FROM active_runs a "
        "WHERE s.run_id IN (a.run_id, a.again_run_id))"
    ),
    "what somebody asked to stop does not wait for a worker": (
        "SELECT run_id FROM active_runs WHERE cancel_requested_at IS NOT NULL "
        "AND state <> 'running'"
    ),
}

#: All of them at once: they are asked after each step.
WHAT_IS_BROKEN = " UNION ALL ".join(
    f"SELECT '{what}' WHERE EXISTS ({query})" for what, query in BROKEN.items()
)

_LEGAL = {(str(a), str(b)) for a, moves in MOVES.items() for b in moves} | {(None, "queued")}
MADE = (
    "SELECT m.before, coalesce(m.after, r.state) FROM moves m "
    "LEFT JOIN runs r ON m.after IS NULL AND r.run_id = m.run_id"
)
FENCES = "SELECT c.name, s.fence FROM connections c JOIN schedules s ON s.connection_id = c.id"


class Held:
    """A claim as its worker knows it; `lost` as only the test knows."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.lost = False
        self.over = False


class RunControlMachine(RuleBasedStateMachine):
    """See the module's docstring."""

    world: ClassVar[World]
    link: ClassVar[psycopg.Connection[tuple[Any, ...]]]

    jobs = Bundle("jobs")
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        with self.world.control.admin_engine().begin() as tx:
            run_script(tx, FORGET)
        self.world.jobs.take()
        self.begun: set[UUID] = set()  # runs that were claimed at least once
        self.wishes: dict[UUID, bool] = {}  # run promised -> a full refresh was asked for
        self.claims: list[Held] = []
        self.slots = 0
        self.fences = dict.fromkeys(NAMES, 0)

    # ── operators ────────────────────────────────────────────────────────────────────────────

    @initialize()
    def a_worker_is_known(self) -> None:
        self._beat([])

    @rule(name=st.sampled_from(NAMES), full=st.booleans())
    def enqueue(self, name: str, full: bool) -> None:  # noqa: FBT001 - Hypothesis draws it
        with self.world.cli.inside() as (tx, _, _name):
            found = connections.subject(connections.get(tx, name))
            options = RunOptions(full_refresh=full)
            asked = runs.enqueue(tx, found, RunKind.SYNC, options, OPERATOR)
        assert asked.run_id not in self.begun, "what is asked for now is served by a run to come"
        self.wishes[asked.run_id] = self.wishes.get(asked.run_id, False) or full

    @rule()
    def test_a_resource_in_vain(self) -> None:
        with self.world.cli.inside() as (tx, account, _name):
            source = resources.get(tx, "shop").resource_id
            subject = Subject(source, account.account_id, source)
            late = timedelta(seconds=-1)
            runs.enqueue(tx, subject, RunKind.TEST, RunOptions(), OPERATOR, deadline=late)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        live = self._live()
        if live:
            with self.world.cli.inside() as (tx, _, _name):
                runs.cancel(tx, data.draw(st.sampled_from(live)), OPERATOR)

    @rule(name=st.sampled_from(NAMES))
    def pause(self, name: str) -> None:
        with self.world.cli.inside() as (tx, account, _name):
            connections.pause(tx, account, connections.get(tx, name), OPERATOR)

    @rule(name=st.sampled_from(NAMES))
    def resume(self, name: str) -> None:
        self._resume(name)

    @rule(paused=st.booleans())
    def pause_or_resume_the_account(self, paused: bool) -> None:  # noqa: FBT001 - as above
        with self.world.cli.inside() as (tx, account, _name):
            if paused:
                accounts.pause(tx, account, "test", OPERATOR)
            else:
                accounts.resume(tx, account, OPERATOR)

    @rule(approved=st.booleans())
    def decide(self, approved: bool) -> None:  # noqa: FBT001 - as above
        self._decide(approved=approved)

    # ── time and schedulers ──────────────────────────────────────────────────────────────────

    @rule(name=st.sampled_from(NAMES))
    def a_slot_comes(self, name: str) -> None:
        self._sql(
            "UPDATE schedules SET next_due_at = clock_timestamp() WHERE state = 'active' "
            "AND connection_id = (SELECT id FROM connections WHERE name = :name)",
            name=name,
        )
        before = set(self._ids("SELECT run_id FROM slots"))
        self.slots += ticks.due_tick(self.world.scheduler)
        assert len(self._ids("SELECT 1 FROM slots")) == self.slots, "each slot is in the ledger"
        served = self._ids("SELECT run_id FROM slots WHERE outcome <> 'skipped'")
        for run_id in set(served) - before:
            assert run_id not in self.begun, "a slot is served by a run to come"

    @rule(target=jobs)
    def dispatch(self) -> Any:
        self._beat([])
        ticks.dispatch_tick(self.world.scheduler)
        return multiple(*self.world.jobs.take())

    @rule()
    def reap(self) -> None:
        ticks.reap_tick(self.world.scheduler)

    @rule()
    def jobs_are_overdue(self) -> None:
        self._jobs_are_overdue()

    @rule()
    def waits_end(self) -> None:
        self._waits_end()

    # ── Redis and workers ────────────────────────────────────────────────────────────────────

    @rule(target=held, job=jobs)  # not consumed: the next step may deliver it again
    def deliver(self, job: Job) -> Any:
        found = self._deliver(job)
        return multiple() if found is None else found

    @rule(job=consumes(jobs))
    def drop(self, job: Job) -> None:
        del job

    @rule(one=held, rows=st.integers(0, 5))
    def heartbeat(self, one: Held, rows: int) -> None:
        answer = self._beat([Beat(one.claim.token, "public.t", rows, rows)])
        assert (one.claim.token in answer) is not (one.lost or one.over)

    @rule(one=held)
    def checkpoint(self, one: Held) -> None:
        if one.claim.kind is not RunKind.SYNC:
            return  # has no streams
        result = StreamResult(stream="public.t", state="succeeded", mode="merge")
        try:
            with transaction(self.world.deps.engine) as tx:
                claims.record_stream(tx, one.claim, result, 0, self.world.deps.principal)
        except LeaseLost:
            assert one.lost or one.over
        else:
            assert not one.lost
            assert not one.over

    @rule(one=held)
    def a_lease_expires(self, one: Held) -> None:
        self._sql(
            "UPDATE leases SET expires_at = now() - interval '1 s' WHERE token = :token",
            token=one.claim.token,
        )
        sighted = replace(self.world.scheduler, sight=ticks.Sight())  # a slow test is no outage
        ticks.reap_tick(sighted)
        one.lost = one.lost or not one.over

    @rule(one=held, kind=st.sampled_from(OutcomeKind))
    def finish(self, one: Held, kind: OutcomeKind) -> None:
        self._finish(one, kind)

    @invariant()
    def time_stands_still_between_the_steps(self) -> None:
        """What a rule does not end does not end on a slow machine either: stories can be retold."""
        self._sql(
            "WITH later AS (UPDATE leases SET expires_at = expires_at + interval '1 day') "
            "UPDATE active_runs SET dispatch_deadline = dispatch_deadline + interval '1 day', "
            "not_before = CASE WHEN not_before > clock_timestamp() "
            "THEN not_before + interval '1 day' ELSE not_before END"
        )

    # ── what must hold ───────────────────────────────────────────────────────────────────────

    @invariant()
    def nothing_is_broken(self) -> None:
        assert not self._ids(WHAT_IS_BROKEN)

    @invariant()
    def only_legal_moves_were_made(self) -> None:
        for before, after in self.world.control.all(MADE):
            assert (before, after) in _LEGAL

    @invariant()
    def fences_only_grow(self) -> None:
        for name, fence in self.world.control.all(FENCES):
            assert fence >= self.fences[name]
            self.fences[name] = fence

    @precondition(lambda self: self.claims)
    @invariant()
    def at_most_one_worker_may_write(self) -> None:
        writing = [h.claim.subject_id for h in self.claims if not (h.lost or h.over)]
        assert len(writing) == len(set(writing))

    def teardown(self) -> None:
        """Faults stop: everything drains by ticks alone, and every promise was kept."""
        for name in NAMES:
            self._resume(name)
        with self.world.cli.inside() as (tx, account, _name):
            accounts.resume(tx, account, OPERATOR)
        for held in self.claims:
            self._finish(held, OutcomeKind.SUCCEEDED)
        for _ in range(20):
            self._decide(approved=True)
            self._waits_end()
            self._jobs_are_overdue()
            self._beat([])
            ticks.dispatch_tick(self.world.scheduler)
            for job in self.world.jobs.take():
                one = self._deliver(job)
                if one is not None:
                    self._finish(one, OutcomeKind.SUCCEEDED)
            self.nothing_is_broken()
            if not self._live():
                break
        assert not self._ids("SELECT state FROM active_runs"), "it did not drain"
        ended = self._ids("SELECT run_id FROM runs")
        assert set(self.wishes) <= set(ended), "every run that was promised has been"
        self.only_legal_moves_were_made()

    # ── pieces ───────────────────────────────────────────────────────────────────────────────

    def _deliver(self, job: Job) -> Held | None:
        claim = self.world.claim(job)
        if isinstance(claim, ClaimRefusal):
            assert claim is ClaimRefusal.STALE, "every job that was sent is of a run that was"
            return None
        self.begun.add(claim.run_id)
        if self.wishes.get(claim.run_id):
            assert claim.options.full_refresh, "the widest wish wins"
        self.claims.append(Held(claim))
        return self.claims[-1]

    def _finish(self, one: Held, kind: OutcomeKind) -> None:
        retry_after = timedelta(seconds=10) if kind is OutcomeKind.RETRY else None
        outcome = Outcome(kind, "x", "x", retry_after)
        try:
            with transaction(self.world.deps.engine) as tx:
                claims.finish(tx, one.claim, outcome, self.world.deps.principal)
        except LeaseLost:
            assert one.lost or one.over
        else:
            assert not one.lost
            assert not one.over
        one.over = True

    def _beat(self, beats: list[Beat]) -> dict[UUID, bool]:
        worker = WorkerState("w1", "test", 8, draining=False)
        return claims.heartbeat(self.link, worker, beats, timedelta(seconds=30))

    def _resume(self, name: str) -> None:
        with self.world.cli.inside() as (tx, account, _name):
            found = connections.get(tx, name)
            connections.resume(tx, account, found, next_due_at=None, principal=OPERATOR)

    def _decide(self, *, approved: bool) -> None:
        for run_id in self._ids("SELECT run_id FROM active_runs WHERE state = 'awaiting_approval'"):
            with self.world.cli.inside() as (tx, _, _name):
                (runs.approve if approved else runs.reject)(tx, run_id, OPERATOR)

    def _waits_end(self) -> None:
        self._sql("UPDATE active_runs SET not_before = now() WHERE state = 'queued'")
        ticks.reap_tick(self.world.scheduler)

    def _jobs_are_overdue(self) -> None:
        self._sql("UPDATE active_runs SET dispatch_deadline = now() WHERE state = 'dispatched'")
        ticks.reap_tick(self.world.scheduler)

    def _live(self) -> list[UUID]:
        return self._ids("SELECT run_id FROM active_runs ORDER BY run_id")

    def _ids(self, query: str) -> list[Any]:
        return [row[0] for row in self.world.control.all(query)]

    def _sql(self, statement: str, **values: object) -> None:
        self.world.control.act(statement, **values)


def several_connections(world: World) -> None:
    """Apply three connections over the pair, one with each way to treat a slot that overlaps."""
    streams = ["    streams:", "      public.t: {mode: merge, key: [id], cursor: xmin}"]
    path = world.document({})
    lines = path.read_text().splitlines()
    lines = lines[: lines.index("connections:") + 1]
    for name, overlap in zip(NAMES, ("buffer_one", "skip", "cancel_other"), strict=True):
        schedule = json.dumps({"every": "1h", "overlap": overlap})
        lines += [
            f"  {name}:",
            *("    source: shop", "    destination: lake", f"    schedule: {schedule}"),
            *("    target: {schema: acme}", *streams),
        ]
    path.write_text("\n".join(lines))
    world.account()
    make_so(world.cli, path, write=True)


@pytest.fixture
def machine(world: World) -> Iterator[type[RunControlMachine]]:
    several_connections(world)
    world.control.act("UPDATE account_queues SET runs_max = :n", n=ACCOUNT_CAP)
    world.control.act("UPDATE resource_queues SET runs_max = :n", n=RESOURCE_CAP)
    with world.control.admin_engine().begin() as tx:
        run_script(tx, WATCH)
    link = open_link(world.control.url, "worker")
    yield type("Machine", (RunControlMachine,), {"world": world, "link": link})
    link.close()


def _play(machine: type[RunControlMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.explicit, Phase.generate],
        ),
    )


def test_run_control_keeps_its_invariants_whatever_comes_in_whatever_order(machine):
    _play(machine, examples=30, steps=25)


@pytest.mark.full
def test_run_control_keeps_its_invariants_in_many_more_and_longer_stories(machine):
    _play(machine, examples=300, steps=60)
