"""However a call ends, an audited one leaves exactly one event, and a defect tells nothing but its request id."""

import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from relay.v1 import actions_pb2, audit_pb2, auth_pb2, connections_pb2

from relay_grpc.call import Method
from tests.actions.caller import answering
from tests.contract.requests import fitting
from tests.harness import Databases, Receiver, Relay, running, settings_for
from tests.rpc.wire import ENDLESS, METHODS, Answer, Wire, wired

EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(scope="module")
async def relay(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    """A server that knows an issuer, so that roles can be assigned to its users."""
    settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_OIDC_ISSUERS="http://127.0.0.1:9/issuer relay")
    async with databases.new() as url, running(url, settings) as server:
        yield server


@EVERY_METHOD
async def test_a_call_leaves_one_event_where_its_method_is_audited(wire: Wire, events_of: Any, method: Method) -> None:
    request_id = uuid4().hex
    answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR), x_request_id=request_id)
    ended = answer.code == "DEADLINE_EXCEEDED" and method.name in ENDLESS
    assert ended or answer.trailing["x-request-id"] == request_id
    expected = ("success", "") if ended or answer.code == "OK" else ("failed", answer.reason)
    events = [(row["status"], row["reason"], row["count"]) for row in await events_of(request_id)]
    assert events == ([(*expected, 1)] if method.audited else [])


@EVERY_METHOD
async def test_a_bad_request_leaves_one_event_where_the_method_is_audited(
    wire: Wire, events_of: Any, method: Method
) -> None:
    request_id = uuid4().hex
    await wire.call(method, b"\xff", x_request_id=request_id)
    events = [(row["action"], row["status"], row["reason"]) for row in await events_of(request_id)]
    assert events == ([(method.name, "failed", "INVALID_REQUEST")] if method.audited else [])


async def test_a_request_id_is_taken_from_the_caller_where_it_is_fit_to_be_logged(wire: Wire) -> None:
    async def echoed(given: str) -> Any:
        return (await wire.call("AuthService.WhoAmI", x_request_id=given)).trailing["x-request-id"]

    assert await echoed("Order-4711_a.b") == "Order-4711_a.b"
    for unfit in ("", "x" * 65, "a b", "<script>"):
        made = await echoed(unfit)
        assert re.fullmatch("[0-9a-f]{32}", made)


async def executed(wire: Wire, request: actions_pb2.PreviewRequest) -> Any:
    """The execution of what is previewed, after its first attempt."""
    preview = (await wire.call("ActionsService.Preview", request)).reply
    return (await wire.call("ActionsService.Execute", actions_pb2.ExecuteRequest(preview_id=preview.id))).reply


