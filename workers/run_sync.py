"""One run from claim to outcome. Read it top to bottom: this is what Syncward does."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from time import monotonic

from connectors import masking, registry, results
from schemas.errors import (
    ConfigError,
    CredentialsError,
    LeaseLost,
    ReadAgain,
    SyncwardError,
    TransientError,
)
from schemas.failures import OF_LINKS, OF_ONE_STREAM
from schemas.guards import DataGuardTripped
from schemas.jobs import Job
from schemas.limits import GIVE_UP_AFTER_S
from schemas.records import (
    Cursor,
    Destination,
    LoadRequest,
    Ranges,
    Source,
    StreamClaim,
    StreamResult,
)
from schemas.runs import Claim, Outcome, OutcomeKind, RunKind
from schemas.streams import Mode, StreamSpec
from storage import claims, work
from storage.claims import ClaimRefusal
from storage.engine import again, transaction
from storage.outputs import SealedOutput
from storage.work import Work
from workers import answers, by_hand, guards, history, metrics, outcomes, schema
from workers.attempt import Attempt, Dependencies, Taken
from workers.causes import raw_texts
from workers.control import clock
from workers.ends import common_wire, open_both, warm
from workers.lanes import Lanes
from workers.pseudonyms import PseudonymKeys
from workers.run_log import RunLog

logger = logging.getLogger(__name__)


class UnknownRun(SyncwardError):  # noqa: N818 - an event more than an error
    """A job for a run that nobody asked for: dead-lettered, never acknowledged."""

    code = "unknown_run"


def execute(job: Job, deps: Dependencies) -> None:
    """Execute one dispatch of one run at most once, however often its job is delivered.

    What happens to the run is its outcome, in Postgres, and raises nothing. UnknownRun and a
    control database that is away do raise: then nothing was decided, and the run comes again.
    """
    claimed = again(lambda: _claim(job, deps))
    if claimed is None:
        return
    claim, taken, asked_at = claimed
    run_log = RunLog(deps.logs, claim.run_id, claim.account_id)
    started = monotonic()
    with deps.heartbeat.hold(claim, asked_at) as control, control.secrets:
        attempt = Attempt(claim, control, run_log, deps, taken)
        control.on_give_up(lambda reason: _give_up(attempt, reason))
        outcome = outcomes.of_attempt(lambda: _work(attempt), attempt.claim, control, run_log)
        _finish(attempt, outcome, seconds=monotonic() - started)


def _claim(job: Job, deps: Dependencies) -> tuple[Claim, Taken, float] | None:
    """Claim the run and, under its lease, take its subject with the sealed credentials.

    One commit for both: after it the lease is ours, and the audit stream says that we are about
    to open these credentials. None if somebody else has the run or had it. The lease counts from
    the question, which comes last in the answer, however long the database took.
    """
    asked_at = clock()
    with _timed("claim"), transaction(deps.engine) as tx:
        claim = claims.claim(tx, job, deps.worker_id, deps.settings.lease, deps.principal)
        taken = None
        if not isinstance(claim, ClaimRefusal):
            subject = work.take(tx, claim, deps.principal, keyless=registry.without_secrets())
            taken = claim, subject, asked_at
    _count_claim(claim)
    if claim is ClaimRefusal.UNKNOWN:
        raise UnknownRun(f"run {job.run_id}: no such run was ever asked for")
    if taken is None:
        return None
    return taken[0], _with_keys(taken[1], deps), taken[2]


def _with_keys(taken: Taken, deps: Dependencies) -> Taken:
    """Fetch the wrapped keys from a separate keystore; one that is away is how the attempt ends."""
    if not isinstance(taken, Work):
        return taken
    try:
        return work.with_keys(taken, deps.keystore)
    except SyncwardError as error:
        return error


def _count_claim(claim: Claim | ClaimRefusal) -> None:
    if isinstance(claim, ClaimRefusal):
        metrics.CLAIMS.labels(claim.value).inc()
        return
    metrics.CLAIMS.labels("claimed").inc()
    metrics.QUEUE_WAIT.labels(claim.trigger).observe(claim.waited_s)
    logger.info("run_claimed", extra={"attempt": claim.attempt, "kind": claim.kind.value})


def _work(attempt: Attempt) -> Outcome:
    """Move data or answer a question, with what was taken under the lease."""
    claim, deps, subject = attempt.claim, attempt.deps, attempt.taken
    attempt.run_log.info(f"attempt {claim.attempt} begins on {deps.worker_id}")
    deps.records.ready(claim.account_id)  # a run whose log cannot be kept does not begin
    if isinstance(subject, SyncwardError):
        raise subject
    if claim.kind is RunKind.TEST:
        return answers.test(subject, attempt)
    if claim.kind is RunKind.DISCOVER:
        return answers.discover(subject, attempt)
    if claim.kind is RunKind.SCHEMA:
        requests = list(_requests(claim, subject))
        return schema.compare(subject, requests, attempt)
    if claim.kind in {RunKind.RESET, RunKind.PURGE}:
        return by_hand.act(attempt, subject, lambda claim: list(_requests(claim, subject)))
    return _sync(attempt, subject)


def _sync(attempt: Attempt, subject: Work) -> Outcome:
    """Move every wanted stream; one that fails does not stop the others."""
    wanted = len(list(_requests(attempt.claim, subject)))
    results: list[StreamResult] = []
    postponed: list[TransientError] = []
    tripped: list[DataGuardTripped] = []
    warm(attempt.deps.keyring, subject.source, subject.destination)
    with open_both(subject, attempt) as (source, destination):
        attempt = history.adopted(attempt, destination)
        for position, request in enumerate(_requests(attempt.claim, subject)):
            try:
                result = _stream(attempt, request, source, destination)
            except TransientError as error:
                if error.code not in OF_ONE_STREAM:
                    raise
                attempt.run_log.warning(
                    f"{error.public}; the other streams go on", request.stream.name
                )
                attempt.run_log.raw(raw_texts(error), request.stream.name)
                postponed.append(error)
                continue
            except DataGuardTripped as error:
                attempt.run_log.warning(error.public, request.stream.name)
                tripped.append(error)
                continue
            _count(result, subject)
            results.append(result)
            if len(results) < wanted:  # the last one is recorded with the outcome
                with _timed("checkpoint"), transaction(attempt.deps.engine) as tx:
                    known = outcomes.masked_stream(result)
                    claims.record_stream(tx, attempt.claim, known, position, attempt.deps.principal)
    if postponed:
        raise postponed[0]
    if tripped:
        raise DataGuardTripped([preview for error in tripped for preview in error.previews])
    return outcomes.of_streams(results, wanted=wanted)


def _requests(claim: Claim, subject: Work) -> Iterator[LoadRequest]:
    """Name the streams of this run; ConfigError if somebody asked for one that does not exist."""
    wanted = claim.options.streams or tuple(spec.name for spec in subject.streams)
    unknown = set(wanted) - {spec.name for spec in subject.streams}
    if unknown:
        raise ConfigError(f"{subject.name} has no stream {', '.join(sorted(unknown))}")
    for spec in subject.streams:
        if spec.name in wanted:
            yield LoadRequest(
                connection_id=claim.subject_id,
                run_id=claim.run_id,
                attempt=claim.attempt,
                fence=claim.fence,
                stream=by_hand.for_this_run(spec, claim),
                target_schema=subject.target_schema,
                rewrite=claim.options.full_refresh and spec.mode is Mode.APPEND,
                approvals=claim.options.approvals,
                backfill=claim.kind is RunKind.BACKFILL,
            )


def _stream(
    attempt: Attempt, request: LoadRequest, source: Source, destination: Destination
) -> StreamResult:
    """Move one stream, or say why not. Only a person's errors are this stream's own."""
    name = request.stream.name
    attempt.control.begin_stream(name)
    attempt.control.check()
    try:
        result = _move(attempt, request, source, destination)
    except CredentialsError:
        raise  # every stream would meet it; the connection is paused
    except ConfigError as error:
        if error.code in OF_LINKS:
            raise  # found out while reading: a child names its hosts one by one
        attempt.run_log.error(error.public, name)
        attempt.run_log.raw(raw_texts(error), name)
        return StreamResult(
            stream=name,
            state="failed",
            mode=request.stream.mode,
            attempt=request.attempt,
            error=error.public,
        )
    return result


def _count(result: StreamResult, subject: Work) -> None:
    source = metrics.connector_of(subject.source.kind)
    metrics.ROWS.labels(source, "extracted").inc(result.rows_extracted)
    metrics.BYTES.labels(source).inc(result.bytes)
    if subject.destination is not None:
        destination = metrics.connector_of(subject.destination.kind)
        metrics.ROWS.labels(destination, "loaded").inc(result.rows_loaded)
        metrics.ROWS.labels(destination, "rejected").inc(result.rows_rejected)


def _timed(step: str) -> AbstractContextManager[object]:
    """Measure a transaction with the control database."""
    return metrics.CONTROL_DURATION.labels(step).time()


def _move(
    attempt: Attempt, request: LoadRequest, source: Source, destination: Destination
) -> StreamResult:
    """Fence the stream, extract from its cursor, load each batch with its cursor in one commit."""
    spec, run_log = request.stream, attempt.run_log
    token = None
    if "hmac" in spec.mask.values():
        pseudonyms = PseudonymKeys.of_worker(attempt.deps).of(attempt.claim.account_id)
        request, token = replace(request, pseudonyms=pseudonyms.key_id), pseudonyms.token
    known = destination.claim_stream(request)
    history.check(attempt, spec.name, known)
    if known.result is not None:  # an earlier attempt of this run committed it, then died
        run_log.info(f"already loaded by attempt {known.result.attempt}; not read again", spec.name)
        return known.result
    full = attempt.claim.options.full_refresh or known.full_due
    cursor, result = None if full else known.cursor, None
    if request.backfill:
        by_hand.check_backfill(attempt, request, known)
    while result is None:
        try:
            result = _load(
                attempt, request, source, destination, known=known, cursor=cursor, token=token
            )
        except ReadAgain as reason:
            if request.backfill and not reason.same:
                raise results.drifted(request, reason.public) from reason
            if not reason.same and cursor is None:
                raise  # everything was read
            if reason.same:
                run_log.info(f"{reason.public}; read once more", spec.name)
                known = destination.claim_stream(request)  # with the ranges that are kept by now
            else:
                run_log.info(f"{reason.public}; everything is read", spec.name)
                cursor = None
    _tell(attempt, spec.name, result)
    return result


def _tell(attempt: Attempt, stream: str, result: StreamResult) -> None:
    """Say in the run's log what was done."""
    if result.rows_rejected:
        attempt.run_log.warning(
            f"{result.rows_rejected:,} rows were rejected; run output shows some of them", stream
        )
        logger.warning("rows_rejected", extra={"rows": result.rows_rejected})
    for sentence in outcomes.told(result.schema_changes):
        attempt.run_log.info(sentence, stream)
    attempt.run_log.info(outcomes.sentence(result), stream)


