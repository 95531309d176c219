"""The worker's side of run control: claim, heartbeat, progress, finish, all fenced by the lease."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import Connection, text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import LeaseLost
from schemas.failures import CREDENTIAL_FAILURES, OF_LINKS, PAUSING
from schemas.jobs import Job
from schemas.limits import ERROR_TEXT_MAX
from schemas.records import Purge, StreamResult
from schemas.runs import Claim, Outcome, OutcomeKind, RunKind, RunOptions, RunState, Trigger
from storage import audit, logs, renewals, tenancy
from storage.endings import end, free_account, run_event
from storage.logs import SealedLine
from storage.outputs import SealedOutput
from storage.pooler import together


class ClaimRefusal(StrEnum):
    STALE = "stale"  # somebody has it, had it, or a newer dispatch is on its way: acknowledge
    UNKNOWN = "unknown"  # no such run was ever asked for: an error, never an acknowledgement


#: One statement, one round trip. The schedule is locked before the run, as everywhere; the fence is
#: raised only if the run is really ours.
_CLAIM = text(
    "WITH locked AS MATERIALIZED (SELECT s.connection_id FROM active_runs a JOIN schedules s "
    "ON s.connection_id = a.subject_id WHERE a.run_id = :run FOR NO KEY UPDATE OF s), "
    "mine AS (UPDATE active_runs SET state = 'running', lease_token = :token, "
    "worker_id = :worker, attempt = attempt + 1, "
    "attempts_without_progress = attempts_without_progress + 1, "
    "started_at = coalesce(started_at, clock_timestamp()), dispatch_deadline = NULL "
    "FROM (SELECT count(*) FROM locked) AS first "
    "WHERE run_id = :run AND state = 'dispatched' AND dispatch = :dispatch "
    "AND cancel_requested_at IS NULL RETURNING run_id, account_id, kind, subject_id, attempt, "
    "attempts_without_progress, options, deadline_at, deferred_for, trigger, "
    "CAST(extract(epoch FROM clock_timestamp() - greatest(queued_at, not_before)) AS float8) "
    "AS waited_s), "
    "raised AS (UPDATE schedules s SET fence = s.fence + 1 FROM mine "
    "WHERE s.connection_id = mine.subject_id RETURNING s.fence), "
    "leased AS (INSERT INTO leases (run_id, token, worker_id, expires_at) "
    "SELECT run_id, :token, :worker, clock_timestamp() + :lease FROM mine) "
    "SELECT mine.*, coalesce((SELECT fence FROM raised), 0) AS fence, "
    "set_config('syncward.account_id', CAST(mine.account_id AS text), true) FROM mine"
)


def claim(
    tx: Connection, job: Job, worker_id: str, lease: timedelta, principal: Principal
) -> Claim | ClaimRefusal:
    """Take the right to execute a run, if this job is its newest dispatch.

    Raises the connection's fence, so that whoever held the run before cannot write any more.
    After a claim `tx` has entered the run's account.
    """
    token = uuid4()
    row = tx.execute(
        _CLAIM,
        {
            "run": job.run_id,
            "dispatch": job.dispatch,
            "token": token,
            "worker": worker_id,
            "lease": lease,
        },
    ).one_or_none()
    if row is None:
        return _refusal(tx, job)
    audit.append(
        tx,
        run_event(AuditAction.RUN_STARTED, row, principal, worker=worker_id, fence=row.fence),
    )
    return Claim(
        run_id=row.run_id,
        account_id=row.account_id,
        kind=RunKind(row.kind),
        subject_id=row.subject_id,
        attempt=row.attempt,
        attempts_without_progress=row.attempts_without_progress,
        fence=row.fence,
        token=token,
        options=RunOptions.model_validate(row.options),
        lease=lease,
        deadline=row.deadline_at,
        deferred_for=row.deferred_for,
        trigger=Trigger(row.trigger),
        waited_s=max(row.waited_s, 0.0),
    )


def _refusal(tx: Connection, job: Job) -> ClaimRefusal:
    known = tx.execute(
        text(
            "SELECT EXISTS (SELECT FROM active_runs WHERE run_id = :run) "
            "OR EXISTS (SELECT FROM runs WHERE run_id = :run)"
        ),
        {"run": job.run_id},
    ).scalar_one()
    return ClaimRefusal.STALE if known else ClaimRefusal.UNKNOWN


@dataclass(frozen=True, slots=True)
class Beat:
    """One running run's line of a heartbeat."""

    token: UUID
    stream: str | None
    rows: int
    bytes: int
    #: a wait in place: what for, and until when at most
    waits_for: str | None = None
    waits_until: datetime | None = None


