"""The control database itself: migrations, roles, row-level security, the audit trigger."""

import hashlib

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from schemas.audit import AuditAction, AuditEvent, TargetKind
from schemas.errors import ConfigError, TransientError
from schemas.ids import new_id
from storage import accounts, audit, audit_tail, migrate, tenancy
from storage.engine import open_engine, transaction
from storage.roles import role_sql
from storage.tables import metadata
from tests.world import OPERATOR

pytestmark = pytest.mark.integration


def test_migrations_and_tables_agree(control):
    with control.admin_engine().begin() as tx:
        assert migrate.current(tx) == migrate.head()
        assert migrate.differences(tx) == []


def test_a_difference_between_migrations_and_tables_is_found(control):
    control.act("ALTER TABLE accounts ADD COLUMN surprise int")
    with control.admin_engine().begin() as tx:
        assert any("surprise" in d for d in migrate.differences(tx))


def test_a_second_upgrade_changes_nothing(control):
    before = control.one("SELECT count(*) FROM audit.event")
    assert migrate.upgrade(control.admin_url, OPERATOR) == (migrate.head(), migrate.head())
    assert control.one("SELECT count(*) FROM audit.event") == before


def test_the_printed_role_sql_runs_as_it_is_and_twice(control):
    for _ in range(2):
        with psycopg.connect(control.admin_url, autocommit=True) as dba:
            dba.execute(role_sql())


def test_every_guarded_table_has_its_triggers_and_no_other(control):
    found = control.all(
        "SELECT c.oid::regclass::text, encode(t.tgargs, 'escape') FROM pg_trigger t "
        "JOIN pg_class c ON c.oid = t.tgrelid WHERE t.tgname = 'audited'"
    )
    assert {table: column.removesuffix("\\000") for table, column in found} == audit.GUARDED_TABLES


def test_every_table_is_guarded_or_says_why_it_needs_no_guard():
    known = {table.fullname for table in metadata.sorted_tables}
    assert known == {*audit.GUARDED_TABLES, *audit.UNGUARDED_TABLES}
    assert not set(audit.GUARDED_TABLES) & set(audit.UNGUARDED_TABLES)


def test_the_database_has_no_table_beside_those(control):
    found = control.all(
        "SELECT CASE WHEN n.nspname = 'public' THEN c.relname ELSE n.nspname || '.' || c.relname "
        "END FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition "
        "AND n.nspname IN ('public', 'audit', 'keystore') AND c.relname <> 'alembic_version'"
    )
    assert {name for (name,) in found} == {*audit.GUARDED_TABLES, *audit.UNGUARDED_TABLES}


@pytest.mark.parametrize("table", sorted(audit.GUARDED_TABLES))
def test_an_unaudited_change_is_refused_at_commit(control, table):
    changes = {
        "accounts": "INSERT INTO accounts (id, name, plan) VALUES (gen_random_uuid(), 'x', 'p')",
        "resources": "INSERT INTO resources (id, account_id, name, kind, config) "
        "SELECT gen_random_uuid(), id, 'r', 'postgres', '{}' FROM accounts",
        "credentials": "DELETE FROM credentials",
        "dead_logins": "DELETE FROM dead_logins",
        "connections": "DELETE FROM connections",
        "schedules": "UPDATE schedules SET state = 'paused'",
        "active_runs": "UPDATE active_runs SET state = 'dispatched', dispatch_deadline = now()",
        "instance": "UPDATE instance SET state = 'paused'",
        "keystore.root": "UPDATE keystore.root SET state = 'decrypt_only'",
    }
    _fill(control)
    with pytest.raises(DBAPIError, match="unaudited"):
        _commit(control, changes[table])


def _commit(control, statement: str) -> None:
    with control.admin_engine().begin() as tx:
        assert tx.execute(text(statement)).rowcount == 1, "the change must hit a row"


def _fill(control) -> None:
    """One row in every guarded table, put there behind the triggers."""
    control.act("INSERT INTO accounts (id, name, plan) VALUES (gen_random_uuid(), 'a', 'p')")
    control.act(
        "INSERT INTO resources (id, account_id, name, kind, config) "
        "SELECT gen_random_uuid(), id, 'shop', 'postgres', '{}' FROM accounts"
    )
    control.act(
        "INSERT INTO credentials (resource_id, field, version, account_id, envelope, fingerprint) "
        "SELECT id, 'password', 1, account_id, 'SY', '' FROM resources"
    )
    control.act(
        "INSERT INTO dead_logins SELECT id, account_id, gen_random_uuid(), '{}' FROM resources"
    )
    control.act(
        "INSERT INTO connections (id, account_id, name, source_id, destination_id, target_schema) "
        "SELECT gen_random_uuid(), account_id, 'c', id, id, 's' FROM resources"
    )
    control.act(
        "INSERT INTO schedules (connection_id, account_id, source_id, destination_id, kind) "
        "SELECT id, account_id, source_id, destination_id, 'manual' FROM connections"
    )
    control.act(
        "INSERT INTO active_runs (subject_id, run_id, account_id, kind, state, trigger, "
        "scheduled_for, priority) SELECT id, gen_random_uuid(), account_id, 'sync', 'queued', "
        "'manual', now(), 5 FROM connections"
    )
    control.act(
        "INSERT INTO keystore.root (id, purpose, provider, state, canary) "
        "VALUES (gen_random_uuid(), 'records', 'file', 'active', '')"
    )


