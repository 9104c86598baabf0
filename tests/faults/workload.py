"""Actions asked of servers that may die at any moment, and what everybody knows of them afterwards."""

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
from aiohttp import web
from relay import aio
from relay.errors import Cancelled, Contention, DeadlineExceeded, Unavailable
from relay.v1 import actions_pb2, connections_pb2, connections_pb2_grpc

from relay_grpc import datafolder
from relay_grpc.embedded import running_at
from tests.actions.caller import eventually
from tests.faults.checker import Attempt, Delivery, Verdict, judge
from tests.harness import Receiver, receiving, running, settings_for
from tests.processes import Server, started

LEASE = 2.1  # seconds
ENVIRON = {
    "RELAY_ATTEMPT_TIMEOUT": str(LEASE / 3),
    "RELAY_LEASE": str(LEASE),
    "RELAY_SWEEP_INTERVAL": "0.1",
    "RELAY_RETRY_FLOOR": "0",
    "RELAY_BREAKER_PAUSE": "0.1",
}
CONNECTIONS = 2
RETRIES = 16  # a second apart: what keeps failing is not given up during a run
THINKING = 0.03  # seconds that the receiver takes: most kills fall between send and record
PATIENCE = 5.0  # seconds that a client waits for an answer
TRY_AGAIN = 0.05  # seconds after which a client that was let down asks again
RETRYABLE = (Unavailable, DeadlineExceeded, Contention, Cancelled)


