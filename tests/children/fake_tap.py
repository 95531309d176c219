#!/usr/bin/env python3
"""A Singer tap of our own, over files that the tests write; with `misbehave` it does so.

Stands alone: it is started like any other tap, by an interpreter that knows nothing of us.
"""

import argparse
import ctypes
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from pathlib import Path

out = sys.stdout


def say(message):
    out.write(json.dumps(message) + "\n")


def read_json(path):
    return json.loads(Path(path).read_text())


def tables(config):
    found = sorted(Path(config["directory"]).glob("*.json"))
    return {path.stem: read_json(path) for path in found}


def discover(config):
    streams = []
    for name, table in tables(config).items():
        streams.append(
            {
                "tap_stream_id": name, "stream": name, "schema": schema_of(table),
                "key_properties": table["key"],
                "metadata": [
                    {
                        "breadcrumb": [],
                        "metadata": {
                            "inclusion": "available", "table-key-properties": table["key"],
                            "valid-replication-keys": table["cursors"],
                        },
                    }
                ],
            }
        )  # fmt: skip
    json.dump({"streams": streams}, out, indent=1)


def schema_of(table):
    return {"type": "object", "properties": table["properties"]}


def rows(config, name):
    """The rows of a table: (id, time of change, JSON)."""
    path = Path(config["directory"]) / f"{name}.rows"
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n").split("\t", 2)


def chosen(config, name, cursor, since):
    """Those behind a state, in the order of the cursor, so that any state in between is true."""
    if cursor is None:
        yield from ((None, text) for _, _, text in rows(config, name))
        return
    place = 0 if cursor == "id" else 1
    keyed = [(key(row[place], cursor), row[2]) for row in rows(config, name)]
    for at, text in sorted(keyed, key=lambda one: one[0]):
        if since is None or (at > since if cursor == "id" else at >= since):
            yield at, text


def key(text, cursor):
    return int(text) if cursor == "id" else text


def own(entry):
    return next(m["metadata"] for m in entry["metadata"] if m["breadcrumb"] == [])


def sync(config, entry, state):
    name, table = entry["tap_stream_id"], tables(config)[entry["tap_stream_id"]]
    says = own(entry)
    cursor = None
    if says.get("replication-method") != "FULL_TABLE":
        cursor = says.get("replication-key") or table["cursors"][0]
    marks = state.setdefault("bookmarks", {})
    since = marks.get(name, {}).get("at")
    if table.get("silent"):
        time.sleep(3600)
    say({"type": "SCHEMA", "stream": name, "schema": schema_of(table),
         "key_properties": table["key"]})  # fmt: skip
    begin, number = f'{{"type":"RECORD","stream":"{name}","record":', 0
    if table.get("endless"):
        while True:
            out.write(f'{begin}{{"id":{number}}}}}\n')
            number += 1
    every = config.get("state_every", 1_000)
    for at, text in chosen(config, name, cursor, since):
        out.write(f"{begin}{text}}}\n")
        number += 1
        if cursor is not None:
            marks[name] = {"at": at}
            if number % every == 0:
                say({"type": "STATE", "value": state})
    say({"type": "STATE", "value": state})


# ── what a tap should not do ─────────────────────────────────────────────────────────────────

SCHEMA = {
    "type": "SCHEMA", "stream": "t", "key_properties": ["id"],
    "schema": {"type": "object", "properties": {
        "id": {"type": "integer"}, "note": {"type": ["null", "string"]},
    }},
}  # fmt: skip


def record(number, **more):
    say({"type": "RECORD", "stream": "t", "record": {"id": number, "note": "n", **more}})


def state(at):
    say({"type": "STATE", "value": {"bookmarks": {"t": {"at": at}}}})


def some(count=3):
    say(SCHEMA)
    for number in range(1, count + 1):
        record(number)


def garbage(_):
    some()
    out.write("Traceback (most recent call last): canary-in-garbage\n")
    state(3)


def no_object(_):
    some()
    out.write("[1, 2]\n")
    state(3)


