"""One line per event, for people and as JSON; nothing that an exception says; every event known."""

import ast
import json
import logging
import re
import threading
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import TransientError
from schemas.log_lines import Formatter, bind, unbind
from schemas.secret_patterns import names_a_secret

ROOT = Path(__file__).parent.parent.parent
SHAPES = ("people", "json")


def line(
    shape, event="run_ended", *, error=None, name="workers.run_sync", args=(), **fields
) -> str:
    info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord(name, logging.INFO, __file__, 1, event, args, info)
    record.__dict__.update(fields)
    return Formatter(shape).format(record)


def raised(error: Exception) -> Exception:
    def fail() -> None:
        try:
            dict[str, str]()["password=hunter2"]
        except KeyError as cause:
            raise error from cause

    try:
        fail()
    except type(error) as caught:
        return caught
    return error


@given(event=st.text(), fields=st.dictionaries(st.from_regex(r"\A[a-z_]{3,9}\Z"), st.text()))
def test_an_event_is_one_line_whatever_its_fields_are(event, fields):
    known = set(logging.makeLogRecord({}).__dict__) | {"at", "level", "event"}
    fields = {n: v for n, v in fields.items() if n not in known and not names_a_secret(n)}
    for shape in SHAPES:
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", line(shape, event, **fields))
    found = json.loads(line("json", event, **fields))
    assert {name: found[name] for name in fields} == fields
    assert found["event"] == event


def test_fields_cannot_pretend_to_be_another_event():
    found = json.loads(line("json", level="x", at="x"))
    assert found["level"] == "info"
    assert found["at"] > "2020"


def test_people_can_read_where_a_field_ends():
    text = line("people", reason="two words", code="one", empty="", places=["a.py:1 f", "b.py:2 g"])
    assert text.endswith(
        'run_ended reason="two words" code=one empty="" places="a.py:1 f < b.py:2 g"'
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_traceback_is_places_without_what_the_exception_says(shape):
    text = line(shape, "run_crashed", error=raised(ValueError("row 4711: alice@example.org")))
    assert "alice" not in text
    assert "hunter2" not in text
    assert "ValueError" in text
    assert "KeyError" in text
    assert "unit/test_log_lines.py:" in text


def test_a_traceback_is_structured_innermost_first():
    found = json.loads(line("json", "run_crashed", error=raised(ValueError("x"))))
    assert (found["error"], found["cause"]) == ("ValueError", "KeyError")
    assert re.fullmatch(r"unit/test_log_lines\.py:\d+ fail", found["where"][0])


def test_what_we_wrote_ourselves_is_shown():
    found = json.loads(line("json", error=raised(TransientError("lake: not reachable"))))
    assert (found["code"], found["reason"]) == ("transient", "lake: not reachable")


def test_a_librarys_line_shows_its_template_only():
    for shape in SHAPES:
        text = line(
            shape, "Failed to process message %s.", args=("secret",), name="dramatiq.worker.W"
        )
        assert "secret" not in text
        assert "Failed to process message %s." in text


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bound_run_is_on_every_line_of_its_thread_and_of_no_other(shape):
    run_id = uuid4()
    bind(run_id=run_id)
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(line(shape)))
    thread.start()
    thread.join()
    assert str(run_id) in line(shape)
    assert str(run_id) not in elsewhere[0]
    unbind()
    assert str(run_id) not in line(shape)


def events_in_the_source() -> set[str]:
    found = set()
    for folder in (
        "audit", "cli", "connectors", "crypto", "scheduler", "schemas", "storage", "workers",
    ):  # fmt: skip
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in {"info", "warning", "error", "critical", "exception"}
                    and "logger" in ast.unparse(node.func.value).lower()
                ):
                    assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
                    found.add(str(node.args[0].value))
    return found


def test_every_event_is_documented_and_static():
    page = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == events_in_the_source() | {"library"}
