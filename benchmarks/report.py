"""What every benchmark prints: the machine, the command, and cases of ours beside a reference."""

import json
import os
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Case:
    """Cost against the reference: lower is better, 1.0 equals it (or uses up the budget)."""

    case: str
    ours: float
    reference: float
    unit: str
    limit: float | None = None  # the ratio that was promised

    @property
    def ratio(self) -> float:
        return round(self.ours / self.reference, 3)

    @property
    def met(self) -> bool | None:
        """Whether the promise is kept; None where nothing was promised."""
        return None if self.limit is None else self.ratio <= self.limit

    @property
    def mark(self) -> str:
        """Say it for people."""
        return {None: "", True: "met", False: "MISSED"}[self.met]

    def plain(self) -> dict[str, object]:
        """Return the case as the JSON document has it."""
        promised = {"limit": self.limit, "met": self.met} if self.limit is not None else {}
        return {
            "case": self.case,
            "ours": round(self.ours, 3),
            "reference": round(self.reference, 3),
            "unit": self.unit,
            "ratio": self.ratio,
            **promised,
        }


def document(cases: list[Case], **versions: str) -> dict[str, object]:
    """Return the one JSON document of a benchmark."""
    return {
        "machine": _machine(),
        "versions": {
            "syncward": version("syncward"),
            "python": platform.python_version(),
            "psycopg": version("psycopg"),
            **versions,
        },
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "cases": [case.plain() for case in cases],
    }


def show(found: dict[str, object], cases: list[Case], *, as_json: bool) -> None:
    """Print the document, or a table for people, and what stands beside it under each other."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['machine']}\n{found['command']}, {found['date']}\n")
    heads = ("OURS", "REFERENCE", "RATIO")
    print(f"{'CASE':<28}{heads[0]:>10}{heads[1]:>12}{heads[2]:>8}  {'UNIT':<26}{'LIMIT':>6}")
    for case in cases:
        limit = "" if case.limit is None else f"{case.limit:.3g}"
        print(
            f"{case.case:<28}{case.ours:>10.2f}{case.reference:>12.2f}{case.ratio:>8.2f}  "
            f"{case.unit:<26}{limit:>6}  {case.mark}".rstrip()
        )
    beside = found.get("beside")
    if isinstance(beside, dict) and beside:
        print("\n" + "\n".join(f"{name.replace('_', ' ')}: {v}" for name, v in beside.items()))


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((ln.split(":")[1].strip() for ln in info.splitlines() if "model name" in ln), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPUs ({model}), {memory:.0f} GiB, Linux {platform.release()}"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
