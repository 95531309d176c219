"""What the audit log costs: an event, an audited change, sealing, verifying, bytes.

python -m benchmarks.audit [--quick] [--json]
"""

import argparse
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.synchronize import Event
from pathlib import Path

from sqlalchemy import text

from audit.sealer import Sealer
from benchmarks.control import Bench, made, note
from benchmarks.lab import cpu_seconds
from benchmarks.report import Case, document, show
from crypto import signing
from schemas.audit import Principal
from storage.engine import open_engine

SEAL_BUDGET = 0.10
VERIFY_FLOOR = 100_000.0
PER_SECOND = 10_000

#: The events of a run between two resources that ends well.
RUN = ("run.queued", "run.dispatched", "run.started", "credential.unsealed",
       "credential.unsealed", "credential.used", "run.succeeded")  # fmt: skip

_BODY = (
    '{"detail":{"attempt":"1","connection_id":"0d3ff8f2-2a2b-4a75-8f85-d1a1b6c9ea01"},'
    '"outcome":"success","principal":"worker","run_id":"0d3ff8f2-2a2b-4a75-8f85-d1a1b6c9ea01"}'
)
_COLUMNS = "account_id, class, action, target_kind, target_id, body"
_VALUES = f"gen_random_uuid(), 'B', 'run.started', 'run', gen_random_uuid(), '{_BODY}'"

#: What is compared, as its transactions: pgbench sends the statements one by one.
SCRIPTS = {
    "event": f"INSERT INTO audit.event ({_COLUMNS}) VALUES ({_VALUES});",
    "plain": f"INSERT INTO bench.plain ({_COLUMNS}) VALUES ({_VALUES});",
    "chain": f"SELECT bench.chained('{_BODY}');",
    "audited": (
        "\\set n random(1, 2000)\n"
        "BEGIN;\n"
        "UPDATE schedules SET state = CASE state WHEN 'active' THEN 'paused' ELSE 'active' END "
        "WHERE connection_id = (SELECT id FROM bench.ids WHERE n = :n);\n"
        f"INSERT INTO audit.event ({_COLUMNS}) SELECT gen_random_uuid(), 'A', 'connection.paused', "
        f"'connection', id, '{_BODY}' FROM bench.ids WHERE n = :n;\n"
        "COMMIT;"
    ),
    "unaudited": (
        "\\set n random(1, 2000)\n"
        "BEGIN;\n"
        "UPDATE bench.unguarded SET state = CASE state WHEN 'active' THEN 'paused' "
        "ELSE 'active' END WHERE connection_id = (SELECT id FROM bench.ids WHERE n = :n);\n"
        "COMMIT;"
    ),
}

#: The same bytes in a table without more; and a chain whose head every transaction locks.
_TABLES = f"""
CREATE SCHEMA bench;
CREATE TABLE bench.plain (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, account_id uuid,
  class text, action text, target_kind text, target_id uuid, body text);
CREATE TABLE bench.head (one boolean PRIMARY KEY DEFAULT true, hash bytea NOT NULL);
INSERT INTO bench.head (hash) VALUES (sha256(''));
CREATE TABLE bench.chain (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, body text,
  hash bytea);
CREATE FUNCTION bench.chained(body text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE next bytea;
BEGIN
  UPDATE bench.head SET hash = sha256(hash || convert_to(body, 'UTF8')) RETURNING hash INTO next;
  INSERT INTO bench.chain (body, hash) VALUES (body, next);
END $$;
CREATE TABLE bench.unguarded (LIKE schedules INCLUDING ALL);
INSERT INTO bench.unguarded SELECT * FROM schedules;
CREATE TABLE bench.ids AS
  SELECT row_number() OVER ()::int AS n, connection_id AS id FROM schedules LIMIT 2000;
ALTER TABLE bench.ids ADD PRIMARY KEY (n);
CREATE FUNCTION bench.feed(events int) RETURNS void LANGUAGE sql AS $$
  INSERT INTO audit.event ({_COLUMNS}) SELECT {_VALUES} FROM generate_series(1, events) $$;
ANALYZE;
"""


def prepare(bench: Bench, directory: Path) -> None:
    bench.seed("audit", 20, 100)
    with bench.admin.begin() as tx:
        driver = tx.connection.driver_connection
        assert driver is not None
        driver.execute(_TABLES)
    for name, script in SCRIPTS.items():
        (directory / name).write_text(f"{script}\n", encoding="utf-8")


