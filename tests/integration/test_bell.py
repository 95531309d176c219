"""Whoever asks for a run rings, and schedulers that hear it do not wait for their next look."""

import time
from contextlib import closing
from threading import Event, Thread

import pytest

from scheduler import bell as hearing
from scheduler import main
from scheduler.bell import Bell
from schemas.runs import RunState
from storage import bell
from storage.engine import open_link

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

LISTENERS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND query LIKE 'LISTEN %' AND state = 'idle'"
)


@pytest.fixture
def shop(world):
    world.pair.source("CREATE TABLE t (id int PRIMARY KEY)")
    world.apply({"public.t": "{mode: merge, key: [id]}"})
    return world


@pytest.fixture
def listening(shop, monkeypatch):
    monkeypatch.setattr(hearing, "_AGAIN_S", 0.05)
    made = Bell(lambda: open_link(shop.control.url, "scheduler"))
    made.start()
    until(lambda: shop.control.one(LISTENERS) == 1)
    yield made
    made.close()


def until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_people_ask_for_rings_when_it_is_committed(shop, listening):
    with (
        closing(open_link(shop.control.url, "scheduler")) as link,
        shop.deps.engine.connect() as tx,
    ):
        assert bell.attend(link)
        bell.ring(tx)
        assert not bell.heard(link, 0), "nothing is committed"
        tx.rollback()
        shop.enqueue()
        assert listening.wait(60)
        assert bell.heard(link, 60)
        assert not bell.heard(link, 0), "what was rolled back rang"


def test_a_bell_that_lost_its_session_listens_on_another(shop, listening):
    gone = shop.control.one("SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN %'")
    shop.control.one("SELECT pg_terminate_backend(:pid)", pid=gone)
    until(lambda: shop.control.one(f"{LISTENERS} AND pid <> {gone}") == 1)
    shop.enqueue()
    assert listening.wait(60)


def test_behind_a_pooler_nobody_listens(shop):
    with closing(open_link(f"{shop.control.url}?pooler=transaction", "scheduler")) as link:
        assert not bell.attend(link)
    assert shop.control.one(LISTENERS) == 0


def test_a_scheduler_that_hears_it_dispatches_at_once(shop, monkeypatch):
    """Its next look would be in an hour."""
    monkeypatch.setattr(main, "DISPATCH_EVERY_S", 3_600.0)
    stop = Event()
    monkeypatch.setattr(main, "until_asked", lambda: stop)  # signals are for main threads
    scheduler = Thread(target=main.run, args=(shop.cli.settings,))
    scheduler.start()
    try:
        until(lambda: shop.control.one("SELECT count(*) FROM schedulers") == 1)  # it has looked
        until(lambda: shop.control.one(LISTENERS) == 1)
        shop.deps.heartbeat.beat()  # there is a worker with free slots
        asked = shop.enqueue()
        until(lambda: shop.run(asked.run_id).state is RunState.DISPATCHED)
    finally:
        stop.set()
        scheduler.join()
