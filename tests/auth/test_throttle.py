"""How many wrong credentials are looked at: exactly the limit in any minute, however they come."""

import asyncio
import random

import pytest

from relay_grpc import errors
from relay_grpc.auth import throttle as throttling
from relay_grpc.auth.throttle import LIMITS, Throttle, network_of


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(clock)


async def tried(throttle: Throttle, *, right: bool = False, **subjects: str) -> bool:
    """Whether a credential of these subjects was looked at."""
    try:
        async with throttle.attempt(subjects) as attempt:
            attempt.right = right
    except errors.Throttled:
        return False
    return True


async def tries(throttle: Throttle, count: int, **subjects: str) -> int:
    return sum([await tried(throttle, **subjects) for _ in range(count)])


@pytest.mark.parametrize("kind", LIMITS)
async def test_a_subject_has_so_many_wrong_ones_and_its_neighbours_are_not_concerned(
    throttle: Throttle, kind: str
) -> None:
    assert await tries(throttle, 50, **{kind: "a"}) == LIMITS[kind]
    assert await tried(throttle, **{kind: "b"})
    for other in LIMITS.keys() - {kind}:
        assert await tried(throttle, **{other: "a"})


async def test_no_minute_sees_more_than_the_limit_wherever_it_begins(throttle: Throttle, clock: Clock) -> None:
    moments = random.Random(4711)
    looked_at = []
    for _ in range(5000):
        clock.now += moments.choice((0.0, 0.01, 0.5, 2.0))
        if await tried(throttle, peer="a"):
            looked_at.append(clock.now)
    for began in looked_at:
        assert sum(began <= moment < began + 60 for moment in looked_at) <= 10
    assert len(looked_at) > 10 * (clock.now - 1000.0) / 60 - 10  # and it sees no less, either


async def test_whoever_waits_as_long_as_told_is_looked_at(throttle: Throttle, clock: Clock) -> None:
    for _ in range(10):
        assert await tried(throttle, peer="a")
        clock.now += 1
    with pytest.raises(errors.Throttled) as refusal:
        async with throttle.attempt({"peer": "a"}):
            pass
    assert refusal.value.retry_after == 50
    clock.now += 49.9
    with pytest.raises(errors.Throttled, match="try again in 1 s"):  # told in whole seconds, and never too few
        async with throttle.attempt({"peer": "a"}):
            pass
    clock.now += 0.1
    assert await tried(throttle, peer="a")
    assert not await tried(throttle, peer="a")


async def test_right_ones_are_never_too_many(throttle: Throttle) -> None:
    assert all([await tried(throttle, right=True, peer="a", key="k") for _ in range(100)])
    assert await tries(throttle, 100, peer="a", key="k") == 5


async def test_wrong_ones_at_one_time_are_not_more_than_one_after_another(throttle: Throttle) -> None:
    under_way, most, looked_at = 0, 0, 0

    async def guess() -> None:
        nonlocal under_way, most, looked_at
        async with throttle.attempt({"peer": "a"}):
            looked_at += 1
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0)
            under_way -= 1

    outcomes = await asyncio.gather(*(guess() for _ in range(500)), return_exceptions=True)
    assert (looked_at, most) == (10, 10)
    assert sum(isinstance(one, errors.Throttled) for one in outcomes) == 490


async def test_right_ones_at_one_time_take_turns_and_none_is_refused(throttle: Throttle) -> None:
    under_way, most = 0, 0

    async def come(key: str) -> None:
        nonlocal under_way, most
        async with throttle.attempt({"peer": "a", "key": key}) as attempt:
            under_way += 1
            most = max(most, under_way)
            await asyncio.sleep(0)
            under_way -= 1
            attempt.right = True

    await asyncio.gather(*(come(f"key {i % 20}") for i in range(500)))
    assert most == 10


async def test_one_that_breaks_off_counts_as_wrong(throttle: Throttle) -> None:
    async def hang() -> None:
        async with throttle.attempt({"peer": "a"}):
            await asyncio.Event().wait()

    for _ in range(10):
        task = asyncio.create_task(hang())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not await tried(throttle, peer="a")


async def test_one_that_goes_away_while_it_waits_takes_nothing_with_it(throttle: Throttle) -> None:
    go = asyncio.Event()

    async def come() -> None:
        async with throttle.attempt({"key": "k"}) as attempt:
            await go.wait()
            attempt.right = True

    first = [asyncio.create_task(come()) for _ in range(5)]
    waiting = [asyncio.create_task(come()) for _ in range(3)]
    await asyncio.sleep(0.01)
    waiting[0].cancel()
    go.set()
    await asyncio.gather(*first, *waiting[1:])
    assert waiting[0].cancelled()
    assert await tries(throttle, 10, key="k") == 5


async def test_its_memory_is_bounded_and_a_full_one_admits_nobody_new(
    throttle: Throttle, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "MAX_SUBJECTS", 100)
    assert sum([await tried(throttle, peer=f"peer {i}") for i in range(1000)]) == 100
    clock.now += 30
    assert await tried(throttle, peer="peer 7")
    assert not await tried(throttle, peer="peer 500")
    clock.now += 30
    assert await tried(throttle, peer="peer 500")
    assert len(throttle._subjects) == 2  # with peer 7, whose second try came later

    for i in range(1000):
        assert await tried(throttle, right=True, peer=f"right {i}")
    assert len(throttle._subjects) == 2


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("unix", "unix"),
    ],
)
def test_a_host_is_one_peer_whichever_of_its_addresses_it_takes(peer: str, network: str) -> None:
    assert network_of(peer) == network
