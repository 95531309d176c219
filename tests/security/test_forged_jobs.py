"""Whoever can write to Redis can delay runs, and neither start nor change one (T33)."""

import json
import pickle
import re
import secrets
import time
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import dramatiq
import pytest
import redis

from schemas.errors import TransientError
from schemas.jobs import QUEUE, Job
from schemas.quotas import Quota, Rate
from schemas.runs import RunState
from tests.faults.test_processes import Fleet
from workers import main, messages
from workers.enqueue import JobQueue, open_client
from workers.quotas import SharedQuotas
from workers.refusals import JobRefusals

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
LIST, MESSAGES, DEAD = (f"syncward:{QUEUE}{end}" for end in ("", ".msgs", ".XQ"))
EVENTS = (
    "SELECT body FROM audit.event WHERE action = 'job.refused' AND class = 'A' "
    "AND target_kind = 'instance' ORDER BY seq"
)


def genuine(run_id: object = None, dispatch: object = 1) -> dict[str, Any]:
    """A message as the scheduler sends it."""
    return {
        "queue_name": QUEUE, "actor_name": "execute", "args": [str(run_id or uuid4()), dispatch],
        "kwargs": {}, "options": {"redis_message_id": str(uuid4())},
        "message_id": str(uuid4()), "message_timestamp": int(time.time() * 1000),
    }  # fmt: skip


class Boom:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forged(path: Path) -> dict[str, bytes]:
    """Return messages that are no jobs of ours, by what is wrong with them."""
    deep = "[" * 100_000 + "]" * 100_000
    wrong: dict[str, dict[str, Any]] = {
        "another_actor": {"actor_name": "delete_everything"},
        "another_queue": {"queue_name": "default"},
        "no_arguments": {"args": []},
        "too_many": {"args": [str(uuid4()), 1, "x"]},
        "no_uuid": {"args": ["'; DROP TABLE runs; --", 1]},
        "null": {"args": [None, None]},
        "number_as_text": {"args": [str(uuid4()), "1"]},
        "fraction": {"args": [str(uuid4()), 1.5]},
        "boolean": {"args": [str(uuid4()), True]},
        "negative": {"args": [str(uuid4()), -1]},
        "huge_number": {"args": [str(uuid4()), 2**70]},
        "object": {"args": [{"$ne": None}, {"a": 1}]},
        "not_a_list": {"args": "ab"},
        "one_mb": {"args": ["x" * 1_000_000, 1]},
        "no_key": {"options": {}},
        "a_key_that_is_none": {"options": {"redis_message_id": ["x"]}},
        "options_missing": {"options": None},
        "an_odd_id": {"message_id": {"a": 1}},
        "an_odd_time": {"message_timestamp": "now"},
        "one_field_more": {"evil": True},
    }
    found = {name: json.dumps({**genuine(), **change}).encode() for name, change in wrong.items()}
    return found | {
        "pickle": pickle.dumps(Boom(path)),
        "empty": b"",
        "not_utf8": b"\xff\xfe\x00",
        "a_number": b"1",
        "an_array": b"[]",
        "deep": deep.encode(),
        "deep_arguments": json.dumps(genuine())
        .replace('"kwargs": {}', f'"kwargs": {deep}')
        .encode(),
        "cut_off": json.dumps(genuine()).encode()[:-5],
        "a_nan": json.dumps(genuine(dispatch=float("nan"))).encode(),
    }


#: What Dramatiq would do something with; a later version of Syncward may add others.
DISGUISED: tuple[dict[str, Any], ...] = (
    {"kwargs": {"run_id": str(uuid4()), "dispatch": 1}},
    {"options": {"eta": 1}},
    {"options": {"eta": "soon"}},
    {"options": {"eta": 2**60}},
    {"options": {"retries": 5, "max_retries": 99}},
    {"options": {"pipe_target": {"queue_name": QUEUE, "actor_name": "execute"}}},
    {"options": {"on_failure": "execute", "on_success": "execute"}},
    {"options": {"time_limit": 1, "max_age": 1}},
)


def push(client: redis.Redis, data: bytes | None, key: str | None = None) -> str:
    """Write a message past the door, as somebody with the login could."""
    key = key or str(uuid4())
    if data is not None:
        client.hset(MESSAGES, key, data)
    client.rpush(LIST, key)
    return key


