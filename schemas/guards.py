"""What a guard found, what a person approved of it, and whether the one covers the other.

A finding holds counts and names only, so it may be stored in clear; the keys of a preview are data,
and go into the run's sealed document. docs/streams.md lists the guards, docs/states.md says how
a run goes on after one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from schemas.errors import GuardTripped

#: Keys that a preview shows at most.
SAMPLE_KEYS = 5
#: Of each of them.
SAMPLE_CHARS = 200


class Guard(StrEnum):
    """Each of them is the code of the run that it stopped."""

    ZERO_ROWS = "zero_rows"
    DELETE_RATIO = "delete_ratio"
    DUPLICATE_KEYS = "duplicate_keys"
    FUTURE_CURSOR = "future_cursor"
    NARROWED_TYPE = "narrowed_type"


class Finding(BaseModel):
    """What one guard found in one stream. `amount` is larger where the finding is worse."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    guard: Guard
    stream: str
    amount: int  # rows to delete, keys that repeat, seconds of the farthest cursor
    what: str = ""  # narrowed_type: the columns with their types
    before: int | None = None  # rows served now
    after: int | None = None  # rows that the source has
    to_delete: int | None = None

    def covered_by(self, approved: "Finding") -> bool:
        """Say whether what a person approved is of the same kind and at least as bad."""
        if (self.guard, self.stream, self.what) != (approved.guard, approved.stream, approved.what):
            return False
        return self.amount <= approved.amount and self.share <= approved.share

    @property
    def share(self) -> float:
        """How much of what is served now would go."""
        return self.to_delete / self.before if self.to_delete and self.before else 0.0


@dataclass(frozen=True, slots=True)
class Preview:
    """A finding, the sentence that people read, and a few keys of what would go (sealed)."""

    finding: Finding
    sentence: str
    keys: tuple[str, ...] = ()

    def document(self) -> dict[str, object]:
        """Return what the run's sealed document says of it."""
        found = self.finding.model_dump(mode="json", exclude_none=True)
        return {**found, "sentence": self.sentence, "sample_keys": list(self.keys)}


class DataGuardTripped(GuardTripped):
    """Guards stopped streams whose data would have changed; nothing of those streams is kept."""

    def __init__(self, previews: Sequence[Preview]) -> None:
        first = previews[0]
        others = f" (and {len(previews) - 1} more: run output)" if len(previews) > 1 else ""
        super().__init__(first.sentence + others, code=first.finding.guard)
        self.previews = tuple(previews)


def covered(finding: Finding, approvals: Sequence[Finding]) -> bool:
    """Say whether one of the approvals covers a finding."""
    return any(finding.covered_by(approved) for approved in approvals)


def stop(preview: Preview, approvals: Sequence[Finding]) -> None:
    """Raise DataGuardTripped unless a person has approved as much or more of the same."""
    if not covered(preview.finding, approvals):
        raise DataGuardTripped((preview,))
