#!/usr/bin/env python3
"""An Airbyte source of our own, over the same files as fake_tap.py; with `misbehave` it does so.

Stands alone: it is started like any other source, by an interpreter that knows nothing of us.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

out = sys.stdout
NOW = 1_700_000_000_000


def say(type_, name, **body):
    out.write(json.dumps({"type": type_, name: body}) + "\n")


def log(text):
    say("LOG", "log", level="INFO", message=text)


def read_json(path):
    return json.loads(Path(path).read_text())


def tables(config):
    found = sorted(Path(config["directory"]).glob("*.json"))
    return {path.stem: read_json(path) for path in found}


def entry_of(name, table):
    entry = {
        "name": name, "supported_sync_modes": ["full_refresh", "incremental"],
        "json_schema": {"type": "object", "properties": table["properties"]},
        "source_defined_primary_key": [[column] for column in table["key"]],
    }  # fmt: skip
    if table["cursors"]:
        entry["default_cursor_field"] = table["cursors"][:1]
    return entry


def discover(config):
    streams = [entry_of(name, table) for name, table in tables(config).items()]
    say("CATALOG", "catalog", streams=streams)


def check(config):
    log(f"checking {config.get('directory')}")
    failed = config.get("login") == "wrong"
    message = f"login {config['login']} is wrong" if failed else None
    say("CONNECTION_STATUS", "connectionStatus", status="FAILED" if failed else "SUCCEEDED",
        message=message)  # fmt: skip


def spec():
    properties = {
        "directory": {"type": "string"},
        "pin": {"type": "string", "airbyte_secret": True},
    }
    say("SPEC", "spec", connectionSpecification={"type": "object", "properties": properties})


def rows(config, name):
    """The rows of a table: (id, time of change, JSON)."""
    with Path(config["directory"], f"{name}.rows").open(encoding="utf-8") as file:
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


def state(name, at, count):
    say("STATE", "state", type="STREAM",
        stream={"stream_descriptor": {"name": name}, "stream_state": {"at": at}},
        sourceStats={"recordCount": float(count)})  # fmt: skip


def status(name, what, **more):
    say("TRACE", "trace", type="STREAM_STATUS", emitted_at=NOW,
        stream_status={"stream_descriptor": {"name": name}, "status": what, **more})  # fmt: skip


def sync(config, configured, since):
    name = configured["stream"]["name"]
    table = tables(config)[name]
    incremental = configured["sync_mode"] == "incremental"
    cursor = configured["cursor_field"][0] if incremental else None
    if table.get("silent"):
        time.sleep(3600)
    status(name, "STARTED")
    begin = f'{{"type":"RECORD","record":{{"stream":"{name}","emitted_at":{NOW},"data":'
    number = 0
    if table.get("endless"):
        while True:
            out.write(f'{begin}{{"id":{number}}}}}}}\n')
            number += 1
    every, new = config.get("state_every", 1_000), 0
    for at, text in chosen(config, name, cursor, since):
        out.write(f"{begin}{text}}}}}\n")
        number, new, since = number + 1, new + 1, at
        if cursor is not None and number % every == 0:
            state(name, since, new)
            new = 0
    state(name, since, new)
    status(name, "COMPLETE")


# ── what a source should not do ──────────────────────────────────────────────────────────────


def record(number, **more):
    say("RECORD", "record", stream="t", emitted_at=NOW, data={"id": number, "note": "n", **more})


def some(count=3):
    status("t", "STARTED")
    for number in range(1, count + 1):
        record(number)


def complete(count=3):
    state("t", count, count)
    status("t", "COMPLETE")


def error(kind, **more):
    say("TRACE", "trace", type="ERROR", emitted_at=NOW,
        error={"message": "canary-of-a-message", "failure_type": kind, **more})  # fmt: skip


def garbage(_):
    some()
    out.write("Traceback (most recent call last): canary-in-garbage\n")
    complete()


def giant_line(_):
    while True:
        out.write("x" * 65_536)


def partial_last_line(_):
    some()
    complete()
    out.write('{"type": "RECORD", "record": {"str')


def nothing(_):
    return


def exit_0_after_an_error(_):
    some()
    error("system_error", internal_message="canary-inside", stack_trace="line\nline")
    complete()


def config_is_wrong(config):
    error("config_error", internal_message=f"the login {config['login']}")
    out.flush()
    sys.exit(1)


def transient(_):
    some()
    error("transient_error")


def exit_1_after_all_rows(_):
    some()
    complete()
    out.flush()
    sys.exit(1)


def incomplete(_):
    some()
    state("t", 3, 3)
    status("t", "INCOMPLETE")


def never_complete(_):
    some()
    state("t", 3, 3)


def told_to_wait(_):
    some()
    reset = int((time.time() + 3_600) * 1_000)
    limited = {"type": "RATE_LIMITED", "rate_limited": {"quota_reset": reset}}
    status("t", "RUNNING", reasons=[limited])
    error("transient_error")
    out.flush()
    sys.exit(1)


def state_before_rows(_):
    status("t", "STARTED")
    state("t", 0, 0)
    for number in (1, 2):
        record(number)
    status("t", "COMPLETE")


def fewer_than_counted(_):
    some()
    state("t", 3, 4)
    status("t", "COMPLETE")


def without_key(_):
    some()
    say("RECORD", "record", stream="t", emitted_at=NOW, data={"note": "canary-of-a-row"})
    complete(4)


def wrong_type(_):
    some()
    record(4, note=17)
    complete(4)


def no_object(_):
    some()
    say("RECORD", "record", stream="t", emitted_at=NOW, data=[1])
    complete()


def secret_in_state(config):
    some()
    state("t", config["login"], 3)
    status("t", "COMPLETE")


def legacy_state(_):
    some()
    say("STATE", "state", data={"t": {"at": 3}})
    status("t", "COMPLETE")


def global_state(_):
    some()
    streams = [{"stream_descriptor": {"name": "t"}, "stream_state": {"at": 3}}]
    say("STATE", "state", type="GLOBAL",
        **{"global": {"shared_state": {"lsn": 7}, "stream_states": streams}})  # fmt: skip
    status("t", "COMPLETE")


def noise(_):
    some()
    out.write("\n\n")
    say("SOMETHING_NEW", "x")
    say("RECORD", "record", stream="other", emitted_at=NOW, data={"id": 1})
    state("other", 1, 1)
    log("nothing to see here")
    say("TRACE", "trace", type="ESTIMATE", emitted_at=NOW, estimate={"name": "t", "type": "STREAM"})
    complete()


def clock_skew(_):
    say("RECORD", "record", stream="t", emitted_at=32_472_144_000_000, data={"id": 1, "note": None})
    complete(1)


def rotate(config):
    """A new login, before the next rows."""
    changed = {**config, "login": config["login"] + "-next"}
    say("CONTROL", "control", type="CONNECTOR_CONFIG", emitted_at=NOW,
        connectorConfig={"config": changed})  # fmt: skip
    some()
    complete()


def show_config(config):
    sys.stderr.write(f"my login is {config['login']}\n")
    log(f"my config is {json.dumps(config)}")
    some()
    complete()


def hang(_):
    some()
    out.flush()
    time.sleep(3600)


def grandchildren(config):
    Path(config["directory"], "pids").touch()
    if os.fork() == 0:
        os.setsid()
        Path(config["directory"], "pids").write_text(f"{os.getpid()}\n")
        time.sleep(3600)
    while not Path(config["directory"], "pids").read_text():
        time.sleep(0.01)
    some()
    complete()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["spec", "check", "discover", "read"])
    parser.add_argument("--config")
    parser.add_argument("--catalog")
    parser.add_argument("--state")
    asked = parser.parse_args()
    if asked.command == "spec":
        spec()
        return
    config = read_json(asked.config)
    if asked.command != "read":
        {"check": check, "discover": discover}[asked.command](config)
        return
    misbehave = config.get("misbehave")
    if misbehave:
        globals()[misbehave](config)
        return
    known = read_json(asked.state) if asked.state else []
    ats = {
        one["stream"]["stream_descriptor"]["name"]: one["stream"]["stream_state"]["at"]
        for one in known
    }
    for configured in read_json(asked.catalog)["streams"]:
        sync(config, configured, ats.get(configured["stream"]["name"]))


if __name__ == "__main__":
    main()
