"""Whose turn it is: workspaces take turns, what is held back is left alone, and looking for work stays cheap."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from relay.v1 import actions_pb2

from relay_grpc.actions import lanes, leases
from relay_grpc.actions.catalogue import CATALOGUE
from relay_grpc.actions.lanes import Lanes
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from tests.actions.caller import Caller, calling, ended_as, eventually
from tests.harness import Databases, Receiver, Relay, running, settings_for

SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS


async def queue(connection: Any, target: UUID, count: int, action: str = "webhook.send") -> None:
    """Puts so many executions for a connection into the queue, due now and no sooner than those put there before."""
    await connection.execute(
        """
        INSERT INTO action_executions
          (id, workspace_id, caller, idempotency_key, fingerprint, preview_id, provider, action_type, action_version,
           connection_id, parameters, traceparent, delivery, status, next_attempt_at)
        SELECT id, workspace_id, '', id, '', id, provider, $3, 1, connection_id, '{"payload":{}}',
               '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00', 'at_least_once', 'pending', clock_timestamp()
          FROM (SELECT made AS id, workspace_id, provider, c.id AS connection_id
                  FROM connections c, unnest($2::uuid[]) made WHERE c.id = $1) each
        """,
        *(target, [uuid7() for _ in range(count)], action),
    )


@pytest.fixture
async def connection(relay: Relay) -> AsyncIterator[Any]:
    made = await asyncpg.connect(relay.url)
    yield made
    await made.close()


async def test_a_thousand_of_others_do_not_delay_the_few_of_one_workspace(
    databases: Databases, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few run at a time that two workspaces could fill all of it, each its half, for as long as they have work."""
    monkeypatch.setattr(lanes, "MAX_RUNNING", 4)
    async with databases.new() as url, running(url, settings_for(tmp_path)) as relay, AsyncExitStack() as stack:
        tenants = [relay.tenant, await relay.new_tenant(), await relay.new_tenant()]
        one, other, quiet = [
            UUID((await stack.enter_async_context(calling(relay, receiver, key=tenant.admin))).connection.id)
            for tenant in tenants
        ]
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            await queue(connection, one, 500)
            await queue(connection, other, 500)
            await queue(connection, quiet, 20)
        waiting = "SELECT count(*) FROM action_executions WHERE connection_id = ANY($1) AND status <> 'success'"
        await eventually(lambda: no_more(connection, waiting, [quiet]))
        assert len(receiver.requests) <= (20 + 4) * lanes.MAX_RUNNING, "one of those that run is always the quiet one's"
        assert await connection.fetchval(waiting, [one, other]) > 900
        await connection.close()


async def no_more(connection: Any, counting: str, *arguments: Any) -> bool:
    return not await connection.fetchval(counting, *arguments)


HELD_BACK = {
    "the workspace is halted": "INSERT INTO halts SELECT workspace_id, '', 'x' FROM connections WHERE id = $1",
    "all are halted": f"INSERT INTO halts SELECT '{UUID(int=0)}', provider, 'x' FROM connections WHERE id = $1",
    "disabled": "UPDATE connections SET enabled = false, disabled_reason = 'x' WHERE id = $1",
    "the breaker is open": "UPDATE connections SET open_until = now() + interval '1 h' WHERE id = $1",
    "no action of this server": "UPDATE action_executions SET action_type = 'x.y' WHERE connection_id = $1",
}
LET_GO = (
    "DELETE FROM halts",
    "UPDATE connections SET enabled = true, disabled_reason = '', open_until = NULL",
    "UPDATE action_executions SET action_type = 'webhook.send'",
)


@pytest.mark.parametrize("why", HELD_BACK)
async def test_what_is_held_back_waits_untouched_and_then_goes_on(caller: Caller, connection: Any, why: str) -> None:
    target = UUID(caller.connection.id)
    async with connection.transaction():
        await queue(connection, target, 3)
        await connection.execute(HELD_BACK[why], target)
    rows = "SELECT id, xmin::text, xmax::text, ctid::text FROM action_executions WHERE connection_id = $1 ORDER BY id"
    before = await connection.fetch(rows, target)
    await asyncio.sleep(0.4)  # several sweeps
    assert await connection.fetch(rows, target) == before
    assert not caller.receiver.requests
    async with connection.transaction():
        for statement in LET_GO:
            await connection.execute(statement)
    for row in before:
        assert (await ended_as(caller, str(row["id"]), SUCCESS)).attempt_count == 1


class Explaining:
    """A connection that runs statements, and keeps how Postgres ran the last one instead of its rows."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.plan: dict[str, Any] = {}

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        explained = await self._connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {query}", *arguments)
        self.plan = json.loads(explained)[0]["Plan"]
        return []

    def nodes(self, plan: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        plan = plan or self.plan
        yield plan
        for child in plan.get("Plans", ()):
            yield from self.nodes(child)


@pytest.mark.parametrize("statistics", ["ANALYZE", "SELECT"], ids=["with statistics", "without statistics"])
async def test_a_claim_reads_what_it_takes_and_one_entry_for_each_connection(
    databases: Databases, statistics: str
) -> None:
    """Among 20,000 that wait, of 200 connections; most of them disabled, or with work that is due later."""
    connections, each, limit = 200, 100, 50
    async with databases.new() as url:
        connection = await asyncpg.connect(url)
        workspace = uuid4()
        await connection.execute("INSERT INTO workspaces (id, name) VALUES ($1, 'w')", workspace)
        targets = [uuid4() for _ in range(connections)]
        for n, target in enumerate(targets):
            await connection.execute(
                "INSERT INTO connections (id, workspace_id, name, provider, configuration, enabled, disabled_reason)"
                " VALUES ($1, $2, $1::uuid::text, 'independent', '{}', $3, CASE WHEN $3 THEN '' ELSE 'x' END)",
                *(target, workspace, n % 4 != 0),
            )
            await queue(connection, target, each)
        await connection.execute(
            "UPDATE action_executions SET next_attempt_at = now() + interval '1 h' WHERE connection_id = ANY($1)",
            targets[: connections // 2],
        )
        await connection.execute(statistics)
        db = await Database.open(url)
        async with db.worker() as worker:
            explaining: Any = Explaining(worker)
            await leases.find_due(explaining, CATALOGUE, Lanes(8).room, limit)
            found = await leases.find_due(worker, CATALOGUE, Lanes(8).room, limit)
            await leases.claim(worker, [row["id"] for row in found], uuid4(), timedelta(seconds=45))
        await db.close()
        scans = [node for node in explaining.nodes() if node.get("Relation Name") == "action_executions"]
        assert not [node for node in scans if node["Node Type"] == "Seq Scan"]
        looked_at = sum(
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            for node in scans
            if "Scan" in node["Node Type"]
        )
        assert limit < looked_at < 2 * connections + 12 * limit
        claimed = "SELECT count(*) FROM action_executions WHERE status = 'executing'"
        assert await connection.fetchval(claimed) == limit
        await connection.close()
