"""Manifests: mistakes in them, the commands, and the page about writing one."""

import json
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from connectors import registry
from connectors.rest import manifest as rest_manifest
from connectors.rest import manifest_files, parts, requests
from connectors.rest import text as rest_text
from schemas.egress import LinkPolicy
from schemas.errors import ConfigError
from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.world import LOOSE

TOKEN = "tok-canary-1234"  # noqa: S105 - a secret to look for
SMALL: dict[str, Any] = {
    "version": "1", "name": "shop", "url_base": "https://api.example.com/v1",
    "check": {"stream_names": ["orders"]},
    "streams": {"orders": {"path": "/orders", "primary_key": ["id"], "schema": {"id": "integer"}}},
}  # fmt: skip


def read(config, stream, since=None, **spec):
    made = StreamSpec(name=stream, **{"mode": "replace", **spec})
    with (
        closing(registry.open_source("rest", config, {"token": TOKEN}, LOOSE)) as source,
        source.extract(made, since, WireFormat.ROWS) as batches,
    ):
        found = [(batch, [r for g in batch.groups for r in g.rows]) for batch in batches]
    return found[-1][0], [row for _, rows in found for row in rows]


# ── those that come with it: tests/apis ──────────────────────────────────────────────────────

MERGE = {"mode": "merge", "key": ("id",), "cursor": "updated_at", "settle": "0s"}


def test_every_manifest_that_comes_with_it_is_right_and_the_example_has_a_stream_of_each_kind():
    known = manifest_files.builtin()
    assert set(known) == {"example", "github", "hubspot", "salesforce", "stripe"}
    for name in known:
        assert manifest_files.of_resource(name).name == name
    example = manifest_files.of_resource("example")
    assert example.streams["orders"].incremental_sync is not None
    assert example.streams["lines"].partition_router is not None


# ── mistakes ─────────────────────────────────────────────────────────────────────────────────


def changed(**more: Any) -> dict[str, Any]:
    return {**SMALL, **more}


def with_stream(**more: Any) -> dict[str, Any]:
    return changed(streams={"orders": {**SMALL["streams"]["orders"], **more}})


def timed(changes: Any = (), **more: Any) -> dict[str, Any]:
    how = {
        "cursor_field": "at", "start_datetime": "2020-01-01",
        "start_time_option": {"field_name": "since"}, **more,
    }  # fmt: skip
    fields = {"id": "integer", "at": "timestamp"}
    return with_stream(schema=fields, incremental_sync=how, changes=list(changes))


