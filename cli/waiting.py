"""Wait for a run and show how it gets on: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import UUID

import click

from cli.context import Cli
from schemas.errors import NotFound, TransientError
from schemas.runs import FINAL_STATES, Run, RunState
from storage import runs

#: Somebody looks at this: often at first, for most questions are answered at once.
_POLL_FIRST_S = 0.04
_POLL_S = 0.2
_SOON_S = 3.0
_LINE_EVERY_S = 5.0


def wait_for_run(cli: Cli, account: str, run_id: UUID, *, patience: timedelta | None = None) -> Run:
    """Return the run when it has ended or awaits approval; TransientError after `patience`."""
    started = time.monotonic()
    deadline = None if patience is None else started + patience.total_seconds()
    with _reporter(cli) as report:
        while True:
            run, text = _look(cli, account, run_id)
            if run is not None and run.state in {*FINAL_STATES, RunState.AWAITING_APPROVAL}:
                return run
            if deadline is not None and time.monotonic() > deadline:
                raise TransientError(
                    f"run {run_id}: no answer yet; are a scheduler and a worker running? "
                    f"Look again with: syncward run show {run_id}"
                )
            report(text)
            soon = time.monotonic() - started < _SOON_S
            time.sleep(_POLL_FIRST_S if soon else _POLL_S)


def _look(cli: Cli, account: str, run_id: UUID) -> tuple[Run | None, str]:
    with cli.inside(f"{account}/") as (tx, _, _name):
        try:
            run = runs.get(tx, run_id)
        except NotFound:
            if runs.promised(tx, run_id):
                return None, "waits for the running run to end"
            raise
        stream, rows, size = runs.progress(tx, run_id)
    text = f"{run.subject_name}: {run.state}"
    if stream:
        text += f", {stream}: {rows:,} rows, {size / 1e6:.1f} MB"
    elif run.error:
        text += f" ({run.error})"
    return run, text


@contextmanager
def _reporter(cli: Cli) -> Iterator[Callable[[str], None]]:
    if cli.json or not sys.stderr.isatty():
        yield _Lines(silent=cli.json)
        return
    from cli.progress import spinner  # noqa: PLC0415 - rich costs a tenth of a second to import

    with spinner("asked for") as show:
        yield show


class _Lines:
    """Plain progress: a line when something changed and the last one is a while ago."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._last = ""
        self._at = time.monotonic() - _LINE_EVERY_S + 1.0  # the first one after a second

    def __call__(self, text: str) -> None:
        if self._silent or text == self._last or time.monotonic() - self._at < _LINE_EVERY_S:
            return
        self._last, self._at = text, time.monotonic()
        click.echo(text, err=True)
