"""One batch on its way into a stream's files: added, merged, or in their place. Start at `write`.

What is written here is nobody's before the manifest names it (manifest.py).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from connectors.files.layout import SYNCED_AT, fitted, layout_of
from connectors.files.manifest import Directory, Manifest, Part
from connectors.files.merge import Merge, Sorter
from connectors.files.parts import Parts, Place
from schemas.errors import ConfigError
from schemas.records import Batch, Column, LoadCounts, LoadRequest, Row, RowGroup
from schemas.streams import Deletes, Mode


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a run found when it claimed a stream."""

    directory: Directory
    manifest: Manifest
    resumable: bool
    known: bool


@dataclass(frozen=True, slots=True)
class Written:
    """The content after a load, not yet anybody's."""

    files: Sequence[Part]
    replaced: Sequence[Part]
    counts: LoadCounts
    columns: tuple[Column, ...]
    ordered_by: tuple[str, ...]
    compared: bool = False  # row by row with what was there


def write(
    request: LoadRequest,
    batch: Batch,
    claimed: Claimed,
    *,
    shown: str,
    kind: str,
    check: Callable[[], None],
) -> Written:
    """Decide whether the batch adds to the files, is merged into them, or replaces them.

    `shown`: the resource's path, for people. `kind`: of the files. `check` raises if the load was
    cancelled. ConfigError and ReadAgain as the stream's settings want it.
    """
    manifest, mode = claimed.manifest, request.stream.mode
    key = _key(request, batch)
    layout = layout_of(request, batch, manifest)
    columns = layout.columns
    place = Place(
        directory=claimed.directory.path,
        shown=shown,
        stream=request.stream.name,
        format=kind,
        columns=(*columns, SYNCED_AT),
        key=tuple([c.name for c in columns].index(name) for name in key),
        generation=manifest.generation + 1,
        fence=request.fence,
        check=check,
    )
    groups = fitted(batch, columns, request.stream.name)
    if not key:
        adds = mode is Mode.APPEND and not (request.rewrite and batch.full)
        adds = adds and claimed.resumable and not (batch.full and claimed.known)
        written = _as_they_come(place, groups, manifest, adds=adds)
        return replace(written, counts=replace(written.counts, changes=layout.changes))
    mergeable = manifest.ordered_by == key and manifest.format == kind
    if mode is Mode.MERGE and manifest.files and not mergeable and not batch.full:
        raise RuntimeError("a merge into other files was not read from the beginning")
    written = _merged(
        place,
        groups,
        manifest,
        mergeable=mergeable,
        keep_missing=request.stream.deletion is not Deletes.HARD or not batch.everything,
        rewrite=layout.retyped,
    )
    return replace(written, counts=replace(written.counts, changes=layout.changes))


def _key(request: LoadRequest, batch: Batch) -> tuple[str, ...]:
    """Return the columns that order the files; () where rows only come and go as a whole."""
    stream = request.stream
    if stream.mode is Mode.MERGE:
        missing = set(stream.key) - {column.name for column in batch.shape.columns}
        if missing:
            raise ConfigError(f"{stream.name}: no key column {', '.join(sorted(missing))}")
        return stream.key
    proven = stream.mode is Mode.REPLACE and batch.shape.key_is_unique
    return batch.shape.key if proven else ()


def _as_they_come(
    place: Place, groups: Iterator[RowGroup], manifest: Manifest, *, adds: bool
) -> Written:
    """Write the rows as they come; without a key the old content goes as a whole."""
    rows = size = 0
    stamp: Row = (datetime.now(UTC),)
    with Parts(place, itertools.count(1)) as out:
        for group in groups:
            out.write(RowGroup([(*row, *stamp) for row in group.rows], group.size))
            rows += len(group.rows)
            size += group.size
        files = out.finish()
    if adds:
        return Written(
            (*manifest.files, *files), (), LoadCounts(rows, 0, 0, bytes=size), place.columns, ()
        )
    deleted = sum(part.rows for part in manifest.files)
    return Written(
        files, manifest.files, LoadCounts(rows, 0, 0, deleted, bytes=size), place.columns, ()
    )


def _merged(
    place: Place,
    groups: Iterator[RowGroup],
    manifest: Manifest,
    *,
    mergeable: bool,
    keep_missing: bool,
    rewrite: bool,
) -> Written:
    """Sort the rows by their key, then merge them into the files where those have that order."""
    size = 0
    sorter = Sorter(place, place.columns[:-1])
    try:
        for group in groups:
            place.check()
            sorter.add(group)
            size += group.size
        merge = Merge(
            place,
            manifest.files if mergeable else (),
            numbers=itertools.count(1),
            stamp=(datetime.now(UTC),),
            columns=tuple(kept.column for kept in manifest.columns),
            keep_missing=keep_missing,
            rewrite=rewrite,
        )
        done = merge.run(sorter.rows())
    finally:
        sorter.close()
    if not mergeable:
        done.replaced += manifest.files
        done.deleted += sum(part.rows for part in manifest.files)
    names = tuple(place.columns[i].name for i in place.key)
    return Written(
        done.kept, done.replaced, done.counts(size), place.columns, names, compared=mergeable
    )