def _load(
    attempt: Attempt,
    request: LoadRequest,
    source: Source,
    destination: Destination,
    *,
    known: StreamClaim,
    cursor: Cursor | None,
    token: masking.Token | None,
) -> StreamResult:
    """Read a stream from a cursor, or from its beginning, and load each batch of it."""
    spec, result = request.stream, None
    sweep = known.loaded_before and (cursor is None or known.sweep_due)
    wire = common_wire(attempt.taken, source, destination)
    if request.backfill:
        window, ranges = attempt.claim.options.window, _ranges(attempt, spec, known)
        opened = source.extract(spec, None, wire, between=window, ranges=ranges)
    else:
        ranges = _ranges(attempt, spec, known)
        opened = source.extract(spec, cursor, wire, sweep=sweep, ranges=ranges)
    with opened as batches, Lanes(spec.ranges_at_once, attempt.control, known.stop) as lanes:
        for batch in batches:
            guards.check_cursor(request, batch)
            for note in batch.notes:
                attempt.run_log.info(note, spec.name)
            watched = masking.masked(attempt.control.watch(batch), spec, token)
            if batch.part is not None and not batch.part.is_end and known.keep is not None:
                if batch.part.beside:
                    _progressed(attempt, lanes.begin(known.keep, watched))
                else:
                    known.keep(watched)
                    _progressed(attempt, 1)
                continue
            _progressed(attempt, lanes.rest())
            loaded = destination.load(request, watched)
            _warn(attempt, spec.name, batch.warnings)
            if batch.more:  # whatever becomes of the next one, this one counts
                _progressed(attempt, 1)
            result = loaded if result is None else outcomes.joined(result, loaded)
    if result is None:
        raise RuntimeError(f"{spec.name}: the source ended without a batch")
    return result


