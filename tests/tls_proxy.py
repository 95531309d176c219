"""TLS before a server that has none, and a relay that answers like one: both note what they hear.

A Postgres client asks for TLS first (SSLRequest), a Redis client begins with it at once.
"""

import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")

#: How a link begins: the client asks and gets a yes, asks and gets a no, or does not ask.
Begin = Literal["asked", "denied", "at_once"]


def certificate(
    directory: Path, name: str, *, expired: bool = False, stem: str | None = None
) -> tuple[Path, Path]:
    """Make a self-signed certificate for `name`; return (certificate, key)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begins = datetime.now(UTC) - timedelta(hours=3 if expired else 1)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(begins + timedelta(hours=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    stem = stem or name
    certificate_file, key_file = directory / f"{stem}.crt", directory / f"{stem}.key"
    certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return certificate_file, key_file


class TlsProxy:
    """Listens on a port of its own; `cut()` resets every connection.

    `heard` is what clients said after the handshake, in clear; `accepted` counts connections.
    """

    def __init__(
        self,
        target: tuple[str, int],
        files: tuple[Path, Path],
        *,
        begin: Begin = "asked",
        newest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> None:
        self._target = target
        self._begin = begin
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*files)
        if newest < ssl.TLSVersion.TLSv1_2:
            self._context.set_ciphers("ALL:@SECLEVEL=0")
            self._context.options &= ~(ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1)
            with _old_tls_on_purpose():
                self._context.minimum_version = ssl.TLSVersion.TLSv1
                self._context.maximum_version = newest
        self.heard = b""
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Close every connection without a goodbye."""
        for link in self._open:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                self.accepted += 1
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with ExitStack() as closing, suppress(OSError):
            self._open.append(closing.enter_context(raw))
            if self._begin != "at_once":
                assert raw.recv(len(_SSL_REQUEST)) == _SSL_REQUEST
                raw.sendall(b"N" if self._begin == "denied" else b"S")
            client = raw
            if self._begin != "denied":
                client = self._context.wrap_socket(raw, server_side=True)
                closing.enter_context(client)
            server = closing.enter_context(socket.create_connection(self._target))
            self._open += [client, server]
            back = threading.Thread(target=self._relay, args=(server, client), daemon=True)
            back.start()
            self._relay(client, server, note=True)
            back.join()

    def _relay(self, here: socket.socket, there: socket.socket, *, note: bool = False) -> None:
        with suppress(OSError):
            while data := here.recv(65_536):
                if note:
                    self.heard += data
                there.sendall(data)
        for link in (here, there):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


@contextmanager
def _old_tls_on_purpose() -> Iterator[None]:
    """Python warns of TLS below 1.2; here it is what a client must refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def handshake(port: int, oldest: ssl.TLSVersion, *, asks: bool) -> str | None:
    """Connect as a client that trusts anybody and takes old TLS: the version both agreed on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with _old_tls_on_purpose():
        context.minimum_version = oldest
    with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
        if asks:
            raw.sendall(_SSL_REQUEST)
            assert raw.recv(1) == b"S"
        with context.wrap_socket(raw) as link:
            return link.version()
