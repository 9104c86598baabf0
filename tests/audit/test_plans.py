"""What a page of events costs does not depend on how many events there are."""

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from relay_grpc.audit import reading
from relay_grpc.audit.event import Outcome
from relay_grpc.audit.reading import Wanted
from tests.audit.past import MONTHS, fill
from tests.harness import Databases

OURS, SMALL = UUID(int=1), UUID(int=2)
LIMIT = 51
NOW = datetime.now(UTC)
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "action": {"action": "test.Action1"},
    "rare action": {"action": "test.Rare"},
    "no action": {"action": "nothing"},
    "provider": {"provider": "independent"},
    "no provider": {"provider": "nobody"},
    "denied": {"status": Outcome.DENIED},
    "failed": {"status": Outcome.FAILED},
    "success": {"status": Outcome.SUCCESS},
    "actor": {"actor_id": "actor-3"},
    "no actor": {"actor_id": "nobody"},
    "request": {"request_id": "request-100"},
    "no request": {"request_id": "nothing"},
    "request, actor": {"request_id": "request-100", "actor_id": "actor-1"},
    "action, failed": {"action": "test.Action2", "status": Outcome.FAILED},
    "provider, denied": {"provider": "independent", "status": Outcome.DENIED},
    "provider, action": {"provider": "independent", "action": "test.Action1"},
    "actor, denied": {"actor_id": "actor-1", "status": Outcome.DENIED},
    "actor, action": {"actor_id": "actor-5", "action": "test.Action1"},
}
PAGES: dict[str, dict[str, Any]] = {
    "first page": {},
    "deep page": {"before": reading._first(NOW - timedelta(days=200))},
    "range": {"start": NOW - timedelta(days=150), "end": NOW - timedelta(days=30)},
}


class Explained:
    """A connection that explains what it is to fetch. Keeps the plan."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.plan: dict[str, Any] = {}

    async def execute(self, query: str) -> None:
        await self._connection.execute(query.replace("SET LOCAL", "SET"))  # each of these is its own transaction

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        for _ in range(2):  # the second time, indexes are known to the session
            text = await self._connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", *arguments)
        self.plan = json.loads(text)[0]["Plan"]
        return []

    @property
    def buffers(self) -> int:
        return int(self.plan["Shared Hit Blocks"] + self.plan["Shared Read Blocks"])

    @property
    def rows(self) -> int:
        return int(self.plan["Actual Rows"])

    @staticmethod
    def read_at_once(node: dict[str, Any]) -> float:
        """How many rows one run of this part of the plan looked at."""
        return float(node["Actual Rows"] + node.get("Rows Removed by Filter", 0))

    def nodes(self, plan: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        plan = self.plan if plan is None else plan
        return [plan, *(one for part in plan.get("Plans", ()) for one in self.nodes(part))]


async def explained(url: str, workspace_id: UUID) -> dict[tuple[str, str], Explained]:
    """Each listing as the application's role makes it."""
    connection = await asyncpg.connect(url)
    await connection.execute(f"SET ROLE relay_app; SET relay.workspace_id = '{workspace_id}'")
    found = {}
    for name, filters in FILTERS.items():
        for page, bounds in PAGES.items():
            found[name, page] = one = Explained(connection)
            await reading.list_events(one, workspace_id, Wanted(**filters, **bounds), LIMIT)  # type: ignore[arg-type]
    await connection.close()
    return found


FEW = 10_000


@pytest.fixture(scope="module")
async def large(databases: Databases, long: bool) -> AsyncIterator[tuple[str, int]]:
    """A database and how many events a workspace of it has: a hundred times FEW; in every run, ten times."""
    many = FEW * (100 if long else 10)
    async with databases.new() as url:
        await fill(url, OURS, many, place=True)
        await fill(url, SMALL, 1_000, place=True)
        yield url, many


@pytest.mark.long
async def test_a_page_costs_as_much_with_a_hundred_times_the_events(
    databases: Databases, large: tuple[str, int], figure: Callable[[str], None]
) -> None:
    """Shared buffers: at most 1.2 times as many, and one for every month that is looked into.

    That one is the level which a month's B-tree has more. Where something else is asked of an actor's events, each of
    them is looked up, and the level counts for each.
    """
    url, many = large
    async with databases.new() as small:
        await fill(small, OURS, FEW, place=True)
        for known in ("no statistics", "statistics"):
            before, after = await explained(small, OURS), await explained(url, OURS)
            costs = {
                name: (before[name].buffers, after[name].buffers)
                for name in before
                if before[name].rows == after[name].rows
            }
            assert len(costs) > len(before) / 2
            for name, (at_first, then) in costs.items():
                levels = MONTHS + 1 + (LIMIT if name[0].startswith("actor, ") else 0)
                assert then <= 1.2 * at_first + levels, (known, name, at_first, then)
            for name, plan in after.items():
                assert plan.buffers < 600, (known, name, plan.buffers)
                most = max(plan.nodes(), key=plan.read_at_once)
                assert plan.read_at_once(most) <= 200, (known, name, most)
            told = ", ".join(
                f"{name} {cost[0]} -> {cost[1]}" for (name, page), cost in costs.items() if "first" in page
            )
            figure(f"{FEW} and {many} events, {known}, buffers: {told}")
            for one in (small, url):
                connection = await asyncpg.connect(one)
                await connection.execute("ANALYZE audit_logs, audit_values, audit_leaves", timeout=300)
                await connection.close()


async def test_a_page_costs_a_small_workspace_no_more_beside_a_large_one(large: tuple[str, int]) -> None:
    """At most 1.2 times what the large one pays, and one for each month: its page lies in more of them."""
    url, _ = large
    ours, small = await explained(url, OURS), await explained(url, SMALL)
    for name, plan in small.items():
        if plan.rows == ours[name].rows:
            assert plan.buffers <= 1.2 * ours[name].buffers + MONTHS, (name, plan.buffers, ours[name].buffers)
        assert plan.buffers < 1000
