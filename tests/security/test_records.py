"""What runs say and leave is stored sealed: workers cannot open it, changes to it are seen."""

import pytest

from schemas.runs import RunState

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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE run_logs SET envelope = set_byte(envelope, 60, 0) # X", "cannot be opened"),
        ("UPDATE run_logs SET level = 'debug' WHERE seq = X", "cannot be opened"),
        ("UPDATE run_logs SET at = at + interval '1 us' WHERE seq = X", "cannot be opened"),
        ("UPDATE run_logs SET run_id = gen_random_uuid() WHERE seq = X", "missing"),
        ("DELETE FROM run_logs WHERE seq = X", "missing"),
        ("DELETE FROM run_logs WHERE seq = (SELECT max(seq) FROM run_logs)", "missing"),
        ("DELETE FROM run_logs", "missing"),
        (("INSERT INTO run_logs (at, run_id, account_id, level, stream, envelope) "
         "SELECT at, run_id, account_id, level, stream, envelope FROM run_logs WHERE seq = X"),
         "cannot be opened"),
    ],
)  # fmt: skip
def test_a_log_that_somebody_changed_is_an_error_and_one_event(ended, shell, change, said):
    world, run_id = ended
    change = change.replace("0) # X", "(get_byte(envelope, 60) + 1) % 256) WHERE seq = X")
    world.control.act(change.replace("= X", "= (SELECT min(seq) FROM run_logs)"))
    code, _, err = shell("run", "logs", str(run_id), "-A", "acme")
    assert code == 1
    assert said in err
    assert world.events(run_id).count("record.refused") == 1


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
