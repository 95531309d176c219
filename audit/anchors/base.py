"""What an anchor is."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from audit.checkpoint import Checkpoint
from schemas.errors import TransientError

#: No anchor may keep its caller for longer than a few of these.
TIMEOUT_S = 10.0


class AnchorFailed(TransientError):  # noqa: N818 - reads best where it is raised
    """An anchor did not accept, or could not be read: it is asked again later."""

    code = "anchor_failed"


class Anchor(Protocol):
    """Used by one thread. Both methods end within bounded time; AnchorFailed says what is wrong."""

    @property
    def readable(self) -> bool:
        """Whether what it holds can be read back."""

    def publish(self, signed_note: str, checkpoint: Checkpoint) -> None:
        """Return once the anchor has accepted the checkpoint; the same one twice is no harm."""

    def notes(self) -> Iterator[Sequence[str]]:
        """Yield what it holds, in groups: the newest group first, in a group in no order.

        Nothing if it holds none or is not readable. It may end before the oldest: somebody else
        can have written any number. What is no signed note stands there as it is.
        """

    def close(self) -> None:
        """Let go of what is open."""
