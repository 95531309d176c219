"""Writes docs/benchmarks-rest.md from one run of benchmarks.rest."""

from collections.abc import Mapping, Sequence
from statistics import median
from textwrap import wrap
from typing import Any

from benchmarks.page import DOCS
from benchmarks.report import Case
from benchmarks.rest_written import TYPES, Column, Written

NAMES = {
    "syncward": "Syncward",
    "dlt": "dlt (`rest_api`)",
    "singer": "Singer (tap and target)",
}
_WIDTH = 98
_INTRO = """\
# Benchmarks: an API into Postgres

<!-- Written by `python -m benchmarks.rest --write`; do not edit. -->

One API on loopback, all of its records into a new table, by this engine, by dlt's REST source and
by a Singer tap and target, in turn in one run on one machine. Lower is better everywhere. A record
has ten fields and a document. The pages of {page_size:,} records are written before anybody asks:
to a client that does nothing with them the API sends {server_rows_per_second:,} records a second.
How the others are set up is in `benchmarks/rest.py`.

{versions}
`{command}`, {date}, {rows:,} records, {rounds}. Load of
the machine before it: {load_before}.

## What was promised

`landing` is processor time of our worker, against 50,000 records a second of a core.

| Case | Ours | Other's | Ratio | Promise | |
|---|--:|--:|--:|--:|---|
"""
_MEASURED = """
## What was measured

Time until whoever asked has the rows; processor time and memory (PSS) of the client's processes.

| | Each round | CPU, median | Memory, most | Records a second |
|---|---|--:|--:|--:|
"""
_WRITTEN = """
## What was written

Rows that differ from the API's records, each column compared as what it is. In brackets the
column's type where it is another one.

| Column | {heads} |
|---|{lines}|
"""


def write(made: Mapping[str, object], cases: Sequence[Case], written: Sequence[Written]) -> None:
    """Write the page; `made` is the document that --json prints."""
    (DOCS / "benchmarks-rest.md").write_text(page(made, cases, written), encoding="utf-8")


def page(made: Mapping[str, object], cases: Sequence[Case], written: Sequence[Written]) -> str:
    """Return the page."""
    versions, rounds = _of(made, "versions"), made["rounds"]
    said = f"{made['machine']}; " + ", ".join(f"{n} {v}" for n, v in versions.items()) + "."
    text = _INTRO.format(
        **{
            n: made[n]
            for n in (
                "page_size",
                "server_rows_per_second",
                "command",
                "date",
                "rows",
                "load_before",
            )
        },
        versions="\n".join(wrap(said, _WIDTH)),
        rounds="once" if rounds == 1 else f"medians of {rounds}",
    )
    for case in cases:
        mark = "met" if case.met else "**missed**"
        text += (
            f"| `{case.case}`, {case.unit} | {case.ours:.2f} | {case.reference:.2f} | "
            f"{case.ratio:.2f} | {case.limit:.2f} | {mark} |\n"
        )
    text += _MEASURED
    seconds, cpu, memory = (_of(made, name) for name in ("seconds", "cpu_seconds", "memory_mb"))
    for name, times in seconds.items():
        rows = int(str(made["rows"])) / median(times)
        text += (
            f"| {NAMES[name]} | {', '.join(f'{t:.2f}' for t in times)} s | "
            f"{median(cpu[name]):.2f} s | {memory[name]} MB | "
            f"{rows:,.0f} |\n"
        )
    text += _WRITTEN.format(
        heads=" | ".join(NAMES[one.contestant] for one in written),
        lines="|".join("---" for _ in written),
    )
    for number, (name, type_) in enumerate(TYPES.items()):
        found = [one.columns[number] for one in written]
        text += f"| `{name}` {type_} | " + " | ".join(_became(c, type_) for c in found) + " |\n"
    lost = [f"{NAMES[w.contestant]} {w.rows_missing:,}" for w in written if w.rows_missing]
    if lost:
        text += f"\nRecords that are missing: {', '.join(lost)}.\n"
    left_out = _of(made, "left_out")
    if left_out:
        text += f"\nLeft out: {'; '.join(map(str, left_out.values()))}.\n"
    return text


def _became(column: Column, type_: str) -> str:
    there, differs = column.type_there, column.differs
    if there is None:
        return "not there"
    other = "" if there == type_ else f" ({there})"
    return f"{differs:,}{other}" if differs else f"exact{other}"


def _of(made: Mapping[str, object], name: str) -> dict[str, Any]:
    found = made[name]
    assert isinstance(found, dict)
    return found
