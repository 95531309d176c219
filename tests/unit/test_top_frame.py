"""A frame of `top` fits its terminal, names what is wrong, and tells honest rates."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import top_frame
from cli.top_frame import Rates
from schemas.errors import ConfigError, TransientError
from schemas.runs import Rule
from storage.overview import Overview, RunningLine, WaitingLine, WorkerLine

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
WORKER = WorkerLine("host-1-abcdef", "0.1.0", 4, 2, draining=False, seen_seconds=1.0)
RUNNING = RunningLine(
    run_id=UUID(int=1), account="acme", subject="shop-to-lake", kind="sync", attempt=1,
    worker_id="w1", stream="public.orders", rows=1_000, bytes=80_000, rows_before=0, seconds=10.0,
    moved_at=NOW, cancelling=False,
)  # fmt: skip
WAITING = WaitingLine(
    UUID(int=2), "acme", "shop-to-lake", "sync", 0, 65.0, Rule.ACCOUNT_CAP, "10 of 10 runs"
)
WELL = Overview(
    at=NOW,
    queue_depth={"queued": 1, "delayed": 0, "dispatched": 0, "running": 1, "awaiting_approval": 0},
    oldest_seconds=65.0, lateness_seconds=0.0, redis_up=True, schedulers=1, paused=False,
    paused_reason=None, slots=4, workers=[WORKER], running=[RUNNING], waiting=[WAITING],
)  # fmt: skip


def drawn(frame: Overview, width: int = 80, height: int = 24) -> list[str]:
    rates = Rates()
    rates.note(frame)
    return [text for text, _ in top_frame.lines(frame, rates, width, height)]


@given(
    counts=st.tuples(st.integers(0, 30), st.integers(0, 50), st.integers(0, 50)),
    width=st.integers(80, 200),
    height=st.integers(12, 60),
    name=st.text(max_size=100),
)
def test_a_frame_fits_its_terminal(counts, width, height, name):
    workers, running, waiting = counts
    frame = replace(
        WELL,
        workers=[WORKER] * workers,
        running=[replace(RUNNING, subject=name, stream=name, run_id=UUID(int=n))
                 for n in range(running)],
        waiting=[replace(WAITING, subject=name, sentence=name)] * waiting,
        queue_depth={**WELL.queue_depth, "queued": waiting, "running": running},
    )  # fmt: skip
    lines = drawn(frame, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for line in lines for c in line)


def test_a_small_terminal_shows_some_of_each_and_how_many_are_left():
    frame = replace(
        WELL,
        running=[replace(RUNNING, run_id=UUID(int=n)) for n in range(20)],
        waiting=[WAITING] * 20,
        queue_depth={**WELL.queue_depth, "queued": 1_000_000, "running": 200},
    )
    text = "\n".join(drawn(frame))
    assert text.count("public.orders") >= 4
    assert text.count("account_cap") >= 4
    assert "RUNNING (200)" in text
    assert "WAITING (1000000)" in text
    assert "… and 19" in text


def test_all_that_is_well_is_said_in_three_lines():
    lines = drawn(WELL)
    assert lines[0].startswith("syncward  12:00:00 UTC   Redis up   schedulers 1   workers 1")
    assert lines[1] == "queue     1 ready, 0 delayed, 0 sent, 1 running, 0 await approval"
    assert lines[2] == "oldest    1m05s   late by 0s"
    assert lines[3] == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"redis_up": False}, "Redis does not answer"),
        ({"schedulers": 0}, "no scheduler is running"),
        ({"workers": []}, "no worker takes runs"),
        ({"workers": [replace(WORKER, draining=True)]}, "no worker takes runs"),
        ({"paused": True, "paused_reason": "new disks"}, "drained (new disks)"),
    ],
)
def test_what_is_wrong_is_said_first(change, said):
    rates = Rates()
    lines = top_frame.lines(replace(WELL, **change), rates, 80, 24)
    assert [style for text, style in lines[3:4] if said in text] == ["bad"]


def test_the_rate_is_first_the_whole_runs_then_what_the_last_heartbeats_say():
    rates = Rates()

    def note(after: float, moved: float, rows: int, stream: str = "public.orders") -> float:
        run = replace(
            RUNNING, rows=rows, rows_before=500, stream=stream, seconds=10 + after,
            moved_at=NOW + timedelta(seconds=moved),
        )  # fmt: skip
        rates.note(replace(WELL, at=NOW + timedelta(seconds=after), running=[run]))
        return rates.of(run)

    assert note(0, 0, 1_000) == 150  # 1,500 rows in 10 s
    assert note(1, 0, 1_000) == 150  # nothing new was heard
    assert note(3, 3, 7_000) == 2_000
    assert note(5, 3, 7_000) == 2_000
    assert note(12, 3, 7_000) == 0  # three heartbeats without a row
    rates.note(replace(WELL, running=[]))
    assert rates.of(RUNNING) == 0


def test_a_database_that_is_away_leaves_the_last_frame_and_says_so():
    from cli import top

    answers: list[Overview | TransientError] = [
        WELL,
        TransientError("control database: not reachable"),
        replace(WELL, schedulers=7),
    ]

    def look() -> Overview:
        answer = answers.pop(0)
        if isinstance(answer, TransientError):
            raise answer
        return answer

    frame = top._frames(look, WELL, Rates())
    assert frame(80, 24)[0][1] == "head"
    away = frame(80, 24)
    assert away[0] == ("as of 12:00:00: control database: not reachable", "bad")
    assert len(away) <= 24
    assert away[1][0].startswith("syncward")
    assert "schedulers 7" in frame(80, 24)[0][0]


def test_an_error_that_time_does_not_heal_ends_it():
    from cli import top

    def refuse() -> Overview:
        raise ConfigError("not migrated")

    with pytest.raises(ConfigError):
        top._frames(refuse, WELL, Rates())(80, 24)
