"""How things look on a terminal of 80 columns or more, in a pipe, and as JSON."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from schemas.guards import Finding
from schemas.records import Cursor, StreamResult
from schemas.runs import Explanation, Run, RunKind, RunState

#: Characters of a name that a table shows at least.
_NAME_MIN = 10

#: Terminals are taken to have so many columns at least; a line of a pipe has no end.
_NARROW = 80
_UNCUT = 1_000_000

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def jsonable(value: object) -> object:  # noqa: PLR0911 - one return per type reads as a table
    """Turn our types into what `json.dumps` takes."""
    match value:
        case BaseModel():
            return value.model_dump(mode="json")
        case _ if is_dataclass(value) and not isinstance(value, type):
            return jsonable(asdict(value))
        case dict():
            return {str(k): jsonable(v) for k, v in value.items()}
        case list() | tuple():
            return [jsonable(v) for v in value]
        case Enum():
            return value.value
        case UUID():
            return str(value)
        case datetime():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case bytes():
            return value.hex()
        case _:
            return value


def plain(text: object) -> str:
    """Return text without control characters: data must not drive a terminal."""
    return _CONTROL.sub("?", str(text))


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    width: int | None = None,
    names: int = 0,
    optional: Sequence[int] = (),
) -> str:
    """Align columns, as wide as whoever reads them allows unless `width` says otherwise.

    Where a line would not fit, the columns of `optional` are left out, the last one first, and then
    the column of `names` is shortened.
    """
    if not rows:
        return "(none)"
    width = width or _room()
    cells = [[plain("" if c is None else c) for c in row] for row in rows]
    lines = _fitting([list(headers), *cells], width, names, optional)
    sizes = _sizes(lines)
    excess = sum(sizes) + 2 * (len(sizes) - 1) - width
    sizes[names] = max(sizes[names] - max(excess, 0), min(sizes[names], _NAME_MIN))
    for line in lines:
        line[names] = shortened(line[names], sizes[names])
    text = [
        "  ".join(c.ljust(n) for c, n in zip(line, sizes, strict=True)).rstrip() for line in lines
    ]
    return "\n".join(line if len(line) <= width else line[: width - 1] + "…" for line in text)


def _sizes(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]


def _fitting(
    lines: list[list[str]], width: int, names: int, optional: Sequence[int]
) -> list[list[str]]:
    """Leave out optional columns that there is no room for, however short names are made."""
    for column in reversed(optional):
        sizes = _sizes(lines)
        least = sum(sizes) + 2 * (len(sizes) - 1) - sizes[names] + min(sizes[names], _NAME_MIN)
        if least <= width:
            break
        lines = [line[:column] + line[column + 1 :] for line in lines]
    return lines


def _room() -> int:
    """Return how long lines may be: what is piped to a program or a file is not cut."""
    return max(shutil.get_terminal_size((_UNCUT, 0)).columns, _NARROW)


def shortened(text: str, size: int) -> str:
    """Cut a name in its middle: its beginning and its end tell it from others."""
    if len(text) <= size:
        return text
    tail = (size - 1) // 2
    return f"{text[: size - 1 - tail]}…{text[len(text) - tail :]}"


def short(number: float) -> str:
    """Say a large number in a few characters."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def ago(moment: datetime | None) -> str:
    """Say how long ago, or in how long, in one unit."""
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - moment).total_seconds()
    size = abs(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if size >= length:
            text = f"{int(size // length)}{unit}"
            break
    else:
        text = f"{int(size)}s"
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def call_table(calls: Sequence[Mapping[str, Any]]) -> str:
    """Show calls over HTTP; one that ended in an error shows its code instead of its status."""
    return table(
        ("AT", "TRY", "STATUS", "MS", "SENT", "GOT", "CALL"),
        [
            (
                f"{c['at']:%H:%M:%S}", c["attempt"], c["error"] or c["status"], c["milliseconds"],
                short(c["request_bytes"]), short(c["response_bytes"]),
                f"{c['method']} {c['host']}{c['route']}",
            )
            for c in calls
        ],
        names=6,
    )  # fmt: skip


def cursor_text(cursor: Cursor | None) -> str | None:
    """Show a cursor by its value."""
    return None if cursor is None else cursor.get("value", str(cursor))


def stream_document(result: StreamResult) -> dict[str, object]:
    """Return the documented keys of one stream's result."""
    keys = (
        *("stream", "state", "mode", "rows_extracted", "rows_loaded", "rows_inserted"),
        *("rows_updated", "rows_unchanged", "rows_deleted", "rows_rejected", "bytes"),
    )
    return {
        **{key: getattr(result, key) for key in keys},
        "cursor_from": cursor_text(result.cursor_from),
        "cursor_to": cursor_text(result.cursor_to),
        "seconds": round(result.seconds, 3),
    }


def run_document(run: Run, results: Sequence[StreamResult]) -> dict[str, object]:
    """Return the document of `run enqueue --wait --json`."""
    return {
        "run_id": str(run.run_id),
        "connection": run.subject_name,
        "state": run.state.value,
        "attempt": run.attempt,
        "streams": [stream_document(result) for result in results],
        "error": said_of(run, run.error),
    }


def stream_table(results: Sequence[StreamResult]) -> str:
    """Show what each stream of a run did."""
    rejected = any(r.rows_rejected for r in results)
    return table(
        ("STREAM", "STATE", "MODE", "READ", "INS", "UPD", "SAME", "DEL",
         *(("REJ",) if rejected else ()), "SEC"),
        [
            (
                r.stream,
                r.state,
                r.mode,
                f"{r.rows_extracted:,}",
                f"{r.rows_inserted:,}",
                f"{r.rows_updated:,}",
                f"{r.rows_unchanged:,}",
                f"{r.rows_deleted:,}",
                *((f"{r.rows_rejected:,}",) if rejected else ()),
                f"{r.seconds:.2f}",
            )
            for r in results
        ],
    )  # fmt: skip


def run_table(runs: Sequence[Run]) -> str:
    """Show runs, one a line."""
    return table(
        ("RUN", "SUBJECT", "STATE", "ASKED", "KIND", "ERROR", "TRY"),
        [
            (r.run_id, r.subject_name, r.state, ago(r.queued_at), r.kind, r.error_code, r.attempt)
            for r in runs
        ],
        names=1,
        optional=(4, 5, 6),
    )


def explanation_text(
    why: Explanation, findings: Sequence[Finding] = (), error: str | None = None
) -> str:
    """Show what holds a run back, and the error that it ended with or is tried again after."""
    lines = [
        f"run         {why.run_id}",
        f"state       {why.state}",
        f"rule        {why.rule}",
        f"because     {plain(why.sentence)}",
    ]
    if error:
        lines.append(f"error       {plain(error)}")
    if why.ahead:
        lines.append(f"ahead       {why.ahead} {'run' if why.ahead == 1 else 'runs'}")
    if why.expected_start:
        lines.append(f"expected    {ago(why.expected_start)}")
    return "\n".join([*lines, *findings_text(why.run_id, findings)])


def findings_text(run_id: UUID, findings: Sequence[Finding]) -> list[str]:
    """Preview what guards found, in counts; the keys are data, and sealed."""
    if not findings:
        return []
    lines = []
    for found in findings:
        counts = [
            f"{name} {number:,}"
            for name, number in (
                ("served", found.before),
                ("at the source", found.after),
                ("to delete", found.to_delete),
            )
            if number is not None
        ]
        said = ", ".join(counts) or plain(found.what) or f"{found.amount:,}"
        lines.append(f"{'found':<12}{found.guard}, {plain(found.stream)}: {said}")
    lines.append(
        f"decide      syncward run output {run_id} shows keys; then run approve, or run reject"
    )
    return lines


def _rejected_text(rejected: Sequence[Mapping[str, Any]]) -> list[str]:
    """Show how many rows of each stream were rejected, and the keys of a few."""
    lines = []
    for found in rejected:
        lines.append(f"{plain(found['stream'])}: {found['rows']:,} rows rejected")
        lines += [f"  {plain(row['key'])}  {plain(row['reason'])}" for row in found["sample"]]
    return lines


def output_text(results: Sequence[StreamResult], document: Mapping[str, object]) -> str:
    """Show what a run's streams did, and what guards found with a few keys of what would go."""
    rejected = document.get("rejected")
    if isinstance(rejected, list):
        return "\n".join([stream_table(results), "", *_rejected_text(rejected)])
    previews = document.get("guards")
    if not isinstance(previews, list):
        return stream_table(results) if results else str(jsonable(document))
    lines = [stream_table(results), ""] if results else []
    for preview in previews:
        lines.append(f"{preview['guard']}: {plain(preview['sentence'])}")
        lines += [f"  key {plain(key)}" for key in preview["sample_keys"]]
    return "\n".join(lines)


def window_text(run: Run, results: Sequence[StreamResult]) -> list[str]:
    """Say which rows a backfill has read."""
    if run.kind is not RunKind.BACKFILL:
        return []
    return [
        f"window      {plain(r.cursor_from.get('column', ''))} from "
        f"{plain(cursor_text(r.cursor_from))} to below {plain(cursor_text(r.cursor_to))}"
        for r in results
        if r.cursor_from is not None
    ]


def run_text(run: Run, results: Sequence[StreamResult]) -> str:
    """Show one run in full."""
    lines = [
        f"run         {run.run_id}",
        f"{'connection' if run.kind.of_connection else 'resource':<12}{run.subject_name}",
        f"state       {run.state} ({run.kind}, attempt {run.attempt}, {run.trigger})",
        f"asked       {ago(run.queued_at)}, started {ago(run.started_at)}",
    ]
    if run.finished_at is not None:
        lines.append(f"ended       {ago(run.finished_at)}")
    lines += window_text(run, results)
    if run.error:
        label = "because" if run.state is RunState.AWAITING_APPROVAL else "error"
        lines.append(f"{label:<12}{plain(said_of(run, run.error))}")
    lines += findings_text(run.run_id, run.findings)
    if run.run_again:
        lines.append("then        runs again: asked for while it was running")
    if results:
        lines += ["", stream_table(results)]
    failed = [r for r in results if r.state != "succeeded" and r.error]
    if len(failed) > 1:  # the run's error is the first one's
        lines.append("")
        lines += [f"{plain(r.stream)}: {plain(said_of(run, _alone(r)))}" for r in failed]
    return "\n".join(lines)


def _alone(result: StreamResult) -> str:
    return (result.error or "").removeprefix(f"{result.stream}: ")


def said_of(run: Run, text: str | None) -> str | None:
    """Complete the commands that an error says: connectors do not know the connection's name."""
    return text and re.sub(r"(?<=enqueue |.accept )CONNECTION\b", run.subject_name, text)
