"""Epochs are always told, and an event whose time is not near the signed times is found.

A log of the past is made with the sealer's own key: events with the times of then, checkpoints
signed again with the times at which a sealer would have signed them.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from audit.findings import Level
from crypto import signing
from tests.sealed_log import SealedLog

pytestmark = pytest.mark.integration

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)

#: An event that its owner inserts: of an old transaction, with a time of his choice.
STRAY = (
    "INSERT INTO audit.event (account_id, class, action, target_kind, target_id, body, at, xid) "
    "SELECT account_id, class, action, target_kind, target_id, body, :at, xid "
    "FROM audit.event ORDER BY seq LIMIT 1"
)


@pytest.fixture
def now():
    return datetime.now(UTC)


@pytest.fixture
def log(control, tmp_path, now):
    """A log that was installed, and sealed at once, forty days ago."""
    made = SealedLog(control, tmp_path)
    then = now - 40 * DAY
    made.tamper(
        "UPDATE audit.event SET at = :then",
        "UPDATE audit.event SET leaf = audit.leaf(at, account_id, class, action, target_kind, "
        "target_id, login, client, body)",
        then=then,
    )
    signed(made, then + SECOND)
    return made


def write(log, *times, xid="pg_current_xact_id()"):
    """Write an event at each of these times, in this order."""
    log.control.act(
        "INSERT INTO audit.event (class, action, target_kind, target_id, body, at, xid) "
        "SELECT 'A', 'instance.read', 'instance', gen_random_uuid(), '{}', t.at, "
        f"{xid} FROM unnest(CAST(:times AS timestamptz[])) WITH ORDINALITY AS t (at, n) ORDER BY n",
        times=list(times),
    )


def signed(log, time):
    """Seal, as if it had been at this time; return the size."""
    before = log.control.one("SELECT coalesce(max(size), 0) FROM audit.checkpoint")
    size = log.seal()
    signer = signing.load(log.key)
    for at in log.control.all("SELECT size FROM audit.checkpoint WHERE size > :s", s=before):
        point = replace(log.checkpoint(at[0]), signed_at=time)
        log.tamper(
            "UPDATE audit.checkpoint SET signed_at = :time, signatures = :line WHERE size = :size",
            time=time, line=signer.sign(point.text), size=at[0],
        )  # fmt: skip
    return size


def both(log):
    """The live log and its export say the same."""
    report = log.live()
    exported = log.export(f"export-{len(list(log.directory.glob('export-*')))}")
    assert log.offline(exported).counts.get(Level.INCOMPLETE) == report.counts.get(Level.INCOMPLETE)
    return report


def force_epoch(log):
    """Begin an epoch, as the sealer does in another server, and seal what it finds there."""
    log.tamper("UPDATE audit.epoch SET reason = reason")
    for _ in range(5):  # it begins, seals what is left over, says so, and seals that
        log.seal()


def late(report):
    return [(f.index, f.level) for f in report.findings if "the event says" in f.text]


def test_an_epoch_is_told_with_its_time_its_place_and_what_it_took_in(log, now):
    log.grow(9, 10)
    log.control.act(STRAY, at=now - 30 * SECOND)
    assert log.live().exit_code == 10
    force_epoch(log)
    report = both(log)
    assert report.exit_code == 0
    (line,) = [line for line in report.lines if "epoch 2 began" in line]
    assert "at 20 events (another server), sealed " in line
    assert f"{datetime.now(UTC):%Y-%m-%d}" in line
    assert "1 events" in line


def test_an_epoch_is_told_however_much_else_there_is_to_tell(log, now):
    for n in range(25):
        write(log, now - DAY + n * 10 * 60 * SECOND)
        signed(log, now - DAY + n * 10 * 60 * SECOND + SECOND)
    force_epoch(log)
    report = log.live()
    assert report.counts[Level.NOTE] > 20
    assert any("epoch 2 began" in line for line in report.lines)
    assert any(line.startswith("… and ") for line in report.lines)


def test_an_old_event_is_found_whether_an_epoch_takes_it_in_or_not(log, now):
    """Whoever owns the database makes the sealer begin an epoch, and chooses times of events."""
    for hours in range(30, 0, -1):
        write(log, now - hours * HOUR)
        signed(log, now - hours * HOUR + SECOND)
    (size,) = log.grow(1)
    write(log, now - DAY)
    log.seal()
    assert late(both(log)) == [(size, Level.INCOMPLETE)]
    log.control.act(STRAY, at=now - 6 * HOUR)
    force_epoch(log)
    report = both(log)
    assert report.exit_code == 11
    assert late(report) == [(size, Level.INCOMPLETE), (size + 1, Level.INCOMPLETE)]
    assert "over an hour before it was sealed" in report.lines[0]


def test_outages_that_follow_each_other_excuse_no_older_event(log, now):
    """Somebody lets the sealer work once an hour only."""
    write(log, now - 3 * DAY)
    signed(log, now - 3 * DAY + SECOND)
    for minutes in range(29 * 60, 0, -60):
        write(log, now - minutes * 60 * SECOND)
        signed(log, now - minutes * 60 * SECOND + SECOND)
    (size,) = log.grow(1)
    write(log, now - 2 * DAY)
    log.seal()
    assert late(both(log)) == [(size, Level.INCOMPLETE)]


def test_an_event_of_a_time_after_it_was_sealed_is_found(log, now):
    (size,) = log.grow(3)
    write(log, now + HOUR / 2)
    log.seal()
    log.grow(2)
    report = both(log)
    assert report.exit_code == 11
    assert late(report) == [(size, Level.INCOMPLETE)]


# ── what honest operation does ────────────────────────────────────────────────────────────────


def test_a_sealer_that_was_down_for_a_day_is_no_reason_to_suspect_its_events(log, now):
    write(log, now - DAY)
    signed(log, now - DAY + SECOND)
    write(log, *(now - DAY + n * 30 * SECOND for n in range(2800)))  # batches: one every second
    before = log.control.one("SELECT max(size) FROM audit.checkpoint")
    log.seal()
    assert log.control.one("SELECT count(*) FROM audit.checkpoint WHERE size > :s", s=before) >= 2
    log.grow(2)
    report = both(log)
    assert report.exit_code == 0
    assert "nothing was sealed for 86" in "\n".join(report.lines)


def test_what_waited_behind_two_long_transactions_is_not_suspected(log, now):
    """The second one is older than what waited, and ended two hours after the first."""
    write(log, now - 4 * HOUR)
    signed(log, now - 4 * HOUR + SECOND)
    write(log, now - 4 * HOUR + 60 * SECOND)
    signed(log, now - 2 * HOUR)
    write(log, *[now - SECOND] * 1030)
    write(log, *(now - 4 * HOUR + n * 60 * SECOND for n in range(2, 230)))
    log.seal()
    assert both(log).exit_code == 0


def test_what_waited_behind_a_long_transaction_is_not_suspected(log, now):
    """The transaction comes first, with events of its end; those that waited for it follow."""
    write(log, now - 3 * HOUR)
    signed(log, now - 3 * HOUR + SECOND)
    write(log, *[now - SECOND] * 1030)  # more than a batch
    write(log, *(now - 3 * HOUR + n * 60 * SECOND for n in range(170)))
    log.seal()
    assert both(log).exit_code == 0


def test_a_step_of_the_databases_clock_is_told_of_its_own_events_only(log, now):
    log.grow(3)
    write(log, now - 50 * 60 * SECOND)  # back by less than an hour
    log.grow(2)
    report = both(log)
    assert report.exit_code == 0


@pytest.mark.parametrize("step", [2 * HOUR, -2 * HOUR])
def test_a_step_of_the_sealers_clock_is_a_note(log, now, step):
    """For some minutes it signs with another time than it is."""
    for minutes in range(60, 40, -1):
        at = now - DAY - minutes * 60 * SECOND
        write(log, at)
        signed(log, at + SECOND + (step if 45 < minutes < 55 else timedelta(0)))
    log.grow(2)
    report = both(log)
    assert (report.exit_code, late(report)) == (0, [])
    assert "the sealer's clock went back by" in "\n".join(report.lines)


def test_after_a_restore_what_was_left_over_is_not_suspected(log, now):
    write(log, now - 3 * DAY)
    signed(log, now - 3 * DAY)
    write(log, now - 3 * DAY + 10 * SECOND, now - 3 * DAY + 20 * SECOND)  # waits in the dump
    log.write(2)
    force_epoch(log)
    log.grow(2)
    report = both(log)
    assert (report.exit_code, late(report)) == (0, [])
    assert "epoch 2 began" in "\n".join(report.lines)


def test_a_log_that_is_older_than_its_sealer_is_not_suspected(control, tmp_path, now):
    """As after an upgrade: years of events, then the first checkpoints."""
    log = SealedLog(control, tmp_path)
    write(log, *(now - 300 * DAY + n * HOUR for n in range(3000)))
    log.write(2)
    log.seal()
    assert len(log.control.all("SELECT FROM audit.checkpoint LIMIT 2")) == 2
    assert both(log).exit_code == 0


def test_a_time_of_signing_that_has_not_come_is_told(log, now):
    log.grow(3)
    log.write(1)
    signed(log, now + 2 * HOUR)
    report = both(log)
    assert report.exit_code == 11
    assert "which has not come yet" in "\n".join(report.lines)