_BEAT = """
UPDATE leases l SET expires_at = clock_timestamp() + %(lease)s, stream = b.stream,
  rows = b.rows, bytes = b.bytes, waits_for = b.waits_for, waits_until = b.waits_until,
  progress_at = CASE WHEN (b.stream, b.rows) IS DISTINCT FROM (l.stream, l.rows)
                THEN clock_timestamp() ELSE l.progress_at END
FROM unnest(%(tokens)s::uuid[], %(streams)s::text[], %(rows)s::bigint[], %(bytes)s::bigint[],
            %(waits)s::text[], %(untils)s::timestamptz[])
     AS b (token, stream, rows, bytes, waits_for, waits_until), active_runs a
WHERE l.token = b.token AND a.run_id = l.run_id AND a.lease_token = l.token
RETURNING l.token, a.cancel_requested_at IS NOT NULL
"""
_SEEN = """
INSERT INTO workers (worker_id, version, slots, draining, roots, kinds)
VALUES (%(worker)s, %(version)s, %(slots)s, %(draining)s, %(roots)s, %(kinds)s)
ON CONFLICT (worker_id) DO UPDATE SET seen_at = clock_timestamp(), draining = excluded.draining,
  roots = excluded.roots, kinds = excluded.kinds
"""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """How a worker presents itself with each heartbeat."""

    worker_id: str
    version: str
    slots: int
    draining: bool
    roots: tuple[UUID, ...] = ()  # of its keyring


def heartbeat(
    link: psycopg.Connection[tuple[Any, ...]],
    worker: WorkerState,
    beats: Sequence[Beat],
    lease: timedelta,
) -> dict[UUID, bool]:
    """Renew all leases of this process at once; return token -> cancel requested.

    A token that is missing from the answer is lost.
    """
    with link.cursor() as seen, link.cursor() as renewed, together(link):
        seen.execute(
            _SEEN,
            {
                "worker": worker.worker_id,
                "version": worker.version,
                "slots": worker.slots,
                "draining": worker.draining,
                "roots": list(worker.roots),
                "kinds": [kind.value for kind in RunKind],
            },
        )
        renewed.execute(
            _BEAT,
            {
                "lease": lease,
                "tokens": [beat.token for beat in beats],
                "streams": [beat.stream for beat in beats],
                "rows": [beat.rows for beat in beats],
                "bytes": [beat.bytes for beat in beats],
                "waits": [beat.waits_for for beat in beats],
                "untils": [beat.waits_until for beat in beats],
            },
        )
        return {token: bool(cancelled) for token, cancelled in renewed.fetchall()}


def sign_off(tx: Connection, worker_id: str) -> None:
    """Remove a worker that leaves in order; silent ones are forgotten by the reaper."""
    tx.execute(text("DELETE FROM workers WHERE worker_id = :id"), {"id": worker_id})


_PROGRESSED = text(
    "UPDATE active_runs SET attempts_without_progress = 0, lost_leases = 0, "
    "deferred_for = interval '0' "
    "WHERE run_id = :run_id AND lease_token = :token AND state = 'running'"
)


def progressed(tx: Connection, held: Claim) -> None:
    """Note that a part of a stream is kept for good: attempts without progress count anew."""
    tenancy.enter(tx, held.account_id)
    named = {"run_id": held.run_id, "token": held.token}
    if not tx.execute(_PROGRESSED, named).rowcount:
        raise LeaseLost(f"run {held.run_id}: another worker owns it")


