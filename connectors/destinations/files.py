"""Local files as a destination: a directory per stream, generations and a manifest."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from connectors import results
from connectors.files import purge as files_purge
from connectors.files.guards import check_rows
from connectors.files.layout import SYNCED_AT
from connectors.files.load import Claimed, Written, write
from connectors.files.manifest import (
    NAME,
    Directory,
    KeptColumn,
    Manifest,
    Retired,
    definition,
    directory_name,
)
from connectors.local_files import PathBelow, explained, made_directory
from connectors.portable import schema_hash
from connectors.shape_changes import changes
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError, LeaseLost, SyncwardError, TransientError
from schemas.records import (
    Batch,
    Change,
    Cursor,
    LoadRequest,
    Purge,
    ServerReport,
    StreamClaim,
    StreamResult,
    StreamShape,
    TargetView,
    WireFormat,
)
from schemas.streams import Deletes, Duration, Mode


class FilesConfig(BaseModel):
    """Clear settings of a directory of files."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: PathBelow
    format: Literal["parquet", "jsonl"]
    grace: Duration = Field(timedelta(hours=1), ge=timedelta(0))


CONFIG = FilesConfig
SECRET_FIELDS = ()
__all__ = ["CONFIG", "SECRET_FIELDS", "check_link", "open_destination"]


def check_link(config: FilesConfig, policy: LinkPolicy) -> None:
    """Accept it: there is no link, and only a worker knows which files it has."""
    del config, policy


def open_destination(
    config: Mapping[str, Any], secrets: Mapping[str, str], policy: LinkPolicy
) -> "FilesDestination":
    """Make the directory where it is missing; errors are ours and name its path."""
    del secrets  # there are none
    checked = FilesConfig.model_validate(dict(config))
    if checked.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"{checked.path}: this worker has no pyarrow; install syncward[files] there, or use "
            "format: jsonl",
            code="unsupported",
        )
    return FilesDestination(checked, made_directory(policy, checked.path))


