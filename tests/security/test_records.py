"""What runs say and leave is stored sealed: workers cannot open it, changes to it are seen."""

from contextlib import contextmanager

import pytest

from cli.apply import make_so
from cli.context import Cli
from schemas.runs import RunKind, RunOptions, RunState
from storage import accounts, connections, resources, runs
from storage.runs import Subject
from tests.world import OPERATOR
from workers.records import write_sealed
from workers.run_log import RunLog

pytestmark = pytest.mark.integration


@pytest.fixture
def ended(world):
    """A world with a run that succeeded."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    run, _ = world.sync()
    assert run.state is RunState.SUCCEEDED
    return world, run.run_id


def test_no_text_of_a_log_stands_in_the_control_database(ended):
    world, run_id = ended
    assert "rows extracted" in world.log(run_id), "the search must know what is there"
    rows = world.control.all("SELECT l::text, encode(envelope, 'escape') FROM run_logs l")
    assert len(rows) >= 3
    assert "rows extracted" not in str(rows)
    assert "keys.created" in world.events()


FIRST = "seq = (SELECT min(seq) FROM run_logs)"
#: What somebody with every right does to stored lines, and what the reader is told.
CHANGES_OF_LINES = {
    "UPDATE run_logs SET envelope = set_byte(envelope, 60, (get_byte(envelope, 60) + 1) % 256) "
    f"WHERE {FIRST}": "cannot be opened",
    f"UPDATE run_logs SET envelope = substr(envelope, 1, length(envelope) - 1) WHERE {FIRST}":
        "cannot be opened",
    f"UPDATE run_logs SET envelope = substr(envelope, 1, 70) WHERE {FIRST}": "cannot be opened",
    f"UPDATE run_logs SET envelope = '' WHERE {FIRST}": "cannot be opened",
    f"UPDATE run_logs SET envelope = NULL WHERE {FIRST}": "cannot be opened",
    f"UPDATE run_logs SET level = 'debug' WHERE {FIRST}": "cannot be opened",
    f"UPDATE run_logs SET at = at + interval '1 us' WHERE {FIRST}": "cannot be opened",
    f"UPDATE run_logs SET run_id = gen_random_uuid() WHERE {FIRST}": "missing",
    f"DELETE FROM run_logs WHERE {FIRST}": "missing",
    "DELETE FROM run_logs WHERE seq = (SELECT max(seq) FROM run_logs)": "missing",
    "DELETE FROM run_logs": "missing",
    "INSERT INTO run_logs (at, run_id, account_id, level, stream, envelope) "
    f"SELECT at, run_id, account_id, level, stream, envelope FROM run_logs WHERE {FIRST}":
        "cannot be opened",
    # two lines change places with all that their contexts bind: only their numbers tell
    "UPDATE run_logs l SET (at, level, stream, envelope) = (o.at, o.level, o.stream, o.envelope) "
    "FROM run_logs o WHERE l.run_id = o.run_id AND l.seq + o.seq = (SELECT min(seq) + max(seq) "
    "FROM run_logs WHERE run_id = l.run_id)": "cannot be opened",
}  # fmt: skip


@contextmanager
def changed(world, table, change):
    """Change a table as superuser, and put everything back afterwards."""
    world.control.act(f"CREATE TABLE kept AS TABLE {table}")
    world.control.act(change)
    yield
    world.control.act(f"DELETE FROM {table}")
    world.control.act(f"INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM kept")
    world.control.act("DROP TABLE kept")


def refusals(world, run_id):
    query = "SELECT class FROM audit.event WHERE action = 'record.refused' AND target_id = :run"
    return world.control.all(query, run=run_id)


def test_a_log_that_somebody_changed_is_an_error_and_one_event(ended, shell):
    world, run_id = ended
    for number, (change, said) in enumerate(CHANGES_OF_LINES.items(), 1):
        with changed(world, "run_logs", change):
            code, _, err = shell("run", "logs", str(run_id), "-A", "acme")
        assert (code, said in err) == (1, True), (change, err)
        assert refusals(world, run_id) == [("A",)] * number, change
        assert shell("run", "logs", str(run_id), "-A", "acme")[0] == 0, "as it was"


def test_an_account_without_its_keys_cannot_be_read(ended, shell):
    world, run_id = ended
    world.control.act("DELETE FROM keystore.dek WHERE purpose = 'records'")
    code, out, _ = shell("run", "logs", str(run_id), "-A", "acme")
    assert code == 1
    assert "its key was deleted" in out


def test_a_workers_host_opens_no_log(ended, shell, monkeypatch):
    world, run_id = ended
    monkeypatch.setenv("SYNCWARD_KEYRING", str(world.directory / "keys" / "worker.json"))
    code, _, err = shell("run", "logs", str(run_id), "-A", "acme")
    assert (code, "operator's host" in err) == (1, True)


@pytest.fixture
def two_accounts(world):
    """A world with two runs of one account and one of another, all alike, and their documents."""
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: replace}"})
    bert = Cli(account="bert")
    bert.__dict__.update(settings=world.cli.settings, engine=world.cli.engine)
    with bert.transaction() as tx:
        accounts.create(tx, "bert", company="", plan="unlimited", principal=OPERATOR)
    document = world.document({"public.t": "{mode: replace}"})
    document.write_text(document.read_text().replace("account: acme", "account: bert"))
    make_so(bert, document, write=True)
    found = {}
    for name, cli, kind in (
        ("first", world.cli, RunKind.SYNC), ("second", world.cli, RunKind.SYNC),
        ("his", bert, RunKind.SYNC), ("found", world.cli, RunKind.DISCOVER),
        ("tested", world.cli, RunKind.TEST), ("his found", bert, RunKind.DISCOVER),
    ):  # fmt: skip
        with cli.inside() as (tx, account, _):
            subject = connections.subject(connections.get(tx, "shop-to-lake"))
            if kind is not RunKind.SYNC:
                end = resources.get(tx, "shop").resource_id
                subject = Subject(end, account.account_id, end)
            found[name] = runs.enqueue(tx, subject, kind, RunOptions(), OPERATOR).run_id
        world.step()
    states = world.control.all("SELECT DISTINCT state FROM runs")
    assert states == [("succeeded",)]
    return world, found


def exchange(world, one, other, columns: str) -> None:
    """Exchange the contents of two runs' first lines, as superuser."""
    values = ", ".join(f"o.{c.strip()}" for c in columns.split(","))
    firsts = (
        "(SELECT min(seq) FROM run_logs WHERE run_id = :one), "
        "(SELECT min(seq) FROM run_logs WHERE run_id = :other)"
    )
    world.control.act(
        f"UPDATE run_logs l SET ({columns}) = ROW({values}) FROM run_logs o "
        f"WHERE l.seq IN ({firsts}) AND o.seq IN ({firsts}) AND l.seq <> o.seq",
        one=one, other=other,
    )  # fmt: skip


