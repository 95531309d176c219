"""The guard between children and the network: what they get through it, and what they do not."""

import ctypes
import json
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from connectors import registry
from connectors.child import launcher
from connectors.child.guard import CONNECTIONS_MAX, Guard, Reach
from connectors.child.hosts import listed
from connectors.child.launcher import can_guard
from connectors.egress import EgressRefused
from schemas.aid import Aid
from schemas.calls import Call
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, TransientError
from tests.children.installing import policy_of
from tests.connectors.test_child import fake, until
from tests.connectors.test_child_run import BY_STATE, Shop
from tests.tls_proxy import certificate

GUARDED = pytest.mark.skipif(not can_guard(), reason="this kernel cannot guard a child")
DEVELOPMENT = LinkPolicy(loopback=True, tls_required=True)
_NOBODY = 65534
SITE = sysconfig.get_paths()["purelib"]


class Server:
    """An API over TLS, on 127.0.0.1 and by the name localhost."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.asked.append(self.path)
                body = f"you asked for {self.path}".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
                """Say nothing."""

        self.authority, key = certificate(directory, "localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.authority, key)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port: int = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.http.shutdown()
    made.http.server_close()


class Noted:
    """A run's list of calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def note(self, call: Call) -> None:
        self.calls.append(call)


@pytest.fixture
def tap(tmp_path, monkeypatch):
    with fake(tmp_path, "singer", monkeypatch) as made:
        made.policy = policy_of(made.root, unguarded=False, readable=(made.data, Path(SITE)))
        yield made


def open_(tap, noted, policy=DEVELOPMENT, hosts=(), refused=None, **settings):
    """The fake with its network held, in a mode of its own."""
    config = {
        "connector": tap.connector, "hosts": list(hosts),
        "settings": {"directory": str(tap.data), "site": SITE, **settings},
    }  # fmt: skip
    checked = registry.validate_config("singer", config, policy)
    more = {} if refused is None else {"refused": refused}
    aid = Aid(secrets=tap, say=tap.said.append, calls=noted, **more)
    return registry.open_source("singer", checked, {}, replace(policy, children=tap.policy), aid)


def fetched(tap, noted, urls, **more):
    with closing(open_(tap, noted, misbehave="fetch", fetch=urls, **more)) as source:
        return read(tap, source)


def read(tap, source):
    """What the connector put into its rows."""
    with source.extract(tap.spec(), None) as batches:
        return [row[1] for batch in batches for group in batch.groups for row in group.rows]


# ── what goes through ────────────────────────────────────────────────────────────────────────


@GUARDED
@pytest.mark.parametrize(
    "ways",
    [
        ["urllib", "requests"],
        pytest.param(["urllib", "requests", "httpx", "asyncio"], marks=pytest.mark.full),
    ],
    ids=len,
)
def test_the_usual_libraries_reach_a_listed_host_and_each_connection_is_a_call(tap, server, ways):
    noted = Noted()
    url = f"https://localhost:{server.port}/{{}}?secret=canary"
    found = fetched(
        tap, noted, [[way, url.format(way)] for way in ways],
        hosts=[f"localhost:{server.port}"], authority=shutil.copy(server.authority, tap.data),
    )  # fmt: skip
    assert found == [f"you asked for /{way}?secret=canary" for way in ways]
    assert len(noted.calls) >= len(ways)
    assert {(c.method, c.host, c.route, c.status, c.error) for c in noted.calls} == {
        ("CONNECT", f"localhost:{server.port}", "", 200, None)
    }
    assert all(c.request_bytes > 500 and c.response_bytes > 500 for c in noted.calls)
    assert "canary" not in repr(noted.calls)


@GUARDED
def test_a_host_that_is_not_listed_is_not_reached_and_the_log_names_it(tap, server):
    noted = Noted()
    urls = [[way, f"https://localhost:{server.port}/"] for way in ("urllib", "requests")]
    before = len(server.asked)
    found = fetched(tap, noted, urls, hosts=["localhost", "*.example.com"])
    assert all("403" in text for text in found)
    assert (len(server.asked), noted.calls) == (before, [])
    lines = [line for line in tap.said if "none of its resource's `hosts`" in line]
    assert len(lines) == 1
    assert f" asks for localhost:{server.port}, " in lines[0]


