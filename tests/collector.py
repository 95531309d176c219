"""A syslog collector over TLS: keeps what it is told, and may behave in several wrong ways."""

import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self


class Collector:
    """`mode`: keep | hang (accepts, never shakes hands) | reset (hangs up on the first message)."""

    def __init__(
        self, files: tuple[Path, Path], mode: str = "keep", clients: Path | None = None
    ) -> None:
        self.mode = mode
        self.messages: list[str] = []
        self.links: list[socket.socket] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*files)
        if clients is not None:
            self._context.load_verify_locations(clients)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(5)

    def hang_up(self) -> None:
        for link in self.links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        self.links = []

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self.links.append(link)
            if self.mode != "hang":
                thread = threading.Thread(target=self._serve, args=(link,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, link: socket.socket) -> None:
        if self.mode == "plain":  # a collector without TLS
            with suppress(OSError):
                link.sendall(b"220 hello\r\n")
                link.recv(4096)
            return
        try:
            secure = self._context.wrap_socket(link, server_side=True)
        except OSError:
            link.close()
            return
        self.links.append(secure)
        with suppress(OSError):
            self._read(secure)
        secure.close()

    def _read(self, link: ssl.SSLSocket) -> None:
        buffer = b""
        while more := link.recv(65536):
            if self.mode == "reset":
                return
            buffer += more
            while b" " in buffer:
                count, _, rest = buffer.partition(b" ")
                if len(rest) < int(count):
                    break
                self.messages.append(rest[: int(count)].decode())
                buffer = rest[int(count) :]
