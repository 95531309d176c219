"""Names of operators: an erasure has its event, a first use waits for nobody, all are bounded."""

import json
import time

import pytest
from sqlalchemy import text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.audit_body import NAME_MAX
from schemas.errors import ConfigError
from storage import audit, audit_names
from storage.engine import transaction

pytestmark = pytest.mark.integration

ADA, GRACE = Principal("operator", "ada"), Principal("operator", "grace")


def act(control, who: Principal) -> str:
    """One event of somebody; return the id that it carries."""
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, reading(who))
    return str(control.one("SELECT id FROM audit.principal WHERE name = :name", name=who.name))


def reading(who: Principal) -> AuditEvent:
    return AuditEvent(
        AuditAction.INSTANCE_READ, TargetKind.INSTANCE, audit.INSTANCE_ID, who, reason="x"
    )


def unsaid(control) -> list[str]:
    with transaction(control.engine("auditor")) as tx:
        return audit_names.unsaid(tx)


def erase_past_triggers(control) -> None:
    control.act_plainly(
        "ALTER TABLE audit.principal DISABLE TRIGGER ALL; UPDATE audit.principal SET name = NULL, "
        "salt = NULL, erased_at = clock_timestamp() WHERE name = 'ada'; "
        "ALTER TABLE audit.principal ENABLE TRIGGER ALL"
    )


def test_an_erasure_by_a_command_is_said(control):
    act(control, ADA)
    with transaction(control.engine("operator")) as tx:
        erased = audit_names.erase(tx, "ada", reason="left", principal=GRACE)
    with transaction(control.engine("auditor")) as tx:
        assert audit_names.findings(tx) == []
        assert erased not in audit_names.names(tx)


def test_an_erasure_without_an_event_is_found(control):
    known = act(control, ADA)
    erase_past_triggers(control)
    with transaction(control.engine("auditor")) as tx:
        assert audit_names.findings(tx) == [
            f"operator:{known} has no name any more, and no event of an erasure says why"
        ]


def body(**changed: object) -> str:
    """What the command would write, but for what changed."""
    said = {
        "detail": {"principal": "ADA"}, "outcome": "success", "principal": "operator:GRACE",
        "reason": "x", "v": 2,
    }  # fmt: skip
    return json.dumps(said | changed, sort_keys=True, separators=(",", ":"))


FAKED = {
    "no JSON": "[",
    "deep": "[" * 30_000,
    "other bytes": json.dumps(json.loads(body())),
    "somebody else's": body(detail={"principal": "0" * 32}),
    "by itself": body(principal="operator:ADA"),
    "by nobody": body(principal="operator:" + "0" * 32),
    "by a worker": body(principal="worker:w1"),
    "without a reason": body(reason=""),
    "refused": body(outcome="denied"),
}


@pytest.mark.parametrize("how", FAKED)
def test_an_erasure_by_hand_with_an_event_that_the_command_does_not_write_is_found(control, how):
    ada, grace = act(control, ADA), act(control, GRACE)
    erase_past_triggers(control)
    control.act(
        "INSERT INTO audit.event (class, action, target_kind, target_id, body) VALUES ('A', "
        "'subject.erased', 'instance', :target, :body)",
        target=audit.INSTANCE_ID, body=FAKED[how].replace("ADA", ada).replace("GRACE", grace),
    )  # fmt: skip
    assert unsaid(control) == [ada]


def test_the_event_that_the_command_writes_is_the_measure_of_these(control):
    ada, grace = act(control, ADA), act(control, GRACE)
    erase_past_triggers(control)
    control.act(
        "INSERT INTO audit.event (class, action, target_kind, target_id, body) VALUES ('A', "
        "'subject.erased', 'instance', :target, :body)",
        target=audit.INSTANCE_ID, body=body().replace("ADA", ada).replace("GRACE", grace),
    )  # fmt: skip
    assert unsaid(control) == []


def test_an_operator_does_not_erase_a_name_under_that_name(control):
    ada = act(control, ADA)
    said = json.dumps({"detail": {"principal": ada}, "principal": f"operator:{ada}"})
    with (  # noqa: PT012 - one transaction
        pytest.raises(ConfigError, match="unaudited erasure"),
        transaction(control.engine("operator")) as tx,
    ):
        tx.execute(text("SELECT audit.erase_name('operator', 'ada')"))
        tx.execute(
            text(
                "INSERT INTO audit.event (class, action, target_kind, target_id, body) "
                "VALUES ('A', 'subject.erased', 'instance', :target, :body)"
            ),
            {"target": audit.INSTANCE_ID, "body": said},
        )


def test_months_that_were_pruned_need_no_event(control):
    act(control, ADA)
    erase_past_triggers(control)
    assert unsaid(control)
    control.act(
        "INSERT INTO audit.prune (id, state, before, first_kept, also, sha256, requested_by, "
        "request_seq, request_at, approved_by, approval_seq, record_seq) VALUES "
        "(gen_random_uuid(), 'done', now() + interval '1 second', 1, '{}', repeat('0', 64), 'a', "
        "1, now(), 'b', 2, 3)"
    )
    assert unsaid(control) == []


def test_a_first_use_waits_for_no_transaction_that_stays_open(control):
    with transaction(control.engine("operator")) as slow:
        audit.append(slow, reading(ADA))
        started = time.monotonic()
        with transaction(control.engine("auditor")) as quick:
            audit.append(
                quick,
                AuditEvent(AuditAction.AUDIT_READ, TargetKind.INSTANCE, audit.INSTANCE_ID, ADA,
                           detail={"events": 1}),
            )  # fmt: skip
        assert time.monotonic() - started < 4, "it waited as for a lock"
    assert control.one("SELECT count(*) FROM audit.principal WHERE name = 'ada'") == 2
    used = act_again(control)
    with transaction(control.engine("operator")) as tx:
        erased = audit_names.erase(tx, "ada", reason="left", principal=GRACE)
    assert len(erased.split(",")) == 2
    assert used in erased
    assert unsaid(control) == []
    assert control.one("SELECT count(*) FROM audit.principal WHERE name = 'ada'") == 0


def act_again(control) -> str:
    with transaction(control.engine("operator")) as tx:
        return str(tx.execute(text("SELECT audit.principal_of('operator', 'ada')")).scalar_one())


def test_a_name_that_no_index_takes_is_refused_before_and_in_the_database(
    world, shell, monkeypatch
):
    monkeypatch.setenv("LOGNAME", "é" * (NAME_MAX // 2))
    assert shell("account", "create", "longest")[0] == 0
    monkeypatch.setenv("LOGNAME", "é" * (NAME_MAX // 2) + "x")
    code, _, err = shell("account", "create", "longer")
    assert code == 1
    assert "longer than 1,024 bytes" in err
    with pytest.raises(Exception, match="longer than 1024 bytes"):
        world.control.act("SELECT audit.principal_of('operator', repeat('x', 1025))")
    with pytest.raises(Exception, match="principal_name_check"):
        world.control.act(
            "INSERT INTO audit.principal (id, kind, name, salt) SELECT audit.principal_id("
            "'operator', n, s), 'operator', n, s FROM repeat('x', 1025) n, sha256('') s"
        )
