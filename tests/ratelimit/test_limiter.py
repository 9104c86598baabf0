"""The contract of a Limiter, run on each of them, and what happens to RedisLimiter when Redis fails."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay_grpc.ratelimit.limiter import KEY_PREFIX, RECONNECT_INTERVAL, SCRIPT, Limiter, LocalLimiter, RedisLimiter
from relay_grpc.ratelimit.window import MINUTE, Decision, Window, decide, spend
from tests.valkey import Valkey, cluster, running, take_over

INSTANCES = 4


@pytest.fixture(params=["local", "redis"])
async def limiter(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Limiter]:
    limiter = LocalLimiter() if request.param == "local" else await connected(valkey.url)
    yield limiter
    await limiter.close()


@pytest.fixture
def subject() -> str:
    return f"executions:{uuid4()}"


async def connected(url: str) -> RedisLimiter:
    """A limiter that is patient, for a machine with other things to do may hold a server up for 50 ms."""
    limiter = RedisLimiter(url, LocalLimiter(lambda: INSTANCES), answer_timeout=10)
    await until(limiter, degraded=False)
    return limiter


async def until(limiter: RedisLimiter, *, degraded: bool) -> None:
    async with asyncio.timeout(10):
        while True:
            await limiter.spend("anything", 0, 1)
            if limiter.degraded == degraded:
                return
            await asyncio.sleep(0.01)


async def admitted(calls: int, subject: str, limit: int, *limiters: Limiter) -> int:
    """Makes the calls at once, in turns on each limiter."""
    spending = [limiters[i % len(limiters)].spend(subject, 1, limit) for i in range(calls)]
    return sum(decision.allowed for decision in await asyncio.gather(*spending))


# The contract


async def test_exactly_the_limit_of_many_concurrent_calls_is_admitted(limiter: Limiter, subject: str):
    assert await admitted(2000, subject, 100, limiter) == 100
    assert not limiter.degraded


async def test_a_call_takes_its_cost(limiter: Limiter, subject: str):
    remaining = [(await limiter.spend(subject, 3, 10)).remaining for _ in range(3)]
    assert remaining == [7, 4, 1]
    assert not (await limiter.spend(subject, 3, 10)).allowed
    assert (await limiter.spend(subject, 1, 10)).remaining == 0


async def test_reading_the_numbers_costs_nothing(limiter: Limiter, subject: str):
    await limiter.spend(subject, 4, 10)
    for _ in range(20):
        decision = await limiter.spend(subject, 0, 10)
        assert (decision.allowed, decision.limit, decision.remaining, decision.retry_after) == (True, 10, 6, 0)


async def test_a_refusal_takes_nothing_and_tells_when_to_come_back(limiter: Limiter, subject: str):
    await limiter.spend(subject, 8, 10)
    refused = await limiter.spend(subject, 5, 10)
    assert (refused.allowed, refused.remaining) == (False, 2)
    assert 0 < refused.reset_after <= refused.retry_after <= 120
    assert (await limiter.spend(subject, 2, 10)).allowed


async def test_subjects_do_not_share_a_budget(limiter: Limiter, subject: str):
    assert not (await limiter.spend(subject, 10, 10)).remaining
    assert (await limiter.spend(f"{subject} of another", 10, 10)).allowed


async def test_a_call_dearer_than_the_limit_takes_all_of_it(limiter: Limiter, subject: str):
    assert (await limiter.spend(subject, 50, 20)).allowed
    assert not (await limiter.spend(subject, 1, 20)).allowed


async def test_a_limit_of_zero_admits_nothing(limiter: Limiter, subject: str):
    assert not (await limiter.spend(subject, 1, 0)).allowed


# In this process


async def test_each_instance_grants_its_share(subject: str):
    instances = 4
    limiter = LocalLimiter(lambda: instances)
    assert await admitted(200, subject, 100, limiter) == 25
    instances = 2
    assert await admitted(200, subject, 100, limiter) == 25
    assert (await limiter.spend(subject, 0, 100)).limit == 50


@pytest.mark.parametrize(("limit", "share"), [(3, 1), (1, 1), (0, 0)])
async def test_a_share_is_at_least_one_unit_of_what_there_is(limit: int, share: int):
    assert await admitted(20, "few", limit, LocalLimiter(lambda: 10)) == share


async def test_no_instance_known_counts_as_one():
    assert await admitted(20, "alone", 5, LocalLimiter(lambda: 0)) == 5


async def test_idle_subjects_are_forgotten():
    now = 0
    limiter = LocalLimiter(clock=lambda: now)
    for i in range(1000):
        await limiter.spend(f"visitor {i}", 1, 10)
    for minute in (1, 2):
        now = minute * 60
        await limiter.spend("regular", 1, 10)
    assert set(limiter._recent) | set(limiter._older) == {"regular"}


async def test_a_retry_after_the_hinted_wait_is_admitted_here(subject: str):
    now = 59.0
    limiter = LocalLimiter(clock=lambda: now)
    for _ in range(100):
        while (decision := await limiter.spend(subject, 7, 300)).allowed:
            pass
        now += decision.retry_after + 1e-6  # more than the error of the float
        assert (await limiter.spend(subject, 7, 300)).allowed


async def test_the_last_minute_still_counts_in_this_one(subject: str):
    now = 59.0
    limiter = LocalLimiter(clock=lambda: now)
    assert await admitted(200, subject, 60, limiter) == 60
    now = 61.0
    assert await admitted(200, subject, 60, limiter) == 1


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
        while (decision := await limiter.spend(subject, 7, limit)).allowed:
            pass
        await asyncio.sleep(decision.retry_after)
        assert (await limiter.spend(subject, 7, limit)).allowed
    await limiter.close()


NOON = 29_000_000 * MINUTE
units = st.integers(0, 300)
kept = st.none() | st.builds(Window, st.integers(NOON // MINUTE - 3, NOON // MINUTE + 3), units, units)


@given(st.integers(NOON, NOON + MINUTE - 1), kept, st.integers(0, 40), units)
@settings(deadline=None)
def test_the_script_computes_what_the_arithmetic_says(
    valkey: Valkey, now: int, window: Window | None, cost: int, limit: int
):
    clock = "redis.call('TIME')"
    assert SCRIPT.count(clock) == 1
    script = valkey.client.register_script(SCRIPT.replace(clock, "{ARGV[3], ARGV[4]}"))
    key = str(uuid4())
    if window:
        valkey.client.set(key, as_kept(window))
    after, decision = spend(now, window or Window(), cost, limit)
    when, minute, current, previous, allowed = script([key], [cost, limit, now // 1000, now % 1000 * 1000 + 999])
    assert when == now
    assert Window(minute, current, previous) == after
    assert decide(now, after, cost, limit, allowed=bool(allowed)) == decision
    if allowed and cost:
        window = after
    assert valkey.client.getdel(key) == (window and as_kept(window))


def as_kept(window: Window) -> bytes:
    return b"%d %d %d" % (window.minute, window.current, window.previous)


async def test_every_key_expires(own_valkey: Valkey):
    limiter = await connected(own_valkey.url)
    for i in range(20):
        await admitted(5, f"subject {i}", 3, limiter)
        await limiter.spend(f"reader {i}", 0, 3)
    lives = [own_valkey.client.ttl(key) for key in own_valkey.client.scan_iter()]
    assert len(lives) == 21  # and the probe
    assert all(60 < seconds <= 120 for seconds in lives)
    await limiter.close()


async def test_a_cluster_is_followed(subject: str):
    subjects = [f"{subject} {i}" for i in range(20)]
    with cluster() as nodes:
        limiters = [await connected(node.url) for node in nodes]
        assert [await admitted(200, subject, 10, *limiters) for subject in subjects] == [10] * 20
        assert all(node.client.dbsize() > 1 for node in nodes)  # the probe and a share of the subjects
        assert not any(limiter.degraded for limiter in limiters)

        nodes[-1].kill()
        # The other nodes have no units left; the slots of this one are replaced by the share of the instance.
        assert {await admitted(200, subject, 10, limiters[0]) for subject in subjects} == {0, 10 // INSTANCES}

        take_over(nodes)
        for subject in subjects:
            await limiters[0].spend(subject, 0, 10)
            await limiters[0].spend(subject, 0, 10)
            assert not limiters[0].degraded
        for limiter in limiters:
            await limiter.close()


# When Redis fails


async def test_a_killed_redis_is_replaced_by_shares_until_it_is_back(
    own_valkey: Valkey, subject: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "relay_grpc")
    limiter = await connected(own_valkey.url)
    assert await admitted(20, subject, 100, limiter) == 20
    own_valkey.kill()
    assert await admitted(500, subject, 100, limiter) == 100 // INSTANCES
    assert limiter.degraded
    assert (await limiter.spend(subject, 0, 100)).limit == 100 // INSTANCES
    own_valkey.start()
    await until(limiter, degraded=False)
    assert await admitted(500, subject, 100, limiter) == 100
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    await limiter.close()


async def test_a_frozen_redis_costs_one_short_wait(own_valkey: Valkey, subject: str):
    limiter = RedisLimiter(own_valkey.url, LocalLimiter(lambda: INSTANCES))
    await until(limiter, degraded=False)
    own_valkey.freeze()
    began = time.perf_counter()
    first = await admitted(100, subject, 40, limiter)
    noticed = time.perf_counter()
    then = [(await limiter.spend(subject, 1, 40)).allowed for _ in range(100)]
    ended = time.perf_counter()
    assert (first, sum(then)) == (40 // INSTANCES, 0)
    assert limiter.degraded
    assert noticed - began < 2  # it is 0.05; left to itself, redis-py takes a minute
    assert ended - noticed < noticed - began  # a hundred calls in a row: none of them waits any more
    own_valkey.thaw()
    await until(limiter, degraded=False)
    await limiter.close()


async def test_a_process_that_was_held_up_does_not_blame_redis(valkey: Valkey, subject: str):
    limiter = RedisLimiter(valkey.url, LocalLimiter(), answer_timeout=0.1)
    await until(limiter, degraded=False)
    calls = asyncio.gather(*(limiter.spend(subject, 1, 100) for _ in range(10)))
    await asyncio.sleep(0)  # the calls are made
    await asyncio.sleep(0)  # and sent
    asyncio.get_running_loop().call_soon(time.sleep, 0.5)
    await calls
    assert not limiter.degraded
    await limiter.close()


async def test_a_redis_that_may_not_be_written_is_lost_until_it_may(own_valkey: Valkey, subject: str):
    limiter = await connected(own_valkey.url)
    own_valkey.client.replicaof("127.0.0.1", "1")  # what a failover does to the former primary
    assert await admitted(200, subject, 100, limiter) == 100 // INSTANCES
    assert limiter.degraded
    own_valkey.client.replicaof("NO", "ONE")
    await until(limiter, degraded=False)
    await limiter.close()


async def test_a_forgotten_script_is_loaded_again_within_the_call(own_valkey: Valkey, subject: str):
    limiter = await connected(own_valkey.url)
    assert await admitted(50, subject, 100, limiter) == 50
    own_valkey.client.script_flush()
    assert await admitted(2000, subject, 100, limiter) == 50
    assert not limiter.degraded
    await limiter.close()


async def test_emptied_in_between_redis_starts_the_minute_anew(own_valkey: Valkey, subject: str):
    limiter = await connected(own_valkey.url)
    assert await admitted(60, subject, 100, limiter) == 60
    own_valkey.client.flushall()
    assert await admitted(2000, subject, 100, limiter) == 100
    assert not limiter.degraded
    assert all(own_valkey.client.ttl(key) > 0 for key in own_valkey.client.scan_iter())
    await limiter.close()


async def test_a_caller_that_leaves_takes_nobody_along(valkey: Valkey, subject: str):
    limiter = await connected(valkey.url)
    calls = [asyncio.create_task(limiter.spend(subject, 1, 100)) for _ in range(50)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(answer, Decision) for answer in answers] == [False, True] * 25
    assert not limiter.degraded
    await limiter.close()


async def test_redis_absent_at_the_start_is_logged_once_and_not_fatal(
    own_valkey: Valkey, subject: str, caplog: pytest.LogCaptureFixture
):
    own_valkey.kill()
    limiter = RedisLimiter(own_valkey.url, LocalLimiter(lambda: INSTANCES))
    assert await admitted(200, subject, 100, limiter) == 100 // INSTANCES
    await asyncio.sleep(2 * RECONNECT_INTERVAL)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    own_valkey.start()
    await until(limiter, degraded=False)
    await limiter.close()


async def test_a_wrong_password_falls_over_and_is_not_logged(subject: str, caplog: pytest.LogCaptureFixture):
    with running() as server:
        server.client.config_set("requirepass", "right")
        limiter = RedisLimiter(server.url.replace("//", "//:pa%2Fss@"), LocalLimiter())
        assert await admitted(20, subject, 10, limiter) == 10
        assert limiter.degraded
        await limiter.close()
        limiter = await connected(server.url.replace("//", "//:right@"))
        await limiter.close()
    assert "is lost" in caplog.text
    assert "pa/ss" not in caplog.text
    assert "pa%2Fss" not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "http://:hidden@localhost",
        "redis://:hidden/hidden@localhost:6379",
        "redis://:hidden@localhost:port",
        "redis://:hidden@localhost?colour=blue",
        "redis://:hidden@localhost?db=first",
    ],
)
async def test_a_url_that_cannot_be_read_is_refused_in_one_sentence(url: str):
    with pytest.raises(ValueError, match=r"^REDIS_URL can't be read: write redis://") as refusal:
        RedisLimiter(url, LocalLimiter())
    assert "hidden" not in str(refusal.value)
    assert refusal.value.__suppress_context__


async def test_a_closed_limiter_leaves_no_connection(own_valkey: Valkey):
    limiter = await connected(own_valkey.url)
    await limiter.close()
    for _ in range(500):
        if len(own_valkey.client.client_list()) == 1:  # the one that asks
            return
        await asyncio.sleep(0.01)
    pytest.fail("the connection is still open")
