"""What is signed: how large the tree is, its root, its epoch, and when (C2SP tlog-checkpoint)."""

import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

_ORIGIN = "syncward/audit/"
#: As they are written, to the byte: whoever reads otherwise may see another log or another time.
LOG_ID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z"
_TEXT = re.compile(
    rf"{_ORIGIN}(?P<log>{LOG_ID})\n(?P<size>0|[1-9][0-9]{{0,17}})\n"
    rf"(?P<root>[A-Za-z0-9+/]{{43}}=)\nepoch (?P<epoch>[1-9][0-9]{{0,9}})\ntime (?P<at>{TIME})\n"
)
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


def time_text(at: datetime) -> str:
    """Return a time as it stands in what is signed."""
    return at.astimezone(UTC).strftime(_TIME)


def parse_time(text: str) -> datetime:
    """Read a time as `time_text` writes it; ValueError if it is none."""
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A statement of the sealer about its log."""

    log_id: UUID
    size: int
    root: bytes
    epoch: int
    signed_at: datetime

    @property
    def text(self) -> str:
        """The signed text: origin, size, root, and two extension lines."""
        return (
            f"{_ORIGIN}{self.log_id}\n{self.size}\n{b64encode(self.root).decode()}\n"
            f"epoch {self.epoch}\ntime {time_text(self.signed_at)}\n"
        )

    @classmethod
    def parse(cls, text: str) -> "Checkpoint":
        """Read a checkpoint's text; ValueError if it is none of ours."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError("not a checkpoint of an audit log")
        return cls(
            log_id=UUID(match["log"]),
            size=int(match["size"]),
            root=b64decode(match["root"]),
            epoch=int(match["epoch"]),
            signed_at=parse_time(match["at"]),
        )


_LINE = re.compile(r"syncward-checkpoint (?P<note>[A-Za-z0-9+/]+={0,2})")


def anchor_line(signed_note: str) -> str:
    """Return a signed note as one line, the same for every anchor: it survives logs and mail."""
    return f"syncward-checkpoint {b64encode(signed_note.encode()).decode()}"


def notes_in(text: str) -> list[str]:
    """Return the signed notes that any text holds (a file, a collector's log), in its order."""
    return [b64decode(match["note"]).decode() for match in _LINE.finditer(text)]
