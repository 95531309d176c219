"""`syncward top` against a real control database: once, as JSON, live in a terminal."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from sqlalchemy import event

from cli.supervisor import child_environment
from scheduler import ticks
from schemas.runs import Claim, Rule
from storage import explain, overview, tenancy
from storage.claims import Beat, WorkerState, heartbeat
from storage.engine import open_link

pytestmark = pytest.mark.integration


@pytest.fixture
def shop(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)")
    world.apply({"public.t": "{mode: merge, key: [id], cursor: xmin}"})
    world.deps.heartbeat.beat()
    ticks.presence_tick(world.scheduler)
    return world


def running(shop, stream: str = "public.t", rows: int = 1_234_567) -> Claim:
    """A run that a worker holds, with a heartbeat that tells of rows."""
    shop.enqueue()
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    with open_link(shop.control.url, "worker") as link:
        state = WorkerState("w1", "test", 8, draining=False)
        heartbeat(link, state, [Beat(claim.token, stream, rows, 99_000_000)], claim.lease)
    return claim


def waiting(shop) -> None:
    """Another account with a run that waits."""
    shop.control.act(
        "INSERT INTO accounts (id, name, plan) VALUES (md5('big')::uuid, 'big', 'standard')"
    )
    shop.control.act(
        "INSERT INTO account_queues (account_id, runs_max) VALUES (md5('big')::uuid, 1)"
    )
    shop.control.act(
        "INSERT INTO active_runs (subject_id, run_id, account_id, kind, state, trigger, "
        "scheduled_for, priority) VALUES (md5('b')::uuid, md5('r')::uuid, md5('big')::uuid, 'sync',"
        " 'queued', 'schedule', now(), 5)"
    )


def test_once_shows_what_runs_and_what_holds_the_rest_back(shop, shell):
    running(shop)
    waiting(shop)
    shop.control.act("UPDATE account_queues SET paused = true WHERE runs_max = 1")
    code, out, err = shell("top", "--once")
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "1 ready, 0 delayed, 0 sent, 1 running, 0 await approval" in out
    (row,) = [line for line in out.splitlines() if line.startswith("acme/shop-to-lake")]
    assert ["public.t" in row, "1,234,567" in row, "99.0MB" in row] == [True, True, True]
    (row,) = [line for line in out.splitlines() if line.startswith("big/")]
    assert "account_paused" in row
    (row,) = [line for line in out.splitlines() if line.startswith("w1")]
    assert ["test" in row, "1/8" in row] == [True, True]


@pytest.mark.usefixtures("shop")
def test_without_a_terminal_it_is_one_plain_frame(shell):
    assert shell("top")[1].splitlines()[1:] == shell("top", "--once")[1].splitlines()[1:]
    assert "\x1b" not in shell("top")[1]


def test_json_is_one_document(shop, shell):
    claim = running(shop)
    waiting(shop)
    code, out, _ = shell("top", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["running"][0]["run_id"] == str(claim.run_id)
    assert found["running"][0]["rows_per_second"] > 0
    assert found["waiting"][0]["rule"] == "turn"
    assert found["queue_depth"]["running"] == 1
    assert found["workers"][0]["used"] == 1


def test_a_look_at_all_accounts_is_an_event_a_look_at_ones_own_shows_no_other(shop, shell):
    running(shop)
    waiting(shop)
    before = shop.events().count("instance.read")
    assert "big/" in shell("top", "--once")[1]
    assert shop.events().count("instance.read") == before + 1
    out = shell("top", "--once", "-A", "acme")[1]
    assert ["acme/shop-to-lake" in out, "big/" in out] == [True, False]
    assert shop.events().count("instance.read") == before + 1


def test_data_cannot_drive_the_terminal(shop, shell):
    running(shop, stream="evil\x1b[31m\x07\nname")
    out = shell("top", "--once")[1]
    assert "evil" in out
    assert not set("\x1b\x07") & set(out)


def test_the_rule_is_the_one_of_run_explain(shop):
    asked = shop.enqueue()

    def both() -> set[Rule]:
        with shop.cli.inside() as (tx, account, _name):
            tenancy.across(tx)
            why = explain.explain(tx, asked.run_id, runs_max=1_000)
            seen = overview.read(tx, account_id=account.account_id, limit=5, runs_max=1_000)
        return {why.rule, *(run.rule for run in seen.waiting)}

    changes = {
        Rule.TURN: "SELECT 1",
        Rule.NO_WORKER: "DELETE FROM workers",
        Rule.REDIS_DOWN: "UPDATE schedulers SET queue_down_since = now()",
        Rule.NOT_BEFORE: "UPDATE active_runs SET not_before = now() + interval '1 h'",
        Rule.NO_SCHEDULER: "DELETE FROM schedulers",
        Rule.CONNECTION_PAUSED: "UPDATE schedules SET state = 'paused', state_reason = 'x'",
        Rule.ACCOUNT_PAUSED: "UPDATE account_queues SET paused = true",
        Rule.INSTANCE_PAUSED: "UPDATE instance SET state = 'paused'",
    }
    for rule, change in changes.items():
        shop.control.act(change)
        assert both() == {rule}


def test_a_frame_is_one_short_transaction(shop):
    running(shop)
    waiting(shop)
    statements: list[str] = []
    engine = shop.cli.engine

    def note(*seen) -> None:
        statements.append(seen[2])

    event.listen(engine, "before_cursor_execute", note)
    with shop.cli.transaction() as tx:
        tenancy.across(tx)
        overview.read(tx, account_id=None, limit=20, runs_max=200)
    event.remove(engine, "before_cursor_execute", note)
    assert len(statements) <= 12


def test_live_it_redraws_and_q_leaves_the_terminal_as_it_was(shop):
    settings = shop.cli.settings
    (shop.directory / "dev.env").write_text(
        "SYNCWARD_PROFILE=development\n"
        f"SYNCWARD_DATABASE_URL={settings.database_url.get_secret_value()}\n"
    )
    running(shop)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "top"],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env=child_environment(shop.directory, TERM="xterm"),
    )  # fmt: skip
    seen = read_until(ours, "public.t")
    shop.control.act("UPDATE leases SET rows = 7654321, progress_at = clock_timestamp()")
    seen = read_until(ours, "7,654,321")
    assert "\x1b" in seen
    os.write(ours, b"q")
    drain_until_exit(ours, process)
    assert process.wait(timeout=20) == 0
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def read_until(terminal: int, wanted: str, seconds: float = 30) -> str:
    text, deadline = "", time.monotonic() + seconds
    while wanted not in text:
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65_536).decode(errors="replace")
    return text


def drain_until_exit(terminal: int, process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """Go on reading, for a full terminal would hold the process up."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65_536)