def until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Worker:
    """Dramatiq's worker as workers/main.py builds it, on a world's dependencies."""

    def __init__(self, world, valkey) -> None:
        self.world = world
        self.client = open_client(valkey.url)
        self.worker = main._dramatiq(world.deps, self.client, world.deps.settings, Event())
        world.deps.heartbeat.start()
        world.deps.logs.start()
        self.worker.start()

    def idle(self) -> bool:
        """Say whether the queue is empty and nothing is held: in this order, for jobs move so."""
        if self.client.llen(LIST) != 0:
            return False
        held = [self.client.scard(k) for k in self.client.keys("syncward:__acks__.*")]
        return sum(held) == 0

    def stop(self) -> None:
        self.worker.stop(timeout=5_000)
        self.world.deps.heartbeat.stop()
        self.world.deps.logs.stop()
        self.client.close()


@pytest.fixture
def worker(world, valkey):
    valkey.flush()
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    made = Worker(world, valkey)
    yield made
    made.stop()


def told(world) -> dict[str, list[int]]:
    """Return the counts of the events by reason."""
    found: dict[str, list[int]] = {}
    for (body,) in world.control.all(EVENTS):
        said = json.loads(body)
        assert (said["outcome"], said["principal"]) == ("denied", "worker:w1")
        found.setdefault(said["reason"], []).append(said["detail"]["count"])
    return found


def test_what_is_no_job_is_buried_unread_and_audited_once(world, worker, tmp_path):
    trap = tmp_path / "unpickled"
    wrong = forged(trap)
    keys = {name: push(worker.client, data) for name, data in wrong.items()}
    push(worker.client, None)  # a key without a message
    until(worker.idle, "a forged message is held for ever")
    dead = {key.decode() for key in worker.client.zrange(DEAD, 0, -1)}
    assert {name for name, key in keys.items() if key not in dead} == set()
    assert not trap.exists()
    assert world.control.all("SELECT 1 FROM leases") == []
    assert world.control.all("SELECT 1 FROM runs") == []
    world.deps.refusals.tell()
    assert told(world) == {"unreadable": [len(wrong) + 1]}
    for _ in range(5):
        push(worker.client, b"again")
    until(worker.idle, "still held")
    world.deps.refusals.tell()
    assert told(world) == {"unreadable": [len(wrong) + 1]}, "one event a minute"
    world.deps.refusals.tell(every_s=0)
    assert told(world) == {"unreadable": [len(wrong) + 1, 5]}, "and none is forgotten"


def test_the_queue_goes_on_behind_forged_messages(world, worker, tmp_path):
    for data in forged(tmp_path / "x").values():
        push(worker.client, data)
    asked = world.enqueue()
    for job in world.dispatch():
        JobQueue(worker.client).send(job)
    until(lambda: world.run(asked.run_id).state is RunState.SUCCEEDED, "the run never came")


def test_a_run_that_nobody_asked_for_is_refused_and_audited(world, worker):
    for _ in range(3):
        push(worker.client, json.dumps(genuine()).encode())
    keys = [genuine() for _ in range(2)]
    for said in keys:  # with true keys, as the broker writes them
        push(worker.client, json.dumps(said).encode(), said["options"]["redis_message_id"])
    until(lambda: worker.client.zcard(DEAD) >= 2, "not dead-lettered")
    until(lambda: world.deps.refusals._counts["unknown_run"] == 5, "not counted")
    world.deps.refusals.tell()
    assert told(world) == {"unknown_run": [5]}
    assert world.control.all("SELECT 1 FROM leases") == []


def test_what_dramatiq_would_do_for_a_message_is_not_done(world, worker):
    """The rest of the message is a job, and is looked at as one: of a run that does not exist."""
    for change in DISGUISED:
        said = genuine()
        key = said["options"]["redis_message_id"]
        options = {**said["options"], **change.get("options", {})}
        push(worker.client, json.dumps({**said, **change, "options": options}).encode(), key)
    until(lambda: worker.client.zcard(DEAD) == len(DISGUISED), "not dead-lettered")
    until(worker.idle, "held back for later")
    assert worker.client.llen(f"syncward:{QUEUE}.DQ") == 0
    world.deps.refusals.tell()
    assert told(world) == {"unknown_run": [len(DISGUISED)]}


