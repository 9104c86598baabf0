"""The contract of a Limiter, run on each of them, and what is particular to each."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from relay_grpc.ratelimit.limiter import Limiter, LocalLimiter
from relay_grpc.ratelimit.node import KEY_PREFIX
from relay_grpc.ratelimit.window import Window
from tests.ratelimit.spending import admitted, as_kept, charge, connected, take
from tests.valkey import Valkey


@pytest.fixture(params=["local", "redis"])
async def limiter(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Limiter]:
    limiter = LocalLimiter() if request.param == "local" else await connected(valkey.url)
    yield limiter
    await limiter.close()


# The contract


async def test_exactly_the_limit_of_many_concurrent_calls_is_admitted(limiter: Limiter, subject: str):
    assert await admitted(2000, subject, 100, limiter) == 100
    assert not limiter.degraded


async def test_a_call_takes_its_cost(limiter: Limiter, subject: str):
    remaining = [(await take(limiter, subject, 3, 10)).remaining for _ in range(3)]
    assert remaining == [7, 4, 1]
    assert not (await take(limiter, subject, 3, 10)).allowed
    assert (await take(limiter, subject, 1, 10)).remaining == 0


async def test_reading_the_numbers_costs_nothing(limiter: Limiter, subject: str):
    await take(limiter, subject, 4, 10)
    for _ in range(20):
        decision = await take(limiter, subject, 0, 10)
        assert (decision.allowed, decision.limit, decision.remaining, decision.retry_after) == (True, 10, 6, 0)


async def test_a_refusal_takes_nothing_and_tells_when_to_come_back(limiter: Limiter, subject: str):
    await take(limiter, subject, 8, 10)
    refused = await take(limiter, subject, 5, 10)
    assert (refused.allowed, refused.remaining) == (False, 2)
    assert 0 < refused.reset_after <= refused.retry_after <= 120
    assert (await take(limiter, subject, 2, 10)).allowed


async def test_subjects_do_not_share_a_budget(limiter: Limiter, subject: str):
    assert not (await take(limiter, subject, 10, 10)).remaining
    assert (await take(limiter, f"{subject} of another", 10, 10)).allowed


async def test_a_call_takes_its_units_from_all_its_budgets_or_from_none(limiter: Limiter, subject: str):
    wide, narrow = charge(subject, 1, 20), charge(f"{subject}:key", 1, 5)
    decisions = await asyncio.gather(*(limiter.spend([wide, narrow]) for _ in range(100)))
    admitted = [decision for decision in decisions if decision.allowed]
    assert [(one.tightest, one.limit, one.remaining) for one in admitted] == [(1, 5, left) for left in (4, 3, 2, 1, 0)]
    assert {(one.tightest, one.limit, one.remaining) for one in decisions if not one.allowed} == {(1, 5, 0)}
    assert (await take(limiter, subject, 0, 20)).remaining == 15  # nothing of the 95 refused ones
    await take(limiter, subject, 15, 20)
    refused = await limiter.spend([wide, charge(f"{subject}:another key", 1, 5)])
    assert (refused.allowed, refused.tightest, refused.limit) == (False, 0, 20)
    assert (await take(limiter, f"{subject}:another key", 0, 5)).remaining == 5


async def test_a_call_dearer_than_the_limit_takes_all_of_it(limiter: Limiter, subject: str):
    assert (await take(limiter, subject, 50, 20)).allowed
    assert not (await take(limiter, subject, 1, 20)).allowed


async def test_a_limit_of_zero_admits_nothing(limiter: Limiter, subject: str):
    assert not (await take(limiter, subject, 1, 0)).allowed


# In this process


async def test_each_instance_grants_its_share(subject: str):
    instances = 4
    limiter = LocalLimiter(lambda: instances)
    assert await admitted(200, subject, 100, limiter) == 25
    instances = 2
    assert await admitted(200, subject, 100, limiter) == 25
    assert (await take(limiter, subject, 0, 100)).limit == 50


@pytest.mark.parametrize(("limit", "share"), [(3, 1), (1, 1), (0, 0)])
async def test_a_share_is_at_least_one_unit_of_what_there_is(limit: int, share: int):
    assert await admitted(20, "few", limit, LocalLimiter(lambda: 10)) == share


async def test_no_instance_known_counts_as_one():
    assert await admitted(20, "alone", 5, LocalLimiter(lambda: 0)) == 5


async def test_idle_subjects_are_forgotten():
    now = 0
    limiter = LocalLimiter(clock=lambda: now)
    for i in range(1000):
        await take(limiter, f"visitor {i}", 1, 10)
    for minute in (1, 2):
        now = minute * 60
        await take(limiter, "regular", 1, 10)
    assert set(limiter._spent._recent) | set(limiter._spent._older) == {"regular"}


async def test_a_retry_after_the_hinted_wait_is_admitted_here(subject: str):
    now = 59.0
    limiter = LocalLimiter(clock=lambda: now)
    for _ in range(100):
        while (decision := await take(limiter, subject, 7, 300)).allowed:
            pass
        now += decision.retry_after + 1e-6  # more than the error of the float
        assert (await take(limiter, subject, 7, 300)).allowed


async def test_the_last_minute_still_counts_in_this_one(subject: str):
    now = 59.0
    limiter = LocalLimiter(clock=lambda: now)
    assert await admitted(200, subject, 60, limiter) == 60
    now = 61.0
    assert await admitted(200, subject, 60, limiter) == 1


async def test_a_clock_that_steps_back_and_forth_over_a_boundary_forgets_nobody():
    now = 60.0
    limiter = LocalLimiter(clock=lambda: now)
    assert await admitted(10, "spent", 5, limiter) == 5
    for now in (59.9, 60.0, 59.9, 60.1):  # noqa: B007  # the clock reads it
        await take(limiter, "another", 1, 5)
    assert await admitted(10, "spent", 5, limiter) == 0


@pytest.mark.parametrize("ahead", [-3, -1, 0, 1, 2, 60])
async def test_a_redis_whose_clock_is_off_lifts_no_limit_when_it_is_lost(subject: str, ahead: int):
    """ahead: of this process's clock, in minutes."""
    limiter = LocalLimiter(clock=lambda: 6_000.0)
    limiter.note([charge(subject, 1, 10)], [Window(100 + ahead, 4, 0)])
    assert await admitted(50, subject, 10, limiter) == (6 if ahead in (-1, 0, 1) else 10)


