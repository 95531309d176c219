"""The chaos run as a test: seconds of seeded faults on real processes, then every invariant."""

import os
from pathlib import Path

import pytest

from tests.faults import chaos

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def judge(report: chaos.Report) -> None:
    print("\n".join([*report.lines(), *chaos.summary([report])]))
    assert report.violations == {}
    assert report.faults.total() >= report.seconds / 4, "a run without faults proves nothing"
    for what in ("slots", "runs", "dispatches", "commits of rows", "moves"):
        assert report.evidence[what] >= report.seconds, f"too few {what} to say anything"


def test_nothing_is_lost_doubled_over_its_cap_or_stuck_under_faults(tmp_path: Path):
    judge(chaos.run(tmp_path, seed=3, seconds=10))


@pytest.mark.full
def test_a_minute_of_faults_with_a_disk_that_is_really_full_where_root_allows_it(tmp_path: Path):
    if os.geteuid():
        judge(chaos.run(tmp_path, seed=4, seconds=60))
        return
    with chaos.small_disk(tmp_path) as place:
        judge(chaos.run(tmp_path, seed=4, seconds=60, tablespace=place))
