"""Which runs go to the queue: fairness and caps, as a pure function."""

from collections import Counter
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from scheduler.dispatch import pick
from storage.dispatch import AccountQueue, Candidate, Waiting


def waiting(accounts: dict[UUID, int], *, slots: int = 100, free: int = 1_000, **extra) -> Waiting:
    return Waiting(
        live_slots=slots,
        in_flight=extra.get("in_flight", 0),
        accounts=[
            AccountQueue(a, extra.get("weights", {}).get(a, 1.0), 0.0, free) for a in accounts
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
    picked = pick(waiting({large: 50, small: 1}, slots=4), runs_max=100)
    assert len(picked) == 6, "one and a half times the free slots"
    assert small in [c.account_id for c in picked[:2]]


def test_weight_is_a_share():
    heavy, light = uuid4(), uuid4()
    seen = waiting({heavy: 50, light: 50}, slots=20, weights={heavy: 2.0})
    counts = Counter(c.account_id for c in pick(seen, runs_max=100))
    assert counts[heavy] == 20
    assert counts[light] == 10


def test_nothing_goes_out_without_a_live_worker():
    assert pick(waiting({uuid4(): 5}, slots=0), runs_max=100) == []


def test_a_full_resource_does_not_hold_back_the_others():
    account, busy, idle = uuid4(), uuid4(), uuid4()
    candidates = [Candidate(uuid4(), account, (busy,), 5), Candidate(uuid4(), account, (idle,), 5)]
    seen = Waiting(10, 0, [AccountQueue(account, 1.0, 0.0, 10)], candidates, {busy: 0, idle: 1})
    assert [c.resources for c in pick(seen, runs_max=100)] == [(idle,)]


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.integers(0, 20),
    st.integers(0, 5),
    st.integers(0, 30),
    st.integers(0, 10),
)
def test_no_cap_is_ever_exceeded(counts, slots, free, runs_max, in_flight):
    accounts = {uuid4(): n for n in counts}
    shared = uuid4()
    seen = waiting(
        accounts, slots=slots, free=free, in_flight=in_flight, resources=(shared,),
        resource_free={shared: 3},
    )  # fmt: skip
    picked = pick(seen, runs_max=runs_max)
    assert len(picked) + in_flight <= max(runs_max, in_flight)
    assert len(picked) <= 3, "the resource's cap"
    assert all(n <= free for n in Counter(c.account_id for c in picked).values())
    assert len({c.run_id for c in picked}) == len(picked)
