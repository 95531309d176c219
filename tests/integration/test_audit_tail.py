"""The audit log as a stream: a stable index, resumable, nothing skipped, cheap to follow."""

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from schemas.audit import AuditAction, AuditEvent, Principal, TargetKind
from storage import audit, audit_tail
from storage.audit_tail import Filters
from tests.world import Control, Pair, World

pytestmark = pytest.mark.integration

ALICE = Principal("operator", "alice")


def event(action=AuditAction.INSTANCE_READ, principal=ALICE, reason=None, **detail):
    return AuditEvent(
        action, TargetKind.INSTANCE, audit.INSTANCE_ID, principal, reason=reason, detail=detail
    )


def numbered(n):
    return event(AuditAction.KEYS_FORGOTTEN, keys=n)


def id_of(world, name):
    """How the log knows an operator."""
    return f"operator:{world.control.one('SELECT id FROM audit.principal WHERE name = :n', n=name)}"


def write(world, *events):
    with world.cli.transaction() as tx:
        audit.append(tx, *events)


def follow(world, filters=Filters(), *, begin=0, limit=10_000, page=8_192):  # noqa: B008 - frozen
    """Read on from an index as a follower does; return what it saw and where it is."""
    found: list[audit_tail.StoredEvent] = []
    missing = 0
    while True:
        with world.cli.auditing() as tx:
            got = audit_tail.following(tx, filters, begin=begin, limit=limit, page=page)
        found += got.events
        missing += got.missing
        begin = got.end
        if not got.more:
            return found, begin, missing


def newest(world, limit=100, **filters):
    with world.cli.auditing() as tx:
        return audit_tail.newest(tx, Filters(**filters), limit)


def test_the_newest_events_have_their_index_and_what_is_not_sealed_has_none(world, shell):
    write(world, *(numbered(n) for n in range(5)))
    size = world.seal_all()
    write(world, numbered(5))
    found = newest(world)
    assert [e.index for e in found] == [*range(size), None]
    code, out, _ = shell("audit", "tail", "--json", "--limit", "2")
    assert code == 0
    first, last = json.loads(out)
    assert (first["index"], last["index"]) == (size - 1, None)
    assert set(first) == {
        *("index", "seq", "at", "account_id", "class", "action", "target_kind", "target_id"),
        *("login", "client", "body", "leaf", "principal_name"),
    }
    assert first["principal_name"] == "operator:alice"
    assert first["body"]["detail"] == {"keys": 4}


def test_the_stream_is_the_sealed_log_whatever_the_pages_are(world):
    for n in range(40):
        write(world, numbered(n))
        if n % 7 == 0:
            world.seal_all()
    size = world.seal_all()
    leaves = [bytes(leaf) for (leaf,) in world.control.all(
        "SELECT e.leaf FROM audit.checkpoint c CROSS JOIN LATERAL unnest(c.seqs) WITH ORDINALITY "
        "AS p (seq, place) JOIN audit.event e ON e.seq = p.seq ORDER BY c.size, p.place"
    )]  # fmt: skip
    assert len(leaves) == size
    for limit, page in ((1, 1), (3, 8), (10_000, 8_192)):
        found, end, missing = follow(world, limit=limit, page=page)
        assert [e.leaf for e in found] == leaves
        assert [e.index for e in found] == list(range(size))
        assert (end, missing) == (size, 0)