def test_an_event_for_another_row_does_not_count(control):
    with pytest.raises(DBAPIError, match="unaudited"):
        _create_with_event_for(control, new_id(), new_id(), keep=True)


def _create_with_event_for(control, account, target, *, keep: bool) -> None:
    event = AuditEvent(
        AuditAction.ACCOUNT_CREATED, TargetKind.ACCOUNT, target, OPERATOR, detail={"plan": "p"}
    )
    with control.admin_engine().begin() as tx:
        tx.execute(
            text("INSERT INTO accounts (id, name, plan) VALUES (:id, 'x', 'p')"), {"id": account}
        )
        savepoint = tx.begin_nested()
        audit.append(tx, event)
        savepoint.commit() if keep else savepoint.rollback()


def test_an_event_in_a_released_savepoint_counts(control):
    account = new_id()
    _create_with_event_for(control, account, account, keep=True)
    assert control.one("SELECT count(*) FROM accounts") == 1


def test_an_event_in_a_rolled_back_savepoint_does_not_count(control):
    account = new_id()
    with pytest.raises(DBAPIError, match="unaudited"):
        _create_with_event_for(control, account, account, keep=False)


def test_the_database_stamps_who_and_hashes_what(control):
    with transaction(control.engine("operator")) as tx:
        accounts.create(tx, "acme", company="", plan="standard", principal=OPERATOR)
        event = audit_tail.newest(tx, audit_tail.Filters(), 1)[-1]
    assert (event.login, event.client) == ("dev", "127.0.0.1")
    at = control.one(
        "SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') "
        "FROM audit.event WHERE seq = :seq",
        seq=event.seq,
    )
    fields = (
        *("syncward/audit/v1", at, event.account_id, event.class_, event.action),
        *(event.target_kind, event.target_id, event.login, event.client, event.body),
    )
    parts = [str("" if f is None else f).encode() for f in fields]
    encoded = b"".join(b"%d:%s," % (len(p), p) for p in parts)
    assert event.leaf == hashlib.sha256(b"\x00" + encoded).digest()


_INSERT = "INSERT INTO audit.event (class, action, target_kind, target_id, body"
_VALUES = "VALUES ('A', 'a', 'run', gen_random_uuid(), '{}'"


@pytest.mark.parametrize("process", ["scheduler", "worker", "operator"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit.event SET body = 'x'",
        "DELETE FROM audit.event",
        "TRUNCATE audit.event",
        f"{_INSERT}, at) {_VALUES}, now() - interval '1 d')",
        f"{_INSERT}, login) {_VALUES}, 'somebody')",
        "ALTER TABLE audit.event DISABLE TRIGGER ALL",
        "SET session_replication_role = replica",
        "SELECT wrapped FROM keystore.dek UNION ALL SELECT envelope FROM credentials",
    ],
)
def test_no_process_may_change_the_audit_log_or_read_sealed_bytes(control, process, statement):
    with pytest.raises(ConfigError, match=r"permission denied|must be owner"):
        _execute(control, process, statement)


def _execute(control, process: str, statement: str) -> None:
    with transaction(control.engine(process)) as tx:
        tx.execute(text(statement))


@pytest.mark.parametrize("verb", ["DELETE FROM", "TRUNCATE"])
@pytest.mark.parametrize("partition", ["event", "this month"])
def test_even_the_owner_cannot_delete_events(control, partition, verb):
    if partition == "this month":
        partition = control.one(
            "SELECT relname FROM pg_class WHERE relname LIKE 'event_2%' ORDER BY relname LIMIT 1"
        )
    statement = f"SET LOCAL ROLE syncward_owner; {verb} audit.{partition}"
    with pytest.raises(DBAPIError, match="append-only"):
        control.act_plainly(statement)


