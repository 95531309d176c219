"""Metrics have a constant number of series, whatever errors, connectors and guards come along."""

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from connectors import registry
from schemas.failures import FAILURES
from schemas.runs import Outcome, OutcomeKind
from workers import metrics


def series() -> int:
    return sum(len(family.samples) for family in REGISTRY.collect())


def attempts(reason: str) -> float:
    return REGISTRY.get_sample_value("syncward_run_attempts_total", {"reason": reason}) or 0.0


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(OutcomeKind),
    code=st.none() | st.text() | st.sampled_from(sorted(FAILURES)),
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