#: Fence, cursor and result in one round trip; nothing of it happens without the lease.
_STREAM = text(
    "WITH mine AS (UPDATE active_runs SET "
    "attempts_without_progress = CASE WHEN :progress THEN 0 ELSE attempts_without_progress END, "
    "lost_leases = CASE WHEN :progress THEN 0 ELSE lost_leases END, "
    "deferred_for = CASE WHEN :progress THEN interval '0' ELSE deferred_for END "
    "WHERE run_id = :run_id AND lease_token = :token AND state = 'running' RETURNING subject_id), "
    "copied AS (INSERT INTO cursors (connection_id, stream, account_id, cursor, fence) "
    "SELECT subject_id, CAST(:stream AS text), CAST(:account_id AS uuid), "
    "CASE WHEN :moves THEN CAST(:cursor_to AS jsonb) END, :fence FROM mine WHERE :progress "
    "ON CONFLICT (connection_id, stream) DO UPDATE SET "
    "cursor = CASE WHEN :moves THEN excluded.cursor ELSE cursors.cursor END, "
    "fence = excluded.fence, updated_at = clock_timestamp()) "
    "INSERT INTO run_streams (run_id, stream, account_id, position, state, mode, rows_extracted, "
    "rows_loaded, rows_inserted, rows_updated, rows_unchanged, rows_deleted, rows_rejected, "
    "bytes, cursor_from, cursor_to, seconds, schema_hash, attempt, error, schema_changes) SELECT "
    "CAST(:run_id AS uuid), CAST(:stream AS text), CAST(:account_id AS uuid), :position, "
    "CAST(:state AS text), CAST(:mode AS text), :rows_extracted, :rows_loaded, :rows_inserted, "
    ":rows_updated, :rows_unchanged, :rows_deleted, :rows_rejected, :bytes, "
    "CAST(:cursor_from AS jsonb), CAST(:cursor_to AS jsonb), :seconds, "
    "CAST(:schema_hash AS text), :attempt, CAST(:error AS text), "
    "CAST(:schema_changes AS jsonb) FROM mine "
    "ON CONFLICT (run_id, stream) DO UPDATE SET (state, mode, rows_extracted, rows_loaded, "
    "rows_inserted, rows_updated, rows_unchanged, rows_deleted, rows_rejected, bytes, "
    "cursor_from, cursor_to, seconds, schema_hash, attempt, error, schema_changes, finished_at) = "
    "(excluded.state, excluded.mode, excluded.rows_extracted, excluded.rows_loaded, "
    "excluded.rows_inserted, excluded.rows_updated, excluded.rows_unchanged, "
    "excluded.rows_deleted, excluded.rows_rejected, excluded.bytes, excluded.cursor_from, "
    "excluded.cursor_to, excluded.seconds, excluded.schema_hash, excluded.attempt, "
    "excluded.error, excluded.schema_changes, clock_timestamp())"
)


def record_stream(
    tx: Connection, held: Claim, result: StreamResult, position: int, principal: Principal
) -> None:
    """Keep one stream's result and copy its cursor, fenced. Progress resets the attempt count."""
    tenancy.enter(tx, held.account_id)
    _record(tx, held, result, position, principal)


_RECORDED = text("SELECT FROM run_streams WHERE run_id = :run AND stream = :stream")


def _record(
    tx: Connection, held: Claim, result: StreamResult, position: int, principal: Principal
) -> None:
    events = [*_schema_events(held, result, principal), *_by_hand(held, result, principal)]
    if events:
        stream = {"run": held.run_id, "stream": result.stream}
        if tx.execute(_RECORDED, stream).first() is None:  # else an attempt before has told
            audit.append(tx, *events)
    recorded = tx.execute(
        _STREAM,
        {
            **result.model_dump(exclude={"cursor_from", "cursor_to", "schema_changes"}),
            "run_id": held.run_id,
            "token": held.token,
            "account_id": held.account_id,
            "fence": held.fence,
            "position": position,
            "progress": result.state == "succeeded",
            "moves": held.kind is not RunKind.BACKFILL,  # the cursor, which was copied before
            "cursor_from": Jsonb(result.cursor_from) if result.cursor_from else None,
            "cursor_to": Jsonb(result.cursor_to) if result.cursor_to else None,
            "schema_changes": Jsonb(result.model_dump(mode="json")["schema_changes"]),
        },
    ).rowcount
    if not recorded:
        raise LeaseLost(f"run {held.run_id}: another worker owns it")


