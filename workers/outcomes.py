"""How an attempt ended, as a value. Success is default-deny: whatever is missing is a failure."""

import logging
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

from schemas.errors import (
    ConfigError,
    Deferral,
    Draining,
    GuardTripped,
    LeaseLost,
    RunCancelled,
    SyncwardError,
    TransientError,
)
from schemas.guards import DataGuardTripped
from schemas.limits import (
    ATTEMPTS_MAX,
    ATTEMPTS_WITH_PROGRESS_MAX,
    DEFERRAL_SHORTEST,
    DEFERRAL_SPREAD,
    DEFERRED_MAX,
    ERROR_TEXT_MAX,
    RETRY_FACTOR,
    RETRY_FIRST,
    RETRY_LONGEST,
)
from schemas.records import Change, SchemaChange, StreamResult
from schemas.redaction import REDACTOR
from schemas.runs import Claim, Outcome, OutcomeKind
from workers.causes import raw_texts
from workers.control import RunControl
from workers.run_log import RunLog

logger = logging.getLogger(__name__)


def of_attempt(
    work: Callable[[], Outcome], claim: Claim, control: RunControl, run_log: RunLog
) -> Outcome:
    """Run the work and turn whatever it raises into an outcome. The one broad except there is.

    Work that was finished when the signal came is kept, but a run that was told to stop is none
    that succeeded.
    """
    done: tuple[StreamResult, ...] = ()
    try:
        outcome = work()
        done = outcome.streams
        control.check()
    except Exception as error:  # noqa: BLE001 - every way to end is an outcome
        return replace(of_error(_true_reason(error, control), claim, run_log), streams=done)
    else:
        return outcome
    finally:
        control.ended()


def _true_reason(error: Exception, control: RunControl) -> Exception:
    """Prefer the signal: a server call that it cancelled fails in many ways."""
    try:
        control.check()
    except SyncwardError as signal:
        return signal
    return error


def of_error(error: Exception, claim: Claim, run_log: RunLog) -> Outcome:
    """Classify by who can act, and keep what the other system said: masked, in the run's log."""
    outcome = _classified(error, claim, run_log)
    if not isinstance(error, RunCancelled | Draining | LeaseLost):
        run_log.raw(raw_texts(error))
    return outcome


def masked(outcome: Outcome) -> Outcome:
    """Pass every text of an outcome through the sink: what is stored with a run, people see."""
    return replace(
        outcome,
        error=None if outcome.error is None else REDACTOR.text(outcome.error, limit=ERROR_TEXT_MAX),
        streams=tuple(masked_stream(result) for result in outcome.streams),
        document=REDACTOR.document(outcome.document),
    )


def masked_stream(result: StreamResult) -> StreamResult:
    """Pass a stream's error through the sink. Its cursor stays: a masked one could not resume."""
    if result.error is None:
        return result
    error = REDACTOR.text(result.error, limit=ERROR_TEXT_MAX)
    return result.model_copy(update={"error": error})


def _classified(  # noqa: PLR0911 - one return per class reads as a table
    error: Exception, claim: Claim, run_log: RunLog
) -> Outcome:
    """Classify by who can act: a person, time, an approver, or us."""
    match error:
        case RunCancelled():
            return Outcome(OutcomeKind.CANCELLED, error.code, error.public)
        case Draining() | LeaseLost():
            return Outcome(OutcomeKind.HANDED_BACK, error.code)
        case DataGuardTripped():
            return _awaiting(error)  # said in the log of its stream
        case GuardTripped():
            run_log.warning(error.public)
            return Outcome(OutcomeKind.AWAITING_APPROVAL, error.code, error.public)
        case ConfigError():
            run_log.error(error.public)
            return Outcome(OutcomeKind.FAILED, error.code, error.public)
        case Deferral():
            run_log.warning(error.public)
            return _defer(error, claim)
        case TransientError():
            run_log.warning(error.public)
            return _retry(error, claim)
        case SyncwardError() if error.code != SyncwardError.code:  # by its code, e.g. rows_missing
            run_log.error(error.public)
            return Outcome(OutcomeKind.FAILED, error.code, error.public)
        case _:
            return _internal(error, run_log)


def _awaiting(error: DataGuardTripped) -> Outcome:
    """Ask a person: what was found in counts, and the previews for the sealed document."""
    return Outcome(
        OutcomeKind.AWAITING_APPROVAL,
        error.code,
        error.public,
        document={"guards": [preview.document() for preview in error.previews]},
        findings=tuple(preview.finding for preview in error.previews),
    )


def _retry(error: TransientError, claim: Claim) -> Outcome:
    exhausted = (
        claim.attempts_without_progress >= ATTEMPTS_MAX
        or claim.attempt >= ATTEMPTS_WITH_PROGRESS_MAX
        or claim.deadline is not None  # somebody waits at a prompt: say it now
    )
    if exhausted:
        return Outcome(OutcomeKind.FAILED, error.code, error.public)
    delay = error.retry_after or backoff(claim.attempts_without_progress)
    return Outcome(OutcomeKind.RETRY, error.code, error.public, retry_after=delay)