def _warn(attempt: Attempt, stream: str, warnings: Sequence[str]) -> None:
    """Say what the source knows only now: the rows are loaded, and some may be missing."""
    for sentence in warnings:
        attempt.run_log.warning(sentence, stream)
        logger.warning("stream_unsettled", extra={"stream": stream})


def _progressed(attempt: Attempt, parts: int) -> None:
    """Note that a part of a stream is there for good, if there is one."""
    if parts:
        with _timed("checkpoint"), transaction(attempt.deps.engine) as tx:
            claims.progressed(tx, attempt.claim)


def _ranges(attempt: Attempt, spec: StreamSpec, known: StreamClaim) -> Ranges | None:
    """Say how a large read is cut, and what there is of one that did not come to its end.

    Somebody who asks for everything wants it as it is now: only this very run goes on then.
    """
    if known.keep is None:
        return None
    kept = known.kept
    if attempt.claim.options.full_refresh and kept and kept.run_id != attempt.claim.run_id:
        kept = None
    return Ranges(spec.range_rows, kept, spec.ranges_at_once)


def _give_up(attempt: Attempt, reason: SyncwardError) -> None:
    """End a run whose thread nothing ends. Its fence and lease keep it from writing any more."""
    attempt.run_log.error("its thread hangs and cannot be ended; this worker stops")
    logger.error("run_given_up", extra={"run_id": attempt.claim.run_id, "reason": reason.code})
    try:
        outcome = outcomes.of_error(reason, attempt.claim, attempt.run_log)
        _finish(attempt, outcome, seconds=GIVE_UP_AFTER_S)
    finally:
        attempt.deps.heartbeat.give_up(attempt.claim)


