"""Writes docs/benchmarks.md and its picture from one run of pg_to_pg: start at `write`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap

from benchmarks.picture import Bar, draw
from benchmarks.races import Found
from benchmarks.report import Case
from benchmarks.written import Column, Written

#: Columns of the page.
_WIDTH = 98
DOCS = Path(__file__).parent.parent / "docs"
NAMES = {"psql": "psql by hand", "syncward": "Syncward", "sling": "sling", "dlt": "dlt"}
#: The groups of the tables: a race, what it is called, and what psql does there.
RACES = {
    "first_load": ("first load", "`COPY` into `COPY`, then the key"),
    "merge_all": ("every row changed", "`COPY` to staging, `ON CONFLICT DO UPDATE`"),
    "reread_1pct": ("everything read, 1 % changed", "the same: it cannot tell what changed"),
    "changed_10k": ("1 % changed, by cursor", "the same, `WHERE updated_at > max`"),
    "unchanged": ("nothing changed, by cursor", "a budget of 60 ms"),
}
OTHERS = {
    "client_cpu": "client CPU of the first load",
    "idle_worker": "idle worker",
    "rss_1m": "memory of a running first load",
    "rss_10m_over_1m": "memory with ten times the rows, beside that",
}
OVER_TLS = {
    "first_load_tls": "first load",
    "merge_all_tls": "every row changed",
    "reread_1pct_tls": "everything read, 1 % changed",
}

_INTRO = """\
# Benchmarks

<!-- Written by `make bench`; do not edit. -->

One table, from one Postgres to another, by this engine, by hand with `psql`, and by two other
tools, in turn in one run on one machine. Lower is better everywhere. `make bench` makes this page
on yours; how it measures is in [benchmarks/](../benchmarks/).

{versions}
`{command}`, {date}, {rows:,} rows, {rounds}. Load of the
machine before it: {load_before}.
"""
_PROMISES = """
## What was promised

The ratio is ours over the other's; the promise is the largest ratio allowed.
{small}
| Case | Beside | Ours | Other's | Ratio | Promise | |
|---|---|--:|--:|--:|--:|---|
"""
_SMALL = """
Promises are made for 1,000,000 rows, medians of 5, on a quiet machine: this run is smaller, and
what does not depend on the rows (asking, claiming, connecting, the end) weighs more in it.
"""
_SECONDS = """
## Seconds

![Seconds of each tool](benchmarks.svg)

| Case | {heads} |
|---|{dashes}
"""
_CPU = """
Processor seconds of the client and both servers together, which other work on the machine changes
less than the times above:

| Case | {heads} |
|---|{dashes}
"""
_HOW = """
Ours is what an operator waits: asking, scheduling, queue, claim, unsealing, both logins, the load
with its audit events, sealed log and statistics of the table. With 1 % or nothing changed it is
the time in a warm worker, from the claim of the run to its end, as promised{waits}.
The others are started for each load, psql as well, so the start of their processes counts{starts}.
"""
_TLS = """
## Over TLS

The links of the production profile: `verify-full` and channel binding at both ends, beside links
without TLS to the same servers (Postgres {tls}, which has TLS; the clusters above have none).
Audit events and sealed credentials, logs and outputs are in every number of this page.

| Case | TLS | Plain | Overhead | in processor time |
|---|--:|--:|--:|--:|
"""
_WRITTEN = """
## What each one wrote

The copies after all of the above beside the source, row by row: by image where the type is the
same, else by text.

