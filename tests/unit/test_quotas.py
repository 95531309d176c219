"""Windows of calls: never more than the rate in any stretch of time, and no wait too short."""

from collections.abc import Mapping
from datetime import timedelta
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.rest.budget import ApiBudget, budget_of, holder_of
from connectors.rest.limits import IN_PLACE_LONGEST_S, SHORT_S, Pace
from connectors.rest.parts import ApiKey, Basic, Bearer, NoAuth, OAuth, RateLimit
from schemas.errors import Deferral
from schemas.quotas import Hold, Quota, Rate, Unshared, Windows, in_turn
from tests.unit.test_outcomes import outcome_of

HOUR = timedelta(hours=1)


def rate(calls: int, seconds: float, *, fixed: bool = False) -> Rate:
    return Rate(calls, timedelta(seconds=seconds), fixed=fixed)


RATES = st.builds(
    rate, st.integers(1, 20), st.sampled_from([0.01, 0.5, 1, 7, 60, 3_600]), fixed=st.booleans()
)


def most_within(times: list[int], period: int) -> int:
    """Return the most calls that any stretch of this length has."""
    return max(sum(begin <= t < begin + period for t in times) for begin in times)


@given(RATES, st.lists(st.integers(0, 2_000), min_size=1, max_size=200), st.integers(0, 10**12))
def test_no_stretch_of_time_has_more_calls_than_the_rate(one, steps, start):
    windows, now, made = Windows([one]), start, []
    for step in steps:
        now += step
        if windows.hold(now) is None:
            windows.add(now)
            made.append(now)
    period = one.per // timedelta(milliseconds=1)
    if one.fixed:
        assert max(sum(t // period == now // period for t in made) for now in made) <= one.calls
    else:
        assert most_within(made, period) <= one.calls


@given(st.lists(RATES, min_size=1, max_size=3), st.lists(st.integers(0, 500), max_size=60))
def test_a_hold_is_over_when_it_says_and_not_before(rates, steps):
    windows, now = Windows(rates), 1_700_000_000_000
    for step in steps:
        now += step
        hold = windows.hold(now)
        if hold is None:
            windows.add(now)
            continue
        assert hold.rate in rates
        end = now + round(hold.seconds * 1_000)
        assert windows.hold(end - 1) is not None
        assert windows.hold(end) is None
        return


def test_a_full_window_opens_again_at_most_two_slices_late():
    one = rate(5, 60)
    windows = Windows([one])
    for _ in range(5):
        windows.add(0)
    hold = windows.hold(0)
    assert hold is not None
    assert 60 <= hold.seconds <= 62


# ── turns ────────────────────────────────────────────────────────────────────────────────────


def quota(*rates: Rate) -> Quota:
    return Quota("api", "all", rates)


def test_a_short_hold_is_waited_and_a_long_one_is_a_deferral_that_names_the_quota():
    answers = [Hold(0.01, None), Hold(0.01, rate(1, 1)), None]
    waited = in_turn(lambda: answers.pop(0), quota(), patience=1, ended=Event())
    assert 0.02 <= waited <= 0.03
    with pytest.raises(Deferral) as caught:
        in_turn(lambda: Hold(90, rate(100, 60)), quota(), patience=10, ended=Event())
    assert caught.value.retry_after == timedelta(seconds=90)
    assert "api: quota all is used up: 100 calls per 1m, until 20" in caught.value.public
    with pytest.raises(Deferral, match="closed, as it told us"):
        in_turn(lambda: Hold(90, None), quota(), patience=10, ended=Event())


def test_whoever_never_gets_a_turn_is_deferred_and_who_is_cancelled_leaves():
    ended = Event()
    ended.set()
    assert in_turn(lambda: Hold(1, None), quota(), patience=10, ended=ended) == 0

    class Hasty(Event):
        def wait(self, timeout: float | None = None) -> bool:
            return timeout is None

    with pytest.raises(Deferral):
        in_turn(lambda: Hold(9, None), quota(), patience=10, ended=Hasty())


def test_one_reader_counts_by_itself_where_there_is_no_worker():
    alone, one, ended = Unshared(), quota(rate(2, 3_600)), Event()
    alone.take(one, patience=1, ended=ended)
    alone.take(one, patience=1, ended=ended)
    with pytest.raises(Deferral):
        alone.take(one, patience=1, ended=ended)
    other = quota()
    alone.close(other, 90)
    with pytest.raises(Deferral):
        alone.take(other, patience=1, ended=ended)


class Recorded:
    """Gives every turn, and remembers what patience was asked for."""

    def __init__(self) -> None:
        self.patience: list[float] = []

    def take(self, _quota: Quota, *, patience: float, ended: Event) -> None:
        del ended
        self.patience.append(patience)

    def close(self, _quota: Quota, _seconds: float) -> None:
        raise AssertionError


def test_a_wait_is_in_place_while_reading_again_would_take_longer():
    """Else a full read of more pages than a window has would never come to its end."""
    quotas, one = Recorded(), quota(rate(100, 60))
    pace = Pace("api", quotas, Event())
    for _ in range(102):
        pace.before(one)
    assert quotas.patience[0] == SHORT_S
    assert quotas.patience[100] == pytest.approx(60, abs=2)
    for _ in range(500):
        pace.before(one)
    assert quotas.patience[-1] == IN_PLACE_LONGEST_S
    pace.kept()
    pace.before(one)
    assert quotas.patience[-1] == SHORT_S


def test_fifty_runs_that_one_limit_deferred_do_not_come_back_at_once():
    error = Deferral("x", retry_after=timedelta(seconds=30))
    waits = sorted(outcome_of(error).retry_after or timedelta(0) for _ in range(50))
    assert waits[0] >= timedelta(seconds=30)
    assert waits[-1] - waits[0] > timedelta(seconds=4)


# ── what a manifest declares ─────────────────────────────────────────────────────────────────


def declared(*policies: Mapping[str, object]) -> ApiBudget:
    return ApiBudget.model_validate({"type": "HTTPAPIBudget", "policies": policies})


def test_the_first_policy_that_fits_a_call_counts():
    search = {
        "type": "MovingWindowCallRatePolicy", "name": "search",
        "rates": [{"limit": 4, "interval": "1s"}, {"limit": 100, "interval": "1m"}],
        "matchers": [{"method": "POST", "url_path_pattern": "/search$"}],
    }  # fmt: skip
    daily = {"type": "FixedWindowCallRatePolicy", "period": "1d", "call_limit": 1_000}
    budget = budget_of("api", declared(search, daily), ("who",))
    found = budget.quota_of("POST", "/crm/{{ config.kind }}/search")
    assert found == Quota("api", "search", (rate(4, 1), rate(100, 60)), ("who",))
    for method, route in (("GET", "/crm/search"), ("POST", "/search/x")):
        other = budget.quota_of(method, route)
        assert other == Quota("api", "policy 2", (rate(1_000, 86_400, fixed=True),), ("who",))
    assert budget_of("api", None, ()).quota_of("GET", "/x") is None
    only = budget_of("api", declared(search), ())
    assert only.quota_of("GET", "/x") is None
    untold = budget_of("api", declared({"type": "UnlimitedCallRatePolicy"}), ())
    assert untold.quota_of("GET", "/x") == Quota("api", "policy 1")
    short = budget_of("api", RateLimit(calls=3, per=timedelta(seconds=1)), ())
    assert short.quota_of("GET", "/x") == Quota("api", "rate_limit", (rate(3, 1),))


@pytest.mark.parametrize(
    "policy",
    [
        {"type": "MovingWindowCallRatePolicy", "rates": []},
        {"type": "MovingWindowCallRatePolicy", "rates": [{"limit": 0, "interval": "1s"}]},
        {"type": "MovingWindowCallRatePolicy", "rates": [{"limit": 1, "interval": "0s"}]},
        {"type": "FixedWindowCallRatePolicy", "period": "32d", "call_limit": 1},
        {"type": "UnlimitedCallRatePolicy", "matchers": [{"url_path_pattern": "("}]},
        {"type": "TokenBucket"},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy):
    with pytest.raises(ValueError, match="policies"):
        declared(policy)


def test_two_policies_of_one_name_are_refused():
    one = {"type": "UnlimitedCallRatePolicy", "name": "x"}
    with pytest.raises(ValueError, match="same name"):
        declared(one, one)


def test_a_login_is_told_by_what_lasts():
    names = {"config": {"user": "ada"}, "partition": {}}
    secrets = {"token": "t", "password": "p", "api_key": "k", "client_secret": "c"}
    oauth = {"type": "OAuthAuthenticator", "token_refresh_endpoint": "https://x", "client_id": "i"}
    assert holder_of(Bearer(type="BearerAuthenticator"), secrets, names) == ("bearer", "t")
    basic = Basic(type="BasicHttpAuthenticator", username="{{ config.user }}")
    assert holder_of(basic, secrets, names) == ("basic", "ada", "p")
    key = ApiKey(type="ApiKeyAuthenticator", header="X")
    assert holder_of(key, secrets, names) == ("key", "k")
    assert holder_of(OAuth.model_validate(oauth), secrets, names) == ("client", "i", "c")
    assert holder_of(NoAuth(), secrets, names) == ()
    assert "tok-canary" not in repr(Quota("api", "all", (), ("bearer", "tok-canary")))
