"""An API into Postgres: this engine beside dlt's REST source and a Singer tap, in one run.

python -m benchmarks.rest [--quick] [--json] [--rows N] [--rounds N] [--rivals dlt,singer|none]
                          [--cache DIR] [--write]

All of them ask the same server (rest_server.py) for the same pages. Rivals are installed from the
package registry the first time; their locks are in locks/.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import orjson

from benchmarks import rest_page
from benchmarks.lab import HERE, Lab, Usage, measured
from benchmarks.report import Case, document, show
from benchmarks.rest_server import ceiling, record
from benchmarks.rest_written import TRUTH, Written, compare, make_truth
from benchmarks.rivals import CACHE, NotToBeHad, installed, private, versions
from cli.apply import make_so
from storage import accounts

PAGE_SIZE = 1_000
#: Rows that a core of the worker lands in a second, at least; see `landing`.
FLOOR = 50_000
#: Ours takes at most half of the time of a rival.
LIMITS = {"vs_dlt": 0.5, "vs_singer": 0.5, "landing": 1.0}
RIVALS = {"dlt": ("dlt",), "singer": ("singer_tap", "singer_target")}

_MANIFEST = """
version: "1"
name: crm
url_base: "{{ config.base_url }}"
parameters: {base_url: {help: "(where the server of the benchmark listens)"}}
check: {stream_names: [customers]}
streams:
  customers:
    path: /customers
    record_selector: {field_path: data}
    primary_key: [id]
    paginator:
      type: CursorPagination
      cursor_value: paging.after
      page_token_option: {field_name: after}
    schema:
      id: integer
      email: string
      name: string
      balance: number
      orders: integer
      active: boolean
      created_at: timestamp
      updated_at: timestamp
      birthday: date
      note: string
      address: object
