"""A caller that goes away: before the commit nothing happens, after it the delivery is made once and recorded."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
import pytest
from relay import errors
from relay.v1 import actions_pb2

from tests.actions.caller import Caller, answer, eventually, held, received
from tests.harness import Relay

SWEEP = 60  # calls


@asynccontextmanager
async def locked(relay: Relay, preview: actions_pb2.Preview) -> AsyncIterator[None]:
    """Holds the preview's row, so that a commit that wants it waits."""
    holder = await asyncpg.connect(relay.url)
    try:
        async with holder.transaction():
            await holder.fetch("SELECT FROM previews WHERE id = $1 FOR UPDATE", preview.id)
            yield
    finally:
        await holder.close()


async def blocked(relay: Relay) -> None:
    """Waits until a statement waits for a lock."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    await eventually(lambda: relay.sql(waiting))


async def events(relay: Relay, request_id: str) -> list[tuple[str, str]]:
    """What the audit log says of a call, once it says something: outcomes and reasons."""
    logged = f"SELECT status, reason FROM audit_events WHERE request_id = '{request_id}'"
    await eventually(lambda: relay.sql(logged))
    await asyncio.sleep(0.05)  # a second event would be a defect
    return [tuple(row) for row in await relay.sql(logged)]


async def seconds(work: Callable[[], Awaitable[object]]) -> float:
    """How long it takes, which is when to interrupt its like."""
    started = time.monotonic()
    await work()
    return time.monotonic() - started


def moments(took: float) -> Iterator[float]:
    """When to interrupt what takes so long: at once, long after its end, and in between, alike in every run."""
    yield 0.0
    yield 20 * took
    chance = random.Random(4711)
    while True:
        yield chance.uniform(0, 2 * took)


async def used_by(relay: Relay, preview: actions_pb2.Preview) -> object:
    [row] = await relay.sql("SELECT execution_id FROM previews WHERE id = $1", preview.id)
    return row["execution_id"]


async def assert_nothing_happened(caller: Caller, preview: actions_pb2.Preview, request_id: str) -> None:
    assert await events(caller.relay, request_id) == [("failed", "CANCELLED")]
    assert not await caller.executions(preview)
    assert await used_by(caller.relay, preview) is None
    assert not caller.receiver.requests
    assert (await caller.execute(preview)).state == actions_pb2.EXECUTION_STATE_SUCCESS


async def assert_happened_once(caller: Caller, preview: actions_pb2.Preview, request_id: str) -> None:
    [row] = await caller.executions(preview)
    execution = await caller.ended(str(row["id"]))
    assert execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
    assert caller.receiver.ids() == [execution.id]
    assert await caller.attempts(execution.id) == ["success"]
    assert await events(caller.relay, request_id) == [("success", "")]


async def test_cancelled_while_it_waits_for_its_turn_nothing_happens(relay: Relay, caller: Caller) -> None:
    first, second = await caller.preview(), await caller.preview()
    async with locked(relay, first):
        blocking = caller.call(first)
        await blocked(relay)
        waiting = caller.call(second, request_id="waits-for-its-turn")
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.sleep(0.05)
    await answer(blocking)
    caller.receiver.requests.clear()
    await assert_nothing_happened(caller, second, "waits-for-its-turn")


async def test_cancelled_while_its_commit_fails_nothing_happens(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    async with locked(relay, preview):
        call = caller.call(preview, request_id="commit-fails")
        await blocked(relay)
        call.cancel()
        await asyncio.sleep(1.1)  # the wait for a lock ends after a second
    await assert_nothing_happened(caller, preview, "commit-fails")


async def test_cancelled_while_its_commit_succeeds_it_happens_once(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    async with locked(relay, preview):
        call = caller.call(preview, request_id="commit-succeeds")
        await blocked(relay)
        call.cancel()
        await asyncio.sleep(0.05)
    await received(caller.receiver, 1)
    await assert_happened_once(caller, preview, "commit-succeeds")


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_a_caller_that_leaves_during_the_delivery_does_not_stop_it(
    relay: Relay, caller: Caller, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("relay_grpc.actions.service.ANSWER_MARGIN", -1)  # the answer would come before the deadline
    release = held(caller.receiver)
    preview = await caller.preview()
    call = caller.call(preview, wait=30, deadline=20 if way == "cancel" else 0.3, request_id=f"leaves-by-{way}")
    await received(caller.receiver, 1)
    if way == "cancel":
        call.cancel()
    with pytest.raises(asyncio.CancelledError if way == "cancel" else errors.DeadlineExceeded):
        await answer(call)
    await asyncio.sleep(0.05)
    release.set()
    await assert_happened_once(caller, preview, f"leaves-by-{way}")


async def test_cancelled_while_its_refusal_is_written_down_it_has_an_event(relay: Relay, caller: Caller) -> None:
    await relay.sql("UPDATE connections SET enabled = false, disabled_reason = 'x' WHERE id = $1", caller.connection.id)
    request = actions_pb2.PreviewRequest(
        action="webhook.send", connection_id=caller.connection.id, parameters={"payload": {}}
    )
    holder = await asyncpg.connect(relay.url)
    try:
        async with holder.transaction():
            await holder.execute("LOCK TABLE audit_logs IN SHARE ROW EXCLUSIVE MODE")
            call = caller.stub.Preview(request, metadata=(*caller.metadata, ("x-request-id", "refused")))
            await blocked(relay)
            call.cancel()
            await asyncio.sleep(0.05)
    finally:
        await holder.close()
    assert [status for status, _ in await events(relay, "refused")] == ["failed"]


async def test_at_whatever_moment_the_caller_leaves_it_happened_once_or_not_at_all(
    relay: Relay, caller: Caller
) -> None:
    warm, timed, *previews = [await caller.preview() for _ in range(SWEEP)]
    await answer(caller.call(warm))
    after = moments(await seconds(lambda: answer(caller.call(timed))))
    request_ids = [f"sweep-{uuid4()}" for _ in previews]
    caller.receiver.requests.clear()

    async def leave(preview: actions_pb2.Preview, request_id: str) -> None:
        call = caller.call(preview, request_id=request_id)
        await asyncio.sleep(next(after))
        call.cancel()

    for start in range(0, SWEEP, 4):
        await asyncio.gather(
            *(
                leave(preview, request_id)
                for preview, request_id in zip(previews[start : start + 4], request_ids[start : start + 4], strict=True)
            )
        )
    await relay.sql("SELECT pg_sleep(0.2)")  # calls that were still on their way have arrived or never will
    rows = await caller.executions(*previews)
    for row in rows:
        assert (await caller.ended(str(row["id"]))).state == actions_pb2.EXECUTION_STATE_SUCCESS
        assert await caller.attempts(str(row["id"])) == ["success"]
    assert sorted(caller.receiver.ids()) == sorted(str(row["id"]) for row in rows)
    assert 0 < len(rows) < len(previews), "all of them ended alike"
    by_preview = {str(row["preview_id"]): row["id"] for row in rows}
    for preview in previews:
        assert await used_by(relay, preview) == by_preview.get(preview.id)
    executed = {str(row["id"]) for row in rows}
    logged = await relay.sql(
        "SELECT request_id, status, target FROM audit_events WHERE request_id = ANY($1)", request_ids
    )
    assert len({row["request_id"] for row in logged}) == len(logged), "a call has two events"
    assert {row["target"].removeprefix("executions/") for row in logged if row["status"] == "success"} == executed


async def test_at_whatever_moment_a_change_is_cancelled_it_has_one_event_that_is_true(
    relay: Relay, caller: Caller
) -> None:
    request = actions_pb2.PreviewRequest(
        action="webhook.send", connection_id=caller.connection.id, parameters={"payload": {}}
    )
    await caller.preview()
    after = moments(await seconds(lambda: answer(caller.stub.Preview(request, metadata=caller.metadata))))
    before = await relay.sql("SELECT id FROM previews")
    request_ids = [f"change-{uuid4()}" for _ in range(SWEEP)]
    for request_id in request_ids:
        call = caller.stub.Preview(request, metadata=(*caller.metadata, ("x-request-id", request_id)))
        await asyncio.sleep(next(after))
        call.cancel()
    await relay.sql("SELECT pg_sleep(0.2)")
    logged = await relay.sql(
        "SELECT request_id, status, target FROM audit_events WHERE request_id = ANY($1)", request_ids
    )
    assert len({row["request_id"] for row in logged}) == len(logged), "a call has two events"
    made = {f"previews/{row['id']}" for row in await relay.sql("SELECT id FROM previews")}
    made -= {f"previews/{row['id']}" for row in before}
    assert {row["target"] for row in logged if row["status"] == "success"} == made
    assert 0 < len(made) < SWEEP, "all of them ended alike"
