"""Every change has its event: they are stored together or not at all, and a flood of refusals is a few rows."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from aiohttp import web
from relay.errors import DeadlineExceeded
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from relay_grpc.audit import recorder as recording
from relay_grpc.audit.event import SYSTEM_WORKSPACE, ActorType, Event, Outcome
from relay_grpc.audit.recorder import Recorder
from relay_grpc.db import DatabaseUnusable
from relay_grpc.ratelimit.overrides import set_limits
from relay_grpc.telemetry import Metrics
from tests.audit.breakages import BREAKAGES, no_event_can_be_written
from tests.harness import Databases, Receiver, Relay, Tenant, running, settings_for
from tests.rpc.wire import wired

EXECUTE = "ActionsService.Execute"


@pytest.fixture(scope="module")
async def own(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    """A server whose audit log can be broken without harm to the other tests."""
    async with databases.new() as url, running(url, settings_for(tmp_path_factory.mktemp("data"))) as relay:
        yield relay


@pytest.mark.long
@pytest.mark.parametrize("what", BREAKAGES)
async def test_whatever_keeps_an_event_from_the_log_keeps_its_change_from_happening(
    own: Relay, receiver: Receiver, what: str, long: bool
) -> None:
    breakage, code = BREAKAGES[what]
    times = 100 if long else 20
    async with own.connect(own.tenant.admin) as client, wired(own) as wire:
        connection = await client.connections.create_webhook(f"without {what}", receiver.url)
        preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        execute = actions_pb2.ExecuteRequest(preview_id=preview.id)
        another = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection.id)
        another.parameters.update({"payload": {}})
        before = await stored(own)
        async with breakage(own):
            codes = [(await wire.call(EXECUTE, execute)).code for _ in range(times)]
            codes += [(await wire.call("ActionsService.Preview", another)).code for _ in range(times)]
            with pytest.raises(DatabaseUnusable):
                await set_limits(own.url, "default", {"calls": 5})
        assert set(codes) == {code}
        assert receiver.requests == []
        assert await stored(own) == before
        assert (await wire.call(EXECUTE, execute)).code == "OK"
        assert len(receiver.requests) == 1


async def stored(relay: Relay) -> list[Any]:
    """Every row that a call can leave, as text."""
    tables = (
        "workspaces",
        "api_keys",
        "connections",
        "connection_secrets",
        "previews",
        "action_executions",
        "execution_attempts",
    )
    return [
        [tuple(row) for row in await relay.sql(f"SELECT to_jsonb(t) - 'last_used_at' FROM {table} t ORDER BY 1")]
        for table in (*tables, "audit_logs")
    ]


@pytest.mark.long
async def test_a_change_whose_event_cant_be_written_is_refused_each_time(
    own: Relay, receiver: Receiver, long: bool
) -> None:
    async with own.connect(own.tenant.admin) as client, wired(own) as wire:
        connection = await client.connections.create_webhook("target", receiver.url, default=True)
        preview = await client.actions.preview("webhook.send", {"payload": {}})
        key = await client.auth.create_api_key("to be revoked", "viewer")
        preview_request = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection.id)
        preview_request.parameters.update({"payload": {}})
        webhook = connections_pb2.WebhookConfiguration(url=receiver.url)
        changes: list[tuple[str, Any]] = [
            ("AuthService.CreateApiKey", auth_pb2.CreateApiKeyRequest(name="x", role="viewer")),
            ("AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=key.id)),
            (
                "ConnectionsService.CreateConnection",
                connections_pb2.CreateConnectionRequest(name="x", webhook=webhook, default=True),
            ),
            ("ActionsService.Preview", preview_request),
            (EXECUTE, actions_pb2.ExecuteRequest(preview_id=preview.id)),
            ("AuditService.ListEvents", audit_pb2.ListEventsRequest()),  # no change, and audited all the same
        ]
        times = 100 if long else 20
        before = await stored(own)
        async with no_event_can_be_written(own):
            for name, request in changes:
                codes = [(await wire.call(name, request)).code for _ in range(times if name == EXECUTE else 4)]
                assert set(codes) == {"INTERNAL"}, name
        assert receiver.requests == []
        assert await stored(own) == before
        for name, request in changes:
            assert (await wire.call(name, request)).code == "OK", name
        assert len(receiver.requests) == 1


@asynccontextmanager
async def locked(relay: Relay, table: str) -> AsyncIterator[None]:
    """Nobody else can use the table."""
    connection = await asyncpg.connect(relay.url)
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


async def events_of(relay: Relay, tenant: Tenant, action: str) -> list[tuple[str, str]]:
    """Outcome and reason of the tenant's events, once there are some."""
    query = "SELECT status, reason FROM audit_events WHERE workspace_id = $1 AND action = $2"
    async with asyncio.timeout(10):
        while True:
            rows = await relay.sql(query, tenant.workspace_id, action)
            if rows:
                return [tuple(row) for row in rows]
            await asyncio.sleep(0.02)


