"""The bytes of an event: canonical, and compared with somebody else's RFC 8785."""

import json
from uuid import UUID

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.audit import AuditAction, AuditEvent, FieldChange, Principal, TargetKind
from schemas.audit_body import (
    BODY_MAX,
    REASON_MAX,
    OutOfProfile,
    body_of,
    canonical,
    checked,
    escaped,
)
from schemas.audit_details import DETAILS, INTEGER_MAX, Detail

ANY_TEXT = st.text(st.characters())  # lone surrogates, too
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS = st.integers(-INTEGER_MAX, INTEGER_MAX)
KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_", min_size=1, max_size=12)
WRONG: tuple[object, ...] = (1.5, 2**53, [], {}, b"x")
VALUES = st.recursive(
    st.none() | st.booleans() | INTEGERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_canonical_bytes_are_those_of_rfc8785(value):
    assert canonical(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [
    1.0, 0.5, float("nan"), 2**53, -(2**53), 2**70, "\udc80", "a\ud800b", b"x", {1}, UUID(int=0),
    {"A": 1}, {"ä": 1}, {"": 1}, {"a-b": 1}, {1: 1}, {"a\n": 1}, [1, [2, {"x": 0.1}]],
])  # fmt: skip
def test_what_has_no_canonical_bytes_is_refused(value):
    with pytest.raises(OutOfProfile, match="audit: "):
        canonical({"value": value})


@given(ANY_TEXT)
def test_any_text_from_outside_can_be_written(text):
    known = escaped(text)
    assert json.loads(canonical({"text": known})) == {"text": known}
    assert "\0" not in known
    if text.isprintable():
        assert known == text


def test_every_action_says_what_its_detail_holds():
    assert set(DETAILS) == set(AuditAction)


def test_a_detail_holds_texts_integers_truth_values_and_nothing_else():
    for model in DETAILS.values():
        assert issubclass(model, Detail)
        for name in model.model_fields:
            canonical({name: None})
            for value in WRONG:
                with pytest.raises(ValidationError) as caught:
                    model.model_validate({name: value})
                assert (name,) in [error["loc"] for error in caught.value.errors()]


def event(detail, action=AuditAction.RUN_STARTED, **more):
    return AuditEvent(
        action, TargetKind.RUN, UUID(int=1), Principal("worker", "w1"), detail=detail, **more
    )


def written(said: AuditEvent) -> str:
    return body_of(said, checked(said), str(said.principal))


STARTED = {"attempt": 1, "subject": "s", "worker": "w1", "fence": 1}


@pytest.mark.parametrize("detail", [
    {}, {**STARTED, "more": 1}, {**STARTED, "fence": "1"}, {**STARTED, "fence": 1.0},
    {**STARTED, "fence": True}, {**STARTED, "fence": 2**53}, {**STARTED, "worker": None},
    {**STARTED, "worker": ["w1"]},
])  # fmt: skip
def test_a_detail_that_its_action_does_not_have_is_our_bug(detail):
    with pytest.raises(ValidationError):
        checked(event(detail))


def test_an_outcome_that_does_not_exist_is_our_bug():
    with pytest.raises(ValueError, match="no outcome"):
        checked(event(STARTED, outcome="perhaps"))


def test_a_body_that_is_too_large_is_our_bug():
    with pytest.raises(ValueError, match=f"more than {BODY_MAX}"):
        written(event({**STARTED, "worker": "x" * 1_000_000}))


def test_a_long_reason_is_cut_and_an_odd_one_escaped():
    body = json.loads(written(event(STARTED, reason="é" * 1_000_000)))
    assert body["reason"] == "é" * (REASON_MAX - 1) + "…"
    body = json.loads(written(event(STARTED, reason="a\udcffb\0c\x1b[31m\n")))
    assert body["reason"] == "a\\udcffb\\x00c\x1b[31m\n"


def test_a_body_says_what_it_says():
    said = event(STARTED, run_id=UUID(int=2), change=(FieldChange("host", None, "ab"),))
    assert written(said) == (
        '{"change":[{"after":"ab","before":null,"field":"host"}],'
        '"detail":{"attempt":1,"fence":1,"subject":"s","worker":"w1"},"outcome":"success",'
        '"principal":"worker:w1","run_id":"00000000-0000-0000-0000-000000000002","v":2}'
    )


@given(worker=ANY_TEXT, reason=st.none() | ANY_TEXT, fence=INTEGERS, field=ANY_TEXT)
def test_whatever_it_holds_a_body_is_canonical(worker, reason, fence, field):
    detail = {**STARTED, "worker": worker, "fence": fence}
    body = written(event(detail, reason=reason, change=(FieldChange(field, "x", None),)))
    assert rfc8785.dumps(json.loads(body)).decode() == body
