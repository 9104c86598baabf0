"""ResendExecution: once more under the same webhook-id, with all attempts anew, and only where that can't hurt."""

import asyncio

import pytest
from relay import errors
from relay.v1 import actions_pb2

from relay_grpc.actions.execution import RETRY_SCHEDULE
from relay_grpc.app import serving
from tests.actions.caller import Caller, answering, calling, ended_as, eventually, held, received
from tests.harness import Receiver, Relay

ATTEMPTS = len(RETRY_SCHEDULE) + 1
PENDING = actions_pb2.EXECUTION_STATE_PENDING
SUCCESS = actions_pb2.EXECUTION_STATE_SUCCESS
FAILED = actions_pb2.EXECUTION_STATE_FAILED


async def gone(caller: Caller, action: str = "webhook.send") -> actions_pb2.Execution:
    """An execution that failed."""
    answering(caller.receiver, 410)
    failed = await caller.execute(await caller.preview_of(action))
    await eventually(
        lambda: caller.relay.sql("SELECT FROM connections WHERE id = $1 AND NOT enabled", failed.connection_id)
    )
    await caller.relay.sql(
        """
        UPDATE connections SET enabled = true, disabled_reason = '', failures = 0, failing_since = NULL WHERE id = $1
        """,
        failed.connection_id,
    )
    caller.receiver.answer = None
    return failed


async def test_what_has_ended_is_sent_again_under_the_same_id(relay: Relay, caller: Caller) -> None:
    first = await caller.execute(await caller.preview())
    resent = await caller.do("Resend", first.id)
    assert (resent.state, resent.resend_count) == (PENDING, 1)
    assert not resent.HasField("end_time")
    await received(caller.receiver, 2)
    ended = await ended_as(caller, first.id, SUCCESS)
    assert (ended.attempt_count, ended.last_attempt.number, ended.resend_count) == (2, 2, 1)
    assert caller.receiver.ids() == [first.id, first.id]
    assert caller.receiver.requests[0][1] == caller.receiver.requests[1][1]
    assert await caller.attempts(first.id) == ["success", "success"]


async def test_all_attempts_begin_anew(relay: Relay, caller: Caller) -> None:
    failed = await gone(caller)
    await relay.sql("UPDATE action_executions SET attempt_count = $2 WHERE id = $1", failed.id, ATTEMPTS)
    answering(caller.receiver, 503)
    await caller.do("Resend", failed.id)
    await received(caller.receiver, 2)
    waiting = await caller.ended(failed.id)
    assert (waiting.state, waiting.attempt_count) == (PENDING, ATTEMPTS + 1)
    delay = "SELECT extract(epoch FROM next_attempt_at - now()) AS s FROM action_executions WHERE id = $1"
    [row] = await relay.sql(delay, failed.id)
    assert row["s"] <= 6, "the first wait of the schedule"


async def test_what_is_cancelled_can_be_sent_again_and_cancelled_again(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    execution = await caller.execute(await caller.preview())
    await caller.do("Cancel", execution.id)
    release = held(caller.receiver)
    await caller.do("Resend", execution.id)
    await received(caller.receiver, 2)
    assert (await caller.do("Cancel", execution.id)).cancel_requested
    release.set()
    ended = await ended_as(caller, execution.id, SUCCESS)
    assert (await caller.do("Resend", execution.id)).cancel_requested is False
    assert ended.resend_count == 1


@pytest.mark.parametrize("state", ["pending", "executing", "unknown"])
async def test_what_goes_on_or_is_unknown_is_not_sent_again(relay: Relay, caller: Caller, state: str) -> None:
    release = held(caller.receiver)
    execution = await caller.execute(await caller.preview_of("webhook.send_once"), wait=0)
    await received(caller.receiver, 1)
    if state == "pending":
        await relay.sql(
            "UPDATE connections SET open_until = now() + interval '1 h' WHERE id = $1", execution.connection_id
        )
        execution = await caller.execute(await caller.preview(), wait=0)
    if state == "unknown":
        await relay.sql("UPDATE action_executions SET lease_until = now() WHERE id = $1", execution.id)
        await ended_as(caller, execution.id, actions_pb2.EXECUTION_STATE_UNKNOWN)
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.do("Resend", execution.id)
    assert (refusal.value.reason, refusal.value.metadata["state"]) == ("EXECUTION_STATE", state.upper())
    assert len(caller.receiver.requests) == 1
    release.set()


async def test_what_is_delivered_at_most_once_is_sent_again_only_where_it_was_not(relay: Relay, caller: Caller) -> None:
    done = await caller.execute(await caller.preview_of("webhook.send_once"))
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await caller.do("Resend", done.id)
    assert (refusal.value.reason, refusal.value.metadata["state"]) == ("EXECUTION_STATE", "SUCCESS")
    await relay.sql("UPDATE connections SET open_until = now() + interval '1 h' WHERE id = $1", done.connection_id)
    waiting = await caller.execute(await caller.preview_of("webhook.send_once"), wait=0)
    await caller.do("Cancel", waiting.id)
    await relay.sql("UPDATE connections SET open_until = NULL WHERE id = $1", done.connection_id)
    await caller.do("Resend", waiting.id)
    assert (await ended_as(caller, waiting.id, SUCCESS)).attempt_count == 1
    assert caller.receiver.ids() == [done.id, waiting.id]


async def test_nothing_is_sent_again_where_it_could_not_be_executed(
    relay: Relay, caller: Caller, receiver: Receiver
) -> None:
    done = await caller.execute(await caller.preview())
    await relay.sql(
        "UPDATE connections SET enabled = false, disabled_reason = 'by hand' WHERE id = $1", done.connection_id
    )
    with pytest.raises(errors.FailedPrecondition, match="by hand") as refusal:
        await caller.do("Resend", done.id)
    assert refusal.value.reason == "CONNECTION_DISABLED"
    await relay.sql("UPDATE connections SET enabled = true, disabled_reason = '' WHERE id = $1", done.connection_id)
    await relay.sql("INSERT INTO halts VALUES ($1, 'independent', 'a test')", relay.tenant.workspace_id)
    try:
        with pytest.raises(errors.FailedPrecondition, match="a test") as refusal:
            await caller.do("Resend", done.id)
        assert refusal.value.reason == "ACTION_DISABLED"
    finally:
        await relay.sql("DELETE FROM halts")
    settings = relay.settings.model_copy(update={"actions_enabled": False})
    async with serving(settings, relay.url) as app, calling(relay, receiver, listen=app.listen) as elsewhere:
        with pytest.raises(errors.FailedPrecondition, match="ACTIONS_ENABLED"):
            await elsewhere.do("Resend", done.id)
    assert len(receiver.requests) == 1


async def test_of_many_at_once_one_sends_it_again(relay: Relay, caller: Caller) -> None:
    first = await caller.execute(await caller.preview())
    release = held(caller.receiver)
    answers = await asyncio.gather(*(caller.do("Resend", first.id) for _ in range(10)), return_exceptions=True)
    assert len([one for one in answers if isinstance(one, actions_pb2.Execution)]) == 1
    assert {getattr(one, "reason", "EXECUTION_STATE") for one in answers} == {"EXECUTION_STATE"}
    release.set()
    assert (await ended_as(caller, first.id, SUCCESS)).resend_count == 1
    assert len(caller.receiver.requests) == 2
