"""What stands inside of a sealed line, and where sealed records belong. docs/records.md draws it.

A line carries its number within the attempt that wrote it, so that whoever reads the log sees
that lines are missing, repeated or cut off at the end; and its context binds the clear columns.
"""

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol
from uuid import UUID

SERIES = 8
_HEAD = struct.Struct(">B8sII")
_LAST = 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

#: Stands in what stays clear of a sealed document, so that nobody takes it for the whole of one.
SEALED_MARK = "sealed"

#: The fields of an envelope's context: account, kind, resource, field, version.
Place = tuple[UUID, str, UUID, str, int]


class Packable(Protocol):
    """A line that is to be sealed."""

    @property
    def message(self) -> str: ...
    @property
    def series(self) -> bytes: ...
    @property
    def number(self) -> int: ...
    @property
    def gap(self) -> int: ...
    @property
    def last(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A line as it was sealed. `gap`: so many before it were given up by the worker itself."""

    message: str
    series: bytes
    number: int
    gap: int
    last: bool


def line_context(
    account_id: UUID, run_id: UUID, at: datetime, level: str, stream: str | None
) -> Place:
    """Return where a line belongs: moved to another run, time, level or stream it does not open."""
    micros = (at - _EPOCH) // _MICROSECOND
    return account_id, "run_log", run_id, f"{level}:{stream or ''}", micros


def output_context(account_id: UUID, run_id: UUID) -> Place:
    """Return where a run's document belongs."""
    return account_id, "run_output", run_id, "document", 1


def packed(line: Packable) -> bytes:
    """Return the bytes that are sealed."""
    flags = _LAST if line.last else 0
    head = _HEAD.pack(flags, line.series or bytes(SERIES), line.number, line.gap)
    return head + line.message.encode()


def unpacked(plaintext: bytes) -> Unpacked:
    """Read them again."""
    flags, series, number, gap = _HEAD.unpack_from(plaintext)
    message = plaintext[_HEAD.size :].decode()
    return Unpacked(message, series, number, gap, last=bool(flags & _LAST))
