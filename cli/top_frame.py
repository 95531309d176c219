"""One frame of `top` as lines of text; pure: the same on a terminal, in a pipe and in a test."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal
from uuid import UUID

from cli.show import jsonable, plain, short, shortened, table
from storage.overview import Overview, RunningLine, WaitingLine, WorkerLine

Style = Literal["", "head", "good", "bad", "dim"]
Line = tuple[str, Style]

_STREAM_MAX = 20
_WORKERS_MAX = 6


@dataclass(slots=True)
class Rates:
    """Rows per second of each running run: between heartbeats, else over the run so far."""

    _seen: dict[UUID, tuple[str | None, int, datetime]] = field(default_factory=dict)
    _rates: dict[UUID, float] = field(default_factory=dict)

    def note(self, frame: Overview) -> None:
        """Compare with what was seen before; forget runs that are gone."""
        seen, rates = {}, {}
        for run in frame.running:
            rates[run.run_id] = self._rate(run, frame.at)
            seen[run.run_id] = (run.stream, run.rows, run.moved_at)
        self._seen, self._rates = seen, rates

    def _rate(self, run: RunningLine, now: datetime) -> float:
        stream, rows, moved_at = self._seen.get(run.run_id, (None, 0, run.moved_at))
        if stream == run.stream and run.moved_at > moved_at:
            return max(0, run.rows - rows) / (run.moved_at - moved_at).total_seconds()
        if run.run_id in self._rates and (now - run.moved_at).total_seconds() < _QUIET_S:
            return self._rates[run.run_id]
        if run.run_id in self._rates:
            return 0.0
        return (run.rows + run.rows_before) / max(run.seconds, 0.001)

    def of(self, run: RunningLine) -> float:
        """Return rows per second of a run of the last frame."""
        return self._rates.get(run.run_id, 0.0)


#: A run that has moved no row for so long moves none: two heartbeats and a little.
_QUIET_S = 8.0


def lines(frame: Overview, rates: Rates, width: int, height: int) -> list[Line]:
    """Draw a frame of at most `height` lines of at most `width` columns."""
    head = _head(frame)
    workers = _workers(frame.workers, width)
    room = max(4, height - len(head) - len(workers) - 6)  # two blank lines, two titles, two heads
    running_rows = min(len(frame.running), max(room - min(len(frame.waiting), room // 2), 1))
    waiting_rows = max(room - running_rows, 1)
    depth = frame.queue_depth
    running = _section(
        f"RUNNING ({depth['running']})",
        _running(frame.running[:running_rows], rates, width),
        depth["running"] - running_rows,
    )
    waits = depth["queued"] + depth["delayed"]
    waiting = _section(
        f"WAITING ({waits})", _waiting(frame.waiting[:waiting_rows], width), waits - waiting_rows
    )
    drawn = [*head, *workers, *running, *waiting]
    return [(plain(text)[:width], style) for text, style in drawn][:height]


def _head(frame: Overview) -> list[Line]:
    depth = frame.queue_depth
    workers = sum(1 for worker in frame.workers if not worker.draining)
    used = sum(worker.used for worker in frame.workers)
    first = (
        f"syncward  {frame.at:%H:%M:%S} UTC   Redis {'up' if frame.redis_up else 'DOWN'}   "
        f"schedulers {frame.schedulers}   workers {workers}   slots {used}/{frame.slots}"
    )
    queue = (
        f"queue     {depth['queued']:,} ready, {depth['delayed']:,} delayed, "
        f"{depth['dispatched']:,} sent, {depth['running']:,} running, "
        f"{depth['awaiting_approval']:,} await approval"
    )
    late = f"oldest    {_time(frame.oldest_seconds)}   late by {_time(frame.lateness_seconds)}"
    said: list[Line] = [(first, "head"), (queue, ""), (late, "")]
    return [*said, *((text, "bad") for text in _troubles(frame, workers))]


def _troubles(frame: Overview, workers: int) -> list[str]:
    found = []
    if frame.paused:
        found.append(f"drained ({frame.paused_reason}); go on with: syncward drain --end")
    if not frame.schedulers:
        found.append("no scheduler is running; start one: syncward scheduler")
    elif not frame.redis_up:
        found.append("Redis does not answer; nothing is lost, runs start when it is back")
    if not workers:
        found.append("no worker takes runs; start one: syncward worker")
    return found


def _workers(workers: Sequence[WorkerLine], width: int) -> list[Line]:
    rows = [
        (
            w.worker_id,
            w.version,
            f"{w.used}/{w.slots}",
            f"{_time(w.seen_seconds)} ago",
            "draining" if w.draining else "",
        )
        for w in workers[:_WORKERS_MAX]
    ]
    drawn = _table(("WORKER", "VERSION", "SLOTS", "SEEN", "STATE"), rows, width)
    more = len(workers) - _WORKERS_MAX
    rest: list[Line] = [(f"… and {more} more", "dim")] if more > 0 else []
    return [("", ""), *(drawn if rows else []), *rest]


def _running(runs: Sequence[RunningLine], rates: Rates, width: int) -> list[Line]:
    rows = [
        (
            f"{run.account}/{run.subject}",
            shortened(run.stream or run.kind, _STREAM_MAX),
            f"{run.rows:,}",
            f"{short(rates.of(run))}/s",
            f"{short(run.bytes)}B",
            _time(run.seconds),
            "cancelling" if run.cancelling else f"try {run.attempt}" if run.attempt > 1 else "",
        )
        for run in runs
    ]
    return _table(("CONNECTION", "STREAM", "ROWS", "RATE", "SIZE", "TIME", ""), rows, width)


def _waiting(runs: Sequence[WaitingLine], width: int) -> list[Line]:
    rows = [
        (
            shortened(f"{run.account}/{run.subject}", width // 3),
            _time(run.waits_seconds)
            if run.waits_seconds >= 0
            else f"in {_time(-run.waits_seconds)}",
            run.rule.value,
            run.sentence,
        )
        for run in runs
    ]
    return _table(("CONNECTION", "WAITS", "RULE", "BECAUSE"), rows, width)


def _section(title: str, drawn: list[Line], more: int) -> list[Line]:
    rest: list[Line] = [(f"… and {more:,} more", "dim")] if more > 0 and drawn else []
    return [("", ""), (title, "head"), *drawn, *rest]


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int) -> list[Line]:
    if not rows:
        return []
    cells = [[re.sub(r"[\t\n]", "?", str(cell)) for cell in row] for row in rows]
    first, *rest = table(headers, cells, width=width).split("\n")
    return [(first, "dim"), *((line, "") for line in rest)]


def _time(seconds: float) -> str:
    """Return a duration in at most six characters."""
    whole = int(max(0.0, seconds))
    if whole < 60:  # noqa: PLR2004 - seconds of a minute
        return f"{whole}s"
    if whole < 3600:  # noqa: PLR2004 - of an hour
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def document(frame: Overview, rates: Rates) -> dict[str, object]:
    """Return the frame as one document, with the rate of each running run."""
    found = jsonable(frame)
    assert isinstance(found, dict)  # noqa: S101 - a dataclass becomes a dict
    for shown, run in zip(found["running"], frame.running, strict=True):
        shown["rows_per_second"] = round(rates.of(run), 1)
    return found
