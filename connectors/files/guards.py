"""Guards of a load of files: the manifest stays as it was until a person has approved."""

import math
from collections.abc import Sequence

from connectors.files.manifest import Manifest
from schemas.guards import Finding, Guard, Preview, covered, stop
from schemas.records import Batch, Change, LoadCounts, LoadRequest, SchemaChange


def check_rows(
    request: LoadRequest, manifest: Manifest, counts: LoadCounts, batch: Batch, *, net: bool
) -> None:
    """Stop where the source has no row and many are served, or where too many would go.

    `net`: without a key every row goes and comes again; what counts is how many less there are.
    """
    guards, stream = request.stream.guards, request.stream.name
    before, after = sum(part.rows for part in manifest.files), batch.rows()
    deleted = max(counts.deleted - counts.inserted, 0) if net else counts.deleted
    if batch.everything and not after and guards.zero_rows and before >= max(guards.floor, 1):
        found = Finding(
            guard=Guard.ZERO_ROWS,
            stream=stream,
            amount=before,
            before=before,
            after=0,
            to_delete=deleted,
        )
        then = f"all {deleted:,} rows would be deleted" if deleted else "they would stay"
        sentence = (
            f"{stream}: the source has no rows and {before:,} are served; {then}. Nothing was "
            "changed: approve or reject the run"
        )
        stop(Preview(found, sentence), request.approvals)
        return
    if before < guards.floor or guards.delete_ratio >= 1 or deleted <= guards.delete_ratio * before:
        return
    found = Finding(
        guard=Guard.DELETE_RATIO,
        stream=stream,
        amount=deleted,
        before=before,
        after=after,
        to_delete=deleted,
    )
    if not after and covered(
        found.model_copy(update={"guard": Guard.ZERO_ROWS}), request.approvals
    ):
        return
    sentence = (
        f"{stream}: {deleted:,} of {before:,} rows would be deleted "
        f"({math.floor(100 * found.share)} %, allowed are {100 * guards.delete_ratio:g} %). "
        "Nothing was changed: approve or reject the run"
    )
    stop(Preview(found, sentence), request.approvals)


def check_narrowed(request: LoadRequest, changes: Sequence[SchemaChange]) -> None:
    """Stop where columns hold less at the source than in the files."""
    narrowed = [c for c in changes if c.change is Change.NARROWED]
    if not narrowed or not request.stream.guards.narrowed_type:
        return
    what = ", ".join(f"{c.column} {c.before} -> {c.after}" for c in narrowed)
    found = Finding(
        guard=Guard.NARROWED_TYPE, stream=request.stream.name, amount=len(narrowed), what=what
    )
    sentence = (
        f"{found.stream}: the source's types became narrower ({what}). Nothing was changed: "
        "approve, and the rows go into the wider columns; or reject the run"
    )
    stop(Preview(found, sentence), request.approvals)
