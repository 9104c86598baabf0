"""What follows an attempt: the schedule, its jitter, what the receiver asks for, and what is final."""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from relay.v1 import actions_pb2

from relay_grpc.actions.execution import (
    ENDED,
    GONE,
    RETRY_SCHEDULE,
    TOO_MANY_REQUESTS,
    TRANSITIONS,
    AttemptResult,
    Delivery,
    Outcome,
    State,
    Transition,
    after,
    delays,
    timeout,
)

PROPERTY = settings(max_examples=100, deadline=None)  # a busy machine is no defect
SCHEDULES = st.lists(st.integers(0, 86_400).map(lambda s: timedelta(seconds=s)), max_size=12)
FLOORS = st.integers(0, 3600).map(lambda s: timedelta(seconds=s))
JITTER = st.floats(-1, 1)
FAILURES = st.builds(
    AttemptResult,
    st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.SUCCESS]),
    st.sampled_from([0, 301, 400, 404, 410, 429, 500, 503]),
    sent=st.booleans(),
    retry_after=st.none() | st.floats(0),
)
NO_FLOOR = timedelta()


def follows(
    result: AttemptResult,
    attempt: int,
    *,
    delivery: Delivery = Delivery.AT_LEAST_ONCE,
    delays: Sequence[timedelta] = RETRY_SCHEDULE,
    floor: timedelta = NO_FLOOR,
    jitter: float = 0,
) -> Transition:
    return after(result, attempt, delivery=delivery, delays=delays, floor=floor, jitter=jitter)


@PROPERTY
@given(st.integers(1, 20), SCHEDULES, JITTER, st.integers(200, 299), st.sampled_from(Delivery))
def test_success_is_final(attempt: int, waits: list[timedelta], jitter: float, status: int, delivery: Delivery) -> None:
    result = AttemptResult(Outcome.SUCCESS, status)
    assert follows(result, attempt, delivery=delivery, delays=waits, jitter=jitter) == Transition(State.SUCCESS)


@PROPERTY
@given(FAILURES, SCHEDULES, JITTER, st.data())
def test_what_is_sent_at_least_once_is_tried_until_the_schedule_ends(
    result: AttemptResult, waits: list[timedelta], jitter: float, data: st.DataObject
) -> None:
    attempt = data.draw(st.integers(1, len(waits) + 3))
    final = attempt > len(waits) or result.status_code == GONE
    assert follows(result, attempt, delays=waits, jitter=jitter).state is (State.FAILED if final else State.PENDING)


@PROPERTY
@given(FAILURES, SCHEDULES, st.integers(1, 14))
def test_what_is_sent_at_most_once_is_tried_again_only_where_nothing_was_sent(
    result: AttemptResult, waits: list[timedelta], attempt: int
) -> None:
    state = follows(result, attempt, delivery=Delivery.AT_MOST_ONCE, delays=waits).state
    if result.sent:
        assert state is State.UNKNOWN
    else:
        assert state is follows(result, attempt, delays=waits).state


@PROPERTY
@given(FAILURES, SCHEDULES, FLOORS, JITTER, st.data())
def test_the_next_attempt_is_where_schedule_floor_and_receiver_put_it(
    result: AttemptResult, waits: list[timedelta], floor: timedelta, jitter: float, data: st.DataObject
) -> None:
    assume(waits and result.status_code != GONE)
    attempt = data.draw(st.integers(1, len(waits)))
    base, delay = waits[attempt - 1], follows(result, attempt, delays=waits, floor=floor, jitter=jitter).delay
    if result.outcome is Outcome.INTERRUPTED:
        assert delay == timedelta()
        return
    floored = result.outcome is Outcome.TIMEOUT or result.status_code == TOO_MANY_REQUESTS
    least = max(base, floor) if floored else base
    most = max(2 * base, floor) if floored else 2 * base
    margin = timedelta(microseconds=1)
    assert least * 0.8 - margin <= delay <= most * 1.2 + margin


@pytest.mark.parametrize(("jitter", "seconds"), [(-1, 4), (0, 5), (1, 6)])
def test_jitter_goes_both_ways(jitter: float, seconds: float) -> None:
    assert follows(AttemptResult(Outcome.REFUSED, 500), 1, jitter=jitter).delay == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(None, 300), (0, 300), (299.9, 300), (450, 450), (601, 600), (1e12, 600), (1e300, 600), (float("inf"), 600)],
)
def test_what_the_receiver_asks_for_is_granted_within_the_schedule_and_twice_that(
    asked: float | None, seconds: float
) -> None:
    result = AttemptResult(Outcome.REFUSED, 503, retry_after=asked)
    assert follows(result, 2).delay == timedelta(seconds=seconds)


@pytest.mark.parametrize("result", [AttemptResult(Outcome.TIMEOUT), AttemptResult(Outcome.REFUSED, 429)], ids=str)
def test_a_receiver_that_is_slow_or_asks_for_less_has_a_minute(result: AttemptResult) -> None:
    assert follows(result, 1, floor=timedelta(seconds=60)).delay == timedelta(seconds=60)
    assert follows(AttemptResult(Outcome.REFUSED, 500), 1, floor=timedelta(seconds=60)).delay == timedelta(seconds=5)


def test_the_schedule_is_the_documented_one() -> None:
    """5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 10 h: docs.svix.com/retries."""
    assert [wait / timedelta(minutes=1) for wait in RETRY_SCHEDULE] == [5 / 60, 5, 30, 120, 300, 600, 600]


@pytest.mark.parametrize(
    ("configuration", "waits"),
    [({}, RETRY_SCHEDULE), ({"retry_delays": []}, ()), ({"retry_delays": [1, 2.5]}, (1, 2.5))],
    ids=str,
)
def test_a_connection_may_have_a_schedule_of_its_own(configuration: dict[str, object], waits: Sequence[float]) -> None:
    expected = [wait if isinstance(wait, timedelta) else timedelta(seconds=wait) for wait in waits]
    assert list(delays(configuration)) == expected


@pytest.mark.parametrize(("configuration", "seconds"), [({}, 15), ({"timeout": 3}, 3), ({"timeout": 30}, 15)], ids=str)
def test_a_connection_may_have_a_timeout_of_its_own_below_the_servers(
    configuration: dict[str, object], seconds: float
) -> None:
    assert timeout(configuration, 15) == seconds


def test_only_a_resend_leaves_what_has_ended() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(TRANSITIONS[state] == {State.PENDING} for state in ENDED)
    assert not any(TRANSITIONS[State.UNKNOWN] - ENDED)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (State, actions_pb2.ExecutionState.keys()),
        (Outcome, actions_pb2.AttemptOutcome.keys()),
        (Delivery, actions_pb2.Delivery.keys()),
    ],
)
def test_the_words_are_those_of_the_api(words: Iterable[State | Outcome | Delivery], names: list[str]) -> None:
    unspecified, *rest = names
    prefix = unspecified.removesuffix("UNSPECIFIED")
    assert {f"{prefix}{word.upper()}" for word in words} == set(rest)
