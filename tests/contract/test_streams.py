"""A stream goes through every layer that a single answer goes through, and through each of them once."""

import asyncio
import logging
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.struct_pb2 import Struct
from relay.v1 import actions_pb2, connections_pb2

from relay_grpc.interceptors import tracing
from tests.actions.caller import answering, eventually
from tests.contract.conftest import LIMIT
from tests.harness import Receiver, Relay
from tests.rpc.wire import Wire

WATCH = "ActionsService.WatchExecution"


@pytest.fixture
async def pending(wire: Wire, receiver: Receiver) -> str:
    """The id of an execution that waits for its next attempt."""
    answering(receiver, 500)
    webhook = connections_pb2.WebhookConfiguration(url=receiver.url)
    new = connections_pb2.CreateConnectionRequest(name=f"receiver {uuid4()}", webhook=webhook)
    connection = (await wire.call("ConnectionsService.CreateConnection", new)).reply
    request = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection.id, parameters=Struct())
    request.parameters.update({"payload": {}})
    preview = (await wire.call("ActionsService.Preview", request)).reply
    execution = (await wire.call("ActionsService.Execute", actions_pb2.ExecuteRequest(preview_id=preview.id))).reply
    assert execution.state == actions_pb2.EXECUTION_STATE_PENDING
    return str(execution.id)


def ended(relay: Relay, code: str) -> float:
    """How many watches have ended so."""
    labels = {"service": "ActionsService", "method": "WatchExecution", "code": code}
    return relay.app.metrics.registry.get_sample_value("relay_rpc_total", labels) or 0


async def test_a_watch_is_charged_measured_and_named_once_however_much_it_tells(
    relay: Relay,
    wire: Wire,
    pending: str,
    spent: Any,
    events_of: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "SLOW", 0.0)
    caplog.set_level(logging.WARNING)
    (calls, executions), before = await spent(), ended(relay, "OK")
    request = actions_pb2.WatchExecutionRequest(id=pending)
    watching = asyncio.create_task(wire.call(WATCH, request, x_request_id="a-watch"))

    async def begun() -> bool:
        return bool(await spent() == (calls + 1, executions))

    await eventually(begun)
    cancelled = await wire.call("ActionsService.CancelExecution", actions_pb2.CancelExecutionRequest(id=pending))
    assert cancelled.code == "OK"
    answer = await watching
    assert [reply.state for reply in answer.replies][-1] == actions_pb2.EXECUTION_STATE_CANCELLED
    assert await spent() == (calls + 2, executions)
    assert answer.trailing["x-request-id"] == "a-watch"
    assert answer.trailing["ratelimit-limit"] == str(LIMIT)
    assert ended(relay, "OK") == before + 1
    assert await events_of("a-watch") == []
    assert "a-watch" not in caplog.text, "that it took long is nothing to warn of"


async def test_a_watch_that_its_caller_ends_is_an_end_too(relay: Relay, wire: Wire, pending: str) -> None:
    before = ended(relay, "CANCELLED")
    request = actions_pb2.WatchExecutionRequest(id=pending)
    answer = await wire.call(WATCH, request, timeout=0.3)
    assert answer.code == "DEADLINE_EXCEEDED"
    await eventually(lambda: ended(relay, "CANCELLED") == before + 1)


@pytest.mark.parametrize(
    ("request_", "key", "reason"),
    [
        (actions_pb2.WatchExecutionRequest(id=str(uuid4())), None, "RESOURCE_NOT_FOUND"),
        (actions_pb2.WatchExecutionRequest(id="x"), None, "INVALID_REQUEST"),
        (b"\xff", None, "INVALID_REQUEST"),
        (actions_pb2.WatchExecutionRequest(id=str(uuid4())), "rk_live_nobodys", "CREDENTIALS_INVALID"),
    ],
)
async def test_a_watch_is_refused_before_it_tells_anything(
    wire: Wire, request_: Any, key: str | None, reason: str
) -> None:
    answer = await wire.call(WATCH, request_, key)
    assert (answer.replies, answer.reason) == ([], reason)
