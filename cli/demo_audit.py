"""The demo's superuser rewrites an event of the audit log, hash and all, and puts it back."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql
from sqlalchemy import Connection, create_engine, text

from cli import dev
from schemas.errors import SyncwardError
from storage import audit_tail, sealing
from storage.audit_tail import Filters
from storage.engine import parse_url, run_script

#: The event that is rewritten.
INDEX = 17


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `syncward audit verify` said."""

    exit_code: int
    said: str


def sealed_size(instance: dev.Instance) -> int:
    """Return how many events are sealed."""
    with _superuser(instance) as tx:
        return sealing.state(tx).size


def verify(data_dir: Path) -> Verdict:
    """Run `syncward audit verify` as an auditor would."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "audit", "verify"],
        env={**os.environ, "SYNCWARD_DATA_DIR": str(data_dir)},  # noqa: TID251 - the same program again
        check=False,
        capture_output=True,
        text=True,
    )
    lines = [ln.strip() for ln in done.stdout.splitlines() if ln.strip()]
    verdict = next((ln for ln in lines if "TAMPERED" in ln or "intact" in ln), "")
    return Verdict(done.returncode, verdict or done.stderr.strip())


@contextmanager
def rewritten(instance: dev.Instance) -> Iterator[str]:
    """While in the block the event says that nothing was done; yields who it was before."""
    with _superuser(instance) as tx:
        page = audit_tail.following(tx, Filters(), begin=INDEX, limit=1)
        found = next((event for event in page.events if event.index == INDEX), None)
        if found is None:
            raise SyncwardError(f"demo: event {INDEX} is not sealed; is the sealer running?")
        where = {"at": found.at, "seq": found.seq}
        part = tx.execute(
            text("SELECT tableoid::regclass::text FROM audit.event WHERE at = :at AND seq = :seq"),
            where,
        ).scalar_one()
        _set_body(tx, part, '{"outcome":"denied","principal":"operator:nobody","v":1}', where)
    try:
        yield found.action
    finally:
        with _superuser(instance) as tx:
            _set_body(tx, part, found.body, where)


def _set_body(tx: Connection, part: str, body: str, where: dict[str, object]) -> None:
    """Turn the guard off, change the event with its hash, turn the guard on again."""
    table = sql.SQL("audit.{}").format(sql.Identifier(part.removeprefix("audit.")))
    guard = "ALTER TABLE {} {} TRIGGER no_change"
    run_script(tx, sql.SQL(guard).format(table, sql.SQL("DISABLE")).as_string())
    tx.execute(
        text(
            "UPDATE audit.event SET body = :body, leaf = audit.leaf(at, account_id, class, action, "
            "target_kind, target_id, login, client, :body) WHERE at = :at AND seq = :seq"
        ),
        {"body": body, **where},
    )
    run_script(tx, sql.SQL(guard).format(table, sql.SQL("ENABLE ALWAYS")).as_string())


@contextmanager
def _superuser(instance: dev.Instance) -> Iterator[Connection]:
    engine = create_engine(
        parse_url(dev.admin_url(instance.postgres, dev.DATABASE)), hide_parameters=True
    )
    try:
        with engine.begin() as tx:
            yield tx
    finally:
        engine.dispose()
