"""What events say and hide, and what happens when they cannot be written (T35, T36, T42)."""

import json
import os
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import pytest
from psycopg import sql
from pydantic import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from cli import key_rotation
from scheduler import ticks
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.audit_body import canonical
from schemas.errors import AuditUnavailable, ConfigError, Conflict, NotFound
from schemas.ids import new_id
from schemas.runs import Outcome, OutcomeKind, RunState
from storage import accounts, audit, audit_names, commitments, reseal, resources
from storage.engine import transaction
from storage.reseal import SealedCredential
from tests.world import OPERATOR
from workers import run_sync
from workers.attempt import Attempt
from workers.run_log import RunLog

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("audit_events")]

STREAMS = {"public.t": "{mode: merge, key: [id], cursor: xmin}"}
WORKER = Principal("worker", "w1")
ODD = "line\nbreak \x1b[31mred | pipe =cmd()\t\x7f\x9b@x \udcff\0 é €"


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE t (id int PRIMARY KEY, v text)",
        "INSERT INTO t SELECT g, 'v' FROM generate_series(1, 25) g",
    )
    return world


def bodies(control, action: str) -> list[dict[str, Any]]:
    found = control.all(
        "SELECT body FROM audit.event WHERE action = :action ORDER BY seq", action=action
    )
    return [json.loads(body) for (body,) in found]


def paused(control, reason: str, principal=OPERATOR):
    """Append one event with a reason that somebody typed."""
    event = AuditEvent(
        AuditAction.INSTANCE_PAUSED, TargetKind.INSTANCE, audit.INSTANCE_ID, principal,
        reason=reason,
    )  # fmt: skip
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, event)


# ── what an event says ───────────────────────────────────────────────────────────────────────


def test_every_body_of_a_life_is_canonical_and_of_version_2(shop):
    shop.apply(STREAMS)
    shop.sync()
    found = [body for (body,) in shop.control.all("SELECT body FROM audit.event")]
    assert len(found) > 10
    for body in found:
        assert canonical(json.loads(body)).decode() == body
        assert json.loads(body)["v"] == 2


def test_a_wrong_detail_is_refused_before_anything_is_asked_of_the_database(control):
    event = AuditEvent(
        AuditAction.INSTANCE_PAUSED, TargetKind.INSTANCE, audit.INSTANCE_ID,
        Principal("operator", "never seen"), detail={"more": 1},
    )  # fmt: skip
    with transaction(control.engine("operator")) as tx, pytest.raises(ValidationError):
        audit.append(tx, event)
    assert control.one("SELECT count(*) FROM audit.principal WHERE name = 'never seen'") == 0


@pytest.mark.parametrize("detail", [
    {"partitions": "x" * 1_000_000}, {"partitions": 1.5}, {"partitions": ["x"]},
    {"partitions": {}}, {"partitions": b"x"}, {"partitions": None},
])  # fmt: skip
def test_a_detail_that_cannot_be_written_is_refused(control, detail):
    event = AuditEvent(
        AuditAction.PARTITIONS_DROPPED, TargetKind.INSTANCE, audit.INSTANCE_ID, WORKER,
        detail=detail,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"more than 65536|validation error"):
        append_as(control, "worker", event)
    assert bodies(control, "partitions.dropped") == []


def append_as(control, process, *events) -> None:
    with transaction(control.engine(process)) as tx:
        audit.append(tx, *events)


