"""How attempts end: success is default-deny, errors say who can act."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from queue import Queue
from threading import Event, Timer
from threading import enumerate as enumerate_threads
from time import monotonic, sleep
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import (
    ConfigError,
    CredentialsError,
    Deferral,
    Draining,
    GuardTripped,
    LeaseLost,
    RunCancelled,
    SyncwardError,
    TransientError,
)
from schemas.limits import DEFERRAL_SHORTEST, DEFERRAL_SPREAD, DEFERRED_MAX, RETRY_LONGEST
from schemas.records import StreamResult
from schemas.runs import (
    FINAL_STATES,
    LIVE_STATES,
    MOVES,
    Claim,
    OutcomeKind,
    RunKind,
    RunOptions,
    RunState,
)
from storage.logs import LogLine
from workers import outcomes
from workers.control import RunControl
from workers.run_log import LogWriter, RunLog


def claim(attempts_without_progress: int = 1, attempt: int = 1) -> Claim:
    return Claim(
        run_id=uuid4(), account_id=uuid4(), kind=RunKind.SYNC, subject_id=uuid4(), attempt=attempt,
        attempts_without_progress=attempts_without_progress, fence=1, token=uuid4(),
        options=RunOptions(), lease=timedelta(seconds=30),
    )  # fmt: skip


def lines():
    kept: list[LogLine] = []
    return RunLog(LogWriter(kept.extend), uuid4(), uuid4()), kept


def outcome_of(error: Exception, **spec):
    run_log, _ = lines()
    return outcomes.of_error(error, claim(**spec), run_log)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ConfigError("x"), OutcomeKind.FAILED, "config"),
        (CredentialsError("x"), OutcomeKind.FAILED, "credentials"),
        (TransientError("x"), OutcomeKind.RETRY, "transient"),
        (GuardTripped("x"), OutcomeKind.AWAITING_APPROVAL, "guard"),
        (RunCancelled("x"), OutcomeKind.CANCELLED, "cancelled"),
        (Draining("x"), OutcomeKind.HANDED_BACK, "draining"),
        (LeaseLost("x"), OutcomeKind.HANDED_BACK, "lease_lost"),
        (Deferral("x", retry_after=timedelta(0)), OutcomeKind.DEFERRED, "deferred"),
        (SyncwardError("x", code="rows_missing"), OutcomeKind.FAILED, "rows_missing"),
        (SyncwardError("control database: unexpected answer"), OutcomeKind.FAILED, "internal"),
        (ZeroDivisionError("secret-in-message"), OutcomeKind.FAILED, "internal"),
    ],
)
def test_errors_are_classified_by_who_can_act(error, kind, code):
    outcome = outcome_of(error)
    assert (outcome.kind, outcome.error_code) == (kind, code)


def test_an_internal_error_shows_its_message_in_the_runs_log_only_as_a_debug_line():
    writer_lines: list[LogLine] = []
    writer = LogWriter(writer_lines.extend)
    outcome = outcomes.of_error(ValueError("pass-word"), claim(), RunLog(writer, uuid4(), uuid4()))
    writer.flush()
    shown = [x.message for x in writer_lines if x.level != "debug"]
    assert "pass-word" not in (outcome.error or "") + "".join(shown)
    assert "ValueError" in writer_lines[0].message
    assert [x.message for x in writer_lines if x.level == "debug"] == ["ValueError: pass-word"]


def test_the_fifth_attempt_without_progress_is_the_last():
    assert outcome_of(TransientError("x"), attempts_without_progress=4).kind is OutcomeKind.RETRY
    assert outcome_of(TransientError("x"), attempts_without_progress=5).kind is OutcomeKind.FAILED
    late = outcome_of(TransientError("x"), attempts_without_progress=1, attempt=20)
    assert late.kind is OutcomeKind.FAILED


@given(st.integers(1, 40))
def test_the_delay_grows_and_is_capped(attempts):
    delay = outcomes.backoff(attempts)
    assert timedelta(seconds=7) < delay <= RETRY_LONGEST


def result(**counts) -> StreamResult:
    return StreamResult(**{"stream": "public.t", "state": "succeeded", "mode": "merge", **counts})


def test_success_needs_every_stream_and_every_row():
    good = result(rows_extracted=3, rows_loaded=3, rows_inserted=3)
    assert outcomes.of_streams([good], wanted=1).kind is OutcomeKind.SUCCEEDED
    assert outcomes.of_streams([good], wanted=2).error_code == "incomplete"
    short = result(rows_extracted=3, rows_loaded=2, rows_inserted=2)
    assert outcomes.of_streams([short], wanted=1).error_code == "rows_missing"
    rejected = result(rows_extracted=3, rows_loaded=2, rows_inserted=2, rows_rejected=1)
    assert outcomes.of_streams([rejected], wanted=1).kind is OutcomeKind.SUCCEEDED
    failed = result(state="failed", error="no table")
    assert "no table" in (outcomes.of_streams([good, failed], wanted=2).error or "")


STATES = st.sampled_from(["succeeded", "failed", "skipped", "cancelled"])
COUNTS = st.integers(0, 3)


@given(
    st.lists(st.tuples(STATES, COUNTS, COUNTS, COUNTS), max_size=4),
    st.integers(0, 4),
)
def test_success_is_denied_unless_everything_wanted_is_complete_and_counted(streams, wanted):
    results = [
        result(
            stream=f"public.t{n}", state=state, rows_extracted=e, rows_loaded=lo, rows_rejected=r
        )
        for n, (state, e, lo, r) in enumerate(streams)
    ]
    outcome = outcomes.of_streams(results, wanted=wanted)
    complete = len(results) == wanted and all(
        r.state == "succeeded" and r.rows_loaded == r.rows_extracted - r.rows_rejected
        for r in results
    )
    assert (outcome.kind is OutcomeKind.SUCCEEDED) == complete
    if not complete:
        assert outcome.kind is OutcomeKind.FAILED
        assert outcome.error_code in {"streams", "incomplete", "rows_missing"}
        assert outcome.error


def test_work_that_succeeds_after_a_signal_is_not_a_success_of_a_run_that_was_told_to_stop():
    control, (run_log, _) = RunControl(claim()), lines()

    def work():
        control.signal(RunCancelled("Cancelled."))
        return outcomes.of_streams([result()], wanted=1)

    outcome = outcomes.of_attempt(work, control.claim, control, run_log)
    assert outcome.kind is OutcomeKind.CANCELLED
    assert [s.state for s in outcome.streams] == ["succeeded"]


@given(st.timedeltas(timedelta(0), timedelta(hours=30)), st.timedeltas(timedelta(0), DEFERRED_MAX))
def test_deferrals_wait_as_told_and_are_bounded_in_all(told, so_far):
    held = replace(claim(), deferred_for=so_far)
    outcome = outcomes.of_error(Deferral("x", retry_after=told), held, lines()[0])
    if max(told, DEFERRAL_SHORTEST) + so_far > DEFERRED_MAX:
        assert (outcome.kind, outcome.error_code) == (OutcomeKind.FAILED, "deferred_too_long")
    else:
        assert outcome.kind is OutcomeKind.DEFERRED
        assert outcome.retry_after is not None
        held_for = max(told, DEFERRAL_SHORTEST)
        late = outcome.retry_after - held_for
        assert timedelta(0) <= late <= max(0.11 * held_for, min(held_for, DEFERRAL_SPREAD))


def test_a_deferral_is_said_at_once_to_somebody_who_waits_at_a_prompt():
    held = replace(claim(), deadline=datetime.now(UTC))
    outcome = outcomes.of_error(Deferral("x", retry_after=timedelta(0)), held, lines()[0])
    assert outcome.kind is OutcomeKind.FAILED


def test_a_signal_is_the_reason_whatever_the_cancelled_call_raised():
    control, (run_log, _) = RunControl(claim()), lines()

    def work():
        control.signal(RunCancelled("Cancelled."))
        raise TransientError("the query was cancelled there")

    outcome = outcomes.of_attempt(work, control.claim, control, run_log)
    assert outcome.kind is OutcomeKind.CANCELLED


def test_a_signal_ends_calls_registered_before_and_after_it():
    control = RunControl(claim())
    ended: Queue[str] = Queue()
    control.on_signal(lambda: ended.put("before"), lambda: None)
    control.signal(LeaseLost("gone"))
    assert ended.get(timeout=10) == "before"
    control.signal(RunCancelled("too late"))
    control.on_signal(lambda: ended.put("after"), lambda: None)
    assert ended.get(timeout=10) == "after"
    with pytest.raises(LeaseLost):
        control.check()


def test_a_connection_that_hangs_is_left_behind_and_closed_should_it_ever_open():
    control, answers, closed = RunControl(claim()), Event(), Event()

    def connect() -> str:
        answers.wait(30)
        return "session"

    Timer(0.2, control.signal, (RunCancelled("Cancelled."),)).start()
    started = monotonic()
    with pytest.raises(RunCancelled):
        control.opened(control.opening(connect), lambda _: closed.set())
    assert monotonic() - started < 5
    assert not closed.is_set()
    answers.set()
    assert closed.wait(5)
    control.ended()


def test_what_connecting_raises_is_raised_where_it_was_asked_for():
    def connect() -> str:
        raise CredentialsError("refused")

    control = RunControl(claim())
    with pytest.raises(CredentialsError):
        control.opened(control.opening(connect), lambda _: None)


def test_a_run_that_ended_in_time_is_neither_cut_nor_given_up():
    control, seen = RunControl(claim()), []
    before = set(enumerate_threads())
    control.on_signal(control.ended, lambda: seen.append("cut"))
    control.on_give_up(lambda _: seen.append("given up"))
    control.signal(RunCancelled("Cancelled."))
    sleep(1.5)
    assert seen == []
    assert set(enumerate_threads()) <= before


def test_a_worker_that_cannot_renew_stops_by_itself():
    stale = Claim(**{**{f: getattr(claim(), f) for f in Claim.__slots__}, "lease": timedelta(0)})
    with pytest.raises(LeaseLost):
        RunControl(stale).check()


def test_final_states_have_no_way_out_and_every_state_is_reached():
    assert {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED} == FINAL_STATES
    reached = {target for targets in MOVES.values() for target in targets}
    assert reached | {RunState.QUEUED} == set(RunState)
    assert all(MOVES[state] for state in LIVE_STATES)


def test_two_wishes_merge_into_the_wider_one():
    one, two = RunOptions(streams=("a", "b")), RunOptions(streams=("b", "c"), full_refresh=True)
    assert one.merged(two) == RunOptions(streams=("a", "b", "c"), full_refresh=True)
    assert one.merged(RunOptions()).streams == ()
