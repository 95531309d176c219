"""What the parts of an installation say about themselves, for `syncward doctor`."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


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


@dataclass(frozen=True, slots=True)
class LinkHealth:
    """One link of ours to a server, as it was found when it was tried."""

    name: str  # for people: "control database", "Redis"
    problem: str | None = None  # why it cannot be tried; the rest is then unknown
    version: str | None = None  # of TLS, "TLSv1.3"; None: plaintext
    seen_plain: bool = False  # the server itself says that this session has no TLS
    expires_at: datetime | None = None  # of the certificate that the server showed


@dataclass(frozen=True, slots=True)
class SecretsHealth:
    """What the databases know of keys and of credentials."""

    active_roots: dict[str, UUID]  # by purpose; one that nothing was sealed with yet is missing
    rewrap: int  # data keys that a replaced root still wraps
    replace: int  # data keys that are to be replaced
    short: tuple[str, ...]  # resources with a secret too short to be looked for in texts
    unlike: tuple[str, ...] = ()  # those whose stored secret is not what its last event says


@dataclass(frozen=True, slots=True)
class IdleTransaction:
    """One that has written and waits for its client."""

    pid: int
    login: str
    database: str
    seconds: float


@dataclass(frozen=True, slots=True)
class AuditHealth:
    """How far the audit log is sealed and published, and whether it is still protected."""

    holder: str  # "" if nobody ever sealed
    sealer_alive: bool
    sealed_at: datetime
    size: int
    published_size: int
    seal_lag_s: float
    publish_lag_s: float
    unprotected: tuple[str, ...]  # a line for each protection that is not as it was made
    idle: tuple[IdleTransaction, ...]