async def test_each_audited_method_that_is_built_leaves_one_event_of_its_success(
    relay: Relay, wire: Wire, events_of: Any, receiver: Receiver
) -> None:
    done = set()

    async def do(name: str, request: Any, reason: str = "") -> Any:
        request_id = uuid4().hex
        reply = (await wire.call(name, request, x_request_id=request_id)).reply
        (event,) = await events_of(request_id)
        assert (event["action"], event["status"], event["reason"]) == (name, "success", reason)
        assert event["workspace_id"] == relay.tenant.workspace_id
        done.add(name)
        return reply

    key = await do("AuthService.CreateApiKey", auth_pb2.CreateApiKeyRequest(name="audited", role="viewer"))
    await do("AuthService.RotateApiKey", auth_pb2.RotateApiKeyRequest(id=key.id))
    await do("AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=key.id))
    role = auth_pb2.CreateRoleRequest(name="audited", parent="viewer", scopes=["actions:read"])
    await do("AuthService.CreateRole", role)
    await do("AuthService.AssignRole", auth_pb2.AssignRoleRequest(user_id="audited", role="audited"))
    await do("AuthService.RemoveRole", auth_pb2.RemoveRoleRequest(user_id="audited"))
    await do("AuthService.DeleteRole", auth_pb2.DeleteRoleRequest(name="audited"))
    webhook = connections_pb2.WebhookConfiguration(url=receiver.url)
    connection = await do(
        "ConnectionsService.CreateConnection",
        connections_pb2.CreateConnectionRequest(name="audited", webhook=webhook),
    )
    preview_request = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection.id)
    preview_request.parameters.update({"payload": {}})
    preview = await do("ActionsService.Preview", preview_request)
    execution = await do("ActionsService.Execute", actions_pb2.ExecuteRequest(preview_id=preview.id))
    await do("ActionsService.ResendExecution", actions_pb2.ResendExecutionRequest(id=execution.id))
    answering(receiver, 500)
    waiting = await executed(wire, preview_request)
    await do("ActionsService.CancelExecution", actions_pb2.CancelExecutionRequest(id=waiting.id))
    preview_request.action = "webhook.send_once"
    unknown = await executed(wire, preview_request)
    settled = {"state": actions_pb2.EXECUTION_STATE_FAILED, "reason": "they say so"}
    settle = actions_pb2.ReconcileExecutionRequest(id=unknown.id, **settled)
    await do("ActionsService.ReconcileExecution", settle, "FAILED")
    recovery = await do(
        "ActionsService.RecoverExecutions", actions_pb2.RecoverExecutionsRequest(start_time=Timestamp())
    )
    await do("ActionsService.CancelRecovery", actions_pb2.CancelRecoveryRequest(id=recovery.id))
    change = {"connection": {"id": connection.id, "name": "audited too"}, "update_mask": FieldMask(paths=["name"])}
    await do("ConnectionsService.UpdateConnection", connections_pb2.UpdateConnectionRequest(**change))
    await do("ConnectionsService.RotateSecret", connections_pb2.RotateSecretRequest(id=connection.id))
    unused = connections_pb2.CreateConnectionRequest(name="unused", webhook=webhook)
    unused_id = (await wire.call("ConnectionsService.CreateConnection", unused)).reply.id
    await do("ConnectionsService.DeleteConnection", connections_pb2.DeleteConnectionRequest(id=unused_id))
    listed = await do("AuditService.ListEvents", fitting(METHODS["AuditService.ListEvents"].input_type.DESCRIPTOR))
    await do("AuditService.GetEvent", audit_pb2.GetEventRequest(id=listed.events[0].id))
    done |= await streamed(wire, events_of)
    assert done == {
        method.name
        for method in METHODS.values()
        if method.audited and (await wire.call(method, fitting(method.input_type.DESCRIPTOR))).code != "UNIMPLEMENTED"
    }


async def streamed(wire: Wire, events_of: Any) -> set[str]:
    """The methods that answer in streams, each of which leaves one event of its success too."""
    export, tail = uuid4().hex, uuid4().hex
    request = audit_pb2.ExportEventsRequest(format=audit_pb2.EXPORT_FORMAT_CSV)
    assert (await wire.call("AuditService.ExportEvents", request, x_request_id=export)).code == "OK"
    ended = await wire.call("AuditService.TailEvents", x_request_id=tail)
    assert ended.code == "DEADLINE_EXCEEDED"
    for request_id in (export, tail):
        (event,) = await events_of(request_id)
        assert (event["status"], event["reason"]) == ("success", "")
    return {"AuditService.ExportEvents", "AuditService.TailEvents"}


@pytest.fixture(scope="module")
async def broken(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    """A server whose database lost a table."""
    async with databases.new() as url, running(url, settings_for(tmp_path_factory.mktemp("data"))) as relay:
        await relay.sql("ALTER TABLE connections RENAME TO a_name_that_no_client_may_see")
        yield relay


async def test_a_defect_is_told_by_its_request_id_alone(broken: Relay, caplog: pytest.LogCaptureFixture) -> None:
    async with wired(broken) as wire:
        answer: Answer = await wire.call("ConnectionsService.ListConnections", x_request_id="find-me")
    assert (answer.code, answer.reason) == ("INTERNAL", "INTERNAL")
    assert answer.text == "internal error; the log knows it as request find-me"
    assert len(answer.status.details) == 1  # type: ignore[union-attr]
    assert any("find-me" in record.message and record.exc_info for record in caplog.records)


async def test_a_defect_of_an_audited_method_leaves_one_event(broken: Relay) -> None:
    async with wired(broken) as wire:
        webhook = connections_pb2.WebhookConfiguration(url="http://127.0.0.1:9/")
        request = connections_pb2.CreateConnectionRequest(name="lost", webhook=webhook)
        answer = await wire.call("ConnectionsService.CreateConnection", request, x_request_id="find-me-too")
    assert (answer.code, answer.reason) == ("INTERNAL", "INTERNAL")
    assert [
        (row["status"], row["reason"])
        for row in await broken.sql("SELECT * FROM audit_events WHERE request_id = 'find-me-too'")
    ] == [("failed", "INTERNAL")]
