"""The chaos run as a test: seconds of seeded faults on real processes, then every invariant."""

from pathlib import Path

import pytest

from tests.faults import chaos

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("seconds", "seed"), [(10, 3), pytest.param(60, 4, marks=pytest.mark.full)]
)
def test_nothing_is_lost_doubled_over_its_cap_or_stuck_under_faults(
    tmp_path: Path, seconds: int, seed: int
):
    report = chaos.run(tmp_path, seed, seconds)
    print("\n".join([*report.lines(), *chaos.summary([report])]))
    assert report.violations == {}
    assert report.faults.total() >= seconds / 4, "a run without faults proves nothing"
    for what in ("slots", "runs", "dispatches", "commits of rows", "moves"):
        assert report.evidence[what] >= seconds, f"too few {what} to say anything"
