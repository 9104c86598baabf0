"""The checker finds what it is there to find: histories with one seeded fault each."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.checker import Attempt, Delivery, judge

NAMES = ("a", "b", "c")
IDS = {name: f"id-{name}" for name in NAMES}
RECEIVED = [Delivery(name, IDS[name], name.encode(), at=1.5, answer=f"yes, {name}") for name in NAMES]
RECORDED = [Attempt(name, IDS[name], number=1, began=1, ended=2, answer=f"yes, {name}") for name in NAMES]
B_AGAIN = replace(RECEIVED[1], at=3.5, answer="yes again, b")
INTERRUPTED = replace(RECORDED[1], answer="", succeeded=False)
SECOND = replace(RECORDED[1], number=2, began=3, ended=4, answer="yes again, b")


def test_a_good_history_is_valid() -> None:
    verdict = judge(NAMES, IDS, RECEIVED, RECORDED)
    assert verdict.valid
    assert not verdict.duplicated


def test_what_was_attempted_and_never_acknowledged_may_be_received_or_not() -> None:
    assert judge((*NAMES, "d"), IDS, RECEIVED, RECORDED).valid
    assert judge(NAMES, {"a": IDS["a"]}, RECEIVED, RECORDED).valid


def test_the_same_message_twice_is_a_duplicate_and_valid_where_an_attempt_was_interrupted() -> None:
    verdict = judge(NAMES, IDS, [*RECEIVED, B_AGAIN], [RECORDED[0], INTERRUPTED, SECOND, RECORDED[2]])
    assert verdict.valid
    assert verdict.duplicated == {"b"}


def test_an_attempt_after_one_that_was_refused_is_no_duplicate() -> None:
    refused = [replace(one, taken=False) if one.name == "b" else one for one in RECEIVED]
    failed = replace(RECORDED[1], succeeded=False)
    verdict = judge(NAMES, IDS, [*refused, B_AGAIN], [RECORDED[0], failed, SECOND, RECORDED[2]])
    assert verdict.valid
    assert not verdict.duplicated


@pytest.mark.parametrize(
    ("received", "fault", "names"),
    [
        (RECEIVED[1:], "lost", {"a"}),
        ([], "lost", set(NAMES)),
        ([replace(RECEIVED[0], taken=False), *RECEIVED[1:]], "lost", {"a"}),
        ([*RECEIVED, Delivery("x", IDS["c"], b"x", 1, "yes, x")], "unexpected", {"x"}),
        ([*RECEIVED, Delivery("a", "of no execution", b"a", 1, "yes")], "unexpected", {"a"}),
        ([*RECEIVED, Delivery("a", "another id", b"a", 1, "yes")], "altered", {"a"}),
        ([*RECEIVED, Delivery("a", IDS["a"], b"another body", 1, "yes")], "altered", {"a"}),
        ([replace(RECEIVED[0], id="not the acknowledged id"), *RECEIVED[1:]], "altered", {"a"}),
        ([*RECEIVED[:2], replace(RECEIVED[2], id=IDS["a"])], "altered", {"a", "c"}),
        ([*RECEIVED, B_AGAIN], "unexplained", {"b"}),
    ],
)
def test_a_bad_history_is_not(received: list[Delivery], fault: str, names: set[str]) -> None:
    verdict = judge(NAMES, IDS, received, RECORDED)
    assert not verdict.valid
    assert getattr(verdict, fault) == names


@pytest.mark.parametrize(
    "fault",
    [
        lambda first, second: (first, replace(second, number=3)),
        lambda first, second: (replace(first, number=2), replace(second, number=3)),
        lambda first, second: (replace(first, ended=3.1), second),  # two were under way at one time
        lambda first, second: (replace(first, succeeded=True), second),
        lambda first, second: (replace(first, answer="yes, b"), replace(second, answer="yes, b")),
        lambda first, second: (first, replace(second, answer="what nobody said")),
        lambda first, second: (first, replace(second, answer="yes, b")),  # written by whoever made the first
    ],
)
def test_a_bad_record_is_not(fault: Callable[[Attempt, Attempt], tuple[Attempt, Attempt]]) -> None:
    records = [RECORDED[0], *fault(INTERRUPTED, SECOND), RECORDED[2]]
    verdict = judge(NAMES, IDS, [*RECEIVED, B_AGAIN], records)
    assert not verdict.valid
    assert verdict.misrecorded == {"b"}
