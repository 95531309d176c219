"""A run that waits in place says for what, to whoever asks why nothing moves, from any process."""

from threading import Event, Thread

import pytest

from scheduler import ticks
from schemas.quotas import Hold, Quota, in_turn
from schemas.runs import Rule, RunKind, RunOptions
from storage import connections, runs
from storage import explain as explanations
from tests.integration.test_quotas import Shop, manifest
from tests.rest_api import Api, Reply
from tests.world import OPERATOR
from workers.enqueue import open_client

pytestmark = pytest.mark.integration


@pytest.fixture
def api():
    made = Api()
    made.tables["orders"] = [{"id": n} for n in range(6)]
    yield made
    made.close()


@pytest.fixture
def shop(world, api, valkey):
    valkey.flush()
    client = open_client(valkey.url)
    yield Shop(world, api)
    client.close()


def explained(shop, run_id) -> str:
    """What there is to say of a run after one more heartbeat of its worker."""
    shop.world.deps.heartbeat.beat()
    with shop.world.cli.inside() as (tx, _, _name):
        return explanations.explain(tx, run_id, runs_max=100).sentence


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({}, "shop: is asked again then"),
        (
            {"api_budget": {"policies": [{"type": "UnlimitedCallRatePolicy", "name": "all"}]}},
            "quota all is closed, as it told us, until ",
        ),
    ],
    ids=["alone", "shared"],
)
def test_a_wait_in_place_is_shown_while_it_lasts_and_no_longer(shop, shell, budget, says):
    shop.apply(manifest(**budget))
    shop.api.script.append(Reply(429, {}, {"Retry-After": "9"}))
    with shop.world.cli.inside() as (tx, _, _name):
        subject = connections.subject(connections.get(tx, "one"))
        asked = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR)
    working = Thread(target=shop.world.step)
    working.start()
    try:
        found = ""
        while working.is_alive() and "waits in place until" not in found:
            found = explained(shop, asked.run_id)
        assert "executes attempt 1; it waits in place until 20" in found
        assert says in found
        assert "canary" not in found
        code, out, _ = shell("run", "explain", "one")
        assert (code, says in out) == (0, True)
        shell("run", "cancel", "one")  # it need not last; it may be over by now
        shop.world.deps.heartbeat.beat()
    finally:
        working.join(timeout=30)
    assert shop.world.run(asked.run_id).state in {"cancelled", "succeeded"}
    assert "waits in place" not in explained(shop, asked.run_id)


def test_what_is_shown_ends_with_the_wait_and_comes_for_each():
    seen: list[str] = []
    holds = [Hold(0.001, None), Hold(0.002, None), None]

    class Showing:
        def __init__(self, what: str, seconds: float) -> None:
            seen.append(f"{what} {seconds > 0}")

        def __enter__(self) -> None:
            seen.append("begins")

        def __exit__(self, *_: object) -> None:
            seen.append("ends")

    in_turn(lambda: holds.pop(0), Quota("api", "q"), patience=1, ended=Event(), shown=Showing)
    assert [one for one in seen if not one.startswith("api: quota q")] == ["begins", "ends"] * 2


def test_a_wait_that_is_over_by_the_servers_clock_is_not_shown(shop):
    shop.apply(manifest())
    with shop.world.cli.inside() as (tx, _, _name):
        subject = connections.subject(connections.get(tx, "one"))
        asked = runs.enqueue(tx, subject, RunKind.SYNC, RunOptions(), OPERATOR)
    (job,) = shop.world.dispatch()
    shop.world.claim(job)
    ticks.presence_tick(shop.world.scheduler)
    for until, shown in (("now() + interval '1 min'", True), ("now() - interval '1 s'", False)):
        shop.world.control.act(f"UPDATE leases SET waits_for = 'x', waits_until = {until}")
        with shop.world.cli.inside() as (tx, _, _name):
            why = explanations.explain(tx, asked.run_id, runs_max=100)
        assert why.rule is Rule.RUNNING
        assert ("waits in place" in why.sentence) is shown