| | {heads} |
|---|{dashes}
"""
_NOTES = """
dlt's connectorx path writes CSV, which holds no arrays, so `tags` was left out for it and it had
less to do. Logins reach sling (`env.yaml`) and dlt (`secrets.toml`) in files of mode 0600 in the
temporary directory; neither can do without. sling ran with its own choice of bulk loading,
`primary_key`, `update_key` and `table_keys`; dlt with connectorx, uncompressed CSV and its
default way to merge. First loads are `full-refresh` and `replace`, which are their fastest.
"""


def write(made: Mapping[str, object], found: Found) -> None:
    """Write the page and its picture."""
    names = [name for name in NAMES if any(name in by for by in found.seconds.values())]
    parts = [
        _head(made),
        _promises(made, found),
        _seconds(found, names),
        _how(found),
        _over_tls(found),
        _written(found),
        _NOTES if found.written else "",
        _left_out(found),
    ]
    (DOCS / "benchmarks.md").write_text("".join(parts), encoding="utf-8")
    (DOCS / "benchmarks.svg").write_text(_picture(found, names), encoding="utf-8")


def _head(made: Mapping[str, object]) -> str:
    versions = made["versions"]
    assert isinstance(versions, dict)
    said = ", ".join(f"{n} {number}" for n, number in versions.items() if n != "postgres_tls")
    lines = "\n".join(wrap(f"{made['machine']}. {said}.", _WIDTH, break_on_hyphens=False))
    rounds = "once each" if made["rounds"] == 1 else f"medians of {made['rounds']}"
    return _INTRO.format(**{**made, "versions": lines, "rounds": rounds})


def _promises(made: Mapping[str, object], found: Found) -> str:
    small = made["rows"] != 1_000_000 or made["rounds"] != 5
    lines = [_line(case) for case in found.cases if case.limit is not None]
    return _PROMISES.format(small=_SMALL if small else "") + "".join(lines)


def _line(case: Case) -> str:
    race, _, other = case.case.partition("_vs_")
    called = RACES[race][0] if race in RACES else OTHERS[race]
    beside = NAMES[other] if other else RACES[race][1] if race in RACES else "a budget"
    if race == "rss_10m_over_1m":
        beside = "ours"
    unit = case.unit.split()[0]
    ours, reference = _number(case.ours, unit), _number(case.reference, unit)
    assert case.limit is not None
    mark = "met" if case.met else "**missed**"
    return (
        f"| {called} | {beside} | {ours} | {reference} | {case.ratio:.2f} | {case.limit:.2f} | "
        f"{mark} |\n"
    )


def _number(value: float, unit: str) -> str:
    if unit == "MB":
        return f"{value:.0f} MB" if value >= 10 else f"{value:.1f} MB"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _seconds(found: Found, names: Sequence[str]) -> str:
    if not names:
        return ""
    text = _table(_SECONDS, names, found.seconds)
    return text + _table(_CPU, names, found.cpu_seconds)


def _table(
    head: str, names: Sequence[str], values: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
    """Return a table of the medians: a line for each race, a column for each contestant."""
    text = head.format(heads=" | ".join(NAMES[n] for n in names), dashes="--:|" * len(names))
    for race, (called, _) in RACES.items():
        by = values.get(race) or {}
        cells = [_number(median(by[name]), "s") if name in by else "" for name in names]
        if any(cells):
            text += f"| {called} | {' | '.join(cells)} |\n"
    return text


def _how(found: Found) -> str:
    starts = ", ".join(f"{_number(s, 's')} of {NAMES[n]}" for n, s in found.starts.items())
    waits = " and ".join(_number(case.ours, "s") for case in found.beside)
    said = _HOW.format(
        waits=f"; whoever asks for such a run waits {waits}" if waits else "",
        starts=f": {starts}" if starts else "",
    )
    return "\n" + "\n".join(wrap(said.strip(), _WIDTH, break_on_hyphens=False)) + "\n"


def _over_tls(found: Found) -> str:
    cases = [case for case in found.cases if case.case in OVER_TLS]
    if not cases:
        return ""
    text = _TLS.format(tls=found.servers["postgres_tls"])
    for case in cases:
        spent = {name: median(each) for name, each in found.cpu_seconds[case.case].items()}
        more = spent["syncward_tls"] / spent["syncward"] - 1
        text += (
            f"| {OVER_TLS[case.case]} | {_number(case.ours, 's')} | "
            f"{_number(case.reference, 's')} | {(case.ratio - 1) * 100:+.0f} % | "
            f"{more * 100:+.0f} % |\n"
        )
    return text


def _written(found: Found) -> str:
    if not found.written:
        return ""
    heads = " | ".join(NAMES[one.contestant] for one in found.written)
    text = _WRITTEN.format(heads=heads, dashes="---|" * len(found.written))
    text += f"| rows | {' | '.join(map(_rows, found.written))} |\n"
    keys = (f"`{one.key}`" if one.key else "**none**" for one in found.written)
    text += f"| primary key | {' | '.join(keys)} |\n"
    for columns in zip(*(one.columns for one in found.written), strict=True):
        first = columns[0]
        text += f"| `{first.name}` {first.type} | {' | '.join(map(_column, columns))} |\n"
    return text


def _rows(one: Written) -> str:
    if one.rows_missing or one.rows_extra:
        return f"**{one.rows_missing:,} missing, {one.rows_extra:,} too many**"
    return "all"


def _column(column: Column) -> str:
    """Say what became of a column, shortly."""
    if column.type_there is None:
        return "**not there**"
    said = [] if column.type_there == column.type else [f"now {column.type_there}"]
    said += ["NULL allowed"] if column.null_allowed else []
    said += [f"**{column.differs:,} rows differ**"] if column.differs else []
    return ", ".join(said) or "exact"


def _left_out(found: Found) -> str:
    return "".join(f"\nLeft out: {why}.\n" for why in found.left_out.values())


def _picture(found: Found, names: Sequence[str]) -> str:
    groups = []
    for race, (called, _) in RACES.items():
        by = found.seconds.get(race) or {}
        bars = [Bar(NAMES[name], median(by[name]), name) for name in names if name in by]
        if bars:
            groups.append((called, bars))
    return draw(groups)
