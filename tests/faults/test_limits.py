"""Limits that two server processes keep together: exactly while Redis counts for them, bounded while it does not."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from statistics import quantiles
from uuid import UUID

import pytest

from relay_grpc.ratelimit.node import KEY_PREFIX
from relay_grpc.ratelimit.window import Window
from tests.actions.caller import eventually
from tests.faults.fleet import Fleet, Instance, Sample, two_instances
from tests.harness import Databases
from tests.ratelimit.spending import REDIS_TIMEOUT, as_kept
from tests.valkey import running

Figure = Callable[[str], None]


@pytest.fixture(scope="module")
async def fleet(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    with running() as valkey:
        async with databases.new() as url, two_instances(url, valkey, tmp_path_factory.mktemp("data")) as fleet:
            yield fleet


async def within_a_minute(seconds: float) -> None:
    """Waits where this minute has less than so many seconds left."""
    if (left := 60 - time.time() % 60) < seconds:
        await asyncio.sleep(left + 0.05)


def codes(samples: Sequence[Sample]) -> Counter[str]:
    return Counter(sample.code for sample in samples)


async def test_two_processes_admit_exactly_the_budget_of_many_concurrent_calls(
    databases: Databases, tmp_path: Path
) -> None:
    """Redis gets a second to answer: on a machine of two cores the burst itself may hold it up."""
    with running() as valkey:
        async with (
            databases.new() as url,
            two_instances(url, valkey, tmp_path, RELAY_REDIS_TIMEOUT="1") as fleet,
        ):
            _, key = await fleet.new_workspace(100)
            before = await fleet.admitted()
            await within_a_minute(20)
            samples = await asyncio.gather(*(fleet.instances[n % 2].call(key) for n in range(2000)))
            assert codes(samples) == {"OK": 100, "RESOURCE_EXHAUSTED": 1900}
            assert await fleet.admitted() - before == 100
            assert await fleet.degraded() == [0, 0]


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_five_times_the_load_is_admitted_at_the_limit_and_a_quiet_workspace_does_not_notice(
    fleet: Fleet, long: bool, figure: Figure
) -> None:
    boundaries, limit, rate = (3, 600, 50) if long else (0, 60, 100)
    _, busy = await fleet.new_workspace(limit)
    _, quiet = await fleet.new_workspace(60)
    await within_a_minute(10)
    end = (time.time() // 60 + boundaries) * 60 + 15 if long else time.time() + 1.5

    def goes_on() -> bool:
        return time.time() < end

    before = await fleet.admitted()
    samples, unhurried = await asyncio.gather(fleet.load(busy, rate, goes_on), fleet.load(quiet, 0.8, goes_on))
    assert codes(unhurried) == {"OK": len(unhurried)}
    assert codes(samples).keys() == {"OK", "RESOURCE_EXHAUSTED"}
    admitted = [sample for sample in samples if sample.code == "OK"]
    assert await fleet.admitted() - before == len(admitted) + len(unhurried)
    assert_never_more_than(limit, 60, admitted)
    for boundary in {int(sample.sent) // 60 * 60 + 60 for sample in samples}:
        assert (
            len([one for one in admitted if boundary <= one.sent and one.sent + one.took < boundary + 1]) <= limit / 30
        )
    minutes = Counter(int(sample.sent) // 60 for sample in admitted)
    figure(f"{len(samples)} calls, admitted by minute: {[minutes[minute] for minute in sorted(minutes)]} of {limit}")
    assert await fleet.degraded() == [0, 0]


def assert_never_more_than(limit: int, seconds: int, admitted: Sequence[Sample]) -> None:
    """In no aligned minute, nor in several in a row, whichever side of a boundary a call fell that was on both."""
    first = min(int(one.sent) // seconds for one in admitted)
    last = max(int(one.sent + one.took) // seconds for one in admitted)
    for start in range(first, last + 1):
        for stop in range(start + 1, last + 2):
            inside = [one for one in admitted if start * seconds <= one.sent and one.sent + one.took < stop * seconds]
            assert len(inside) <= limit * (stop - start)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["killed", "frozen", "flushed"])
async def test_without_redis_limits_hold_and_calls_do_not_wait(
    fleet: Fleet, long: bool, figure: Figure, fault: str
) -> None:
    rounds, limit, rate = (20 if long else 2), 40, 200
    workspace_id, key = await fleet.new_workspace(limit)
    await asyncio.gather(*(instance.call(key) for instance in fleet.instances))  # the key is proven
    before, started = await fleet.admitted(), time.time()
    ended, troubles = False, []
    loading = asyncio.create_task(fleet.load(key, rate, lambda: not ended))
    for _ in range(rounds):
        await asyncio.sleep(0.5)  # more than enough to spend the limit
        began = time.time()
        await trouble(fleet, fault)
        troubles.append((began, time.time()))
    ended = True
    samples = await loading

    assert codes(samples).keys() <= {"OK", "RESOURCE_EXHAUSTED"}
    assert await fleet.degraded() == [0, 0]
    assert fleet.valkey.client.exists(f"{KEY_PREFIX}{{{workspace_id}}}:calls")
    # Redis grants the limit in each minute, and anew whenever it forgot. The instances, which know what it granted,
    # grant nothing in the minute that the run began in, and their shares in each one that began meanwhile.
    minutes = time.time() // 60 - started // 60
    forgotten = 0 if fault == "frozen" else rounds
    bound = limit * (1 + minutes + forgotten + (0 if fault == "flushed" else minutes))
    admitted = await fleet.admitted() - before
    assert admitted <= bound < len(samples) / 2

    in_trouble = [one.took for one in samples if any(began <= one.sent < end for began, end in troubles)]
    calm = [one.took for one in samples if not any(began - 0.05 <= one.sent < end for began, end in troubles)]
    median, p99 = (added(calm, in_trouble, percent) for percent in (50, 99))
    figure(
        f"{rounds} rounds, {admitted} of {len(samples)} calls admitted, at most {bound:.0f}; "
        f"added to the median {median * 1e3:.1f} ms, to p99 {p99 * 1e3:.1f} ms"
    )
    assert median < REDIS_TIMEOUT / 2  # no call waits but those that find Redis gone
    assert p99 <= (0.05 if long else 0.5)  # the machine may have other things to do, and a short run few calls


async def trouble(fleet: Fleet, fault: str) -> None:
    """Redis fails, and is put right half a second later. Returns when both instances count in it again."""
    if fault == "flushed":
        await asyncio.to_thread(fleet.valkey.client.flushall)
        await asyncio.sleep(0.5)
        return
    fail, put_right = {
        "killed": (fleet.valkey.kill, fleet.valkey.start),
        "frozen": (fleet.valkey.freeze, fleet.valkey.thaw),
    }[fault]
    await asyncio.to_thread(fail)
    await asyncio.sleep(0.5)
    assert await fleet.degraded() == [1, 1]
    await asyncio.to_thread(put_right)

    async def back() -> bool:
        return await fleet.degraded() == [0, 0]

    await eventually(back)


def added(calm: Sequence[float], in_trouble: Sequence[float], percent: int) -> float:
    """What trouble adds to this percentile, in seconds."""
    of_trouble, of_calm = (quantiles(times, n=100)[percent - 1] for times in (in_trouble, calm))
    return of_trouble - of_calm


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_who_waits_as_long_as_a_refusal_says_is_admitted(fleet: Fleet, long: bool, figure: Figure) -> None:
    limit, rounds = 6000, (100 if long else 10)
    workspaces = [await fleet.new_workspace(limit) for _ in range(10)]

    async def honour(instance: Instance, workspace_id: UUID, key: str) -> list[str]:
        found = []
        for _ in range(rounds):
            minute, elapsed = divmod(time.time(), 60)
            # A unit comes free every 10 ms, the next one in 200: slow machines meet a refusal too.
            full = Window(int(minute), math.ceil(limit * elapsed / 60) + 20, limit)
            fleet.valkey.client.set(f"{KEY_PREFIX}{{{workspace_id}}}:calls", as_kept(full))
            refused = await instance.call(key)
            assert refused.code == "RESOURCE_EXHAUSTED"
            assert refused.hint > 0
            await asyncio.sleep(refused.hint)
            found.append((await instance.call(key)).code)
        return found

    outcomes = await asyncio.gather(
        *(honour(fleet.instances[n % 2], *workspace) for n, workspace in enumerate(workspaces))
    )
    heeded = [code for codes in outcomes for code in codes]
    figure(f"{heeded.count('OK')} of {len(heeded)} calls that waited for the hint were admitted")
    assert heeded.count("OK") >= 0.99 * len(heeded)
