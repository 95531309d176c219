"""Wait for a run and show how it gets on: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

import click
from sqlalchemy import Connection

from cli.context import Cli
from cli.show import plain
from schemas.errors import NotFound, TransientError
from schemas.runs import FINAL_STATES, Rule, Run, RunState
from storage import explain, progress, runs
from storage.progress import Progress

#: Somebody looks at this: often at first, for most questions are answered at once.
_POLL_FIRST_S = 0.04
_POLL_S = 0.2
_SOON_S = 3.0
_LINE_EVERY_S = 5.0
#: Asking why a run waits looks at all that wait: not with every look.
_ASK_WHY_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What is shown of a run while it has not ended."""

    name: str
    said: str = ""  # while it moves no rows: what it waits for
    progress: Progress | None = None
    rows_per_second: float | None = None

    @property
    def line(self) -> str:
        """One plain line."""
        if self.progress is None:
            return f"{self.name}: {self.said}"
        seen = self.progress
        parts = [f"{self.name}: {seen.stream} ({seen.number}/{seen.streams}), {seen.rows:,} rows"]
        if self.fraction is not None:
            parts.append(f"{self.fraction:.0%} of about {seen.rows_expected:,}")
        if self.rows_per_second is not None:
            parts.append(f"{self.rows_per_second:,.0f} rows/s")
        return ", ".join([*parts, f"{seen.bytes / 1e6:.1f} MB"])

    @property
    def fraction(self) -> float | None:
        """How much of the stream is done, where an estimate exists and has not proved too small."""
        seen = self.progress
        if seen is None or not seen.rows_expected or seen.rows > seen.rows_expected:
            return None
        return seen.rows / seen.rows_expected


def wait_for_run(cli: Cli, account: str, run_id: UUID, *, patience: timedelta | None = None) -> Run:
    """Return the run when it has ended or awaits approval; TransientError after `patience`."""
    started = time.monotonic()
    deadline = None if patience is None else started + patience.total_seconds()
    watch = _Watch(cli, account, run_id)
    with _reporter(cli) as report:
        while True:
            run, sight = watch.look()
            if run is not None and run.state in {*FINAL_STATES, RunState.AWAITING_APPROVAL}:
                return run
            if deadline is not None and time.monotonic() > deadline:
                raise TransientError(
                    f"run {run_id}: no answer yet; are a scheduler and a worker running? "
                    f"Look again with: syncward run show {run_id}"
                )
            report(sight)
            soon = time.monotonic() - started < _SOON_S
            time.sleep(_POLL_FIRST_S if soon else _POLL_S)


class _Watch:
    """Looks at one run again and again; remembers what makes a rate of rows."""

    def __init__(self, cli: Cli, account: str, run_id: UUID) -> None:
        self._cli = cli
        self._account = account
        self._run_id = run_id
        self._name = "run"
        self._why = ""
        self._asked_at = float("-inf")
        self._stream: tuple[str, float] | None = None  # and when it was seen first
        self._moved: tuple[int, float | None] = (0, None)  # rows, and their rate

    def look(self) -> tuple[Run | None, Sight]:
        """Take one look, in one transaction; no run while the one before it is live."""
        with self._cli.inside(f"{self._account}/") as (tx, _, _name):
            try:
                run = runs.get(tx, self._run_id)
            except NotFound:
                if not runs.promised(tx, self._run_id):
                    raise
                return None, Sight(self._name, self._reason(tx))
            self._name = plain(run.subject_name)
            if run.state in FINAL_STATES:
                return run, Sight(self._name, run.state)
            moved = progress.read(tx, self._run_id) if run.state is RunState.RUNNING else None
            if moved is None:
                return run, Sight(self._name, self._reason(tx))
        return run, replace(Sight(self._name, progress=moved), rows_per_second=self._rate(moved))

    def _reason(self, tx: Connection) -> str:
        """Say which rule holds the run back; asked once a second."""
        if time.monotonic() - self._asked_at < _ASK_WHY_EVERY_S:
            return self._why
        try:
            why = explain.explain(tx, self._run_id, runs_max=self._cli.settings.runs_max)
        except NotFound:  # it moved between two looks
            return self._why
        self._asked_at = time.monotonic()
        verb = "running" if why.rule is Rule.RUNNING else f"waits, {why.rule}"
        self._why = f"{verb}: {plain(why.sentence)}"
        return self._why

    def _rate(self, seen: Progress) -> float | None:
        """Return rows per second of this stream, since it was first seen."""
        now = time.monotonic()
        if self._stream is None or self._stream[0] != seen.stream:
            self._stream, self._moved = (seen.stream, now), (seen.rows, None)
        rows, rate = self._moved
        if seen.rows != rows:
            rate = seen.rows / max(now - self._stream[1], 0.001)
            self._moved = (seen.rows, rate)
        return rate


@contextmanager
def _reporter(cli: Cli) -> Iterator[Callable[[Sight], None]]:
    if cli.json or not sys.stderr.isatty():
        yield _Lines(silent=cli.json)
        return
    from cli.progress import bar  # noqa: PLC0415 - rich costs a tenth of a second to import

    with bar() as show:
        yield lambda sight: show(_words(sight), *_numbers(sight))


def _words(sight: Sight) -> str:
    if sight.progress is None:
        return sight.line
    seen = sight.progress
    return f"{plain(seen.stream)} {seen.number}/{seen.streams}"


def _numbers(sight: Sight) -> tuple[int | None, int | None, float | None]:
    """Return (rows, how many there will be, rows per second)."""
    if sight.progress is None:
        return None, None, None
    expected = None if sight.fraction is None else sight.progress.rows_expected
    return sight.progress.rows, expected, sight.rows_per_second


class _Lines:
    """Plain progress: a line when something changed and the last one is a while ago."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._last = ""
        self._at = time.monotonic() - _LINE_EVERY_S + 1.0  # the first one after a second

    def __call__(self, sight: Sight) -> None:
        text = sight.line
        if self._silent or text == self._last or time.monotonic() - self._at < _LINE_EVERY_S:
            return
        self._last, self._at = text, time.monotonic()
        click.echo(text, err=True)
