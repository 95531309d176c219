"""Runs: kinds, states, the legal moves between states, and how a run ends."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from schemas.guards import Finding
from schemas.records import Between, Purge, StreamResult


class RunKind(StrEnum):
    """What a run does; all kinds but the last two are about a connection (docs/states.md)."""

    SYNC = "sync"
    BACKFILL = "backfill"
    RESET = "reset"
    PURGE = "purge"
    SCHEMA = "schema"
    TEST = "test"
    DISCOVER = "discover"

    @property
    def of_connection(self) -> bool:
        """Whether it is about a connection, with both of its ends; else about one resource."""
        return self not in {RunKind.TEST, RunKind.DISCOVER}

    @property
    def leaves_document(self) -> bool:
        """Whether a run of this kind that succeeded has an output beside its streams' counts."""
        return self in {RunKind.SCHEMA, RunKind.TEST, RunKind.DISCOVER}


class RunState(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    AWAITING_APPROVAL = "awaiting_approval"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


#: The only moves there are (drawn in docs/states.md). Storage makes each of them with
#: `UPDATE … WHERE state = …`; a CHECK keeps live and final states in their own tables.
MOVES: dict[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.DISPATCHED, RunState.FAILED, RunState.CANCELLED}),
    RunState.DISPATCHED: frozenset(
        {RunState.RUNNING, RunState.QUEUED, RunState.FAILED, RunState.CANCELLED}
    ),
    RunState.RUNNING: frozenset(
        {
            RunState.SUCCEEDED,
            RunState.FAILED,
            RunState.AWAITING_APPROVAL,
            RunState.CANCELLED,
            RunState.QUEUED,
        }
    ),
    RunState.AWAITING_APPROVAL: frozenset({RunState.QUEUED, RunState.CANCELLED}),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset(),
    RunState.CANCELLED: frozenset(),
}

FINAL_STATES = frozenset(state for state, moves in MOVES.items() if not moves)
LIVE_STATES = frozenset(MOVES) - FINAL_STATES


class Trigger(StrEnum):
    SCHEDULE = "schedule"
    MANUAL = "manual"
    AGAIN = "again"  # asked for while a run was live


class Priority:
    """Smaller goes first."""

    INTERACTIVE = 0  # test, discover, schema: somebody is waiting at a prompt
    MANUAL = 3
    SCHEDULED = 5
    BACKFILL = 7  # old rows can wait; promoted like all that wait long

    @staticmethod
    def asked_for(kind: RunKind) -> int:
        """Return the priority of a run that a person asked for."""
        if kind is RunKind.BACKFILL:
            return Priority.BACKFILL
        interactive = {RunKind.TEST, RunKind.DISCOVER, RunKind.SCHEMA}
        return Priority.INTERACTIVE if kind in interactive else Priority.MANUAL


class RunOptions(BaseModel):
    """What one trigger asked for, kept with the run (and with `run_again`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    full_refresh: bool = False
    streams: tuple[str, ...] = ()  # empty: every stream of the connection
    approved: str | None = None  # the guard whose finding a person has approved
    tripped: tuple[Finding, ...] = ()  # what guards found, waiting for a person
    approvals: tuple[Finding, ...] = ()  # what a person has approved of that: so much, no more
    window: Between | None = None  # of a backfill
    purge: Purge | None = None  # of a purge
    accept: tuple[str, ...] = ()  # frozen streams whose table may follow its source, this once

    @model_serializer(mode="wrap")
    def _unset_is_not_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)  # an older version does not know these
        later = ("tripped", "approvals", "window", "purge", "accept")
        return {name: value for name, value in written.items() if value or name not in later}

    def merged(self, other: "RunOptions") -> "RunOptions":
        """Combine two triggers that one run will serve: the wider wish wins."""
        streams = () if not self.streams or not other.streams else (*self.streams, *other.streams)
        return RunOptions(
            full_refresh=self.full_refresh or other.full_refresh,
            streams=tuple(dict.fromkeys(streams)),
            accept=tuple(dict.fromkeys((*self.accept, *other.accept))),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One execution as people see it, live or ended."""

    run_id: UUID
    account_id: UUID
    kind: RunKind
    subject_id: UUID
    subject_name: str
    state: RunState
    trigger: Trigger
    attempt: int
    queued_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    not_before: datetime | None
    worker_id: str | None
    error_code: str | None
    error: str | None
    run_again: bool = False
    findings: tuple[Finding, ...] = ()  # of guards, while it awaits approval


class Rule(StrEnum):
    """What holds a run back, in the order in which the scheduler asks (docs/states.md)."""

    ENDED = "ended"
    RUNNING = "running"
    AWAITING_APPROVAL = "awaiting_approval"
    AFTER_CURRENT = "after_current"
    INSTANCE_PAUSED = "instance_paused"
    ACCOUNT_PAUSED = "account_paused"
    CONNECTION_PAUSED = "connection_paused"
    NO_SCHEDULER = "no_scheduler"
    NOT_BEFORE = "not_before"
    REDIS_DOWN = "redis_down"
    NO_WORKER = "no_worker"
    JOB_SENT = "job_sent"
    GLOBAL_CAP = "global_cap"
    ACCOUNT_CAP = "account_cap"
    RESOURCE_CAP = "resource_cap"
    TURN = "turn"


@dataclass(frozen=True, slots=True)
class Explanation:
    """`expected_start` is an estimate from the durations of recent runs; None: not foreseeable."""

    run_id: UUID
    state: RunState
    rule: Rule
    sentence: str
    ahead: int = 0  # runs that take their turn before this one
    expected_start: datetime | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to execute one run, and all that the worker needs to begin."""

    run_id: UUID
    account_id: UUID
    kind: RunKind
    subject_id: UUID
    attempt: int
    attempts_without_progress: int
    fence: int
    token: UUID
    options: RunOptions
    lease: timedelta
    deadline: datetime | None = None
    deferred_for: timedelta = timedelta(0)  # what it was told to wait since its last progress
    trigger: Trigger = Trigger.MANUAL
    waited_s: float = 0.0  # from when the run was ready, by the database's clock


class OutcomeKind(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRY = "retry"
    AWAITING_APPROVAL = "awaiting_approval"
    CANCELLED = "cancelled"
    HANDED_BACK = "handed_back"  # drain: no attempt is counted
    DEFERRED = "deferred"  # told when to come back: no attempt is counted either


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended, as a value."""

    kind: OutcomeKind
    error_code: str | None = None
    error: str | None = None
    retry_after: timedelta | None = None
    streams: tuple[StreamResult, ...] = ()
    document: dict[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def progressed(self) -> bool:
        """Whether this attempt completed at least one stream."""
        return any(stream.state == "succeeded" for stream in self.streams)
