"""A bar chart as plain SVG: groups of bars, each group on a scale of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = {"psql": "#8a8f98", "syncward": "#1f6feb", "sling": "#c9a227", "dlt": "#b3563b"}
_WIDTH, _LEFT, _RIGHT = 760, 120, 80
_BAR, _GAP, _TITLE = 16, 5, 26


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; `colour` is a contestant's name."""

    label: str
    seconds: float
    colour: str


def draw(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Return the picture. Times of different groups are not comparable, so neither are lengths."""
    lines: list[str] = []
    y = 10
    for title, bars in groups:
        y += _TITLE
        lines.append(f'<text x="8" y="{y - 8}" font-weight="bold">{escape(title)}</text>')
        longest = max(bar.seconds for bar in bars) or 1.0
        for bar in bars:
            length = max(1.0, (_WIDTH - _LEFT - _RIGHT) * bar.seconds / longest)
            middle = y + _BAR - 4
            rectangle = f'x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}"'
            lines += [
                f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect {rectangle} fill="{_COLOURS[bar.colour]}"/>',
                f'<text x="{_LEFT + length + 6:.1f}" y="{middle}">{_seconds(bar.seconds)}</text>',
            ]
            y += _BAR + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 10}" '
        f'viewBox="0 0 {_WIDTH} {y + 10}" font-family="sans-serif" font-size="12" role="img" '
        'aria-label="Seconds of each tool, lower is better">'
    )
    ground = f'<rect width="{_WIDTH}" height="{y + 10}" fill="#ffffff"/>'
    return "\n".join([head, ground, *lines, "</svg>"]) + "\n"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
