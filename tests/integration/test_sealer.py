"""The sealer against a real database: every committed event once, in order, restart-safe."""

import time
from datetime import timedelta
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text

from audit.checkpoint import Checkpoint
from audit.sealer import LogWentBack
from audit.tree import Edge
from crypto import signing
from schemas.errors import ConfigError
from storage import audit, sealing
from storage.engine import transaction
from tests.faults.sealing import event, examine, seal_all, sealer

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