@dataclass
class Workload:
    """What clients asked for and heard, and what the receiver got, over all the servers that there were.

    url: of the database; empty: servers bring their own. key: of the clients. thinks: what the receiver does before it
    answers. refused: names whose first request it answers with 503. answers: of Execute, by name, which is the
    idempotency key too. secrets: those that sign, or did.
    """

    url: str
    folder: Path
    receiver: Receiver
    key: str
    action: str = "webhook.send"
    connections: list[connections_pb2.Connection] = field(default_factory=list)
    secrets: list[str] = field(default_factory=list)
    thinks: Callable[[Delivery], Awaitable[None]] = lambda _: asyncio.sleep(THINKING)
    refused: set[str] = field(default_factory=set)
    attempted: set[str] = field(default_factory=set)
    answers: dict[str, list[actions_pb2.Execution]] = field(default_factory=lambda: defaultdict(list))
    deliveries: list[Delivery] = field(default_factory=list)
    _clients: list[Any] = field(default_factory=list)
    _serving: asyncio.Event = field(default_factory=asyncio.Event)
    _opened: AsyncExitStack = field(default_factory=AsyncExitStack)

    def __post_init__(self) -> None:
        self.receiver.answer = self._take

    async def _take(self, request: web.Request) -> web.Response:
        """Answers each request with a text of its own, which Relay keeps with the attempt."""
        body = await request.read()
        name, text = json.loads(body)["name"], f"delivery {len(self.deliveries)}"
        taken = name not in self.refused or any(one.name == name for one in self.deliveries)
        delivery = Delivery(name, request.headers["webhook-id"], body, time.time(), text, taken)
        self.deliveries.append(delivery)
        await self.thinks(delivery)
        return web.Response(status=200 if taken else 503, text=text)

    async def connect(self, listen: str) -> None:
        """Makes the connections to the receiver, at this server."""
        metadata = (("authorization", f"Bearer {self.key}"),)
        policy = connections_pb2.RetryPolicy(delays=[timedelta(seconds=1)] * RETRIES)
        async with grpc.aio.insecure_channel(listen) as channel:
            for number in range(CONNECTIONS):
                configuration = connections_pb2.WebhookConfiguration(url=self.receiver.url, retry_policy=policy)
                request = connections_pb2.CreateConnectionRequest(name=f"receiver {number}", webhook=configuration)
                create = connections_pb2_grpc.ConnectionsServiceStub(channel).CreateConnection
                self.connections.append(await create(request, metadata=metadata))
                self.secrets.append(self.connections[-1].signing_secret)

    @asynccontextmanager
    async def server(self, *, module: str = "relay_grpc", **environ: str) -> AsyncIterator[Server]:
        """A server that clients find as long as the block lasts."""
        async with started(self.url, self.folder, module=module, **(ENVIRON | environ)) as server:
            client = await self._opened.enter_async_context(aio.connect(server.listen, api_key=self.key))
            self._clients.append(client)
            self._serving.set()
            try:
                yield server
            finally:
                self._clients.remove(client)
                if not self._clients:
                    self._serving.clear()

    async def close(self) -> None:
        """Closes the clients: not before, as calls to a server that is gone are still to hear of it."""
        await self._opened.aclose()

    async def client(self) -> Any:
        """A client of one of the servers, once there is one."""
        await self._serving.wait()
        return random.choice(self._clients)

    async def gone(self, client: Any) -> None:
        """Waits until this client's server is no more."""
        await eventually(lambda: client not in self._clients)

    async def preview(self, client: Any, name: str) -> actions_pb2.Preview:
        connection = self.connections[hash(name) % len(self.connections)]
        return await client.actions.preview(
            self.action, {"payload": {"name": name}}, connection_id=connection.id, timeout=PATIENCE
        )

    async def act(self, name: str) -> actions_pb2.Execution:
        """Previews and executes with the name as key, until a server acknowledges it."""
        while True:
            client = await self.client()
            try:
                preview = await self.preview(client, name)
                self.attempted.add(name)
                execution = await client.actions.execute(preview, idempotency_key=name, timeout=PATIENCE)
            except RETRYABLE:
                await asyncio.sleep(TRY_AGAIN)
            else:
                self.answers[name].append(execution)
                return execution

    def acknowledged(self) -> dict[str, str]:
        return {name: heard[0].id for name, heard in self.answers.items()}

    @asynccontextmanager
    async def database(self) -> AsyncIterator[Any]:
        """A connection as superuser: to what is really there."""
        url = self.url or running_at(self.folder / datafolder.POSTGRES)
        assert url, "no server runs"
        connection = await asyncpg.connect(url)
        try:
            yield connection
        finally:
            await connection.close()

    async def sql(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        async with self.database() as connection:
            rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
            return rows

    async def drained(self) -> None:
        """Waits until no execution goes on."""
        over = "SELECT bool_and(status NOT IN ('pending', 'executing')) FROM action_executions"
        async with self.database() as connection:
            await eventually(lambda: connection.fetchval(over))

    async def attempts(self) -> list[asyncpg.Record]:
        return await self.sql(
            """
            SELECT e.idempotency_key AS name, e.id::text, a.number, a.outcome, a.response_excerpt AS answer,
                   extract(epoch FROM a.started_at)::float8 AS began, extract(epoch FROM a.finished_at)::float8 AS ended
              FROM execution_attempts a JOIN action_executions e ON e.id = a.execution_id
            """
        )

    async def verdict(self) -> Verdict:
        recorded = [
            Attempt(
                row["name"],
                row["id"],
                row["number"],
                row["began"],
                row["ended"],
                row["answer"],
                row["outcome"] == "success",
            )
            for row in await self.attempts()
        ]
        return judge(self.attempted, self.acknowledged(), self.deliveries, recorded)

    async def assert_nothing_lost(self) -> None:
        """Every action that was asked for was acknowledged and done, once in all the books, and logged."""
        verdict = await self.verdict()
        assert verdict.valid, verdict
        executions = await self.sql("SELECT id::text, idempotency_key, status FROM action_executions")
        assert {row["idempotency_key"]: row["id"] for row in executions} == self.acknowledged()
        assert self.acknowledged().keys() == self.attempted
        assert {row["status"] for row in executions} == {"success"}
        assert await self.unlogged() == []

    async def unlogged(self) -> list[tuple[str, str, str]]:
        """What was made without its audit event, and events of what was not made; attempts with how many there are."""
        rows = await self.sql(
            """
            WITH made(action, target) AS (
              SELECT 'ActionsService.Preview', 'previews/' || id FROM previews
              UNION ALL SELECT 'ActionsService.Execute', 'executions/' || id FROM action_executions
              UNION ALL SELECT 'delivery.attempt', format('executions/%s: %s', id, attempt_count)
                          FROM action_executions WHERE attempt_count > 0
            ), logged AS (
              SELECT DISTINCT action, target FROM audit_events
               WHERE action IN ('ActionsService.Preview', 'ActionsService.Execute') AND status = 'success'
              UNION ALL SELECT action, format('%s: %s', target, count(*))
                          FROM audit_events WHERE action = 'delivery.attempt' GROUP BY action, target
            )
            SELECT 'no event', * FROM (TABLE made EXCEPT ALL TABLE logged) a
            UNION ALL SELECT 'no action', * FROM (TABLE logged EXCEPT ALL TABLE made) b
            """
        )
        return [tuple(row) for row in rows]


@asynccontextmanager
async def working(url: str, folder: Path) -> AsyncIterator[Workload]:
    """A workload on this database, with a receiver of its own."""
    async with receiving() as receiver, AsyncExitStack() as stack:
        async with running(url, settings_for(folder)) as relay:
            work = Workload(url, folder, receiver, relay.tenant.admin)
            stack.push_async_callback(work.close)
            await work.connect(str(relay.app.listen))
        yield work


@asynccontextmanager
async def working_embedded(folder: Path) -> AsyncIterator[Workload]:
    """The same, of servers with an embedded PostgreSQL."""
    async with receiving() as receiver, AsyncExitStack() as stack:
        async with started("", folder) as server:
            credentials = datafolder.read(folder / datafolder.CREDENTIALS)
            assert credentials
            work = Workload("", folder, receiver, credentials["RELAY_ADMIN_KEY"])
            stack.push_async_callback(work.close)
            await work.connect(server.listen)
        yield work
