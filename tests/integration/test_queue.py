"""The one door into the queue: the same behaviour on a fake Redis and on a real Valkey."""

import secrets
import socket
import time
from uuid import uuid4

import dramatiq
import pytest
from dramatiq.brokers.redis import RedisBroker
from fakeredis import FakeRedis, FakeServer

from schemas.jobs import QUEUE, Job
from workers import actors
from workers.enqueue import JobQueue, open_broker, open_client
from workers.messages import ACTOR

pytestmark = pytest.mark.integration


@pytest.fixture(params=["fake", "real"])
def connect(request, valkey):
    """Return a function that opens one more client of the same empty server."""
    if request.param == "fake":
        server = FakeServer()
        return lambda: FakeRedis(server=server)
    valkey.flush()
    return lambda: open_client(valkey.url)


class Consumer:
    """A Dramatiq worker as workers/main.py builds it, with a function of the test behind it."""

    def __init__(self, client, execute, *, timeout: int = 50) -> None:
        self.client = client
        self.broker: RedisBroker = open_broker(self.client)
        actors.register(self.broker, execute)
        self.worker = dramatiq.Worker(
            self.broker, queues={QUEUE}, worker_timeout=timeout, worker_threads=2
        )

    def __enter__(self):
        self.worker.start()
        return self

    def __exit__(self, *_):
        self.worker.stop(timeout=2_000)
        self.broker.close()
        self.client.close()

    def dead(self) -> int:
        return self.client.zcard(f"syncward:{QUEUE}.XQ")


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_job_arrives_as_it_was_sent(connect):
    got: list[Job] = []
    queue = JobQueue(connect())
    job = Job(run_id=uuid4(), dispatch=3)
    assert queue.alive()
    assert queue.send(job)
    with Consumer(connect(), got.append):
        until(lambda: got, "the job never came")
    assert got == [job]
    queue.close()


def test_an_idle_worker_is_woken_by_each_job(connect):
    """Looking by itself every four seconds, it would need sixteen for these."""
    came: list[Job] = []
    queue, jobs = JobQueue(connect()), [Job(run_id=uuid4(), dispatch=1) for _ in range(5)]
    with Consumer(connect(), came.append, timeout=4_000):
        began = time.monotonic()
        for job in jobs:
            queue.send(job)
            until(lambda job=job: job in came, "nobody was woken")
        assert time.monotonic() - began < 10
    queue.close()


def test_a_login_that_may_not_ring_and_wait_still_sends_and_takes(valkey):
    """That of a version before, which docs/network.md granted less."""
    valkey.flush()
    admin = open_client(valkey.url)
    word = secrets.token_urlsafe(12)
    rules = ("~*", "+@all", "-blpop", "-ltrim")
    admin.execute_command("ACL", "SETUSER", "older", "reset", "on", f">{word}", *rules)
    url = valkey.url.replace(f":{valkey.password}@", f"older:{word}@")
    came: list[Job] = []
    with Consumer(open_client(url), came.append):
        queue, job = JobQueue(open_client(url)), Job(run_id=uuid4(), dispatch=1)
        assert queue.send(job)
        until(lambda: job in came, "the job was not taken")
        queue.close()
    assert not admin.exists("syncward:bell"), "it would grow for ever"
    admin.execute_command("ACL", "DELUSER", "older")
    admin.close()


def test_what_rings_while_nobody_listens_is_bounded(connect):
    queue, client = JobQueue(connect()), connect()
    for _ in range(300):
        queue.send(Job(run_id=uuid4(), dispatch=1))
    assert client.llen("syncward:bell") == 100
    queue.close()
    client.close()


def test_a_message_carries_a_run_id_and_a_number_and_nothing_else(connect):
    queue = JobQueue(connect())
    job = Job(run_id=uuid4(), dispatch=7)
    queue.send(job)
    client = connect()
    [raw] = client.hvals(f"syncward:{QUEUE}.msgs")
    message = dramatiq.Message.decode(bytes(raw))
    assert message.args == (str(job.run_id), 7)
    assert (message.kwargs, message.options) == (
        {},
        {"redis_message_id": message.options.get("redis_message_id")},
    )
    client.flushdb()
    client.close()
    queue.close()


def test_an_unreadable_message_and_an_unknown_run_are_dead_lettered_and_not_retried(connect):
    calls: list[Job] = []

    def refuse(job: Job) -> None:
        calls.append(job)
        raise RuntimeError("unknown run")

    queue = JobQueue(connect())
    with Consumer(connect(), refuse) as consumer:
        before = consumer.dead()
        unknown = Job(run_id=uuid4(), dispatch=1)
        queue.send(unknown)
        queue._broker.enqueue(
            dramatiq.Message(queue_name=QUEUE, actor_name=ACTOR, args=("x",), kwargs={}, options={})
        )
        until(lambda: consumer.dead() == before + 2, "not dead-lettered")
        later = Job(run_id=uuid4(), dispatch=1)
        queue.send(later)  # comes behind whatever would be tried again
        until(lambda: consumer.dead() == before + 3, "the next was not dead-lettered")
    assert calls == [unknown, later]
    queue.close()


def test_a_redis_that_is_away_is_noticed_and_nothing_is_raised():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = JobQueue(open_client(f"redis://:{secrets.token_hex(4)}@127.0.0.1:{port}/0"))
    assert not queue.alive()
    assert not queue.send(Job(run_id=uuid4(), dispatch=1))
    queue.close()


def test_a_key_of_somebody_else_in_place_of_the_bell_keeps_no_job_from_coming(connect, caplog):
    """Its consumer goes on: Dramatiq would stop it and log what a library says."""
    client = connect()
    came: list[Job] = []
    client.set("syncward:bell", "not a list")
    with Consumer(connect(), came.append):
        queue = JobQueue(connect())
        jobs = [Job(run_id=uuid4(), dispatch=n) for n in range(1, 4)]
        for job in jobs:
            queue.send(job)
            until(lambda job=job: job in came, "the job was not taken")
        queue.close()
    assert not [r for r in caplog.records if r.levelname == "CRITICAL"], "a consumer was stopped"
    client.delete("syncward:bell")
    client.close()
