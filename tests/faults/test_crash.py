"""kill -9 at any moment: nothing acknowledged is lost, and a build that loses something is found out."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.actions.caller import eventually
from tests.faults.workload import Workload, working, working_embedded
from tests.harness import Databases

ACTIONS = 40
BESIDES = 5  # previews that nobody executes


@asynccontextmanager
async def killed_at_work(work: Workload, sent: int, module: str = "relay_grpc") -> AsyncIterator[None]:
    """A server is killed when it has sent so many requests; the next one has ended everything, and still runs."""
    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(work.act(f"action-{number}")) for number in range(ACTIONS)]
        async with work.server(module=module) as server:
            for number in range(BESIDES):
                await work.preview(await work.client(), f"thought better of {number}")
            await eventually(lambda: len(work.deliveries) >= sent)
            server.kill()
            await server.process.wait()
        async with work.server(module=module):
            await asyncio.wait(clients)
            await work.drained()
            yield


async def test_a_server_with_its_own_postgres_loses_nothing(tmp_path: Path) -> None:
    async with (
        working_embedded(tmp_path) as work,
        killed_at_work(work, random.randrange(1, ACTIONS // 2)),
    ):
        await work.assert_nothing_lost()
        assert work.acknowledged().keys() == {f"action-{number}" for number in range(ACTIONS)}


async def test_what_is_delivered_at_most_once_is_not_sent_again(databases: Databases, tmp_path: Path) -> None:
    async with databases.new() as url, working(url, tmp_path) as work:
        work.action = "webhook.send_once"
        async with killed_at_work(work, random.randrange(1, ACTIONS // 2)):
            executions = await work.sql("SELECT idempotency_key AS name, status FROM action_executions")
            attempts = await work.attempts()
    interrupted = {row["name"] for row in attempts if not row["answer"]}
    assert {row["name"] for row in executions if row["status"] == "unknown"} == interrupted != set()
    assert {row["status"] for row in executions} == {"success", "unknown"}
    received = Counter(delivery.name for delivery in work.deliveries)
    assert max(received.values()) == 1
    assert received.keys() | interrupted == {f"action-{number}" for number in range(ACTIONS)}


@pytest.mark.parametrize(("module", "fault"), [("without_outbox", "lost"), ("sending_first", "unexpected")])
async def test_a_build_that_loses_or_forgets_is_found_out(
    databases: Databases, tmp_path: Path, module: str, fault: str
) -> None:
    async with (
        databases.new() as url,
        working(url, tmp_path) as work,
        killed_at_work(work, ACTIONS // 4, f"tests.faults.{module}"),
    ):
        verdict = await work.verdict()
        assert getattr(verdict, fault)
        assert not verdict.valid