def rate(bench: Bench, script: Path, writers: int, seconds: int) -> float:
    """Return transactions per second of so many writers, by pgbench."""
    arguments = ("-n", "-M", "prepared", "-c", str(writers), "-j", "2", "-T", str(seconds))
    command = bench.instance.postgres.tool(
        "pgbench", *arguments, "-f", str(script), database="syncward"
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [ln for ln in done.stdout.splitlines() if ln.startswith("tps")]
    return float(line.split()[2])


def beside(
    ours: Callable[[], float], plain: Callable[[], float], rounds: int
) -> tuple[float, float]:
    """Measure both in turn; return the round whose ratio is the median."""
    found = []
    for number in range(rounds):
        pair = (ours(), plain()) if number % 2 else (plain(), ours())[::-1]
        found.append((pair[0] / pair[1], pair))
    return sorted(found)[len(found) // 2][1]


def _seal(url: str, key: Path, stop: Event) -> None:
    """Be the sealer process: seal what is there four times a second."""
    engine = open_engine(url, "sealer", pool_size=1)
    sealer = Sealer(engine, signing.load(key), key, Principal("sealer", "bench"), "bench")
    while not stop.is_set():
        started = time.monotonic()
        while sealer.step() is not None:
            pass
        stop.wait(max(0.0, 0.25 - (time.monotonic() - started)))
    engine.dispose()


_SESSION = "SELECT pid FROM pg_stat_activity WHERE application_name = 'syncward-control:sealer'"


def sealing_share(bench: Bench, directory: Path, seconds: int) -> tuple[float, float, int]:
    """Seal 10,000 events a second; return the sealer's and its session's share of a core.

    And how many events were left after the last second.
    """
    key = directory / "signer.json"
    signing.init(key)
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=_seal, args=(bench.url, key, stop))
    process.start()
    assert process.pid is not None
    try:
        until_sealed(bench)
        backend = int(str(scalar(bench, _SESSION)))
        before, size = (cpu_seconds(process.pid), cpu_seconds(backend)), sealed(bench)
        started = time.monotonic()
        for number in range(seconds):
            scalar(bench, f"SELECT bench.feed({PER_SECOND})")
            time.sleep(max(0.0, started + number + 1 - time.monotonic()))
        spent = time.monotonic() - started
        done = sealed(bench) - size
        after = cpu_seconds(process.pid), cpu_seconds(backend)
        # of what was sealed, at 10,000 a second
        scale = PER_SECOND / done
        return (
            (after[0] - before[0]) * scale, (after[1] - before[1]) * scale,
            round(PER_SECOND * spent - done),
        )  # fmt: skip
    finally:
        stop.set()
        process.join()


def verify_rate(bench: Bench, key: Path) -> float:
    """Return events per second of this process, and of nothing else, that verifies them all."""
    engine = open_engine(bench.url, "auditor", pool_size=1)
    verify, live, audit_log = map(
        import_module, ("audit.verify", "audit.live", "storage.audit_log")
    )
    started = time.process_time()
    with audit_log.snapshot(engine) as tx:
        report = verify.Verifier(live.LiveEvidence(tx), signing.load(key).public).run()
    spent = time.process_time() - started
    engine.dispose()
    assert report.size == report.events == sealed(bench)
    return float(report.events / spent)


def scalar(bench: Bench, query: str) -> object:
    with bench.admin.begin() as tx:
        return tx.execute(text(query)).scalar_one()


def sealed(bench: Bench) -> int:
    return int(str(scalar(bench, "SELECT size FROM audit.log")))


def until_sealed(bench: Bench) -> None:
    """Wait until nothing is left of what was written before."""
    while int(str(scalar(bench, "SELECT count(*) FROM audit.event"))) > sealed(bench):
        time.sleep(0.5)


def sizes(bench: Bench) -> dict[str, float]:
    """Return bytes per event of each part of the log."""
    bench.act("VACUUM audit.event")
    events = sealed(bench)
    parts = "FROM pg_partition_tree('audit.event') WHERE isleaf"
    whole = {
        "heap": f"SELECT sum(pg_table_size(relid)) {parts}",
        "indexes": f"SELECT sum(pg_indexes_size(relid)) {parts}",
        "tiles": "SELECT sum(octet_length(hashes)) FROM audit.tile",
        "checkpoints": "SELECT pg_total_relation_size('audit.checkpoint')",
    }
    return {name: float(str(scalar(bench, query))) / events for name, query in whole.items()}


def measure(bench: Bench, directory: Path, *, quick: bool) -> tuple[list[Case], dict[str, str]]:
    rounds, seconds = (3, 1) if quick else (7, 4)
    prepare(bench, directory)

    def runs(name: str, writers: int = 8) -> Callable[[], float]:
        return lambda: rate(bench, directory / name, writers, seconds)

    note("events beside plain rows")
    single = beside(runs("event"), runs("plain"), rounds)
    note("audited changes beside unaudited ones")
    change = beside(runs("audited"), runs("unaudited"), rounds)
    note("a chain in the transaction")
    chains = {
        f"chain_{writers}_writers": "{:.0f} events/s, ours {:.0f}".format(
            *beside(runs("chain", writers), runs("event", writers), 3)
        )
        for writers in (1, 8, 32)
    }
    note("sealing")
    share, session, left = sealing_share(bench, directory, 5 if quick else 20)
    each = sizes(bench)
    cases = [
        Case("single_8_writers", *single, "events/s, 0.6 wanted"),
        Case("audited_change", *change, "changes/s, 0.5 wanted"),
        Case("seal_core_share", share, SEAL_BUDGET, "of a core, 10,000/s"),
    ]
    if find_spec("audit.verify"):
        verified = verify_rate(bench, directory / "signer.json")
        cases.append(Case("verify", verified, VERIFY_FLOOR, "events/s of a core"))
    return cases, {
        **chains,
        "seal_session_core_share": f"{session:.3f}",
        "events_behind_at_the_end": str(max(0, left)),
        **{f"bytes_per_event_{name}": f"{size:.0f}" for name, size in each.items()},
        "bytes_per_event": f"{sum(each.values()):.0f}",
        "bytes_per_run": f"{sum(each.values()) * len(RUN):.0f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, made() as bench:
        cases, others = measure(bench, Path(directory), quick=arguments.quick)
    show({**document(cases), "beside": others}, cases, as_json=arguments.json)


if __name__ == "__main__":
    main()