def giant_line(_):
    say(SCHEMA)
    while True:
        out.write("x" * 65_536)


def partial_last_line(_):
    some()
    state(3)
    out.write('{"type": "RECORD", "stream": "t", "rec')


def nothing(_):
    return


def exit_1_after_all_rows(_):
    some()
    state(3)
    out.flush()
    sys.exit(1)


def killed(_):
    some()
    out.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def state_before_rows(_):
    state(0)
    some()


def repeated_state(_):
    some()
    for _ in range(5):
        state(3)


def type_changes(_):
    some()
    state(3)
    changed = json.loads(json.dumps(SCHEMA))
    changed["schema"]["properties"]["note"] = {"type": "integer"}
    say(changed)
    record(4, note=5)
    state(4)


def column_comes(_):
    some()
    changed = json.loads(json.dumps(SCHEMA))
    changed["schema"]["properties"]["more"] = {"type": "integer"}
    say(changed)
    record(4, more=5)
    state(4)


def without_key(_):
    some()
    say({"type": "RECORD", "stream": "t", "record": {"note": "canary-of-a-row"}})
    state(3)


def before_schema(_):
    record(1)
    some()
    state(3)


def wrong_type(_):
    some()
    record(4, note=17)
    state(4)


def hang(_):
    some()
    out.flush()
    time.sleep(3600)


