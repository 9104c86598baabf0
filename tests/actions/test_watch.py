"""WatchExecution, and Execute where it has to wait for its turn: told of changes wherever they happen, and let go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from relay import errors
from relay.errors import from_rpc_error
from relay.v1 import actions_pb2

from relay_grpc.actions import leases
from relay_grpc.actions.watching import Watching
from relay_grpc.app import serving
from relay_grpc.db import Database
from tests.actions.caller import Caller, answering, calling, eventually, held, received
from tests.harness import Databases, Receiver, Relay, running, settings_for

PENDING = actions_pb2.EXECUTION_STATE_PENDING
EXECUTING = actions_pb2.EXECUTION_STATE_EXECUTING
SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
UNKNOWN = actions_pb2.EXECUTION_STATE_UNKNOWN
CANCELLED = actions_pb2.EXECUTION_STATE_CANCELLED


class Watch:
    """What a watch has told so far. failure: how it ended, if not well."""

    def __init__(self, caller: Caller, execution_id: str) -> None:
        self.told: list[actions_pb2.Execution] = []
        self.failure: errors.RelayError | None = None
        request = actions_pb2.WatchExecutionRequest(id=execution_id)
        self._call = caller.stub.WatchExecution(request, metadata=caller.metadata)
        self.ended = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for execution in self._call:
                self.told.append(execution)
        except grpc.RpcError as failure:
            self.failure = from_rpc_error(failure)

    @property
    def states(self) -> list[int]:
        return [execution.state for execution in self.told]

    def cancel(self) -> None:
        self._call.cancel()


@asynccontextmanager
async def elsewhere(relay: Relay, receiver: Receiver) -> AsyncIterator[Caller]:
    """The same caller at another server."""
    async with serving(relay.settings, relay.url) as app, calling(relay, receiver, listen=app.listen) as caller:
        yield caller


async def hold_back(caller: Caller, *, open_: bool) -> None:
    """Opens the breaker of the caller's connection, or closes it."""
    set_breaker = "UPDATE connections SET open_until = CASE WHEN $2 THEN now() + interval '1 h' END WHERE id = $1"
    await caller.relay.sql(set_breaker, caller.connection.id, open_)


async def test_a_watch_tells_every_state_and_ends_with_the_last(relay: Relay, caller: Caller) -> None:
    await hold_back(caller, open_=True)
    execution = await caller.execute(await caller.preview(), wait=0)
    watch = Watch(caller, execution.id)
    await eventually(lambda: watch.states == [PENDING])
    release = held(caller.receiver)
    await hold_back(caller, open_=False)
    await eventually(lambda: watch.states == [PENDING, EXECUTING])
    release.set()
    await asyncio.wait_for(watch.ended, 10)
    assert watch.states == [PENDING, EXECUTING, SUCCESS]
    assert watch.failure is None
    assert watch.told[-1] == await caller.get(execution.id)


async def test_a_watch_of_what_has_ended_tells_it_once(caller: Caller) -> None:
    execution = await caller.execute(await caller.preview())
    watch = Watch(caller, execution.id)
    await asyncio.wait_for(watch.ended, 10)
    assert watch.told == [execution]


async def test_an_unknown_outcome_is_not_the_end(caller: Caller) -> None:
    answering(caller.receiver, 500)
    execution = await caller.execute(await caller.preview_of("webhook.send_once"))
    watch = Watch(caller, execution.id)
    await eventually(lambda: watch.states == [UNKNOWN])
    settled = await caller.do("Reconcile", execution.id, state=SUCCESS, reason="x")
    await asyncio.wait_for(watch.ended, 10)
    assert watch.told[1:] == [settled]


async def test_what_another_server_does_is_told_too(relay: Relay, caller: Caller, receiver: Receiver) -> None:
    answering(receiver, 503)
    execution = await caller.execute(await caller.preview())
    async with elsewhere(relay, receiver) as other:
        watch = Watch(other, execution.id)
        await eventually(lambda: watch.told)
        cancelled = await caller.do("Cancel", execution.id)
        await asyncio.wait_for(watch.ended, 10)
    assert watch.told == [execution, cancelled]


