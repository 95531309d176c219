"""What the parts of an installation say about themselves, for `syncward doctor`."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class QueueHealth:
    """Redis as seen from here. `problem` says why it cannot be asked; the rest is then unknown."""

    problem: str | None = None
    latency_s: float = 0.0
    version: str = "unknown"
    maxmemory: int = 0  # bytes; 0: no limit
    maxmemory_policy: str | None = None  # None: this login may not ask
    append_only: bool | None = None
    foreign_keys: int = 0  # of those that were looked at


@dataclass(frozen=True, slots=True)
class OldTransaction:
    """What holds back vacuum, and for how long."""

    what: str
    seconds: float


@dataclass(frozen=True, slots=True)
class DatabaseHealth:
    """The control database as seen from here."""

    revision: str | None
    wanted: str
    latency_s: float
    clock_offset_s: float  # the database's clock minus this host's
    oldest: OldTransaction | None
    partitions_missing: tuple[str, ...]
    defaults_used: tuple[str, ...]  # DEFAULT partitions that hold rows


@dataclass(frozen=True, slots=True)
class ScheduleHealth:
    """Whether runs can start and end."""

    paused: str | None  # the reason of a drained instance
    schedulers: int
    queue_down_since: datetime | None
    workers: int
    slots: int  # of workers that take jobs
    draining: int
    late_s: float
    stuck: int
    deferred: int
    invariants: dict[str, int]  # only those that are violated
    pauses: dict[str, int]  # paused connections by reason
    dead_rows: int
