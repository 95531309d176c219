"""T41: months of the audit log go with proof, by two logins, and what is left says so."""

import json
from contextlib import redirect_stdout
from datetime import UTC, datetime
from hashlib import sha256
from io import StringIO
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from audit import prune as rules
from audit import statement
from audit.prune import PruneRefused
from cli.audit import prune as prune_command
from cli.context import Cli
from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from storage import audit, audit_tail, prune, sealing
from storage.audit_tail import Filters
from storage.engine import open_engine, transaction
from storage.roles import create_login

pytestmark = pytest.mark.integration

SEALER = Principal("sealer", "test")
MONTHS = ("2024-01", "2024-02", "2024-03")
BODY = r'{"detail":{"n"\:%d},"outcome":"success","principal":"operator\:old","v"\:1}'


@pytest.fixture
def old(world):
    """Events of three old months in partitions of their own, sealed, and some of today."""
    steps: list[str] = []
    for month in MONTHS:
        year, number = map(int, month.split("-"))
        name = f"audit.event_{year}{number:02}"
        begin, end = f"{month}-01 00\\:00+00", f"{year}-{number + 1:02}-01 00\\:00+00"
        values = f"FOR VALUES FROM ('{begin}') TO ('{end}')"
        steps += (
            f"CREATE TABLE {name} PARTITION OF audit.event {values}",
            f"ALTER TABLE {name} OWNER TO syncward_owner",
            f"SELECT audit.seal_partition('{name}')",
        )
    for n in range(12):  # a late one of January stands behind the first of March
        month = "2024-01" if n == 10 else MONTHS[n // 4]
        steps.append(
            "INSERT INTO audit.event (at, class, action, target_kind, target_id, body) VALUES "
            f"('{month}-10 00\\:00\\:{n:02}+00', 'A', 'instance.read', 'instance', "
            f"'{audit.INSTANCE_ID}', '{BODY % n}')"
        )
    # what the installation said would be sealed first
    for (part,) in world.control.all("SELECT DISTINCT tableoid::regclass::text FROM audit.event"):
        world.control.act_plainly(
            f"ALTER TABLE {part} DISABLE TRIGGER no_change; DELETE FROM {part}; "
            f"ALTER TABLE {part} ENABLE ALWAYS TRIGGER no_change"
        )
    for step in steps:
        world.control.act_plainly(step)
    world.seal_all()
    return world


@pytest.fixture
def second(old, cluster, admin):
    """The command line of another operator."""
    login = f"second_{uuid4().hex[:8]}"
    password = uuid4().hex
    with old.control.admin_engine().begin() as tx:
        create_login(tx, login, password=password, roles=("operator",))
    url = f"postgresql://{login}:{password}@{cluster.host}:{cluster.port}/{old.control.database}"
    cli = Cli()
    cli.__dict__["settings"] = old.cli.settings
    cli.__dict__["engine"] = open_engine(url, "operator", pool_size=1)
    cli.__dict__["audit_engine"] = open_engine(url, "auditor", pool_size=1)
    yield cli
    cli.close()
    admin.execute(f"REASSIGN OWNED BY {login} TO {cluster.superuser}")
    with psycopg.connect(old.control.admin_url, autocommit=True) as own:
        own.execute(f"DROP OWNED BY {login}")
    admin.execute(f"DROP ROLE {login}")


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


def approve(cli, request):
    with redirect_stdout(StringIO()):  # `shell` reads what it wrote itself
        prune_command._approve(cli, request)


def step(world):
    return rules.step(world.control.engine("sealer"), world.sealer().signer, SEALER)


def publish(world):
    size = world.seal_all()
    with transaction(world.control.engine("sealer")) as tx:
        sealing.published(tx, size)


def partitions(world):
    return {
        name for (name,) in world.control.all(
            "SELECT relname FROM pg_class JOIN pg_inherits ON inhrelid = oid "
            "WHERE inhparent = 'audit.event'::regclass AND relname LIKE 'event_2024%'")
    }  # fmt: skip


def told(world, action):
    found = world.control.all(
        "SELECT body FROM audit.event WHERE action = :action ORDER BY seq", action=action
    )
    return [json.loads(body) for (body,) in found]


ALL = {"event_202401", "event_202402", "event_202403"}


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
    assert partitions(old) == ALL
    publish(old)
    assert step(old) is True
    assert partitions(old) == {"event_202403"}
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
    assert partitions(old) == set()
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
    assert partitions(old) == ALL


def test_nobody_approves_what_was_not_asked_or_was_asked_anew(old, shell, second):
    first = ask(old, shell)
    ask(old, shell, "2024-02-01")
    for request, reason in ((first, "not_open"), (uuid4(), "unknown")):
        with pytest.raises(PruneRefused):
            approve(second, request)
        assert told(old, "audit.prune_approved")[-1]["reason"] == reason


@pytest.mark.parametrize("before", ["2024-03-02", "2024-3", "soon"])
def test_only_whole_months_are_asked_for(old, shell, before):
    code, _, err = shell("audit", "prune", "--before", before, "--export", str(old.directory))
    assert (code, "--before" in err) == (1, True)


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


@pytest.mark.parametrize("how", [
    "a line is missing", "a late one is missing", "a body was changed",
    "a leaf fits a changed body", "of another log", "not what the sums say", "without sums",
    "a file is not named", "a file is gone", "names a file outside",
])  # fmt: skip
def test_an_export_that_does_not_hold_it_all_is_refused(old, shell, how):
    directory = export(old, old.directory / "export")
    damaged(directory, how)
    code, _, err = shell("audit", "prune", "--before", "2024-03-01", "--export", str(directory))
    assert (code, err.startswith("syncward: audit: ")) == (1, True), err
    assert told(old, "audit.prune_requested") == []


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
    assert partitions(old) == ALL


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


@pytest.mark.parametrize("change", [
    "first_kept = 11", "sha256 = repeat('0', 64)", "before = '2024-04-01 00\\:00+00'",
    "also = '{}'", "also = '{9}'",
])  # fmt: skip
def test_a_request_that_was_changed_after_its_approval_drops_nothing(old, shell, second, change):
    approve(second, ask(old, shell))
    publish(old)
    old.control.act(f"UPDATE audit.prune SET {change}")
    with pytest.raises(PruneRefused):
        step(old)
    assert partitions(old) == ALL


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
    assert partitions(old) == ALL


@pytest.mark.parametrize("process", ["operator", "scheduler", "worker", "auditor", "sealer"])
@pytest.mark.parametrize("statement_", [
    "UPDATE audit.prune SET state = 'approved'", "DELETE FROM audit.prune",
    "INSERT INTO audit.prune (id) VALUES (gen_random_uuid())", "DROP TABLE audit.event_202401",
])  # fmt: skip
def test_no_process_changes_requests_or_drops_months_itself(old, process, statement_):
    engine = old.control.engine(process)
    with pytest.raises(DBAPIError, match=r"permission denied|must be owner"), engine.begin() as tx:
        tx.exec_driver_sql(statement_)


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
    assert partitions(old) == ALL


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
    approve(second, ask(old, shell))
    publish(old)
    step(old)
    publish(old)
    old.control.act_plainly(
        "ALTER TABLE audit.event_202403 RENAME TO event_202399; "
        "ALTER TABLE audit.event_202401 RENAME TO event_202403; "
        "ALTER TABLE audit.event_202399 RENAME TO event_202401"
    )
    with pytest.raises(Exception, match=r"does not hold the month|control database"):
        step(old)
    assert len(partitions(old)) == 3


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
    assert partitions(old) == ALL
    while partitions(old) == ALL:
        step(old)
        publish(old)
    assert len(told(old, "audit.pruned")) == 1
    assert partitions(old) == {"event_202403"}


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