def _defer(error: Deferral, claim: Claim) -> Outcome:
    """Come back when told to, unless that has been said for too long or somebody waits."""
    told = max(error.retry_after or DEFERRAL_SHORTEST, DEFERRAL_SHORTEST)
    if claim.deadline is not None:
        return Outcome(OutcomeKind.FAILED, error.code, error.public)
    if claim.deferred_for + told > DEFERRED_MAX:
        hours = DEFERRED_MAX.total_seconds() / 3600
        text = f"{error.public} It was told to wait for more than {hours:.0f} h in all."
        return Outcome(OutcomeKind.FAILED, "deferred_too_long", text)
    spread = max(told / 10, min(told, DEFERRAL_SPREAD))
    late = told + spread * random.random()  # noqa: S311 - not all at once, and never too early
    return Outcome(OutcomeKind.DEFERRED, error.code, error.public, retry_after=late)


def backoff(attempts: int) -> timedelta:
    """Return 10 s x 3^n capped at 30 min, with up to a quarter of jitter taken off."""
    steps = min(max(attempts - 1, 0), 10)  # far past the cap; a larger power overflows
    longest = min(RETRY_FIRST * float(RETRY_FACTOR**steps), RETRY_LONGEST)
    return longest * (1 - random.random() / 4)  # noqa: S311 - jitter, not a secret


def _internal(error: Exception, run_log: RunLog) -> Outcome:
    """Our bug: the place goes to the run's log, without the message, which may quote data."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    where = " < ".join(f"{f.filename.rsplit('/', 2)[-1]}:{f.lineno}" for f in reversed(frames))
    run_log.error(f"internal error: {type(error).__name__} at {where}")
    logger.error("run_crashed", exc_info=error)
    return Outcome(OutcomeKind.FAILED, "internal", "Internal error; see the run's log.")


def of_streams(results: Sequence[StreamResult], *, wanted: int) -> Outcome:
    """Succeeded only if every wanted stream is complete and no row is unaccounted for."""
    streams = tuple(results)
    failed = [r for r in streams if r.state != "succeeded"]
    if failed:
        names = ", ".join(r.stream for r in failed)
        first = failed[0].error or failed[0].state
        if len(failed) == 1:
            first = first.removeprefix(f"{names}: ")  # it stands before it already
        text = f"{len(failed)} of {wanted} streams failed ({names}): {first}"
        return Outcome(OutcomeKind.FAILED, "streams", text, streams=streams)
    if len(streams) != wanted:
        return Outcome(
            OutcomeKind.FAILED, "incomplete", "Not every stream was read.", None, streams
        )
    for result in streams:
        if result.rows_loaded != result.rows_extracted - result.rows_rejected:
            text = (
                f"{result.stream}: {result.rows_extracted} rows extracted, "
                f"{result.rows_loaded} loaded, {result.rows_rejected} rejected; rows are missing"
            )
            return Outcome(OutcomeKind.FAILED, "rows_missing", text, streams=streams)
    return Outcome(OutcomeKind.SUCCEEDED, streams=streams, document=_rejected(streams))


def _rejected(streams: Sequence[StreamResult]) -> dict[str, object]:
    """Return what the sealed document says of rejected rows: how many, and a few of them."""
    found = [
        {
            "stream": result.stream,
            "rows": result.rows_rejected,
            "sample": [{"key": row.key, "reason": row.reason} for row in result.rejected],
        }
        for result in streams
        if result.rows_rejected
    ]
    return {"rejected": found} if found else {}


def joined(first: StreamResult, second: StreamResult) -> StreamResult:
    """Add up two batches of one stream: counts sum, the cursor range spans both."""
    counts = {
        name: getattr(first, name) + getattr(second, name)
        for name in StreamResult.model_fields
        if name.startswith("rows_") or name in {"bytes", "seconds"}
    }
    changes = (*first.schema_changes, *second.schema_changes)
    return second.model_copy(
        update={**counts, "cursor_from": first.cursor_from, "schema_changes": changes}
    )


def told(changes: Sequence[SchemaChange]) -> list[str]:
    """Describe what changed of a table for the run's log, and what looks like a rename."""
    sentences = [f"schema: {change}" for change in changes]
    gone = {c.before: c.column for c in changes if c.change is Change.REMOVED}
    for change in changes:
        if change.change is Change.ADDED and change.after in gone:
            old = gone[change.after]
            sentences.append(
                f"schema: if {old} was renamed to {change.column}: older values stay in {old}, too"
            )
    return sentences


def sentence(result: StreamResult) -> str:
    """Describe a stream's result for the run's log."""
    return (
        f"{result.mode}: {result.rows_extracted:,} rows extracted; {result.rows_inserted:,} "
        f"inserted, {result.rows_updated:,} updated, {result.rows_unchanged:,} unchanged"
        + (f", {result.rows_deleted:,} deleted" if result.rows_deleted else "")
        + (f", {result.rows_rejected:,} rejected" if result.rows_rejected else "")
        + f" in {result.seconds:.2f} s"
    )


def ending(outcome: Outcome, seconds: float) -> str:
    """Describe the end of an attempt for the run's log."""
    match outcome.kind:
        case OutcomeKind.RETRY:
            after = outcome.retry_after or timedelta(0)
            return f"attempt ends after {seconds:.2f} s; tried again in {_whole(after)} s"
        case OutcomeKind.DEFERRED:
            after = outcome.retry_after or timedelta(0)
            return f"told to come back in {_whole(after)} s; this counts as no attempt"
        case OutcomeKind.HANDED_BACK:
            return f"attempt handed back after {seconds:.2f} s; another worker goes on"
        case _:
            return f"{outcome.kind} after {seconds:.2f} s"


def _whole(delay: timedelta) -> str:
    return f"{delay.total_seconds():.0f}"
