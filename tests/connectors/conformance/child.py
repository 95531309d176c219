"""`python -m tests.connectors.conformance.child`: one sync in a process of its own.

What to do comes as JSON on standard input; how much memory it took goes to standard output.
"""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

from schemas.records import WireFormat
from schemas.streams import StreamSpec
from tests.connectors.conformance.conftest import Engine


def status(name: str) -> int:
    """Bytes of a line of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def main() -> None:
    order = json.load(sys.stdin)
    ends = {role: SimpleNamespace(**order[role]) for role in ("source", "destination")}
    engine = Engine(
        ends["source"], ends["destination"], Path(order["root"]), UUID(order["connection"]),
        order["fence"],
    )  # fmt: skip
    wire = order["wire"] and WireFormat(order["wire"])
    parts = 0

    def step(name: str) -> None:
        nonlocal parts
        parts += name == order["kill_at"]
        if parts == order["kill_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    *first, last = (StreamSpec.model_validate(spec) for spec in order["specs"])
    for spec in first:  # so that everything is imported before memory is measured
        engine.sync(spec, wire=wire)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = engine.sync(last, wire=wire, step=step)
    print(json.dumps({"rows": result.rows_loaded, "grown": status("VmHWM") - before}))  # noqa: T201


if __name__ == "__main__":
    main()
