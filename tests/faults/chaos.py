"""The chaos run: real processes under real faults, then the checker.

`python -m tests.faults.chaos --seconds N --seed S` makes seeds S, S+1, … of `--each` seconds until
N seconds of faults are over. docs/faults.md says what is done and what is checked.
"""

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from threading import Event
from uuid import UUID

import psycopg

from connectors.postgres.errors import Kind, all_answers
from schemas.limits import DISPATCH_DEADLINE
from tests.faults import checker, recording
from tests.faults.arena import EQUALS, LEASE_S, RUNS_MAX, Arena
from tests.faults.history import Facts, History
from tests.faults.nemesis import Nemesis

PATIENCE_S = 120.0
TMPFS_MB = 160
#: How a run may fail here: it was unlucky too often. Nothing that is done asks a person to act, so
#: any other code was misjudged.
TIMES_FAULT = {"transient", "lost_leases"} | {
    answer.code for answer in all_answers() if answer.kind is Kind.TRANSIENT
}
#: An outcome -> what those who read the summary call it.
HEADLINES = {
    "lost": ("I1", "I2"),
    "doubled": ("I3", "I5"),
    "cap violations": ("I6",),
    "stuck": ("I8",),
}


@dataclass
class Report:
    """What one seed came to."""

    root: Path
    seed: int
    seconds: float
    faults: Counter[str]
    runs: int
    states: Counter[str]
    leases_lost: int
    drained_after: timedelta | None
    evidence: dict[str, int]
    violations: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        made = ", ".join(f"{name} {n}" for name, n in sorted(self.faults.items()))
        drained = (
            "never" if self.drained_after is None else f"{self.drained_after.total_seconds():.1f} s"
        )
        states = ", ".join(f"{n} {state}" for state, n in self.states.items())
        yield f"seed {self.seed}: {self.faults.total()} faults in {self.seconds:.0f} s ({made})"
        yield (
            f"  {self.runs} runs finished ({states}) ; "
            f"{self.leases_lost} leases lost; drained {drained} after the last fault"
        )
        yield "  judged: " + ", ".join(f"{n} {what}" for what, n in self.evidence.items())
        if self.violations:
            yield f"  everything is kept in {self.root}"
        for name, bad in self.violations.items():
            yield f"  {name} VIOLATED {len(bad)} times: " + "; ".join(bad[:5])


def run(root: Path, seed: int, seconds: float, *, tablespace: Path | None = None) -> Report:
    """One seed: start everything, strike, heal, drain, check."""
    random = Random(seed)
    arena = Arena(root, seed, tablespace=tablespace)
    facts = _facts()
    nemesis = Nemesis(arena, random, facts)
    try:
        arena.start()
        begins = dict(arena.control.all(_FIRST_SLOTS))
        arena.run_programs()
        arena.watch_schedulers(facts.outages)
        _finish_all(arena)
        with arena.pair.connect("destination") as lake:
            recording.record_commits(lake)
        quiet = Event()
        arena.change_rows(Random(seed + 1), quiet)
        arena.ask(Random(seed + 2), quiet)
        _strike(nemesis, seconds)
        quiet.set()
        time.sleep(1.2)  # the last question has been asked, the last row changed
        facts.windows = {c: (begins[c], end) for c, end in _end_schedules(arena).items()}
        facts.drained_after = _drained_after(arena)
        if facts.drained_after is not None:
            _finish_all(arena)
        facts.scrapes = _scrapes(arena)
        arena.stop_programs()
        return _judge(arena, nemesis, facts, seconds)
    finally:
        nemesis.let_go()
        arena.close()


_FIRST_SLOTS = "SELECT connection_id, next_due_at FROM schedules WHERE kind = 'interval'"


def _facts() -> Facts:
    return Facts(
        lease=timedelta(seconds=LEASE_S), dispatch_deadline=DISPATCH_DEADLINE, runs_max=RUNS_MAX,
        slack=timedelta(seconds=5), turns_min=40,
    )  # fmt: skip


