"""What is delivered at most once: unknown after a doubtful attempt, and settled by ReconcileExecution alone."""

import asyncio

import pytest
from aiohttp import web
from relay import errors
from relay.v1 import actions_pb2

from tests.actions.caller import Caller, answering, eventually, held, received
from tests.harness import Relay

PENDING = actions_pb2.EXECUTION_STATE_PENDING
SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
FAILED = actions_pb2.EXECUTION_STATE_FAILED
UNKNOWN = actions_pb2.EXECUTION_STATE_UNKNOWN
ONCE = "webhook.send_once"


async def doubtful(caller: Caller) -> actions_pb2.Execution:
    answering(caller.receiver, 500)
    execution = await caller.execute(await caller.preview_of(ONCE))
    assert execution.state == UNKNOWN
    return execution


async def test_an_answer_that_is_no_success_leaves_it_unknown_and_alone(relay: Relay, caller: Caller) -> None:
    execution = await doubtful(caller)
    assert not execution.HasField("end_time")
    assert not execution.HasField("next_attempt_time")
    caller.receiver.answer = None
    await asyncio.sleep(0.3)  # several sweeps
    assert await caller.attempts(execution.id) == ["refused"]
    assert len(caller.receiver.requests) == 1


async def test_a_worker_that_is_lost_leaves_it_unknown(relay: Relay, caller: Caller) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview_of(ONCE), wait=0)
    await received(caller.receiver, 1)
    await relay.sql("UPDATE action_executions SET lease_until = now() WHERE id = $1", execution.id)
    assert (await caller.ended(execution.id)).state == UNKNOWN
    release.set()
    await asyncio.sleep(0.1)
    assert (await caller.get(execution.id)).state == UNKNOWN, "a late success is no success"
    assert len(caller.receiver.requests) == 1


async def test_where_nothing_was_sent_it_is_tried_again(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview_of(ONCE)
    break_secret = "UPDATE connection_secrets SET encryption_key_id = $2 WHERE connection_id = $1"
    [secret] = await relay.sql(
        "SELECT encryption_key_id AS id FROM connection_secrets WHERE connection_id = $1", preview.connection_id
    )
    await relay.sql(break_secret, preview.connection_id, "lost")
    execution = await caller.execute(preview)
    assert (execution.state, execution.last_attempt.outcome) == (PENDING, actions_pb2.ATTEMPT_OUTCOME_UNSENDABLE)
    await relay.sql(break_secret, preview.connection_id, secret["id"])
    await relay.sql("UPDATE action_executions SET next_attempt_at = now() WHERE id = $1", execution.id)

    async def ended() -> bool:
        return (await caller.get(execution.id)).state == SUCCESS

    await eventually(ended)
    assert caller.receiver.ids() == [execution.id]


@pytest.mark.parametrize("state", [SUCCESS, FAILED])
async def test_it_is_settled_by_hand_with_the_reason_kept(relay: Relay, caller: Caller, state: int) -> None:
    execution = await doubtful(caller)
    settled = await caller.do("Reconcile", execution.id, state=state, reason="seen in the receiver's log")
    assert settled.state == state
    assert settled.HasField("end_time")
    [event] = await relay.sql(
        "SELECT status, reason, note FROM audit_events WHERE action = $1 AND target = $2",
        "ActionsService.ReconcileExecution",
        f"executions/{execution.id}",
    )
    word = "SUCCESS" if state == SUCCESS else "FAILED"
    assert tuple(event) == ("success", word, "seen in the receiver's log")
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.do("Reconcile", execution.id, state=state, reason="again")
    assert (refusal.value.reason, refusal.value.metadata["state"]) == ("EXECUTION_STATE", word)
    if state == FAILED:
        caller.receiver.answer = None
        await caller.do("Resend", execution.id)
        await received(caller.receiver, 2)


async def test_of_two_at_once_one_settles_it(relay: Relay, caller: Caller) -> None:
    execution = await doubtful(caller)
    answers = await asyncio.gather(
        *(caller.do("Reconcile", execution.id, state=state, reason="x") for state in (SUCCESS, FAILED)),
        return_exceptions=True,
    )
    [settled] = [one for one in answers if isinstance(one, actions_pb2.Execution)]
    assert await caller.get(execution.id) == settled


@pytest.mark.parametrize("rpc", ["Cancel", "Resend"])
async def test_nothing_else_leaves_it(relay: Relay, caller: Caller, rpc: str) -> None:
    execution = await doubtful(caller)
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.do(rpc, execution.id)
    assert (refusal.value.reason, refusal.value.metadata["state"]) == ("EXECUTION_STATE", "UNKNOWN")


async def test_what_is_known_is_not_settled(relay: Relay, caller: Caller) -> None:
    execution = await caller.execute(await caller.preview())
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.do("Reconcile", execution.id, state=FAILED, reason="x")
    assert refusal.value.reason == "EXECUTION_STATE"
    assert (await caller.get(execution.id)).state == SUCCESS


async def test_a_connection_that_breaks_midway_leaves_it_unknown(relay: Relay, caller: Caller) -> None:
    async def drop(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    caller.receiver.answer = drop
    execution = await caller.execute(await caller.preview_of(ONCE))
    assert (execution.state, execution.last_attempt.outcome) == (UNKNOWN, actions_pb2.ATTEMPT_OUTCOME_UNREACHABLE)