def test_a_replayed_job_is_harmless_and_no_event(world, worker):
    asked = world.enqueue()
    (job,) = world.dispatch()
    for dispatch in (job.dispatch, job.dispatch, job.dispatch - 1, job.dispatch + 1, 2**31 - 1):
        said = genuine(job.run_id, dispatch)
        push(worker.client, json.dumps(said).encode(), said["options"]["redis_message_id"])
    until(lambda: world.run(asked.run_id).state is RunState.SUCCEEDED, "the run never came")
    until(worker.idle, "a stale job is held")
    for _ in range(3):
        said = genuine(job.run_id, job.dispatch)
        push(worker.client, json.dumps(said).encode(), said["options"]["redis_message_id"])
    until(worker.idle, "a stale job is held")
    actions = world.events(asked.run_id)
    assert (actions.count("run.started"), actions.count("run.succeeded")) == (1, 1)
    world.deps.refusals.tell()
    assert (told(world), worker.client.zcard(DEAD)) == ({}, 0)


def test_a_real_worker_process_survives_it_all_and_tells(world, valkey, tmp_path):
    valkey.flush()
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    trap = tmp_path / "unpickled"
    client = open_client(valkey.url)
    world.close()  # its own heartbeat must not count as a worker
    world.control.act("DELETE FROM workers")
    fleet = Fleet(world, workers=1)
    try:
        for data in (*forged(trap).values(), json.dumps(genuine()).encode()):
            push(client, data)
        fleet.wait(world.enqueue().run_id, RunState.SUCCEEDED)
        until(lambda: len(world.control.all(EVENTS)) >= 2, "not audited")
    finally:
        fleet.stop()
    reasons = {json.loads(body)["reason"] for (body,) in world.control.all(EVENTS)}
    assert (reasons, trap.exists()) == ({"unreadable", "unknown_run"}, False)
    client.close()


def test_refusals_wait_for_a_database_that_is_away(world):
    class Away(JobRefusals):
        """A database that comes back."""

        away = True

        def _write(self, reason, count) -> None:
            if self.away:
                raise TransientError("away")
            super()._write(reason, count)

    now = [0.0]
    refusals = Away(world.deps.engine, world.deps.principal, clock=lambda: now[0])
    refusals.note("unreadable")
    refusals.tell()
    assert told(world) == {}
    refusals.away = False
    refusals.note("unreadable")
    refusals.tell()
    assert told(world) == {"unreadable": [2]}
    refusals.note("unreadable")
    now[0] = 59.0
    refusals.tell()
    assert told(world) == {"unreadable": [2]}
    now[0] = 60.0
    refusals.tell()
    assert told(world) == {"unreadable": [2, 1]}


def test_a_genuine_message_is_read_and_is_what_the_door_sends(valkey):
    """The others could not fail if everything were unreadable."""
    valkey.flush()
    client = open_client(valkey.url)
    queue = JobQueue(client)
    queue.send(Job(run_id=uuid4(), dispatch=3))
    ((_, data),) = client.hgetall(MESSAGES).items()
    assert isinstance(data, bytes)
    assert set(json.loads(data)) == set(genuine())
    assert len(data) < messages._LONGEST / 2
    assert messages.read(data, QUEUE) == dramatiq.Message.decode(data)
    assert messages.read(data, f"{QUEUE}.DQ") is None
    queue.close()


# ── the least login (docs/network.md) ────────────────────────────────────────────────────────


@pytest.fixture
def least(valkey):
    """A client as the documented user, and one as administrator."""
    valkey.flush()
    page = (ROOT / "docs" / "network.md").read_text(encoding="utf-8")
    (rules,) = re.findall(r"^user syncward on >PASSWORD (.*)$", page, re.MULTILINE)
    word = secrets.token_urlsafe(12)
    admin = open_client(valkey.url)
    admin.execute_command("ACL", "SETUSER", "syncward", "reset", "on", f">{word}", *rules.split())
    yield valkey.url.replace(f":{valkey.password}@", f"syncward:{word}@"), admin
    admin.execute_command("ACL", "DELUSER", "syncward")
    admin.close()