def test_odd_texts_are_escaped_and_drive_no_terminal(world, shell):
    paused(world.control, ODD, Principal("operator", ODD))
    event = AuditEvent(
        AuditAction.PARTITIONS_DROPPED, TargetKind.INSTANCE, audit.INSTANCE_ID,
        Principal("worker", ODD), detail={"partitions": ODD},
    )  # fmt: skip
    append_as(world.control, "worker", event)
    written = ODD.replace("\udcff", "\\udcff").replace("\0", "\\x00")
    assert bodies(world.control, "instance.paused")[0]["reason"] == written
    assert bodies(world.control, "partitions.dropped")[0]["detail"] == {"partitions": written}
    assert world.control.one("SELECT count(body::jsonb) FROM audit.event") > 1
    code, out, _ = shell("audit", "tail")
    assert code == 0
    assert not set(out) & {"\x1b", "\x7f", "\x9b", "\t"}
    assert sum("instance.paused" in line for line in out.splitlines()) == 1
    assert all(re.match(r" *(\d+|-) ", line) for line in out.splitlines()), "one line an event"
    code, out, _ = shell("audit", "tail", "--json")
    assert code == 0
    assert out.isascii()
    assert written in [event["body"].get("reason") for event in json.loads(out)]


def test_what_a_person_typed_at_length_is_cut(world):
    paused(world.control, "because " * 100_000)
    assert len(bodies(world.control, "instance.paused")[0]["reason"]) == 2_000


def test_the_events_of_one_command_share_its_request(world, shell):
    world.account()
    assert shell("account", "delete", "acme")[0] == 0
    deleted, shredded = (bodies(world.control, f"account.{w}")[0] for w in ("deleted", "shredded"))
    assert deleted["request"] == shredded["request"]
    assert "request" not in bodies(world.control, "account.created")[0], "no command made it"


# ── names ────────────────────────────────────────────────────────────────────────────────────


def test_an_operator_is_named_apart_from_what_it_did(control):
    paused(control, "one", Principal("operator", "ada"))
    paused(control, "two", Principal("operator", "ada"))
    said = {body["principal"] for body in bodies(control, "instance.paused")}
    (principal,) = said
    kind, _, operator_id = principal.partition(":")
    assert (kind, len(operator_id)) == ("operator", 32)
    assert control.one("SELECT count(*) FROM audit.event WHERE body LIKE '%ada%'") == 0
    with transaction(control.engine("auditor")) as tx:
        assert audit_names.names(tx)[operator_id] == "ada"
        assert audit_names.mismatches(tx) == []


def test_processes_are_named_in_clear(shop):
    shop.apply(STREAMS)
    shop.sync()
    assert bodies(shop.control, "run.started")[0]["principal"] == "worker:w1"
    assert bodies(shop.control, "run.dispatched")[0]["principal"] == "scheduler:test"


