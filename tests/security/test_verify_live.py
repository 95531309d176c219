"""A superuser changes rows that nobody signs, so that a lie looks like an event that waits."""

import tracemalloc
from time import monotonic

import pytest

from audit import memory
from audit.sealer import LogWentBack
from schemas.audit import AuditAction
from storage import audit
from storage.engine import transaction

pytestmark = pytest.mark.integration

COPY = (
    "INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body, at, xid) "
    "SELECT account_id, class, action, target_kind, target_id, body, {at}, {xid} "
    "FROM audit.event ORDER BY seq DESC LIMIT 1"
)


@pytest.fixture
def log(grown_log):
    return grown_log(9, 10)


@pytest.mark.parametrize(("xid", "at", "code"), [
    ("'9000000000000'::xid8", "at", 10),  # parked where no sealer ever comes
    ("'9000000000000'::xid8", "at - interval '30 days'", 10),
    ("(xid::text::bigint + 1)::text::xid8", "now() + interval '1 year'", 10),
    ("(xid::text::bigint + 1)::text::xid8", "now() + interval '1 hour'", 11),
    ("(xid::text::bigint - 1)::text::xid8", "at - interval '30 days'", 10),
    ("xid", "at - interval '30 days'", 11),
    ("(xid::text::bigint + 1)::text::xid8", "at - interval '30 days'", 11),
])  # fmt: skip
@pytest.mark.parametrize("hide", [
    "UPDATE audit.log SET sealed_at = now()",
    "UPDATE audit.log SET last_xid = '0', last_seq = 0",
    "UPDATE audit.log SET left_over = true",
])  # fmt: skip
def test_an_inserted_event_is_no_event_that_waits_to_be_sealed(log, xid, at, code, hide):
    log.tamper(COPY.format(at=at, xid=xid), hide)
    assert log.live().exit_code == code


OLDER = "(xid::text::bigint - 1)::text::xid8"


@pytest.mark.parametrize("hide", [
    "UPDATE audit.checkpoint SET last_seq = 0 WHERE size = 20",
    "UPDATE audit.checkpoint SET last_seq = 0, last_xid = '0' WHERE size = 20",
    "UPDATE audit.checkpoint SET last_seq = 1, last_xid = '1'",
    "UPDATE audit.checkpoint SET latest = 'infinity' WHERE size = 20",
    "UPDATE audit.epoch SET floor_seq = 9000000000000",
    "UPDATE audit.log SET floor_seq = 9000000000000, left_over = true",
])  # fmt: skip
def test_a_fresh_event_behind_is_found_whatever_unsigned_rows_say(log, hide):
    """Where the log stands is what was verified."""
    log.tamper(COPY.format(at="clock_timestamp()", xid=OLDER), hide)
    report = log.live()
    assert report.exit_code == 10
    assert "was never sealed: inserted afterwards" in "\n".join(report.lines)


def test_where_no_checkpoint_names_its_last_event_an_event_behind_is_not_passed_over(log):
    """So it is while an epoch seals what it found; a log of which all is such is not intact."""
    log.tamper(COPY.format(at="clock_timestamp()", xid=OLDER),
               "UPDATE audit.checkpoint SET last_seq = 0")  # fmt: skip
    assert log.live().exit_code in {10, 11}


def test_a_part_that_is_read_says_that_old_events_were_not_looked_for(log):
    report = log.live(start=15)
    assert report.exit_code == 0
    assert "leave out --from to look for older ones" in "\n".join(report.lines)
    log.tamper(COPY.format(at="clock_timestamp()", xid=OLDER))
    assert log.live(start=15).exit_code == 10


# ── rows of any size ──────────────────────────────────────────────────────────────────────────

HUGE = (
    "INSERT INTO audit.checkpoint SELECT {size}, epoch, {seqs}, last_xid, last_seq, earliest, "
    "latest, root, signed_at, signatures FROM audit.checkpoint ORDER BY size DESC LIMIT 1"
)

