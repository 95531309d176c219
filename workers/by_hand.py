"""What a person has done to a stream beside its syncs: backfill, reset, purge, an accepted change.

Reset and purge touch the destination alone. Each stream is one fenced transaction there, which also
keeps what was done: an attempt that died after it is not repeated, but told.
"""

from collections.abc import Callable, Sequence

from schemas.errors import ConfigError
from schemas.records import Destination, LoadRequest, Purge, StreamClaim, StreamResult
from schemas.runs import Claim, Outcome, RunKind
from schemas.streams import Drift, Mode, StreamSpec
from storage import claims
from storage.engine import transaction
from storage.work import Work
from workers import history, outcomes
from workers.attempt import Attempt
from workers.ends import open_destination


def for_this_run(spec: StreamSpec, claim: Claim) -> StreamSpec:
    """Return a stream as this run takes it: a backfill follows no change, an accepted one is."""
    if claim.kind is RunKind.BACKFILL and spec.drift is Drift.EVOLVE:
        return spec.model_copy(update={"drift": Drift.FREEZE})
    if spec.name in claim.options.accept and spec.drift is Drift.FREEZE:
        return spec.model_copy(update={"drift": Drift.EVOLVE})
    return spec


def check_backfill(attempt: Attempt, request: LoadRequest, known: StreamClaim) -> None:
    """Refuse a backfill of rows that no key tells apart, or of a stream that is not read yet."""
    stream = request.stream
    if attempt.claim.options.window is None:
        raise ConfigError(f"{stream.name}: nobody said of which rows; ask for the backfill again")
    if stream.mode is not Mode.MERGE:
        raise ConfigError(
            f"{stream.name}: a backfill merges rows by their key, and this stream is mode: "
            f"{stream.mode}; read everything again with: syncward run enqueue CONNECTION "
            f"--full-refresh --stream {stream.name}"
        )
    if known.cursor is None:
        raise ConfigError(
            f"{stream.name}: no run has read it as it is defined now; the next one reads all of "
            f"it: syncward run enqueue CONNECTION --stream {stream.name}"
        )


def act(
    attempt: Attempt, subject: Work, requests_of: Callable[[Claim], Sequence[LoadRequest]]
) -> Outcome:
    """Reset or purge every wanted stream; one that fails stops the others."""
    deps, control, done = attempt.deps, attempt.control, list[StreamResult]()
    if subject.destination is None:
        raise RuntimeError("only a connection has a destination")
    end = subject.destination
    with open_destination(end, attempt) as destination:
        attempt = history.adopted(attempt, destination)
        requests = requests_of(attempt.claim)
        for position, request in enumerate(requests):
            control.begin_stream(request.stream.name)
            control.check()
            result = _one(attempt, request, destination)
            done.append(result)
            if len(done) < len(requests):  # the last one is recorded with the outcome
                with transaction(deps.engine) as tx:
                    claims.record_stream(tx, attempt.claim, result, position, deps.principal)
    return outcomes.of_streams(done, wanted=len(requests))


_ANEW = "the next run reads everything"


def _one(attempt: Attempt, request: LoadRequest, destination: Destination) -> StreamResult:
    name = request.stream.name
    known = destination.claim_stream(request)
    history.check(attempt, name, known)
    if known.result is not None:  # an earlier attempt of this run committed it, then died
        attempt.run_log.info(f"done by attempt {known.result.attempt}", name)
        return known.result
    if attempt.claim.kind is RunKind.RESET:
        result = destination.reset(request)
        attempt.run_log.info(f"where it is read is forgotten; {_ANEW}", name)
        return result
    how = attempt.claim.options.purge or Purge.KEEP
    result = destination.purge(request, how)
    attempt.run_log.info(_purged(how, result), name)
    return result


def _purged(how: Purge, result: StreamResult) -> str:
    if how is Purge.UNDO:
        then = "the stream goes on where it was" if result.cursor_to else _ANEW
        return f"{result.rows_inserted:,} rows are back; {then}"
    kept = "deleted for good" if how is Purge.NOW else "put away"
    return f"{result.rows_deleted:,} rows {kept}; {_ANEW}"
