"""The sealer against a real database: every committed event once, in order, restart-safe."""

import pytest

from audit.checkpoint import Checkpoint
from audit.sealer import LogWentBack
from audit.tree import Edge
from crypto import signing
from storage import audit_log, sealing
from storage.engine import transaction

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


def test_sealed_events_are_read_in_the_order_of_their_indexes(shop):
    shop.apply({"public.items": "{mode: replace}"})
    size = shop.seal_all()
    with transaction(shop.control.engine("auditor")) as tx:
        found = list(audit_log.events(tx, 0, size))
        assert list(audit_log.events(tx, 2, 4)) == found[2:4]
    leaves = [bytes(leaf) for (leaf,) in shop.control.all(
        "SELECT leaf FROM audit.event ORDER BY xid, seq")]  # fmt: skip
    assert [index for index, _ in found] == list(range(size))
    assert [event.leaf for _, event in found if event] == leaves