@GUARDED
def test_a_child_that_fails_for_a_host_that_is_not_listed_says_so(tap):
    with pytest.raises(TransientError, match="`hosts` do not list") as caught:
        fetched(tap, Noted(), [["urllib", "https://example.com/"]], fails=True)
    assert caught.value.code == "connector_failed"
    assert "example.com" not in str(caught.value)  # the child chose that text


@GUARDED
def test_plain_http_is_not_passed_on(tap, server):
    hosts = [f"localhost:{server.port}"]
    found = fetched(tap, Noted(), [["urllib", f"http://localhost:{server.port}/"]], hosts=hosts)
    assert "405" in found[0]


@GUARDED
def test_a_listed_host_with_a_forbidden_address_ends_the_read(tap):
    refused: list[tuple[str, str]] = []
    noted = Noted()
    for host, rule in (("localhost", "loopback"), ("169.254.169.254", "never")):
        with pytest.raises(EgressRefused) as caught:
            fetched(
                tap, noted, [["urllib", f"https://{host}/"]], hosts=[host],
                policy=LinkPolicy(), refused=lambda *one: refused.append(one),
            )  # fmt: skip
        assert (caught.value.code, refused[-1][1]) == ("egress_refused", rule)
    assert (noted.calls, len(refused)) == ([], 2)


@GUARDED
def test_nothing_but_the_guard_is_reached_whatever_is_tried(tap):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        target = ["127.0.0.1", listener.getsockname()[1]]
        with closing(open_(tap, Noted(), misbehave="break_out", target=target)) as source:
            assert len(read(tap, source)) == 3
        with pytest.raises(TimeoutError):
            listener.accept()
    (tried,) = [line for line in tap.said if "tried {" in line]
    found = json.loads(tried.partition("tried ")[2])
    assert found.pop("direct").startswith("HTTP/1.1 405 ")
    assert found.pop("database").startswith("HTTP/1.1 405 ")
    assert found.pop("ring") == "Function not implemented"
    for name in ("six", "datagram6"):
        assert found.pop(name).startswith("refused: Address family not supported")
    assert found.pop("looked_up").startswith("refused")
    assert found.pop("pair") == "fine"
    assert set(found.values()) == {"refused: Operation not permitted"}
    assert len(found) == 13
    assert any("as if there were no proxy" in line for line in tap.said)


@GUARDED
def test_connections_come_no_faster_than_a_pace(tap):
    """A hundred sockets that nobody needs; the first sixty-four may come at once."""
    with closing(open_(tap, Noted(), misbehave="many_sockets", sockets=100)) as source:
        assert len(read(tap, source)) == 3
    (line,) = [line for line in tap.said if "sockets took" in line]
    assert float(line.split()[-2]) > (100 - 64 - 1) * 0.02


@GUARDED
@pytest.mark.integration
def test_of_a_run_connections_are_its_calls_and_a_refusal_is_an_event(
    world, tmp_path, server, caplog
):
    shop = Shop(world, tmp_path, "singer")
    children = replace(world.deps.policy.children, readable=(shop.data, Path(SITE)))
    world.deps = replace(world.deps, policy=replace(world.deps.policy, children=children))
    authority = shutil.copy(server.authority, shop.data)
    more = {"site": SITE, "authority": authority}
    url, hosts = f"https://localhost:{server.port}/x", (f"localhost:{server.port}",)
    shop.apply(BY_STATE, "fetch", hosts, fetch=[["urllib", url]], **more)
    run, _ = world.sync()
    assert (run.state, run.error, shop.ids()) == ("succeeded", None, [1])
    calls = "SELECT method, host, route, status, error, attempt FROM api_calls WHERE run_id = :run"
    world.deps.calls.flush()
    assert world.control.all(calls, run=run.run_id) == [("CONNECT", hosts[0], "", 200, None, 1)]
    shop.apply(BY_STATE, "fetch", ("169.254.169.254",),
               fetch=[["urllib", "https://169.254.169.254/"]], **more)  # fmt: skip
    run, _ = world.sync()
    assert (run.state, run.error_code) == ("failed", "egress_refused")
    assert world.control.all(calls, run=run.run_id) == []
    events = "SELECT body::json->>'reason' FROM audit.event WHERE action = :action"
    assert world.control.all(events, action="egress.refused") == [("egress_refused",)]
    (told,) = [vars(one) for one in caplog.records if one.getMessage() == "egress_refused"]
    assert (told["rule"], told["address"]) == ("never", "169.254.169.254")


