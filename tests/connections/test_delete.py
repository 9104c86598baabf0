"""DeleteConnection: never under an execution that has not ended, however close the two come."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from relay.errors import FailedPrecondition, InvalidRequest, NotFound
from relay.v1.actions_pb2 import EXECUTION_STATE_PENDING, EXECUTION_STATE_SUCCESS
from relay.v1.connections_pb2 import Connection

from tests.actions.caller import held
from tests.connections.calls import ELSEWHERE, deliver, new
from tests.harness import Receiver, Relay


async def test_it_is_gone_and_its_executions_stay(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("gone", receiver.url, headers={"x-a": "1"}, default=True)
    execution = await deliver(admin, made.id)
    preview = await admin.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id)
    await admin.connections.delete(made.id)
    for look in (
        admin.connections.get(made.id),
        admin.connections.update(Connection(id=made.id, name="back"), ["name"]),
        admin.connections.rotate_secret(made.id),
        admin.connections.delete(made.id),
        admin.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id),
    ):
        with pytest.raises(NotFound):
            await look
    assert made.id not in [each.id async for each in admin.connections.list()]
    with pytest.raises(FailedPrecondition) as refusal:
        await admin.actions.execute(preview)
    assert refusal.value.reason == "CONNECTION_DISABLED"
    with pytest.raises(FailedPrecondition) as refusal:
        await admin.actions.resend_execution(execution.id)
    assert refusal.value.reason == "CONNECTION_DISABLED"
    with pytest.raises(InvalidRequest, match="no default connection"):
        await admin.actions.preview("webhook.send", {"payload": {}})
    assert (await admin.actions.get_execution(execution.id)).connection_id == made.id
    assert await relay.sql("SELECT * FROM connection_secrets WHERE connection_id = $1", made.id) == []
    again = await admin.connections.create_webhook("gone", receiver.url, default=True)
    assert again.id != made.id
    events = await relay.sql(
        "SELECT * FROM audit_events WHERE action = 'ConnectionsService.DeleteConnection' ORDER BY id"
    )
    assert [(row["target"], row["status"]) for row in events] == [
        (f"connections/{made.id}", "success"),
        (f"connections/{made.id}", "failed"),
    ]


async def test_not_under_what_is_pending_executing_or_unknown(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await new(admin, ELSEWHERE)
    execution = await deliver(admin, made.id)
    assert execution.state == EXECUTION_STATE_PENDING

    async def refused() -> None:
        with pytest.raises(FailedPrecondition) as refusal:
            await admin.connections.delete(made.id)
        assert refusal.value.reason == "CONNECTION_IN_USE"
        assert (await admin.connections.get(made.id)).enabled

    await refused()
    await relay.sql(
        """
        UPDATE action_executions SET status = 'executing', next_attempt_at = NULL, lease_token = gen_random_uuid(),
                                     lease_until = now() + interval '1 hour' WHERE id = $1
        """,
        execution.id,
    )
    await refused()
    await relay.sql(
        """
        UPDATE action_executions SET status = 'unknown', lease_token = NULL, lease_until = NULL WHERE id = $1
        """,
        execution.id,
    )
    await refused()
    await relay.sql("UPDATE action_executions SET status = 'failed', completed_at = now() WHERE id = $1", execution.id)
    await admin.connections.delete(made.id)


async def test_while_an_attempt_is_under_way(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    release = held(receiver)
    preview = await admin.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id)
    execution = await admin.actions.execute(preview, wait=timedelta())
    with pytest.raises(FailedPrecondition):
        await admin.connections.delete(made.id)
    release.set()
    async for each in admin.actions.watch_execution(execution.id):
        execution = each
    assert execution.state == EXECUTION_STATE_SUCCESS
    await admin.connections.delete(made.id)


@pytest.mark.long
async def test_of_an_execute_and_a_delete_one_is_done(
    relay: Relay, admin: Any, receiver: Receiver, long: bool, figure: Callable[[str], None]
) -> None:
    """Either the execution is there and the connection stays, or the connection goes and there is no execution."""
    executed = deleted = 0
    for race in range(500 if long else 50):
        made = await new(admin, receiver.url)
        previews = [
            await admin.actions.preview("webhook.send", {"payload": {"n": n}}, connection_id=made.id) for n in range(2)
        ]
        release = held(receiver)

        async def delete(id_: str = made.id) -> bool:
            with contextlib.suppress(FailedPrecondition):
                await admin.connections.delete(id_)
                return True
            return False

        async def execute(preview: Any) -> bool:
            with contextlib.suppress(FailedPrecondition):
                await admin.actions.execute(preview, idempotency_key=str(uuid4()), wait=timedelta())
                return True
            return False

        racers = [execute(previews[0]), delete(), execute(previews[1])]
        outcomes = await asyncio.gather(*(racers if race % 2 else reversed(racers)))
        done = outcomes[1]
        placed = outcomes[0] + outcomes[2]
        rows = await relay.sql("SELECT status FROM action_executions WHERE connection_id = $1", made.id)
        (row,) = await relay.sql("SELECT deleted_at IS NOT NULL AS gone FROM connections WHERE id = $1", made.id)
        assert (row["gone"], len(rows)) == (done, placed)
        assert done != bool(placed)
        executed, deleted = executed + bool(placed), deleted + done
        release.set()
        receiver.answer = None
    assert executed
    assert deleted
    figure(f"{executed} races won by Execute, {deleted} by DeleteConnection; 0 executions without a connection")


async def test_a_resend_and_a_delete(relay: Relay, admin: Any, receiver: Receiver) -> None:
    for race in range(20):
        made = await new(admin, receiver.url)
        execution = await deliver(admin, made.id)
        release = held(receiver)
        resend, delete = admin.actions.resend_execution(execution.id), admin.connections.delete(made.id)
        outcomes = await asyncio.gather(*((resend, delete) if race % 2 else (delete, resend)), return_exceptions=True)
        refused = [one for one in outcomes if isinstance(one, BaseException)]
        assert [type(one) for one in refused] == [FailedPrecondition]
        (row,) = await relay.sql(
            """
            SELECT status IN ('pending', 'executing') AS goes_on, deleted_at IS NOT NULL AS gone
              FROM action_executions e JOIN connections c ON c.id = e.connection_id WHERE e.id = $1
            """,
            execution.id,
        )
        assert row["goes_on"] != row["gone"]
        release.set()
        receiver.answer = None
