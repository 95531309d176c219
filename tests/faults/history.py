"""What the databases say after a run of faults, and what the run itself wrote down."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import namedtuple_row


class Event(NamedTuple):
    seq: int
    xid: int
    at: datetime
    account_id: UUID | None
    action: str
    target_id: UUID
    reason: str | None
    principal: str
    detail: dict[str, Any]


class Kill(NamedTuple):
    worker_id: str
    at: datetime


class Outage(NamedTuple):
    """A time in which nobody could recover anything: no database, or no scheduler."""

    begin: datetime
    end: datetime


@dataclass
class Facts:
    """What no database can know: bounds, the faults that were made, what was seen outside."""

    lease: timedelta = timedelta(seconds=30)
    tick: timedelta = timedelta(seconds=1)  # of the reaper
    dispatch_deadline: timedelta = timedelta(seconds=10)
    cancel_bound: timedelta = timedelta(seconds=10)
    slack: timedelta = timedelta(seconds=2)  # a loaded machine's
    runs_max: int = 200
    asked: set[UUID] = field(default_factory=set)  # runs that an operator was promised
    kills: list[Kill] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    #: connection -> [first slot, first slot after the end) of a schedule that was not touched
    windows: dict[UUID, tuple[datetime, datetime]] = field(default_factory=dict)
    #: accounts of equal weight whose backlogs must be served equally; and how many turns each
    #: must have had before the shares say anything
    equals: set[UUID] = field(default_factory=set)
    turns_min: int = 20
    drained_after: timedelta | None = None
    drain_bound: timedelta | None = None
    secrets: dict[str, str] = field(default_factory=dict)  # what it is -> its value
    files: list[Path] = field(default_factory=list)  # logs, the queue's own files
    keyring: Path | None = None  # the operator's, which opens records
    scrapes: list[str] = field(default_factory=list)

    def disturbed(self, begin: datetime, end: datetime) -> timedelta:
        """How much of a time somebody spent in an outage."""
        covered, total = begin, timedelta(0)
        for outage in sorted(self.outages):
            low, high = max(outage.begin, covered), min(outage.end, end)
            if high > low:
                total += high - low
                covered = high
        return total


@dataclass
class Stream:
    """One stream on both sides: rows by identity, and how often each is there."""

    connection_id: UUID
    name: str
    missing: int
    surplus: int


@dataclass
class History:
    """Everything the checker looks at, read once."""

    control: psycopg.Connection[Any]
    destinations: Sequence[psycopg.Connection[Any]] = ()
    streams: Sequence[Stream] = ()

    def rows(self, query: str) -> Sequence[Any]:
        with self.control.cursor(row_factory=namedtuple_row) as cursor:
            return cursor.execute(query.encode()).fetchall()

    @cached_property
    def events(self) -> list[Event]:
        found = self.rows(
            "SELECT seq, xid::text::bigint AS xid, at, account_id, action, target_id, body "
            "FROM audit.event ORDER BY seq"
        )
        return [
            Event(
                row.seq, row.xid, row.at, row.account_id, row.action, row.target_id,
                body.get("reason"), body["principal"], body.get("detail", {}),
            )
            for row in found
            for body in (json.loads(row.body),)
        ]  # fmt: skip

    @cached_property
    def of_runs(self) -> dict[UUID, list[Event]]:
        """The events that target a run, per run, in order."""
        found: dict[UUID, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.action.startswith("run."):
                found[event.target_id].append(event)
        return found

    @cached_property
    def runs(self) -> Sequence[Any]:
        return self.rows("SELECT * FROM runs ORDER BY finished_at")

    @cached_property
    def active(self) -> Sequence[Any]:
        return self.rows("SELECT * FROM active_runs")

    @cached_property
    def slots(self) -> Sequence[Any]:
        return self.rows("SELECT * FROM slots ORDER BY scheduled_for")

    @cached_property
    def schedules(self) -> Sequence[Any]:
        return self.rows("SELECT * FROM schedules")

    @cached_property
    def now(self) -> datetime:
        (row,) = self.rows("SELECT clock_timestamp() AS at")
        at: datetime = row.at
        return at

    @cached_property
    def moves(self) -> Sequence[Any]:
        return self.rows("SELECT *, xid::text::bigint AS x FROM recorded.moves ORDER BY n")

    @cached_property
    def commits(self) -> Sequence[Any]:
        found: list[Any] = []
        for destination in self.destinations:
            with destination.cursor(row_factory=namedtuple_row) as cursor:
                found += cursor.execute("SELECT * FROM recorded.commits ORDER BY n").fetchall()
        return found
