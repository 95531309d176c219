"""Messages of the version before are understood; those of a later one are left, never lost."""

import json
import time
from uuid import uuid4

import dramatiq
import pytest

from scheduler import ticks
from schemas.jobs import QUEUE, Job
from schemas.runs import RunState
from workers import actors, run_sync
from workers.enqueue import open_broker, open_client

pytestmark = pytest.mark.integration

RUN = uuid4()
#: As the version before wrote it, byte for byte but for the run. Changes only with a decision.
BEFORE = (
    '{"queue_name":"sync","actor_name":"execute","args":["%s",3],"kwargs":{},"options":{},'
    '"message_id":"8f9f2f0e-5d8f-4f6e-9b43-0d5a5ef0a111","message_timestamp":1767225600000}'
)


class Queue:
    """A real queue with one worker of this version behind it."""

    def __init__(self, url: str, execute) -> None:
        self.client = open_client(url)
        self.broker = open_broker(self.client)
        actors.register(self.broker, execute)
        self.worker = dramatiq.Worker(
            self.broker, queues={QUEUE}, worker_timeout=50, worker_threads=1
        )
        self.worker.start()

    def put(self, raw: str) -> None:
        self.broker.enqueue(dramatiq.Message.decode(raw.encode()))

    def dead(self) -> int:
        return self.client.zcard(f"syncward:{QUEUE}.XQ")

    def until(self, condition) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close(self) -> None:
        self.worker.stop(timeout=2_000)
        self.broker.close()
        self.client.close()


@pytest.fixture
def open_queue(valkey):
    valkey.flush()
    opened: list[Queue] = []

    def build(execute) -> Queue:
        opened.append(Queue(valkey.url, execute))
        return opened[-1]

    yield build
    for queue in opened:
        queue.close()


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(BEFORE % RUN), **fields})


@pytest.mark.parametrize("raw", [
    BEFORE % RUN,
    changed(kwargs={"hint": "of a later version"}),
    changed(options={"of_a_later_version": 1}),
], ids=["of the version before", "with a keyword more", "with an option more"])  # fmt: skip
def test_a_message_of_one_version_up_or_down_is_a_job(open_queue, raw):
    got: list[Job] = []
    queue = open_queue(got.append)
    queue.put(raw)
    queue.until(lambda: got)
    assert got == [Job(run_id=RUN, dispatch=3)]
    assert queue.dead() == 0


@pytest.mark.parametrize("args", [
    [str(RUN), 3, "more"], [str(RUN)], [], [3, str(RUN)], [{"v": 2, "run": str(RUN)}],
], ids=["one argument more", "one less", "none", "other order", "a document"])  # fmt: skip
def test_a_message_of_an_unknown_shape_is_kept_aside_and_not_executed(open_queue, args):
    got: list[Job] = []
    queue = open_queue(got.append)
    queue.put(changed(args=args))
    queue.until(lambda: queue.dead() == 1)
    assert got == []


def test_the_run_of_a_message_of_an_unknown_shape_comes_again(open_queue, world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: replace}"})
    asked = world.enqueue()
    (job,) = world.dispatch()
    queue = open_queue(lambda found: run_sync.execute(found, world.deps))
    queue.put(changed(args=[str(job.run_id), job.dispatch, "of a later version"]))
    queue.until(lambda: queue.dead() == 1)
    assert world.run(asked.run_id).state is RunState.DISPATCHED

    world.control.act("UPDATE active_runs SET dispatch_deadline = now() - interval '1 s'")
    ticks.reap_tick(world.scheduler)
    world.step()

    run = world.run(asked.run_id)
    assert (run.state, run.attempt) == (RunState.SUCCEEDED, 1)
