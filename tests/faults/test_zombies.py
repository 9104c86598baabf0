"""A worker that stands still past its lease, and comes back with an answer: the one that took over is not disturbed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.actions.caller import eventually
from tests.faults.checker import Delivery
from tests.faults.workload import Workload, working
from tests.harness import Databases
from tests.processes import Server, started

LATE = "came after its lease"  # what a worker says whose record was refused
ENVIRON = {"RELAY_ATTEMPT_TIMEOUT": "0.4", "RELAY_LEASE": "1.3"}


async def outlived(work: Workload, name: str, stalled: Server) -> None:
    """One action, whose first worker stalls with the receiver's answer in hand until the second has sent it too.

    The second one's answer is held back until the first has had its say.
    """
    refused = stalled.log.read_text().count(LATE)

    async def said() -> bool:
        recorded = await work.sql(
            """
            SELECT FROM execution_attempts a JOIN action_executions e ON e.id = a.execution_id
             WHERE e.idempotency_key = $1 AND a.number = 2
            """,
            name,
        )
        return bool(recorded) or stalled.log.read_text().count(LATE) > refused

    async def think(delivery: Delivery) -> None:
        if [one.name for one in work.deliveries].count(delivery.name) == 2:
            stalled.thaw()
            await eventually(said)

    work.thinks = think
    acting = asyncio.create_task(work.act(name))
    await eventually(stalled.stands_still)
    await acting


@asynccontextmanager
async def two_workers(url: str, folder: Path, module: str) -> AsyncIterator[tuple[Workload, Server]]:
    """A workload, the worker that clients call, which runs the module, and beside it one that takes over."""
    async with working(url, folder) as work, AsyncExitStack() as stack:
        stalled, _ = await asyncio.gather(
            stack.enter_async_context(work.server(module=f"tests.faults.{module}", **ENVIRON)),
            stack.enter_async_context(started(url, folder, **ENVIRON)),
        )
        yield work, stalled


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_what_a_worker_records_after_its_lease_is_refused(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    rounds = 50 if long else 2
    async with databases.new() as url, two_workers(url, tmp_path, "stalling") as (work, stalled):
        for number in range(rounds):
            await outlived(work, f"action-{number}", stalled)
        await work.drained()
        await work.assert_nothing_lost()
        attempts = await work.attempts()
    refused = stalled.log.read_text().count(LATE)
    assert refused == rounds
    assert [row["outcome"] for row in attempts if row["number"] == 1] == ["interrupted"] * rounds
    assert [row["outcome"] for row in attempts if row["number"] > 1] == ["success"] * rounds
    figure(f"{refused} of {rounds} records that came after their lease were refused")


async def test_a_build_without_the_fence_is_found_out(databases: Databases, tmp_path: Path) -> None:
    async with databases.new() as url, two_workers(url, tmp_path, "without_fence") as (work, stalled):
        await outlived(work, "action", stalled)
        await work.drained()
        verdict = await work.verdict()
    assert verdict.misrecorded == {"action"}
    assert not verdict.valid