JOB: dict[str, Any] = {
    "status_extractor": "state", "status_mapping": {"running": ["r"], "completed": ["c"]},
    "polling_requester": {"path": "/job"}, "download_requester": {"path": "/rows"},
}  # fmt: skip
LOADER: dict[str, Any] = {
    "path": "/fields", "key_pointer": "name", "type_pointer": "type",
    "types_mapping": [{"current_type": ["text"], "target_type": "string"}],
}  # fmt: skip
GROUPS: dict[str, Any] = {
    "parent_stream": "orders", "parent_key": "id", "group_size": 10,
    "group_option": {"field_name": "ids"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (changed(version="2"), "version"), (changed(surprise=1), "surprise: unknown key"),
        (changed(check={"stream_names": ["x"]}), "no stream x"),
        (changed(url_base="https://{{ config.shop }}/"), "no config.shop"),
        (changed(url_base="https://{{ env.HOME }}/"), "config.NAME"),
        (changed(parameters={"api_token": {}}), "api_token: is a secret"),
        (changed(request_headers={"Authorization": "Bearer x"}), "Authorization is no header"),
        (changed(request_headers={"X-Api-Key": "x"}), "X-Api-Key is no header"),
        (changed(request_headers={"X-A": "a\nb"}), "X-A holds"),
        (changed(authenticator={"type": "ApiKeyAuthenticator", "header": "Host"}), "no header"),
        (with_stream(path="orders"), "path below url_base"),
        (with_stream(path="//evil.example/x"), "path below url_base"),
        (with_stream(path="https://evil.example/x"), "path below url_base"),
        (with_stream(path="/a/../b"), "path below url_base"),
        (with_stream(path="/a?b=1"), "path below url_base"),
        (with_stream(path="/a\\b"), "path below url_base"),
        (with_stream(path="/a%2e%2e/b"), "path below url_base"),
        (with_stream(schema={"raw": "string", "id": "integer"}), "raw is the whole record"),
        (with_stream(primary_key=["other"]), "no field other"),
        (with_stream(schema={"id": "int"}), "schema.id"),
        (with_stream(partition_router={"parent_stream": "orders", "parent_key": "id",
                                       "partition_field": "p"}), "its parent is no stream"),
        (with_stream(request_body_json={"a": 1}), "http_method: POST"),
        (with_stream(paginator={"type": "OffsetIncrement"}), "page_size"),
        (with_stream(incremental_sync={"cursor_field": "id", "start_datetime": "2020-01-01",
                                       "start_time_option": {"field_name": "s"}}), "cursor_field"),
        (with_stream(error_handler={"response_filters": [{"action": "FAIL"}]}), "http_codes"),
        (with_stream(error_handler={"response_filters": [
            {"http_codes": [429], "action": "RETRY", "backoff_time": "1h"}]}), "RATE_LIMITED"),
        (with_stream(changes=[{"path": "/e"}]), "needs an incremental_sync"),
        (with_stream(request_parameters={"q": "{{ stream_interval.start_time }}"}),
         "no stream_interval.start_time"),
        (with_stream(request_parameters={"q": "{{ creation_response.id }}"}),
         "no creation_response.id"),
        (with_stream(request_parameters={"q": "{{ schema.names }}"}), "no schema.names"),
        (with_stream(tombstone="gone"), "no field gone"),
        (with_stream(schema_loader={"path": "a"}), "path below url_base"),
        (with_stream(schema={}, primary_key=[], schema_loader=LOADER), "name at least the key"),
        (with_stream(retriever=JOB, paginator={"type": "LinkHeader"}), "download_requester"),
        (with_stream(retriever={**JOB, "polling_requester": {"path": "/../x"}}), "below url_base"),
        (with_stream(grouping_router=GROUPS, partition_router={
            "parent_stream": "x", "parent_key": "id", "partition_field": "p"}), "not both"),
        (with_stream(grouping_router=GROUPS), "its parent is no stream"),
        (with_stream(paginator={"type": "CursorPagination", "cursor_from": "header",
                                "cursor_value": "a.b", "page_token_option": {"field_name": "x"}}),
         "one header"),
        (timed(start_time_option=None), "needs a start_time_option, or changes"),
        (timed(result_cap={"records": 10, "total": "n"}), "needs an end_time_option"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_place(document, says):
    with pytest.raises(ConfigError) as caught:
        manifest_files.parse(json.dumps(document).encode(), "shop.yaml")
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


CROSSED = b"""version: "1"
name: shop
url_base: https://api.example.com
check: {stream_names: [orders]}
streams:
  orders:
    path: /orders
    request_parameters: {q: "{{ config.other }}"}
  lines: {path: /lines,
    partition_router: {parent_stream: x, parent_key: id, partition_field: o}}
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a: &x [1]\nb: *x", ":2: not YAML: aliases"), (b"a: 1\na: 2", ":2: a stands"),
        (b"\xff", "UTF-8"), (b"a: [", "not YAML"), (b"!!python/object:os.system {}", "not YAML"),
        (b"- 1", "manifest"), (b"", "manifest"), (b"\x00", "not YAML"),
        (b"a: 2020-13-45", "not YAML"), (b"[" * 5_000, "not YAML"),
        (b"version: '1'\nname: shop\nbogus: 1", "shop.yaml:3: bogus: unknown key"),
        (b"check:\n  stream_names:\n  - ok\n  - 'no name'", "shop.yaml:4: check.stream_names.1"),
        (CROSSED, "shop.yaml:8: streams.orders.request_parameters.q: no config.other"),
        (CROSSED, "shop.yaml:10: streams.lines.partition_router.parent_stream: its parent is no"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_manifest_is_said_to_be(text, says):
    with pytest.raises(ConfigError) as caught:
        manifest_files.parse(text, "shop.yaml")
    assert says in str(caught.value)


def test_a_file_of_the_worker_that_is_none_is_always_told_alike(tmp_path):
    (tmp_path / "x.yaml").write_text("hunter2: [")
    (tmp_path / "link.yaml").symlink_to("/etc/hostname")
    told = set()
    for name in ("x.yaml", "missing.yaml", "link.yaml"):
        with pytest.raises(ConfigError) as caught:
            manifest_files.of_resource(str(tmp_path / name))
        told.add(str(caught.value).replace(name, "FILE"))
    assert len(told) == 1
    for named in ("../x", "x.yaml", "/proc/self/environ.yaml", "/etc/passwd", "", "a b"):
        assert not manifest_files.written_well(named)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "owner is missing"), ({"owner": "a/b", "repository": "x"}, "owner must be"),
        ({"owner": "a", "repository": "x", "other": 1}, "no parameter other"),
        ({"owner": "a", "repository": "x", "access_token": "hunter2"}, "is a secret"),
        ({"owner": "a", "repository": "x", "base_url": "http://ghe.example"}, "use https"),
        ({"owner": "a", "repository": "x", "base_url": "https://u:hunter2@ghe"}, "holds a login"),
    ],
)  # fmt: skip
def test_parameters_are_checked_where_they_are_written(parameters, says):
    config = {"manifest": "github", "parameters": parameters}
    with pytest.raises(ConfigError) as caught:
        registry.validate_config("rest", config, LinkPolicy())
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_parameters_may_come_as_text_of_the_command_line():
    given = '{"owner": "acme", "repository": "shop"}'
    found = registry.validate_config(
        "rest", {"manifest": "github", "parameters": given}, LinkPolicy()
    )
    assert found["parameters"] == {"owner": "acme", "repository": "shop"}
    assert registry.wanted_secrets("rest", found) == ("token",)


@pytest.mark.parametrize("value", ["evil.example/", "x@evil.example", "a:1", "", "a?b", "-", "a b"])
def test_a_part_of_a_host_cannot_become_another_host(value):
    with pytest.raises(ValueError, match="letters, digits"):
        rest_text.filled_base("https://{{ config.s }}.example.com", {"config": {"s": value}})


# ── the commands ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.integration
def test_lint_and_try_from_nothing_to_a_schema(shell, api, tmp_path, world):
    api.tables["orders"] = [
        {"id": n, "total": 1.5, "name": f"n{n}", "at": "2026-01-01T00:00:00Z", "tags": ["\x1b[31m"]}
        for n in range(1, 8)
    ]
    api.logins = {f"Bearer {TOKEN}"}
    file, secret = tmp_path / "shop.yaml", tmp_path / "token"
    secret.write_text(TOKEN)
    stream: dict[str, Any] = {
        "primary_key": ["id"], "path": "/next/orders", "record_selector": {"field_path": "records"},
        "paginator": {"type": "NextLink", "next_url": "next"},
    }  # fmt: skip
    document = {
        **SMALL, "url_base": "{{ config.url }}", "parameters": {"url": {}},
        "authenticator": {"type": "BearerAuthenticator"}, "streams": {"orders": stream},
    }  # fmt: skip
    file.write_text(json.dumps(document))
    code, out, _ = shell("connector", "lint", str(file))
    assert (code, "streams.orders: has no schema" in out) == (0, True)
    typed = ["connector", "try", str(file), "--stream", "orders", "--set", f"url={api.url}"]
    assert shell(*typed)[0] == 1
    assert "its token is missing" in shell(*typed)[2]
    code, out, err = shell(*typed, "--limit", "3", "--secret-file", f"token={secret}")
    assert (code, err) == (0, "")
    assert "3 records of 2 pages; nothing was stored" in out
    block = out.split("3 records")[0]
    stream |= yaml.safe_load(block)
    assert stream["schema"] == {
        "id": "integer", "total": "number", "name": "string", "at": "timestamp", "tags": "array",
    }  # fmt: skip
    del stream["schema"]["name"]
    file.write_text(json.dumps(document))
    code, out, _ = shell(*typed, "--secret-file", f"token={secret}")
    assert code == 0
    assert "\x1b" not in out
    assert "not in the schema: name" in out
    secret.write_text("another-token-1")
    code, out, err = shell(*typed, "--secret-file", f"token={secret}", "--json")
    assert (code, json.loads(out)["error"]["code"]) == (1, "credentials")
    assert "another-token-1" not in out + err
    code, out, err = shell("connector", "lint", str(tmp_path / "missing"))
    assert (code, "no such file" in err) == (1, True)
    world.account()
    secret.write_text(TOKEN)
    made = ["resource", "create", "gh", "--kind", "rest", "--set", "manifest=github"]
    given = '{"owner": "acme", "repository": "shop"}'
    wrong = shell(*made, "--set", 'parameters={"owner": "a/b"}', "--secret-file", f"token={secret}")
    assert (wrong[0], "owner must be" in wrong[2]) == (1, True)
    done = shell(*made, "--set", f"parameters={given}", "--secret-file", f"token={secret}")
    assert done[0] == 0, done
    assert "github" in shell("resource", "list")[1]
    shown = shell("resource", "show", "gh")[1]
    assert "acme" in shown
    assert TOKEN not in shown


# ── the page about writing one ───────────────────────────────────────────────────────────────

PAGE = (Path(__file__).parents[2] / "docs" / "rest.md").read_text(encoding="utf-8")


def table_of(header: str) -> list[str]:
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows += [name.strip("`| ") for name in line.strip("| ").split(" | ")[0].split("`, `")]
    return rows


def keys_of(model: Any) -> list[str]:
    own = set(model.model_fields) - {"type"}
    if model is requests.Changes:  # its other keys are a stream's
        own -= set(requests.Requester.model_fields)
    return [field.alias or name for name, field in model.model_fields.items() if name in own]


@pytest.mark.parametrize(
    ("header", "model"),
    [
        ("| Key |", rest_manifest.Manifest), ("| Stream key |", rest_manifest.Stream),
        ("| Of `incremental_sync` |", rest_manifest.Incremental),
        ("| Of `record_selector` |", requests.Selector),
        ("| Of `changes` |", requests.Changes),
        ("| Of `grouping_router` |", requests.Groups),
        ("| Of `retriever` |", requests.AsyncRetriever),
        ("| Of `schema_loader` |", requests.SchemaLoader),
    ],
)  # fmt: skip
def test_every_key_of_a_manifest_is_on_the_page(header, model):
    assert sorted(table_of(header)) == sorted(keys_of(model))


def test_every_kind_of_login_page_and_action_is_on_the_page():
    assert table_of("| Authenticator |") == list(parts.SECRETS)
    paginators, _ = get_args(parts.Paginator)
    kinds = [kind.model_fields["type"] for kind in get_args(paginators)]
    names = [kind.annotation.__args__[0] for kind in kinds if kind.annotation is not None]
    assert table_of("| Paginator |") == names
    actions = parts.Filter.model_fields["action"].annotation
    assert actions is not None
    assert sorted(table_of("| Action |")) == sorted(actions.__args__)


def test_the_manifest_of_the_page_reads_what_it_says(api, tmp_path):
    first, *others = (part.split("```")[0] for part in PAGE.split("```yaml\n")[1:])
    text = first + others[0] + others[1]
    api.tables["orders"] = [
        {"id": n, "total": 1.5, "updated_at": f"2026-01-0{n}T00:00:00Z"} for n in (1, 2, 3)
    ]
    api.logins = {f"Bearer {TOKEN}"}
    api.routes["/orders"] = lambda asked: api._page(
        "cursor", asked, api._selected(api.tables["orders"], asked.query)
    )
    file = tmp_path / "shop.yaml"
    file.write_text(text)
    config = {"manifest": str(file), "parameters": {"base_url": api.url}}
    api.clock = lambda: datetime(2026, 1, 2, tzinfo=UTC)
    batch, rows = read(config, "shop.orders", **MERGE)
    assert sorted(row[0] for row in rows) == [1, 2, 3]
    _, rows = read(config, "shop.orders", batch.upper, **MERGE)
    assert [row[0] for row in rows] == [2, 3]
