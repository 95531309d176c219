"""Numbered places on a run's way at which a process may die, and how to make it die there.

Product code knows nothing of this: a test process replaces the function that bears the name by one
that exits before or after it. Exit code 137 is what a kill -9 leaves, and as little is cleaned up.
"""

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

DIED = 137

#: What the process is doing when it dies: see the acts of test_crash_points.py.
Act = Literal[
    "due", "dispatch", "execute", "doubt", "restored", "beat", "drain", "reap_lease", "reap_job"
]


@dataclass(frozen=True)
class Point:
    act: Act
    when: Literal["before", "after"]
    function: str  # module:attribute
    means: str
    nth: int = 1

    def __str__(self) -> str:
        nth = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.act}: {self.when} {self.function}{nth} ({self.means})"


RUN, DUE, DISPATCH, REAP = "workers.run_sync", "storage.due", "storage.dispatch", "storage.reap"
CLAIMS, LOAD = "storage.claims", "connectors.postgres.load"
DESTINATION = "connectors.destinations.postgres:PostgresDestination"
SOURCE = "connectors.sources.postgres:PostgresSource"

POINTS = (
    # a schedule becomes a queued run
    Point("due", "after", f"{DUE}:claim_due", "schedules locked"),
    Point("due", "after", f"{DUE}:_queue", "run inserted, slot in the ledger, due time not moved"),
    Point("due", "after", f"{DUE}:apply", "everything written, nothing committed"),
    Point("due", "after", "scheduler.ticks:due_tick", "committed"),
    # a queued run becomes a job
    Point("dispatch", "after", f"{DISPATCH}:lock", "the only dispatcher"),
    Point("dispatch", "after", f"{DISPATCH}:room", "slots counted"),
    Point("dispatch", "after", f"{DISPATCH}:waiting", "accounts and runs read"),
    Point("dispatch", "after", f"{DISPATCH}:mark", "marked, not committed"),
    Point("dispatch", "before", "tests.world:Jobs.send", "committed, not sent"),
    Point("dispatch", "after", "tests.world:Jobs.send", "sent"),
    # a worker claims it
    Point("execute", "before", f"{RUN}:execute", "job fetched"),
    Point("execute", "before", f"{CLAIMS}:claim", "transaction open"),
    Point("execute", "after", f"{CLAIMS}:claim", "claimed, not committed"),
    Point("execute", "after", "storage.work:take", "credentials taken, not committed"),
    Point("execute", "after", f"{RUN}:_claim", "claim committed"),
    Point("execute", "before", "storage.work:with_keys", "wrapped keys not fetched yet"),
    Point("execute", "before", "workers.ends:unsealed", "about to unseal"),
    Point("execute", "after", "workers.ends:unsealed", "unsealed"),
    Point("execute", "after", "connectors.registry:open_source", "connected to the source"),
    Point("execute", "after", "connectors.registry:open_destination", "connected to both"),
    # it moves the first stream
    Point("execute", "before", f"{DESTINATION}.claim_stream", "stream not claimed"),
    Point("execute", "after", f"{DESTINATION}.claim_stream", "fence raised at the destination"),
    Point("execute", "after", f"{SOURCE}.extract", "source asked"),
    Point("execute", "before", f"{DESTINATION}.load", "batch at hand"),
    Point("execute", "before", "psycopg:Copy.write", "no chunk written"),
    Point("execute", "after", "psycopg:Copy.write", "first chunk in flight"),
    Point("execute", "after", f"{LOAD}:run", "rows loaded, cursor not stored"),
    Point("execute", "before", "connectors.postgres.state:commit", "before the cursor"),
    Point("execute", "after", "connectors.postgres.state:commit", "cursor stored, not committed"),
    Point("execute", "after", f"{DESTINATION}.load", "committed at the destination"),
    Point("execute", "before", f"{CLAIMS}:record_stream", "result not recorded"),
    Point("execute", "after", f"{CLAIMS}:record_stream", "result recorded, not committed"),
    # and the second, which is recorded with the outcome
    Point("execute", "before", f"{RUN}:_stream", "first stream recorded", nth=2),
    Point("execute", "after", f"{DESTINATION}.claim_stream", "second stream claimed", nth=2),
    Point("execute", "after", f"{LOAD}:run", "second stream loaded, not committed", nth=2),
    Point("execute", "after", f"{DESTINATION}.load", "both committed at the destination", nth=2),
    # the end
    Point("execute", "before", f"{RUN}:_finish", "outcome known"),
    Point("execute", "after", "storage.logs:append_own", "log written, not committed"),
    Point("execute", "before", f"{CLAIMS}:finish", "not finished"),
    Point("execute", "before", f"{CLAIMS}:end", "last stream recorded"),
    Point("execute", "after", f"{CLAIMS}:finish", "finished, not committed"),
    Point("execute", "after", f"{RUN}:_finish", "finish committed"),
    Point("execute", "after", f"{RUN}:execute", "job not acknowledged"),
    # the destination knows more than the control database
    Point("doubt", "before", "storage.restored:knows", "about to ask who loaded last"),
    Point("doubt", "after", "storage.restored:knows", "it was a run of ours"),
    Point("restored", "before", "storage.restored:adopt", "approved, fence not raised"),
    Point("restored", "after", "storage.restored:adopt", "fence raised, not committed"),
    Point("restored", "after", "workers.history:adopted", "fence committed"),
    # beside it
    Point("beat", "before", "workers.heartbeat:heartbeat", "lease not renewed"),
    Point("beat", "after", "workers.heartbeat:heartbeat", "lease renewed"),
    Point("drain", "before", f"{CLAIMS}:finish", "not handed back"),
    Point("drain", "after", f"{CLAIMS}:_put_back", "handed back, not committed"),
    Point("drain", "after", f"{RUN}:_finish", "handed back"),
    Point("drain", "before", f"{CLAIMS}:sign_off", "still listed as a worker"),
    Point("drain", "after", f"{CLAIMS}:sign_off", "signed off, not committed"),
    # what was lost is recovered
    Point("reap_lease", "before", f"{REAP}:amnesty", "to ask whether the database is young"),
    Point("reap_lease", "before", f"{REAP}:_take", "expired leases read"),
    Point("reap_lease", "before", f"{REAP}:_requeue_lost", "lease deleted"),
    Point("reap_lease", "after", f"{REAP}:_requeue_lost", "run queued again"),
    Point("reap_lease", "after", f"{REAP}:expired_leases", "nothing committed"),
    Point("reap_lease", "before", f"{REAP}:cancel_stuck", "expired leases committed"),
    Point("reap_job", "before", f"{REAP}:cancel_stuck", "nothing done yet"),
    Point("reap_job", "before", f"{REAP}:undelivered", "between two statements"),
    Point("reap_job", "after", f"{REAP}:undelivered", "queued again, not committed"),
    Point("reap_job", "before", f"{REAP}:overdue", "before the last statement"),
    Point("reap_job", "before", f"{REAP}:wake_ready", "queued again, accounts not woken"),
    Point("reap_job", "before", f"{REAP}:wake_capped", "accounts woken, not committed"),
    Point("reap_job", "after", "scheduler.ticks:reap_tick", "committed"),
)


def arm(point: Point, die: Callable[[], None], wanted: Callable[[], bool] = lambda: True) -> None:
    """Make this process die at a point. There is no way back, as the process is there to die."""
    module, _, path = point.function.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for attribute in outer:
        owner = getattr(owner, attribute)
    original = getattr(owner, name)
    passed = 0

    def reached() -> None:
        nonlocal passed
        passed += wanted()
        if passed == point.nth:
            die()

    @functools.wraps(original)
    def mortal(*args: Any, **kwargs: Any) -> Any:
        if point.when == "before":
            reached()
            return original(*args, **kwargs)
        answer = original(*args, **kwargs)
        if answer or answer is None:  # a tick that found nothing to do did not pass here
            reached()
        return answer

    setattr(owner, name, mortal)


def die() -> None:
    """End at once: no handler, no rollback, no goodbye."""
    os._exit(DIED)
