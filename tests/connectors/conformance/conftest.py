"""Every source with every destination, and the loop of a run without the run."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from connectors import registry
from schemas.errors import ReadAgain
from schemas.records import LoadRequest, StreamResult, WireFormat
from schemas.streams import StreamSpec
from tests.connectors.conformance.ends import DESTINATIONS, FULL_ONLY, SOURCES, policy
from workers.guards import check_cursor
from workers.outcomes import joined

#: Sources whose keys no constraint proves.
UNPROVEN = {"rest", "singer", "airbyte"}


#: Sources that start processes, which takes its time: here with one destination, the others `full`.
CHILDREN = {"singer", "airbyte"}


#: Tests that start many of them, and with what they are done in `make test`.
LONG_WITH_CHILDREN = {
    "test_a_crash_at_each_step_repeats_nothing_and_skips_nothing",
    "test_memory_does_not_depend_on_the_table",
}
ENOUGH = {("singer", "merge"), ("airbyte", "replace")}
#: Memory that does not grow is measured for some ten seconds: of files, beside this source only.
MEMORY, BESIDE_FILES = "test_memory_does_not_depend_on_the_table", "sqlite"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        asked = getattr(item, "callspec", None)
        if asked is not None and getattr(item, "originalname", "") == MEMORY:
            to_files = str(asked.params.get("destination_kind")).startswith("files")
            if to_files and asked.params.get("source_kind") != BESIDE_FILES:
                item.add_marker(pytest.mark.full)
        if asked is None or asked.params.get("source_kind") not in CHILDREN:
            continue
        of_one = getattr(item, "originalname", "") in LONG_WITH_CHILDREN
        again = of_one and (asked.params["source_kind"], asked.params.get("mode")) not in ENOUGH
        if again or asked.params.get("destination_kind") not in {None, "postgres"}:
            item.add_marker(pytest.mark.full)


def _nothing(_step: str) -> None:
    return


@dataclass
class Engine:
    """One source, one destination, one connection between them."""

    source: Any
    destination: Any
    root: Path
    connection_id: UUID = field(default_factory=uuid4)
    fence: int = 0

    def open_source(self):
        end = self.source
        return registry.open_source(end.kind, end.config, end.secrets, policy(self.root))

    def open_destination(self):
        end = self.destination
        return registry.open_destination(end.kind, end.config, end.secrets, policy(self.root))

    def spec(self, table: str, mode: str, **more: object) -> StreamSpec:
        extra: dict[str, object] = {"key": ("id",)} if mode in {"merge", "history"} else {}
        if mode == "append" and self.source.append_cursor is None:
            pytest.skip("this source appends by its own clock: its own tests")
        cursors = {"merge": self.source.merge_cursor, "append": self.source.append_cursor}
        cursors["history"] = cursors["merge"]
        if mode in cursors:
            extra["cursor"] = cursors[mode]
        return StreamSpec(name=f"{self.source.schema}.{table}", mode=mode, **{**extra, **more})

    def request(self, spec: StreamSpec, **more: Any) -> LoadRequest:
        self.fence += 1
        made = LoadRequest(self.connection_id, uuid4(), 1, self.fence, spec, "acme")
        return replace(made, **more)

    def sync(
        self,
        spec: StreamSpec,
        *,
        step: Callable[[str], None] = _nothing,
        wire: WireFormat | None = None,
        **more: Any,
    ) -> StreamResult:
        """Do what a run does with one stream; `step` may end it at every boundary."""
        request = self.request(spec, **more)
        with ExitStack() as stack:
            source = stack.enter_context(closing(self.open_source()))
            destination = stack.enter_context(closing(self.open_destination()))
            wire = wire or next(w for w in source.wires if w in destination.wires)
            step("connected")
            known = destination.claim_stream(request)
            step("claimed")
            if known.result is not None:
                return known.result
            cursor = None if known.full_due else known.cursor
            sweep = known.loaded_before and (cursor is None or known.sweep_due)
            try:
                return load(source, destination, request, cursor, wire, step, sweep=sweep)
            except ReadAgain:
                return load(source, destination, request, None, wire, step, sweep=sweep)

    @property
    def compares_rows(self) -> bool:
        """Whether a replaced table is compared row by row: files want a key that is proven."""
        return self.source.kind not in UNPROVEN or self.destination.kind != "files"

    def same(self, table: str) -> bool:
        return self.destination.rows(table) == self.source.rows(table)


def load(source, destination, request, cursor, wire, step, *, sweep=False):  # noqa: PLR0917 - as in a run
    """Move the batches of one read; `step` may end it at every boundary."""
    result = None
    with source.extract(request.stream, cursor, wire, sweep=sweep) as batches:
        for batch in batches:
            step("read")
            check_cursor(request, batch)
            batch.chunks = stepping(batch.chunks, step)
            batch.groups = stepping(batch.groups, step)
            loaded = destination.load(request, batch)
            result = loaded if result is None else joined(result, loaded)
            step("loaded")
    assert result is not None
    return result


def stepping(parts: Iterator[Any], step: Callable[[str], None]) -> Iterator[Any]:
    for part in parts:
        step("part")
        yield part
        step("taken")
    step("all parts")


@pytest.fixture(
    params=[
        pytest.param(kind, marks=[pytest.mark.full] if kind in FULL_ONLY else [])
        for kind in sorted(SOURCES)
    ]
)
def source_kind(request):
    return request.param


@pytest.fixture(params=sorted(DESTINATIONS))
def destination_kind(request):
    return request.param


@pytest.fixture
def root(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture
def engine(source_kind, destination_kind, pair, root):
    return Engine(
        SOURCES[source_kind](pair, root), DESTINATIONS[destination_kind](pair, root), root
    )
