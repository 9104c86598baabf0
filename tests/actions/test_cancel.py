"""CancelExecution: no further attempt, whatever the one that is under way comes to."""

import asyncio

import pytest
from relay import errors
from relay.v1 import actions_pb2

from relay_grpc.app import serving
from tests.actions.caller import Caller, answering, held, received
from tests.harness import Relay

PENDING = actions_pb2.EXECUTION_STATE_PENDING
EXECUTING = actions_pb2.EXECUTION_STATE_EXECUTING
SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
CANCELLED = actions_pb2.EXECUTION_STATE_CANCELLED


async def test_what_waits_is_cancelled_at_once(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    waiting = await caller.execute(await caller.preview())
    assert waiting.state == PENDING
    cancelled = await caller.do("Cancel", waiting.id)
    assert (cancelled.state, cancelled.cancel_requested) == (CANCELLED, False)
    assert cancelled.HasField("end_time")
    assert not cancelled.HasField("next_attempt_time")
    assert cancelled == await caller.get(waiting.id)
    [event] = await relay.sql(
        "SELECT status, provider, action_type FROM audit_events WHERE action = $1 AND target = $2",
        "ActionsService.CancelExecution",
        f"executions/{waiting.id}",
    )
    assert tuple(event) == ("success", "independent", "webhook.send")


@pytest.mark.parametrize(("status", "state", "outcome"), [(503, CANCELLED, "refused"), (200, SUCCESS, "success")])
async def test_the_attempt_under_way_goes_on_and_is_the_last(
    relay: Relay, caller: Caller, status: int, state: int, outcome: str
) -> None:
    release = held(caller.receiver, status)
    execution = await caller.execute(await caller.preview(), wait=0)
    await received(caller.receiver, 1)
    for _ in range(2):  # asked again, it answers the same
        asked = await caller.do("Cancel", execution.id)
        assert (asked.state, asked.cancel_requested) == (EXECUTING, True)
    release.set()
    ended = await caller.ended(execution.id)
    assert (ended.state, ended.cancel_requested) == (state, True)
    assert ended.HasField("end_time")
    assert await caller.attempts(execution.id) == [outcome]
    assert len(caller.receiver.requests) == 1


async def test_an_attempt_whose_worker_is_lost_is_not_made_again_either(relay: Relay, caller: Caller) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview(), wait=0)
    await received(caller.receiver, 1)
    await caller.do("Cancel", execution.id)
    await relay.sql("UPDATE action_executions SET lease_until = now() WHERE id = $1", execution.id)
    assert (await caller.ended(execution.id)).state == CANCELLED
    assert await caller.attempts(execution.id) == ["interrupted"]
    release.set()


async def test_what_has_ended_or_is_unknown_cannot_be_cancelled(relay: Relay, caller: Caller) -> None:
    execution = await caller.execute(await caller.preview())
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.do("Cancel", execution.id)
    assert (refusal.value.reason, refusal.value.metadata["state"]) == ("EXECUTION_STATE", "SUCCESS")
    assert (await caller.get(execution.id)).state == SUCCESS


async def test_at_whatever_moment_it_is_cancelled_the_answer_is_true(relay: Relay, caller: Caller) -> None:
    """Between claims of two servers: cancelled means that nothing was sent after the answer."""
    async with serving(relay.settings, relay.url):
        for n in range(20):
            answering(caller.receiver, 503)
            execution = await caller.execute(await caller.preview())
            before = len(caller.receiver.requests)
            caller.receiver.answer = None
            await relay.sql("UPDATE action_executions SET next_attempt_at = now() WHERE id = $1", execution.id)
            await asyncio.sleep(0.005 * n)
            try:
                asked = await caller.do("Cancel", execution.id)
            except errors.FailedPrecondition:
                asked = None
            ended = await caller.ended(execution.id)
            made = len(caller.receiver.requests) - before
            assert made == (0 if ended.state == CANCELLED else 1)
            if asked is not None and asked.state == CANCELLED:
                assert ended == asked
            await relay.sql("UPDATE connections SET failures = 0, failing_since = NULL, open_until = NULL, probes = 0")
