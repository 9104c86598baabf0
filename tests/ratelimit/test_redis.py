"""What happens to the limits when Redis fails, or a cluster of them does."""

import asyncio
import logging
import time
from collections.abc import Iterator

import pytest

from relay_grpc.ratelimit.limiter import LocalLimiter, RedisLimiter
from relay_grpc.ratelimit.node import KEY_PREFIX, RECONNECT_INTERVAL
from relay_grpc.ratelimit.window import Decision
from tests.ratelimit.spending import INSTANCES, REDIS_TIMEOUT, admitted, charge, connected, new_subject, take, until
from tests.valkey import SLOTS, Valkey, cluster, running, take_over


async def test_a_killed_redis_is_replaced_by_shares_until_it_is_back(
    own_valkey: Valkey, subject: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "relay_grpc")
    limiter = await connected(own_valkey.url)
    assert await admitted(20, subject, 100, limiter) == 20
    own_valkey.kill()
    assert await admitted(500, subject, 100, limiter) == 80 // INSTANCES  # its share of what is left
    assert limiter.degraded
    assert (await take(limiter, subject, 0, 100)).limit == 100 // INSTANCES
    own_valkey.start()
    await until(limiter, degraded=False)
    assert await admitted(500, subject, 100, limiter) == 100
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    await limiter.close()


async def test_losing_redis_again_and_again_lets_no_instance_grant_its_share_anew(own_valkey: Valkey, subject: str):
    limiters = [RedisLimiter(own_valkey.url, LocalLimiter(lambda: 2), REDIS_TIMEOUT) for _ in range(2)]
    for limiter in limiters:
        await until(limiter, degraded=False)
    total = await admitted(30, subject, 100, *limiters)
    for limiter in limiters:
        await take(limiter, subject, 0, 100)  # each learns what both have spent
    for _ in range(3):
        own_valkey.freeze()
        total += sum([await admitted(30, subject, 100, limiter) for limiter in limiters])
        assert all(limiter.degraded for limiter in limiters)
        own_valkey.thaw()
        for limiter in limiters:
            await until(limiter, degraded=False)
    assert total == 30 + 60 + 10
    for limiter in limiters:
        await limiter.close()


