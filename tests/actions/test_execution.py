"""What follows an attempt: the schedule, its jitter, and what is final."""

from collections.abc import Iterable
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from relay.v1 import actions_pb2

from relay_grpc.actions.execution import (
    GONE,
    MAX_ATTEMPTS,
    RETRY_SCHEDULE,
    AttemptResult,
    Outcome,
    State,
    Transition,
    after,
)

PROPERTY = settings(max_examples=50, deadline=None)  # a busy machine is no defect
ATTEMPTS = st.integers(1, MAX_ATTEMPTS)
JITTER = st.floats(-1, 1)
FAILURES = st.builds(
    AttemptResult,
    st.sampled_from([outcome for outcome in Outcome if outcome is not Outcome.SUCCESS]),
    st.sampled_from([0, 301, 400, 404, 429, 500, 503]),
)


@PROPERTY
@given(ATTEMPTS, JITTER, st.integers(200, 299))
def test_success_is_final(attempt: int, jitter: float, status: int) -> None:
    assert after(AttemptResult(Outcome.SUCCESS, status), attempt, jitter) == Transition(State.SUCCESS)


@PROPERTY
@given(ATTEMPTS, JITTER)
def test_a_receiver_that_is_gone_is_final(attempt: int, jitter: float) -> None:
    assert after(AttemptResult(Outcome.REFUSED, GONE), attempt, jitter) == Transition(State.FAILED)


@PROPERTY
@given(FAILURES, st.integers(MAX_ATTEMPTS, MAX_ATTEMPTS + 3), JITTER)
def test_the_last_failure_is_final(result: AttemptResult, attempt: int, jitter: float) -> None:
    assert after(result, attempt, jitter) == Transition(State.FAILED)


@PROPERTY
@given(FAILURES, st.integers(1, MAX_ATTEMPTS - 1), JITTER)
def test_another_failure_is_tried_again_within_a_fifth_of_the_schedule(
    result: AttemptResult, attempt: int, jitter: float
) -> None:
    transition = after(result, attempt, jitter)
    scheduled = RETRY_SCHEDULE[attempt - 1] if result.outcome is not Outcome.INTERRUPTED else timedelta()
    assert transition.state is State.PENDING
    assert scheduled * 0.8 <= transition.delay <= scheduled * 1.2


@pytest.mark.parametrize(("jitter", "seconds"), [(-1, 4), (0, 5), (1, 6)])
def test_jitter_goes_both_ways(jitter: float, seconds: float) -> None:
    assert after(AttemptResult(Outcome.TIMEOUT), 1, jitter).delay == timedelta(seconds=seconds)


def test_the_schedule_is_the_documented_one() -> None:
    """5 s, 5 min, 30 min, 2 h, 5 h, 10 h, 10 h: docs.svix.com/retries."""
    assert [wait / timedelta(minutes=1) for wait in RETRY_SCHEDULE] == [5 / 60, 5, 30, 120, 300, 600, 600]
    assert MAX_ATTEMPTS == 8


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (State, actions_pb2.ExecutionState.keys()),
        (Outcome, actions_pb2.AttemptOutcome.keys()),
    ],
)
def test_the_words_are_those_of_the_api(words: Iterable[State | Outcome], names: list[str]) -> None:
    unspecified, *rest = names
    prefix = unspecified.removesuffix("UNSPECIFIED")
    assert {f"{prefix}{word.upper()}" for word in words} == set(rest)