@pytest.mark.parametrize("other", ["second", "his"])
def test_lines_exchanged_between_runs_or_accounts_open_for_neither(two_accounts, shell, other):
    """With the columns of the other, or with its own: each place binds account and run."""
    world, run = two_accounts
    for columns in ("envelope", "at, account_id, level, stream, envelope"):
        exchange(world, run["first"], run[other], columns)
        code, out, err = shell("run", "logs", str(run["first"]), "-A", "acme")
        assert code == 1
        assert "cannot be opened" in err or "missing" in err
        assert "attempt 1 begins" not in out, "the line that was exchanged says nothing"
        assert refusals(world, run["first"])[-1] == ("A",)
        exchange(world, run["first"], run[other], columns)
        assert shell("run", "logs", str(run["first"]), "-A", "acme")[0] == 0, "as it was"
    assert len(refusals(world, run["first"])) == 2


ANOTHERS = "UPDATE run_outputs a SET envelope = b.envelope FROM run_outputs b"
#: As above, of documents: of two runs of one account and one of another.
CHANGES_OF_DOCUMENTS = (
    "UPDATE run_outputs SET envelope = substr(envelope, 1, length(envelope) - 1)",
    "UPDATE run_outputs SET envelope = ''",
    "UPDATE run_outputs SET envelope = set_byte(envelope, 60, (get_byte(envelope, 60) + 1) % 256)",
    "UPDATE run_outputs SET envelope = NULL",
    "DELETE FROM run_outputs",
    "UPDATE run_outputs SET envelope = envelope || envelope",
    f"{ANOTHERS} WHERE a.run_id <> b.run_id AND a.account_id = b.account_id",
    f"{ANOTHERS} WHERE a.account_id <> b.account_id",
)


