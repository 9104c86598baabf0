"""What an event says, what it hides, and how it is found again."""

import hashlib
import random
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from relay import errors
from relay.v1 import actions_pb2, audit_pb2

from relay_grpc.audit.event import Outcome, keyed_hash
from tests.audit.log import event_at, log_events
from tests.harness import Receiver, Relay
from tests.rpc.wire import wired

EXECUTE = "ActionsService.Execute"


async def test_equal_parameters_and_keys_have_equal_hashes_in_one_workspace_alone(relay: Relay) -> None:
    async def executed(client: Any, key: str) -> tuple[str, str]:
        preview = await client.actions.preview("webhook.send", {"payload": {"amount": 5}})
        target = f"executions/{(await client.actions.execute(preview, idempotency_key=key)).id}"
        (event,) = [one async for one in client.audit.list_events(action=EXECUTE) if one.target == target]
        return event.parameters_hash, event.idempotency_key_hash

    hashes = []
    for tenant in (relay.tenant, await relay.new_tenant()):
        async with relay.connect(tenant.admin) as client:
            await client.connections.create_webhook("hashes", "http://127.0.0.1:9/", default=True)
            hashes.append([await executed(client, key) for key in ("order-1", "order-2")])
    (first, second), (foreign, _) = hashes
    assert first[0] == second[0] != foreign[0]
    assert len({first[1], second[1], foreign[1]}) == 3
    assert hashlib.sha256(b"order-1").hexdigest() != first[1]
    assert {len(one) for one in first} == {64}


def test_a_keyed_hash_depends_on_key_workspace_and_text() -> None:
    one, other = UUID(int=1), UUID(int=2)
    assert keyed_hash(b"k", one, b"text") == keyed_hash(b"k", one, b"text")
    assert len({keyed_hash(key, at, text) for key in (b"k", b"l") for at in (one, other) for text in (b"a", b"b")}) == 8


async def test_an_event_tells_who_did_what_to_what_and_how_it_ended(relay: Relay, receiver: Receiver) -> None:
    tenant = await relay.new_tenant()
    trace_id = uuid4().hex
    async with relay.connect(tenant.admin) as client, wired(relay, tenant.developer) as wire:
        await client.connections.create_webhook("target", receiver.url, default=True)
        request = actions_pb2.PreviewRequest(action="webhook.send")
        request.parameters.update({"payload": {"to": "ann@example.com", "amount": 5}, "method": "PUT"})
        preview = (await wire.call("ActionsService.Preview", request)).reply
        execution = (
            await wire.call(
                EXECUTE,
                actions_pb2.ExecuteRequest(preview_id=preview.id),
                x_request_id="request-4711",
                traceparent=f"00-{trace_id}-00f067aa0ba902b7-00",
            )
        ).reply
        me = (await wire.call("AuthService.WhoAmI")).reply
        (event,) = [event async for event in client.audit.list_events(request_id="request-4711")]
        (attempt,) = [event async for event in client.audit.list_events(action="delivery.attempt")]
    assert UUID(event.id).version == 7
    assert abs(event.event_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=1)
    assert event.actor == audit_pb2.Actor(type=audit_pb2.ACTOR_TYPE_API_KEY, id=me.id, name="bootstrap developer")
    assert (event.action, event.target) == (EXECUTE, f"executions/{execution.id}")
    assert (event.catalogue_action, event.provider) == ("webhook.send", "independent")
    assert (event.outcome, event.reason, event.scopes) == (audit_pb2.EVENT_OUTCOME_SUCCESS, "", ["actions:execute"])
    assert (event.trace_id, event.peer, event.count) == (trace_id, "127.0.0.1", 1)
    assert event.parameters_prefix == '{"method":*,"payload":{*:*,*:*}}'
    assert event.parameters_hash
    assert event.idempotency_key_hash
    assert event.duration.ToNanoseconds() > 0
    assert (attempt.target, attempt.trace_id) == (event.target, trace_id)
    assert attempt.actor == audit_pb2.Actor(type=audit_pb2.ACTOR_TYPE_SYSTEM)


