"""What a first manifest gets wrong: it is told so, and no row is lost in silence."""

import json
from contextlib import closing
from typing import Any

import pytest

from connectors import registry
from connectors.rest import manifest_files
from schemas.errors import ConfigError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.rest_api import Reply
from tests.world import LOOSE

CURSOR = {
    "type": "CursorPagination", "cursor_value": "meta.after",
    "page_token_option": {"field_name": "after"},
}  # fmt: skip


def page(number: int, last: int) -> Reply:
    """A page whose cursor is there also on the last one."""
    more = number < last
    meta = {"after": f"c{number}", "has_more": more, "done": not more}
    return Reply(200, {"rows": [{"id": number}], "meta": meta})


def manifest(paginator: dict[str, Any], **stream: Any) -> dict[str, Any]:
    return {
        "version": "1", "name": "shop", "url_base": "{{ config.url }}",
        "parameters": {"url": {}}, "check": {"stream_names": ["orders"]},
        "streams": {"orders": {
            "path": "/all/orders", "record_selector": {"field_path": "rows"}, "raw": False,
            "paginator": paginator, "primary_key": ["id"], "schema": {"id": "integer"}, **stream,
        }},
    }  # fmt: skip


def opened(api, tmp_path, document: dict[str, Any]):
    path = tmp_path / "shop.yaml"
    path.write_text(json.dumps(document))
    config = {"manifest": str(path), "parameters": {"url": api.url}}
    return closing(registry.open_source("rest", config, {}, LOOSE))


def rows(api, tmp_path, paginator: dict[str, Any]) -> list[int]:
    api.script.extend(page(n, 3) for n in (1, 2, 3))
    with opened(api, tmp_path, manifest(paginator)) as source:
        stream = StreamSpec(name="shop.orders", mode="replace")
        with source.extract(stream, None, WireFormat.ROWS) as batches:
            return [row[0] for batch in batches for group in batch.groups for row in group.rows]


@pytest.mark.parametrize("flag", [{"has_more": "meta.has_more"}, {"is_last": "meta.done"}], ids=str)
def test_a_flag_of_either_sense_ends_the_pages(api, tmp_path, flag):
    assert rows(api, tmp_path, {**CURSOR, **flag}) == [1, 2, 3]


@pytest.mark.parametrize("flag", ["has_more", "is_last"])
def test_a_flag_that_is_not_there_is_no_end(api, tmp_path, flag):
    with pytest.raises(ConfigError, match=f"nothing at meta.hasmore.*correct {flag}") as caught:
        rows(api, tmp_path, {**CURSOR, flag: "meta.hasmore"})
    assert caught.value.code == "api_answer"


@pytest.mark.parametrize("wrong", [True, 5, 3.5, {"field": "meta.has_more", "equals": True}, [1]])
@pytest.mark.parametrize("where", ["has_more", "cursor_value", "field_path", "field"])
def test_a_place_that_is_no_text_is_named(wrong, where):
    document = manifest(CURSOR)
    stream = document["streams"]["orders"]
    if where == "field_path":
        stream["record_selector"] = {"field_path": wrong}
    elif where == "field":
        stream["schema"] = {"id": {"type": "integer", "field": wrong}}
    else:
        stream["paginator"] = {**CURSOR, where: wrong}
    with pytest.raises(ConfigError, match=rf"{where}.*names with dots"):
        manifest_files.parse(json.dumps(document).encode(), "shop.yaml")


@pytest.mark.parametrize("step", [None, "30d"])
def test_a_first_look_asks_for_a_time_as_a_run_does(api, tmp_path, step):
    """An API that wants one refuses a question without it, and the manifest is right."""
    how = {
        "cursor_field": "at", "start_datetime": "2020-01-01T00:00:00Z",
        "start_time_option": {"field_name": "since"},
    }  # fmt: skip
    if step:
        how |= {"step": step, "end_time_option": {"field_name": "until"}}
    document = manifest(
        {"type": "NoPagination"}, incremental_sync=how, schema={"id": "integer", "at": "timestamp"}
    )
    api.script.append(Reply(200, {"rows": []}))
    with opened(api, tmp_path, document) as source:
        source.test()
    since = api.asked[-1].query["since"]
    assert since.startswith("2020-01-01") == (step is None)
