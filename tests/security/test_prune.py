"""T41: months of the audit log go with proof, by two logins, and what is left says so."""

import json
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from shutil import copytree
from uuid import uuid4

import pytest
from sqlalchemy.exc import DBAPIError

from audit import prune as rules
from audit import statement
from audit.prune import PruneRefused
from crypto import signing
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from schemas.errors import SyncwardError
from storage import audit, audit_tail, prune, sealing
from storage.audit_tail import Filters
from storage.engine import transaction
from tests import old_months
from tests.old_months import ALL, approve, partitions
from tests.sealed_log import SealedLog
from tests.world import Pair

pytestmark = pytest.mark.integration

SEALER = Principal("sealer", "test")


@pytest.fixture(scope="module")
def months(cluster, admin, template, tmp_path_factory):
    """The log that each test gets a copy of."""
    files = tmp_path_factory.mktemp("sealer") / "audit"
    with old_months.made(cluster, admin, template, files) as made:
        yield made


@pytest.fixture
def control(months, admin):
    with months.copied(admin) as copy:
        yield copy


@pytest.fixture
def pair(cluster):
    """No test here syncs anything."""
    return Pair(cluster, "none", "none", {})


@pytest.fixture
def old(world, months):
    """Events of three old months in partitions of their own, sealed."""
    months.key_to(world.directory)
    return world


@pytest.fixture
def second(old, months):
    """The command line of another operator."""
    with months.other_operator(old.control, old.cli.settings) as cli:
        yield cli


def export(world, directory: Path) -> Path:
    """Write all sealed events as docs/verify.md has it: log.json, events, SHA256SUMS."""
    (directory / "events").mkdir(parents=True)
    with world.cli.auditing() as tx:
        state = sealing.state(tx)
        page = audit_tail.following(tx, Filters(), begin=0, limit=10_000)
    found = [(event.index, event) for event in page.events]
    files = {"log.json": json.dumps({"log_id": str(state.log_id), "first": 0, "size": state.size})}
    lines = [
        json.dumps(
            {
                "index": index, "seq": e.seq, "at": f"{e.at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z",
                "account_id": e.account_id and str(e.account_id), "class": e.class_,
                "action": e.action, "target_kind": e.target_kind, "target_id": str(e.target_id),
                "login": e.login, "client": e.client, "body": e.body, "leaf": e.leaf.hex(),
            }
        )
        for index, e in found
    ]  # fmt: skip
    files["events/000000000000.jsonl"] = "\n".join(lines) + "\n"
    write(directory, files)
    return directory


