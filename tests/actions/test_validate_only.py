"""Execute with validate_only (aip.dev/163): all that Execute checks, and nothing that it does."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from relay import errors
from relay.v1 import actions_pb2

from tests.actions.caller import Caller, answer, answering
from tests.actions.test_execute import (
    change_connection,
    change_parameters,
    disable_connection,
    expire,
    raise_action_version,
)
from tests.harness import Relay

PENDING = actions_pb2.EXECUTION_STATE_PENDING


async def validate(caller: Caller, preview: actions_pb2.Preview, key: str = "", digest: str | None = None) -> Any:
    request = actions_pb2.ExecuteRequest(
        preview_id=preview.id,
        idempotency_key=key,
        digest=preview.digest if digest is None else digest,
        validate_only=True,
    )
    return await answer(caller.stub.Execute(request, metadata=caller.metadata))


async def snapshot(relay: Relay) -> list[list[Any]]:
    """Everything that an Execute writes but events."""
    tables = ("previews", "action_executions", "execution_attempts", "connections")
    return [await relay.sql(f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables]


async def events(relay: Relay, target: str) -> list[tuple[Any, ...]]:
    rows = await relay.sql(
        """
        SELECT status, reason, action_type, provider, idempotency_key_hash <> '' FROM audit_events
         WHERE action = 'ActionsService.Execute' AND target = $1 ORDER BY id
        """,
        target,
    )
    return [tuple(row) for row in rows]


async def test_it_tells_how_the_execution_would_begin(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    before = await snapshot(relay)
    for _ in range(2):
        planned = await validate(caller, preview, "a-key")
        assert planned == actions_pb2.Execution(
            action=preview.action,
            action_version=preview.action_version,
            provider=preview.provider,
            connection_id=preview.connection_id,
            preview_id=preview.id,
            idempotency_key="a-key",
            state=PENDING,
            delivery=actions_pb2.DELIVERY_AT_LEAST_ONCE,
        )
    assert await snapshot(relay) == before
    assert not caller.receiver.requests
    validated = ("success", "VALIDATE_ONLY", "webhook.send", "independent", True)
    assert await events(relay, f"previews/{preview.id}") == [validated] * 2
    assert not (await caller.execute(preview, "a-key")).replayed


async def test_for_a_key_that_is_taken_it_tells_what_took_it(relay: Relay, caller: Caller) -> None:
    answering(caller.receiver, 503)
    preview = await caller.preview(order=1)
    execution = await caller.execute(preview, "taken")
    replay = await validate(caller, preview, "taken")
    assert replay.replayed
    replay.replayed = False
    assert replay == execution
    assert (await events(relay, f"executions/{execution.id}"))[-1][:2] == ("success", "VALIDATE_ONLY")
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await validate(caller, await caller.preview(order=2), "taken")
    assert refusal.value.reason == "IDEMPOTENCY_KEY_REUSED"
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await validate(caller, preview, "another")
    assert refusal.value.reason == "PREVIEW_USED"


@pytest.mark.parametrize(
    "happens", [expire, raise_action_version, change_parameters, change_connection, disable_connection]
)
async def test_it_refuses_what_execute_refuses_in_the_same_words(
    relay: Relay, caller: Caller, happens: Callable[[Relay, actions_pb2.Preview], Awaitable[None]]
) -> None:
    preview = await caller.preview()
    await happens(relay, preview)
    refusals = []
    for refused in (validate(caller, preview, digest=""), caller.execute(preview, digest="")):
        with pytest.raises(errors.FailedPrecondition) as refusal:
            await refused
        metadata = {name: value for name, value in refusal.value.metadata.items() if name != "request_id"}
        refusals.append((str(refusal.value).partition(" (request ")[0], refusal.value.reason, metadata))
    assert refusals[0] == refusals[1]


async def test_it_refuses_other_digests_previews_and_callers(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    with pytest.raises(errors.FailedPrecondition) as refusal:
        await validate(caller, preview, digest="0" * 64)
    assert refusal.value.metadata["fields"] == "digest"
    with pytest.raises(errors.NotFound):
        await validate(caller, actions_pb2.Preview(id=caller.connection.id))
    caller.metadata = (("authorization", f"Bearer {relay.tenant.developer}"),)
    with pytest.raises(errors.NotFound):
        await validate(caller, preview)
    caller.metadata = (("authorization", f"Bearer {relay.tenant.viewer}"),)
    with pytest.raises(errors.PermissionDenied):
        await validate(caller, preview)


async def test_where_it_is_halted_nothing_is_previewed_validated_or_executed(relay: Relay, caller: Caller) -> None:
    preview = await caller.preview()
    await relay.sql("INSERT INTO halts VALUES ($1, '', 'an incident')", relay.tenant.workspace_id)
    try:
        for refused in (caller.preview(), validate(caller, preview), caller.execute(preview)):
            with pytest.raises(errors.FailedPrecondition, match="an incident") as refusal:
                await refused
            assert refusal.value.reason == "ACTION_DISABLED"
        listed = await answer(caller.stub.ListActions(actions_pb2.ListActionsRequest(), metadata=caller.metadata))
        assert {action.enabled for action in listed.actions} == {False}
        assert all("an incident" in action.disabled_reason for action in listed.actions)
        stranger = await relay.new_tenant()
        caller.metadata = (("authorization", f"Bearer {stranger.admin}"),)
        listed = await answer(caller.stub.ListActions(actions_pb2.ListActionsRequest(), metadata=caller.metadata))
        assert {action.enabled for action in listed.actions} == {True}
    finally:
        await relay.sql("DELETE FROM halts")
