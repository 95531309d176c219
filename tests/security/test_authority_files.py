"""`sslrootcert` of a resource cannot hang a worker, and tells nobody what files it has."""

import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from connectors import authority, registry
from connectors.postgres import link as postgres
from connectors.postgres.link import PostgresConfig
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, SyncwardError
from tests.tls_proxy import certificate
from tests.world import LOOSE

BEGIN = "-----BEGIN CERTIFICATE-----\n"


@pytest.fixture
def server():
    """The port of a server that says yes to TLS: only then libpq opens the file. It hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    link.recv(8)
                    link.sendall(b"S")
                    link.close()

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


def attempt(path: str, port: int = 1, sslmode: Any = "verify-full") -> SyncwardError:
    """Try to connect with such an authority in a thread: it must have ended within seconds."""
    config = PostgresConfig.model_construct(
        host="127.0.0.1", port=port, database="shop", user="reader", sslmode=sslmode,
        sslrootcert=path, channel_binding="require",
    )  # fmt: skip
    caught: list[Exception] = []

    def connect() -> None:
        try:
            postgres.connect(
                config, {"password": "x"}, role="source", session={},
                policy=LinkPolicy(loopback=True, tls_required=False),
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - looked at by the test
            caught.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout=8)
    assert not thread.is_alive(), f"{path} hangs"
    (error,) = caught
    assert isinstance(error, SyncwardError)
    return error


def file(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


@pytest.fixture
def refused(tmp_path) -> dict[str, str]:
    """Paths that are no authority's file, each in another way."""
    (good, _) = certificate(tmp_path, "localhost")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to(tmp_path / "fifo")
    (tmp_path / "to-proc").symlink_to("/proc/self")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "missing": str(tmp_path / "missing.crt"),
        "no such directory": str(tmp_path / "no" / "missing.crt"),
        "below a file": str(good / "x"),
        "directory": str(tmp_path),
        "empty": file(tmp_path / "empty", ""),
        "text": file(tmp_path / "text", "root:x:0:0:\n"),
        "key": file(tmp_path / "key", good.read_text().replace("CERTIFICATE", "PRIVATE KEY")),
        "cut off": file(tmp_path / "cut", good.read_text()[:200]),
        "no base64": file(tmp_path / "junk", BEGIN + "!!!\n" + BEGIN.replace("BEGIN", "END")),
        "too large": file(tmp_path / "large", good.read_text() + "#" * authority.LARGEST),
        "fifo": str(tmp_path / "fifo"),
        "link to a fifo": str(tmp_path / "to-fifo"),
        "link to itself": str(tmp_path / "loop"),
        "relative": os.path.relpath(good),
        "proc by a link": str(tmp_path / "to-proc" / "environ"),
        "proc by dots": "/etc/../proc/self/environ",
        "proc": "/proc/self/environ",
        "dev": "/dev/zero",
        "sys": "/sys/kernel/uevent_seqnum",
        "no byte": "/etc/\x00",
        "too long": "/" + "a" * 5_000,
    }


def test_what_is_no_authoritys_file_is_refused_at_once_in_the_same_words(refused, tmp_path):
    if os.geteuid() != 0:  # root reads everything
        (locked,) = [Path(file(tmp_path / "locked", BEGIN))]
        locked.chmod(0)
        refused["locked"] = str(locked)
    said = {how: attempt(path) for how, path in refused.items()}
    assert {(type(error), error.code) for error in said.values()} == {(ConfigError, "tls_refused")}
    (sentence,) = {error.public for error in said.values()}
    assert sentence.startswith("127.0.0.1:1/shop: sslrootcert is no file")


def test_a_pipe_that_nobody_writes_to_holds_no_slot(tmp_path, server):
    """What libpq would open; a server that has said yes to TLS is all it takes."""
    os.mkfifo(tmp_path / "fifo")
    ours, theirs = os.pipe()
    try:
        for path in (tmp_path / "fifo", f"/proc/self/fd/{ours}"):
            error = attempt(str(path), server)
            assert (error.code, "sslrootcert is no file" in error.public) == ("tls_refused", True)
    finally:
        os.close(ours)
        os.close(theirs)


def test_every_way_of_tls_looks_at_the_file_and_without_tls_nobody_does(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for mode in ("prefer", "require", "verify-ca", "verify-full"):
        assert attempt(str(tmp_path / "fifo"), sslmode=mode).code == "tls_refused"
    assert attempt(str(tmp_path / "fifo"), sslmode="disable").code != "tls_refused"


def test_a_file_with_a_certificate_is_taken_wherever_it_is_also_by_a_link(tmp_path):
    (good, _) = certificate(tmp_path, "localhost")
    link = tmp_path / "ca.crt"  # as Kubernetes mounts a secret
    link.symlink_to(good)
    bundle = tmp_path / "bundle.crt"
    bundle.write_bytes("# Főtanúsítvány\n".encode() + good.read_bytes() * 3)
    for path in (good, link, bundle):
        assert authority.checked(str(path)) == str(path.resolve())
        assert attempt(str(path)).code != "tls_refused"  # nobody listens there
    assert authority.checked("system") == "system"


def test_a_path_that_is_not_absolute_is_refused_where_it_is_written_down(tmp_path):
    config = {"host": "db.example", "database": "shop", "user": "reader"}
    for path in ("ca.crt", "~/ca.crt", "/proc/self/fd/0", "/dev/stdin", "/sys/x", "//proc/1/x",
                 "/etc/../dev/stdin", "System"):  # fmt: skip
        with pytest.raises(ConfigError, match="sslrootcert"):
            registry.validate_config("postgres", {**config, "sslrootcert": path}, LOOSE)
    for path in (str(tmp_path / "missing.crt"), "system", "/process/ca.crt"):
        known = registry.validate_config("postgres", {**config, "sslrootcert": path}, LOOSE)
        assert known["sslrootcert"] == path
