"""What every destination checks of a batch, and how it tells what it did with one."""

from connectors.portable import schema_hash
from schemas.errors import ConfigError, SyncwardError
from schemas.records import Batch, Cursor, LoadCounts, LoadRequest, StreamResult


def check_masked(request: LoadRequest, batch: Batch) -> None:
    """Take no batch of a masked stream whose masks were not put on; RuntimeError: it is our bug."""
    if request.stream.mask and not batch.masked:
        raise RuntimeError("rows of a masked stream came in clear")


def rows_missing(request: LoadRequest, sent: int, loaded: int) -> SyncwardError:
    """Make the error of two sides that count differently."""
    return SyncwardError(
        f"{request.stream.name}: the source sent {sent} rows and {loaded} were loaded; nothing was "
        "kept",
        code="rows_missing",
    )


def result_of(
    request: LoadRequest, batch: Batch, counts: LoadCounts, *, seconds: float
) -> StreamResult:
    """Compare what was read with what was loaded; SyncwardError, for which all is undone."""
    extracted = batch.rows()
    if counts.loaded != extracted - counts.rejected:
        raise rows_missing(request, extracted, counts.loaded)
    return StreamResult(
        stream=request.stream.name,
        state="succeeded",
        mode=request.stream.mode,
        rows_extracted=extracted,
        rows_loaded=counts.loaded,
        rows_inserted=counts.inserted,
        rows_updated=counts.updated,
        rows_unchanged=counts.unchanged,
        rows_deleted=counts.deleted,
        rows_rejected=counts.rejected,
        bytes=counts.bytes,
        cursor_from=batch.lower,
        cursor_to=batch.upper,
        seconds=seconds,
        schema_hash=schema_hash(batch.shape),
        schema_changes=counts.changes,
        attempt=request.attempt,
        rejected=counts.refused,
    )


def check_backfill(request: LoadRequest, batch: Batch, seen: str | None) -> None:
    """Refuse to backfill from a table that is another than the one a run has loaded (`seen`)."""
    if request.backfill and schema_hash(batch.shape) != seen:
        raise drifted(request, "the source's table changed since it was loaded last")


def drifted(request: LoadRequest, what: str) -> ConfigError:
    """Make the error of a backfill that meets a changed table: following it is a sync's part."""
    return ConfigError(
        f"{request.stream.name}: {what}, and a backfill follows no change; let a run do that "
        f"first: syncward run enqueue CONNECTION --stream {request.stream.name}",
        code="schema_drift",
    )


def nothing_to_purge(request: LoadRequest) -> ConfigError:
    """Say that no run of the connection has loaded the stream."""
    return ConfigError(
        f"{request.stream.name}: this connection has loaded no rows of it; there is nothing to "
        "purge"
    )


def acted(
    request: LoadRequest,
    *,
    inserted: int = 0,
    deleted: int = 0,
    cursor_from: Cursor | None = None,
    cursor_to: Cursor | None = None,
    seconds: float = 0.0,
) -> StreamResult:
    """Tell what was done to a stream without reading its source."""
    return StreamResult(
        stream=request.stream.name,
        state="succeeded",
        mode=request.stream.mode,
        rows_extracted=inserted,
        rows_loaded=inserted,
        rows_inserted=inserted,
        rows_deleted=deleted,
        cursor_from=cursor_from,
        cursor_to=cursor_to,
        seconds=seconds,
        attempt=request.attempt,
    )
