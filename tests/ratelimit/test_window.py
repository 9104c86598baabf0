from hypothesis import given
from hypothesis import strategies as st

from relay_grpc.ratelimit.window import MINUTE, Decision, Window, spend

NOON = 29_000_000 * MINUTE
limits = st.integers(1, 300)
costs = st.integers(0, 12)
units = st.integers(0, 300)
windows = st.builds(Window, st.sampled_from([NOON // MINUTE - 1, NOON // MINUTE]), units, units)
moments = st.integers(NOON, NOON + MINUTE - 1)


def spend_one_by_one(now: int, window: Window, limit: int) -> tuple[Window, int]:
    """Spends single units until refused. Returns how many were admitted."""
    admitted = 0
    while True:
        window, decision = spend(now, window, 1, limit)
        if not decision.allowed:
            return window, admitted
        admitted += 1


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def test_numbers_of_an_admitted_request():
    window, decision = spend(NOON + 15_000, Window(), 3, 60)
    assert decision == Decision(allowed=True, limit=60, remaining=57, reset_after=decision.reset_after, retry_after=0)
    # The three units fade from the end of this minute on: the first is free after a third of the next.
    assert decision.reset_after == 45 + 20
    assert window == Window(NOON // MINUTE, 3, 0)


def test_numbers_of_a_refused_request():
    full = Window(NOON // MINUTE - 1, current=60)
    window, decision = spend(NOON + 500, full, 2, 60)
    assert decision == Decision(allowed=False, limit=60, remaining=0, reset_after=0.5, retry_after=1.5)
    assert window == Window(NOON // MINUTE, 0, 60)


def test_an_untouched_budget_is_whole():
    assert spend(NOON, Window(), 0, 60)[1] == Decision(True, limit=60, remaining=60, reset_after=0, retry_after=0)


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
        assert spend(NOON, window, 0, 5) == (window, Decision(True, 5, 0, reset_after=72, retry_after=0))


def test_a_request_dearer_than_the_limit_takes_the_whole_budget():
    window, decision = spend(NOON, Window(), 50, 20)
    assert decision.allowed
    assert decision.remaining == 0
    window, decision = spend(NOON, window, 50, 20)
    assert not decision.allowed
    assert decision.retry_after == 120
    assert spend(NOON + 2 * MINUTE, window, 50, 20)[1].allowed


def test_a_limit_of_zero_admits_nothing():
    _, decision = spend(NOON, Window(), 1, 0)
    assert not decision.allowed
    assert decision.retry_after > 0


def test_a_lowered_limit_counts_what_was_spent_before():
    window, _ = spend_one_by_one(NOON, Window(), 60)
    _, decision = spend(NOON, window, 1, 10)
    assert (decision.allowed, decision.remaining) == (False, 0)
    assert spend(NOON, window, 0, 10)[1].allowed


def test_a_clock_that_steps_back_over_the_boundary_does_not_reopen_the_minute():
    window, _ = spend_one_by_one(NOON, Window(), 60)
    assert not spend(NOON - 50, window, 1, 60)[1].allowed
    window = Window(NOON // MINUTE, current=10, previous=30)
    assert spend(NOON - 50, window, 0, 60)[1].remaining == 20


def test_a_clock_that_was_far_ahead_does_not_block_for_long():
    window, _ = spend_one_by_one(NOON + 3600_000, Window(), 60)
    assert spend(NOON, window, 1, 60)[1].allowed


@given(limits, st.lists(st.tuples(st.integers(0, 45_000), costs), max_size=60))
def test_an_aligned_minute_never_admits_more_than_the_limit(limit: int, requests: list[tuple[int, int]]):
    now, window = NOON, Window()
    admitted: dict[int, int] = {}
    for pause, cost in requests:
        now += pause
        before = window
        window, decision = spend(now, window, cost, limit)
        if decision.allowed and cost:
            admitted[now // MINUTE] = admitted.get(now // MINUTE, 0) + min(cost, limit)
        else:
            assert (window.current, window.previous) in {
                (before.current, before.previous),
                (0, before.current),
                (0, 0),
            }
    assert all(units <= limit for units in admitted.values())


@given(moments, windows, st.integers(1, 12), limits)
def test_retry_after_is_the_first_moment_at_which_the_request_is_admitted(
    now: int, window: Window, cost: int, limit: int
):
    window, decision = spend(now, window, cost, limit)
    if decision.allowed:
        assert decision.retry_after == 0
        return
    wait = milliseconds(decision.retry_after)
    assert wait >= 1
    assert decision.retry_after >= decision.reset_after
    assert spend(now + wait, window, cost, limit)[1].allowed
    assert not spend(now + wait - 1, window, cost, limit)[1].allowed


@given(moments, windows, limits)
def test_reset_after_is_the_first_moment_at_which_more_remains(now: int, window: Window, limit: int):
    window, decision = spend(now, window, 0, limit)
    if decision.remaining == limit:
        assert decision.reset_after == 0
        return
    wait = milliseconds(decision.reset_after)
    assert spend(now + wait, window, 0, limit)[1].remaining > decision.remaining
    assert spend(now + wait - 1, window, 0, limit)[1].remaining == decision.remaining


@given(moments, windows, limits)
def test_what_remains_can_be_spent_and_no_more(now: int, window: Window, limit: int):
    remaining = spend(now, window, 0, limit)[1].remaining
    assert spend_one_by_one(now, window, limit)[1] == remaining
