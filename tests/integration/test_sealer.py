"""The sealer against a real database: every committed event once, in order, restart-safe."""

import json
import re
import shutil
import time
from datetime import timedelta
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.event import listen, remove

from audit import memory, statement
from audit.anchors.loading import Opening
from audit.checkpoint import Checkpoint
from audit.main import Process
from audit.sealer import LogWentBack
from audit.tree import Edge
from crypto import signing
from schemas.audit import AuditAction
from schemas.errors import ConfigError
from storage import audit, sealing
from storage.engine import transaction
from tests.faults.sealing import event, examine, seal_all, sealer
from tests.sealed_log import SealedLog

pytestmark = pytest.mark.integration


@pytest.fixture
def shop(world):
    world.pair.source(
        "CREATE TABLE items (id bigint PRIMARY KEY, label text)", "INSERT INTO items VALUES (1)"
    )
    return world


def test_committed_events_are_sealed_in_order_and_what_is_signed_is_their_root(shop):
    shop.apply({"public.items": "{mode: replace}"})
    size = shop.seal_all()
    assert size == shop.control.one("SELECT count(*) FROM audit.event") > 3
    leaves = [bytes(leaf) for (leaf,) in shop.control.all(
        "SELECT leaf FROM audit.event ORDER BY xid, seq")]  # fmt: skip
    edge = Edge()
    list(edge.append(leaves))
    with transaction(shop.control.engine("sealer")) as tx:
        sealed = sealing.newest_checkpoint(tx)
        state = sealing.state(tx)
    assert sealed is not None
    text = Checkpoint(state.log_id, size, edge.root(), 1, sealed.signed_at).text
    keys = shop.sealer().signer.public
    assert signing.signed_by(text, sealed.signatures, keys) == [*keys]


def test_a_sealer_that_starts_again_goes_on_where_the_last_one_stood(shop):
    shop.apply({"public.items": "{mode: replace}"})
    first = shop.seal_all()
    shop.sync()
    assert shop.seal_all() == shop.control.one("SELECT count(*) FROM audit.event") > first


def test_nothing_is_signed_for_a_database_that_went_back(shop):
    shop.apply({"public.items": "{mode: replace}"})
    size = shop.seal_all()
    shop.control.act_plainly(
        "ALTER TABLE audit.checkpoint DISABLE TRIGGER ALL; DELETE FROM audit.checkpoint; "
        "DELETE FROM audit.tile; "
        "UPDATE audit.log SET size = 0, last_xid = '0', last_seq = 0, published_size = 0"
    )
    with pytest.raises(LogWentBack, match=f"{size} events of log"):
        shop.sealer().step()


def grow(control, months: int, events: int) -> None:
    """Months of sealed events before what is new, each in a partition of its own."""
    for month in range(months):
        first = f"date_trunc('month', now(), 'UTC') - interval '{month + 1} months'"
        control.act(
            "DO $$ BEGIN EXECUTE format('CREATE TABLE audit.event_past_"
            f"{month} PARTITION OF audit.event FOR VALUES FROM (%L) TO (%L)', {first}, "
            f"{first} + interval '1 month'); END $$"
        )
        control.act(
            "INSERT INTO audit.event (at, class, action, target_kind, target_id, body) "
            f"SELECT {first} + interval '1 hour', 'A', 'instance.read', 'instance', "
            f"gen_random_uuid(), '{{}}' FROM generate_series(1, {events})"
        )


def blocks(plan: dict[str, int]) -> int:
    return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_looking_for_new_events_does_not_read_the_log(control, tmp_path, mode):
    grow(control, 20, 1_000)
    one = sealer(control.engine("sealer"), tmp_path / "signer.json")
    seal_all(one)
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, event(uuid4()))
    with transaction(control.engine("sealer")) as tx:
        tx.execute(text(f"SET LOCAL plan_cache_mode = {mode}"))
        seen = sealing.state(tx)
        found = tx.execute(
            text(
                "EXPLAIN (ANALYZE, BUFFERS, FORMAT json) "
                + sealing._FINAL.text.replace("CAST(:xid AS xid8)", f"'{seen.last.xid}'::xid8")
            ),
            {"seq": seen.last.seq, "floor": 0, "most": 1024},
        ).scalar_one()
    read = blocks(found[0]["Plan"])
    assert read < 200, f"{read} blocks of a log of {seen.size}"