async def test_a_frozen_redis_costs_one_short_wait(own_valkey: Valkey, subject: str):
    limiter = RedisLimiter(own_valkey.url, LocalLimiter(lambda: INSTANCES), REDIS_TIMEOUT)
    await until(limiter, degraded=False)
    own_valkey.freeze()
    began = time.perf_counter()
    first = await admitted(100, subject, 40, limiter)
    noticed = time.perf_counter()
    then = [(await take(limiter, subject, 1, 40)).allowed for _ in range(100)]
    ended = time.perf_counter()
    assert (first, sum(then)) == (40 // INSTANCES, 0)
    assert limiter.degraded
    assert noticed - began < 2  # it is 0.05; left to itself, redis-py takes a minute
    assert ended - noticed < noticed - began  # a hundred calls in a row: none of them waits any more
    own_valkey.thaw()
    async with asyncio.timeout(10):
        while limiter.degraded:  # it is back although nobody calls
            await asyncio.sleep(0.01)
    await limiter.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_process_that_was_held_up_does_not_blame_redis(valkey: Valkey, subject: str, turns: int):
    """turns: of the event loop, between the making of the calls and the hold-up."""
    limiter = RedisLimiter(valkey.url, LocalLimiter(), answer_timeout=0.1)
    await until(limiter, degraded=False)
    calls = asyncio.gather(*(take(limiter, subject, 1, 100) for _ in range(10)))
    for _ in range(turns):
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(time.sleep, 0.3)
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
    calls = [asyncio.create_task(take(limiter, subject, 1, 100)) for _ in range(50)]
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
    limiter = RedisLimiter(own_valkey.url, LocalLimiter(lambda: INSTANCES), REDIS_TIMEOUT)
    assert await admitted(200, subject, 100, limiter) == 100 // INSTANCES
    await asyncio.sleep(2 * RECONNECT_INTERVAL)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    own_valkey.start()
    await until(limiter, degraded=False)
    await limiter.close()


async def test_a_wrong_password_falls_over_and_is_not_logged(subject: str, caplog: pytest.LogCaptureFixture):
    with running() as server:
        server.client.config_set("requirepass", "right")
        limiter = RedisLimiter(server.url.replace("//", "//:pa%2Fss@"), LocalLimiter(), REDIS_TIMEOUT)
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
        RedisLimiter(url, LocalLimiter(), REDIS_TIMEOUT)
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


# A cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Valkey]]:
    """A cluster for tests that leave it whole."""
    with cluster() as nodes:
        yield nodes


async def of_both(subject: str, limiter: RedisLimiter) -> bool:
    """Whether a call is admitted that is charged to a workspace, of 40 units, and to its caller, of 36."""
    return (await limiter.spend([charge(subject, 1, 40), charge(f"{subject}:key", 1, 36)])).allowed


async def admitted_of_both(subject: str, *limiters: RedisLimiter) -> int:
    return sum(await asyncio.gather(*(of_both(subject, limiters[i % len(limiters)]) for i in range(100))))


def new_subjects() -> list[str]:
    return [new_subject() for _ in range(40)]  # enough that each of three nodes has some


async def test_a_cluster_is_followed_when_it_loses_a_node():
    subjects = new_subjects()
    with cluster() as nodes:
        limiters = [await connected(node.url) for node in nodes]
        assert [await admitted_of_both(subject, *limiters) for subject in subjects] == [36] * 40
        assert all(list(node.client.scan_iter("relay:limit:{*:executions:key")) for node in nodes)
        assert not any(limiter.degraded for limiter in limiters)

        nodes[-1].kill()
        assert {await admitted_of_both(subject, limiters[0]) for subject in subjects} == {0}
        # The other nodes go on; what this one should count, each instance counts by itself.
        assert {await admitted_of_both(subject, limiters[0]) for subject in new_subjects()} == {36, 36 // INSTANCES}
        assert {await admitted_of_both(subject, limiters[-1]) for subject in new_subjects()} == {36, 36 // INSTANCES}

        take_over(nodes)
        for limiter in (limiters[0], limiters[-1]):  # the last one knew the cluster by the node that is gone
            for subject in subjects:
                await take(limiter, subject, 0, 40)
                await take(limiter, subject, 0, 40)
                assert not limiter.degraded
        assert {await admitted_of_both(subject, limiters[0], limiters[-1]) for subject in subjects} == {0, 36}
        for limiter in limiters:
            await limiter.close()


async def test_a_frozen_node_of_a_cluster_costs_its_own_slots_one_short_wait(nodes: list[Valkey]):
    subjects = new_subjects()
    limiter = RedisLimiter(nodes[0].url, LocalLimiter(lambda: INSTANCES), REDIS_TIMEOUT)
    await until(limiter, degraded=False)
    assert sum([await of_both(subject, limiter) for subject in subjects]) == 40
    nodes[1].freeze()
    waits, local = [], 0
    for subject in subjects * 3:
        began = time.perf_counter()
        await of_both(subject, limiter)
        waits.append(time.perf_counter() - began)
        local += limiter.degraded
    assert 0 < local < len(waits)  # its slots alone
    assert sum(wait > 0.04 for wait in waits) <= len(waits) / 10
    nodes[1].thaw()
    await until_all_are_shared(limiter, subjects)
    await limiter.close()


async def until_all_are_shared(limiter: RedisLimiter, subjects: list[str]) -> None:
    async with asyncio.timeout(10):
        for subject in subjects:
            await take(limiter, subject, 0, 40)
            while limiter.degraded:
                await asyncio.sleep(0.05)
                await take(limiter, subject, 0, 40)


async def test_while_a_slot_moves_its_calls_alone_are_counted_here(nodes: list[Valkey]):
    limiter = await connected(nodes[0].url)
    subjects = new_subjects()
    for subject in subjects:
        await take(limiter, subject, 1, 40)
    slots = [nodes[0].client.cluster("keyslot", KEY_PREFIX + subject) for subject in subjects]
    on_first = [slot < SLOTS // 3 for slot in slots]
    moving, staying = [subject for subject, here in zip(subjects, on_first, strict=True) if here][:2]
    slot = slots[subjects.index(moving)]
    names = [node.client.cluster("myid").decode() for node in nodes]
    nodes[1].client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[0])
    nodes[0].client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[1])
    before = nodes[0].client.info("stats")["total_connections_received"]
    for _ in range(2):
        assert await of_both(moving, limiter)  # one of its two keys is there and one is not: TRYAGAIN
        assert limiter.degraded
        assert await of_both(staying, limiter)
        assert not limiter.degraded
    assert nodes[0].client.info("stats")["total_connections_received"] == before  # nobody was cut off
    for node in nodes[:2]:
        node.client.execute_command("CLUSTER SETSLOT", slot, "STABLE")
    await limiter.close()