def test_an_account_sees_only_its_own_rows(control):
    with transaction(control.engine("operator")) as tx:
        ids = [
            accounts.create(tx, n, company="", plan="standard", principal=OPERATOR).account_id
            for n in ("one", "two")
        ]
    control.act(
        "INSERT INTO resources (id, account_id, name, kind, config) "
        "SELECT gen_random_uuid(), id, 'r-' || name, 'postgres', '{}' FROM accounts"
    )
    for process in ("operator", "worker"):
        with transaction(control.engine(process)) as tx:
            names = text("SELECT name FROM resources ORDER BY name")
            assert tx.execute(names).scalars().all() == []
            tenancy.enter(tx, ids[0])
            assert tx.execute(names).scalars().all() == ["r-one"]
            tenancy.enter(tx, ids[1])
            assert tx.execute(names).scalars().all() == ["r-two"]


def test_a_row_cannot_be_written_into_another_account(control):
    with transaction(control.engine("operator")) as tx:
        one, two = (
            accounts.create(tx, n, company="", plan="standard", principal=OPERATOR).account_id
            for n in ("one", "two")
        )
    statement = (
        "INSERT INTO resources (id, account_id, name, kind, config) "
        "VALUES (gen_random_uuid(), :other, 'r', 'postgres', '{}')"
    )
    with pytest.raises(ConfigError, match="row-level security"):
        _insert_elsewhere(control, one, two, statement)


def _insert_elsewhere(control, one, two, statement) -> None:
    with transaction(control.engine("operator")) as tx:
        tenancy.enter(tx, one)
        tx.execute(text(statement), {"other": two})


def test_the_owner_sees_every_row_despite_forced_security(control):
    _fill(control)
    with control.admin_engine().begin() as tx:
        tx.execute(text("SET LOCAL ROLE syncward_owner"))
        assert tx.execute(text("UPDATE resources SET kind = kind")).rowcount == 1


def test_partitions_are_made_three_months_ahead_and_only_once(control):
    with transaction(control.engine("scheduler")) as tx:
        assert tx.execute(text("SELECT ensure_partitions()")).all() == []
        made = tx.execute(text("SELECT ensure_partitions(5)")).scalars().all()
    assert len(made) == 2 * 5
    assert control.one("SELECT count(*) FROM pg_inherits") >= 6 * 5


def test_a_row_from_a_clock_that_is_ahead_keeps_no_other_partition_from_being_made(control):
    """It lies in the default partition; its table's month stays there, all others are made."""
    month = "date_trunc('month', now(), 'UTC') + interval '5 months'"
    control.act(
        "INSERT INTO run_logs (account_id, run_id, at, level, message) VALUES "
        f"(gen_random_uuid(), gen_random_uuid(), {month} + interval '1 day', 'info', 'x')"
    )
    with transaction(control.engine("scheduler")) as tx:
        made = tx.execute(text("SELECT ensure_partitions(5)")).scalars().all()
        again = tx.execute(text("SELECT ensure_partitions(5)")).scalars().all()
    last = control.one(f"SELECT to_char(({month}) AT TIME ZONE 'UTC', 'YYYYMM')")
    assert sorted(name for name in made if name.endswith(str(last))) == [
        f"{table}_{last}" for table in ("api_calls", "event", "runs", "slots")
    ]
    assert (len(made), again) == (2 * 5 - 1, [])


def test_an_unreachable_database_is_named_with_the_next_step():
    engine = open_engine("postgresql://x:secret-word@127.0.0.1:1/none", "operator")
    with pytest.raises(TransientError, match=r"127\.0\.0\.1:1/none: not reachable") as caught:
        _touch(engine)
    assert "secret-word" not in str(caught.value)


def test_a_wrong_password_and_a_missing_database_are_told_apart(control):
    refused = open_engine(control.url.replace(control.password, "wrong"), "operator")
    with pytest.raises(ConfigError, match="login dev was refused"):
        _touch(refused)
    missing = open_engine(control.url + "_gone", "operator")
    with pytest.raises(ConfigError, match="no such database"):
        _touch(missing)


def _touch(engine) -> None:
    with transaction(engine) as tx:
        tx.execute(text("SELECT 1"))


def test_a_database_that_was_never_migrated_says_what_to_type(cluster, admin):
    admin.execute("CREATE DATABASE empty_control")
    url = (
        f"postgresql://{cluster.superuser}:{cluster.password}@{cluster.host}:{cluster.port}"
        "/empty_control"
    )
    engine = open_engine(url, "operator")
    with pytest.raises(ConfigError, match="syncward db upgrade"):
        _list(engine)
    engine.dispose()
    admin.execute("DROP DATABASE empty_control WITH (FORCE)")


def _list(engine) -> None:
    with transaction(engine) as tx:
        accounts.listing(tx)
