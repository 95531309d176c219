"""The cases of pg_to_pg: who runs against whom, over what, and what is promised. See `measure`."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks import written
from benchmarks.contestants import CURSOR, KEY, TABLE, Contestant, Hand, Ours, Target, forget
from benchmarks.lab import Lab, Link, Usage, lab, pss_mb
from benchmarks.report import Case
from benchmarks.rivals import Dlt, NotToBeHad, Sling, tls_bindir
from benchmarks.written import Written

#: Budgets: a run that moves nothing, client CPU per million rows, memory of an idle worker, and
#: what a running sync adds to it.
UNCHANGED_S = 0.060
CPU_S = 4.0
IDLE_MB = 120.0
RUNNING_MB = 40.0

#: What is measured against whom, and the ratio that is promised: None where there is no promise.
CASES: dict[str, float | None] = {
    "first_load": 1.15,
    "first_load_vs_sling": 1 / 2,
    "first_load_vs_dlt": 1 / 4,
    "merge_all": 1.10,
    "merge_all_vs_sling": 1.0,
    "merge_all_vs_dlt": 1.0,
    "reread_1pct": 0.75,
    "reread_1pct_vs_sling": 1 / 1.5,
    "reread_1pct_vs_dlt": 1 / 3,
    "changed_10k": 1.3,
    "changed_10k_vs_sling": 1 / 3,
    "changed_10k_vs_dlt": 1 / 5,
    "unchanged": 1.0,
    "unchanged_vs_sling": 1 / 8,
    "unchanged_vs_dlt": 1 / 30,
    "client_cpu": 1.0,
    "client_cpu_vs_sling": 1 / 5,
    "client_cpu_vs_dlt": 1 / 8,
    "idle_worker": 1.0,
    "rss_1m": 1.0,
    "rss_1m_vs_sling": 1.0,
    "rss_1m_vs_dlt": 1.0,
    "rss_10m_over_1m": 1.1,
    "first_load_tls": None,
    "merge_all_tls": None,
    "reread_1pct_tls": None,
    "written": None,  # not a ratio: the table of what each one wrote
}
#: Where a warm worker is asked for, ours is the time from the claim of the run to its end.
WARM = frozenset({"changed_10k", "unchanged"})
#: What is read off the first loads.
_OF_FIRST_LOADS = ("client_cpu", "rss_1m", "rss_10m_over_1m")
BIG = Link("big", f"{{mode: merge, key: [{KEY}]}}", table=f"{TABLE}_big")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    rows: int
    rounds: int
    cases: tuple[str, ...]
    rivals: tuple[str, ...]
    cache: Path

    def wants(self, *names: str) -> bool:
        return any(name in self.cases for name in names)


@dataclass(slots=True)
class Found:
    """What came out."""

    cases: list[Case] = field(default_factory=list)
    beside: list[Case] = field(default_factory=list)  # without a promise
    usages: dict[str, dict[str, list[Usage]]] = field(default_factory=dict)  # by race and name
    starts: dict[str, float] = field(default_factory=dict)
    servers: dict[str, str] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    idle_mb: float = 0.0
    big_mb: float = 0.0

    @property
    def seconds(self) -> dict[str, dict[str, list[float]]]:
        """Return the time of each round."""
        return {
            race: {name: [round(_seconds(race, u), 3) for u in us] for name, us in by.items()}
            for race, by in self.usages.items()
        }

    @property
    def cpu_seconds(self) -> dict[str, dict[str, list[float]]]:
        """Return the processor time of each round: of the client and both servers."""
        return {
            race: {
                name: [round(u.cpu_seconds + u.server_cpu_seconds, 2) for u in usages]
                for name, usages in by.items()
            }
            for race, by in self.usages.items()
        }


def measure(plan: Plan) -> Found:
    """Run every race of the plan; what cannot be run is left out with its reason."""
    found = Found()
    if any(not name.endswith("_tls") for name in plan.cases):
        with lab(plan.rows, [*_links(), BIG]) as made:
            found.servers["postgres"] = _version(made)
            _plain(made, plan, found)
    if any(name.endswith("_tls") for name in plan.cases):
        try:
            bindir = tls_bindir(plan.cache)
        except NotToBeHad as why:
            found.left_out["tls"] = str(why)
        else:
            with lab(plan.rows, _links() + _links(tls=True), bindir=bindir) as made:
                found.servers["postgres_tls"] = _version(made)
                _over_tls(made, plan, found)
    return found


def _links(*, tls: bool = False) -> list[Link]:
    return [Ours.link_of(target, tls=tls) for target in Target]


def _version(made: Lab) -> str:
    return str(made.one(made.source, "SHOW server_version")[0])


# ── beside psql and the rivals ───────────────────────────────────────────────────────────────


def _plain(made: Lab, plan: Plan, found: Found) -> None:
    ours, hand = Ours(made), Hand(made)
    rivals = _rivals(made, plan, found)
    race = Race(made, plan, found, rivals=tuple(rival.name for rival in rivals))

    def racers(*names: str) -> list[Contestant]:
        """Return who is needed for the cases of these names, if anybody is."""
        beside = [r for r in rivals if plan.wants(*(f"{name}_vs_{r.name}" for name in names))]
        timed = [hand] if plan.wants(*names) and not names[0].startswith("unchanged") else []
        wanted = plan.wants(*names) or bool(beside)
        return [*timed, ours, *beside] if wanted else []

    race.bring([ours], Target.CHANGES)
    time.sleep(2)  # until the worker is idle: its memory is measured
    found.idle_mb = pss_mb(made.worker_pid)
    race.first_load(racers("first_load", *_OF_FIRST_LOADS))
    race.again("merge_all", racers("merge_all"), Target.CHANGES, "true")
    race.again("changed_10k", racers("changed_10k"), Target.CHANGES, f"{KEY} % 100 = 0")
    race.again("unchanged", racers("unchanged"), Target.CHANGES, None)
    if plan.wants("written"):
        racing = [ours, *(rival for rival in rivals if rival.name not in found.left_out)]
        race.bring(racing, Target.CHANGES)
        found.written = written.compare(made, racing, Target.CHANGES)
    race.again("reread_1pct", racers("reread_1pct"), Target.WHOLE, f"{KEY} % 100 = 0")
    if plan.wants("rss_10m_over_1m"):
        found.big_mb = _big(made, plan.rows)
    _add_cases(plan, found)


def _rivals(made: Lab, plan: Plan, found: Found) -> list[Sling | Dlt]:
    rivals: list[Sling | Dlt] = []
    for name, make in (("sling", Sling), ("dlt", Dlt)):
        if name in plan.rivals:
            try:
                rivals.append(make(made, plan.cache))
            except NotToBeHad as why:
                found.left_out[name] = str(why)
    for rival in rivals:
        rival.start()  # from the disk, once
        found.starts[rival.name] = round(median(rival.start().seconds for _ in range(3)), 3)
    return rivals


def _big(made: Lab, rows: int) -> float:
    """Load ten times the rows once; return the most memory the worker had."""
    (others,) = made.one(
        made.source,
        "SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute "
        f"WHERE attrelid = '{TABLE}'::regclass AND attnum > 0 AND attname <> '{KEY}'",
    )
    note(f"{rows * 10:,} rows")
    made.act(
        made.source,
        f"CREATE TABLE {BIG.table} (LIKE {TABLE} INCLUDING ALL)",
        f"INSERT INTO {BIG.table} ({KEY}, {others}) SELECT {KEY} + n * {rows}, {others} "
        f"FROM {TABLE}, generate_series(0, 9) n",
        f"VACUUM ANALYZE {BIG.table}",
    )
    made.settle()
    _, result, usage = made.run(BIG.name)
    if result.rows_inserted != rows * 10:
        raise RuntimeError(f"{result.rows_inserted} rows of {rows * 10} were loaded")
    made.act(made.source, f"DROP TABLE {BIG.table}")
    forget(made, BIG)
    return usage.memory_mb


def _add_cases(plan: Plan, found: Found) -> None:
    """Put what was measured beside its references."""
    rows = f"s per {plan.rows:,} rows"
    units = {"changed_10k": f"s per {plan.rows // 100:,} of {plan.rows:,}", "unchanged": "s"}
    made: list[tuple[str, float | None, float | None, str]] = []
    for race in ("first_load", "merge_all", "reread_1pct", "changed_10k", "unchanged"):
        ours, unit = _middle(found, race, "syncward"), units.get(race, rows)
        hand = UNCHANGED_S if race == "unchanged" else _middle(found, race, "psql")
        made.append((race, ours, hand, unit))
        made += [(f"{race}_vs_{one}", ours, _middle(found, race, one), unit) for one in plan.rivals]
        if race in WARM and (waits := found.usages.get(race, {}).get("syncward")):
            wait = median(usage.seconds for usage in waits)
            inside = median(usage.inside_seconds for usage in waits)
            found.beside.append(Case(f"{race}_wait", wait, inside, "s asked / claim to end"))
    first = found.usages.get("first_load", {})
    cpu = {n: median(u.cpu_seconds for u in us) * 1e6 / plan.rows for n, us in first.items()}
    most = {n: max(u.memory_mb for u in us) for n, us in first.items()}
    ours = cpu.get("syncward")
    made.append(("client_cpu", ours, CPU_S, "client s per 1M rows"))
    made += [
        (f"client_cpu_vs_{one}", ours, cpu.get(one), "client s per 1M rows") for one in plan.rivals
    ]
    ours = most.get("syncward")
    more = None if ours is None else max(ours - found.idle_mb, 0.0)
    made.append(("idle_worker", found.idle_mb, IDLE_MB, "MB PSS"))
    made.append(("rss_1m", more, RUNNING_MB, "MB PSS over idle"))
    made += [(f"rss_1m_vs_{one}", ours, most.get(one), "MB PSS") for one in plan.rivals]
    made.append(("rss_10m_over_1m", found.big_mb or None, ours, "MB PSS"))
    _add(plan, found, made)


def _add(
    plan: Plan, found: Found, made: Sequence[tuple[str, float | None, float | None, str]]
) -> None:
    """Keep the cases that were asked for and could be measured."""
    for name, ours, reference, unit in made:
        if name in plan.cases and ours is not None and reference is not None:
            found.cases.append(Case(name, ours, reference, unit, CASES[name]))


def _middle(found: Found, race: str, name: str) -> float | None:
    usages = found.usages.get(race, {}).get(name)
    return median(_seconds(race, usage) for usage in usages) if usages else None


def _seconds(race: str, usage: Usage) -> float:
    """Return what counts: of ours in a warm worker the run, else what whoever asks waits."""
    return usage.inside_seconds or usage.seconds if race in WARM else usage.seconds


# ── over TLS ─────────────────────────────────────────────────────────────────────────────────


def _over_tls(made: Lab, plan: Plan, found: Found) -> None:
    """Measure ours over TLS beside ours without, at the same servers."""
    plain, safe = Ours(made), Ours(made, tls=True)
    race = Race(made, plan, found, suffix="_tls")
    both: list[Contestant] = [plain, safe]
    race.bring(both, Target.CHANGES)
    if plan.wants("first_load_tls"):
        race.first_load(both)
    if plan.wants("merge_all_tls"):
        race.again("merge_all", both, Target.CHANGES, "true")
    if plan.wants("reread_1pct_tls"):
        race.again("reread_1pct", both, Target.WHOLE, f"{KEY} % 100 = 0")
    unit = f"s per {plan.rows:,}, plain beside"
    names = ("first_load_tls", "merge_all_tls", "reread_1pct_tls")
    both_of = [
        (n, _middle(found, n, safe.name), _middle(found, n, plain.name), unit) for n in names
    ]
    _add(plan, found, both_of)


# ── a race ───────────────────────────────────────────────────────────────────────────────────


class Race:
    """Lets contestants do the same in turn, so that all of them meet the same machine."""

    def __init__(
        self, made: Lab, plan: Plan, found: Found, *, suffix: str = "", rivals: Sequence[str] = ()
    ) -> None:
        self._made = made
        self._plan = plan
        self._found = found
        self._suffix = suffix
        self._rivals = rivals
        self._changes = 0  # of the source so far
        self._at: dict[tuple[str, Target], int] = {}  # which of them a target has

    def first_load(self, contestants: Sequence[Contestant]) -> None:
        """Load the whole table into one that is not there."""

        def load(one: Contestant) -> Usage:
            one.forget(Target.CHANGES)
            return self._measured(one, Target.CHANGES, first=True)

        self._rounds("first_load", contestants, Target.CHANGES, load, lambda: None)

    def again(
        self, name: str, contestants: Sequence[Contestant], target: Target, where: str | None
    ) -> None:
        """Change the source where it says, or not, and let each one bring its target up to date."""
        self.bring(contestants, target)

        def load(one: Contestant) -> Usage:
            return self._measured(one, target, first=False)

        def change() -> None:
            if where is not None:
                self._change(where, contestants, target)

        self._rounds(name, contestants, target, load, change)

    def bring(self, contestants: Sequence[Contestant], target: Target) -> None:
        """Bring targets up to date, unmeasured."""
        for one in contestants:
            with self._forgiven(one):
                if (one.name, target) not in self._at:
                    one.forget(target)
                    one.load(target, first=True)
                elif self._at[one.name, target] < self._changes:
                    one.load(target, first=False)
                self._check(one, target)

    def _rounds(
        self,
        name: str,
        contestants: Sequence[Contestant],
        target: Target,
        load: Callable[[Contestant], Usage],
        change: Callable[[], None],
    ) -> None:
        name += self._suffix
        usages: dict[str, list[Usage]] = {one.name: [] for one in contestants}
        for number in range(self._plan.rounds if contestants else 0):
            change()
            for one in contestants if number % 2 == 0 else reversed(contestants):
                if one.name in self._found.left_out:
                    continue
                with self._forgiven(one):
                    usage = load(one)
                    self._check(one, target)
                    usages[one.name].append(usage)
                    note(f"{name} {number + 1}: {one.name} {_seconds(name, usage):.2f} s")
        self._found.usages[name] = {one: found for one, found in usages.items() if found}

    def _measured(self, one: Contestant, target: Target, *, first: bool) -> Usage:
        """Load, with what the servers spend on it."""
        self._made.settle()
        before = self._made.server_cpu_seconds()
        usage = one.load(target, first=first)
        usage.server_cpu_seconds = self._made.server_cpu_seconds() - before
        return usage

    @contextmanager
    def _forgiven(self, one: Contestant) -> Iterator[None]:
        """Leave a rival out that fails; what we or psql cannot do is an error."""
        if one.name in self._found.left_out:
            return
        try:
            yield
        except RuntimeError as why:
            if one.name not in self._rivals:
                raise
            self._found.left_out[one.name] = str(why)
            note(f"{one.name} is left out: {why}")

    def _change(self, where: str, contestants: Sequence[Contestant], target: Target) -> None:
        """Give rows a new content and time, then clean up behind them, at both ends."""
        self._made.act(
            self._made.source,
            f"UPDATE {TABLE} SET qty = qty + 1, {CURSOR} = clock_timestamp() WHERE {where}",
            f"VACUUM ANALYZE {TABLE}",
        )
        self._changes += 1
        for one in contestants:
            if one.name not in self._found.left_out:
                self._made.act(
                    self._made.destination, f"VACUUM ANALYZE {one.schema(target)}.{TABLE}"
                )

    def _check(self, one: Contestant, target: Target) -> None:
        """Refuse the time of a load that did not bring every row and change."""
        query = "SELECT count(*), sum(qty) FROM {}"
        there = self._made.one(
            self._made.destination, query.format(f"{one.schema(target)}.{TABLE}")
        )
        if there != self._made.one(self._made.source, query.format(TABLE)):
            raise RuntimeError(f"{one.name}: {one.schema(target)} is not what the source holds")
        self._at[one.name, target] = self._changes


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
