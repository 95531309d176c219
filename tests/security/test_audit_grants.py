"""Whoever may write events may do nothing else to the log (T34, T35), asked of a real server."""

import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from schemas.errors import ConfigError
from storage import audit
from storage.engine import transaction

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("audit_grants")]

WRITERS = ("scheduler", "worker", "operator", "sealer", "auditor")
READERS = frozenset({"operator", "sealer", "auditor"})

COLUMNS = "class, action, target_kind, target_id, body"
VALUES = "'A', 'a', 'run', gen_random_uuid(), '{}'"
EVENT = f"INSERT INTO audit.event ({COLUMNS}) VALUES ({VALUES})"


def saying(action: str) -> str:
    return EVENT.replace("'a'", f"'{action}'")


def stamped(column: str, value: str) -> str:
    return f"INSERT INTO audit.event ({COLUMNS}, {column}) VALUES ({VALUES}, {value})"


FORBIDDEN = {
    "update": "UPDATE audit.event SET body = '{}'",
    "delete": "DELETE FROM audit.event",
    "truncate": "TRUNCATE audit.event",
    "backdate": stamped("at", "now() - interval '1 day'"),
    "number": f"INSERT INTO audit.event ({COLUMNS}, seq) OVERRIDING SYSTEM VALUE "
    f"VALUES ({VALUES}, 1)",
    "transaction": stamped("xid", "'1'"),
    "login": stamped("login", "'somebody'"),
    "client": stamped("client", "'192.0.2.1'"),
    "leaf": stamped("leaf", "'\\x00'"),
    "upsert": f"{EVENT} ON CONFLICT (at, seq) DO UPDATE SET body = '{{}}'",
    "partition": f"INSERT INTO audit.event_default ({COLUMNS}) VALUES ({VALUES})",
    "truncate partition": "TRUNCATE audit.event_default",
    "triggers off": "ALTER TABLE audit.event DISABLE TRIGGER ALL",
    "partition's triggers off": "ALTER TABLE audit.event_default DISABLE TRIGGER no_change",
    "replica": "SET session_replication_role = replica",
    "trigger": "CREATE TRIGGER mine BEFORE INSERT ON audit.event FOR EACH ROW "
    "EXECUTE FUNCTION audit.deny()",
    "policy": "CREATE POLICY mine ON audit.event USING (true)",
    "detach": "ALTER TABLE audit.event DETACH PARTITION audit.event_default",
    "drop": "DROP TABLE audit.event",
    "become the owner": "SET ROLE syncward_owner",
    "become a migrator": "SET ROLE syncward_migrator",
    "erase by hand": "UPDATE audit.principal SET name = NULL, salt = NULL",
    "swap a name": "UPDATE audit.principal SET name = 'somebody'",
    "forget a principal": "DELETE FROM audit.principal",
    "empty principals": "TRUNCATE audit.principal",
    "make a principal": "INSERT INTO audit.principal (id, kind) VALUES ('x', 'operator')",
    "read keys of commitments": "SELECT * FROM audit.commitment_key",
    "replace keys of commitments": "DELETE FROM audit.commitment_key",
    "change a checkpoint": "UPDATE audit.checkpoint SET signatures = ''",
    "remove a checkpoint": "DELETE FROM audit.checkpoint",
    "remove all checkpoints": "TRUNCATE audit.checkpoint",
    "change an epoch": "UPDATE audit.epoch SET reason = ''",
    "remove an epoch": "DELETE FROM audit.epoch",
    "remove all epochs": "TRUNCATE audit.epoch",
    "remove the log's state": "DELETE FROM audit.log",
    "empty the log's state": "TRUNCATE audit.log",
    "another log": "INSERT INTO audit.log DEFAULT VALUES",
    "another name of the log": "UPDATE audit.log SET log_id = gen_random_uuid()",
    "a cut where nothing was restored": "SELECT audit.cut()",
    "a position of the future": "UPDATE audit.log SET last_xid = "
    "(pg_current_xact_id()::text::numeric + 1000)::text::xid8",
    "another floor": "UPDATE audit.log SET floor_seq = 99",
    "again from the first event": "UPDATE audit.log SET left_over = true",
    "an epoch that is not there": "UPDATE audit.log SET epoch = 2",
    "an epoch of another transaction": "INSERT INTO audit.epoch (epoch, size, floor_seq, reason, "
    "xid) VALUES (9, 0, 0, 'x', '1')",
    "remove a tile": "DELETE FROM audit.tile",
    "remove all tiles": "TRUNCATE audit.tile",
}
#: What only the sealer may.
SEALING = {
    "move the log": "UPDATE audit.log SET size = 0",
    "change a tile": "UPDATE audit.tile SET hashes = hashes",
    "add a tile": "INSERT INTO audit.tile VALUES (0, 0, decode(repeat('00', 32), 'hex'))",
    "add an epoch": "INSERT INTO audit.epoch (epoch, size, floor_seq, reason) "
    "VALUES (9, 0, 0, 'x')",
    "add a checkpoint": "INSERT INTO audit.checkpoint VALUES (1, 1, '{1}', '1', 1, now(), now(), "
    "decode(repeat('00', 32), 'hex'), now(), '')",
}


