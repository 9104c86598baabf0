"""The breaker's arithmetic: what opens it, what it waits for, what is told, and what ends it."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_grpc.actions.breaker import (
    FAILURES_TO_DISABLE,
    FAILURES_TO_OPEN,
    LONGEST_PAUSE,
    WARNINGS,
    Breaker,
    Decision,
    Tally,
    after,
    tally,
)
from relay_grpc.actions.execution import AttemptResult, Outcome

NOW = datetime(2026, 1, 31, tzinfo=UTC)
PAUSE = timedelta(seconds=30)
SUCCESS, FAILURE, PROBE = Tally(succeeded=True), Tally(failures=1), Tally(failures=1, probes=1)
OPEN = Breaker(FAILURES_TO_OPEN, NOW, 0, NOW + PAUSE)

results = st.builds(
    AttemptResult,
    st.sampled_from(Outcome),
    st.sampled_from([0, 200, 302, 429, 500, 503]),
)
tallies = st.lists(st.tuples(results, st.booleans())).map(
    lambda seen: reduce(Tally.then, filter(None, (tally(one, probe=probe) for one, probe in seen)), Tally())
)


def step(breaker: Breaker, seen: Tally, now: datetime = NOW) -> Decision:
    return after(breaker, seen, pause=PAUSE, now=now)


def walk(seen: Sequence[Tally], breaker: Breaker = Breaker()) -> tuple[Breaker, list[tuple[str, str]]]:  # noqa: B008
    """The results one by one, an hour apart; the events of all of them."""
    events: list[tuple[str, str]] = []
    for hour, one in enumerate(seen):
        decision = step(breaker, one, NOW + timedelta(hours=hour))
        breaker = decision.breaker
        events += decision.events
    return breaker, events


@given(st.lists(tallies))
def test_it_is_open_from_10_failures_on_and_closed_after_every_success(seen: list[Tally]) -> None:
    breaker = Breaker()
    for one in seen:
        decision = step(breaker, one)
        breaker = decision.breaker
        assert breaker.failures >= breaker.probes >= 0
        assert (breaker.open_until is not None) == (breaker.failures >= FAILURES_TO_OPEN)
        assert (breaker.failing_since is not None) == (breaker.failures > 0)
        assert bool(decision.disabled_reason) == (breaker.failures >= FAILURES_TO_DISABLE)
        assert ("connection.disabled" in dict(decision.events)) == bool(decision.disabled_reason)
        if one.succeeded and not one.failures:
            assert breaker == Breaker()


@given(st.lists(st.tuples(results, st.just(False)), max_size=40), st.integers(0, 40))
def test_results_that_are_written_together_do_what_they_do_one_by_one(
    seen: list[tuple[AttemptResult, bool]], cut: int
) -> None:
    told = [one for result, probe in seen if (one := tally(result, probe=probe))]
    together = reduce(Tally.then, told, Tally())
    in_two = reduce(Tally.then, told[:cut], Tally()).then(reduce(Tally.then, told[cut:], Tally()))
    assert in_two == together
    one_by_one = Breaker()
    for one in told:
        one_by_one = step(one_by_one, one).breaker
    assert step(Breaker(), together).breaker == one_by_one


@given(st.integers(1, 95), st.sampled_from([0.1, 30.0, 3600.0]))
def test_each_probe_that_fails_doubles_the_pause_up_to_an_hour(probes: int, pause: float) -> None:
    breaker = after(Breaker(), Tally(failures=50), pause=timedelta(seconds=pause), now=NOW).breaker
    waits = []
    for _ in range(probes):
        breaker = after(breaker, PROBE, pause=timedelta(seconds=pause), now=NOW).breaker
        assert breaker.open_until
        waits.append((breaker.open_until - NOW).total_seconds())
    assert breaker.probes == probes
    assert waits == [min(pause * 2**n, LONGEST_PAUSE.total_seconds()) for n in range(1, probes + 1)]


@given(st.integers(1, 500))
def test_what_was_under_way_when_it_opened_prolongs_nothing_and_gives_nobody_up(many: int) -> None:
    assert step(OPEN, Tally(failures=many)) == Decision(OPEN)
    opened = step(Breaker(), Tally(failures=many + FAILURES_TO_OPEN))
    assert opened == Decision(OPEN)
    assert step(OPEN, SUCCESS).breaker == Breaker()


def test_each_warning_is_told_once_in_a_row_of_failures() -> None:
    row = [FAILURE] * FAILURES_TO_OPEN + [PROBE] * (FAILURES_TO_DISABLE - FAILURES_TO_OPEN - 1)
    warned = [("connection.degraded", str(n)) for n in WARNINGS[:-1]]
    breaker, events = walk(row)
    assert events == warned
    assert (breaker.failures, breaker.failing_since) == (99, NOW)
    assert walk([*row, SUCCESS, *row])[1] == [*warned, ("connection.recovered", ""), *warned]
    end = step(breaker, PROBE)
    assert end.events == (("connection.degraded", "100"), ("connection.disabled", "FAILING"))
    assert end.disabled_reason == "100 deliveries in a row failed"


def test_a_row_that_nobody_was_told_of_ends_without_a_word() -> None:
    assert walk([FAILURE] * FAILURES_TO_OPEN + [PROBE] * 39 + [SUCCESS]) == (Breaker(), [])


@pytest.mark.parametrize("breaker", [Breaker(), OPEN])
def test_410_disables_at_once(breaker: Breaker) -> None:
    seen = tally(AttemptResult(Outcome.REFUSED, status_code=410), probe=False)
    assert seen
    decision = step(breaker, seen)
    assert decision.events == (("connection.disabled", "GONE"),)
    assert decision.disabled_reason == "the receiver answered 410 Gone"
    assert step(breaker, seen.then(SUCCESS)).disabled_reason, "whatever came after it"


@pytest.mark.parametrize(
    ("result", "counts"),
    [
        (AttemptResult(Outcome.TIMEOUT), True),
        (AttemptResult(Outcome.UNREACHABLE, sent=False), True),
        (AttemptResult(Outcome.EGRESS_REFUSED, sent=False), True),
        (AttemptResult(Outcome.REFUSED, status_code=500), True),
        (AttemptResult(Outcome.REFUSED, status_code=429), False),
        (AttemptResult(Outcome.INTERRUPTED), False),
        (AttemptResult(Outcome.UNSENDABLE, sent=False), False),
    ],
)
def test_only_what_the_receiver_is_to_blame_for_counts(result: AttemptResult, *, counts: bool) -> None:
    assert tally(result, probe=True) == (PROBE if counts else None)
    assert tally(result, probe=False) == (FAILURE if counts else None)
