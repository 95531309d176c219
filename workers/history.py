"""A destination that is ahead of the control database: after a restore a person decides first."""

from dataclasses import replace

from schemas.records import CONTROL_RESTORED, Destination, StreamClaim, ahead
from storage import restored
from storage.engine import transaction
from storage.work import Work
from workers.attempt import Attempt


def adopted(attempt: Attempt, destination: Destination) -> Attempt:
    """Catch up with a destination that is ahead, once a person has said that this is right."""
    claim = attempt.claim
    if claim.options.approved != CONTROL_RESTORED:
        return attempt
    seen = destination.highest_fence(claim.subject_id)
    if seen < claim.fence:
        return attempt
    with transaction(attempt.deps.engine) as tx:
        claim = restored.adopt(tx, claim, seen, attempt.deps.principal)
    attempt.run_log.info(f"goes on from the destination's state; fence {seen} there")
    return replace(attempt, claim=claim)


def check(attempt: Attempt, stream: str, known: StreamClaim) -> None:
    """Trip if a run that the control database never heard of has loaded this stream.

    Fences alone would not tell for long: after a restore they grow with every attempt. Usually the
    last load is on record, and nothing is asked.
    """
    on_record = attempt.taken.fences.get(stream, 0) if isinstance(attempt.taken, Work) else 0
    if known.last_run is None or known.fence_before <= on_record:
        return
    if attempt.claim.options.approved == CONTROL_RESTORED:
        return
    with transaction(attempt.deps.engine) as tx:
        heard_of = restored.knows(tx, known.last_run)
    if not heard_of:
        raise ahead(stream)
