"""Tenants don't see each other through any method. The wall behind this one: test_row_level_security.py."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import uuid4

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from relay.v1 import actions_pb2, auth_pb2

from relay_grpc.call import Method
from tests.contract.requests import all_fields, fitting, put, rules_of
from tests.harness import Receiver, Relay, Tenant
from tests.rpc.wire import METHODS, Wire, wired


@dataclass
class Theirs:
    """What another tenant has, and a connection of its own."""

    tenant: Tenant
    wire: Wire
    key: auth_pb2.ApiKey
    preview: actions_pb2.Preview
    execution: actions_pb2.Execution

    def id_for(self, method: Method, field: FieldDescriptor) -> str:
        """The id of the kind that this field of a request names. A new kind of field needs a line here."""
        names = {
            "connection_id": self.preview.connection_id,
            "preview_id": self.preview.id,
            "execution_id": self.execution.id,
            "event_id": str(uuid4()),  # read by methods that are not built yet
        }
        ids = {
            "GetApiKey": self.key.id,
            "RotateApiKey": self.key.id,
            "RevokeApiKey": self.key.id,
            "GetConnection": self.preview.connection_id,
            "DeleteConnection": self.preview.connection_id,
            "RotateSecret": self.preview.connection_id,
            "GetPreview": self.preview.id,
            "GetExecution": self.execution.id,
            "WatchExecution": self.execution.id,
            "CancelExecution": self.execution.id,
            "ResendExecution": self.execution.id,
            "ReconcileExecution": self.execution.id,
            "GetRecovery": str(uuid4()),
            "CancelRecovery": str(uuid4()),
            "GetEvent": str(uuid4()),
        }
        return ids[method.rpc] if field.name == "id" else names[field.name]


@pytest.fixture(scope="module")
async def theirs(relay: Relay) -> AsyncIterator[Theirs]:
    """A's tenant, with a row in every table; nothing listens where its connection goes."""
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client, wired(relay, tenant.admin) as wire:
        (key,) = [key async for key in client.auth.list_api_keys() if key.role == "viewer"]
        connection = await client.connections.create_webhook("theirs", "http://127.0.0.1:9/", default=True)
        preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        used = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        execution = await client.actions.execute(used, idempotency_key="theirs")
        yield Theirs(tenant, wire, key, preview, execution)


NAMED = [
    pytest.param(method, fields[-1], id=f"{method.name}-{fields[-1].name}")
    for method in METHODS.values()
    for fields in all_fields(method.input_type.DESCRIPTOR)
    if rules_of(fields[-1]).string.uuid
]


@pytest.mark.parametrize(("method", "field"), NAMED)
async def test_an_id_of_another_tenant_is_like_one_that_does_not_exist(
    wire: Wire, theirs: Theirs, method: Method, field: FieldDescriptor
) -> None:
    def request_for(id_: str) -> Message:
        request = fitting(method.input_type.DESCRIPTOR)
        if method.rpc == "Preview":
            request = actions_pb2.PreviewRequest(action="webhook.send")
            request.parameters.update({"payload": {}})
        put(request, (field,), id_)
        return request

    foreign, random = theirs.id_for(method, field), str(uuid4())
    theirs_, nobodys = [await wire.call(method, request_for(id_)) for id_ in (foreign, random)]
    assert theirs_.text.replace(foreign, random) == nobodys.text
    assert theirs_.code == nobodys.code
    if method.rpc == "ListExecutions":
        assert (theirs_.reply, nobodys.reply) == (method.output_type(), method.output_type())
    elif theirs_.code != "UNIMPLEMENTED":
        assert (theirs_.code, theirs_.reason, nobodys.reason) == ("NOT_FOUND",) + ("RESOURCE_NOT_FOUND",) * 2
        mine = await theirs.wire.call(method, request_for(foreign), theirs.tenant.admin)
        assert mine.code == "OK"  # it is there: for its owner


async def test_listings_of_another_tenant_hold_nothing_of_theirs(relay: Relay, theirs: Theirs) -> None:
    mine = await relay.new_tenant()
    async with relay.connect(mine.admin) as client:
        assert [one async for one in client.connections.list()] == []
        assert [one async for one in client.actions.list_executions()] == []
        assert [one async for one in client.actions.list_executions(connection_id=theirs.preview.connection_id)] == []
        assert {one.name async for one in client.auth.list_api_keys()} == {
            "viewer",
            "bootstrap admin",
            "bootstrap developer",
        }
        events = [one async for one in client.audit.list_events()]
    own = {
        str(row["id"])
        for row in await relay.sql("SELECT id FROM audit_logs WHERE workspace_id = $1", mine.workspace_id)
    }
    assert events
    assert {event.id for event in events} <= own


async def test_a_key_of_another_caller_in_the_same_workspace_sees_no_preview_of_theirs(
    relay: Relay, theirs: Theirs
) -> None:
    request = actions_pb2.GetPreviewRequest(id=theirs.preview.id)
    answer = await theirs.wire.call("ActionsService.GetPreview", request, theirs.tenant.developer)
    assert (answer.code, answer.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")


async def test_names_and_idempotency_keys_of_another_tenant_are_free(
    relay: Relay, theirs: Theirs, receiver: Receiver
) -> None:
    async with relay.connect((await relay.new_tenant()).admin) as client:
        connection = await client.connections.create_webhook("theirs", receiver.url, default=True)
        assert connection.default
        preview = await client.actions.preview("webhook.send", {"payload": {}})
        execution = await client.actions.execute(preview, idempotency_key="theirs")
    assert not execution.replayed
    assert execution.id != theirs.execution.id
    assert receiver.ids() == [execution.id]
