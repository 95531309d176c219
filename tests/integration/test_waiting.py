"""`--wait`: the rule while a run waits, rows while it moves them, a fraction where one is known."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from threading import Timer

import pytest

from cli.supervisor import child_environment
from cli.waiting import Sight
from scheduler import ticks
from schemas.ids import new_id
from schemas.runs import Claim, Outcome, OutcomeKind
from storage import claims, progress
from storage.claims import Beat, WorkerState, heartbeat
from storage.engine import open_link, transaction
from storage.progress import Progress
from tests.integration.test_top import drain_until_exit, read_until

pytestmark = pytest.mark.integration

STREAMS = {
    "public.first": "{mode: merge, key: [id], cursor: xmin}",
    "public.t": "{mode: merge, key: [id], cursor: xmin}",
}


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE first (id int PRIMARY KEY)",
        "CREATE TABLE t (id int PRIMARY KEY)",
        "INSERT INTO t SELECT generate_series(1, 40)",
    )
    world.apply(STREAMS)
    world.deps.heartbeat.beat()
    ticks.presence_tick(world.scheduler)
    return world


def running(shop, rows: int, stream: str = "public.t", **options: object) -> Claim:
    """A run that a worker holds and that tells of rows; it ends when the test ends it."""
    shop.enqueue(**options)
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    tell(shop, claim, rows, stream)
    return claim


def tell(shop, claim: Claim, rows: int, stream: str = "public.t") -> None:
    with open_link(shop.control.url, "worker") as link:
        state = WorkerState("w1", "test", 8, draining=False)
        heartbeat(link, state, [Beat(claim.token, stream, rows, rows * 100)], claim.lease)


def cancel(shop, claim: Claim) -> None:
    with transaction(shop.deps.engine) as tx:
        claims.finish(tx, claim, Outcome(OutcomeKind.CANCELLED, "cancelled"), shop.deps.principal)


def seen(shop, claim: Claim) -> Progress:
    with shop.cli.inside() as (tx, _, _name):
        found = progress.read(tx, claim.run_id)
    assert found is not None
    return found


def test_a_first_load_has_no_estimate_until_somebody_discovered_the_source(shop):
    claim = running(shop, 10)
    assert seen(shop, claim) == Progress("public.t", 2, 2, 10, 1_000, None)
    (source,) = shop.control.all("SELECT id, account_id FROM resources WHERE name = 'shop'")
    run_id = new_id()
    shop.control.act(
        "INSERT INTO runs (run_id, account_id, kind, subject_id, state, trigger, scheduled_for, "
        "queued_at, attempt, fence) VALUES (:run, :account, 'discover', :source, 'succeeded', "
        "'manual', now(), now(), 1, 0)",
        run=run_id, source=source[0], account=source[1],
    )  # fmt: skip
    shop.control.act(
        "INSERT INTO run_outputs (run_id, account_id, document) VALUES (:run, :account, "
        """'{"streams": [{"name": "public.first", "rows_estimated": 7}, """
        """{"name": "public.t", "rows_estimated": 41}]}')""",
        run=run_id, account=source[1],
    )  # fmt: skip
    assert seen(shop, claim).rows_expected == 41
    shop.control.act("UPDATE run_outputs SET document = replace(document::text, '41', '-1')::jsonb")
    assert seen(shop, claim).rows_expected is None, "never analyzed: the source does not know"


def test_a_whole_read_is_compared_with_the_last_whole_read_and_a_window_with_a_window(shop):
    shop.sync()
    shop.pair.source("INSERT INTO t SELECT generate_series(41, 43)")
    shop.sync()  # a window of three rows
    claim = running(shop, 2)
    assert seen(shop, claim).rows_expected == 3
    cancel(shop, claim)
    claim = running(shop, 20, full_refresh=True)
    assert seen(shop, claim).rows_expected == 40
    cancel(shop, claim)


def test_streams_are_counted_among_those_of_the_run(shop):
    claim = running(shop, 1, streams=("public.t",))
    assert (seen(shop, claim).number, seen(shop, claim).streams) == (1, 1)


def test_there_is_no_progress_before_the_first_heartbeat_and_after_the_end(shop):
    asked = shop.enqueue()
    with shop.cli.inside() as (tx, _, _name):
        assert progress.read(tx, asked.run_id) is None
    shop.step()
    with shop.cli.inside() as (tx, _, _name):
        assert progress.read(tx, asked.run_id) is None


def test_a_line_says_what_is_known_and_no_more():
    known = Progress("public.t", 2, 5, 1_234_567, 98_700_000, 2_469_134)
    assert Sight("shop-to-lake", progress=known, rows_per_second=350_000.4).line == (
        "shop-to-lake: public.t (2/5), 1,234,567 rows, 50% of about 2,469,134, 350,000 rows/s, "
        "98.7 MB"
    )
    more = Progress("public.t", 2, 5, 1_234_567, 98_700_000, 1_000)  # the estimate was too small
    assert Sight("shop-to-lake", progress=more).line == (
        "shop-to-lake: public.t (2/5), 1,234,567 rows, 98.7 MB"
    )
    assert Sight("shop-to-lake", "waits, turn: 3 go first").line == (
        "shop-to-lake: waits, turn: 3 go first"
    )


def while_it_waits(shop, shell, *words: str, seconds: float = 2.5) -> tuple[int, str, str]:
    """Type the command; a worker comes only after a while."""
    worker = Timer(seconds, shop.step)
    worker.start()
    try:
        return shell(*words)
    finally:
        worker.join()


def test_plain_lines_name_the_rule_and_go_to_stderr(shop, shell):
    shop.control.act("DELETE FROM workers")
    code, out, err = while_it_waits(shop, shell, "run", "enqueue", "shop-to-lake", "--wait")
    assert code == 0
    assert "shop-to-lake: waits, no_worker: no worker is running; start one: syncward worker" in err
    assert "waits" not in out
    assert "\x1b" not in err


def test_with_json_nothing_but_the_document_is_said(shop, shell):
    words = ("run", "enqueue", "shop-to-lake", "--wait", "--json")
    code, out, err = while_it_waits(shop, shell, *words, seconds=1.5)
    assert (code, err) == (0, "")
    assert json.loads(out)["state"] == "succeeded"


def test_on_a_terminal_there_is_a_bar_with_rows_rate_and_fraction(shop):
    settings = shop.cli.settings
    (shop.directory / "dev.env").write_text(
        "SYNCWARD_PROFILE=development\nSYNCWARD_ACCOUNT=acme\n"
        f"SYNCWARD_DATABASE_URL={settings.database_url.get_secret_value()}\n"
    )
    shop.sync()
    shop.control.act("DELETE FROM workers")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = ["run", "enqueue", "shop-to-lake", "--full-refresh", "--wait"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        stdin=theirs, stdout=subprocess.PIPE, stderr=theirs,
        env=child_environment(shop.directory, TERM="xterm"),
    )  # fmt: skip
    read_until(ours, "waits, no_worker")
    (job,) = shop.dispatch()
    claim = shop.claim(job)
    assert isinstance(claim, Claim)
    tell(shop, claim, 10)
    read_until(ours, "10 rows")
    tell(shop, claim, 30)
    shown = read_until(ours, "30 rows")
    assert "public.t 2/2" in shown
    assert "75%" in shown
    assert "/s" in shown
    cancel(shop, claim)
    drain_until_exit(ours, process)
    assert process.wait(timeout=20) == 1  # it was cancelled
    assert process.stdout is not None
    assert b"cancelled" in process.stdout.read()
    process.stdout.close()
    os.close(ours)
    os.close(theirs)
