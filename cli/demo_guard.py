"""The demo's source loses 90 % of a table: the run awaits approval, the old rows stay served."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from cli.context import Cli
from embedded.postgres import Cluster
from schemas.runs import FINAL_STATES, Run, RunKind, RunOptions, RunState
from storage import connections, runs

#: Calls until the answer is not None; fails with these words after a while.
Until = Callable[[Callable[[], Run | None], str], Run]

ROWS, KEPT = 5_000, 500
_CONNECTION = "prices-to-lake"


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the run with the lost rows ended, and what the destination serves."""

    run: Run
    served_before: int
    served_then: int
    rejected: Run

    @property
    def held(self) -> bool:
        """Whether the guard kept the old rows, and said how many would have gone."""
        found = [f.to_delete for f in self.run.findings]
        return (
            self.run.state is RunState.AWAITING_APPROVAL
            and found == [ROWS - KEPT]
            and self.served_before == self.served_then == ROWS
            and self.rejected.error_code == "rejected"
        )


def document(path: Path) -> Path:
    """Write beside the demo's document one more connection over the same two databases."""
    text = path.read_text(encoding="utf-8").split("connections:")[0]
    text += (
        f"connections:\n  {_CONNECTION}:\n    source: shop\n    destination: lake\n"
        "    schedule: manual\n    target: {schema: prices}\n"
        "    streams:\n      public.prices: {mode: replace}\n"
    )
    beside = path.with_name("prices.yaml")
    beside.write_text(text, encoding="utf-8")
    return beside


def fill(cluster: Cluster) -> None:
    """Make the table at the source, readable for the login that is there."""
    with _session(cluster, "shop") as db:
        db.execute("CREATE TABLE prices (id int PRIMARY KEY, cents int NOT NULL)")
        db.execute("INSERT INTO prices SELECT g, g FROM generate_series(1, %s) g", (ROWS,))
        db.execute("GRANT SELECT ON prices TO reader")


def lose_and_run(cluster: Cluster, cli: Cli, until: Until) -> Verdict:
    """Load the table, lose most of it, run again, look at what is served, reject the run."""
    _run(cli, until)
    before = _served(cluster)
    with _session(cluster, "shop") as db:
        db.execute("DELETE FROM prices WHERE id > %s", (KEPT,))
    stopped = _run(cli, until)
    then = _served(cluster)
    with cli.inside() as (tx, _, _name):
        if stopped.state is RunState.AWAITING_APPROVAL:
            runs.reject(tx, stopped.run_id, cli.principal)
        rejected = runs.get(tx, stopped.run_id)
    return Verdict(stopped, before, then, rejected)


def _run(cli: Cli, until: Until) -> Run:
    with cli.inside() as (tx, _, _name):
        found = connections.get(tx, _CONNECTION)
        asked = runs.enqueue(
            tx, connections.subject(found), RunKind.SYNC, RunOptions(), cli.principal
        )

    def ended() -> Run | None:
        with cli.inside() as (tx, _, _name):
            run = runs.get(tx, asked.run_id)
        decided = run.state in FINAL_STATES or run.state is RunState.AWAITING_APPROVAL
        return run if decided else None

    return until(ended, "a run of the prices")


def _served(cluster: Cluster) -> int:
    with _session(cluster, "lake") as db:
        row = db.execute("SELECT count(*) FROM prices.prices").fetchone()
    return int(row[0]) if row else 0


@contextmanager
def _session(cluster: Cluster, database: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with psycopg.connect(
        host=cluster.host,
        port=cluster.port,
        dbname=database,
        user=cluster.superuser,
        password=cluster.password,
        autocommit=True,
    ) as connection:
        yield connection
