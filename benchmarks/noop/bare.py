"""Take messages with Dramatiq alone and do nothing; print how many, and the seconds.

The URL comes on standard input. Ends when nothing has come for a while.
"""

import sys
import time

import dramatiq

from schemas.jobs import QUEUE
from workers import actors
from workers.enqueue import open_broker, open_client

_QUIET_S = 1.5


def main() -> None:
    url = sys.stdin.readline().strip()
    broker = open_broker(open_client(url))
    seen: list[float] = []
    actors.register(broker, lambda _: seen.append(time.monotonic()))
    worker = dramatiq.Worker(broker, queues={QUEUE}, worker_timeout=50, worker_threads=4)
    started = time.monotonic()
    worker.start()
    while time.monotonic() - max(seen, default=started) < _QUIET_S:
        time.sleep(0.1)
    print(len(seen), max(seen, default=started) - started)
    worker.stop(timeout=2_000)


if __name__ == "__main__":
    main()
