"""The columns of a stream's files: those of before, and what a load changes of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from connectors.files.guards import check_narrowed
from connectors.files.manifest import Manifest
from connectors.portable import DoesNotFit, fitting, schema_hash
from connectors.shape_changes import changes
from schemas.errors import ConfigError, ReadAgain
from schemas.records import Batch, Change, Column, LoadRequest, RowGroup, SchemaChange
from schemas.streams import Drift, Mode

#: Our column in every file: when this row version was written.
SYNCED_AT = Column("_syncward_synced_at", "timestamp with time zone", nullable=False)


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of the files after a load, and what changed for it."""

    columns: tuple[Column, ...]
    changes: tuple[SchemaChange, ...] = ()
    retyped: bool = False  # files of before are no more like the new ones


def layout_of(request: LoadRequest, batch: Batch, manifest: Manifest) -> Layout:
    """Decide the files' columns as the stream's policy on drift says.

    One that the source does not have any more stays, and is NULL from now on.
    """
    name, policy, here = request.stream.name, request.stream.drift, batch.shape.columns
    for column in here:
        if column.name.startswith("_syncward_"):
            raise ConfigError(f"{name}: column {column.name} is a name of ours")
    if not manifest.columns:
        return Layout(here)
    there = {c.name: c.column for c in manifest.columns if c.name != SYNCED_AT.name}
    found = changes(there, here, frozenset(request.stream.key))
    for change in found:
        if change.change is Change.CHANGED:
            raise _drifted(request, f"{change}, and not every value of one is one of the other")
    first = manifest.schema_hash != schema_hash(batch.shape)
    done = found if first else ()
    if done and policy is Drift.FREEZE:
        raise _drifted(request, "; ".join(map(str, done)))
    if first:
        check_narrowed(request, found)
    larger = [c for c in found if c.change in {Change.ADDED, Change.WIDENED}]
    if policy is Drift.IGNORE:
        larger = []
    appends = request.stream.mode is Mode.APPEND
    if larger and not batch.full and not appends:
        raise ReadAgain(f"{'; '.join(map(str, larger))}: older rows may differ, too")
    columns = _laid_out(here, there, found, ignores=policy is Drift.IGNORE)
    return Layout(columns, done, retyped=bool(larger))


def _laid_out(
    here: Sequence[Column],
    there: Mapping[str, Column],
    found: Sequence[SchemaChange],
    *,
    ignores: bool,
) -> tuple[Column, ...]:
    """Return the old columns in their order, then the new ones."""
    wider = {c.column for c in found if c.change is Change.WIDENED and not ignores}
    given = {column.name: column for column in here}
    columns = []
    for column in there.values():
        new = given.get(column.name)
        kept = new if new is not None and column.name in wider else column
        columns.append(replace(kept, nullable=column.nullable or new is None or new.nullable))
    if not ignores:
        columns += [replace(c, nullable=True) for c in here if c.name not in there]
    return tuple(columns)


def _drifted(request: LoadRequest, what: str) -> ConfigError:
    return ConfigError(
        f"{request.stream.name}: the source's table changed: {what}; let the files follow with "
        "drift: evolve, choose another target schema, or remove the stream's directory so that "
        "everything is read again",
        code="schema_drift",
    )


def fitted(batch: Batch, columns: Sequence[Column], stream: str) -> Iterator[RowGroup]:
    """Yield the batch's rows as the files have them."""
    fit = fitting(batch.shape.columns, columns)
    if fit is None:
        yield from batch.groups
        return
    try:
        for group in batch.groups:
            yield RowGroup([fit(row) for row in group.rows], group.size)
    except DoesNotFit as error:
        column: Column = error.args[0]
        raise ConfigError(
            f"{stream}: column {column.name} holds what a {column.type} of the files would round; "
            "let them follow the source with drift: evolve, or read a view that maps it",
            code="data_refused",
        ) from error
