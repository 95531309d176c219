"""An anchor in a file that only grows, on a mount that another host serves."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from audit.anchors.base import TIMEOUT_S, AnchorFailed
from audit.checkpoint import Checkpoint, anchor_line, notes_in

#: Read back from the end: far more than one line takes.
_TAIL = 64 * 1024
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

    def newest(self) -> str | None:
        """Return the note of the last line that is whole."""
        try:
            with self._open(os.O_RDONLY) as descriptor:
                size = os.fstat(descriptor).st_size
                content = os.pread(descriptor, _TAIL, max(0, size - _TAIL))
        except FileNotFoundError:
            return None
        text = content[: content.rfind(b"\n") + 1].decode("ascii", errors="replace")
        for line in reversed(text.splitlines()):
            with suppress(ValueError):
                if found := notes_in(line):
                    return found[-1]
        return None

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
                raise AnchorFailed(
                    f"{self.path}: its directory does not exist (is it mounted?)"
                ) from None
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