def test_a_follower_that_starts_again_anywhere_sees_each_event_once(world):
    """Transactions commit out of order and roll back; the sealer runs; readers come and go."""
    stop = threading.Event()
    engine = world.control.engine("operator")

    def work(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            with engine.connect() as tx:
                audit.append(tx, numbered(dice.randrange(10**9)))
                time.sleep(dice.random() / 50)
                audit.append(tx, numbered(dice.randrange(10**9)))
                tx.rollback() if dice.random() < 0.2 else tx.commit()

    writers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for writer in writers:
        writer.start()
    sealer, begin = world.sealer(), 0
    seen: list[audit_tail.StoredEvent] = []
    end = time.monotonic() + 4
    while time.monotonic() < end:
        sealer.step()
        with world.cli.auditing() as tx:
            page = audit_tail.following(tx, Filters(), begin=begin, limit=7)
        seen += page.events
        if seen:
            begin = (seen[-1].index or 0) + 1  # all that a restart knows
    stop.set()
    for writer in writers:
        writer.join()
    sealer.close()
    world.seal_all()
    seen += follow(world, begin=begin)[0]
    assert [e.index for e in seen] == list(range(len(seen)))
    stored = world.control.all("SELECT seq FROM audit.event")
    assert sorted(e.seq for e in seen) == sorted(seq for (seq,) in stored)
    assert len(seen) > 50


def test_filters_let_pass_what_they_say(world):
    world.account()
    bob = Principal("operator", "bob")
    write(world, event(), event(principal=bob), event(AuditAction.INSTANCE_PAUSED, bob),
          event(AuditAction.PARTITIONS_CREATED, Principal("scheduler", "bob"),
                partitions="p"))  # fmt: skip
    world.seal_all()
    account = world.control.one("SELECT id FROM accounts")
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"principals": (id_of(world, "bob"),)}, ["instance.read", "instance.paused"]),
        ({"principals": (id_of(world, "bob")[:-1],)}, []),
        ({"actions": ("instance.paused", "account.created")},
         ["account.created", "instance.paused"]),
        ({"target_kind": "account"}, ["account.created"]),
        ({"target_id": account}, ["account.created"]),
        ({"account_id": account}, ["account.created"]),
        ({"class_": "B"}, ["partitions.created"]),
        ({"until": datetime.now(UTC) - timedelta(hours=1)}, []),
    ]  # fmt: skip
    for filters, actions in cases:
        assert [e.action for e in newest(world, **filters)] == actions, filters
        assert [e.action for e in follow(world, Filters(**filters))[0]] == actions, filters


def test_a_principal_is_found_by_the_body_not_by_a_word_in_it(world):
    write(world, event(principal=Principal("operator", "bob")))
    bob = id_of(world, "bob")
    write(world, event(reason=f'"principal":"{bob}"'))
    write(world, AuditEvent(AuditAction.SUBJECT_ERASED, TargetKind.INSTANCE, audit.INSTANCE_ID,
                            ALICE, detail={"principal": bob}))  # fmt: skip
    assert len(newest(world, principals=(bob,))) == 1
    assert len(newest(world, principals=(id_of(world, "alice"),), limit=1)) == 1


def test_reading_is_an_event_with_what_was_asked_for(world, shell):
    world.account()
    world.seal_all()
    assert (
        shell("audit", "tail", "-A", "acme", "--action", "account.created", "--after", "-1")[0] == 0
    )
    said = json.loads(newest(world, 1)[0].body)
    account = world.control.one("SELECT id FROM accounts")
    assert said["detail"] == {
        "events": 1, "filters": f"after -1; account {account}; action account.created",
    }  # fmt: skip


def test_a_deleted_account_is_read_by_its_id(shell):
    code, _, err = shell("audit", "tail", "-A", "nobody")
    assert code == 1
    assert "account nobody does not exist" in err
    assert shell("audit", "tail", "-A", "00000000-0000-4000-8000-000000000001")[0] == 0


