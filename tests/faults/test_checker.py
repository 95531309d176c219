"""A test of the checker: for each invariant a story that is green, and red without its guard.

A guard is really removed (its words are cut out of the statement on its way to the database, or the
function that holds it is replaced), and the same story is played again; nothing is red but the
invariant that the guard keeps. Only the altered audit event is made by corrupting a row: no code
of ours could do that.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple
from uuid import UUID, uuid4

import psycopg
import pytest
from prometheus_client import generate_latest
from sqlalchemy import event

from connectors import registry
from connectors.postgres import link as postgres
from connectors.postgres import state as pg_state
from scheduler import ticks
from schemas.errors import ConfigError, LeaseLost, SyncwardError
from schemas.records import LoadRequest, WireFormat
from schemas.redaction import REDACTOR
from schemas.runs import Claim, Outcome, OutcomeKind, RunKind, RunOptions, RunState
from schemas.streams import StreamSpec
from storage import accounts, claims, due, runs
from storage.engine import transaction
from storage.logs import LogLine
from storage.runs import Subject
from tests.faults import checker, recording
from tests.faults.history import Facts, History, Kill, Stream
from tests.world import LOOSE, OPERATOR
from workers import metrics, outcomes, run_sync
from workers.records import write_sealed

pytestmark = pytest.mark.integration

STREAMS = {
    "public.t": "{mode: merge, key: [id], cursor: xmin}",
    "public.log": "{mode: append, cursor: xmin}",
    "public.whole": "{mode: replace}",
}
ROW_VALUE = "4111-1111-a-customers-own-number"
SECOND = timedelta(seconds=1)


@pytest.fixture
def shop(world):
    for table in ("t", "log", "whole"):
        world.pair.source(
            f"CREATE TABLE {table} (id int PRIMARY KEY, v text)",
            f"INSERT INTO {table} SELECT g, 'v' || g FROM generate_series(1, 20) g",
        )
    world.apply(STREAMS)
    world.step()
    with psycopg.connect(world.control.admin_url, autocommit=True) as control:
        recording.record_moves(control)
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    recording.record_commits(world.pair.session("destination"))
    return world


def violated(shop, facts: Facts) -> dict[str, list[str]]:
    facts.keyring = facts.keyring or Path(shop.cli.settings.keyring)
    (connection,) = shop.control.all("SELECT id FROM connections WHERE name = 'shop-to-lake'")[0]
    streams = []
    for table in ("t", "log", "whole"):
        here, there = shop.pair.content("source", table), shop.pair.content("destination", table)
        surplus = len(there) - len(set(there)) + len(set(there) - set(here))
        streams.append(Stream(connection, table, len(set(here) - set(there)), surplus))
    with (
        psycopg.connect(shop.control.admin_url, autocommit=True) as control,
        shop.pair.connect("destination") as lake,
    ):
        return checker.check(History(control, [lake], streams), facts)


@contextmanager
def rewritten(shop, *changes: tuple[str, str]) -> Iterator[None]:
    """Change statements on their way to the control database; each change must have been met."""
    met = dict.fromkeys((pattern for pattern, _ in changes), 0)

    def change(_c, _cursor, statement, parameters, _context, _many):
        for pattern, replacement in changes:
            statement, n = re.subn(pattern, replacement, statement)
            met[pattern] += n
        return statement, parameters

    engines = (shop.deps.engine, shop.scheduler.engine, shop.cli.engine)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", change, retval=True)
    try:
        yield
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", change)
    assert all(met.values()), f"the guard is worded differently now: {met}"


def no_sql(*changes: tuple[str, str]):
    return lambda shop, _patch: rewritten(shop, *changes)


@contextmanager
def patched(patch, target: object, name: str, value: object) -> Iterator[None]:
    assert getattr(target, name) != value, "the guard is worded differently now"
    with patch.context() as inner:
        inner.setattr(target, name, value)
        yield


def claimed(shop, lease: timedelta = timedelta(seconds=30)) -> Claim:
    shop.enqueue()
    (job,) = shop.dispatch()
    with transaction(shop.deps.engine) as tx:
        claim = claims.claim(tx, job, "w1", lease, shop.deps.principal)
    assert isinstance(claim, Claim)
    return claim


def finish(shop, claim: Claim, kind: OutcomeKind, code: str | None = None) -> None:
    with transaction(shop.deps.engine) as tx:
        claims.finish(tx, claim, Outcome(kind, code), shop.deps.principal)


def reap_until(shop, run_id: UUID, state: RunState, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while shop.run(run_id).state is not state:
        ticks.reap_tick(shop.scheduler)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lose(shop, claim: Claim) -> None:
    shop.expire_leases()
    reap_until(shop, claim.run_id, RunState.QUEUED)


def others(shop, account_name: str, count: int) -> list[UUID]:
    """Ask for runs of further subjects of an account: they are dispatched, not executed."""
    with shop.cli.transaction() as tx:
        account = accounts.resolve(tx, account_name).account_id
        return [
            runs.enqueue(
                tx,
                Subject(uuid4(), account, uuid4(), uuid4()),
                RunKind.SYNC,
                RunOptions(),
                OPERATOR,
            ).run_id
            for _ in range(count)
        ]


def cancel(shop, run_id: UUID) -> None:
    with shop.cli.transaction() as tx:
        runs.cancel(tx, run_id, OPERATOR)


# ── the stories: what happens, with and without the guard ────────────────────────────────────


def slots_pass_while_no_scheduler_runs(shop, facts: Facts) -> None:
    shop.apply(STREAMS, schedule="{every: 1s}")
    shop.control.act("DELETE FROM slots")
    ((connection, begin),) = shop.control.all(
        "UPDATE schedules SET anchor_at = now() - interval '9 s', "
        "next_due_at = now() - interval '5 s' RETURNING connection_id, next_due_at"
    )
    assert ticks.due_tick(shop.scheduler) == 1
    facts.windows[connection] = (begin, shop.control.one("SELECT next_due_at FROM schedules"))
    shop.step()


def a_run_comes_and_goes(shop, _: Facts) -> None:
    shop.enqueue()
    shop.step()


def a_load_is_repeated_because_its_answer_was_lost(shop, _: Facts) -> None:
    def twice(_attempt, request, source, destination):
        known = destination.claim_stream(request)
        if known.result is not None:
            return known.result
        name, result = request.stream.name, None
        expected = destination._expected[name]
        for _time in range(2):
            destination._expected[name] = expected
            with source.extract(request.stream, known.cursor) as batches:
                for batch in batches:
                    result = destination.load(request, batch)
        return result

    shop.pair.source("INSERT INTO log SELECT max(id) + 1, 'more' FROM log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_sync, "_move", twice)
        shop.enqueue()
        for _stream in range(len(STREAMS) + 1):  # each refused load hands the run back
            shop.step()


def a_run_is_lost_once(shop, _: Facts) -> None:
    lose(shop, claimed(shop))
    shop.step()


def a_zombie_commits_after_the_new_owner(shop, _: Facts) -> None:
    claim = claimed(shop)
    spec = StreamSpec(name="public.whole", mode="replace")
    request = LoadRequest(
        connection_id=claim.subject_id, run_id=claim.run_id, attempt=1, fence=claim.fence,
        stream=spec, target_schema="acme", rewrite=False,
    )  # fmt: skip
    source = registry.open_source(
        "postgres", shop.pair.config("source"), shop.pair.secret("source"), LOOSE
    )
    lake = registry.open_destination(
        "postgres", shop.pair.config("destination"), shop.pair.secret("destination"), LOOSE
    )
    known = lake.claim_stream(request)
    lose(shop, claim)
    shop.step()
    with suppress(LeaseLost), source.extract(spec, known.cursor, WireFormat.PG_BINARY) as batches:
        for batch in batches:
            lake.load(request, batch)
    source.close()
    lake.close()


def a_job_is_delivered_twice(shop, _: Facts) -> None:
    shop.enqueue()
    (job,) = shop.dispatch()
    claims_ = [c for c in (shop.claim(job), shop.claim(job)) if isinstance(c, Claim)]
    for claim in claims_:
        with suppress(LeaseLost):
            finish(shop, claim, OutcomeKind.SUCCEEDED)


def an_account_has_more_work_than_its_plan_allows(shop, _: Facts) -> None:
    if not shop.control.all("SELECT FROM accounts WHERE name = 'tiny'"):
        shop.account("tiny")
        shop.control.act(
            "UPDATE account_queues SET runs_max = 1 WHERE account_id = "
            "(SELECT id FROM accounts WHERE name = 'tiny')"
        )
    asked = others(shop, "tiny", 3)
    shop.dispatch()
    for run in asked:
        cancel(shop, run)


def a_zombie_ends_the_run_that_was_taken_from_it(shop, _: Facts) -> None:
    claim = claimed(shop)
    lose(shop, claim)
    with suppress(LeaseLost):
        finish(shop, claim, OutcomeKind.SUCCEEDED)
    shop.step()


def an_idle_account_gets_work(shop, _: Facts) -> None:
    shop.dispatch()  # a look that finds nothing: from now on the account is not looked at
    shop.enqueue()
    shop.step()


def a_worker_is_killed(shop, facts: Facts) -> None:
    facts.lease, facts.tick, facts.slack = SECOND / 2, SECOND / 10, SECOND
    claim = claimed(shop, facts.lease)
    facts.kills.append(Kill("w1", datetime.now(UTC)))
    reap_until(shop, claim.run_id, RunState.QUEUED)
    cancel(shop, claim.run_id)


def a_worker_drains(shop, _: Facts) -> None:
    finish(shop, claimed(shop), OutcomeKind.HANDED_BACK, "draining")
    shop.step()


def an_operator_cancels(shop, facts: Facts) -> None:
    facts.cancel_bound = facts.slack = SECOND / 2
    claim = claimed(shop)
    cancel(shop, claim.run_id)
    with shop.deps.heartbeat.hold(claim) as control:
        for _beat in range(30):
            shop.deps.heartbeat.beat()
            if control.signalled:
                finish(shop, claim, OutcomeKind.CANCELLED, "cancelled")
                return
            time.sleep(0.05)
        finish(shop, claim, OutcomeKind.SUCCEEDED)


def three_accounts_have_a_backlog(shop, facts: Facts) -> None:
    names = ("ada", "bob", "cyd")
    for name in names:
        if not shop.control.all("SELECT FROM accounts WHERE name = :n", n=name):
            shop.account(name)
        others(shop, name, 8)
    facts.equals = {
        row[0] for row in shop.control.all(
            "SELECT id FROM accounts WHERE name = ANY(:names)", names=list(names)
        )
    }  # fmt: skip
    facts.turns_min = 5
    one = replace(
        shop.scheduler, settings=shop.scheduler.settings.model_copy(update={"runs_max": 1})
    )
    for _turn in range(24):
        assert ticks.dispatch_tick(one) == 1
        (job,) = shop.jobs.take()
        cancel(shop, job.run_id)


def a_row_is_refused_by_the_destination(shop, facts: Facts) -> None:
    facts.secrets = {"a customer's number": ROW_VALUE}
    table = f"dup{shop.control.one('SELECT count(*) FROM runs')}"
    shop.pair.source(
        f"CREATE TABLE {table} (id int PRIMARY KEY, v text)",
        f"INSERT INTO {table} VALUES (1, '{ROW_VALUE}')",
    )
    shop.apply({**STREAMS, f"public.{table}": "{mode: merge, key: [id]}"})
    shop.sync()
    shop.pair.session("destination").execute(f"CREATE UNIQUE INDEX ON acme.{table} (v)")
    shop.pair.source(f"INSERT INTO {table} VALUES (2, '{ROW_VALUE}')")
    run, _ = shop.sync()
    assert run.state is RunState.FAILED


def an_attempt_ends_with_a_code_of_its_own(shop, facts: Facts) -> None:
    codes: list[str] = []
    honest = outcomes.of_attempt

    def leaking(work, claim, control, run_log):
        codes.append(str(claim.run_id))
        return replace(honest(work, claim, control, run_log), error_code=codes[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcomes, "of_attempt", leaking)
        shop.enqueue()
        shop.step()
    facts.scrapes = [generate_latest().decode()]
    assert len(codes) == 1
    with suppress(KeyError):  # as for the tests after this one
        metrics.RUN_ATTEMPTS.remove(codes[0])


def a_message_is_lost(shop, facts: Facts) -> None:
    facts.dispatch_deadline, facts.tick, facts.slack = SECOND / 4, SECOND / 10, SECOND
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ticks, "DISPATCH_DEADLINE", facts.dispatch_deadline)
        asked = shop.enqueue()
        assert len(shop.dispatch()) == 1
        reap_until(shop, asked.run_id, RunState.QUEUED)
    shop.step()


# ── the guards: what is taken away ───────────────────────────────────────────────────────────


def a_ledger(_shop, patch):
    return patched(patch, due, "_ledger", lambda _tx, _slots: None)


def the_cursor_in_the_destinations_commit(_shop, patch):
    text = pg_state._COMMIT.replace("\n  AND cursor IS NOT DISTINCT FROM %(expected)s", "")
    return patched(patch, pg_state, "_COMMIT", text)


def the_fence_in_the_destinations_commit(_shop, patch):
    text = pg_state._COMMIT.replace(" AND fence = %(fence)s", "")
    text = text.replace("SET cursor", "SET fence = %(fence)s, cursor")
    return patched(patch, pg_state, "_COMMIT", text)


def waking_the_account(_shop, patch):
    return patched(patch, runs, "wake_account", lambda _tx, *_ids: None)


def cancel_in_the_heartbeat(_shop, patch):
    text = claims._BEAT.replace("a.cancel_requested_at IS NOT NULL", "false")
    return patched(patch, claims, "_BEAT", text)


@contextmanager
def the_audit_trigger(shop, patch):
    with patch.context() as inner:
        inner.setattr("storage.dispatch.audit", SimpleNamespace(append=lambda *_: None))
        shop.enqueue()
        with pytest.raises(SyncwardError, match="unaudited"):
            shop.dispatch()  # this is the guard
        shop.control.act_plainly("ALTER TABLE active_runs DISABLE TRIGGER audited_state")
        yield


@contextmanager
def our_words_for_a_drivers_errors(_shop, patch):
    """Both walls: our own words, and the sink, which masks what a server says of a row."""
    with (
        patched(patch, postgres, "explain", lambda error, _config, _role: ConfigError(str(error))),
        patched(patch, REDACTOR, "text", lambda text, limit=None: text[:limit]),
    ):
        yield


def the_closed_set_of_codes(_shop, patch):
    return patched(patch, metrics, "closed", lambda value, _known: value)


class Story(NamedTuple):
    invariant: str
    play: Callable[..., None]
    guard: Callable[..., AbstractContextManager[None]]


STORIES = {
    "a slot is not written into the ledger": Story(
        "I1", slots_pass_while_no_scheduler_runs, a_ledger
    ),
    "an ended run leaves no history": Story(
        "I2",
        a_run_comes_and_goes,
        no_sql((r"kept AS \(INSERT INTO runs[\s\S]*? FROM gone g\), ", "")),
    ),
    "a commit does not ask where the cursor stands": Story(
        "I3", a_load_is_repeated_because_its_answer_was_lost, the_cursor_in_the_destinations_commit
    ),
    "the fence is not raised for a second attempt": Story(
        "I4",
        a_run_is_lost_once,
        no_sql((r"fence = s\.fence \+ 1 FROM", "fence = s.fence + (mine.attempt = 1)::int FROM")),
    ),
    "a commit does not compare its fence": Story(
        "I4", a_zombie_commits_after_the_new_owner, the_fence_in_the_destinations_commit
    ),
    "a claim does not compare the state": Story(
        "I5",
        a_job_is_delivered_twice,
        no_sql(
            (r"state = 'dispatched' AND (dispatch = )", r"\1"),
            (
                r"(INSERT INTO leases [\s\S]*? FROM mine)\)",
                r"\1 ON CONFLICT (run_id) DO UPDATE SET token = excluded.token)",
            ),
        ),
    ),
    "dispatch does not count what is busy": Story(
        "I6",
        an_account_has_more_work_than_its_plan_allows,
        no_sql((r"q\.runs_max - \(", "1000 + 0 * (")),
    ),
    "an end does not compare the lease": Story(
        "I7",
        a_zombie_ends_the_run_that_was_taken_from_it,
        no_sql(
            (
                r"(WHERE run_id = \S+) AND lease_token = \S+ (RETURNING active_runs\.\*)",
                r"\1 \2",
            )
        ),
    ),
    "a request does not wake its account": Story(
        "I8", an_idle_account_gets_work, waking_the_account
    ),
    "the reaper looks too late": Story(
        "I9",
        a_worker_is_killed,
        no_sql((r"l\.expires_at <", "l.expires_at + interval '3 s' <")),
    ),
    "a drain costs an attempt": Story(
        "I10", a_worker_drains, no_sql((r"attempt = attempt - 1, ", ""))
    ),
    "a heartbeat does not say that a run was cancelled": Story(
        "I11", an_operator_cancels, cancel_in_the_heartbeat
    ),
    "the database accepts unaudited changes": Story("I12", a_run_comes_and_goes, the_audit_trigger),
    "a turn is not charged": Story(
        "I13",
        three_accounts_have_a_backlog,
        no_sql((r"vtime = q\.vtime \+ u\.n / q\.weight", "vtime = q.vtime")),
    ),
    "a driver's words are shown": Story(
        "I14", a_row_is_refused_by_the_destination, our_words_for_a_drivers_errors
    ),
    "an end leaves its lease": Story(
        "I15",
        a_run_comes_and_goes,
        no_sql(
            (
                r"unleased AS \(DELETE FROM leases WHERE token = \S+ RETURNING 1\)",
                "unleased AS (SELECT 1)",
            )
        ),
    ),
    "a label takes any value": Story(
        "I16", an_attempt_ends_with_a_code_of_its_own, the_closed_set_of_codes
    ),
    "an unanswered dispatch is taken back too late": Story(
        "I17",
        a_message_is_lost,
        no_sql((r"dispatch_deadline <", "dispatch_deadline + interval '3 s' <")),
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_without_its_guard_exactly_this_invariant_is_violated(shop, name, monkeypatch):
    story = STORIES[name]
    facts = Facts()
    story.play(shop, facts)
    assert violated(shop, facts) == {}
    facts = Facts()
    with story.guard(shop, monkeypatch):
        story.play(shop, facts)
    assert set(violated(shop, facts)) == {story.invariant}


def test_every_invariant_has_a_guard_that_is_removed():
    assert {story.invariant for story in STORIES.values()} == set(checker.INVARIANTS)
    assert list(checker.INVARIANTS) == [f"I{n}" for n in range(1, 18)]


def test_an_altered_audit_event_is_found(shop):
    ((part,),) = shop.control.all("SELECT DISTINCT tableoid::regclass::text FROM audit.event")
    shop.control.act_plainly(
        f"ALTER TABLE {part} DISABLE TRIGGER no_change; "
        f"UPDATE {part} SET body = replace(body, 'success', 'failure') WHERE action = 'run.queued'"
    )
    assert set(violated(shop, Facts())) == {"I12"}


def test_a_secret_that_only_an_opened_log_line_holds_is_found(shop):
    """The walls above let it into the error's column, too; here it is in the sealed log alone."""
    run_id, account_id = shop.control.all("SELECT run_id, account_id FROM runs LIMIT 1")[0]
    facts = Facts(secrets={"a customer's number": ROW_VALUE})
    assert violated(shop, facts) == {}
    line = LogLine(run_id, account_id, datetime.now(UTC), "info", None, f"row {ROW_VALUE} came")
    assert write_sealed(shop.deps.engine, shop.deps.records, [line]) == []
    assert violated(shop, facts) == {"I14": ["run_logs, opened: holds a customer's number"]}