class FilesDestination:
    """One directory. Meets schemas.records.Destination."""

    wires = (WireFormat.ROWS,)

    def __init__(self, config: FilesConfig, root: Path) -> None:
        self._config = config
        self._root = root
        self._cancelled = Event()
        self._claimed: dict[str, Claimed] = {}
        self._expected: dict[str, Cursor | None] = {}

    def test(self) -> ServerReport:
        """Write a file and remove it again."""
        trial = self._root / f".trial-{os.getpid()}"
        with explained(self._config.path):
            trial.write_bytes(b"x")
            trial.unlink()
        return ServerReport(
            server_version=f"files, {self._config.format}",
            tls="not needed, a local directory",
            login="the worker's own",
        )

    def claim_stream(self, request: LoadRequest) -> StreamClaim:
        """Raise this run's fence; return where the stream resumes, or what this run has done."""
        if request.target_schema == "_syncward":
            raise ConfigError("target schema _syncward belongs to Syncward; choose another one")
        _check_able(request)
        stream, directory = request.stream, self._directory(request)
        directory.make()
        now, before = directory.claim(request)
        files_purge.tidy(directory, now)
        found = Claimed(
            directory,
            now,
            resumable=now.reads == definition(request, self._config.format),
            known=now.generation > 0,
        )
        self._claimed[stream.name] = found
        self._expected[stream.name] = now.cursor
        return StreamClaim(
            now.cursor if found.resumable else None,
            now.result if now.run_id == request.run_id else None,
            before.fence if before else 0,
            now.run_id,
            loaded_before=found.known,
            full_due=found.known
            and stream.full_every is not None
            and now.runs_since_full + 1 >= stream.full_every,
        )

    def _directory(self, request: LoadRequest) -> Directory:
        names = (request.target_schema, request.stream.table_name)
        parts = [directory_name(name) for name in names]
        shown = "/".join([self._config.path, *parts])
        return Directory(self._root.joinpath(*parts), shown, self._check)

    def highest_fence(self, connection_id: UUID) -> int:
        """Return the highest fence that any stream of the connection has seen; 0 if none."""
        fences = [0]
        for found in self._root.glob(f"*/*/{NAME}"):
            manifest = Directory(found.parent, self._config.path, self._check).read()
            if manifest is not None and manifest.connection_id == connection_id:
                fences.append(manifest.fence)
        return max(fences)

    def load(self, request: LoadRequest, batch: Batch) -> StreamResult:
        """Write the batch into new files, then name them and its cursor in one step."""
        results.check_masked(request, batch)
        name, started = request.stream.name, monotonic()
        claimed = self._claimed[name]
        results.check_backfill(request, batch, claimed.manifest.schema_hash)
        try:
            written = write(
                request,
                batch,
                claimed,
                shown=self._config.path,
                kind=self._config.format,
                check=self._check,
            )
        except SyncwardError as error:
            if claimed.directory.fenced_off(request):  # which removed our files
                raise LeaseLost(f"{name}: another run has taken over") from error
            raise
        try:
            if request.stream.mode is not Mode.APPEND:
                net = not written.compared
                check_rows(request, claimed.manifest, written.counts, batch, net=net)
            result = results.result_of(
                request, batch, written.counts, seconds=monotonic() - started
            )
        except SyncwardError:
            self._remove(claimed, written)
            raise
        claimed.directory.commit(
            request,
            expected=self._expected[name],
            grace=self._config.grace,
            changed=lambda now: self._changed(now, request, result, written, batch),
        )
        if not request.backfill:
            self._expected[name] = batch.upper
        manifest = claimed.directory.read() or claimed.manifest
        self._claimed[name] = Claimed(claimed.directory, manifest, resumable=True, known=True)
        return result

    def _remove(self, claimed: Claimed, written: Written) -> None:
        """Remove the files of a load that does not count."""
        known = {part.name for part in claimed.manifest.files}
        with explained(self._config.path):
            for part in written.files:
                if part.name not in known:
                    (claimed.directory.path / part.name).unlink(missing_ok=True)

    def _changed(
        self,
        now: Manifest,
        request: LoadRequest,
        result: StreamResult,
        written: Written,
        batch: Batch,
    ) -> Manifest:
        at = datetime.now(UTC)
        retired = (Retired(name=part.name, since=at) for part in written.replaced)
        counted = 0 if batch.full else now.runs_since_full + (now.run_id != request.run_id)
        syncs = {
            "cursor": result.cursor_to,
            "reads": definition(request, self._config.format),
            "schema_hash": result.schema_hash,
            "runs_since_full": counted,
        }
        return now.model_copy(
            update={
                **({} if request.backfill else syncs),
                "generation": now.generation + 1,
                "run_id": request.run_id,
                "result": None if batch.more else result,  # the stream is not complete yet
                "format": self._config.format,
                "columns": tuple(KeptColumn.of(column) for column in written.columns),
                "ordered_by": written.ordered_by,
                "files": tuple(written.files),
                "retired": (*now.retired, *retired),
                "updated_at": at,
            }
        )

    # ── by hand ──────────────────────────────────────────────────────────────────────────────

    def compare(self, request: LoadRequest, shape: StreamShape) -> TargetView:
        """Show the files' columns, and what the next run would find changed at the source."""
        manifest = self._directory(request).read()
        if manifest is None or not manifest.columns:
            return TargetView(None)
        there = {c.name: c.column for c in manifest.columns if c.name != SYNCED_AT.name}
        found = changes(there, shape.columns, frozenset(request.stream.key))
        if manifest.schema_hash == schema_hash(shape):  # it was followed
            found = tuple(c for c in found if c.change in {Change.ADDED, Change.WIDENED})
        return TargetView(tuple(there.values()), found)

    def reset(self, request: LoadRequest) -> StreamResult:
        """Forget where the claimed stream is read; files stay until a run replaces them."""
        name = request.stream.name
        claimed = self._claimed[name]
        result = results.acted(request, cursor_from=claimed.manifest.cursor)
        rewound = {"cursor": None, "reads": None, "run_id": request.run_id, "result": result}

        def changed(now: Manifest) -> Manifest:
            files_purge.forget_cursor(claimed.directory)
            return now.model_copy(update=rewound)

        self._act(request, changed)
        return result

    def purge(self, request: LoadRequest, how: Purge) -> StreamResult:
        """Let the manifest name no file of the claimed stream, or those that were purged again."""
        claimed, started = self._claimed[request.stream.name], monotonic()
        if not claimed.known:
            raise results.nothing_to_purge(request)
        done: list[tuple[Manifest, StreamResult]] = []

        def changed(now: Manifest) -> Manifest:
            if how is Purge.UNDO:
                new = files_purge.bring_back(claimed.directory, request, now)
            elif how is Purge.NOW:
                new = files_purge.delete(now)
            else:
                new = files_purge.put_away(claimed.directory, request, now)
            rows = sum(part.rows for part in (new if how is Purge.UNDO else dict(now))["files"])
            result = results.acted(
                request,
                inserted=rows if how is Purge.UNDO else 0,
                deleted=0 if how is Purge.UNDO else rows,
                cursor_from=None if how is Purge.UNDO else now.cursor,
                cursor_to=new["cursor"],
                seconds=monotonic() - started,
            )
            done.append((now, result))
            return now.model_copy(update={**new, "run_id": request.run_id, "result": result})

        self._act(request, changed)
        ((before, result),) = done
        if how is Purge.NOW:
            files_purge.forget_files(claimed.directory, before)
        elif how is Purge.UNDO:
            files_purge.tidy(claimed.directory, claimed.directory.read() or before)
        return result

    def _act(self, request: LoadRequest, changed: Callable[[Manifest], Manifest]) -> None:
        """Replace the manifest of a claimed stream, which a person asked for."""
        name = request.stream.name
        directory = self._claimed[name].directory
        directory.commit(
            request, expected=self._expected[name], grace=self._config.grace, changed=changed
        )
        now = directory.read()
        self._expected[name] = None if now is None else now.cursor

    # ── signals ──────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise TransientError(
                f"{self._config.path}: the load was cancelled", code="cancelled_there"
            )

    def cancel(self) -> None:
        """End the load at its next group of rows; for another thread."""
        self._cancelled.set()

    def cut(self) -> None:
        """Do the same: there is no link to cut."""
        self._cancelled.set()

    def close(self) -> None:
        """Nothing is open between two calls."""


def _check_able(request: LoadRequest) -> None:
    """Refuse what files cannot do: rejected rows, stamps, and deletes that a window has to find."""
    stream = request.stream
    if stream.mode is Mode.HISTORY:
        raise ConfigError(
            f"{stream.name}: history needs a table, in which versions end; files keep rows as they "
            "are now: use mode: merge, or a database as the destination",
            code="unsupported",
        )
    if stream.rejected_max != 0:
        raise ConfigError(
            f"{stream.name}: files take all rows of a load or none; remove rejected_max",
            code="unsupported",
        )
    if stream.deletion is Deletes.IGNORE:
        return
    if stream.deletion is Deletes.SOFT or stream.cursor is not None or stream.tombstone is not None:
        raise ConfigError(
            f"{stream.name}: files follow deletes only where every run reads everything; use "
            "deletes: hard without a cursor and a tombstone, or mode: replace",
            code="unsupported",
        )