@pytest.mark.parametrize("words", [
    ("--target", "house"), ("--since", "yesterday"), ("-f", "--until", "1h"),
    ("--action", "nothing.done"), ("--after", "-2"), ("--class", "C"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(shell, words):
    assert shell("audit", "tail", *words)[0] == 2


def test_an_index_that_the_log_does_not_have_is_not_waited_for(world, shell):
    write(world, event())
    size = world.seal_all()
    code, _, err = shell("audit", "tail", "-f", "--after", str(size))
    assert code == 1
    assert "is this the log that you followed" in err


def test_a_follower_says_that_events_are_gone(world):
    write(world, *(numbered(n) for n in range(4)))
    size = world.seal_all()
    gone = newest(world)[1].seq
    world.control.act_plainly(
        "ALTER TABLE audit.event_default DISABLE TRIGGER ALL; "
        + "; ".join(
            f"ALTER TABLE {part} DISABLE TRIGGER ALL"
            for (part,) in world.control.all(
                "SELECT inhrelid::regclass::text FROM pg_inherits "
                "WHERE inhparent = 'audit.event'::regclass"
            )
        )
        + f"; DELETE FROM audit.event WHERE seq = {gone}"
    )
    found, end, missing = follow(world)
    assert (len(found), end, missing) == (size - 1, size, 1)


# ── the program itself ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def program(world):
    """Start `syncward audit tail` as a process of its own; end what is left."""
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        settings = world.cli.settings
        environment = os.environ | {  # noqa: TID251 - of another process
            "SYNCWARD_PROFILE": settings.profile,
            "SYNCWARD_DATABASE_URL": settings.database_url.get_secret_value(),
            "SYNCWARD_DATA_DIR": str(world.directory),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "audit", "tail", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parents[2],
            # a shell that started the tests in the background has Ctrl-C ignored for all below it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_following_goes_on_after_the_last_line_that_was_printed(world, program):
    write(world, *(numbered(n) for n in range(3)))
    world.seal_all()
    first = program("-f", "--after", "-1", "--json")
    seen = [json.loads(first.stdout.readline())["index"] for _ in range(2)]
    first.kill()
    write(world, numbered(3))
    size = world.seal_all()
    second = program("-f", "--after", str(seen[-1]), "--json")
    while seen[-1] < size - 1:
        seen.append(json.loads(second.stdout.readline())["index"])
    assert seen == list(range(size))


def test_ctrl_c_and_a_reader_that_goes_away_end_it_quietly(world, program):
    write(world, event())
    world.seal_all()
    process = program("-f", "--after", "-1")
    assert "database.upgraded" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in out + err, "internal" in err) == (0, False, False)

    process = program("-f", "--after", "-1")
    process.stdout.readline()
    process.stdout.close()
    write(world, *(numbered(n) for n in range(2)))
    world.seal_all()
    assert process.wait(timeout=20) == 0
    assert "Broken" not in process.stderr.read()


def test_without_a_sealer_it_says_so_once(world, program):
    write(world, event())
    world.seal_all()  # lets go of the log at its end
    process = program("-f")
    assert "no sealer seals" in process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert "no sealer seals" not in err


# ── cost ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def large(cluster, admin, template, valkey, tmp_path_factory):
    """12,000 sealed events that tests only read."""
    name = f"large_{secrets.token_hex(4)}"
    admin.execute(f"CREATE DATABASE {name} TEMPLATE {template.database}")
    control = Control(cluster, name, template.password)
    world = World.build(
        control, Pair(cluster, "none", "none", {}), valkey, tmp_path_factory.mktemp("large")
    )
    world.control.act_plainly(
        "INSERT INTO audit.event (class, action, target_kind, target_id, body) SELECT 'B', "
        "'run.started', 'run', gen_random_uuid(), "
        '\'{"outcome":"success","principal":"worker\\:w","v"\\:1}\' '
        "FROM generate_series(1, 12000)"
    )
    world.seal_all()
    world.control.act_plainly("ANALYZE audit.event; ANALYZE audit.checkpoint")
    yield world
    world.close()
    control.dispose()
    admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def reads(world, work) -> int:
    """Return how many blocks of event tables and their indexes a read of the log touches."""
    counted = (
        "SELECT coalesce(sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read), 0) "
        "FROM pg_statio_all_tables WHERE schemaname = 'audit'"
    )
    found = []
    for _ in range(4):  # the first warms up; what others did before may be counted late
        before = int(str(world.control.one(counted)))
        with world.cli.auditing() as tx:
            work(tx)
            tx.execute(text("SELECT pg_stat_force_next_flush()"))
        time.sleep(0.2)
        found.append(int(str(world.control.one(counted))) - before)
    return min(found[1:])


def test_a_poll_with_nothing_new_reads_next_to_nothing(large):
    size = large.control.one("SELECT size FROM audit.log")
    nobody = Filters(principals=("operator:nobody",))
    assert reads(large, lambda tx: audit_tail.following(tx, nobody, begin=size, limit=100)) < 20


def test_a_filter_that_matches_nothing_advances_through_a_large_log(large):
    size = large.control.one("SELECT size FROM audit.log")
    found, end, missing = follow(large, Filters(principals=("operator:nobody",)))
    assert (found, end, missing) == ([], size, 0)
    assert newest(large, principals=("operator:nobody",)) == []


def test_one_page_reads_its_own_events_not_all_of_them(large):
    page = reads(
        large, lambda tx: audit_tail.following(tx, Filters(), begin=6_000, limit=100, page=1_024)
    )
    everything = reads(
        large, lambda tx: tx.execute(text("SELECT sum(length(body)) FROM audit.event"))
    )
    assert page < everything + 5_000  # in index and table: blocks of one batch
    assert reads(large, lambda tx: audit_tail.newest(tx, Filters(), 20)) < 500