def _schema_events(held: Claim, result: StreamResult, principal: Principal) -> list[AuditEvent]:
    return [
        AuditEvent(
            AuditAction.STREAM_SCHEMA_CHANGED,
            TargetKind.CONNECTION,
            held.subject_id,
            principal,
            account_id=held.account_id,
            run_id=held.run_id,
            detail={
                "stream": result.stream,
                "column": change.column,
                "change": change.change.value,
                "before": change.before,
                "after": change.after,
            },
        )
        for change in result.schema_changes
    ]


_PURGED = {
    Purge.KEEP: AuditAction.STREAM_PURGED,
    Purge.NOW: AuditAction.STREAM_PURGED,
    Purge.UNDO: AuditAction.STREAM_PURGE_UNDONE,
}


def _by_hand(held: Claim, result: StreamResult, principal: Principal) -> list[AuditEvent]:
    """Return the event of what a person had done to a stream, beside its rows being read."""
    if result.state != "succeeded" or held.kind not in {RunKind.RESET, RunKind.PURGE}:
        return []
    how = held.options.purge or Purge.KEEP
    detail: dict[str, str | int | bool | None] = {"stream": result.stream}
    action = AuditAction.STREAM_RESET
    if held.kind is RunKind.PURGE:
        action = _PURGED[how]
        detail["rows"] = result.rows_inserted if how is Purge.UNDO else result.rows_deleted
    if action is AuditAction.STREAM_PURGED:
        detail["for_good"] = how is Purge.NOW
    return [
        AuditEvent(
            action,
            TargetKind.CONNECTION,
            held.subject_id,
            principal,
            account_id=held.account_id,
            run_id=held.run_id,
            detail=detail,
        )
    ]


_FINAL = {
    OutcomeKind.SUCCEEDED: RunState.SUCCEEDED,
    OutcomeKind.FAILED: RunState.FAILED,
    OutcomeKind.CANCELLED: RunState.CANCELLED,
}


#: The first lock in the order, and the account, in one round trip.
_BEGIN_FINISH = text(
    "WITH locked AS MATERIALIZED (SELECT FROM schedules WHERE connection_id = :subject "
    "FOR NO KEY UPDATE) "
    "SELECT set_config('syncward.account_id', :account, true), (SELECT count(*) FROM locked)"
)


def finish(
    tx: Connection,
    held: Claim,
    outcome: Outcome,
    principal: Principal,
    *,
    lines: Sequence[SealedLine] = (),
    output: SealedOutput | None = None,
    credentials: bool = False,
) -> None:
    """Make the run's next move, as the outcome says; LeaseLost if it is no longer ours to make.

    The last stream's result and the log's last lines go with it: one commit for all. So does the
    event that the credentials which the attempt took (`credentials`) were let go.
    """
    beside = _beside(held, outcome, principal, credentials=credentials)
    tx.execute(_BEGIN_FINISH, {"subject": held.subject_id, "account": str(held.account_id)})
    logs.append_own(tx, lines)
    if outcome.streams:
        _record(tx, held, outcome.streams[-1], len(outcome.streams) - 1, principal)
    if output is not None:
        _store_output(tx, held, output)
    elif outcome.document:
        raise ValueError("a document is stored sealed")
    if outcome.kind not in _FINAL:
        tx.execute(text("DELETE FROM leases WHERE token = :token"), {"token": held.token})
        if _put_back(tx, held, outcome, principal, beside):
            return
        # Somebody asked it to stop meanwhile: no worker may claim it again, so it ends here.
        outcome = Outcome(OutcomeKind.CANCELLED, "cancelled", "Cancelled.")
    row = end(
        tx,
        held.run_id,
        _FINAL[outcome.kind],
        principal,
        token=held.token,
        error_code=outcome.error_code,
        error=outcome.error,
        pause_reason=_pausing(tx, held, outcome),
        also=beside,
    )
    if row is None:
        raise LeaseLost(f"run {held.run_id}: another worker owns it")


def _pausing(tx: Connection, held: Claim, outcome: Outcome) -> str | None:
    """Return why the connection is paused now, if it is.

    A login that was authorised again since the attempt met a dead one pauses nothing: whoever
    authorises waits for the schedule's lock, which we hold.
    """
    code = outcome.error_code
    if code not in PAUSING or (
        code == renewals.NEEDS_REAUTH and not renewals.is_dead(tx, held.subject_id)
    ):
        return None
    return code


