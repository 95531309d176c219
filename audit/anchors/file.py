"""An anchor in a file that only grows, on a mount that another host serves."""

import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from audit.anchors.base import TIMEOUT_S, AnchorFailed
from audit.checkpoint import Checkpoint, anchor_line, notes_in

#: Read back from the end, a block after the other, each far longer than one line, to this many.
_BLOCK = 64 * 1024
_BLOCKS = 256
_NOT_MOUNTED = "its directory does not exist (is it mounted?)"
#: No symbolic link, and no pipe that somebody put there is waited for.
_ALWAYS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class File:
    """One line for each checkpoint.

    The line is on the other host's disk before it counts (fsync). A line that a crash tore is left
    as it is and the next one starts on a line of its own: nothing that was written is changed.
    """

    path: Path

    @property
    def readable(self) -> bool:
        return True

    def publish(self, signed_note: str, checkpoint: Checkpoint) -> None:  # noqa: ARG002 - the protocol's
        """Append the note, durably."""
        line = f"{anchor_line(signed_note)}\n".encode()
        with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            content = b"\n" + line if torn else line
            if os.write(descriptor, content) != len(content):
                raise AnchorFailed(f"{self.path}: only a part could be written (is it full?)")
            os.fsync(descriptor)
            if size == 0:
                with suppress(PermissionError):  # whatever the umask is
                    os.fchmod(descriptor, 0o640)
                self._settle()

    def notes(self) -> Iterator[Sequence[str]]:
        """Yield the notes of lines that are whole, a block at a time."""
        size = end = self._read_at(0, 0)[0]
        carried = b""  # a line's end, whose beginning is in the block before
        for _ in range(_BLOCKS):
            if end == 0:
                return
            begin = max(0, end - _BLOCK)
            content = self._read_at(begin, end - begin)[1]
            if end == size:
                content = content[: content.rfind(b"\n") + 1]
            content += carried
            cut = content.find(b"\n") + 1 if begin else 0
            if begin and cut == 0:  # one line is longer than this: none of ours
                carried = content if len(content) <= _BLOCK else b""
            else:
                carried = content[:cut]
                yield _notes_of(content[cut:])
            end = begin

    def _read_at(self, offset: int, length: int) -> tuple[int, bytes]:
        """Return (how long the file is, a part of it)."""
        try:
            with self._open(os.O_RDONLY) as descriptor:
                return os.fstat(descriptor).st_size, os.pread(descriptor, length, offset)
        except FileNotFoundError:
            if self.path.parent.is_dir():
                return 0, b""
            raise AnchorFailed(f"{self.path}: {_NOT_MOUNTED}") from None

    def close(self) -> None:
        """Nothing stays open."""

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, flags | _ALWAYS, 0o640)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise AnchorFailed(f"{self.path}: not a regular file")
                _lock(descriptor, self.path, shared=not flags & os.O_RDWR)
                yield descriptor
            finally:
                os.close(descriptor)  # and with it the lock
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise AnchorFailed(f"{self.path}: {_NOT_MOUNTED}") from None
            raise
        except OSError as error:
            raise AnchorFailed(f"{self.path}: {error.strerror}") from None

    def _settle(self) -> None:
        """Make the new file itself survive a power failure."""
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _notes_of(content: bytes) -> list[str]:
    found: list[str] = []
    for line in content.decode("ascii", errors="replace").splitlines():
        try:
            found += notes_in(line)
        except ValueError:
            found.append(line)
    return found


def _lock(descriptor: int, path: Path, *, shared: bool) -> None:
    """Wait for another sealer, but not for ever."""
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX  # NFS locks exclusively for writers only
    until = monotonic() + TIMEOUT_S
    while True:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > until:
                raise AnchorFailed(f"{path}: another process keeps it locked") from None
            sleep(0.05)
        else:
            return
