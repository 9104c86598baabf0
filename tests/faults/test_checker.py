"""The checker finds what it is there to find: histories with one seeded fault each."""

import pytest

from tests.faults.checker import Delivery, judge

NAMES = ("a", "b", "c")
IDS = {name: f"id-{name}" for name in NAMES}
GOOD = [Delivery(name, IDS[name], name.encode()) for name in NAMES]


def test_a_good_history_is_valid() -> None:
    verdict = judge(NAMES, IDS, GOOD)
    assert verdict.valid
    assert not verdict.duplicated


def test_what_was_attempted_and_never_acknowledged_may_be_received_or_not() -> None:
    assert judge((*NAMES, "d"), IDS, GOOD).valid
    assert judge(NAMES, {"a": IDS["a"]}, GOOD).valid


def test_the_same_message_twice_is_a_duplicate_and_valid() -> None:
    verdict = judge(NAMES, IDS, [*GOOD, GOOD[1]])
    assert verdict.valid
    assert verdict.duplicated == {"b"}


@pytest.mark.parametrize(
    ("received", "fault", "names"),
    [
        (GOOD[1:], "lost", {"a"}),
        ([], "lost", set(NAMES)),
        ([*GOOD, Delivery("x", "id-x", b"x")], "unexpected", {"x"}),
        ([*GOOD, Delivery("a", "another id", b"a")], "altered", {"a"}),
        ([*GOOD, Delivery("a", IDS["a"], b"another body")], "altered", {"a"}),
        ([Delivery("a", "not the acknowledged id", b"a"), *GOOD[1:]], "altered", {"a"}),
        ([*GOOD[:2], Delivery("c", IDS["a"], b"c")], "altered", {"a", "c"}),
    ],
)
def test_a_bad_history_is_not(received: list[Delivery], fault: str, names: set[str]) -> None:
    verdict = judge(NAMES, IDS, received)
    assert not verdict.valid
    assert getattr(verdict, fault) == names