async def test_many_watches_are_one_look_per_tick(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    executions = [await caller.execute(await caller.preview()) for _ in range(5)]
    watches = [Watch(caller, execution.id) for execution in executions for _ in range(10)]
    await eventually(lambda: all(watch.told for watch in watches))
    await relay.sql("SELECT pg_stat_reset()")
    for execution in executions:
        await caller.do("Cancel", execution.id)
    await asyncio.wait_for(asyncio.gather(*(watch.ended for watch in watches)), 10)
    assert {watch.told[-1].state for watch in watches} == {CANCELLED}


async def test_a_watch_of_nothing_or_of_others_is_not_found(relay: Relay, caller: Caller, receiver: Receiver) -> None:
    execution = await caller.execute(await caller.preview())
    stranger = await relay.new_tenant()
    async with calling(relay, receiver, key=stranger.admin) as other:
        for watch in (Watch(other, execution.id), Watch(caller, caller.connection.id)):
            await asyncio.wait_for(watch.ended, 10)
            assert isinstance(watch.failure, errors.NotFound)
            assert not watch.told


async def test_a_watch_ends_with_its_key(relay: Relay, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_grpc.actions.executions.RECHECK_SECONDS", 0.2)
    answering(caller.receiver, 503)
    execution = await caller.execute(await caller.preview())
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("watcher", "viewer")
        caller.metadata = (("authorization", f"Bearer {made.secret}"),)
        watch = Watch(caller, execution.id)
        await eventually(lambda: watch.told)
        await asyncio.sleep(0.5)
        assert not watch.ended.done()
        await client.auth.revoke_api_key(made.id)
    await asyncio.wait_for(watch.ended, 10)
    assert isinstance(watch.failure, errors.Unauthenticated)


async def test_a_watch_ends_with_its_scopes(relay: Relay, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_grpc.actions.executions.RECHECK_SECONDS", 0.2)
    answering(caller.receiver, 503)
    execution = await caller.execute(await caller.preview())
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("watcher", "viewer")
    caller.metadata = (("authorization", f"Bearer {made.secret}"),)
    watch = Watch(caller, execution.id)
    await eventually(lambda: watch.told)
    await relay.sql("UPDATE api_keys SET scopes = '{actions:preview}' WHERE id = $1", made.id)
    await asyncio.wait_for(watch.ended, 10)
    assert isinstance(watch.failure, errors.PermissionDenied)


async def test_a_watcher_that_leaves_is_forgotten(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    execution = await caller.execute(await caller.preview())
    watch = Watch(caller, execution.id)
    await eventually(lambda: watch.told)
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch.ended
    again = Watch(caller, execution.id)
    await eventually(lambda: again.told)
    await caller.do("Cancel", execution.id)
    await asyncio.wait_for(again.ended, 10)
    assert again.states == [PENDING, CANCELLED]


async def test_a_server_that_stops_lets_watches_go(databases: Databases, tmp_path: Path, receiver: Receiver) -> None:
    settings = settings_for(tmp_path, RELAY_SHUTDOWN_GRACE="60")
    async with databases.new() as url, AsyncExitStack() as server:
        relay = await server.enter_async_context(running(url, settings))
        async with calling(relay, receiver) as caller:
            answering(receiver, 503)
            execution = await caller.execute(await caller.preview())
            watch = Watch(caller, execution.id)
            await eventually(lambda: watch.told)
            await asyncio.wait_for(server.aclose(), 20)  # and not only when its grace is over
            await asyncio.wait_for(watch.ended, 10)
    assert watch.failure is not None
    assert watch.failure.reason == "OVERLOADED"


@pytest.mark.parametrize("server", ["this one", "another"])
async def test_execute_waits_for_its_turn_and_then_for_the_outcome(
    relay: Relay, caller: Caller, receiver: Receiver, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection's lane is full. The server that makes the attempt in the end need not be the one it asked."""
    release = held(receiver)
    busy = [await caller.execute(await caller.preview(), wait=0) for _ in range(8)]
    await received(receiver, len(busy))
    waiting: Any = caller.call(await caller.preview(), wait=30)
    await eventually(lambda: relay.sql("SELECT FROM action_executions WHERE status = 'pending' AND attempt_count = 0"))
    assert len(receiver.requests) == len(busy)
    if server == "another":
        async with elsewhere(relay, receiver):
            await received(receiver, len(busy) + 1)
            release.set()
            assert (await waiting).state == SUCCESS
    else:
        release.set()
        assert (await waiting).state == SUCCESS
    for execution in busy:
        assert (await caller.ended(execution.id)).state == SUCCESS


async def test_execute_that_waits_for_its_turn_keeps_its_word_about_waiting(relay: Relay, caller: Caller) -> None:
    await hold_back(caller, open_=True)
    for wait, deadline in ((0, 20), (0.3, 20), (30, 1)):
        execution = await caller.execute(await caller.preview(), wait=wait, deadline=deadline)
        assert (execution.state, execution.attempt_count) == (PENDING, 0)
    preview = await caller.preview()
    asked: Any = caller.call(preview, wait=30)
    [row] = await eventually(lambda: caller.executions(preview))
    cancelled = await caller.do("Cancel", str(row["id"]))
    assert await asked == cancelled


async def test_it_stops_though_the_end_of_a_connection_swallows_its_cancellation(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As asyncpg can when both come at once: of 1,500 tries to make them, 17 hung a server that was to stop."""
    looking = asyncio.Event()

    async def lose_the_cancellation(*_arguments: Any) -> None:
        looking.set()
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise ConnectionResetError from None

    monkeypatch.setattr(leases, "revisions", lose_the_cancellation)
    async with databases.new() as url:
        db = await Database.open(url)
        watching = Watching(db, tick=0)
        row: Any = {"id": uuid4(), "revision": 1}
        waiting = asyncio.create_task(watching.newer(uuid4(), row, 10))
        await looking.wait()
        async with asyncio.timeout(5):
            await watching.stop()
            assert await waiting is None
        await db.close()
