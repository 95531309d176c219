"""Which runs go to the queue: fairness and caps, as a pure function."""

from collections import Counter
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from scheduler.dispatch import pick
from storage.dispatch import AccountQueue, Candidate, Waiting


def waiting(accounts: dict[UUID, int], *, free: int = 1_000, **extra) -> Waiting:
    return Waiting(
        accounts=[
            AccountQueue(a, extra.get("weights", {}).get(a, 1.0), 0.0, 0, free) for a in accounts
        ],
        candidates=[
            Candidate(uuid4(), account, extra.get("resources", ()), 5)
            for account, count in accounts.items()
            for _ in range(count)
        ],
        resource_free=extra.get("resource_free", {}),
    )


def test_a_backlog_takes_turns_with_a_single_run():
    large, small = uuid4(), uuid4()
    picked = pick(waiting({large: 50, small: 1}), 6)
    assert len(picked) == 6
    assert small in [c.account_id for c in picked[:2]]


def test_weight_is_a_share():
    heavy, light = uuid4(), uuid4()
    seen = waiting({heavy: 50, light: 50}, weights={heavy: 2.0})
    counts = Counter(c.account_id for c in pick(seen, 30))
    assert counts[heavy] == 20
    assert counts[light] == 10


def test_a_full_resource_does_not_hold_back_the_others():
    account, busy, idle = uuid4(), uuid4(), uuid4()
    candidates = [Candidate(uuid4(), account, (busy,), 5), Candidate(uuid4(), account, (idle,), 5)]
    seen = Waiting([AccountQueue(account, 1.0, 0.0, 0, 10)], candidates, {busy: 0, idle: 1})
    assert [c.resources for c in pick(seen, 100)] == [(idle,)]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 30))
def test_no_cap_is_ever_exceeded(counts, free, wanted):
    accounts = {uuid4(): n for n in counts}
    shared = uuid4()
    seen = waiting(accounts, free=free, resources=(shared,), resource_free={shared: 3})
    picked = pick(seen, wanted)
    assert len(picked) <= wanted
    assert len(picked) <= 3, "the resource's cap"
    assert all(n <= free for n in Counter(c.account_id for c in picked).values())
    assert len({c.run_id for c in picked}) == len(picked)
