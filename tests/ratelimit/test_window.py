"""The arithmetic of the limits, on a clock of the test's own."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from relay_grpc.ratelimit.window import MINUTE, Charge, Decision, Window, spend

NOON = 29_000_000 * MINUTE
limits = st.integers(1, 300)
costs = st.integers(0, 12)
units = st.integers(0, 300)
windows = st.builds(Window, st.sampled_from([NOON // MINUTE - 1, NOON // MINUTE]), units, units)
moments = st.integers(NOON, NOON + MINUTE - 1)


def charge(cost: int, limit: int) -> Charge:
    return Charge("subject", cost, limit, "calls", "workspace")


def take(now: int, window: Window, cost: int, limit: int) -> tuple[Window, Decision]:
    """Spends from one budget alone."""
    (window,), decision = spend(now, [window], [charge(cost, limit)])
    return window, decision


def spend_one_by_one(now: int, window: Window, limit: int) -> tuple[Window, int]:
    """Spends single units until refused. Returns how many were admitted."""
    admitted = 0
    while True:
        window, decision = take(now, window, 1, limit)
        if not decision.allowed:
            return window, admitted
        admitted += 1


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def test_numbers_of_an_admitted_request():
    window, decision = take(NOON + 15_000, Window(), 3, 60)
    assert decision == Decision(
        allowed=True, tightest=0, limit=60, remaining=57, reset_after=decision.reset_after, retry_after=0
    )
    # The three units fade from the end of this minute on: the first is free after a third of the next.
    assert decision.reset_after == 45 + 20
    assert window == Window(NOON // MINUTE, 3, 0)


def test_numbers_of_a_refused_request():
    full = Window(NOON // MINUTE - 1, current=60)
    window, decision = take(NOON + 500, full, 2, 60)
    assert decision == Decision(allowed=False, tightest=0, limit=60, remaining=0, reset_after=0.5, retry_after=1.5)
    assert window == Window(NOON // MINUTE, 0, 60)


def test_an_untouched_budget_is_whole():
    assert take(NOON, Window(), 0, 60)[1] == Decision(True, 0, limit=60, remaining=60, reset_after=0, retry_after=0)


def test_no_burst_at_the_boundary():
    limit = 600
    window, admitted = spend_one_by_one(NOON + MINUTE - 1, Window(), limit)
    assert admitted == limit
    in_the_next_second = 0
    for now in range(NOON + MINUTE, NOON + MINUTE + 1000, 10):
        window, admitted = spend_one_by_one(now, window, limit)
        in_the_next_second += admitted
    assert 0 < in_the_next_second <= limit / 30


def test_frequent_polling_loses_no_fraction_of_a_unit():
    window, _ = spend_one_by_one(NOON, Window(), 60)
    credited = 0
    for poll in range(1, 31):  # every 1.9 s for 57 s
        window, admitted = spend_one_by_one(NOON + MINUTE + poll * 1900, window, 60)
        credited += admitted
    assert credited == 57


def test_reading_spends_nothing_even_when_nothing_is_left():
    window, _ = spend_one_by_one(NOON, Window(), 5)
    for _ in range(3):
        assert take(NOON, window, 0, 5) == (window, Decision(True, 0, 5, 0, reset_after=72, retry_after=0))


def test_a_request_dearer_than_the_limit_takes_the_whole_budget():
    window, decision = take(NOON, Window(), 50, 20)
    assert decision.allowed
    assert decision.remaining == 0
    window, decision = take(NOON, window, 50, 20)
    assert not decision.allowed
    assert decision.retry_after == 120
    assert take(NOON + 2 * MINUTE, window, 50, 20)[1].allowed


def test_a_limit_of_zero_admits_nothing():
    _, decision = take(NOON, Window(), 1, 0)
    assert not decision.allowed
    assert decision.retry_after > 0


def test_a_lowered_limit_counts_what_was_spent_before():
    window, _ = spend_one_by_one(NOON, Window(), 60)
    _, decision = take(NOON, window, 1, 10)
    assert (decision.allowed, decision.remaining) == (False, 0)
    assert take(NOON, window, 0, 10)[1].allowed


def test_a_clock_that_steps_back_over_the_boundary_does_not_reopen_the_minute():
    window, _ = spend_one_by_one(NOON, Window(), 60)
    assert not take(NOON - 50, window, 1, 60)[1].allowed
    window = Window(NOON // MINUTE, current=10, previous=30)
    assert take(NOON - 50, window, 0, 60)[1].remaining == 20


def test_a_clock_that_was_far_ahead_does_not_block_for_long():
    window, _ = spend_one_by_one(NOON + 3600_000, Window(), 60)
    assert take(NOON, window, 1, 60)[1].allowed


@given(limits, st.lists(st.tuples(st.integers(0, 45_000), costs), max_size=60))
def test_an_aligned_minute_never_admits_more_than_the_limit(limit: int, calls: list[tuple[int, int]]):
    now, window = NOON, Window()
    admitted: dict[int, int] = {}
    for pause, cost in calls:
        now += pause
        before = window
        window, decision = take(now, window, cost, limit)
        if decision.allowed and cost:
            admitted[now // MINUTE] = admitted.get(now // MINUTE, 0) + min(cost, limit)
        else:
            assert (window.current, window.previous) in {
                (before.current, before.previous),
                (0, before.current),
                (0, 0),
            }
    assert all(units <= limit for units in admitted.values())


@given(limits, st.integers(0, MINUTE - 1), st.lists(st.integers(0, 999), max_size=20))
def test_the_second_after_a_full_minute_admits_a_thirtieth_at_most(limit: int, moment: int, moments: list[int]):
    window, _ = spend_one_by_one(NOON + moment, Window(), limit)
    in_the_next_second = 0
    for millisecond in sorted({*moments, 999}):
        window, admitted = spend_one_by_one(NOON + MINUTE + millisecond, window, limit)
        in_the_next_second += admitted
    assert in_the_next_second <= limit / 30


def test_five_times_the_load_over_three_boundaries_is_admitted_at_the_limit_and_without_a_burst():
    limit, window = 300, Window()
    minutes, seconds = Counter[int](), Counter[int]()
    for now in range(NOON, NOON + 4 * MINUTE, 40):  # 1,500 calls a minute
        window, decision = take(now, window, 1, limit)
        minutes[(now - NOON) // MINUTE] += decision.allowed
        seconds[(now - NOON) // 1000] += decision.allowed
    assert minutes[0] == limit
    assert all(0.95 * limit <= minutes[minute] <= limit for minute in (1, 2, 3))
    assert all(seconds[second] <= limit / 30 for second in range(60, 240))


several = st.lists(st.tuples(costs, limits), min_size=1, max_size=4)


@given(several, st.lists(st.tuples(st.integers(0, 45_000), st.integers(0, 14)), max_size=60))
def test_several_budgets_are_spent_together_or_not_at_all(prices: list[tuple[int, int]], calls: list[tuple[int, int]]):
    """calls: pauses, and which budgets the call is charged to, as bits."""
    now, kept = NOON, [Window()] * len(prices)
    for pause, bits in calls:
        now += pause
        places = [place for place in range(len(prices)) if bits >> place & 1] or [0]
        charges = [charge(*prices[place]) for place in places]
        alone = [take(now, kept[place], *prices[place]) for place in places]
        after, decision = spend(now, [kept[place] for place in places], charges)
        assert decision.allowed == all(one.allowed for _, one in alone)
        told = [one for _, one in alone][decision.tightest]
        if decision.allowed:
            assert after == [window for window, _ in alone]
            assert decision == told._replace(tightest=decision.tightest)
            assert all(told.remaining / told.limit <= one.remaining / one.limit for _, one in alone)
        else:
            unspent = [take(now, kept[place], 0, prices[place][1]) for place in places]
            assert after == [window for window, _ in unspent]
            assert not told.allowed
            assert decision.retry_after == told.retry_after == max(one.retry_after for _, one in alone)
            assert decision.remaining == told.remaining
        for place, window in zip(places, after, strict=True):
            kept[place] = window


@given(moments, several.flatmap(lambda prices: st.tuples(st.just(prices), st.lists(windows, min_size=len(prices)))))
def test_honouring_the_hint_is_enough_for_all_of_them(now: int, given_: tuple[list[tuple[int, int]], list[Window]]):
    prices, kept = given_
    charges, kept = [charge(*price) for price in prices], kept[: len(prices)]
    after, decision = spend(now, kept, charges)
    if not decision.allowed:
        assert spend(now + milliseconds(decision.retry_after), after, charges)[1].allowed
        assert not spend(now + milliseconds(decision.retry_after) - 1, after, charges)[1].allowed


@given(moments, windows, st.integers(1, 12), limits)
def test_retry_after_is_the_first_moment_at_which_the_request_is_admitted(
    now: int, window: Window, cost: int, limit: int
):
    window, decision = take(now, window, cost, limit)
    if decision.allowed:
        assert decision.retry_after == 0
        return
    wait = milliseconds(decision.retry_after)
    assert wait >= 1
    assert decision.retry_after >= decision.reset_after
    assert take(now + wait, window, cost, limit)[1].allowed
    assert not take(now + wait - 1, window, cost, limit)[1].allowed


@given(moments, windows, limits)
def test_reset_after_is_the_first_moment_at_which_more_remains(now: int, window: Window, limit: int):
    window, decision = take(now, window, 0, limit)
    if decision.remaining == limit:
        assert decision.reset_after == 0
        return
    wait = milliseconds(decision.reset_after)
    assert take(now + wait, window, 0, limit)[1].remaining > decision.remaining
    assert take(now + wait - 1, window, 0, limit)[1].remaining == decision.remaining


@given(moments, windows, limits)
def test_what_remains_can_be_spent_and_no_more(now: int, window: Window, limit: int):
    remaining = take(now, window, 0, limit)[1].remaining
    assert spend_one_by_one(now, window, limit)[1] == remaining
