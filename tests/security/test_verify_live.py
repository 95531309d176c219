"""A superuser changes rows that nobody signs, so that a lie looks like an event that waits."""

import pytest

from audit import memory
from audit.sealer import LogWentBack
from tests.sealed_log import SealedLog

pytestmark = pytest.mark.integration

COPY = (
    "INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body, at, xid) "
    "SELECT account_id, class, action, target_kind, target_id, body, {at}, {xid} "
    "FROM audit.event ORDER BY seq DESC LIMIT 1"
)


@pytest.fixture
def log(control, tmp_path):
    made = SealedLog(control, tmp_path)
    made.grow(9, 10)
    return made


@pytest.mark.parametrize(("xid", "at", "code"), [
    ("'9000000000000'::xid8", "at", 10),  # parked where no sealer ever comes
    ("'9000000000000'::xid8", "at - interval '30 days'", 10),
    ("(xid::text::bigint + 1)::text::xid8", "now() + interval '1 year'", 10),
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
