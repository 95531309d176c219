"""What a child says to people: its standard error, and lines that are no messages of its protocol.

All of it is masked as one text before it is cut into lines, bounded, and handed to whoever keeps
the run's log. It is data of others: no error of ours quotes it.
"""

import codecs
from collections.abc import Callable
from threading import Lock

from schemas.redaction import REDACTOR

#: Of one child; what comes after is counted and not kept.
LINES_MAX, LINE_MAX = 2_000, 2_000


class Voice:
    """Takes text in pieces, from any thread."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = Lock()
        self._sink = REDACTOR.stream()
        self._text = codecs.getincrementaldecoder("utf-8")("replace")  # pieces end anywhere
        self._line = ""
        self._lines = 0
        self._dropped = 0

    def feed(self, piece: bytes) -> None:
        """Take a piece of text, as it comes."""
        with self._lock:
            self._cut(self._sink.feed(self._text.decode(piece).replace("\0", "\ufffd")))

    def close(self) -> None:
        """Say the rest, and how much was not kept."""
        with self._lock:
            self._cut(self._sink.feed(self._text.decode(b"", final=True)))
            self._cut(self._sink.close())
            self._sink = REDACTOR.stream()
            if self._line:
                self._take(self._line)
            self._line = ""
            if self._dropped:
                self._say(f"{self._dropped:,} more lines were not kept")
            self._dropped = 0

    def _cut(self, text: str) -> None:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line)
        self._line = self._line[: 2 * LINE_MAX]

    def _take(self, line: str) -> None:
        line = line.rstrip()[:LINE_MAX]
        if not line:
            return
        self._lines += 1
        if self._lines <= LINES_MAX:
            self._say(line)
        else:
            self._dropped += 1
