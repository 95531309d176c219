"""What is signed: how large the tree is, its root, its epoch, and when (C2SP tlog-checkpoint)."""

import re
from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

_ORIGIN = "syncward/audit/"
_TEXT = re.compile(
    rf"{_ORIGIN}(?P<log>[0-9a-f-]{{36}})\n(?P<size>0|[1-9][0-9]{{0,18}})\n"
    r"(?P<root>[A-Za-z0-9+/]{43}=)\nepoch (?P<epoch>[1-9][0-9]{0,9})\ntime (?P<at>\S{27})\n"
)
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


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
            f"epoch {self.epoch}\ntime {self.signed_at.astimezone(UTC).strftime(_TIME)}\n"
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
            signed_at=datetime.strptime(match["at"], _TIME).replace(tzinfo=UTC),
        )


_LINE = re.compile(r"syncward-checkpoint (?P<note>[A-Za-z0-9+/]+={0,2})")


def anchor_line(signed_note: str) -> str:
    """Return a signed note as one line, the same for every anchor: it survives logs and mail."""
    return f"syncward-checkpoint {b64encode(signed_note.encode()).decode()}"


def notes_in(text: str) -> list[str]:
    """Return the signed notes that any text holds (a file, a collector's log), in its order."""
    return [b64decode(match["note"]).decode() for match in _LINE.finditer(text)]
