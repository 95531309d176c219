"""T40: whatever dies while events are sealed, the sealed set is the committed set, once each."""

import json
import random
import secrets
import subprocess
import time
from base64 import b64decode, b64encode
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql

from audit import memory
from audit.sealer import LogWentBack
from embedded.postgres import Cluster
from schemas.errors import TransientError
from storage import audit, sealing
from storage.engine import open_engine, transaction
from storage.roles import create_login, create_roles
from tests.faults.sealing import (
    SealerProcess,
    Writers,
    event,
    examine,
    prepared_one,
    seal_all,
    sealer,
    terminate_sealers,
)
from tests.world import Control

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

WRITERS = 32


@pytest.fixture
def key(tmp_path):
    return tmp_path / "audit" / "signer.json"


def write(control, count=1) -> None:
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, *(event(uuid4()) for _ in range(count)))


def sample(control, seen, seconds) -> None:
    """Note the newest checkpoint, again and again, as somebody outside would."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with transaction(control.engine("auditor")) as tx:
            newest = sealing.newest_checkpoint(tx)
        if newest is not None:
            seen[newest.size] = newest.root, newest.signatures
        time.sleep(0.02)


# ── T40 ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "seconds", [10, pytest.param(60, marks=pytest.mark.full)], ids=["10s", "60s"]
)
def test_sealed_is_committed_whatever_is_killed(control, key, seconds):
    sealer(control.engine("sealer"), key)  # makes the key
    engine = open_engine(control.url, "operator", pool_size=WRITERS + 2)
    writers = Writers(engine)
    seen: dict[int, tuple[bytes, str]] = {}
    ended, rounds, until = 0, 0, time.monotonic() + seconds
    with ExitStack() as stack:
        stack.callback(engine.dispose)
        processes = [stack.enter_context(SealerProcess(control, key, f"sealer-{n}")) for n in "ab"]
        stack.callback(writers.end)
        writers.start(WRITERS, writers.long_one, partial(prepared_one, control, writers.stop))

        def enough() -> bool:
            """On a busy machine it takes longer until something happened; not for ever."""
            kills = sum(p.kills for p in processes)
            happened = kills >= seconds // 4 and ended > 0 and len(seen) > 3
            return time.monotonic() > until + (0 if happened else 60)

        while not enough():
            sample(control, seen, random.uniform(0.3, 1.7))
            rounds += 1
            if rounds % 3:
                random.choice(processes).kill()
            else:
                ended += terminate_sealers(control)
    assert not writers.failed
    control.act("UPDATE audit.log SET held_until = '-infinity'")  # nobody waits for the dead
    seal_all(sealer(control.engine("sealer"), key))
    found = examine(control, key)
    in_table = {UUID(str(t)) for (t,) in control.all("SELECT target_id FROM audit.event")}
    print(  # noqa: T201 - the numbers are asked for
        f"\n{seconds} s: {len(writers.committed)} events known committed, {writers.rolled_back} "
        f"transactions rolled back, {sum(p.kills for p in processes)} sealers and {ended} sessions "
        f"killed; {found.size} sealed in {found.checkpoints} checkpoints, {found.out_of_order} out "
        f"of their order, {len(seen)} sampled; missed {len(found.missed)}, doubled "
        f"{len(found.doubled)}"
    )
    assert found.clean, found
    assert not writers.committed - in_table
    assert found.size == len(in_table)
    assert found.out_of_order > 0, "nothing was hard about it"
    assert sum(p.kills for p in processes) >= seconds // 4
    assert ended > 0
    with transaction(control.engine("sealer")) as tx:
        final = {c.size: (c.root, c.signatures) for c in sealing.checkpoints(
            tx, after=0, most=1_000_000)}  # fmt: skip
    assert len(seen) > 3
    assert seen.items() <= final.items()


# ── restored elsewhere, put back ─────────────────────────────────────────────────────────────────


def session(control) -> psycopg.Connection:
    return psycopg.connect(control.admin_url, autocommit=True)


def spend_transactions(control, count) -> None:
    """Take so many numbers of transactions."""
    with session(control) as db:
        db.execute("CREATE TEMP TABLE spent (n int)")
        db.execute(
            f"DO $$ BEGIN FOR n IN 1..{count} LOOP BEGIN INSERT INTO spent VALUES (n); "
            "EXCEPTION WHEN division_by_zero THEN NULL; END; END LOOP; END $$"
        )


def next_xid(control) -> int:
    return int(str(control.one("SELECT pg_current_xact_id()::text")))


def write_out_of_order(control, count) -> None:
    """Leave events unsealed whose transactions are later, but whose numbers are smaller."""
    with session(control) as db:
        db.execute("BEGIN")
        db.execute("SELECT pg_current_xact_id()")  # the earlier transaction
        write(control, count)  # the later one writes first
        db.execute(
            "INSERT INTO audit.event (class, action, target_kind, target_id, body) "
            "SELECT 'A', 'instance.read', 'instance', gen_random_uuid(), '{}' "
            f"FROM generate_series(1, {count})"
        )
        db.execute("COMMIT")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Another server, which has given fewer numbers to transactions."""
    root = tmp_path_factory.mktemp("elsewhere")
    with Cluster(root / "postgres", durable=False, guard_parent=True) as started:
        made = Control(started, "postgres", secrets.token_urlsafe(12))
        with made.admin_engine().begin() as tx:
            create_roles(tx)
            logins = ("scheduler", "worker", "sealer", "operator")
            create_login(tx, "dev", password=made.password, roles=logins)
        yield made
        made.dispose()


