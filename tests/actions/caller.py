"""A caller of ActionsService with a connection to a receiver, on a channel that repeats nothing by itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from inspect import isawaitable
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
from aiohttp import web
from relay.errors import from_rpc_error
from relay.v1 import actions_pb2, actions_pb2_grpc, connections_pb2, connections_pb2_grpc

from relay_grpc.setting_types import Address
from tests.harness import Receiver, Relay


@dataclass
class Caller:
    """stub: of ActionsService. metadata: holds the key."""

    relay: Relay
    receiver: Receiver
    stub: Any
    metadata: tuple[tuple[str, str], ...]
    connection: connections_pb2.Connection

    async def preview(self, **payload: object) -> actions_pb2.Preview:
        """A preview of sending this payload; without one, of a payload like no other."""
        return await self.preview_of("webhook.send", **payload)

    async def preview_of(self, action: str, **payload: object) -> actions_pb2.Preview:
        request = actions_pb2.PreviewRequest(
            action=action,
            connection_id=self.connection.id,
            parameters={"payload": payload or {"unique": uuid4().hex}},
        )
        return await answer(self.stub.Preview(request, metadata=self.metadata))

    def call(
        self,
        preview: actions_pb2.Preview,
        key: str = "",
        *,
        digest: str | None = None,
        wait: float | None = None,
        deadline: float = 20,
        request_id: str = "",
    ) -> Any:
        """An Execute under way: to be awaited or cancelled. digest: None for the preview's."""
        request = actions_pb2.ExecuteRequest(
            preview_id=preview.id,
            digest=preview.digest if digest is None else digest,
            idempotency_key=key,
            wait=None if wait is None else timedelta(seconds=wait),
        )
        metadata = (*self.metadata, ("x-request-id", request_id)) if request_id else self.metadata
        return self.stub.Execute(request, timeout=deadline, metadata=metadata)

    async def execute(self, preview: actions_pb2.Preview, key: str = "", **options: Any) -> actions_pb2.Execution:
        """What `call` answers. Raises the errors of relay.errors."""
        return await answer(self.call(preview, key, **options))

    async def do(self, rpc: str, execution_id: str, **fields: Any) -> actions_pb2.Execution:
        """What an RPC that changes one execution answers: "Cancel", "Resend" or "Reconcile"."""
        request = getattr(actions_pb2, f"{rpc}ExecutionRequest")(id=execution_id, **fields)
        return await answer(getattr(self.stub, f"{rpc}Execution")(request, metadata=self.metadata))

    async def get(self, execution_id: str) -> actions_pb2.Execution:
        """As other RPCs tell it: without its events."""
        request = actions_pb2.GetExecutionRequest(id=execution_id)
        execution = await answer(self.stub.GetExecution(request, metadata=self.metadata))
        execution.ClearField("events")
        return execution

    async def ended(self, execution_id: str) -> actions_pb2.Execution:
        """The execution, once no attempt of it is under way."""

        async def settled() -> actions_pb2.Execution | None:
            execution = await self.get(execution_id)
            return None if execution.state == actions_pb2.EXECUTION_STATE_EXECUTING else execution

        return await eventually(settled)

    async def attempts(self, execution_id: str) -> list[str]:
        """The outcomes of its attempts, as the database has them, first to last."""
        rows = await self.relay.sql(
            "SELECT outcome FROM execution_attempts WHERE execution_id = $1 ORDER BY number", execution_id
        )
        return [row["outcome"] for row in rows]

    async def executions(self, *previews: actions_pb2.Preview) -> list[asyncpg.Record]:
        """The executions of these previews, as the database has them."""
        return await self.relay.sql(
            "SELECT * FROM action_executions WHERE preview_id = ANY($1::uuid[])", [preview.id for preview in previews]
        )


@asynccontextmanager
async def calling(
    relay: Relay, receiver: Receiver, *, listen: Address | None = None, key: str = ""
) -> AsyncIterator[Caller]:
    """listen: where the server is, if not where `relay` is. key: of the caller, if not the tenant's admin."""
    metadata = (("authorization", f"Bearer {key or relay.tenant.admin}"),)
    options = (("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0))
    async with grpc.aio.insecure_channel(str(listen or relay.app.listen), options) as channel:
        request = connections_pb2.CreateConnectionRequest(
            name=f"receiver {uuid4()}", webhook=connections_pb2.WebhookConfiguration(url=receiver.url)
        )
        connection = await answer(
            connections_pb2_grpc.ConnectionsServiceStub(channel).CreateConnection(request, metadata=metadata)
        )
        yield Caller(relay, receiver, actions_pb2_grpc.ActionsServiceStub(channel), metadata, connection)


async def answer(call: Any) -> Any:
    """Awaits a call. Raises the errors of relay.errors."""
    try:
        return await call
    except grpc.RpcError as failure:
        raise from_rpc_error(failure) from failure


async def ended_as(caller: Caller, execution_id: str, state: int) -> actions_pb2.Execution:
    """The execution, once it is in this state."""

    async def look() -> actions_pb2.Execution | None:
        execution = await caller.get(execution_id)
        return execution if execution.state == state else None

    return await eventually(look)


def held(receiver: Receiver, status: int = 200) -> asyncio.Event:
    """Makes the receiver answer nothing until the event is set."""
    release = asyncio.Event()

    async def wait(_request: web.Request) -> web.Response:
        await release.wait()
        return web.Response(status=status)

    receiver.answer = wait
    return release


def answering(receiver: Receiver, status: int, **headers: str) -> None:
    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=status, headers=headers)

    receiver.answer = refuse


async def received(receiver: Receiver, count: int) -> None:
    """Waits until the receiver has had so many requests."""
    await eventually(lambda: len(receiver.requests) >= count)


async def eventually(look: Callable[[], Any]) -> Any:
    """Looks, or awaits a look, until it finds something, for 10 seconds. Returns what it found."""
    async with asyncio.timeout(10):
        while True:
            found = look()
            if isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.01)