async def test_a_caller_that_went_away_before_its_change_leaves_one_event_and_no_change(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        async with locked(relay, "connections"):
            with pytest.raises(DeadlineExceeded):
                await client.connections.create_webhook("gone", "http://127.0.0.1:9/", timeout=0.6)
        assert await events_of(relay, tenant, "ConnectionsService.CreateConnection") == [("failed", "CANCELLED")]
        assert [one async for one in client.connections.list()] == []


async def test_a_caller_that_went_away_during_execute_leaves_one_event_and_the_execution(
    relay: Relay, receiver: Receiver
) -> None:
    """Cancelled while its order is under way: what is committed happens, and is told as what it is."""
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await client.connections.create_webhook("target", receiver.url, default=True)
        preview = await client.actions.preview("webhook.send", {"payload": {}})
        async with locked(relay, "action_executions"):
            with pytest.raises(DeadlineExceeded):
                await client.actions.execute(preview, timeout=0.6)
        assert await events_of(relay, tenant, EXECUTE) == [("success", "")]
        execution = await client.actions.execute(preview)
        assert execution.replayed
    assert receiver.ids() == [execution.id]


async def test_a_caller_that_cancels_while_it_waits_for_the_outcome_leaves_one_event(
    relay: Relay, receiver: Receiver
) -> None:
    arrived, answer = asyncio.Event(), asyncio.Event()

    async def slow(_request: web.Request) -> web.Response:
        arrived.set()
        await answer.wait()
        return web.Response()

    receiver.answer = slow
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await client.connections.create_webhook("slow", receiver.url, default=True)
        preview = await client.actions.preview("webhook.send", {"payload": {}})
        call = asyncio.create_task(client.actions.execute(preview))
        await arrived.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        answer.set()
        assert await events_of(relay, tenant, "delivery.attempt") == [("success", "")]
        assert await events_of(relay, tenant, EXECUTE) == [("success", "")]


async def test_500_bad_keys_are_one_event_that_counts_them(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000 * 60.0
    monkeypatch.setattr(recording, "time", SimpleNamespace(time=lambda: now))

    async def counted() -> list[tuple[Any, ...]]:
        query = (
            "SELECT workspace_id, actor_type, actor_id, peer, count FROM audit_events WHERE action = $1 AND reason = $2"
        )
        rows = await relay.sql(query, "AuthService.WhoAmI", "CREDENTIALS_INVALID")
        return [tuple(row) for row in rows]

    async with wired(relay) as wire:
        for _ in range(5):  # 100 at once are all that a connection may carry
            answers = await asyncio.gather(*(wire.call("AuthService.WhoAmI", key=f"guess {i}") for i in range(100)))
            assert {answer.code for answer in answers} == {"UNAUTHENTICATED"}
        await relay.app.recorder.flush()
        assert await counted() == []  # the minute is not over
        now += 60
        await relay.app.recorder.flush()
        assert await counted() == [(SYSTEM_WORKSPACE, "unknown", "", "127.0.0.1", 500)]
        assert (await wire.call("AuthService.WhoAmI")).code == "OK"
    await relay.app.recorder.flush(everything=True)
    assert len(await counted()) == 1


async def test_more_callers_than_are_counted_by_name_are_counted_without(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_COUNTED", 2)
    recorder = Recorder(relay.app.db, b"key", Metrics())
    action = uuid4().hex
    for i in range(5):
        recorder.count(
            Event(
                workspace_id=relay.tenant.workspace_id,
                action=action,
                status=Outcome.DENIED,
                reason="RATE_LIMITED",
                actor_type=ActorType.API_KEY,
                actor_id=f"key {i}",
                actor_name=f"name {i}",
                peer="192.0.2.1",
            )
        )
    await recorder.close()
    rows = await relay.sql(
        "SELECT workspace_id, actor_type, actor_id, actor_name, peer, count FROM audit_events WHERE action = $1",
        action,
    )
    own = relay.tenant.workspace_id
    assert {tuple(row) for row in rows} == {
        (own, "api_key", "key 0", "name 0", "192.0.2.1", 1),
        (own, "api_key", "key 1", "name 1", "192.0.2.1", 1),
        (SYSTEM_WORKSPACE, "unknown", "", "", "", 3),
    }


async def test_a_rotation_names_both_keys_and_the_operators_limits_are_told(relay: Relay) -> None:
    async with wired(relay) as wire:
        old = (await wire.call("AuthService.CreateApiKey", auth_pb2.CreateApiKeyRequest(name="o", role="viewer"))).reply
        new = (await wire.call("AuthService.RotateApiKey", auth_pb2.RotateApiKeyRequest(id=old.id))).reply
    rows = await relay.sql("SELECT target, note, params_prefix FROM audit_events WHERE action LIKE '%RotateApiKey'")
    assert [tuple(row) for row in rows] == [(f"apiKeys/{old.id}", f"apiKeys/{new.id}", f'{{"id":"{old.id}"}}')]
    tenant = await relay.new_tenant()
    (name,) = (await relay.sql("SELECT name FROM workspaces WHERE id = $1", tenant.workspace_id))[0]
    await set_limits(relay.url, name, {"calls": 600_000, "executions": None})
    rows = await relay.sql("SELECT params_prefix FROM audit_events WHERE action = 'operator.SetLimits'")
    assert [row["params_prefix"] for row in rows] == ['{"calls":600000,"executions":null}']


async def test_an_execute_that_is_refused_or_replayed_names_its_idempotency_key(
    relay: Relay, receiver: Receiver
) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client, wired(relay, tenant.admin) as wire:
        await client.connections.create_webhook("target", receiver.url, default=True)
        previews = [await client.actions.preview("webhook.send", {"payload": {"n": n}}) for n in range(2)]
        for preview in (previews[0], previews[0], previews[1]):
            await wire.call(EXECUTE, actions_pb2.ExecuteRequest(preview_id=preview.id, idempotency_key="one"))
    rows = await relay.sql(
        """
        SELECT status, reason, count(*), count(DISTINCT idempotency_key_hash) AS keys, min(length(idempotency_key_hash))
          FROM audit_events WHERE workspace_id = $1 AND action = $2 GROUP BY 1, 2 ORDER BY 1
        """,
        tenant.workspace_id,
        EXECUTE,
    )
    assert [tuple(row) for row in rows] == [("success", "", 2, 1, 64), ("failed", "IDEMPOTENCY_KEY_REUSED", 1, 1, 64)]