def state_of(control, process: str, statement: str) -> str:
    """The SQLSTATE with which the server refuses a statement, or an empty text."""
    with control.engine(process).connect() as link:
        try:
            link.execute(text(statement))
        except DBAPIError as error:
            return getattr(error.orig, "sqlstate", None) or "?"
        finally:
            link.rollback()
    return ""


@pytest.mark.parametrize("process", WRITERS)
def test_a_writer_may_insert_an_event_and_nothing_else(control, process):
    event = saying("audit.read") if process == "auditor" else EVENT
    assert state_of(control, process, event) == ""
    refused = {what: state_of(control, process, how) for what, how in FORBIDDEN.items()}
    assert refused == dict.fromkeys(FORBIDDEN, "42501")


OF_THE_SEALER = (
    "signer.rotated", "audit.epoch_started", "audit.pruned", "sealer.started", "audit.heartbeat",
)  # fmt: skip


@pytest.mark.parametrize("process", WRITERS)
def test_only_the_sealer_speaks_of_itself_and_an_auditor_of_reading(control, process):
    said = {
        action: state_of(control, process, saying(action))
        for action in (*OF_THE_SEALER, "audit.read", "account.deleted")
    }
    wanted = dict.fromkeys(OF_THE_SEALER, "" if process == "sealer" else "42501")
    wanted |= {"audit.read": "", "account.deleted": "42501" if process == "auditor" else ""}
    assert said == wanted


@pytest.mark.parametrize("process", [p for p in WRITERS if p not in READERS])
def test_who_only_writes_cannot_read_not_even_what_it_wrote(control, process):
    for statement in (f"{EVENT} RETURNING leaf", "SELECT body FROM audit.event",
                      "SELECT name FROM audit.principal"):  # fmt: skip
        assert state_of(control, process, statement) == "42501", statement


@pytest.mark.parametrize("process", [p for p in WRITERS if p != "sealer"])
def test_only_the_sealer_seals(control, process):
    refused = {what: state_of(control, process, how) for what, how in SEALING.items()}
    assert refused == dict.fromkeys(SEALING, "42501")


def test_the_sealer_seals(control):
    allowed = {what: state_of(control, "sealer", how) for what, how in SEALING.items()}
    assert allowed == dict.fromkeys(SEALING, "")


BEGIN = (
    "INSERT INTO audit.epoch (epoch, size, floor_seq, reason) VALUES (2, 0, 5, 'x')",
    "UPDATE audit.log SET epoch = 2, floor_seq = 5, left_over = true",
)


def begin(control, *statements: str) -> None:
    with transaction(control.engine("sealer")) as tx:
        for statement in statements:
            tx.execute(text(statement))


def said(epoch: int) -> str:
    body = '{"detail":{"epoch"\\:%d}}' % epoch  # noqa: UP031 - braces
    return (
        f"INSERT INTO audit.event ({COLUMNS}) VALUES ('A', 'audit.epoch_started', 'instance', "
        f"'{audit.INSTANCE_ID}', '{body}')"
    )


@pytest.mark.parametrize("events", [(), (said(3),), (said(2).replace("epoch_started", "read"),)])
def test_no_epoch_begins_without_its_event(control, events):
    with pytest.raises(ConfigError, match="unaudited epoch"):
        begin(control, *events, *BEGIN)
    assert control.one("SELECT epoch FROM audit.log") == 1