"""


class Contestant(Protocol):
    """A way to bring all customers into a table."""

    name: str
    table: str

    def load(self) -> Usage:
        """Load everything into a table that is not there."""
        ...


class ApiLab(Lab):
    """A destination, our processes, and the server of the API; the other Postgres idles."""

    def __init__(self, root: Path, rows: int) -> None:
        super().__init__(root)
        self.rows = rows
        self._server = subprocess.Popen(
            [sys.executable, HERE / "rest_server.py", str(rows), str(PAGE_SIZE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._server.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._server.stdout.readline())}"

    def begin(self) -> None:
        """Apply the document and start the processes."""
        with self.cli.transaction() as tx:
            accounts.create(tx, "bench", company="", plan="unlimited", principal=self.cli.principal)
        (self.root / "crm.yaml").write_text(_MANIFEST, encoding="utf-8")
        self.login(self.destination, "lake")
        lake = self.destination
        (self.root / "bench.yaml").write_text(
            "account: bench\nresources:\n"
            f"  crm: {{kind: rest, config: {{manifest: {self.root}/crm.yaml, "
            f'parameters: {{base_url: "{self.url}"}}}}}}\n'
            f"  lake: {{kind: postgres, config: {{host: {lake.host}, port: {lake.port}, "
            "sslmode: disable, database: postgres, user: lake}, "
            "secret: {password: {file: lake.pw}}}\n"
            "connections:\n"
            "  crm-to-lake: {source: crm, destination: lake, schedule: manual, "
            "target: {schema: ours}, "
            "streams: {crm.customers: {mode: replace, key: [id]}}}\n",
            encoding="utf-8",
        )
        make_so(self.cli, self.root / "bench.yaml", write=True)
        self._thread.start()

    def close(self) -> None:
        """Stop all that was started."""
        with self._server:  # its input ends
            if self._server.stdin:
                self._server.stdin.close()
        super().close()


class Ours:
    """This engine, asked as an operator asks."""

    name, table = "syncward", "ours.customers"

    def __init__(self, made: ApiLab) -> None:
        self._made = made

    def load(self) -> Usage:
        made = self._made
        made.act(made.destination, "DROP SCHEMA IF EXISTS ours CASCADE")
        made.act(made.destination, "DROP SCHEMA IF EXISTS _syncward CASCADE")
        return made.run("crm-to-lake")[2]


class Dlt:
    """dlt_rest.py: CSV into COPY."""

    name, table = "dlt", "dlt_customers.customers"

    def __init__(self, made: ApiLab, cache: Path) -> None:
        self._made = made
        self._python = installed("dlt", cache) / "bin" / "python"
        self._home = made.root / "dlt"
        (self._home / ".dlt").mkdir(mode=0o700, parents=True)
        lake = made.destination
        lines = [
            "[destination.postgres.credentials]",
            'drivername = "postgresql"',
            f'host = "{lake.host}"',
            f"port = {lake.port}",
            'database = "postgres"',
            'username = "lake"',
            f'password = "{made.login(lake, "lake").read_text(encoding="utf-8")}"',
        ]
        private(self._home / ".dlt" / "secrets.toml", "\n".join(lines))
        (self._home / ".dlt" / "config.toml").write_text(
            "[runtime]\ndlthub_telemetry = false\n[data_writer]\ndisable_compression = true\n",
            encoding="utf-8",
        )

    def load(self) -> Usage:
        for schema in ("dlt_customers", "dlt_customers_staging"):
            self._made.act(self._made.destination, f"DROP SCHEMA IF EXISTS {schema} CASCADE")
        shutil.rmtree(self._home / "pipelines", ignore_errors=True)
        return measured(
            [self._python, HERE / "dlt_rest.py", "dlt_customers", self._made.url],
            log=self._home / "log",
            environment={"PATH": os.defpath, "HOME": str(self._home)},
            directory=self._home,
        )


class Singer:
    """`tap-rest-api-msdk | target-postgres`, with COPY and the schema given."""

    name, table = "singer", "singer.customers"

    def __init__(self, made: ApiLab, cache: Path) -> None:
        self._made = made
        self._tap = installed("singer_tap", cache) / "bin" / "tap-rest-api-msdk"
        self._target = installed("singer_target", cache) / "bin" / "target-postgres"
        self._home = made.root / "singer"
        self._home.mkdir(mode=0o700)
        lake = made.destination
        private(self._home / "tap.json", orjson.dumps(self._asks()).decode())
        loads = {
            "host": lake.host,
            "port": lake.port,
            "user": "lake",
            "database": "postgres",
            "password": made.login(lake, "lake").read_text(encoding="utf-8"),
            "default_target_schema": "singer",
            "use_copy": True,
            "add_record_metadata": False,
            "activate_version": False,
        }
        private(self._home / "target.json", orjson.dumps(loads).decode())

    def _asks(self) -> dict[str, object]:
        return {
            "api_url": self._made.url,
            "pagination_request_style": "jsonpath_paginator",
            "pagination_response_style": "default",
            "next_page_token_path": "$.paging.after",
            "pagination_next_page_param": "after",
            "streams": [
                {
                    "name": "customers",
                    "path": "/customers",
                    "primary_keys": ["id"],
                    "records_path": "$.data[*]",
                    "schema": {"type": "object", "properties": _json_schema()},
                }
            ],
        }

    def load(self) -> Usage:
        self._made.act(self._made.destination, "DROP SCHEMA IF EXISTS singer CASCADE")
        return measured(
            [self._tap, "--config", self._home / "tap.json"],
            [self._target, "--config", self._home / "target.json"],
            log=self._home / "log",
            environment={"PATH": os.defpath, "HOME": str(self._home)},
            directory=self._home,
        )


def _json_schema() -> dict[str, object]:
    """Say what a customer is, as a tap says it."""
    times = {"type": ["string", "null"], "format": "date-time"}
    known: dict[str, object] = {
        "id": {"type": ["integer"]},
        "created_at": times,
        "updated_at": times,
        "birthday": {"type": ["string", "null"], "format": "date"},
        "address": {"type": ["object", "null"]},
        "active": {"type": ["boolean", "null"]},
        "balance": {"type": ["number", "null"]},
        "orders": {"type": ["integer", "null"]},
    }
    return {name: known.get(name, {"type": ["string", "null"]}) for name in record(1)}


# ── the race ─────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Found:
    """What came out."""

    rows: int
    rounds: int
    usages: dict[str, list[Usage]] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    postgres: str = ""
    server: list[float] = field(default_factory=list)  # records/s that it sends a plain client

    def middle(self, name: str, of: Callable[[Usage], float]) -> float:
        return median(of(usage) for usage in self.usages[name])

    def cases(self) -> list[Case]:
        """Compare what was measured: seconds, and processor seconds of the worker."""
        ours = self.middle("syncward", lambda usage: usage.seconds)
        made = [
            Case(f"vs_{name}", ours, self.middle(name, lambda usage: usage.seconds),
                 f"s per {self.rows:,} records", LIMITS[f"vs_{name}"])
            for name in RIVALS if self.usages.get(name)
        ]  # fmt: skip
        cpu = self.middle("syncward", lambda usage: usage.cpu_seconds)
        budget = self.rows / FLOOR
        unit = f"CPU s per {self.rows:,} records"
        return [*made, Case("landing", cpu, budget, unit, LIMITS["landing"])]


def race(rows: int, rounds: int, rivals: Sequence[str], cache: Path) -> Found:
    """Let every contestant load all records, in turn; what fails of a rival is left out."""
    found = Found(rows, rounds)
    with tempfile.TemporaryDirectory(prefix="syncward-bench-") as directory:
        made = ApiLab(Path(directory), rows)
        try:
            made.begin()
            found.postgres = str(made.one(made.destination, "SHOW server_version")[0])
            make_truth(made, rows)
            contestants = _contestants(made, rivals, cache, found)
            for number in range(rounds):
                found.server.append(ceiling(made.url, rows, PAGE_SIZE))
                for one in contestants if number % 2 == 0 else reversed(contestants):
                    if one.name not in found.left_out:
                        _load(made, one, found, number + 1)
            there = [one for one in contestants if found.usages.get(one.name)]
            found.written = [compare(made, one.name, one.table) for one in there]
        finally:
            made.close()
    return found


def _contestants(
    made: ApiLab, rivals: Sequence[str], cache: Path, found: Found
) -> list[Contestant]:
    contestants: list[Contestant] = [Ours(made)]
    for kind in (Dlt, Singer):
        if kind.name in rivals:
            try:
                contestants.append(kind(made, cache))
            except NotToBeHad as why:
                found.left_out[kind.name] = str(why)
    return contestants


def _load(made: ApiLab, one: Contestant, found: Found, number: int) -> None:
    """Measure a load; the time of one that did not bring every record does not count."""
    made.settle()
    try:
        usage = one.load()
        count, total = made.one(
            made.destination, f"SELECT count(*), sum(orders::bigint) FROM {one.table}"
        )
        if (count, total) != made.one(
            made.destination, f"SELECT count(*), sum(orders) FROM {TRUTH}"
        ):
            raise RuntimeError(f"{one.name} has loaded {count} of {made.rows} records")  # noqa: TRY301 - one place tells it
    except RuntimeError as why:
        if one.name == Ours.name:
            raise
        found.left_out[one.name] = str(why)
        print(f"{one.name} is left out: {why}", file=sys.stderr, flush=True)
        return
    found.usages.setdefault(one.name, []).append(usage)
    print(
        f"{number}: {one.name} {usage.seconds:.2f} s, {usage.cpu_seconds:.2f} CPU s",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,000 records, once")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--rows", type=int, help="records of the API (100,000)")
    parser.add_argument("--rounds", type=int, help="of the race (3)")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="or none")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where rivals are kept")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-rest.md")
    arguments = parser.parse_args()
    rivals = () if arguments.rivals == "none" else tuple(arguments.rivals.split(","))
    if unknown := set(rivals) - RIVALS.keys():
        parser.error(f"no such rival: {', '.join(sorted(unknown))}")
    rows, rounds = (20_000, 1) if arguments.quick else (100_000, 3)
    load = round(os.getloadavg()[1], 1)
    found = race(arguments.rows or rows, arguments.rounds or rounds, rivals, arguments.cache)
    names = [lock for rival in rivals for lock in RIVALS[rival]]
    pinned = {name: number for lock in names for name, number in versions(lock).items()}
    made = document(found.cases(), postgres=found.postgres, **pinned)
    made |= {
        "rows": found.rows,
        "rounds": found.rounds,
        "page_size": PAGE_SIZE,
        "load_before": load,
        "server_rows_per_second": round(median(found.server)),
        "seconds": {n: [round(u.seconds, 3) for u in us] for n, us in found.usages.items()},
        "cpu_seconds": {n: [round(u.cpu_seconds, 2) for u in us] for n, us in found.usages.items()},
        "memory_mb": {n: round(max(u.memory_mb for u in us)) for n, us in found.usages.items()},
        "written": [written.plain() for written in found.written],
        "left_out": found.left_out,
    }
    show(made, found.cases(), as_json=arguments.json)
    if arguments.write:
        rest_page.write(made, found.cases(), found.written)
    if any(one.contestant == Ours.name and not one.exact for one in found.written):
        sys.exit("what this engine wrote is not what the API holds")


if __name__ == "__main__":
    main()
