"""What every benchmark prints: the machine, the command, and cases of ours beside a reference."""

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
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

    @property
    def ratio(self) -> float:
        return round(self.ours / self.reference, 3)


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
        "cases": [
            {
                **asdict(case),
                "ours": round(case.ours, 3),
                "reference": round(case.reference, 3),
                "ratio": case.ratio,
            }
            for case in cases
        ],
    }


def show(found: dict[str, object], cases: list[Case], *, as_json: bool) -> None:
    """Print the document, or a table for people."""
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['machine']}\n{found['command']}, {found['date']}\n")
    print(f"{'CASE':<24}{'OURS':>10}{'REFERENCE':>12}  {'UNIT':<22}{'RATIO':>7}")
    for case in cases:
        print(
            f"{case.case:<24}{case.ours:>10.2f}{case.reference:>12.2f}  {case.unit:<22}"
            f"{case.ratio:>7.2f}"
        )


def _machine() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((ln.split(":")[1].strip() for ln in info.splitlines() if "model name" in ln), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPUs ({model}), {memory:.0f} GiB, Linux {platform.release()}"


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else Path(sys.argv[0]).name