def test_an_epoch_with_its_event_begins_and_no_other_cut_is_made_for_it(control):
    begin(control, *BEGIN, said(2))
    assert control.all("SELECT epoch, floor_seq FROM audit.log") == [(2, 5)]
    for how in ("SET floor_seq = 6", "SET epoch = 1", "SET left_over = false, floor_seq = 0"):
        assert state_of(control, "sealer", f"UPDATE audit.log {how}") == "42501", how
    assert state_of(control, "sealer", "UPDATE audit.log SET left_over = false") == ""


def test_a_restored_server_may_cut(control):
    control.act("UPDATE audit.log SET last_xid = '9000000000000'")
    assert state_of(control, "sealer", "SELECT audit.cut()") == ""
    for process in WRITERS:
        if process != "sealer":
            assert state_of(control, process, "SELECT audit.cut()") == "42501", process


@pytest.mark.parametrize("process", [p for p in WRITERS if p not in {"operator", "auditor"}])
def test_who_is_no_person_makes_no_names(control, process):
    statement = "SELECT audit.principal_of('operator', 'x')"
    assert state_of(control, process, statement) == "42501"


@pytest.mark.parametrize("process", [p for p in WRITERS if p != "operator"])
def test_only_operators_erase_names_and_use_keys_of_commitments(control, process):
    for statement in ("SELECT audit.erase_name('operator', 'x')",
                      "SELECT audit.commitment_key_of(gen_random_uuid())"):  # fmt: skip
        assert state_of(control, process, statement) == "42501", statement


def test_nobody_of_ours_may_write_everything(control):
    found = control.all(
        "SELECT rolname FROM pg_roles WHERE (rolname LIKE 'syncward\\_%' OR rolname = 'dev') AND "
        "(pg_has_role(oid, 'pg_write_all_data', 'MEMBER') OR rolsuper OR rolbypassrls)"
    )
    assert found == []


def partitions(control) -> set[str]:
    found = control.all(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit.event'::regclass"
    )
    return {name for (name,) in found}


def test_every_partition_denies_always_also_one_that_was_made_later(control):
    before = partitions(control)
    with transaction(control.engine("scheduler")) as tx:
        tx.execute(text("SELECT ensure_partitions(6)"))
    assert partitions(control) > before
    found = control.all(
        "SELECT tgrelid::regclass::text, tgname, tgenabled::text FROM pg_trigger "
        "WHERE tgname IN ('no_change', 'no_truncate', 'stamp')"
    )
    for table in partitions(control):
        for trigger in ("no_change", "no_truncate", "stamp"):
            assert (table, trigger, "A") in found, (table, trigger)
    for table in ("audit.checkpoint", "audit.epoch", "audit.principal"):
        for trigger in ("no_change", "no_truncate"):
            assert (table, trigger, "A") in found, (table, trigger)


@pytest.mark.parametrize("statement", [
    "DELETE FROM {}", "UPDATE {} SET body = body", "TRUNCATE {}",
])  # fmt: skip
def test_not_even_a_superuser_without_triggers_changes_a_partition(control, statement):
    control.act("INSERT INTO audit.event (class, action, target_kind, target_id, body) VALUES "
                "('A', 'account.created', 'account', gen_random_uuid(), '{}')")  # fmt: skip
    for table in ["audit.event", *sorted(partitions(control))]:
        if control.one(f"SELECT count(*) FROM {table}") == 0 and "TRUNCATE" not in statement:
            continue
        if table == "audit.event" and "TRUNCATE" in statement:
            continue  # its partitions are asked one by one, below
        with pytest.raises(DBAPIError, match="append-only"):
            control.act(statement.format(table))
    with pytest.raises(DBAPIError, match="append-only"):
        control.act("TRUNCATE audit.event")


@pytest.mark.parametrize("table", sorted(audit.GUARDED_TABLES))
def test_a_guarded_table_cannot_be_emptied_past_its_trigger(control, table):
    name = sql.Identifier(*table.split(".")).as_string()
    with pytest.raises(DBAPIError, match="append-only"):
        control.act_plainly(f"SET LOCAL ROLE syncward_owner; TRUNCATE {name} CASCADE")
    for process in WRITERS:
        assert state_of(control, process, f"TRUNCATE {name}") == "42501"