def write(directory: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (directory / name).write_text(content)
    sums = [
        f"{sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory)}"
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "SHA256SUMS"
    ]
    (directory / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def ask(world, shell, before="2024-03-01", name="export"):
    directory = world.directory / name
    if not directory.exists():
        export(world, directory)
    code, out, err = shell(
        "audit", "prune", "--before", before, "--export", str(directory), "--json"
    )
    assert code == 0, err
    return json.loads(out)["request"]


def step(world):
    return rules.step(world.control.engine("sealer"), world.sealer().signer, SEALER)


def publish(world):
    size = world.seal_all()
    with transaction(world.control.engine("sealer")) as tx:
        sealing.published(tx, size)


def told(world, action):
    found = world.control.all(
        "SELECT body FROM audit.event WHERE action = :action ORDER BY seq", action=action
    )
    return [json.loads(body) for (body,) in found]


def test_two_logins_and_a_published_record_drop_months_and_nothing_else(old, shell, second):
    request = ask(old, shell)
    assert step(old) is False
    approve(second, request)
    assert step(old) is False  # not sealed yet
    old.seal_all()
    assert step(old) is True
    assert step(old) is False  # the record is not sealed
    size = old.seal_all()
    assert step(old) is False  # nor published
    assert partitions(old.control) == ALL
    publish(old)
    assert step(old) is True
    assert partitions(old.control) == {"event_202403"}
    assert step(old) is False

    (record,) = told(old, "audit.pruned")
    detail = record["detail"]
    assert (detail["before"], detail["first_kept"], detail["also"]) == ("2024-03-01", 8, "10")
    assert detail["partitions"] == "event_202401, event_202402"
    assert detail["approved_by"].startswith("second_")
    assert detail["requested_by"] == "dev"
    directory = old.directory / "export"
    assert detail["sha256"] == sha256((directory / "SHA256SUMS").read_bytes()).hexdigest()
    assert told(old, "partitions.dropped")[-1]["detail"]["partitions"] == detail["partitions"]
    with transaction(old.control.engine("sealer")) as tx:
        log_id = sealing.state(tx).log_id
        (point,) = sealing.checkpoints(tx, after=detail["size"] - 1, most=1)
        page = audit_tail.following(tx, Filters(), begin=0, limit=10_000)
    assert (point.size, point.root.hex()) == (detail["size"], detail["root"])
    assert statement.is_signed(log_id, "audit.pruned", detail, old.sealer().signer.public)
    gone = set(range(size)) - {event.index for event in page.events}
    assert gone == set(range(detail["first_kept"])) | {int(detail["also"])}


def test_a_later_prune_needs_no_export_of_what_is_gone(old, shell, second):
    for before, name in (("2024-02-01", "one"), ("2024-04-01", "two")):
        request = ask(old, shell, before, name)
        approve(second, request)
        publish(old)
        assert step(old)
        publish(old)
        assert step(old)
    assert partitions(old.control) == set()
    assert [r["detail"]["partitions"] for r in told(old, "audit.pruned")] == [
        "event_202401", "event_202402, event_202403",
    ]  # fmt: skip


def test_the_login_that_asked_may_not_approve_and_that_is_told(old, shell):
    request = ask(old, shell)
    code, _, err = shell("audit", "prune", "--approve", request)
    assert (code, "somebody else must" in err) == (1, True)
    (denied,) = told(old, "audit.prune_approved")
    assert (denied["outcome"], denied["reason"]) == ("denied", "same_login")
    publish(old)
    assert step(old) is False
    assert partitions(old.control) == ALL


def test_nobody_approves_what_was_not_asked_or_was_asked_anew(old, shell, second):
    first = ask(old, shell)
    ask(old, shell, "2024-02-01")
    for request, reason in ((first, "not_open"), (uuid4(), "unknown")):
        with pytest.raises(PruneRefused):
            approve(second, request)
        assert told(old, "audit.prune_approved")[-1]["reason"] == reason


def test_only_whole_months_are_asked_for(old, shell):
    for before in ("2024-03-02", "2024-3", "soon"):
        code, _, err = shell("audit", "prune", "--before", before, "--export", str(old.directory))
        assert (code, "--before" in err) == (1, True), before


def test_young_months_stay(old, shell):
    this = f"{datetime.now(UTC):%Y-%m}-01"
    code, _, err = shell("audit", "prune", "--before", this, "--export", str(old.directory))
    assert (code, "31 days" in err) == (1, True)


def damaged(directory: Path, how: str) -> None:  # noqa: C901 - one branch for each
    events = directory / "events" / "000000000000.jsonl"
    lines = events.read_text().splitlines()
    if how == "a line is missing":
        del lines[3]
    elif how == "a late one is missing":
        del lines[10]
    elif how == "a body was changed":
        lines[2] = lines[2].replace("operator:old", "operator:new")
    elif how == "a leaf fits a changed body":
        said = json.loads(lines[2])
        said["body"] = said["body"].replace("old", "new")
        lines[2] = json.dumps(said)
    elif how == "of another log":
        write(directory, {"log.json": json.dumps({"log_id": str(uuid4())})})
    write(directory, {"events/000000000000.jsonl": "\n".join(lines) + "\n"})
    if how == "not what the sums say":
        events.write_text(events.read_text() + "\n")
    elif how == "without sums":
        (directory / "SHA256SUMS").unlink()
    elif how == "a file is not named":
        (directory / "events" / "000000000009.jsonl").write_text("{}\n")
    elif how == "a file is gone":
        events.unlink()
    elif how == "names a file outside":
        with (directory / "SHA256SUMS").open("a") as file:
            file.write(f"{'0' * 64}  x/../../../etc/passwd\n")


DAMAGES = (
    "a line is missing", "a late one is missing", "a body was changed",
    "a leaf fits a changed body", "of another log", "not what the sums say", "without sums",
    "a file is not named", "a file is gone", "names a file outside",
)  # fmt: skip


def test_an_export_that_does_not_hold_it_all_is_refused(old, shell):
    export(old, old.directory / "whole")
    for how in DAMAGES:
        directory = old.directory / how.replace(" ", "_")
        copytree(old.directory / "whole", directory)
        damaged(directory, how)
        code, _, err = shell("audit", "prune", "--before", "2024-03-01", "--export", str(directory))
        assert (code, err.startswith("syncward: audit: ")) == (1, True), (how, err)
    assert told(old, "audit.prune_requested") == []
    ask(old, shell, name="whole")  # and it was the damage


def test_a_log_that_was_changed_is_not_pruned(old, shell):
    directory = export(old, old.directory / "export")
    old.control.act_plainly("ALTER TABLE audit.event_202401 DISABLE TRIGGER ALL")
    old.control.act(
        "UPDATE audit.event SET leaf = sha256('x') WHERE seq = "
        "(SELECT min(seq) FROM audit.event_202401)"
    )
    code, _, err = shell("audit", "prune", "--before", "2024-03-01", "--export", str(directory))
    assert (code, "is not what was sealed" in err) == (1, True)


# ── past the rules: a superuser, and whoever may insert events ───────────────────────────────────


def test_a_row_that_says_approved_without_an_event_drops_nothing(old, shell):
    ask(old, shell)
    publish(old)
    old.control.act(
        "UPDATE audit.prune SET state = 'approved', approved_by = 'somebody', approval_seq = 1, "
        "approval_at = now()"
    )
    with pytest.raises(PruneRefused, match="no event says so"):
        step(old)
    assert partitions(old.control) == ALL


def test_an_approval_of_the_same_login_that_is_renamed_in_the_row_drops_nothing(old, shell):
    request = ask(old, shell)
    with old.cli.transaction() as tx:
        audit.append(tx, AuditEvent(AuditAction.AUDIT_PRUNE_APPROVED, TargetKind.INSTANCE,
                                    audit.INSTANCE_ID, old.cli.principal,
                                    detail={"request": request}))  # fmt: skip
    publish(old)
    old.control.act(
        "UPDATE audit.prune SET state = 'approved', approved_by = 'somebody', "
        "approval_seq = e.seq, approval_at = e.at FROM audit.event e "
        "WHERE e.action = 'audit.prune_approved'"
    )
    with pytest.raises(PruneRefused, match="dev asked and approved"):
        step(old)


def test_a_request_that_was_changed_after_its_approval_drops_nothing(old, shell, second):
    approve(second, ask(old, shell))
    publish(old)
    (row,) = old.control.all("SELECT first_kept, sha256, before, also FROM audit.prune")
    for change, why in (
        ("first_kept = 11", "its events say something else"),
        ("sha256 = repeat('0', 64)", "its events say something else"),
        ("before = '2024-04-01 00\\:00+00'", "its events say something else"),
        ("also = '{}'", "its events say something else"),
        ("also = '{9}'", "would not drop what was asked for"),
    ):
        old.control.act(f"UPDATE audit.prune SET {change}")
        with pytest.raises(PruneRefused, match=why):
            step(old)
        old.control.act(
            "UPDATE audit.prune SET first_kept = :first, sha256 = :sha, before = :before, "
            "also = :also", first=row[0], sha=row[1], before=row[2], also=row[3],
        )  # fmt: skip
    assert partitions(old.control) == ALL
    assert step(old)  # and it was the changes


def test_a_record_that_the_sealer_did_not_sign_drops_nothing(old, shell, second):
    request = ask(old, shell)
    approve(second, request)
    with transaction(old.control.engine("sealer")) as tx:  # its login, without its key
        audit.append(tx, AuditEvent(AuditAction.AUDIT_PRUNED, TargetKind.INSTANCE,
                                    audit.INSTANCE_ID, Principal("sealer", "s"),
                                    detail={
                                        "request": request, "before": "2024-03-01", "also": "",
                                        "first_kept": 1, "size": 1, "root": "", "sha256": "",
                                        "partitions": "", "approved_by": "a", "requested_by": "b",
                                        "signature": "",
                                    }))  # fmt: skip
    publish(old)
    old.control.act(
        "UPDATE audit.prune SET state = 'recorded', record_seq = e.seq, record_at = e.at "
        "FROM audit.event e WHERE e.action = 'audit.pruned'"
    )
    with pytest.raises(PruneRefused, match="its record is not ours"):
        step(old)
    assert partitions(old.control) == ALL


PROCESSES = ("operator", "scheduler", "worker", "auditor", "sealer")
FORBIDDEN = (
    "UPDATE audit.prune SET state = 'approved'", "DELETE FROM audit.prune",
    "INSERT INTO audit.prune (id) VALUES (gen_random_uuid())", "DROP TABLE audit.event_202401",
)  # fmt: skip


@pytest.mark.parametrize("process", PROCESSES)
def test_no_process_changes_requests_or_drops_months_itself(old, process):
    engine = old.control.engine(process)
    for forbidden in FORBIDDEN:
        with (
            pytest.raises(DBAPIError, match=r"permission denied|must be owner"),
            engine.begin() as tx,
        ):
            tx.exec_driver_sql(forbidden)


def test_the_database_itself_asks_for_record_publication_and_another_login(old, shell, second):
    """The sealer's own checks left out: what its role may call."""
    request = ask(old, shell)
    engine = old.control.engine("sealer")
    with pytest.raises(DBAPIError, match="is not recorded"), engine.begin() as tx:
        prune.carry_out(tx, request)
    with pytest.raises(DBAPIError, match="unaudited"), engine.begin() as tx:
        prune.record(tx, request)
    approve(second, request)
    publish(old)
    assert step(old)
    with pytest.raises(DBAPIError, match="not sealed and published"), engine.begin() as tx:
        prune.carry_out(tx, request)
    publish(old)
    old.control.act("UPDATE audit.prune SET request_seq = 1")
    with pytest.raises(DBAPIError, match="not approved by another login"), engine.begin() as tx:
        prune.carry_out(tx, request)
    assert partitions(old.control) == ALL


def test_a_request_or_an_approval_without_its_event_is_refused(old, shell, second):
    request = ask(old, shell)
    with pytest.raises(DBAPIError, match="unaudited"), second.engine.begin() as tx:
        prune.approve(tx, request)
    with old.cli.transaction() as tx:
        asked = prune.get(tx, request)
    assert asked is not None
    wanted = prune.Plan(asked.first_kept, asked.also, unsealed=False)
    with pytest.raises(DBAPIError, match="unaudited"), old.cli.engine.begin() as tx:
        prune.request(tx, uuid4(), asked.before, wanted, asked.sha256)


def test_a_partition_that_is_not_the_month_of_its_name_is_not_dropped(old, shell, second):
    request = ask(old, shell)
    approve(second, request)
    publish(old)
    assert step(old)
    publish(old)
    old.control.act_plainly(
        "ALTER TABLE audit.event_202403 RENAME TO event_202399; "
        "ALTER TABLE audit.event_202401 RENAME TO event_202403; "
        "ALTER TABLE audit.event_202399 RENAME TO event_202401"
    )
    bounds = months_of(old)
    with (
        pytest.raises(DBAPIError, match=r"audit\.event_202401 does not hold the month of its name"),
        old.control.engine("sealer").begin() as tx,
    ):
        prune.carry_out(tx, request)
    with pytest.raises(SyncwardError):  # the sealer's step goes the same way
        step(old)
    assert months_of(old) == bounds
    assert [asked.state for asked in requests(old)] == ["recorded"]
    assert told(old, "partitions.dropped") == []


def months_of(world):
    return world.control.all(
        "SELECT relname, pg_get_expr(relpartbound, oid) FROM pg_class "
        "WHERE relname LIKE 'event_2024%' AND relispartition ORDER BY relname"
    )


def requests(world):
    with world.cli.transaction() as tx:
        return prune.requests(tx)


# ── taken back, and a key that was retired ────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["requested", "approved", "recorded"])
def test_what_is_taken_back_is_not_dropped_and_another_may_be_asked_for(old, shell, second, state):
    request = ask(old, shell)
    if state != "requested":
        approve(second, request)
        publish(old)
    if state == "recorded":
        assert step(old)
        publish(old)
    assert [asked.state for asked in requests(old)] == [state]
    code, out, err = shell("audit", "prune", "--withdraw", request)
    assert (code, out.splitlines()) == (0, [f"withdrawn: {request}", "nothing was dropped"]), err
    (asked,) = requests(old)
    assert (asked.state, asked.withdrawn_by) == ("withdrawn", "dev")
    (event,) = told(old, "audit.prune_withdrawn")
    assert (event["outcome"], event["detail"]) == ("success", {"request": request})
    publish(old)
    assert step(old) is False
    assert partitions(old.control) == ALL
    code, _, err = shell("audit", "prune", "--withdraw", request)
    assert (code, "is not open for that" in err) == (1, True)
    assert told(old, "audit.prune_withdrawn")[-1]["reason"] == "not_open"
    code, _, err = shell("audit", "prune", "--withdraw", str(uuid4()))
    assert (code, "there is no such request" in err) == (1, True)

    carry_all_out(old, second, ask(old, shell, name="anew"))
    assert partitions(old.control) == {"event_202403"}
    report = live(old)
    assert (report.exit_code, report.first_bad) == (0, None), report.lines


def test_a_row_that_forgets_that_it_was_taken_back_drops_nothing(old, shell, second):
    request = ask(old, shell)
    approve(second, request)
    assert shell("audit", "prune", "--withdraw", request)[0] == 0
    publish(old)
    old.control.act("UPDATE audit.prune SET state = 'approved'")
    with pytest.raises(PruneRefused, match="an event takes it back"):
        step(old)
    assert partitions(old.control) == ALL


def test_the_database_itself_drops_nothing_that_was_taken_back(old, shell, second):
    request = ask(old, shell)
    approve(second, request)
    publish(old)
    assert step(old)
    publish(old)
    assert shell("audit", "prune", "--withdraw", request)[0] == 0
    old.control.act("UPDATE audit.prune SET state = 'recorded'")
    engine = old.control.engine("sealer")
    with pytest.raises(DBAPIError, match="was withdrawn"), engine.begin() as tx:
        prune.carry_out(tx, request)
    assert partitions(old.control) == ALL


def test_a_withdrawal_needs_its_event_and_an_operator(old, shell, second):
    request = ask(old, shell)
    with pytest.raises(DBAPIError, match="unaudited"), second.engine.begin() as tx:
        prune.withdraw(tx, request)
    for process in ("scheduler", "worker", "auditor", "sealer"):
        engine = old.control.engine(process)
        with pytest.raises(DBAPIError, match="permission denied"), engine.begin() as tx:
            prune.withdraw(tx, request)
    assert [asked.state for asked in requests(old)] == ["requested"]


def rotate(world, *, told_so=True):
    """Give the sealer another key and retire the one before, with the event or without."""
    sealer = world.sealer()  # of the key before
    old_line = sealer.signer.public[0].line
    signing.rotate(sealer.key_path)
    if told_so:
        signer = world.sealer().signer
        with transaction(world.control.engine("sealer")) as tx:
            detail = statement.signed(
                signer, sealing.state(tx).log_id, AuditAction.SIGNER_ROTATED,
                {"before": old_line, "after": signer.public[0].line},
            )  # fmt: skip
            audit.append(tx, AuditEvent(AuditAction.SIGNER_ROTATED, TargetKind.INSTANCE,
                                        audit.INSTANCE_ID, SEALER, detail=detail))  # fmt: skip
        publish(world)
    signing.retire(sealer.key_path)


def test_a_record_whose_key_was_retired_before_the_drop_is_signed_again(old, shell, second):
    log = SealedLog(old.control, old.directory)
    log.pubkey.read_text()  # an auditor keeps the first key
    request = ask(old, shell)
    approve(second, request)
    publish(old)
    assert step(old)
    publish(old)
    first = told(old, "audit.pruned")
    rotate(old)
    assert step(old)  # signs it again, drops nothing yet
    assert partitions(old.control) == ALL
    records = told(old, "audit.pruned")
    assert len(records) == 2
    with transaction(old.control.engine("sealer")) as tx:
        log_id = sealing.state(tx).log_id
    keys = old.sealer().signer.public
    assert [statement.is_signed(log_id, "audit.pruned", r["detail"], keys) for r in records] == [
        False, True,
    ]  # fmt: skip
    same = ("request", "before", "first_kept", "also", "sha256", "partitions", "approved_by")
    assert [first[0]["detail"][x] for x in same] == [records[1]["detail"][x] for x in same]
    assert step(old) is False  # it is not published
    publish(old)
    assert step(old)
    assert partitions(old.control) == {"event_202403"}
    publish(old)
    report = log.live()
    assert (report.exit_code, report.first_bad) == (0, None), report.lines


def test_a_record_of_a_key_that_nothing_introduces_is_taken_back_by_an_operator(old, shell, second):
    request = ask(old, shell)
    approve(second, request)
    publish(old)
    assert step(old)
    publish(old)
    rotate(old, told_so=False)
    with pytest.raises(PruneRefused, match=f"not ours.*--withdraw {request}"):
        step(old)
    directory = export(old, old.directory / "anew")
    words = ("audit", "prune", "--before", "2024-03-01", "--export", str(directory))
    code, _, err = shell(*words)
    assert (code, "--withdraw" in err) == (1, True)
    assert shell("audit", "prune", "--withdraw", request)[0] == 0
    assert shell(*words)[0] == 0
    assert partitions(old.control) == ALL


# ── what is left verifies ────────────────────────────────────────────────────────────────────────


def live(world, *anchors):
    return SealedLog(world.control, world.directory).live(*anchors)


def carry_all_out(world, second, request):
    approve(second, request)
    publish(world)
    assert step(world)
    publish(world)
    assert step(world)
    publish(world)


def verify(shell, monkeypatch, log, *words):
    monkeypatch.setenv("SYNCWARD_AUDIT_PUBLIC_KEY", str(log.pubkey))
    code, out, err = shell("audit", "verify", *map(str, words), "--json")
    return code, json.loads(out) if out else err


def test_after_a_prune_the_rest_verifies_the_export_too_and_together_they_are_all(
    old, shell, second, monkeypatch
):
    log = SealedLog(old.control, old.directory)
    before, then = log.export("export"), log.anchor("then.anchor")
    exported = json.loads((before / "log.json").read_text())["size"]
    log.write(2)
    publish(old)
    ended = log.export("ended", end=exported)  # it says itself that the log was longer
    carry_all_out(old, second, ask(old, shell))
    anchor = log.anchor()
    code, said = verify(shell, monkeypatch, log, "--anchor", anchor)
    assert (code, said["result"]) == (0, "intact"), said
    for directory, held in ((before, then), (ended, then), (ended, anchor)):
        words = ("--export", directory, "--pubkey", log.pubkey, "--anchor", held)
        code, out, err = shell("audit", "verify", *map(str, words))
        assert (code, "intact: 12 events" in out) == (0, True), (out, err)
        assert log.standalone(directory, held)[0] == 0
    # one that was all of its day is not all beside what anchors hold since
    assert log.offline(before, anchor).exit_code == log.standalone(before, anchor)[0] == 11
    after = log.export("after")
    assert (log.offline(after, anchor).exit_code, log.standalone(after, anchor)[0]) == (0, 0)
    was, now = hashes(before), hashes(after)
    assert set(was) == set(range(exported))
    assert set(was) - set(now) == {*range(8), 10}
    size = json.loads((after / "log.json").read_text())["size"]
    assert set(was) | set(now) == set(range(size))
    assert all(was[index] == now[index] for index in set(was) & set(now))
    point = log.checkpoint(size)
    assert root_of([(was | now)[index] for index in range(size)]) == point.root


def test_a_further_month_that_somebody_drops_by_hand_is_found(old, shell, second, monkeypatch):
    log = SealedLog(old.control, old.directory)
    carry_all_out(old, second, ask(old, shell))
    assert verify(shell, monkeypatch, log)[0] == 0
    old.control.act_plainly("DROP TABLE audit.event_202403")
    code, said = verify(shell, monkeypatch, log)
    assert (code, said["result"], said["first_bad"]) == (10, "tampered", 8), said
    assert said["counts"]["tampered"] == 3  # 8, 9 and 11


def hashes(directory: Path) -> dict[int, bytes]:
    """Return the leaf hash of each event of an export, by index, made again from its line."""
    lines = [
        json.loads(line)
        for path in sorted(directory.glob("events/*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return {said["index"]: rules._hash(said) for said in lines if "leaf" in said}


def root_of(leaves: list[bytes]) -> bytes:
    """Return the root of RFC 6962 over leaf hashes, as its definition says it."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\x01" + root_of(leaves[:split]) + root_of(leaves[split:])).digest()


# ── killed at each step ──────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """As if the process ended there."""


@pytest.mark.parametrize("place", ["record", "carry_out"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_within_a_step_it_goes_on(  # noqa: PLR0917 - fixtures
    old, shell, second, monkeypatch, place, when
):
    """A transaction that does not commit leaves nothing; the next step does it all."""
    approve(second, ask(old, shell))
    publish(old)
    real = getattr(prune, place)

    def dies(tx, request_id):
        if when == "after":
            real(tx, request_id)
        raise Killed

    if place == "carry_out":
        assert step(old)
        publish(old)
    monkeypatch.setattr(prune, place, dies)
    with pytest.raises(Killed):
        step(old)
    monkeypatch.undo()
    assert partitions(old.control) == ALL
    while partitions(old.control) == ALL:
        step(old)
        publish(old)
    assert len(told(old, "audit.pruned")) == 1
    assert partitions(old.control) == {"event_202403"}


def test_it_is_listed(old, shell, second):
    request = ask(old, shell)
    approve(second, request)
    code, out, _ = shell("audit", "prune", "--list")
    assert code == 0
    assert request in out
    assert "approved" in out
    assert max(map(len, out.splitlines())) <= 80
    with old.cli.auditing() as tx:
        assert len(audit_tail.newest(tx, Filters(actions=("audit.prune_approved",)), 5)) == 1