# In Redis


async def test_instances_share_the_budget_exactly(valkey: Valkey, subject: str):
    limiters = [await connected(valkey.url) for _ in range(2)]
    assert await admitted(2000, subject, 100, *limiters) == 100
    assert not any(limiter.degraded for limiter in limiters)
    for limiter in limiters:
        await limiter.close()


async def test_a_retry_after_the_hinted_wait_is_admitted_there(valkey: Valkey, subject: str):
    limiter = await connected(valkey.url)
    if (second := time.time() % 60) > 55:  # all of it has to happen within one minute
        await asyncio.sleep(60.01 - second)
    minute = int(time.time()) // 60
    limit = 6000  # the minute before is full, so that a unit is freed every 10 ms
    valkey.client.set(KEY_PREFIX + subject, as_kept(Window(minute, 0, limit)))
    for _ in range(10):
        while (decision := await take(limiter, subject, 7, limit)).allowed:
            pass
        await asyncio.sleep(decision.retry_after)
        assert (await take(limiter, subject, 7, limit)).allowed
    await limiter.close()


async def test_every_key_expires(own_valkey: Valkey):
    limiter = await connected(own_valkey.url)
    for i in range(20):
        await admitted(5, f"subject {i}", 3, limiter)
        await take(limiter, f"reader {i}", 0, 3)
    lives = [own_valkey.client.ttl(key) for key in own_valkey.client.scan_iter()]
    assert len(lives) == 21  # and the probe
    assert all(60 < seconds <= 120 for seconds in lives)
    await limiter.close()