def test_the_documented_login_is_enough_for_all_that_we_do(
    world, least, valkey, monkeypatch, shell
):
    url, admin = least
    admin.execute_command("ACL", "LOG", "RESET")
    admin.config_resetstat()
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    admin.set("foreign", "x")
    monkeypatch.setattr("dramatiq.brokers.redis.MAINTENANCE_SCALE", 1)  # at every step
    monkeypatch.setattr(type(valkey), "url", url)
    monkeypatch.setenv("SYNCWARD_REDIS_URL", url)
    admin.execute_command("SCRIPT", "FLUSH")  # so that they must be loaded
    worker = Worker(world, valkey)
    queue = JobQueue(open_client(url))
    asked = world.enqueue()
    assert queue.alive()
    for job in world.dispatch():
        assert queue.send(job)
    assert queue.send(Job(run_id=uuid4(), dispatch=1))  # a dead letter
    push(admin, b"no job")
    until(lambda: world.run(asked.run_id).state is RunState.SUCCEEDED, "the run never came")
    until(lambda: admin.zcard(DEAD) == 2, "not dead-lettered")
    # A worker that died with a job: its job first, or maintenance forgets it between the two.
    admin.sadd("syncward:__acks__.gone." + QUEUE, push(admin, json.dumps(genuine()).encode()))
    admin.zadd("syncward:__heartbeats__", {"gone": 1})
    queue.send(Job(run_id=uuid4(), dispatch=1))
    until(lambda: admin.zscore("syncward:__heartbeats__", "gone") is None, "no maintenance")
    shared = SharedQuotas(open_client(url))
    limit = Quota("api", "all", (Rate(1, timedelta(hours=1)),))
    assert shared.hold("syncward:quota:x", limit) is None
    assert shared.hold("syncward:quota:x", limit) is not None
    shared.close("syncward:quota:x", limit, 60)
    assert shared._is_away is False
    shared.client.close()
    health = queue.health()
    assert (health.problem, health.foreign_keys, health.append_only) == (None, 1, True)
    code, out, err = shell("doctor", "redis", "--json")
    wrong = [c["name"] for c in json.loads(out)["checks"] if c["wrong"]]
    assert (code, wrong) == (1, ["dedicated"]), err
    worker.stop()
    queue.close()
    assert [entry[b"object"] for entry in entries(admin)] == []
    page = (ROOT / "docs" / "network.md").read_text(encoding="utf-8")
    granted = set(re.findall(r"\+([a-z|]+)", page.split("user syncward on")[1].split("```")[0]))
    used = {name.removeprefix("cmdstat_") for name in admin.info("commandstats")}
    assert granted - used == set(), "nothing is granted that nobody needs"


def entries(admin: redis.Redis) -> list[dict[bytes, bytes]]:
    """Return what the server denied; CLIENT SETINFO is only a courtesy of the library."""
    raw = admin.execute_command("ACL", "LOG")
    found = [dict(zip(e[::2], e[1::2], strict=True)) if isinstance(e, list) else e for e in raw]
    plain = [{_bytes(k): _bytes(v) for k, v in entry.items()} for entry in found]
    return [entry for entry in plain if not entry[b"object"].startswith(b"client|")]


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@pytest.mark.parametrize(
    "command",
    [("GET", "foreign"), ("SET", "foreign", "x"), ("DEL", "foreign"), ("CONFIG", "GET", "*"),
     ("FLUSHALL",), ("FLUSHDB",), ("MODULE", "LIST"), ("ACL", "LIST"), ("ACL", "WHOAMI"),
     ("MONITOR",), ("REPLICAOF", "NO", "ONE"), ("CLIENT", "LIST"), ("SHUTDOWN",), ("SAVE",),
     ("BGSAVE",), ("EVAL", "return 1", "0"), ("KEYS", "*"), ("GET", "syncward:x"),
     ("SUBSCRIBE", "x"), ("MIGRATE", "h", "1", "foreign", "0", "1"), ("LPOP", "foreign")],
    ids=" ".join,
)  # fmt: skip
def test_the_documented_login_is_denied_everything_else(least, command):
    url, admin = least
    admin.set("foreign", "secret")
    client = open_client(url)
    if command[0] == "KEYS":
        assert client.keys("*") == [b"foreign"], "names can be seen, as the page says"
    else:
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.execute_command(*command)
    assert admin.get("foreign") == b"secret"
    client.close()


def test_no_script_reaches_a_foreign_key(least):
    url, admin = least
    admin.set("foreign", "secret")
    admin.rpush("foreign_list", "secret")
    client = open_client(url)
    for call in ("'get', 'foreign'", "'lpop', 'foreign_list'", "'del', 'foreign'", "'flushall'"):
        sha = client.script_load(f"return redis.call({call})")
        with pytest.raises(redis.exceptions.ResponseError):
            client.evalsha(sha, 0)
    assert (admin.get("foreign"), admin.llen("foreign_list")) == (b"secret", 1)
    client.close()
