"""Live views on a terminal. Only who draws imports this: rich takes a tenth of a second."""

import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.table import Column
from rich.text import Text

from cli.show import short

#: A frame per second, less often where the database is slow: looking costs a tenth of it at most.
FRAME_S = 1.0
_SHARE = 10

_STYLES = {"": "", "head": "bold", "good": "green", "bad": "bold red", "dim": "dim"}


def live(frame: Callable[[int, int], Sequence[tuple[str, str]]]) -> None:
    """Redraw until somebody presses q or Ctrl-C; `frame` gets (columns, lines)."""
    console = Console(highlight=False)
    screen = Live(console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), _keys() as pressed, screen:
        while True:
            started = time.monotonic()
            drawn = Text("\n").join(
                Text(text, _STYLES[style], no_wrap=True)
                for text, style in frame(console.width, console.height)
            )
            screen.update(drawn, refresh=True)
            if pressed(max(FRAME_S, _SHARE * (time.monotonic() - started))) in {"q", "Q"}:
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Read single keys; the terminal is as before when the block ends."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([terminal], [], [], seconds)
        return sys.stdin.read(1) if ready else ""

    try:
        tty.setcbreak(terminal)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class _Rows(ProgressColumn):
    """Rows, and rows per second; nothing while the run waits."""

    def render(self, task: Task) -> Text:
        rows, rate = task.fields["rows"], task.fields["rate"]
        if rows is None:
            return Text("")
        speed = "" if rate is None else f" {short(rate)}/s"
        return Text(f"{rows:,} rows{speed}", "cyan", no_wrap=True)


class _Bar(BarColumn):
    """A bar that fills where an estimate is known, pulses where none is, and waits in words."""

    def render(self, task: Task) -> Text:  # type: ignore[override]  # anything that can be drawn
        return Text("") if task.fields["rows"] is None else super().render(task)  # type: ignore[return-value]  # as above


class _Percent(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.percentage:3.0f}%", "bold")


@contextmanager
def bar() -> Iterator[Callable[[str, int | None, int | None, float | None], None]]:
    """Show one run's bar on stderr, gone at the end; takes (text, rows, rows expected, rows/s)."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=False)),
        _Bar(bar_width=12),
        _Percent(),
        _Rows(),
        Elapsed(),
        console=Console(stderr=True),
        transient=True,
    ) as shown:
        task = shown.add_task("asked for", total=None, rows=None, rate=None)

        def show(text: str, rows: int | None, expected: int | None, rate: float | None) -> None:
            shown.update(
                task,
                description=escape(text),
                total=expected,
                completed=rows or 0,
                rows=rows,
                rate=rate,
            )

        yield show


@contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr for something that is counted, gone at the end; takes (text, n, of)."""
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        Elapsed(),
        console=Console(stderr=True),
        transient=True,
    ) as shown:
        task = shown.add_task("", total=None)
        yield lambda text, done, total: shown.update(
            task, description=escape(text), completed=done, total=total
        )