def listener_beside(act) -> str:
    """What `act` returns in a process whose calls to the system somebody else answers already."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        with suppress(BaseException):
            number = launcher._CALLS[os.uname().machine].seccomp
            steps = ctypes.create_string_buffer(launcher._step(0x06, launcher._LET))
            order = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(steps)))
            launcher._prctl(38, 1)
            assert launcher._libc.syscall(number, 1, launcher._NEW_LISTENER, order) >= 0
            os.write(write_end, act().encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as told:
        found = told.read().decode()
    os.waitpid(process, 0)
    return found


@GUARDED
def test_where_the_kernel_refuses_to_guard_a_child_it_is_not_started(tap):
    def act() -> str:
        with pytest.raises(ConfigError) as caught, closing(open_(tap, Noted())) as source:
            read(tap, source)
        return f"{caught.value.code}: {caught.value}"

    told = listener_beside(act)
    assert told.startswith("connector_off: tap-fake==1.0: the kernel does not let this worker")


def test_a_child_that_is_not_guarded_says_so_in_its_run(tap):
    for policy, hosts in (
        (replace(tap.policy, confined=False), ("a.example",)),  # development, an old kernel
        (replace(tap.policy, unguarded=True), ()),
    ):
        tap.policy = policy
        with closing(open_(tap, Noted(), hosts=hosts)) as source:
            with source.extract(tap.spec(), None) as batches:
                (first,) = list(batches)
                list(first.groups)
            assert "pass no egress guard" in first.notes[0]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root")
@GUARDED
@pytest.mark.parametrize("switches", [False, True], ids=["as_the_workers", "as_another"])
def test_no_privilege_is_needed_and_a_switch_of_logins_does_no_harm(switches):
    """The launcher of a worker without any privilege; and of one that switches."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as made, guard() as (guarding, _, _):
        root = Path(made)
        root.chmod(0o755)
        program = shutil.copy(launcher.__file__, root)
        scratch = root / "scratch"
        scratch.mkdir()
        os.chown(scratch, _NOBODY, _NOBODY)
        told, status = os.pipe()
        python = Path("/usr/bin/python3")
        code = (
            "import os, socket; s = socket.create_connection(('192.0.2.1', 5432), 9); "
            "s.sendall(b'GET / HTTP/1.1'); print(os.getuid(), s.recv(99)); s.close(); "
            "print(os.listdir('/proc/self/fd'), sorted(os.environ))"
        )
        order = {
            "command": [str(python), "-I", "-c", code], "environment": {"LC_ALL": "C"},
            "directory": str(scratch), "keep": [], "status": status, "memory": 2**30, "cpu": 60,
            "user": "nobody" if switches else "", "confined": True, "readable": [],
            "guard": guarding._there.fileno(),
        }  # fmt: skip
        before = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
        with subprocess.Popen(
            [*([] if switches else before), str(python), "-I", "-S", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            pass_fds=(status, guarding._there.fileno()),
        ) as process:  # fmt: skip
            os.close(status)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(order).encode() + b"\n")
            lines = process.stdout.read().decode().splitlines()
            ending = json.loads(os.read(told, 4_096))
        os.close(told)
    assert (ending["code"], ending["limit"]) == (0, "")
    assert lines[0].startswith(f"{_NOBODY} b'HTTP/1.1 405 ")
    assert lines[1] == "['0', '1', '2', '3'] ['LC_ALL']"


