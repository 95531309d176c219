"""One API and how tests read it: a manifest, its paging, and what comes of it."""

import json
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from connectors import registry
from schemas.errors import SyncwardError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.rest_api import Api
from tests.world import LOOSE

TOKEN = "tok-canary-1234"  # noqa: S105 - a secret to look for
PAGING: dict[str, tuple[str, dict[str, Any]]] = {
    "cursor": ("results", {
        "type": "CursorPagination", "cursor_value": "paging.next.after",
        "page_token_option": {"field_name": "after"},
    }),
    "offset": ("data", {
        "type": "OffsetIncrement", "page_size": 2, "page_token_option": {"field_name": "offset"},
        "page_size_option": {"field_name": "limit"},
    }),
    "page": ("items", {
        "type": "PageIncrement", "page_size": 2, "page_token_option": {"field_name": "page"},
    }),
    "next": ("records", {"type": "NextLink", "next_url": "next"}),
    "link": ("", {"type": "LinkHeader"}),
    "all": ("", {"type": "NoPagination"}),
}  # fmt: skip


def everything(error: BaseException) -> str:
    """All that a log could hold of an error."""
    return "\n".join([repr(error), *traceback.TracebackException.from_exception(error).format()])


@dataclass
class Case:
    """One API and how it is read; what a test says otherwise is merged in."""

    api: Api
    directory: Any
    manifest: dict[str, Any] = field(default_factory=dict)

    def stream(self, paging: str = "all", **more: Any) -> dict[str, Any]:
        place, paginator = PAGING[paging]
        return {
            "path": f"/{paging}/orders", "record_selector": {"field_path": place},
            "paginator": paginator, "primary_key": ["id"], "schema": {"id": "integer"},
            "raw": False, **more,
        }  # fmt: skip

    def write(self, *streams: dict[str, Any]) -> str:
        names = ["orders", "lines"][: len(streams)]
        document = {
            "version": "1", "name": "shop", "url_base": "{{ config.url }}",
            "parameters": {"url": {}}, "check": {"stream_names": ["orders"]},
            "streams": dict(zip(names, streams, strict=True)), **self.manifest,
        }  # fmt: skip
        path = self.directory / "shop.yaml"
        path.write_text(json.dumps(document))
        return str(path)

    def open(self, *streams: dict[str, Any], secrets: dict[str, str] | None = None) -> Any:
        config = {"manifest": self.write(*streams), "parameters": {"url": self.api.url}}
        return registry.open_source("rest", config, secrets or {}, LOOSE)

    def batches(
        self, *streams: dict[str, Any], since: dict[str, str] | None = None,
        sweep: bool = False, secrets: dict[str, str] | None = None, name: str = "orders",
        **spec: Any,
    ) -> Iterator[tuple[Any, list[tuple[Any, ...]]]]:  # fmt: skip
        made = StreamSpec(name=f"shop.{name}", **{"mode": "replace", **spec})
        with (
            closing(self.open(*streams, secrets=secrets)) as source,
            source.extract(made, since, WireFormat.ROWS, sweep=sweep) as batches,
        ):
            for batch in batches:
                rows = [row for group in batch.groups for row in group.rows]
                assert batch.rows() == len(rows)
                if batch.keys is not None:
                    batch.keys = replace(batch.keys, groups=iter(list(batch.keys.groups)))
                yield batch, rows

    def rows(self, *streams: dict[str, Any], **spec: Any) -> list[tuple[Any, ...]]:
        return [row for _, rows in self.batches(*streams, **spec) for row in rows]

    def fails(self, *streams: dict[str, Any], **spec: Any) -> SyncwardError:
        with pytest.raises(SyncwardError) as caught:
            self.rows(*streams, **spec)
        assert TOKEN not in everything(caught.value)
        return caught.value