def test_a_document_that_somebody_changed_is_an_error_and_one_event(two_accounts, shell):
    world, run = two_accounts
    for number, change in enumerate(CHANGES_OF_DOCUMENTS, 1):
        for name, word in (("found", "columns"), ("tested", "server_version")):
            with changed(world, "run_outputs", change):
                code, out, err = shell("run", "output", str(run[name]), "-A", "acme")
            assert (code, out) == (1, ""), change
            assert "its output cannot be opened" in err
            assert refusals(world, run[name]) == [("A",)] * number, change
            code, out, _ = shell("run", "output", str(run[name]), "-A", "acme")
            assert (code, word in out) == (0, True), "as it was"


def test_a_run_of_before_the_upgrade_without_lines_is_not_called_changed(ended, shell):
    """Its worker kept lines in clear, or lost them; nothing was sealed at that time."""
    world, run_id = ended
    world.control.act("DELETE FROM run_logs")
    world.control.act("UPDATE keystore.root SET created_at = now() + interval '1 s'")
    assert shell("run", "logs", str(run_id), "-A", "acme")[0] == 0
    world.control.act("UPDATE keystore.root SET created_at = now() - interval '1 day'")
    assert shell("run", "logs", str(run_id), "-A", "acme")[0] == 1


def test_a_clear_line_of_the_version_before_is_shown(ended, shell):
    world, run_id = ended
    world.control.act("UPDATE run_logs SET envelope = NULL, message = 'said by 0.3'")
    code, out, _ = shell("run", "logs", str(run_id), "-A", "acme")
    assert code == 0
    assert out.count("said by 0.3") >= 3
    world.control.act(
        "INSERT INTO run_outputs (run_id, account_id, document) SELECT run_id, account_id, "
        """'{"of": "0.3"}' FROM runs"""
    )
    code, out, _ = shell("run", "output", str(run_id), "-A", "acme", "--json")
    assert (code, '"of": "0.3"' in out) == (0, True)


def test_grep_opens_a_bounded_number_of_lines_and_says_so(ended, shell, monkeypatch):
    world, run_id = ended
    world.control.act("DELETE FROM run_logs")
    with world.cli.inside() as (_, account, _name):
        said = RunLog(world.deps.logs, run_id, account.account_id)
    for n in range(3_000):
        said.info(f"line {n}")
    with world.deps.logs.taken(run_id) as lines:
        assert write_sealed(world.deps.engine, world.deps.records, lines) == []
    monkeypatch.setattr("cli.runs.GREP_MAX", 2_000)
    code, out, err = shell("run", "logs", str(run_id), "-A", "acme", "--grep", "line 2999")
    assert (code, out) == (0, "")
    assert "stopped after 2,000 lines; there may be more" in err
    monkeypatch.setattr("cli.runs.GREP_MAX", 50_000)
    code, out, _ = shell("run", "logs", str(run_id), "-A", "acme", "--grep", "line 2999")
    assert (code, out.count("line 2999")) == (0, 1)