async def test_each_filter_lets_through_what_it_names(relay: Relay, receiver: Receiver) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client, wired(relay, tenant.viewer) as wire:
        me = await client.auth.who_am_i()
        await wire.call("AuditService.ListEvents", x_request_id="refused")
        await client.connections.create_webhook("target", receiver.url)

        async def found(**filters: Any) -> set[str]:
            return {event.action async for event in client.audit.list_events(**filters)}

        created = {"ConnectionsService.CreateConnection"}
        assert await found(action="ConnectionsService.CreateConnection") == created
        assert await found(provider="independent") == created
        assert (
            await found(outcome=audit_pb2.EVENT_OUTCOME_DENIED)
            == await found(request_id="refused")
            == {"AuditService.ListEvents"}
        )
        assert "operator.CreateWorkspace" not in await found(actor_id=me.id) >= created
        (event,) = [one async for one in client.audit.list_events(provider="independent")]
        at = event.event_time.ToDatetime(UTC)
        assert await found(provider="independent", start_time=at, end_time=at + timedelta(microseconds=1)) == created
        assert await found(provider="independent", end_time=at) == set()
        assert await found(provider="independent", start_time=at + timedelta(microseconds=1)) == set()
        assert await found(action="no such action") == set()


async def test_any_filters_together_let_through_what_each_of_them_does(relay: Relay) -> None:
    """All subsets of them, with the values of one event, and with some that may go with no event."""
    tenant = await relay.new_tenant()
    now = datetime.now(UTC)
    events = [
        event_at(
            now - timedelta(hours=n),
            tenant.workspace_id,
            action=random.choice(("test.A", "test.B")),
            provider=random.choice(("", "one", "two")),
            status=random.choice(list(Outcome)),
            actor_id=random.choice(("", "ann", "bob")),
            request_id=random.choice(("", "first", "second")),
        )
        for n in range(1, 61)
    ]
    await log_events(relay.url, events)
    past = {"start_time": now - timedelta(hours=50, minutes=30), "end_time": now - timedelta(hours=9, minutes=30)}
    names = ("action", "provider", "status", "actor_id", "request_id")
    async with relay.connect(tenant.admin) as client:
        for asked in [subset for size in range(len(names) + 1) for subset in combinations(names, size)]:
            one = random.choice(events)
            of_one = {name: getattr(one, name) for name in asked}
            of_any = {name: getattr(random.choice(events), name) for name in asked}
            for values in (of_one, of_any):
                filters = {name: value for name, value in values.items() if value}  # an empty one is none
                expected = [
                    str(event.id)
                    for event in events[9:50]
                    if all(getattr(event, name) == value for name, value in filters.items())
                ]
                if status := filters.pop("status", None):
                    filters["outcome"] = f"EVENT_OUTCOME_{status.upper()}"
                listed = client.audit.list_events(**filters, **past, page_size=random.choice((1, 3, 0)))
                assert [event.id async for event in listed] == expected, values


async def test_an_event_that_is_gone_hides_none_of_those_before_it(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    now = datetime.now(UTC)
    events = [event_at(now - timedelta(hours=n), tenant.workspace_id, actor_id="ann") for n in range(3)]
    await log_events(relay.url, events)
    async with relay.connect(tenant.admin) as client:
        assert len([event async for event in client.audit.list_events(actor_id="ann")]) == 3
        connection = await asyncpg.connect(relay.url)
        await connection.execute("SET session_replication_role = replica")  # past the triggers
        await connection.execute("DELETE FROM audit_logs WHERE id = $1", events[1].id)
        await connection.close()
        with pytest.raises(errors.RelayError) as damage:
            _ = [event async for event in client.audit.list_events(actor_id="ann")]
    assert damage.value.reason == "LOG_DAMAGED"