def test_records_that_do_not_open_are_no_proof(shop):
    facts = Facts(keyring=shop.directory / "keys" / "worker.json")
    (said,) = violated(shop, facts)["I14"]
    assert "records do not open" in said


def test_a_transaction_that_is_left_open_is_found(shop):
    with shop.deps.engine.begin() as tx:
        tx.exec_driver_sql("SELECT FROM active_runs")
        assert set(violated(shop, Facts())) == {"I15"}
    assert violated(shop, Facts()) == {}


@pytest.mark.parametrize("loss", [0, 0.1, 0.5, 1])
def test_runs_finish_whatever_share_of_messages_is_lost(shop, loss, monkeypatch):
    """All of them lost is Redis gone: everything waits, and goes on when messages arrive again."""
    monkeypatch.setattr(ticks, "DISPATCH_DEADLINE", timedelta(0))
    random = Random(7)
    asked = others(shop, "acme", 12)
    for turn in range(200):
        share = loss if turn < 10 else min(loss, 0.5)
        for job in shop.dispatch():
            claim = shop.claim(job) if random.random() >= share else None
            if isinstance(claim, Claim):
                finish(shop, claim, OutcomeKind.SUCCEEDED)
        ticks.reap_tick(shop.scheduler)
        if not shop.control.one("SELECT count(*) FROM active_runs"):
            break
    ended = shop.control.all("SELECT run_id FROM runs WHERE state = 'succeeded'")
    assert set(asked) <= {run for (run,) in ended}
    assert violated(shop, Facts(dispatch_deadline=timedelta(0))) == {}