@pytest.fixture
def restore(elsewhere, tmp_path):
    """Dump a control database and restore it into the other server."""
    made = []

    def run(control: Control) -> Control:
        dump, name = tmp_path / "dump", f"restored_{secrets.token_hex(4)}"
        other = Control(elsewhere.cluster, name, elsewhere.password)
        with session(elsewhere) as db:
            db.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        for one, program, *arguments in (
            (control, "pg_dump", "--format=custom", f"--file={dump}", "--dbname"),
            (other, "pg_restore", "--exit-on-error", "--no-comments", str(dump), "--dbname"),
        ):
            subprocess.run(
                one.cluster.tool(program, *arguments, database=one.database),
                check=True,
            )
        made.append(other)
        return other

    yield run
    for one in made:
        one.dispose()


@pytest.mark.parametrize("passed", [True, False], ids=["passed before", "far above"])
def test_a_log_restored_into_another_server_goes_on_without_a_gap(
    control, key, elsewhere, restore, passed
):
    here = sealer(control.engine("sealer"), key)
    spend_transactions(control, max(0, next_xid(elsewhere) - next_xid(control)) + 2_000)
    write(control, 5)
    sealed = seal_all(here)
    write_out_of_order(control, 7)  # unsealed at the time of the dump
    last = control.one("SELECT max(xid::text::bigint) FROM audit.event")
    other = restore(control)
    assert next_xid(other) < last
    write(other, 3)
    if passed:
        spend_transactions(other, last - next_xid(other))  # before anybody seals
        assert next_xid(other) > last
    write(other, 3)
    there = sealer(other.engine("sealer"), key)
    assert seal_all(there) == sealed + 14 + 3 + 3 + 2  # and the events of the epoch
    write(other, 2)
    seal_all(there)
    found = examine(other, key)
    assert found.clean, found
    assert (found.epoch, found.size) == (2, sealed + 24)
    assert other.all("SELECT epoch, size, lost_size FROM audit.epoch WHERE epoch > 1") == [
        (2, sealed, None)
    ]
    begun, ended = (json.loads(body)["detail"] for (body,) in other.all(
        "SELECT body FROM audit.event WHERE action = 'audit.epoch_started' ORDER BY seq"
    ))  # fmt: skip
    for one in (begun, ended):
        one.pop("signature")
    oldest = other.one(
        "SELECT to_char(min(at) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') "
        "FROM audit.event e JOIN (SELECT unnest(seqs) AS seq FROM audit.checkpoint "
        "WHERE epoch = 2 AND last_seq = 0) s USING (seq)"
    )
    assert ended == begun | {"left_over": 20, "oldest": oldest}


