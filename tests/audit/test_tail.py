"""A tail tells every event in the log's order, at least once, across restarts; and nobody else's."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from relay import aio, errors
from relay.v1 import audit_pb2

from tests.actions.caller import eventually
from tests.audit.log import integrated
from tests.harness import Databases, Relay, running, settings_for
from tests.processes import started

CREATED = "ConnectionsService.CreateConnection"


class Tail:
    """A tail as it is told."""

    def __init__(self, client: Any, cursor: str = "") -> None:
        self.told: list[audit_pb2.TailEventsResponse] = []
        self.ended = asyncio.create_task(self._listen(client, cursor))

    async def _listen(self, client: Any, cursor: str) -> None:
        async for message in client.audit.tail_events(cursor=cursor, timeout=60):
            self.told.append(message)

    @property
    def indices(self) -> list[int]:
        return [message.event.leaf_index for message in self.told if message.HasField("event")]

    async def stop(self) -> None:
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)


async def make(client: Any, *names: str) -> None:
    for name in names:
        await client.connections.create_webhook(name, "http://127.0.0.1:9/")


async def test_events_come_in_order_from_now_on_and_from_each_cursor(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await make(client, "before")
        await integrated(relay)
        tail = Tail(client)
        await eventually(lambda: tail.told)
        assert not tail.told[0].HasField("event")
        await make(client, "a", "b", "c")
        await eventually(lambda: len(tail.indices) == 4)  # the tail's own event is among them
        await tail.stop()
        assert tail.indices == list(range(tail.indices[0], tail.indices[0] + 4))
        assert {message.event.action for message in tail.told[1:]} == {CREATED, "AuditService.TailEvents"}
        for n, message in enumerate(tail.told):
            again = Tail(client, message.cursor)
            await eventually(lambda again=again: len(again.indices) >= 4)
            await again.stop()
            assert again.told[1 : 4 - n + 1] == tail.told[n + 1 :]


async def test_a_cursor_that_was_not_given_here_is_refused(relay: Relay) -> None:
    tenant, stranger = await relay.new_tenant(), await relay.new_tenant()
    await integrated(relay)
    async with relay.connect(tenant.admin) as client, relay.connect(stranger.admin) as other:
        tail = Tail(other)
        await eventually(lambda: tail.told)
        await tail.stop()
        for cursor in (tail.told[0].cursor, "x", "é", "====", tail.told[0].cursor[:-4]):
            with pytest.raises(errors.InvalidRequest):
                await Tail(client, cursor).ended
        tokens = [event async for event in client.audit.list_events(action="AuditService.TailEvents")]
        assert {event.reason for event in tokens} == {"INVALID_REQUEST"}


async def test_a_tail_is_audited_when_it_begins(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        tail = Tail(client)
        await eventually(lambda: tail.told)
        (event,) = [event async for event in client.audit.list_events(action="AuditService.TailEvents")]
        assert event.outcome == audit_pb2.EVENT_OUTCOME_SUCCESS
        await tail.stop()
        await asyncio.sleep(0.2)
        assert len([event async for event in client.audit.list_events(action="AuditService.TailEvents")]) == 1


async def test_a_tail_ends_with_its_key(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_grpc.audit.tailing.RECHECK_SECONDS", 0.2)
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        key = await client.auth.create_api_key("auditor", "admin")
        async with relay.connect(key.secret) as auditor:
            tail = Tail(auditor)
            await eventually(lambda: tail.told)
            await client.auth.revoke_api_key(key.id)
            with pytest.raises(errors.Unauthenticated):
                await asyncio.wait_for(tail.ended, 10)


async def test_many_tails_are_one_look_per_tick(relay: Relay) -> None:
    tenants = [await relay.new_tenant() for _ in range(3)]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(relay.connect(tenant.admin)) for tenant in tenants]
        tails = [Tail(client) for client in clients for _ in range(5)]
        await eventually(lambda: all(tail.told for tail in tails))
        for client in clients:
            await make(client, "one")
        await eventually(lambda: all(any(one.event.action == CREATED for one in tail.told) for tail in tails))
        for tail in tails:
            await tail.stop()
    for tail in tails:
        assert tail.indices == sorted(set(tail.indices))


async def test_a_server_that_stops_lets_tails_go(databases: Databases, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, RELAY_SHUTDOWN_GRACE="60")
    async with databases.new() as url, AsyncExitStack() as server:
        relay = await server.enter_async_context(running(url, settings))
        async with relay.connect(relay.tenant.admin) as client:
            send = client.audit.stub.TailEvents
            call = send(
                audit_pb2.TailEventsRequest(), metadata=(("authorization", f"Bearer {relay.tenant.admin}"),), timeout=60
            )
            assert (await call.read()).cursor
            await asyncio.wait_for(server.aclose(), 20)  # and not only when its grace is over
            assert (await call.code()).name == "UNAVAILABLE"


@pytest.mark.long
async def test_a_tail_misses_nothing_while_its_server_is_killed_and_started_again(
    databases: Databases, tmp_path: Path, long: bool
) -> None:
    rounds, events = (10, 50) if long else (2, 10)
    async with databases.new() as url:
        async with running(url, settings_for(tmp_path)) as relay:  # makes the first keys
            key, workspace_id = relay.tenant.admin, relay.tenant.workspace_id
        seen: list[int] = []
        cursor = ""
        for n in range(rounds):
            async with started(url, tmp_path) as server, aio.connect(server.listen, api_key=key) as client:
                tail = Tail(client, cursor)
                await eventually(lambda tail=tail: tail.told)
                await make(client, *(f"{n}-{one}" for one in range(events)))
                await eventually(lambda tail=tail: tail.indices)
                server.kill()  # whatever the tail was at
                await server.process.wait()
                await tail.stop()
                seen += tail.indices
                cursor = tail.told[-1].cursor
        async with running(url, settings_for(tmp_path)) as relay, relay.connect(key) as client:
            await integrated(relay)
            (size,) = await relay.sql(
                "SELECT max(tree_size) AS size FROM audit_checkpoints WHERE workspace_id = $1", workspace_id
            )
            tail = Tail(client, cursor)
            await eventually(lambda: tail.indices and tail.indices[-1] >= size["size"] - 1)
            await tail.stop()
            seen += tail.indices
    assert seen == list(range(seen[0], seen[0] + len(seen)))
