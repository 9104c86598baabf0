"""How many attempts an instance makes at a time: the accounting, and that no load gets past it."""

import asyncio
from collections import Counter
from pathlib import Path
from uuid import UUID

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from relay.v1 import actions_pb2

from relay_grpc.actions import lanes
from relay_grpc.actions.lanes import Lanes
from relay_grpc.app import serving
from tests.actions.caller import Caller, calling, ended_as, held, received
from tests.harness import Databases, Receiver, Relay, running, settings_for

SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
EVENTS = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60)
WORKSPACES = [UUID(int=1)] * 3 + [UUID(int=2)] * 2 + [UUID(int=3)]
CONNECTIONS = [UUID(int=10 + n) for n in range(6)]


@given(st.integers(1, 4), st.integers(0, 12), EVENTS)
def test_what_enters_leaves_and_a_lane_is_full_at_its_most(
    per_connection: int, in_all: int, moves: list[tuple[bool, int]]
) -> None:
    counted = Lanes(per_connection, in_all)
    running: Counter[int] = Counter()
    for enters, n in moves:
        lane = (WORKSPACES[n], CONNECTIONS[n])
        if enters and not counted.is_full(*lane):
            counted.enter(*lane)
            running[n] += 1
        elif not enters and running[n]:
            counted.leave(*lane)
            running[n] -= 1
        room = counted.room
        assert room.in_all == in_all - running.total() >= 0
        assert dict(room.connections) == {CONNECTIONS[n]: count for n, count in running.items() if count}
        assert all(count <= per_connection for count in room.connections.values())
        assert all(count <= max(in_all // 2, 1) for count in room.workspaces.values())
        assert sum(room.workspaces.values()) == running.total()


class Crowd:
    """A receiver's answer that takes a moment, and counts how many are in it at once."""

    def __init__(self, receiver: Receiver) -> None:
        self.now = self.most = 0
        receiver.answer = self._take

    async def _take(self, _request: web.Request) -> web.Response:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.03)
        self.now -= 1
        return web.Response()


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_connection_has_more_attempts_at_a_time_than_its_lane(
    databases: Databases, tmp_path: Path, receiver: Receiver, limit: int
) -> None:
    """And none waits for the sweep: whoever leaves a full lane lets the next one in."""
    crowd = Crowd(receiver)
    settings = settings_for(tmp_path, RELAY_CONNECTION_CONCURRENCY=str(limit), RELAY_SWEEP_INTERVAL="60")
    async with databases.new() as url, running(url, settings) as relay, calling(relay, receiver) as caller:
        previews = [await caller.preview() for _ in range(40)]
        executions = await asyncio.gather(*(caller.execute(preview, wait=30, deadline=40) for preview in previews))
    assert {execution.state for execution in executions} == {SUCCESS}
    assert crowd.most == limit
    assert sorted(receiver.ids()) == sorted(execution.id for execution in executions)


async def test_of_all_that_can_run_one_workspace_has_half(
    databases: Databases, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "MAX_RUNNING", 6)
    release = held(receiver)
    async with (
        databases.new() as url,
        running(url, settings_for(tmp_path)) as relay,
        calling(relay, receiver) as busy,
        calling(relay, receiver, key=(await relay.new_tenant()).admin) as quiet,
    ):
        many = [await busy.execute(await busy.preview(), wait=0) for _ in range(10)]
        assert sorted(execution.attempt_count for execution in many) == [0] * 7 + [1] * 3
        few = [await quiet.execute(await quiet.preview(), wait=0) for _ in range(4)]
        assert sorted(execution.attempt_count for execution in few) == [0, 1, 1, 1]
        await received(receiver, 6)
        release.set()
        for caller, executions in ((busy, many), (quiet, few)):
            for execution in executions:
                assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 1


async def test_a_half_open_breaker_lets_one_attempt_through_at_a_time(
    relay: Relay, caller: Caller, receiver: Receiver
) -> None:
    """Of all instances together, until one has succeeded."""
    release = held(receiver)
    await relay.sql("UPDATE connections SET open_until = now() + interval '1 h' WHERE id = $1", caller.connection.id)
    async with serving(relay.settings, relay.url):
        executions = [await caller.execute(await caller.preview(), wait=0) for _ in range(12)]
        await relay.sql("UPDATE connections SET open_until = now() WHERE id = $1", caller.connection.id)
        await received(receiver, 1)
        await asyncio.sleep(0.4)  # several sweeps of both
        assert len(receiver.requests) == 1
        release.set()
        for execution in executions:
            assert (await ended_as(caller, execution.id, SUCCESS)).attempt_count == 1
    assert sorted(receiver.ids()) == sorted(execution.id for execution in executions)