def test_a_pair_is_connected_to_itself_and_its_port_is_closed_behind_it():
    one, other = launcher._connected()
    with one, other:
        assert one.getpeername() == other.getsockname()
        assert other.getpeername() == one.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(one.getpeername(), timeout=5)


# ── the filter, as the kernel reads it ───────────────────────────────────────────────────────


def answer_of(program: bytes, machine: int, number: int, *arguments: int) -> int:
    """Run a filter as the kernel does: what it answers to one call."""
    shows = struct.pack("=IIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("=HBBI", program))
    value = place = 0
    while True:
        code, yes, no, word = steps[place]
        place += 1
        if code == 0x06:
            return word
        if code == 0x20:
            (value,) = struct.unpack_from("=I", shows, word)
        elif code == 0x54:
            value &= word
        else:
            holds = {0x15: value == word, 0x35: value >= word, 0x45: value & word != 0}[code]
            place += yes if holds else no


#: Calls by name with arguments, and what becomes of them; of a socket: family, type, protocol.
LETS, ASKS, REFUSES, WELL = "let", "asks us", "refused", "does nothing"
CASES: list[tuple[str, tuple[int, ...], str]] = [
    ("socket", (2, 1, 0), ASKS),
    ("socket", (2, 1 | 0o2004000, 6), ASKS),  # closed on exec, not blocking
    ("socket", (2 | 1 << 40, 1, 0), ASKS),  # the kernel looks at the lower half, too
    ("socket", (2, 1, 132), REFUSES),
    ("socket", (2, 1, 262), REFUSES),
    ("socket", (2, 2, 0), REFUSES),
    ("socket", (2, 2 | 1 << 11, 17), REFUSES),
    ("socket", (2, 3, 1), REFUSES),
    ("socket", (2, 5, 0), REFUSES),
    ("socket", (10, 1, 0), REFUSES),
    ("socket", (10, 2, 0), REFUSES),
    ("socket", (1, 1, 0), REFUSES),
    *[("socket", (family, kind, 0), REFUSES) for family in range(46) for kind in (1, 2, 3, 5)
      if family != 2],
    ("socketpair", (1, 1, 0), LETS),
    ("socketpair", (1, 5 | 1 << 19, 0), LETS),
    ("socketpair", (1, 2, 0), REFUSES),
    ("socketpair", (30, 1, 0), REFUSES),
    ("connect", (3, 0, 16), WELL),
    ("bind", (3, 0, 16), REFUSES),
    ("listen", (3, 1), REFUSES),
    ("sendto", (3, 0, 1, 0), LETS),
    ("sendto", (3, 0, 1, 0x20000000), REFUSES),
    ("sendto", (3, 0, 1, 0x20004000), REFUSES),
    ("sendmsg", (3, 0, 0x4000), LETS),
    ("sendmsg", (3, 0, 0x20000000), REFUSES),
    ("sendmmsg", (3, 0, 1, 0x20000000), REFUSES),
    ("sendmmsg", (3, 0x20000000, 0x20000000, 0), LETS),
    ("io_uring_setup", (), REFUSES),
    ("io_uring_enter", (), REFUSES),
    ("io_uring_register", (), REFUSES),
    ("pidfd_getfd", (), REFUSES),
    ("setsid", (), WELL),
    ("setpgid", (0, 0), WELL),
]  # fmt: skip


@pytest.mark.parametrize("machine", launcher._CALLS)
def test_the_filter_lets_nothing_through_but_what_it_must(machine):
    calls = launcher._CALLS[machine]
    program = launcher._program(calls, guarded=True)
    for name, arguments, becomes in CASES:
        found = answer_of(program, calls.machine, calls.numbers[name], *arguments)
        if becomes == REFUSES:
            assert found & 0xFFFF0000 == 0x00050000, (name, arguments)
            assert found & 0xFFFF, (name, arguments)
        else:
            expected = {LETS: 0x7FFF0000, ASKS: 0x7FC00000, WELL: 0x00050000}[becomes]
            assert found == expected, (name, arguments)
    others = set(range(460)) - set(calls.numbers.values())
    assert {answer_of(program, calls.machine, one) for one in others} == {0x7FFF0000}
    for other in {0xC000003E, 0xC00000B7, 0x40000003, 0x40000028} - {calls.machine}:
        assert answer_of(program, other, calls.numbers["socket"], 2, 1, 0) == 0x80000000
    behind = 0x40000000 | calls.numbers["socket"]  # x32, where there is that
    assert answer_of(program, calls.machine, behind, 2, 2, 0) >> 16 == 5


def test_without_a_guard_a_filter_keeps_the_group_and_nothing_else():
    calls = launcher._CALLS["x86_64"]
    program = launcher._program(calls, guarded=False)
    found = {name: answer_of(program, calls.machine, n) for name, n in calls.numbers.items()}
    assert {name for name, one in found.items() if one != 0x7FFF0000} == {"setsid", "setpgid"}
    assert answer_of(program, 0x40000003, calls.numbers["setsid"]) == 0x7FFF0000  # of 32 bits


# ── the guard by itself ──────────────────────────────────────────────────────────────────────


@contextmanager
def guard(
    *hosts: str, policy: LinkPolicy = DEVELOPMENT, traffic: int = 2**30, **more: Any
) -> Iterator[tuple[Guard, Reach, Noted]]:
    noted = Noted()
    reach = Reach("tap-x==1.0", tuple(map(listed, hosts)), policy, calls=noted, **more)
    made = Guard(reach, traffic, lambda: None)
    made.start()
    try:
        yield made, reach, noted
    finally:
        made.close()


def link(made: Guard) -> socket.socket:
    """What a launcher does for a child that asks for a socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), timeout=20)
        other, _ = listener.accept()
    with other:
        socket.send_fds(made._there, [b"x"], [other.fileno()])
    return one


def said(made: Guard, text: bytes) -> bytes:
    with link(made) as one:
        one.sendall(text)
        return one.recv(1_000)


def connect(host: str, port: int) -> bytes:
    return f"CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET http://localhost/ HTTP/1.1\r\n\r\n", 405),
        (b"\x16\x03\x01\x00", 405),
        (b"CONNECT localhost:443 HTTP/1.1 x\r\n\r\n", 400),
        (b"CONNECT localhost:443\r\n\r\n", 400),
        (b"CONNECT localhost:0 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT localhost:65536 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT localhost:4\xb2 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT a,localhost:443 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT localhost.:443 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT x@localhost:443 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT [::1:443 HTTP/1.1\r\n\r\n", 400),
        (b"CONNECT " + b"x" * 9_000, 431),
        (b"CONNECT localhost:22 HTTP/1.1\r\n\r\n", 403),
        (b"CONNECT LOCALHOST:22 HTTP/1.1\r\n\r\n", 403),
        (b"CONNECT 127.0.0.1:443 HTTP/1.1\r\n\r\n", 403),
        (b"CONNECT evil.example:443 HTTP/1.1\r\n\r\n", 403),
    ],
)
def test_what_is_no_proper_request_for_a_listed_host_is_refused(text, status):
    with guard("localhost") as (made, _, noted):
        assert said(made, text).startswith(f"HTTP/1.1 {status} ".encode())
    assert noted.calls == []


def test_a_name_is_looked_up_once_and_a_later_answer_changes_nothing(server):
    answers = [["127.0.0.1"], ["169.254.169.254"]]

    def lookup(*_: object) -> list[str]:
        return answers.pop(0)

    with guard(f"api.example:{server.port}", lookup=lookup) as (made, reach, noted):
        for _ in range(3):
            assert said(made, connect("api.example", server.port)).startswith(b"HTTP/1.1 200 ")
        assert reach.failure is None
    assert len(answers) == 1
    assert [call.status for call in noted.calls] == [200, 200, 200]


def test_of_a_name_with_one_forbidden_address_none_is_used():
    refused: list[tuple[str, str]] = []
    asked: list[str] = []

    def lookup(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["192.0.2.1", "127.0.0.1"]

    more: dict[str, Any] = {"lookup": lookup, "refused": lambda *one: refused.append(one)}
    with guard("*.example.com", policy=LinkPolicy(), **more) as (made, reach, noted):
        for _ in range(3):
            answer = said(made, connect("canary.example.com", 443))
            assert answer.startswith(b"HTTP/1.1 403 ")
        with pytest.raises(EgressRefused) as caught:
            reach.check()
    assert "canary" not in str(caught.value)
    assert (asked, refused, noted.calls) == (
        ["canary.example.com"], [("192.0.2.1", "private")], []
    )  # fmt: skip


@contextmanager
def listening(serve) -> Iterator[int]:
    """A host that does as `serve` says with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    one, _ = listener.accept()
                    threading.Thread(target=serve, args=(one,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def endless(one: socket.socket) -> None:
    with one, suppress(OSError):
        while True:
            one.sendall(b"x" * 65_536)


def test_bytes_without_end_are_ended():
    with (
        listening(endless) as port,
        guard(f"127.0.0.1:{port}", traffic=2**22) as (made, reach, noted),
        link(made) as one,
    ):
        one.sendall(connect("127.0.0.1", port))
        came = 0
        while piece := one.recv(65_536):
            came += len(piece)
        assert came <= 2**22 + 100
        until(lambda: reach.failure is not None)
        with pytest.raises(ConfigError, match="SYNCWARD_CONNECTORS_TRAFFIC") as caught:
            reach.check()
    assert (caught.value.code, noted.calls[0].error) == ("connector_limit", "connector_limit")


def echo(one: socket.socket) -> None:
    with one, suppress(OSError):
        while piece := one.recv(65_536):
            one.sendall(piece)


def test_what_is_no_tls_is_not_passed_on_where_tls_is_wanted():
    heard: list[bytes] = []

    def serve(one: socket.socket) -> None:
        with one:
            heard.append(one.recv(100))

    with listening(serve) as port, guard(f"127.0.0.1:{port}") as (made, reach, noted):
        with link(made) as one:
            one.sendall(connect("127.0.0.1", port) + b"SELECT password")
            while one.recv(1_000):
                pass
        until(lambda: heard and reach.failure)
    assert heard == [b""]
    assert [(c.status, c.error, c.request_bytes) for c in noted.calls] == [(200, "tls_too_weak", 0)]
    loose = replace(DEVELOPMENT, tls_required=False)
    with (
        listening(echo) as port,
        guard(f"127.0.0.1:{port}", policy=loose) as (made, *_),
        link(made) as one,
    ):
        one.sendall(connect("127.0.0.1", port) + b"plain")
        got = b""
        while not got.endswith(b"plain"):
            got += one.recv(1_000)


def send(one: socket.socket, what: bytes) -> None:
    one.sendall(what)
    one.shutdown(socket.SHUT_WR)


def test_large_pieces_go_through_both_ways_whole():
    loose = replace(DEVELOPMENT, tls_required=False)
    sent = os.urandom(2**23)
    with listening(echo) as port, guard(f"127.0.0.1:{port}", policy=loose) as (made, _, noted):
        with link(made) as one:
            one.sendall(connect("127.0.0.1", port))
            assert one.recv(1_000).startswith(b"HTTP/1.1 200")
            threading.Thread(target=send, args=(one, sent)).start()
            got = b""
            while piece := one.recv(2**20):
                got += piece
        assert got == sent
        until(lambda: noted.calls)
    assert [(c.error, c.request_bytes, c.response_bytes) for c in noted.calls] == [
        (None, 2**23, 2**23)
    ]


def test_those_who_say_nothing_keep_nobody_else_out_for_long(monkeypatch):
    monkeypatch.setattr("connectors.child.guard._ASKS_WITHIN_S", 0.3)
    with listening(echo) as port, guard(f"127.0.0.1:{port}") as (made, *_):
        slow = [link(made) for _ in range(CONNECTIONS_MAX)]
        for one in slow:
            one.sendall(b"CONN")
        until(lambda: len(made._open) >= CONNECTIONS_MAX)
        assert said(made, connect("127.0.0.1", port)).startswith(b"HTTP/1.1 503")
        assert slow[0].recv(100).startswith(b"HTTP/1.1 408")
        for one in slow:
            one.close()
        until(lambda: not made._open)
        assert said(made, connect("127.0.0.1", port)).startswith(b"HTTP/1.1 200")


def test_what_is_not_there_is_said_and_noted():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def lookup(*_: object) -> list[str]:
        raise TransientError("x", code="dns")

    with guard(f"127.0.0.1:{port}") as (made, _, noted):
        assert said(made, connect("127.0.0.1", port)).startswith(b"HTTP/1.1 502 nothing listens")
    assert [(c.status, c.error) for c in noted.calls] == [(None, "connection_refused")]
    with guard("api.example", lookup=lookup) as (made, reach, noted):
        assert said(made, connect("api.example", 443)).startswith(b"HTTP/1.1 502 ")
        assert reach.failure is None
    assert [(c.status, c.error) for c in noted.calls] == [(None, "dns")]


def test_closing_ends_a_connection_at_once_and_notes_it():
    with listening(echo) as port:
        with guard(f"127.0.0.1:{port}") as (made, _, noted):
            one = link(made)
            one.sendall(connect("127.0.0.1", port))
            assert one.recv(100).startswith(b"HTTP/1.1 200")
        assert [(c.status, c.error) for c in noted.calls] == [(200, None)]
        assert one.recv(100) == b""
        one.close()


# ── what a resource lists ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("entry", "host", "port", "admitted"),
    [
        ("api.example.com", "api.example.com", 443, True),
        ("API.example.com", "api.example.com", 443, True),
        ("api.example.com", "x.api.example.com", 443, False),
        ("api.example.com", "api.example.com.evil.net", 443, False),
        ("api.example.com", "api.example.com", 80, False),
        ("api.example.com:8443", "api.example.com", 8443, True),
        ("api.example.com:8443", "api.example.com", 443, False),
        ("*.example.com", "a.example.com", 443, True),
        ("*.example.com", "a.b.example.com", 443, True),
        ("*.example.com", "example.com", 443, False),
        ("*.example.com", "evilexample.com", 443, False),
        ("192.0.2.1", "192.0.2.1", 443, True),
        ("[2001:DB8::1]:8443", "2001:db8::1", 8443, True),
    ],
)
def test_an_entry_admits_what_it_says(entry, host, port, admitted):
    assert listed(entry).admits(host, port) is admitted
    assert listed(listed(entry).shown) == listed(entry)


@pytest.mark.parametrize(
    "entry",
    ["", "*", "*.com", "*.*.example.com", "https://example.com", "example.com/", "a b", "a,b",
     "x:0", "x:65536", "x:y", "*.192.0.2.1", "[::1", "[::1]443", "ex*mple.com", "é.example", ":1"],
)  # fmt: skip
def test_an_entry_that_says_something_else_is_refused(entry):
    with pytest.raises(ValueError, match="write a host each"):
        listed(entry)
    config = {"connector": "tap-x==1.0", "hosts": [entry]}
    with pytest.raises(ConfigError, match="hosts: write a host each"):
        registry.validate_config("singer", config, LinkPolicy())


def test_hosts_are_stored_only_where_there_are_some_and_lead_secrets_elsewhere():
    config = {"connector": "tap-x==1.0"}
    stored = [
        registry.validate_config("singer", {**config, "hosts": hosts}, LinkPolicy())
        for hosts in ([], ["a.example.com"], "a.example.com, *.b.example.com:8443")
    ]
    assert "hosts" not in stored[0]  # as a worker of the version before knows it
    assert stored[2]["hosts"] == ["a.example.com", "*.b.example.com:8443"]
    assert len({registry.aim_digest("singer", one) for one in stored}) == 3
    assert registry.validate_config("singer", stored[2], LinkPolicy()) == stored[2]