def test_a_name_that_two_commands_use_first_is_made_once(control):
    at_once = threading.Barrier(4)

    def act() -> None:
        at_once.wait()
        paused(control, "x", Principal("operator", "grace"))

    threads = [threading.Thread(target=act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies(control, "instance.paused")) == 4
    assert len({body["principal"] for body in bodies(control, "instance.paused")}) == 1
    assert control.one("SELECT count(*) FROM audit.principal WHERE name = 'grace'") == 1


def test_another_name_behind_an_id_is_refused_and_found(control):
    paused(control, "x", Principal("operator", "ada"))
    swap = "UPDATE audit.principal SET name = 'eve' WHERE name = 'ada'"
    with pytest.raises(Exception, match="can only be erased"):
        control.act(swap)
    control.act_plainly("ALTER TABLE audit.principal DISABLE TRIGGER ALL")
    with pytest.raises(Exception, match="violates check constraint"):
        control.act(swap)
    for (name,) in control.all(
        "SELECT conname FROM pg_constraint WHERE conrelid = 'audit.principal'::regclass "
        "AND contype = 'c'"
    ):
        control.act_plainly(f'ALTER TABLE audit.principal DROP CONSTRAINT "{name}"')
    control.act(swap)
    with transaction(control.engine("auditor")) as tx:
        (wrong,) = audit_names.mismatches(tx)
        assert "eve" not in audit_names.names(tx).values()
    assert bodies(control, "instance.paused")[0]["principal"] == f"operator:{wrong}"


def test_an_erased_name_is_gone_and_its_events_stay(world, shell):
    paused(world.control, "x", Principal("operator", "ada"))
    before = world.control.all("SELECT seq, body, leaf FROM audit.event ORDER BY seq")
    code, out, _ = shell("audit", "erase-name", "ada", "--reason", "left", "--json")
    assert code == 0
    erased = json.loads(out)["principal"]
    assert bodies(world.control, "instance.paused")[0]["principal"] == f"operator:{erased}"
    after = world.control.all("SELECT seq, body, leaf FROM audit.event ORDER BY seq")
    assert after[: len(before)] == before
    assert world.control.all(
        "SELECT name, salt FROM audit.principal WHERE id = :id", id=erased
    ) == [(None, None)]
    (event,) = bodies(world.control, "subject.erased")
    assert (event["detail"], event["reason"]) == ({"principal": erased}, "left")
    with transaction(world.control.engine("auditor")) as tx:
        assert erased not in audit_names.names(tx)
        assert audit_names.mismatches(tx) == []
    assert shell("audit", "erase-name", "ada", "--reason", "left")[0] == 1, "there is none now"


def test_nobody_erases_the_own_name_or_one_that_is_not_there(control):
    with transaction(control.engine("operator")) as tx:
        with pytest.raises(Conflict, match="another operator"):
            audit_names.erase(tx, OPERATOR.name, reason="x", principal=OPERATOR)
        with pytest.raises(NotFound, match="nobody: no such name"):
            audit_names.erase(tx, "nobody", reason="x", principal=OPERATOR)


def test_a_name_cannot_be_erased_without_its_event(control):
    paused(control, "x", Principal("operator", "ada"))
    with pytest.raises(ConfigError, match="unaudited erasure"):
        erase_in_silence(control)
    assert control.one("SELECT count(*) FROM audit.principal WHERE name = 'ada'") == 1


def erase_in_silence(control) -> None:
    with transaction(control.engine("operator")) as tx:
        tx.execute(text("SELECT audit.erase_name('operator', 'ada')"))
        audit.append(
            tx,
            AuditEvent(
                AuditAction.SUBJECT_ERASED, TargetKind.INSTANCE, audit.INSTANCE_ID, OPERATOR,
                detail={"principal": "0" * 32},  # somebody else
            ),
        )  # fmt: skip


# ── before and after ─────────────────────────────────────────────────────────────────────────


def test_equal_values_have_equal_commitments_and_nobody_reads_them(control):
    with transaction(control.engine("operator")) as tx:
        one, two = (
            accounts.create(tx, n, company="", plan="standard", principal=OPERATOR).account_id
            for n in ("one", "two")
        )
        there = commitments.changes(tx, one, {"host": "a", "port": 1}, {"host": "b", "port": 1})
        back = commitments.changes(tx, one, {"host": "b"}, {"host": "a", "port": None})
        elsewhere = commitments.changes(tx, two, {"host": "a"}, {"host": "b"})
        other_field = commitments.changes(tx, one, {"name": "a"}, {"name": "b"})
        assert commitments.changes(tx, one, {"host": "a"}, {"host": "a"}) == ()
    assert [c.field for c in there] == ["host"]
    assert (there[0].before, there[0].after) == (back[0].after, back[0].before)
    assert [c.before for c in back if c.field == "port"] == [None], "it was not there"
    every = {c for x in (there, elsewhere, other_field) for c in (x[0].before, x[0].after)}
    assert len(every) == 6
    assert all(len(c) == 32 for c in every if c)


def test_an_update_says_which_fields_changed_and_no_value(shop):
    shop.apply(STREAMS)
    shop.pair.changes["source"] = {"application_name": "hidden-value"}
    with shop.cli.inside() as (tx, account, _):
        found = resources.get(tx, "shop")
        config = {**found.config, "host": "hidden-host", "extra_field": "hidden-value"}
        resources.update_config(tx, account, found, config, OPERATOR)
    shop.pair.changes.clear()
    (updated,) = bodies(shop.control, "resource.updated")
    assert updated["detail"]["changed"] == "extra_field, host"
    assert [c["field"] for c in updated["change"]] == ["extra_field", "host"]
    assert [c["before"] is None for c in updated["change"]] == [True, False]
    assert "hidden" not in json.dumps(updated)


def test_an_updated_connection_says_which_fields_changed_and_no_value(shop):
    shop.apply(STREAMS)
    shop.apply({"public.t": "{mode: merge, key: [id], cursor: id}"}, schedule="{every: 7m}")
    (updated,) = bodies(shop.control, "connection.updated")
    assert updated["detail"] == {"changed": "schedule, streams"}
    assert [c["field"] for c in updated["change"]] == ["schedule", "streams"]
    assert not re.search(r"\b(public\.t|7m|420|cursor)\b", json.dumps(updated))


def test_the_key_of_commitments_goes_with_its_account(world, shell):
    world.account()
    with world.cli.inside() as (tx, account, _):
        commitments.changes(tx, account.account_id, {"a": 1}, {"a": 2})
    assert world.control.one("SELECT count(*) FROM audit.commitment_key") == 1
    assert shell("account", "delete", "acme")[0] == 0
    assert world.control.one("SELECT count(*) FROM audit.commitment_key") == 0


# ── credentials, before and after ────────────────────────────────────────────────────────────


def test_letting_credentials_go_is_recorded_with_the_end_of_the_attempt(shop):
    shop.apply(STREAMS)
    run, _ = shop.sync()
    assert run.state is RunState.SUCCEEDED
    xids = shop.control.all(
        "SELECT DISTINCT xid::text FROM audit.event "
        "WHERE target_id = :id AND action IN ('credential.used', 'run.succeeded')",
        id=run.run_id,
    )
    assert len(xids) == 1
    (used,) = bodies(shop.control, "credential.used")
    assert (used["outcome"], used["run_id"]) == ("success", str(run.run_id))


def test_credentials_that_were_not_taken_there_were_used_without_success(shop):
    shop.apply(STREAMS)
    shop.pair.session("source").execute("ALTER ROLE reader PASSWORD 'another'")
    try:
        run, _ = shop.sync()
    finally:
        shop.pair.session("source").execute(
            f"ALTER ROLE reader PASSWORD '{shop.pair.logins['reader']}'"
        )
    assert run.error_code == "credentials"
    assert [used["outcome"] for used in bodies(shop.control, "credential.used")] == ["error"]


def test_a_run_without_credentials_used_none(shop):
    shop.apply(STREAMS)
    shop.control.act("DELETE FROM credentials")
    run, _ = shop.sync()
    assert run.error_code == "no_credentials"
    assert bodies(shop.control, "credential.used") == []


def to_be_sealed_again(shop, principal) -> list[SealedCredential]:
    shop.apply(STREAMS)
    key_rotation.replace(shop.cli, everybody=False, wait=False)
    ids = [found for (found,) in shop.control.all("SELECT id FROM keystore.dek")]
    with transaction(shop.deps.engine) as tx:
        return list(reseal.take(tx, ids, principal))


def test_the_database_writes_the_same_bytes_where_credentials_are_sealed_again(shop):
    assert len(to_be_sealed_again(shop, Principal("worker", ODD))) == 2
    found = [
        body
        for (body,) in shop.control.all(
            "SELECT body FROM audit.event WHERE action = 'credential.unsealed'"
        )
    ]
    assert len(found) == 2
    for body in found:
        assert canonical(json.loads(body)).decode() == body
        assert json.loads(body)["v"] == 2


def test_what_was_opened_to_be_sealed_again_and_had_changed_is_recorded(shop):
    one = to_be_sealed_again(shop, WORKER)[0]
    assert not shop.key_upkeep()._seal_again(replace(one, envelope=b"an older one"), b"x")
    (used,) = bodies(shop.control, "credential.used")
    assert (used["reason"], used["detail"]["field"]) == ("reseal", one.field)
    assert bodies(shop.control, "credential.resealed") == []


# ── a log that cannot be written ─────────────────────────────────────────────────────────────

_FULL = (
    "CREATE FUNCTION public.full_disk() RETURNS trigger LANGUAGE plpgsql AS "
    "$$BEGIN RAISE EXCEPTION 'full' USING ERRCODE = '53100'; END$$"
)


@contextmanager
def full_disk(control):
    """Postgres says of audit.event what it says when its tablespace is full."""
    with control.admin_engine().begin() as tx:
        tx.execute(text(_FULL))
        tx.execute(
            text(
                "CREATE TRIGGER full_disk BEFORE INSERT ON audit.event FOR EACH ROW "
                "EXECUTE FUNCTION public.full_disk()"
            )
        )
    yield
    with control.admin_engine().begin() as tx:
        tx.execute(text("DROP TRIGGER full_disk ON audit.event"))


def test_with_a_full_audit_log_a_command_does_nothing_and_says_so(world, shell):
    with full_disk(world.control):
        code, out, err = shell("account", "create", "acme", "--json")
        assert code == 1
        assert json.loads(out)["error"]["code"] == "audit_unavailable"
        assert "audit log: it cannot be written (SQLSTATE 53100)" in err
        assert world.control.one("SELECT count(*) FROM accounts") == 0
        assert world.control.one("SELECT count(*) FROM account_queues") == 0
    assert shell("account", "create", "acme")[0] == 0


def test_behind_a_lock_a_command_gives_up_soon(world, shell):
    with world.control.admin_engine().begin() as tx:
        tx.execute(text("LOCK TABLE audit.event"))
        began = monotonic()
        code, out, _ = shell("account", "create", "acme", "--json")
        took = monotonic() - began
    assert code == 1
    assert json.loads(out)["error"]["code"] == "audit_unavailable"
    assert 4 < took < 9, took
    assert world.control.one("SELECT count(*) FROM accounts") == 0


def test_on_a_read_only_database_nobody_changes_anything_or_reads_unseen(world, shell):
    control = world.control
    control.act_plainly(f"ALTER DATABASE {control.database} SET default_transaction_read_only = on")
    control.disconnect()
    for words in (("account", "create", "acme"), ("audit", "tail")):
        code, out, _ = shell(*words, "--json")
        assert (code, json.loads(out)["error"]["code"]) == (1, "audit_unavailable"), words
    event = AuditEvent(
        AuditAction.JOB_REFUSED, TargetKind.INSTANCE, audit.INSTANCE_ID, WORKER,
        detail={"count": 1},
    )  # fmt: skip
    with pytest.raises(AuditUnavailable, match="SQLSTATE 25006"):
        append_as(control, "worker", event)
    assert control.one("SELECT count(*) FROM accounts") == 0


def test_a_run_whose_events_cannot_be_written_stands_still_and_goes_on(shop):
    shop.apply(STREAMS)
    asked = shop.enqueue()
    (job,) = shop.dispatch()
    before = shop.control.one("SELECT count(*) FROM audit.event")
    with full_disk(shop.control):
        with pytest.raises(AuditUnavailable):
            run_sync.execute(job, shop.deps)
        assert shop.control.all("SELECT state, attempt FROM active_runs") == [("dispatched", 0)]
        assert shop.control.one("SELECT count(*) FROM leases") == 0
        assert shop.control.one("SELECT count(*) FROM audit.event") == before
    run_sync.execute(job, shop.deps)
    assert shop.run(asked.run_id).state is RunState.SUCCEEDED
    assert shop.pair.same("t")


def test_an_end_that_cannot_be_written_is_not_lost(shop):
    """The lease runs out, as if the worker had died, and the run comes again."""
    shop.apply(STREAMS)
    shop.sync()
    asked = shop.enqueue()
    (job,) = shop.dispatch()
    claimed = run_sync._claim(job, shop.deps)
    assert claimed is not None
    claim, taken, asked_at = claimed
    with full_disk(shop.control), shop.deps.heartbeat.hold(claim, asked_at) as control:
        log = RunLog(shop.deps.logs, claim.run_id, claim.account_id)
        attempt = Attempt(claim, control, log, shop.deps, taken)
        with pytest.raises(AuditUnavailable):
            run_sync._finish(attempt, Outcome(OutcomeKind.FAILED, "internal", "x"), seconds=0.0)
        assert shop.control.all("SELECT state FROM active_runs") == [("running",)]
        assert shop.control.one("SELECT count(*) FROM leases") == 1
        assert shop.control.one("SELECT count(*) FROM runs") == 1, "the one before"
    shop.expire_leases()
    ticks.reap_tick(shop.scheduler)
    shop.control.act("UPDATE active_runs SET not_before = now()")
    shop.step()
    assert shop.run(asked.run_id).state is RunState.SUCCEEDED
    assert shop.events(asked.run_id).count("run.requeued") == 1


# ── it cannot be left out ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keep", [True, False])
def test_only_an_event_that_stays_lets_a_change_commit(control, keep):
    account = new_id()
    if keep:
        create_with_savepoint(control, account, keep=True)
    else:
        with pytest.raises(ConfigError, match="unaudited"):
            create_with_savepoint(control, account, keep=False)
    assert control.one("SELECT count(*) FROM accounts") == keep


def create_with_savepoint(control, account, *, keep: bool) -> None:
    event = AuditEvent(
        AuditAction.ACCOUNT_CREATED, TargetKind.ACCOUNT, account, OPERATOR, detail={"plan": "p"}
    )
    with transaction(control.engine("operator")) as tx:
        tx.execute(
            text("INSERT INTO accounts (id, name, plan) VALUES (:id, 'x', 'p')"), {"id": account}
        )
        savepoint = tx.begin_nested()
        audit.append(tx, event)
        savepoint.commit() if keep else savepoint.rollback()


# ── a real full disk ─────────────────────────────────────────────────────────────────────────


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs root")
def test_on_a_full_tablespace_a_command_does_nothing_until_somebody_frees_space(
    world, shell, cluster, admin
):
    place = cluster.root / "small_audit"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=True)
    try:
        cluster._own(place)
        (place / "data").mkdir()
        cluster._own(place / "data")
        location = sql.Literal(str(place / "data"))
        admin.execute(sql.SQL("CREATE TABLESPACE small_audit LOCATION {}").format(location))
        month = f"audit.event_{datetime.now(UTC):%Y%m}"
        world.control.act_plainly(f"ALTER TABLE {month} SET TABLESPACE small_audit")
        world.control.act_plainly("CREATE TABLE junk (v text) TABLESPACE small_audit")
        with pytest.raises(OperationalError, match="could not extend"):
            world.control.act("INSERT INTO junk SELECT repeat('x', 1000) FROM generate_series(1, "
                              "9000)")  # fmt: skip
        made = 0
        code, err = 0, ""
        while code == 0 and made < 100:  # the last page of the log takes some
            code, _, err = shell("account", "create", f"a{made}")
            made += code == 0
        assert "audit log: it cannot be written (SQLSTATE 53100)" in err
        assert world.control.one("SELECT count(*) FROM accounts") == made
        created = "SELECT count(*) FROM audit.event WHERE action = 'account.created'"
        assert world.control.one(created) == made
        world.control.act_plainly("DROP TABLE junk")
        assert shell("account", "create", "after")[0] == 0
        world.control.act_plainly(f"ALTER TABLE {month} SET TABLESPACE pg_default")
        admin.execute("DROP TABLESPACE small_audit")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
