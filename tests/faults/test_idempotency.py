"""One idempotency key, many callers, two servers that get killed: one execution, and the same answer for everybody."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from relay.errors import FailedPrecondition, NotFound

from tests.actions.caller import Caller, calling
from tests.faults.workload import Workload, working
from tests.harness import Databases, Receiver, Relay

TOGETHER = 20  # calls at one time
HURRY = 0.15  # seconds after the first call in which a server is killed


@pytest.fixture
async def caller(relay: Relay, receiver: Receiver) -> AsyncIterator[Caller]:
    async with calling(relay, receiver) as made:
        yield made


async def asked_at_once(work: Workload, round_: int, keys: int, callers: int) -> None:
    """All callers ask for the same few actions at once; meanwhile one of the two servers dies, and is replaced."""
    async with asyncio.TaskGroup() as group, AsyncExitStack() as dying:
        server = await dying.enter_async_context(work.server())
        for key in range(keys):
            for _ in range(callers):
                group.create_task(work.act(f"round-{round_}-key-{key}"))
        await asyncio.sleep(random.uniform(0, HURRY))
        server.kill()


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_every_caller_of_a_key_is_told_of_the_same_execution(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    rounds, keys, callers = (50, 4, 20) if long else (2, 10, 10)
    async with databases.new() as url, working(url, tmp_path) as work:
        async with work.server():
            for round_ in range(rounds):
                await asked_at_once(work, round_, keys, callers)
            await work.drained()
        await work.assert_nothing_lost()
    total = rounds * keys
    assert len(work.answers) == len({delivery.id for delivery in work.deliveries}) == total
    for heard in work.answers.values():
        assert len(heard) == callers
        assert len({execution.id for execution in heard}) == 1
        assert sum(not execution.replayed for execution in heard) <= 1  # nobody may have heard the first answer
    answers = sum(map(len, work.answers.values()))
    figure(
        f"{total} keys x {callers} callers, {rounds} kills: {total} executions, {answers} answers, equal for each key"
    )


async def in_turns(count: int, job: Callable[[int], Awaitable[None]]) -> None:
    """Does the job for each number, some at a time."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await job(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(TOGETHER):
            group.create_task(work())


@pytest.mark.long
async def test_another_request_under_a_used_key_is_refused(
    caller: Caller, long: bool, figure: Callable[[str], None]
) -> None:
    count = 1000 if long else 50
    keys = [f"key-{number}" for number in range(10)]
    used = [await caller.execute(await caller.preview(), key) for key in keys]
    refused = Counter[str]()

    async def change(number: int) -> None:
        preview = await caller.preview(changed=number)
        with pytest.raises(FailedPrecondition) as raised:
            await caller.execute(preview, keys[number % len(keys)])
        refused[raised.value.reason] += 1

    await in_turns(count, change)
    assert refused == {"IDEMPOTENCY_KEY_REUSED": count}
    assert sorted(caller.receiver.ids()) == sorted(execution.id for execution in used)
    figure(f"{count} of {count} changed requests under used keys were refused")


@pytest.mark.long
async def test_nobody_executes_the_preview_of_another_workspace(
    relay: Relay, receiver: Receiver, caller: Caller, long: bool, figure: Callable[[str], None]
) -> None:
    count = 1000 if long else 50
    refused = Counter[str]()
    tenant = await relay.new_tenant()
    async with calling(relay, receiver, key=tenant.admin) as stranger:

        async def steal(_number: int) -> None:
            preview = await caller.preview()
            with pytest.raises(NotFound) as raised:
                await stranger.execute(preview)
            refused[raised.value.reason] += 1

        await in_turns(count, steal)
    assert refused == {"RESOURCE_NOT_FOUND": count}
    assert receiver.requests == []
    figure(f"{count} of {count} previews of another workspace were not found")