def test_a_transaction_of_many_events_is_sealed_in_pieces(control, tmp_path):
    targets = [uuid4() for _ in range(5_000)]
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, *(event(target) for target in targets))
    key = tmp_path / "signer.json"
    seal_all(sealer(control.engine("sealer"), key))
    found = examine(control, key)
    assert found.clean
    assert found.checkpoints >= 3


def test_a_silent_log_has_one_heartbeat_a_minute_however_long_a_transaction_holds_it_up(
    control, tmp_path, monkeypatch
):
    one = sealer(control.engine("sealer"), tmp_path / "signer.json")
    seal_all(one)
    began = time.monotonic()
    now = [began]
    monkeypatch.setattr("audit.sealer.monotonic", lambda: now[0])
    one.step()
    with psycopg.connect(control.admin_url) as held:
        held.execute("SELECT pg_current_xact_id()")  # nothing after it is final
        for second in range(150):
            now[0] = began + second
            one.step()
    beats = "SELECT count(*) FROM audit.event WHERE action = 'audit.heartbeat'"
    assert control.one(beats) == 2
    control.act("UPDATE audit.log SET sealed_at = now() - interval '1 year'")  # a clock that jumps
    one.step()
    one.step()
    assert control.one(beats) == 2


def test_a_right_to_seal_from_a_clock_that_was_put_back_does_not_hold_others_up(control, tmp_path):
    control.act("UPDATE audit.log SET holder = 'dead', held_until = now() + interval '1 hour'")
    assert seal_all(sealer(control.engine("sealer"), tmp_path / "signer.json")) > 0


def test_what_is_signed_is_durable_where_other_commits_are_not(control, tmp_path):
    one = sealer(control.engine("sealer"), tmp_path / "signer.json")
    with transaction(one.engine) as tx:
        for setting, expected in (("off", "on"), ("local", "local"), ("remote_apply",) * 2):
            tx.execute(text(f"SET LOCAL synchronous_commit = {setting}"))
            assert sealing.hold(tx, "sealer-1", sealing.state(tx), lease=timedelta(seconds=1))
            assert tx.execute(text("SHOW synchronous_commit")).scalar_one() == expected


def test_a_log_without_its_row_says_so(control, tmp_path):
    control.act("DELETE FROM audit.log")
    with pytest.raises(ConfigError, match="compare with the anchors"):
        sealer(control.engine("sealer"), tmp_path / "signer.json").step()


# ── what is left over after a restore ────────────────────────────────────────────────────────


def restored(control) -> None:
    """Make the database look like one that another server wrote."""
    control.act_plainly(
        "ALTER TABLE audit.epoch DISABLE TRIGGER no_change; UPDATE audit.epoch SET xid = '1'; "
        "ALTER TABLE audit.epoch ENABLE ALWAYS TRIGGER no_change"
    )


def write(control, count: int) -> None:
    with transaction(control.engine("operator")) as tx:
        audit.append(tx, *(event(uuid4()) for _ in range(count)))