def ignore_sigterm(_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    hang(_)


def grandchildren(config):
    """Leave processes behind that hold the pipe, one of them in a session of its own."""
    Path(config["directory"], "pids").touch()
    for apart in (False, True):
        if os.fork() == 0:
            if apart:
                os.setsid()
                if os.fork():
                    os._exit(0)
            with Path(config["directory"], "pids").open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(3600)
    while len(Path(config["directory"], "pids").read_text().split()) < 2:
        time.sleep(0.01)
    some()
    state(3)


def grandchildren_and_hang(config):
    grandchildren(config)
    out.flush()
    time.sleep(3600)


def eat_memory(_):
    say(SCHEMA)
    out.flush()
    eaten: list[bytes] = []
    while len(eaten) < 400:
        eaten.append(os.urandom(2**20))
        time.sleep(0.002)
    time.sleep(3600)


def many_processes(_):
    some()
    out.flush()
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(3600)
    time.sleep(3600)


def many_helpers(_):
    """Two hundred that end at once, each left behind by a process that does, too."""
    for _ in range(200):
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.wait()
    time.sleep(1)  # so that they are looked at
    some()
    state(3)


def runs_away(config):
    """Processes that fork and end all the time: by their pids they are never there."""
    program = (
        "import os, time\nfor _ in range(3): os.fork()\nend = time.monotonic() + 20\n"
        "while time.monotonic() < end:\n    if os.fork(): os._exit(0)\n"
    )
    where = config["directory"]  # tells whose they are
    subprocess.Popen([sys.executable, "-I", "-S", "-c", program, where])
    some()
    state(3)


def leaves(_):
    """Try every way into another group of processes; tell which of them led there."""
    before, apart = os.getpgrp(), []
    for way in (os.setsid, os.setpgrp, lambda: os.setpgid(0, 0)):
        process = os.fork()
        if process == 0:
            way()
            os._exit(os.getpgrp() != before or os.getsid(0) != before)
        if os.waitpid(process, 0)[1]:
            apart.append(way.__name__)
    sys.stderr.write(f"apart: {apart}\n")
    some()
    state(3)


def spin(_):
    some()
    out.flush()
    while True:
        pass


def show_config(config):
    text = json.dumps(config)
    sys.stderr.write(f"my config is {text} and my login {config['login']}\n")
    some()
    out.write(f"{config['login']}\n")


def secret_in_state(config):
    some()
    say({"type": "STATE", "value": {"login": config["login"]}})


def look_around(config):
    """Tell what can be seen: environment, arguments, descriptors, where it is."""
    seen = {
        "environment": dict(os.environ),  # noqa: TID251 - what it may see is the question
        "arguments": sys.argv,
        "descriptors": sorted(int(n) for n in os.listdir("/proc/self/fd")),  # noqa: PTH208
        "directory": os.getcwd(),  # noqa: PTH109 - stands alone
    }  # fmt: skip
    Path("left-behind").write_text(config["login"])
    os.environ["LEAKED"] = config["login"]  # noqa: TID251 - as above
    Path(config["directory"], "seen").write_text(json.dumps(seen))
    some()
    state(3)


def who_am_i(_):
    sys.stderr.write(f"uid {os.getuid()}, groups {os.getgroups()}\n")
    some()
    state(3)


def reach_out(config):
    """Try what a confined program must not: read a file of the worker, write one, signal it."""
    tried = {}
    for name, act in {
        "read": lambda: Path(config["forbidden"]).read_text(),
        "write": lambda: Path(config["forbidden"]).with_name("made").write_text("x"),
        "spy": lambda: Path(f"/proc/{config['worker']}/environ").read_bytes(),
        "signal": lambda: os.kill(config["worker"], 0),
    }.items():
        try:
            act()
            tried[name] = "done"
        except OSError:
            tried[name] = "refused"
    Path("own").write_text("x")
    sys.stderr.write(f"tried {json.dumps(tried)}\n")
    some()
    state(3)


def fetch(config):
    """Read over HTTP, as taps do: with what the libraries make of the environment."""
    sys.path.insert(0, config["site"])
    say(SCHEMA)
    for number, (way, url) in enumerate(config["fetch"], 1):
        try:
            note = WAYS[way](url, config.get("authority"))
        except Exception as error:  # noqa: BLE001 - whatever the library raises
            note = f"{type(error).__name__}: {error}"
        record(number, note=note)
    state(len(config["fetch"]))
    if config.get("fails"):
        out.flush()
        sys.exit(1)


def with_urllib(url, authority):
    import urllib.request

    trust = ssl.create_default_context(cafile=authority)
    with urllib.request.urlopen(url, context=trust, timeout=20) as answer:  # noqa: S310 - a test's
        return answer.read().decode()


def with_requests(url, authority):
    import requests

    return requests.get(url, verify=authority, timeout=20).text


def with_httpx(url, authority):
    import httpx

    trust = ssl.create_default_context(cafile=authority)
    return httpx.get(url, verify=trust, timeout=20).text


def with_asyncio(url, authority):
    import asyncio

    import httpx

    async def get():
        trust = ssl.create_default_context(cafile=authority)
        async with httpx.AsyncClient(verify=trust, timeout=20) as client:
            answers = await asyncio.gather(*(client.get(url) for _ in range(20)))
            return answers[-1].text

    return asyncio.run(get())


WAYS = {
    "urllib": with_urllib, "requests": with_requests, "httpx": with_httpx,
    "asyncio": with_asyncio,
}  # fmt: skip


def connected(begin, *target):
    """Connected, it seems; but what is heard is the guard, and nothing else."""
    with socket.create_connection(target, timeout=20) as link:
        link.sendall(begin)
        return link.recv(100).decode()


def many_sockets(config):
    began = time.monotonic()
    for _ in range(config["sockets"]):
        socket.socket().close()
    sys.stderr.write(f"sockets took {time.monotonic() - began} s\n")
    some()
    state(3)


def made(*of_what):
    with socket.socket(*of_what):
        return "done"


def bound():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return "done"


def listening():
    with socket.socket() as one:
        one.shutdown(socket.SHUT_RDWR)
        one.listen()
        return "done"


def fast_open(*target):
    with socket.socket() as one:
        one.sendto(b"x", 0x20000000, target)
        return "done"


def datagrams():
    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return "done"


def ring():
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.syscall(425, 8, ctypes.create_string_buffer(120))
    return "done" if number >= 0 else os.strerror(ctypes.get_errno())


def pair():
    here, there = socket.socketpair()
    here.sendall(b"fine")
    return there.recv(4).decode()


def break_out(config):
    """Try every way past the guard that there is, and tell what came of each."""
    target = config["target"]
    get = b"GET /latest/meta-data HTTP/1.1\r\nHost: x\r\n\r\n"
    as_a_database = struct.pack("!II", 8, 80877103)
    tries = {
        "direct": lambda: connected(get, *target),
        "database": lambda: connected(as_a_database, *target),
        "bound": bound, "listening": listening, "fast_open": lambda: fast_open(*target),
        "datagrams": datagrams, "ring": ring, "pair": pair,
        "looked_up": lambda: str(socket.getaddrinfo("example.com", 443)),
        "datagram": lambda: made(socket.AF_INET, socket.SOCK_DGRAM),
        "datagram6": lambda: made(socket.AF_INET6, socket.SOCK_DGRAM),
        "raw": lambda: made(socket.AF_INET, socket.SOCK_RAW, 1),
        "six": lambda: made(socket.AF_INET6, socket.SOCK_STREAM),
        "unix": lambda: made(socket.AF_UNIX, socket.SOCK_STREAM),
        "netlink": lambda: made(socket.AF_NETLINK, socket.SOCK_RAW),
        "packet": lambda: made(17, socket.SOCK_RAW),
        "machines": lambda: made(40, socket.SOCK_STREAM),
        "crypto": lambda: made(38, socket.SOCK_SEQPACKET),
        "mptcp": lambda: made(socket.AF_INET, socket.SOCK_STREAM, 262),
        "sctp": lambda: made(socket.AF_INET, socket.SOCK_STREAM, 132),
    }  # fmt: skip
    found = {}
    for name, act in tries.items():
        try:
            found[name] = act()
        except OSError as error:
            found[name] = f"refused: {error.strerror}"
    some()
    sys.stderr.write(f"tried {json.dumps(found)}\n")
    state(3)


def close_stdout(_):
    some()
    state(3)
    out.flush()
    os.close(1)
    time.sleep(3600)


def flood_stderr(_):
    some()
    for number in range(200_000):
        sys.stderr.write(f"line {number} of very many lines that nobody wants to read at all\n")
    state(3)


def clock_skew(_):
    say(SCHEMA)
    say({"type": "RECORD", "stream": "t", "record": {"id": 1, "note": None},
         "time_extracted": "2999-01-01T00:00:00Z"})  # fmt: skip
    state(1)


def rows_after_state(_):
    some()
    state(3)
    record(4)


def still_syncing(_):
    some()
    say({"type": "STATE", "value": {"currently_syncing": "t", "bookmarks": {}}})


def rotate(config):
    """What taps with one-time refresh tokens do: they write their config anew."""
    path = sys.argv[sys.argv.index("--config") + 1]
    Path(path).write_text(json.dumps({**config, "login": config["login"] + "-next"}))
    some()
    state(3)


def new_version(_):
    say(SCHEMA)
    say({"type": "ACTIVATE_VERSION", "stream": "t", "version": 7})
    for number in range(1, 3):
        say({"type": "RECORD", "stream": "t", "record": {"id": number, "note": "v"},
             "version": 7})  # fmt: skip
    state(2)


def batch_files(_):
    say(SCHEMA)
    say({"type": "BATCH", "stream": "t", "encoding": {}, "manifest": ["file:///etc/passwd"]})


def noise(_):
    some()
    out.write("\n  \n")
    say({"type": "SOMETHING_NEW", "x": 1})
    say({"type": "RECORD", "stream": "other", "record": {"id": 1}})
    say({"type": "state", "value": {"bookmarks": {"t": {"at": 3}}}})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--discover", action="store_true")
    parser.add_argument("--catalog")
    parser.add_argument("--state")
    asked = parser.parse_args()
    config = read_json(asked.config)
    if asked.discover:
        discover(config)
        return
    known = read_json(asked.state) if asked.state else {}
    misbehave = config.get("misbehave")
    if misbehave:
        globals()[misbehave](config)
        return
    for entry in read_json(asked.catalog)["streams"]:
        if own(entry).get("selected"):
            sync(config, entry, known)


if __name__ == "__main__":
    main()
