"""An anchor in a syslog collector: RFC 5424 over TLS with octet counting (RFC 5425).

The protocol has no acknowledgement. What counts as accepted: the collector's host has acknowledged
every byte (TCP), and the collector did not hang up before, nor shortly after. Whether it has
written the line, only its own storage can tell (docs/anchors.md).
"""

import fcntl
import os
import socket
import ssl
import struct
import termios
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from select import select
from time import monotonic, sleep

from audit.anchors.base import TIMEOUT_S, AnchorFailed
from audit.checkpoint import Checkpoint, anchor_line
from schemas.anchors import SyslogAnchor

#: Facility 13 (log audit), severity 5 (notice).
_PRIORITY = 13 * 8 + 5
#: A collector that does not like what it got hangs up within this time.
_LISTEN_S = 0.3
#: SSL records that carry no data (session tickets) are read over at most so often.
_READS_MAX = 100


@dataclass(slots=True)
class Syslog:
    """Keeps one connection and makes a new one when it is gone."""

    target: SyslogAnchor
    _link: ssl.SSLSocket | None = field(default=None, repr=False)

    @property
    def readable(self) -> bool:
        return False

    def publish(self, signed_note: str, checkpoint: Checkpoint) -> None:
        """Send one message and wait until the collector's host has all of it."""
        message = _message(signed_note, checkpoint)
        if self._link is not None and _hung_up(self._link, 0):
            self.close()  # since the last message: it was idle, the collector was restarted
        try:
            link = self._link = self._link or self._connect()
            link.sendall(message)
            _wait_for_acknowledgement(link)
            gone = _hung_up(link, _LISTEN_S)
        except OSError as error:
            self.close()
            raise AnchorFailed(f"syslog {self._name}: {_why(error)}") from None
        if gone:
            self.close()
            raise AnchorFailed(f"syslog {self._name}: it hung up on the message")

    def notes(self) -> Iterator[Sequence[str]]:
        """Nothing can be read back from a collector."""
        return iter(())

    def close(self) -> None:
        """Hang up."""
        link, self._link = self._link, None
        if link is not None:
            with suppress(OSError):
                link.close()

    @property
    def _name(self) -> str:
        return f"{self.target.host}:{self.target.port}"

    def _connect(self) -> ssl.SSLSocket:
        target = self.target
        context = ssl.create_default_context(cafile=str(target.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if target.certificate is not None:
            context.load_cert_chain(target.certificate, target.key)
        plain = socket.create_connection((target.host, target.port), timeout=TIMEOUT_S)
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(TIMEOUT_S * 1000))
            return context.wrap_socket(plain, server_hostname=target.name)
        except BaseException:
            plain.close()
            raise


def _message(signed_note: str, checkpoint: Checkpoint) -> bytes:
    at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    host = "".join(c for c in socket.gethostname() if "!" <= c <= "~")[:255] or "-"
    text = (
        f"<{_PRIORITY}>1 {at} {host} syncward-sealer {os.getpid()} checkpoint - "
        f"{anchor_line(signed_note)} epoch={checkpoint.epoch} size={checkpoint.size}"
    ).encode()
    return b"%d %s" % (len(text), text)


def _wait_for_acknowledgement(link: ssl.SSLSocket) -> None:
    """Wait until nothing that was sent is still on its way."""
    until = monotonic() + TIMEOUT_S
    while struct.unpack("i", fcntl.ioctl(link, termios.TIOCOUTQ, b"\0" * 4))[0]:
        if monotonic() > until:
            raise TimeoutError
        sleep(0.005)


def _hung_up(link: ssl.SSLSocket, seconds: float) -> bool:
    """Say whether the other end closes or resets the link within so much time."""
    until = monotonic() + seconds
    link.settimeout(0.0)
    try:
        for _ in range(_READS_MAX):
            try:
                if link.recv(4096) == b"":
                    return True
            except ssl.SSLWantReadError:
                left = until - monotonic()
                if left <= 0 or not select([link], [], [], left)[0]:
                    return False
            except OSError:
                return True
    finally:
        link.settimeout(TIMEOUT_S)
    return False


def _why(error: OSError) -> str:
    """Name what went wrong without what the other end said."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate does not hold: {error.verify_message}"
        case ssl.SSLError():
            return f"TLS failed ({error.reason or 'no TLS there'})"
        case TimeoutError():
            return "it does not answer in time"
        case FileNotFoundError():
            return "a file of ca=, cert= or key= does not exist"
        case _:
            return error.strerror or type(error).__name__