#: Name -> statements; each makes a log that nobody could read at once.
SIZES = {
    "size": [HUGE.format(size=10**15, seqs="seqs")],
    "size in the middle": [HUGE.format(size=15, seqs="seqs")],
    "largest size": [HUGE.format(size=2**63 - 1, seqs="seqs")],
    "no seqs": [HUGE.format(size=10**15, seqs="'{}'")],
    "seqs": [HUGE.format(
        size=21, seqs="(SELECT array_agg(n) FROM generate_series(1, 3000000) AS n)")],
    "seqs and size": [HUGE.format(
        size=3000020, seqs="(SELECT array_agg(n) FROM generate_series(1, 3000000) AS n)")],
    "many checkpoints": [
        ("INSERT INTO audit.checkpoint SELECT 1000 + n * 100000, epoch, seqs, last_xid, last_seq, "
        "earliest, latest, root, signed_at, signatures FROM audit.checkpoint c, "
        "generate_series(1, 3000) AS n WHERE c.size = 20")],
    "xid": ["UPDATE audit.checkpoint SET last_xid = '18446744073709551615' WHERE size = 20"],
    "xid of an event": ["UPDATE audit.event SET xid = '18446744073709551615' WHERE seq = 5"],
    "signatures": ["UPDATE audit.checkpoint SET signatures = repeat('x', 50000000)"],
    "root": ["ALTER TABLE audit.checkpoint DROP CONSTRAINT checkpoint_root_check",
             "UPDATE audit.checkpoint SET root = convert_to(repeat('x', 50000000), 'UTF8')"],
    "signed_at": ["UPDATE audit.checkpoint SET signed_at = 'infinity'"],
    "epochs": [("INSERT INTO audit.epoch (epoch, size, floor_seq, reason) "
               "SELECT n, 10 ^ 15, 0, 'x' FROM generate_series(2, 50000) AS n")],
    "epochs at the end": [("INSERT INTO audit.epoch (epoch, size, floor_seq, reason) "
                          "SELECT n, 20, 0, 'x' FROM generate_series(2, 50000) AS n")],
    "epoch's size": ["UPDATE audit.epoch SET size = 9223372036854775807"],
    "reason": [("INSERT INTO audit.epoch (epoch, size, floor_seq, reason) "
               "VALUES (2, 5, 0, repeat('x', 50000000))")],
    "tile": ["INSERT INTO audit.tile VALUES (0, 9223372036854775807, sha256('x'))"],
    "tile's hashes": ["ALTER TABLE audit.tile DROP CONSTRAINT tile_hashes_check",
                      "UPDATE audit.tile SET hashes = convert_to(repeat('x', 50000000), 'UTF8')"],
    "body": ["ALTER TABLE audit.event DROP CONSTRAINT event_body_check",
             "UPDATE audit.event SET body = repeat('x', 20000000)"],
    "login": ["UPDATE audit.event SET login = repeat('é', 20000000) WHERE seq = 5"],
    "leaf": ["UPDATE audit.event SET leaf = convert_to(repeat('x', 20000000), 'UTF8')"],
    "no login": ["ALTER TABLE audit.event ALTER login DROP NOT NULL",
                 "UPDATE audit.event SET login = NULL WHERE seq = 5"],
    "time": ["UPDATE audit.event SET at = 'infinity' WHERE seq = 5"],
}  # fmt: skip


@pytest.mark.parametrize(
    "act",
    [pytest.param(act, marks=pytest.mark.full if act == "seqs" else ()) for act in SIZES],
)
def test_rows_of_any_size_give_a_verdict_in_bounded_time_and_memory(log, act):
    log.tamper(*SIZES[act])
    tracemalloc.start()
    begin = monotonic()
    try:
        report = log.live()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.exit_code in {10, 11, 12}, report.lines
    assert peak < 200 * 2**20
    assert monotonic() - begin < 60
    assert sum(map(len, report.lines)) < 100_000


def test_long_events_are_read_in_portions(log):
    """Each is as long as one can be; all of them together are more than is held at once."""
    with transaction(log.control.engine("operator")) as tx:
        reason = "x" * 60_000
        for _ in range(2000):
            audit.append(tx, log.event(AuditAction.INSTANCE_READ, reason=reason))
    log.seal()
    tracemalloc.start()
    try:
        report = log.live()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (report.exit_code, report.events) == (0, 2020)
    assert peak < 80 * 2**20


def test_nobody_signs_on_a_history_that_no_known_key_signed(log):
    """Whoever owns the database rewrites all of it; a sealer without memory comes."""
    log.tamper("UPDATE audit.checkpoint SET signatures = '— nobody ' || repeat('A', 92) || E'\\n'")
    memory.path_of(log.key).unlink()
    with pytest.raises(LogWentBack, match="signed by no key that this sealer knows"):
        log.seal()


@pytest.mark.parametrize(("statement", "said"), [
    ("ALTER POLICY audit_reads ON audit.event USING (login <> 'anna')", "policy audit_reads"),
    ("CREATE POLICY more ON audit.event AS RESTRICTIVE FOR SELECT USING (login <> 'a')", "more"),
    (("DROP TRIGGER audited ON accounts; CREATE CONSTRAINT TRIGGER audited AFTER INSERT OR DELETE "
     "ON accounts DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (false) "
     "EXECUTE FUNCTION audit.require_event('id')"), "audited of accounts has another condition"),
    (("CREATE FUNCTION public.zz() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL;END'; "
     "CREATE TRIGGER zz BEFORE INSERT ON audit.event FOR EACH ROW EXECUTE FUNCTION public.zz()"),
     "trigger zz of audit.event is none of ours"),
    (("ALTER TABLE audit.log RENAME TO log_; CREATE VIEW audit.log AS SELECT * FROM audit.log_; "
     "GRANT SELECT ON audit.log TO syncward_auditor"), "audit.log is no table"),
])  # fmt: skip
def test_a_guard_that_is_there_in_name_only_is_found(log, statement, said):
    for one in statement.split("; "):
        log.control.act(one)
    report = log.live()
    assert report.exit_code == 10
    assert said in "\n".join(report.lines)


def test_what_a_later_version_made_of_the_guards_is_not_called_an_attack(log):
    log.control.act("CREATE FUNCTION audit.of_the_next_version() RETURNS int LANGUAGE sql RETURN 1")
    assert log.live().exit_code == 10
    log.control.act("UPDATE alembic_version SET version_num = '9999'")
    report = log.live()
    assert report.exit_code == 12
    assert "upgrade this host" in "\n".join(report.lines)
