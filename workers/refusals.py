"""Messages in Redis that were no jobs of ours: counted at once, audited at a bounded pace.

Whoever can write to Redis must not be able to fill the audit stream, so one event a minute speaks
for all messages of its reason.
"""

from collections import Counter
from collections.abc import Callable
from threading import Lock
from time import monotonic

from sqlalchemy import Engine

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import SyncwardError
from storage import audit
from storage.engine import transaction
from workers.messages import Reason

#: Seconds between two events of the same reason from one worker.
EVERY_S = 60.0


class JobRefusals:
    """`note()` is for any thread and only counts; `tell()` writes, once a second and at the end."""

    def __init__(
        self, engine: Engine, principal: Principal, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._engine = engine
        self._principal = principal
        self._clock = clock
        self._lock = Lock()
        self._counts: Counter[Reason] = Counter()
        self._told_at: dict[Reason, float] = {}

    def note(self, reason: Reason) -> None:
        """Count one message."""
        with self._lock:
            self._counts[reason] += 1

    def tell(self, *, every_s: float = EVERY_S) -> None:
        """Write the events that are due. Should the database be away, they wait for it."""
        now = self._clock()
        with self._lock:
            due = [
                (reason, count)
                for reason, count in self._counts.items()
                if count and now - self._told_at.get(reason, float("-inf")) >= every_s
            ]
        for reason, count in due:
            try:
                self._write(reason, count)
            except SyncwardError:  # whatever else needs the database says that it is away
                return
            self._told_at[reason] = now
            with self._lock:
                self._counts[reason] -= count

    def _write(self, reason: Reason, count: int) -> None:
        with transaction(self._engine) as tx:
            audit.append(
                tx,
                AuditEvent(
                    AuditAction.JOB_REFUSED,
                    TargetKind.INSTANCE,
                    audit.INSTANCE_ID,
                    self._principal,
                    outcome="denied",
                    reason=reason,
                    detail={"count": count},
                ),
            )