def _strike(nemesis: Nemesis, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        nemesis.strike()
        if nemesis.arena.failed:
            raise nemesis.arena.failed[0]
        _cut_waits(nemesis.arena)
        time.sleep(nemesis.random.uniform(0.1, 0.9))
    nemesis.heal()


def _cut_waits(arena: Arena) -> None:
    """End the delays between attempts: they are of minutes, and have tests of their own."""
    with suppress(Exception):  # the server is just away
        arena.control.act(
            "UPDATE active_runs SET not_before = clock_timestamp() WHERE state = 'queued' "
            "AND not_before > clock_timestamp()"
        )


def _end_schedules(arena: Arena) -> dict[UUID, datetime]:
    """Let no further slot come; return the first slot of each that was not claimed any more."""
    return dict(arena.control.all(
        "WITH old AS (SELECT connection_id, next_due_at FROM schedules "
        "WHERE next_due_at IS NOT NULL FOR UPDATE) UPDATE schedules s SET next_due_at = NULL "
        "FROM old WHERE s.connection_id = old.connection_id "
        "RETURNING old.connection_id, old.next_due_at"
    ))  # fmt: skip


def _drained_after(arena: Arena) -> timedelta | None:
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE_S:
        _cut_waits(arena)
        if not arena.control.one("SELECT count(*) FROM active_runs"):
            return timedelta(seconds=time.monotonic() - begin)
        time.sleep(0.1)
    return None


_FAILED = "SELECT count(*) FROM runs WHERE state <> 'succeeded' AND run_id = ANY(:ids)"


def _finish_all(arena: Arena) -> None:
    """Run every connection once without a fault: then both sides must be equal."""
    asked = [arena.enqueue(name) for name in arena.connection_ids]
    deadline = time.monotonic() + PATIENCE_S
    query = "SELECT count(*) FROM runs WHERE state = 'succeeded' AND run_id = ANY(:ids)"
    while arena.control.one(query, ids=asked) != len(asked):
        failed = arena.control.one(_FAILED, ids=asked)
        if time.monotonic() > deadline or arena.failed or failed:
            rows = arena.control.all(
                "SELECT subject_id, state, error FROM runs WHERE run_id = ANY(:ids) AND state <> "
                "'succeeded' UNION ALL SELECT subject_id, state, error FROM active_runs", ids=asked
            )  # fmt: skip
            raise RuntimeError(f"a run without a fault did not succeed: {arena.failed or rows}")
        time.sleep(0.1)


def _scrapes(arena: Arena) -> list[str]:
    found = []
    for port in arena.ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            found.append(answer.read().decode())
    return found


def _judge(arena: Arena, nemesis: Nemesis, facts: Facts, seconds: float) -> Report:
    """Read everything from the databases and check it."""
    facts.asked, facts.secrets = arena.asked, arena.secrets
    facts.keyring = Path(str(arena.settings.keyring))
    facts.equals = {arena.account_ids[name] for name in EQUALS}
    facts.files = [
        *(arena.root / "logs").glob("*.log"), arena.base.log_path, arena.data.log_path,
        arena.valkey.log_path, *(arena.valkey.root / "appendonlydir").glob("*"),
    ]  # fmt: skip
    with (
        psycopg.connect(arena.control.admin_url, autocommit=True) as control,
        arena.pair.connect("destination") as lake,
    ):
        history = History(control, [lake], arena.streams())
        facts.drain_bound = facts.lease + facts.dispatch_deadline + facts.slack + _longest(history)
        violations = checker.check(history, facts)
        misjudged = [
            f"run {run.run_id}: {run.error_code}: {run.error}"
            for run in history.runs
            if run.state == "failed" and run.error_code not in TIMES_FAULT
        ]
        if misjudged:
            violations["errors"] = misjudged
        if arena.failed:
            violations["arena"] = [repr(error) for error in arena.failed]
        lost = [
            e for e in history.events if e.action == "run.requeued" and e.reason == "lost_lease"
        ]
        return Report(
            arena.root, arena.seed, seconds, nemesis.made, len(history.runs),
            Counter(run.error_code if run.state == "failed" else run.state for run in history.runs),
            len(lost), facts.drained_after,
            checker.evidence(history, facts), violations,
        )  # fmt: skip


def _longest(history: History) -> timedelta:
    """The longest attempt that went through."""
    took = [
        released.at - started.at
        for events in history.of_runs.values()
        for started, released in checker.holds(events)
        if released is not None and released.action == "run.succeeded"
    ]
    return max(took, default=timedelta(0))


def summary(reports: list[Report]) -> Iterator[str]:
    """The sum over all seeds; the bound is the rule of three."""
    runs = sum(r.runs for r in reports)
    faults = sum((r.faults for r in reports), Counter[str]())
    yield (
        f"{faults.total()} faults over {len(reports)} seeds, {runs} runs finished, "
        f"{sum(r.leases_lost for r in reports)} leases lost"
    )
    yield "faults: " + ", ".join(f"{name} {n}" for name, n in sorted(faults.items()))
    counts = {
        word: sum(len(r.violations.get(name, ())) for r in reports for name in names)
        for word, names in HEADLINES.items()
    }
    total = sum(len(bad) for r in reports for bad in r.violations.values())
    yield ", ".join(f"{word} {n}" for word, n in counts.items()) + f"; violations in all {total}"
    if total == 0 and runs:
        yield f"95 % upper bound for the failure rate of a run: {3 / runs:.2e} (3/n)"


@contextmanager
def small_disk(root: Path) -> Iterator[Path]:
    """A file system of a few MB for the destination; needs root."""
    mount = root / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MB}m", "syncward-chaos", str(mount)]
    subprocess.run(command, check=True)
    try:
        place = mount / "tablespace"
        place.mkdir(mode=0o700)
        yield place
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def one_seed(seed: int, seconds: float, *, real_disk: bool) -> Report:
    """One seed in a directory of its own, which goes away if all is well."""
    root = Path(tempfile.mkdtemp(prefix=f"chaos-{seed}-"))
    if real_disk:
        with small_disk(root) as place:
            report = run(root, seed, seconds, tablespace=place)
    else:
        report = run(root, seed, seconds)
    if not report.violations:
        shutil.rmtree(root, ignore_errors=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of faults, over all seeds")
    parser.add_argument("--each", type=float, default=60, help="of faults in one seed")
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--real-disk", action="store_true", help="fill a real disk; needs root")
    chosen = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # also when started in the background
        signal.signal(number, lambda *_: sys.exit("stopped"))
    reports: list[Report] = []
    left = chosen.seconds
    while left > 0:
        each = min(left, chosen.each)
        report = one_seed(chosen.seed + len(reports), each, real_disk=chosen.real_disk)
        reports.append(report)
        print("\n".join(report.lines()), flush=True)
        left -= each
    print("\n".join(summary(reports)), flush=True)
    return int(any(report.violations for report in reports))


if __name__ == "__main__":
    sys.exit(main())
