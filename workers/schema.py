"""Compare the tables of a connection at both ends; only catalogs are read, nothing is changed."""

from collections.abc import Sequence
from dataclasses import asdict

from schemas.errors import ConfigError
from schemas.records import (
    Column,
    Destination,
    LoadRequest,
    Source,
    StreamShape,
    TargetView,
    WireFormat,
)
from schemas.runs import Outcome, OutcomeKind
from schemas.streams import Guards, StreamSpec
from storage.work import Work
from workers.attempt import Attempt
from workers.ends import common_wire, open_both


def compare(subject: Work, requests: Sequence[LoadRequest], attempt: Attempt) -> Outcome:
    """Describe each stream's table as the destination has it, and what the source has otherwise."""
    with open_both(subject, attempt) as (source, destination):
        wire = common_wire(subject, source, destination)
        streams = []
        for request in requests:
            attempt.control.begin_stream(request.stream.name)
            attempt.control.check()
            streams.append(_compared(request, source, destination, wire))
    return Outcome(OutcomeKind.SUCCEEDED, document={"tables": streams})


def _compared(
    request: LoadRequest, source: Source, destination: Destination, wire: WireFormat
) -> dict[str, object]:
    """Compare one stream; one that cannot be says why, and the others go on."""
    spec, error = request.stream, None
    view, changes = TargetView(None), list[dict[str, object]]()
    try:
        view = destination.compare(request, _shape(spec, source, wire))
        changes = [{**asdict(change), "says": str(change)} for change in view.changes]
    except ConfigError as found:
        error = found.public
    return {
        "stream": spec.name,
        "drift": spec.drift.value,
        "columns": None if view.columns is None else [_column(c) for c in view.columns],
        "changes": changes,
        "error": error,
    }


def _shape(spec: StreamSpec, source: Source, wire: WireFormat) -> StreamShape:
    """Open the stream as if all of it were read, and read no row."""
    unread = {"cursor": None, "guards": Guards(future_cursor=None), "tombstone": None}
    with source.extract(spec.model_copy(update=unread), None, wire) as batches:
        return next(batches).shape


def _column(column: Column) -> dict[str, object]:
    return {"name": column.name, "type": column.type, "nullable": column.nullable}
