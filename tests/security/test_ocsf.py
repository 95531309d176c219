"""OCSF of every action, accepted by published models; nothing in an event breaks a line (T42)."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from py_ocsf_models.events.base_event import BaseEvent
from py_ocsf_models.objects.account import Account
from py_ocsf_models.objects.api import API
from py_ocsf_models.objects.metadata import Metadata
from py_ocsf_models.objects.product import Product
from py_ocsf_models.objects.resource_details import ResourceDetails
from py_ocsf_models.objects.user import User
from pydantic import BaseModel, ConfigDict, TypeAdapter

from audit import ocsf
from cli.audit.tail import document, line_of, one_line
from schemas.audit import AuditAction, Principal, TargetKind, audit_class
from storage.audit_tail import StoredEvent

NAMES = {"operator:7f": "alice"}


class Actor(BaseModel):
    model_config = ConfigDict(extra="forbid")
    user: User


class Named(BaseModel):
    """What the package has no model of: a few attributes of the schema, and no other."""

    model_config = ConfigDict(extra="forbid")
    uid: str | None = None
    type: str | None = None
    ip: str | None = None
    name: str | None = None
    vendor_name: str | None = None


class Event(BaseEvent):
    """The base event of the package, with what our four classes add to it."""

    model_config = ConfigDict(extra="forbid")
    activity_id: int
    activity_name: str
    category_uid: int
    category_name: str
    class_uid: int
    class_name: str
    type_uid: int
    type_name: str
    time: int
    actor: Actor
    src_endpoint: Named
    api: API | None = None
    resources: list[ResourceDetails] | None = None
    entity: Named | None = None
    app: Named | None = None
    user: User | None = None


#: What each class of OCSF 1.5.0 requires beside the base event.
REQUIRED = {3001: {"user"}, 3004: {"entity"}, 6002: {"app"}, 6003: {"api", "actor", "src_endpoint"}}


def event(action: str = "instance.read", body: str | None = None, **changes: Any) -> StoredEvent:
    said = {"outcome": "success", "principal": "operator:7f", "v": 1, "detail": {"n": 1}}
    values: dict[str, Any] = {
        "index": 17,
        "seq": 40,
        "at": datetime(2026, 11, 24, 2, 1, 10, 123456, tzinfo=UTC),
        "account_id": UUID(int=7),
        "class_": "A",
        "action": action,
        "target_kind": "resource",
        "target_id": uuid4(),
        "login": "alice_login",
        "client": "192.0.2.7",
        "body": json.dumps(said) if body is None else body,
        "leaf": bytes(range(32)),
    }
    return StoredEvent(**(values | changes))


def test_every_action_is_mapped():
    assert set(ocsf.ACTIONS) == set(AuditAction)


@pytest.mark.parametrize("action", list(AuditAction))
@pytest.mark.parametrize("outcome", ["success", "denied", "attempted"])
def test_every_action_is_an_event_of_its_class(action, outcome):
    body = json.dumps({"outcome": outcome, "principal": "worker:w", "reason": "why", "v": 1,
                       "detail": {"principal": "operator:gone"}, "run_id": "r"})  # fmt: skip
    made = json.loads(one_line(ocsf.document(
        event(action.value, body, class_=audit_class(action).value), NAMES)))  # fmt: skip
    accepted = Event.model_validate(made)
    assert accepted.type_uid == accepted.class_uid * 100 + accepted.activity_id
    assert accepted.category_uid == accepted.class_uid // 1000
    assert set(made) >= REQUIRED[accepted.class_uid]
    assert accepted.metadata.event_code == action.value
    assert made["status_id"] == {"success": 1, "denied": 2, "attempted": 99}[outcome]
    known = [
        (Metadata, made["metadata"]), (Product, made["metadata"]["product"]),
        (User, made["actor"]["user"]), (Account, made["actor"]["user"]["account"]),
        *((API, made[key]) for key in ("api",) if key in made),
        *((ResourceDetails, one) for one in made.get("resources", [])),
    ]  # fmt: skip
    for model, value in known:
        TypeAdapter(model).validate_python(value)
        assert set(value) <= set(model.model_fields), (model, value)


def test_what_a_siem_needs_is_where_it_looks():
    made = ocsf.document(event(), NAMES)
    assert made["time"] == 1795485670123
    assert made["metadata"]["sequence"] == 17
    assert made["metadata"]["uid"] == bytes(range(32)).hex()
    assert made["metadata"]["tenant_uid"] == str(UUID(int=7))
    user = made["actor"]["user"]
    assert (user["uid"], user["name"], user["account"]["name"]) == (
        "operator:7f", "alice", "alice_login",
    )  # fmt: skip
    assert made["src_endpoint"] == {"ip": "192.0.2.7"}
    assert made["unmapped"]["body"]["detail"] == {"n": 1}
    assert "sequence" not in ocsf.document(event(index=None), NAMES)["metadata"]


def test_a_refusal_is_a_failure_of_some_weight_and_a_tampered_log_is_critical():
    denied = json.dumps({"outcome": "denied", "principal": "operator:x", "v": 1})
    assert ocsf.document(event(body=denied), {})["severity_id"] == ocsf.MEDIUM
    found = json.dumps({"outcome": "success", "principal": "operator:x",
                        "detail": {"result": "tampered"}})  # fmt: skip
    assert ocsf.document(event("audit.verified", found), {})["severity"] == "Critical"


def test_an_action_of_a_later_version_is_not_left_out():
    made = Event.model_validate(ocsf.document(event("house.burned"), {}))
    assert (made.class_uid, made.type_uid) == (6003, 600399)


#: Raw text of bodies: whoever may insert events may insert each of them.
HOSTILE = {
    "newline": json.dumps({"principal": "operator:a\nb\r\nc", "reason": "x\ny"}),
    "ansi": json.dumps({"principal": "operator:\x1b[2J\x1b]0;t\x07", "reason": "\x9b31m\x7f"}),
    "raw delete": '{"principal":"operator:\x7f","reason":"\x7f\x80"}',
    "pipe": json.dumps({"principal": "operator:a|b", "reason": "|=cmd()|'\"`$(x)"}),
    "formula": json.dumps({"principal": "=cmd()", "reason": "@SUM(1)\t"}),
    "separators": json.dumps({"principal": "operator:\u2028\u2029\u0085", "reason": "\u2028"},
                             ensure_ascii=False),
    "directions": json.dumps({"principal": "operator:\u202e\u2066x", "reason": "\u200b"}),
    "half a pair": '{"principal":"operator:\\ud800","reason":"\\udc80","detail":{"\\ud801":1}}',
    "nul": '{"principal":"operator:\\u0000","reason":"\\u0000"}',
    "numbers": '{"principal":"operator:x","reason":1e999,"detail":{"n":NaN,"m":-Infinity,"f":0.1}}',
    "strange types": '{"principal":{"a":[]},"reason":["x"],"outcome":{"y":1},"detail":"text"}',
    "no object": '["a"]',
    "no json": 'x\n\x1b[31m"y',
    "empty": "",
    "deep": '{"detail":' + "[" * 30_000 + "]" * 30_000 + "}",
    "large": json.dumps({"principal": "operator:x", "reason": "é" * 30_000}),
    "duplicates": '{"principal":"operator:a","principal":"operator:b"}',
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_one_event_is_one_line_without_control_characters_in_every_format(name):
    one = event(body=HOSTILE[name], login="a\nb\x1b[0m", client="local")
    for line in (
        line_of(one, NAMES),
        one_line(document(one, NAMES)),
        one_line(ocsf.document(one, NAMES)),
    ):
        assert line.splitlines() == [line]
        assert line.isprintable()
        line.encode("utf-8")
    for line in (one_line(document(one, NAMES)), one_line(ocsf.document(one, NAMES))):
        assert line.isascii()
        read = json.loads(line, parse_constant=pytest.fail)
        json.dumps(read, ensure_ascii=False).encode("utf-8")  # every reader can take it
        assert re.search(r"\\ud[89a-f]", line) is None or name == "separators"
    Event.model_validate(ocsf.document(one, NAMES))


@pytest.mark.parametrize("action", list(AuditAction))
def test_a_line_of_text_fits_80_columns(action):
    kind = max(TargetKind, key=len)
    body = json.dumps({"outcome": "success", "principal": str(Principal("operator", "alice"))})
    one = event(action.value, body, index=123_456, target_kind=kind.value)
    assert len(line_of(one)) <= 80


def test_the_table_of_the_documentation_is_what_is_done():
    page = (Path(__file__).parents[2] / "docs" / "siem.md").read_text(encoding="utf-8")
    rows = [tuple(c.strip() for c in line.strip("|").split("|"))
            for line in page.split("| Audit action |")[1].splitlines()[2:]]  # fmt: skip
    made = [ocsf.document(event(action.value), {}) for action in AuditAction]
    assert rows == [
        (f"`{m['api']['operation'] if 'api' in m else m['metadata']['event_code']}`",
         f"{m['class_uid']} {m['class_name']}", f"{m['activity_id']} {m['activity_name']}",
         ocsf._SEVERITIES[ocsf.ACTIONS[action].severity_id])
        for action, m in zip(AuditAction, made, strict=True)
    ]  # fmt: skip