def _sealed_output(attempt: Attempt, outcome: Outcome) -> tuple[Outcome, SealedOutput | None]:
    """Seal the document; one that cannot be sealed is how the attempt ends, never stored clear.

    Nor does a run succeed whose log cannot be kept: its streams are loaded, it comes again.
    """
    claim, records = attempt.claim, attempt.deps.records
    if outcome.kind not in {OutcomeKind.SUCCEEDED, OutcomeKind.AWAITING_APPROVAL}:
        return outcome, None
    try:
        records.ready(claim.account_id)
        if not outcome.document:
            return outcome, None
        return outcome, records.output(claim.account_id, claim.run_id, outcome.document)
    except SyncwardError as error:
        failed = outcomes.of_error(error, claim, attempt.run_log)
        return replace(failed, streams=outcome.streams), None


def _finish(attempt: Attempt, outcome: Outcome, *, seconds: float) -> None:
    """Write the end of the attempt; a run that somebody else owns by now is theirs to end."""
    claim, deps, outcome = attempt.claim, attempt.deps, outcomes.masked(outcome)
    outcome, output = _sealed_output(attempt, outcome)
    attempt.run_log.info(outcomes.ending(outcome, seconds))
    deps.calls.settle()  # they were made, whatever becomes of the attempt

    def end() -> None:
        with _timed("finish"), deps.logs.taken(claim.run_id) as lines:
            sealed, left = deps.records.lines(lines)
            with transaction(deps.engine) as tx:
                claims.finish(
                    tx, claim, outcome, deps.principal, lines=sealed, output=output,
                    credentials=isinstance(attempt.taken, Work) and attempt.taken.has_credentials,
                )  # fmt: skip
        deps.logs.put_back(left)

    try:
        again(end)
    except LeaseLost:
        attempt.run_log.warning("the lease was lost; another attempt goes on")
        attempt.control.lost("at_finish")
        return
    metrics.count_end(outcome, attempt.reads_from, seconds)
    logger.info(
        "run_ended",
        extra={
            "outcome": outcome.kind.value,
            "reason": outcome.error_code,
            "attempt": claim.attempt,
            "seconds": round(seconds, 3),
        },
    )
