"""The main job over the wire: preview, execute, a signed delivery, and the record of it."""

from relay.v1 import actions_pb2, audit_pb2

from tests.harness import Receiver, Relay


async def test_an_action_is_previewed_executed_delivered_signed_and_recorded(relay: Relay, receiver: Receiver) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        connection = await client.connections.create_webhook("main job", receiver.url)
        preview = await client.actions.preview(
            "webhook.send", {"payload": {"amount": 5, "to": "a@b.example"}}, connection_id=connection.id
        )
        assert preview.delivery_plan.url == receiver.url
        assert preview.delivery_plan.addresses == ["127.0.0.1"]
        assert not receiver.requests

        execution = await client.actions.execute(preview, idempotency_key="order-4711")
        assert execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
        assert receiver.ids() == [execution.id]
        assert receiver.requests[0][1] == b'{"amount":5,"to":"a@b.example"}'
        receiver.verify(connection.signing_secret)

        as_it_is = await client.actions.get_execution(execution.id)
        assert [event.action for event in as_it_is.events] == [
            "ActionsService.Preview",
            "ActionsService.Execute",
            "delivery.attempt",
        ]
        as_it_is.ClearField("events")  # it alone tells them
        assert as_it_is == execution
        assert [attempt.status_code async for attempt in client.actions.list_attempts(execution.id)] == [200]
        events = [
            (event.action, event.outcome)
            async for event in client.audit.list_events()
            if execution.id in event.target or preview.id in event.target
        ]
    success = audit_pb2.EVENT_OUTCOME_SUCCESS
    assert events == [
        ("delivery.attempt", success),
        ("ActionsService.Execute", success),
        ("ActionsService.Preview", success),
    ]
