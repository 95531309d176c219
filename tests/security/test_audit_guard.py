"""What protects the log is compared in full: triggers, rules, functions, settings (T34, T35)."""

import pytest

from storage import audit_guard
from storage.engine import transaction

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("audit_grants")]


def missing(control) -> list[str]:
    with transaction(control.engine("auditor")) as tx:
        return audit_guard.missing(tx)


def test_a_database_that_was_migrated_lacks_nothing(control):
    with transaction(control.engine("scheduler")) as tx:
        tx.exec_driver_sql("SELECT ensure_partitions(5)")
    assert missing(control) == []
    for process in ("operator", "sealer"):
        with transaction(control.engine(process)) as tx:
            assert audit_guard.missing(tx) == [], process


def test_the_digests_of_functions_are_those_of_this_version(control):
    with transaction(control.engine("auditor")) as tx:
        found = audit_guard.functions(tx)
    shown = "".join(f'    "{name}": "{digest}",\n' for name, digest in found.items())
    assert found == audit_guard.FUNCTIONS, f"storage/audit_guard.py must say:\n{shown}"


def again(name: str, table: str, how: str, *, after: str = "") -> str:
    """Replace a trigger by one with the same name."""
    return f"DROP TRIGGER {name} ON {table}; CREATE {how.format(name=name, table=table)}; {after}"


AUDITED = (
    "CONSTRAINT TRIGGER {name} AFTER INSERT OR DELETE ON {table} DEFERRABLE INITIALLY DEFERRED "
    "FOR EACH ROW EXECUTE FUNCTION audit.require_event('id')"
)
STATE = AUDITED.replace("INSERT OR DELETE", "UPDATE OF state").replace(
    "EXECUTE", "WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE"
)
NO_CHANGE = (
    "TRIGGER {name} BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION audit.deny()"
)
ENVELOPE = (
    "CONSTRAINT TRIGGER {name} AFTER UPDATE OF envelope ON {table} DEFERRABLE INITIALLY DEFERRED "
    "FOR EACH ROW WHEN (OLD.envelope IS DISTINCT FROM NEW.envelope) "
    "EXECUTE FUNCTION audit.require_event('resource_id')"
)
ALWAYS = "ALTER TABLE {} ENABLE ALWAYS TRIGGER no_change"
BODY = "RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW;END'"
MINE = "CREATE TRIGGER {} FOR EACH ROW EXECUTE FUNCTION public.mine()"
SHORT = (
    "CREATE OR REPLACE FUNCTION audit.field(part text) RETURNS bytea LANGUAGE sql IMMUTABLE "
    "RETURN convert_to(part, 'UTF8')"
)

CHANGED = {
    "never": (again("audited", "accounts", AUDITED.replace("EXECUTE", "WHEN (false) EXECUTE")),
              "audited of accounts has another condition"),
    "not for this change": (
        again("audited_state", "accounts",
              STATE.replace("NEW.state)", "NEW.state AND NEW.state <> 'x')")),
        "audited_state of accounts has another condition"),
    "for no envelope": (
        again("audited_envelope", "credentials",
              ENVELOPE.replace("NEW.envelope)", "OLD.envelope)")),
        "audited_envelope of credentials has another condition"),
    "not on delete": (again("audited", "accounts", AUDITED.replace(" OR DELETE", "")),
                      "audited of accounts fires at other times"),
    "not on update": (
        again("no_change", "audit.checkpoint", NO_CHANGE.replace("UPDATE OR ", ""),
              after=ALWAYS.format("audit.checkpoint")),
        "no_change of audit.checkpoint fires at other times"),
    "for other columns": (
        again("audited_state", "accounts", STATE.replace("OF state", "OF plan")),
        "audited_state of accounts watches other columns"),
    "for one column": (
        again("no_change", "audit.event_default", NO_CHANGE.replace("UPDATE", "UPDATE OF seq"),
              after=ALWAYS.format("audit.event_default")),
        "no_change of audit.event_default watches other columns"),
    "another column of the event": (
        again("audited", "active_runs", AUDITED.replace("'id'", "'connection_id'")),
        "audited of active_runs has other arguments"),
    "at once": (again("audited", "accounts", AUDITED.replace("INITIALLY DEFERRED", "")),
                "audited of accounts is not deferred as it was"),
    "for the owner only": (
        again("audited_epoch", "audit.epoch", "CONSTRAINT TRIGGER {name} AFTER INSERT ON {table} "
              "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION "
              "audit.require_epoch_event()"),
        "audited_epoch of audit.epoch has another condition"),
    "gone from the position": ("DROP TRIGGER only_forward ON audit.log",
                               "only_forward of audit.log is missing"),
    "only for replicas": ("ALTER TABLE accounts ENABLE REPLICA TRIGGER audited",
                          "audited of accounts is disabled"),
    "another trigger of a guarded table": (
        f"CREATE FUNCTION public.mine() {BODY}; " + MINE.format("a BEFORE UPDATE ON credentials"),
        "trigger a of credentials is none of ours"),
    "another trigger of the log": (
        f"CREATE FUNCTION public.mine() {BODY}; " + MINE.format("z BEFORE INSERT ON audit.tile"),
        "trigger z of audit.tile is none of ours"),
    "a rule of a guarded table": (
        "CREATE RULE quiet AS ON DELETE TO connections DO INSTEAD NOTHING",
        "rule quiet of connections is none of ours"),
    "a rule of the log": ("CREATE RULE quiet AS ON INSERT TO audit.event DO INSTEAD NOTHING",
                          "rule quiet of audit.event is none of ours"),
    "a function that lets pass": (
        f"CREATE OR REPLACE FUNCTION audit.deny() {BODY} SET search_path = pg_catalog",
        "function audit.deny is not what it was"),
    "a function of its caller": ("ALTER FUNCTION audit.require_event() SECURITY INVOKER",
                                 "function audit.require_event is not what it was"),
    "a function with another path": (
        "ALTER FUNCTION audit.require_event() SET search_path = pg_temp, pg_catalog",
        "function audit.require_event is not what it was"),
    "another function": (f"CREATE FUNCTION audit.mine() {BODY}",
                         "function audit.mine is none of ours"),
    "a function of the same name": (
        "CREATE FUNCTION audit.leaf(text) RETURNS bytea LANGUAGE sql AS 'SELECT null::bytea'",
        "function audit.leaf is not what it was"),
    "a function of somebody else": ("ALTER FUNCTION audit.stamp() OWNER TO CURRENT_USER",
                                    "function audit.stamp is not what it was"),
    "a hash of less": (
        SHORT, "function audit.field is not what it was"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_a_guard_that_was_changed_is_found(control, what):
    statements, found = CHANGED[what]
    for statement in filter(None, (one.strip() for one in statements.split("; "))):
        control.act_plainly(statement)
    assert any(line.endswith(found) for line in missing(control)), missing(control)


def test_a_setting_that_turns_triggers_off_is_found(control):
    control.act_plainly(
        f'ALTER DATABASE "{control.database}" SET session_replication_role = replica'
    )
    assert missing(control) == ["the setting session_replication_role=replica turns triggers off"]


def test_the_same_trigger_made_again_is_the_same(control):
    for statements in (
        again("audited", "accounts", AUDITED),
        again("audited_state", "accounts", STATE),
        again("audited_envelope", "credentials", ENVELOPE),
        again("no_change", "audit.checkpoint", NO_CHANGE, after=ALWAYS.format("audit.checkpoint")),
    ):
        for statement in filter(None, (one.strip() for one in statements.split("; "))):
            control.act_plainly(statement)
    assert missing(control) == []
