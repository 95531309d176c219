"""Metrics have a constant number of series, whatever errors, connectors and guards come along."""

import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from connectors import registry
from schemas.codes import ERROR_CODES, GUARD_CODES
from schemas.runs import Outcome, OutcomeKind
from workers import metrics

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("connectors", "crypto", "schemas", "scheduler", "storage", "workers")


def series() -> int:
    return sum(len(family.samples) for family in REGISTRY.collect())


def attempts(reason: str) -> float:
    return REGISTRY.get_sample_value("syncward_run_attempts_total", {"reason": reason}) or 0.0


def codes_in_the_source() -> set[str]:
    """Every literal that is given to an error or an outcome as its code."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    )
    given_codes = re.findall(r'(?<![\w.])code\s*(?:: str)?\s*=\s*"([a-z0-9_]+)"', text)
    outcomes = re.findall(r'Outcome\(\s*OutcomeKind\.\w+,\s*"([a-z0-9_]+)"', text)
    return {*given_codes, *outcomes}


def test_every_code_in_the_source_is_in_the_closed_set_of_labels():
    found = codes_in_the_source()
    assert {"credentials", "disk_full", "internal", "unsealable"} <= found
    assert found - ERROR_CODES - {"lost_leases", "no_worker"} == set()  # those are the reaper's
    assert GUARD_CODES <= ERROR_CODES


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(OutcomeKind),
    code=st.none() | st.text() | st.sampled_from(sorted(ERROR_CODES)),
    connector=st.none() | st.text() | st.sampled_from(sorted(registry.sources())),
)
def test_no_error_code_or_connector_makes_a_new_series(kind, code, connector):
    before = series()
    metrics.count_end(Outcome(kind, code, "text"), connector, 1.0)
    assert series() == before


def test_an_unknown_code_counts_as_other():
    before = attempts("other")
    metrics.count_end(Outcome(OutcomeKind.FAILED, "acme-corp 10.0.0.1 refused"), "postgres", 1.0)
    assert attempts("other") == before + 1


def test_known_codes_keep_their_name():
    before = attempts("disk_full")
    metrics.count_end(Outcome(OutcomeKind.RETRY, "disk_full"), "postgres", 1.0)
    assert attempts("disk_full") == before + 1
