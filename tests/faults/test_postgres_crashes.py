"""PostgreSQL crashes or cuts connections while actions run: nothing is lost, and no server has to be restarted."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.actions.caller import eventually
from tests.faults.postgres import private
from tests.faults.workload import Workload, working
from tests.harness import Databases

CLIENTS = 32
CUT = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
     WHERE datname = current_database() AND application_name LIKE 'relay %' ORDER BY random() LIMIT 1
"""
DOWN = 1.0  # seconds that it is gone, at most
SERVING = 5.0  # seconds after which an action must be done again


async def act_on(work: Workload, names: list[str]) -> None:
    while names:
        await work.act(names.pop())


async def acknowledged_beyond(work: Workload, count: float) -> float:
    """Waits until clients have heard of more actions than that. Returns how long that took, in seconds."""
    started = time.monotonic()
    while (now := len(work.answers)) <= count:
        await eventually(lambda now=now: len(work.answers) > now)
    return time.monotonic() - started


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_nothing_is_lost_when_postgres_crashes(tmp_path: Path, long: bool, figure: Callable[[str], None]) -> None:
    actions, crashes = (5000, 20) if long else (150, 2)
    names = [f"action-{number}" for number in range(actions)]
    delays = []
    async with private(tmp_path / "pg", durable=True) as postgres, working(postgres.url, tmp_path) as work:
        async with work.server() as server:
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(act_on(work, names))
                for crash in range(crashes):
                    await acknowledged_beyond(work, actions * (crash + 0.5) / crashes)
                    async with postgres.crashed():
                        await asyncio.sleep(random.uniform(0, DOWN))
                    delays.append(await acknowledged_beyond(work, len(work.answers)))
            await work.drained()
            assert server.process.returncode is None
        await work.assert_nothing_lost()
    assert len(work.answers) == actions
    assert max(delays) <= SERVING
    figure(f"{crashes} crashes of PostgreSQL during {actions} actions: lost 0, back within {max(delays):.2f} s of it")


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_nothing_is_lost_when_connections_are_cut(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    actions, cuts = (2000, 200) if long else (100, 10)
    names = [f"action-{number}" for number in range(actions)]
    async with databases.new() as url, working(url, tmp_path) as work:
        async with work.server() as server:
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(act_on(work, names))
                for cut in range(cuts):
                    await acknowledged_beyond(work, actions * cut / cuts / 2)
                    await eventually(lambda: work.sql(CUT))
            await work.drained()
            assert server.process.returncode is None
        await work.assert_nothing_lost()
    assert len(work.answers) == actions
    figure(f"{cuts} connections cut during {actions} actions: lost 0")