def test_each_event_is_looked_at_once_and_the_next_sealer_goes_on_where_the_last_one_stood(
    control, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("audit.sealer.LOOKED", 50)
    monkeypatch.setattr("audit.sealer.LOOK_S", 0.0)  # one look a step
    key = tmp_path / "signer.json"
    write(control, 300)
    size = seal_all(sealer(control.engine("sealer"), key))
    write(control, 30)
    late = control.one("SELECT max(seq) FROM audit.event")
    SealedLog(control, tmp_path).tamper(  # one that another server wrote before those sealed
        f"UPDATE audit.event SET at = at - interval '1 hour' WHERE seq = {late}"
    )
    restored(control)
    looks: list[sealing.LeftOver] = []
    look = sealing.left_over

    def counted(tx, after, most) -> sealing.LeftOver:
        looks.append(look(tx, after, most))
        return looks[-1]

    monkeypatch.setattr(sealing, "left_over", counted)
    first = sealer(control.engine("sealer"), key)
    first.step()  # the epoch begins
    first.close()
    write(control, 3)  # behind the cut: not before the rest
    with caplog.at_level("WARNING"):
        for turn in range(20):
            one = sealer(control.engine("sealer"), key, f"sealer-{turn}")
            one.step()
            one.close()
            if looks[-1].ended and not looks[-1].found:
                break
    assert len(looks) <= (size + 30 + 3) // 50 + 3, "it looked at some twice"
    taken = [len(found.found.seqs) for found in looks if found.found]
    assert sum(taken) == 30
    assert taken[0] == 1, "the oldest is in the first look"
    (said,) = [r for r in caplog.records if r.message == "audit_left_over_sealed"]
    assert (said.events, said.epoch) == (30, 2)
    seal_all(sealer(control.engine("sealer"), key))
    found = examine(control, key)
    assert found.clean, found
    assert found.size == size + 30 + 3 + 2


def test_looking_for_what_is_left_over_reads_a_part_of_the_log_by_indexes(control, tmp_path):
    grow(control, 20, 1_000)
    seal_all(sealer(control.engine("sealer"), tmp_path / "signer.json"))
    control.act("ANALYZE audit.event; ANALYZE audit.checkpoint")
    for query, given in (
        (sealing._PAGE, {"most": 100, "floor": 10**9}),
        (sealing._SEALED, {"first": "2000-01-01", "last": "2000-01-02"}),
    ):
        with transaction(control.engine("sealer")) as tx:
            found = tx.execute(
                text("EXPLAIN (ANALYZE, BUFFERS, FORMAT json) " + query.text), given
            ).scalar_one()
        assert blocks(found[0]["Plan"]) < 150, query.text


def test_who_only_stands_by_does_not_look_for_what_is_left_over(control, tmp_path, monkeypatch):
    key = tmp_path / "signer.json"
    write(control, 3)
    first = sealer(control.engine("sealer"), key)
    first.step()
    restored(control)
    first.step()
    monkeypatch.setattr(sealing, "left_over", None)  # to call it would fail
    with transaction(control.engine("sealer")) as tx:
        assert sealing.state(tx).left_over
        assert sealing.state(tx).held
    assert sealer(control.engine("sealer"), key, "other").step() is None


def test_a_large_transaction_is_sorted_a_few_times_only(control, tmp_path):
    write(control, 40_000)
    key = tmp_path / "signer.json"
    one, steps = sealer(control.engine("sealer"), key), 0
    while one.step() is not None:
        steps += 1
    found = examine(control, key)
    assert found.clean
    assert (steps < 10, found.checkpoints) == (True, 40_000 // 1_024 + 1)


@pytest.mark.parametrize("moment", ["audit.tile", "audit.checkpoint"])
def test_a_log_that_grows_while_another_sealer_looks_is_not_taken_for_one_that_went_back(
    control, tmp_path, moment
):
    key = tmp_path / "signer.json"
    write(control, 3)
    first = sealer(control.engine("sealer"), key, "first")
    seal_all(first)
    write(control, 3)
    second = sealer(control.engine("sealer"), key, "second")
    grown: list[str] = []

    def grow(*said: object) -> None:
        if f"FROM {moment}" in str(said[2]) and not grown:
            grown.append(str(said[2]))
            assert first.step() is not None

    listen(second.engine, "before_cursor_execute", grow)
    assert second.step() is None
    remove(second.engine, "before_cursor_execute", grow)
    assert grown
    write(control, 1)
    first.close()
    assert second.step() is not None
    assert examine(control, key).clean


# ── keys that were rotated away ──────────────────────────────────────────────────────────────


def rotated(control, key) -> None:
    """A sealer's life: it signs with one key, with both, with the other."""
    one = sealer(control.engine("sealer"), key)
    seal_all(one)
    before = one.signer.public[0]
    signing.rotate(key)
    one.signer = signing.load(key)
    with transaction(one.engine) as tx:
        said = statement.signed(
            one.signer, sealing.state(tx).log_id, AuditAction.SIGNER_ROTATED,
            {"before": before.line, "after": one.signer.public[0].line},
        )  # fmt: skip
        audit.append(tx, one._event(AuditAction.SIGNER_ROTATED, **said))
    seal_all(one)
    signing.retire(key)
    write(control, 1)
    seal_all(sealer(control.engine("sealer"), key))


@pytest.mark.parametrize("known", ["memory", "log", "both"])
def test_a_checkpoint_that_only_a_retired_key_signed_is_not_taken_for_ours(
    control, tmp_path, known
):
    key, stolen = tmp_path / "signer.json", tmp_path / "stolen" / "signer.json"
    stolen.parent.mkdir()
    write(control, 1)
    seal_all(sealer(control.engine("sealer"), key))
    shutil.copy(key, stolen)
    (old,) = signing.load(stolen).public
    rotated(control, key)
    if known == "log":
        memory.path_of(key).unlink()
    if known == "memory":
        SealedLog(control, tmp_path).tamper(
            "UPDATE audit.event SET action = 'x' WHERE action = 'signer.rotated'"
        )
    write(control, 1)
    thief = sealer(control.engine("sealer"), stolen)
    thief.trusted = signing.load(key).public
    seal_all(thief)
    one = sealer(control.engine("sealer"), key)
    one.trusted = (old,)  # it still stands for what it signed, say for anchors
    with pytest.raises(LogWentBack, match="only by one that was rotated away"):
        one.step()


def test_a_key_that_was_lost_may_have_signed_last(control, tmp_path):
    key = tmp_path / "signer.json"
    write(control, 1)
    seal_all(sealer(control.engine("sealer"), key))
    shutil.copy(memory.path_of(key), tmp_path / "before")
    write(control, 1)
    seal_all(sealer(control.engine("sealer"), key))
    shutil.copy(tmp_path / "before", memory.path_of(key))  # killed before it was remembered
    (old,) = signing.load(key).public
    key.unlink()
    one = sealer(control.engine("sealer"), key)
    with pytest.raises(LogWentBack, match="signed by no key that this sealer knows"):
        one.step()
    one.trusted = (old,)
    write(control, 1)
    seal_all(one)
    recalled = memory.recall(memory.path_of(key))
    assert recalled is not None
    assert recalled.retired == ()


# ── what others say in its name ──────────────────────────────────────────────────────────────

HOSTILE = {
    "no JSON": "x",
    "a list": "[]",
    "no detail": "{}",
    "a list for a detail": '{"detail":[]}',
    "numbers": '{"detail":{"after":1,"before":2,"signature":3}}',
    "deep": '{"detail":' + "[" * 30_000,
    "deep and whole": '{"detail":{"after":' + "[" * 900 + "]" * 900 + "}}",
    "huge": '{"detail":{"before":"' + "x" * 60_000 + '","after":"y","signature":"z"}}',
    "half a surrogate": '{"detail":{"before":"\\ud800","after":"\\ud800","signature":"\\ud800"}}',
    "not a number": '{"detail":{"before":NaN,"after":Infinity,"signature":-1e999}}',
    "a signature of others": '{"detail":{"after":"AFTER","signature":"— SIGNER AAAA\\n"}}',
    "a short signature": '{"detail":{"before":"BEFORE","signature":"— SIGNER AA==\\n"}}',
    "no base64": '{"detail":{"after":"AFTER","before":"BEFORE","signature":"— SIGNER A\\n"}}',
    "a zero": '{"detail":{"after":"\\u0000"}}',
}  # fmt: skip


def test_no_body_of_an_event_stops_a_sealer_that_rotates_its_key(control, tmp_path):
    key = tmp_path / "signer.json"
    write(control, 1)
    seal_all(sealer(control.engine("sealer"), key))
    before, after = signing.load(key).public[0], signing.rotate(key)
    for action in ("signer.rotated", "audit.epoch_started", "audit.pruned", "subject.erased"):
        for body in HOSTILE.values():
            names = {"AFTER": after.line, "BEFORE": before.line, "SIGNER": before.name}
            control.act(
                "INSERT INTO audit.event (class, action, target_kind, target_id, body) "
                "VALUES ('A', :action, 'instance', :target, :body)",
                action=action, target=audit.INSTANCE_ID,
                body=re.sub("AFTER|BEFORE|SIGNER", lambda found: names[found[0]], body),  # noqa: B023 - used up here
            )  # fmt: skip
    one = sealer(control.engine("sealer"), key)
    one.trusted = (before,)
    process = Process(one.engine, one, Opening((), None))
    for _ in range(8):
        process.turn()
    (said,) = control.all(
        "SELECT body::jsonb #>> '{detail,after}' FROM audit.event WHERE action = 'signer.rotated' "
        'AND body LIKE \'%%"principal":"sealer:%%\''
    )
    assert said == (after.line,)
    restored(control)
    memory.path_of(key).unlink()
    for _ in range(8):
        process.turn()
    process.close()
    found = examine(control, key)
    assert found.clean
    assert found.epoch == 2


def test_a_restored_log_is_intact_and_says_what_it_took_in(control, tmp_path):
    log = SealedLog(control, tmp_path)
    log.grow(5)
    log.write(4)
    restored(control)
    for _ in range(6):
        log.seal()
    report = log.live()
    assert report.exit_code == 0, report.lines
    details = [json.loads(str(body))["detail"] for (body,) in control.all(
        "SELECT body FROM audit.event WHERE action = 'audit.epoch_started' ORDER BY seq"
    )]  # fmt: skip
    assert [one.get("left_over") for one in details] == [None, 4]
    assert details[1]["oldest"].endswith("Z")