def _beside(
    held: Claim, outcome: Outcome, principal: Principal, *, credentials: bool
) -> list[AuditEvent]:
    """Return the security events of an attempt's end: they go in with the move itself."""
    code, events = outcome.error_code, []
    if credentials:
        ok = "error" if code in CREDENTIAL_FAILURES else "success"
        used = run_event(AuditAction.CREDENTIAL_USED, held, principal, outcome=ok)
        events.append(used)
    if code == "unsealable":
        events.append(
            run_event(AuditAction.CREDENTIAL_REFUSED, held, principal, outcome="error", reason=code)
        )
    if code in OF_LINKS:
        events.append(
            run_event(AuditAction.EGRESS_REFUSED, held, principal, outcome="denied", reason=code)
        )
    return events


def _store_output(tx: Connection, held: Claim, output: SealedOutput) -> None:
    tx.execute(
        text(
            "INSERT INTO run_outputs (run_id, account_id, envelope, document) "
            "VALUES (:run, :account, :envelope, :counts) "
            "ON CONFLICT (run_id) DO UPDATE SET envelope = excluded.envelope, "
            "document = excluded.document, "
            "created_at = clock_timestamp()"
        ),
        {
            "run": held.run_id,
            "account": held.account_id,
            "envelope": output.envelope,
            "counts": Jsonb(output.counts) if output.counts else None,
        },
    )


_UNCOUNTED = (
    "attempt = attempt - 1, attempts_without_progress = greatest(attempts_without_progress - 1, 0)"
)
_HAND_BACK = f"state = 'queued', lease_token = NULL, not_before = clock_timestamp(), {_UNCOUNTED}"
_DEFER = (
    "state = 'queued', lease_token = NULL, not_before = clock_timestamp() + :delay, "
    f"deferred_for = deferred_for + :delay, {_UNCOUNTED}"
)
_DELAYED = frozenset({OutcomeKind.RETRY, OutcomeKind.DEFERRED})
_RETRY = "state = 'queued', lease_token = NULL, not_before = clock_timestamp() + :delay"
_AWAIT = (
    "state = 'awaiting_approval', lease_token = NULL, "
    "options = options || jsonb_build_object('tripped', CAST(:tripped AS jsonb))"
)
_PUT_BACK = {
    OutcomeKind.RETRY: (_RETRY, AuditAction.RUN_REQUEUED),
    OutcomeKind.DEFERRED: (_DEFER, AuditAction.RUN_REQUEUED),
    OutcomeKind.HANDED_BACK: (_HAND_BACK, AuditAction.RUN_REQUEUED),
    OutcomeKind.AWAITING_APPROVAL: (_AWAIT, AuditAction.RUN_AWAITING_APPROVAL),
}


def _more(outcome: Outcome) -> dict[str, Any]:
    """Return what the move of this kind needs besides: a delay, or what guards have found."""
    if outcome.kind in _DELAYED:
        return {"delay": outcome.retry_after}
    if outcome.kind is OutcomeKind.AWAITING_APPROVAL:
        return {"tripped": Jsonb([found.model_dump(mode="json") for found in outcome.findings])}
    return {}


def _put_back(
    tx: Connection,
    held: Claim,
    outcome: Outcome,
    principal: Principal,
    beside: Sequence[AuditEvent],
) -> bool:
    """Move a run of ours back; False, with nothing done, if it is not ours or to be cancelled."""
    assignments, action = _PUT_BACK[outcome.kind]
    row = tx.execute(
        text(
            f"UPDATE active_runs SET {assignments}, worker_id = NULL, error_code = :code, "  # noqa: S608 - constants of this module
            "error = :error WHERE run_id = :run AND lease_token = :token AND state = 'running' "
            "AND cancel_requested_at IS NULL RETURNING *"
        ).bindparams(**_more(outcome)),
        {
            "run": held.run_id,
            "token": held.token,
            "code": outcome.error_code,
            "error": outcome.error[:ERROR_TEXT_MAX] if outcome.error else None,
        },
    ).one_or_none()
    if row is None:
        return False
    free_account(tx, held.account_id, has_work=True)
    moved = run_event(action, row, principal, reason=outcome.error_code or outcome.kind)
    audit.append(tx, *beside, moved)
    return True
