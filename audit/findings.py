"""What a verification found, and the verdict that follows. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from uuid import UUID

#: Findings of one kind that are kept; more are counted.
SHOWN = 20


class Level(IntEnum):
    """How bad a finding is; the worst decides."""

    NOTE = 0
    INCOMPLETE = 1
    UNVERIFIABLE = 2
    TAMPERED = 3


#: Level -> (exit code, word in `audit.verified`, how a line of it begins).
_MEANS = {
    Level.NOTE: (0, "intact", "note"),
    Level.INCOMPLETE: (11, "incomplete", "INCOMPLETE"),
    Level.UNVERIFIABLE: (12, "unverifiable", "CANNOT VERIFY"),
    Level.TAMPERED: (10, "tampered", "TAMPERED"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found; `index` is the first event that it touches, if it touches any."""

    level: Level
    text: str
    index: int | None = None
    end: int | None = None  # known only to lie in index <= i < end

    @property
    def line(self) -> str:
        """The finding in one line."""
        begins = _MEANS[self.level][2]
        if self.index is None or self.level is Level.NOTE:
            return f"{begins}: {self.text}"
        if self.end is not None and self.end > self.index + 1:
            return f"{begins} between {self.index} and {self.end - 1}: {self.text}"
        return f"{begins} at index {self.index}: {self.text}"


@dataclass(slots=True)
class Report:
    """All that one verification found."""

    log_id: UUID | None = None
    size: int = 0
    events: int = 0  # recomputed from their fields
    checkpoints: int = 0  # signed by a trusted key
    anchored: int = 0  # checkpoints of anchors that agree
    keys: Sequence[str] = ()
    counts: dict[Level, int] = field(default_factory=dict)
    _exact: int | None = None  # the smallest index that is known to be bad
    _range: tuple[int, int] | None = None  # the first range in which one is
    _found: list[Finding] = field(default_factory=list)

    def add(
        self,
        level: Level,
        text: str,
        index: int | None = None,
        end: int | None = None,
        *,
        always: bool = False,
    ) -> None:
        """Keep a finding, or count it if there are many of its level (`always`: keep it)."""
        count = self.counts[level] = self.counts.get(level, 0) + 1
        if level is Level.TAMPERED and index is not None:
            if end is not None and end > index + 1:
                self._range = min((index, end), self._range or (index, end))
            else:
                self._exact = index if self._exact is None else min(index, self._exact)
        if count <= SHOWN or always:
            self._found.append(Finding(level, text, index, end))

    def note(self, text: str, *, always: bool = False) -> None:
        """Keep what a reader should know and what is no fault."""
        self.add(Level.NOTE, text, always=always)

    @property
    def first_bad(self) -> int | None:
        """The first index that is bad, or at which a range begins that holds a bad one."""
        if self._range is None or self._exact is None:
            return self._exact if self._range is None else self._range[0]
        begin, end = self._range
        return self._exact if self._exact < end else begin

    @property
    def level(self) -> Level:
        """The worst level that was found."""
        return max(self.counts, default=Level.NOTE)

    @property
    def exit_code(self) -> int:
        """0 intact, 10 tampered, 11 incomplete, 12 cannot verify."""
        return _MEANS[self.level][0]

    @property
    def result(self) -> str:
        """The verdict in one word."""
        return _MEANS[self.level][1]

    @property
    def findings(self) -> list[Finding]:
        """What was kept, the worst first, each level in the order of the log."""
        return sorted(self._found, key=_place)

    @property
    def lines(self) -> list[str]:
        """The findings as lines, and how many more there are."""
        shown = [finding.line for finding in self.findings]
        for level, count in sorted(self.counts.items(), reverse=True):
            more = count - sum(finding.level is level for finding in self._found)
            if more:
                shown.append(f"… and {more} more: {_MEANS[level][2]}")
        return shown


def _place(finding: Finding) -> tuple[int, float, float]:
    """Sort a range behind what is known of an event in it."""
    if finding.index is None:
        return -finding.level, float("inf"), 0
    end = finding.end or finding.index + 1
    return -finding.level, end - 1, -finding.index