def test_a_restore_that_lost_what_was_signed_needs_a_reason_and_then_loses_nothing_more(
    control, key, elsewhere, restore
):
    here = sealer(control.engine("sealer"), key)
    spend_transactions(control, max(0, next_xid(elsewhere) - next_xid(control)) + 2_000)
    write(control, 4)
    kept = seal_all(here)
    write_out_of_order(control, 6)
    other = restore(control)
    write(control, 2)
    signed = seal_all(here)  # ours went on, and is lost
    write(other, 1)
    with pytest.raises(LogWentBack, match="--accept-loss"):
        sealer(other.engine("sealer"), key).step()
    assert seal_all(sealer(other.engine("sealer"), key, loss="disk died")) == kept + 12 + 1 + 2
    found = examine(other, key)
    assert found.clean, found
    assert other.all("SELECT epoch, size, lost_size, reason FROM audit.epoch WHERE epoch > 1") == [
        (2, kept, signed, "restored: disk died")
    ]


def test_a_server_that_was_put_back_is_not_signed_again_until_somebody_says_why(
    control, key, admin
):
    here = sealer(control.engine("sealer"), key)
    write(control, 300)
    kept = seal_all(here)
    control.dispose()
    earlier = Control(control.cluster, f"earlier_{secrets.token_hex(4)}", control.password)
    names = sql.Identifier(earlier.database), sql.Identifier(control.database)
    admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))
    try:
        write(control, 5)
        signed = seal_all(sealer(control.engine("sealer"), key))
        write(earlier, 5)  # another history from there
        for _ in range(2):
            with pytest.raises(LogWentBack, match=f"{signed} events of log"):
                sealer(earlier.engine("sealer"), key).step()
        assert earlier.one("SELECT count(*) FROM audit.epoch") == 1
        seal_all(sealer(earlier.engine("sealer"), key, loss="put back to noon"))
        found = examine(earlier, key)
        assert found.clean, found
        assert (found.epoch, found.size) == (2, kept + 6)
        assert earlier.one("SELECT lost_size FROM audit.epoch WHERE epoch = 2") == signed
        seal_all(sealer(earlier.engine("sealer"), key))  # it needs no reason any more
        with pytest.raises(LogWentBack, match="events of log"):
            sealer(control.engine("sealer"), key).step()  # and the other history has lost
    finally:
        earlier.dispose()
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(names[0]))


def test_what_was_signed_before_a_kill_is_remembered_by_the_next_one(control, key):
    write(control, 3)
    first = seal_all(sealer(control.engine("sealer"), key))
    before = memory.recall(memory.path_of(key))
    write(control, 2)
    seal_all(sealer(control.engine("sealer"), key))
    assert before is not None
    memory.remember(memory.path_of(key), before)  # as if killed between commit and memory
    sealer(control.engine("sealer"), key).step()
    examine(control, key)
    control.act("ALTER TABLE audit.checkpoint DISABLE TRIGGER no_change")
    for size, lines in control.all("SELECT size, signatures FROM audit.checkpoint"):
        name, _, raw = lines.strip().rpartition(" ")
        forged = bytearray(b64decode(raw))
        forged[-1] ^= 1  # of the signature, not of the key's hash before it
        said = f"{name} {b64encode(forged).decode()}\n"
        control.act(
            "UPDATE audit.checkpoint SET signatures = :said WHERE size = :size",
            said=said,
            size=size,
        )
    memory.remember(memory.path_of(key), before)
    with pytest.raises(LogWentBack, match=f"the first {first + 2} events"):
        sealer(control.engine("sealer"), key).step()


def test_an_accepted_loss_stays_accepted_until_it_is_written_down(control, key):
    write(control, 3)
    size = seal_all(sealer(control.engine("sealer"), key))
    last = memory.recall(memory.path_of(key))
    assert last is not None
    memory.remember(memory.path_of(key), replace(last, size=size + 9))
    one = sealer(control.engine("sealer"), key, loss="a drill")
    with session(control) as db:  # the epoch cannot be written now
        db.execute(
            "CREATE FUNCTION public.not_now() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '40001'; END $$"
        )
        db.execute(
            "CREATE TRIGGER not_now BEFORE INSERT ON audit.epoch "
            "FOR EACH ROW EXECUTE FUNCTION not_now()"
        )
        with pytest.raises(TransientError):
            one.step()
        db.execute("DROP TRIGGER not_now ON audit.epoch")
    one.step()
    assert control.one("SELECT lost_size FROM audit.epoch WHERE epoch = 2") == size + 9
    assert one.accepted_loss is None
