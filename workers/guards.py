"""Guards that look at what the source said, before anything is loaded."""

from schemas.guards import Finding, Guard, Preview, stop
from schemas.records import Batch, LoadRequest


def check_cursor(request: LoadRequest, batch: Batch) -> None:
    """Stop where a row's cursor lies farther ahead of now than the stream allows.

    Such a row is not read before its time has come: until then the target lacks it.
    """
    if batch.beyond is None:
        return
    found = Finding(
        guard=Guard.FUTURE_CURSOR, stream=request.stream.name, amount=batch.beyond.seconds
    )
    sentence = (
        f"{found.stream}: {request.stream.cursor} is {batch.beyond.text} in some row, which is not "
        "read before then. Nothing was changed: correct it at the source; or approve, and the "
        "other rows are loaded"
    )
    stop(Preview(found, sentence), request.approvals)
