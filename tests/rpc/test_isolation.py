"""What the matrix has no cell for: tenants that share a user, forged page tokens, previews of a colleague."""

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from relay.v1 import actions_pb2

from relay_grpc.ids import uuid7
from tests.harness import Databases
from tests.rpc.resources import NAMES, Estate, Kind, Neighbours, neighbours, request
from tests.rpc.wire import METHODS, Answer

PAGED = [method for method in METHODS.values() if "page_token" in method.input_type.DESCRIPTOR.fields_by_name]
PREVIEW = METHODS["ActionsService.Preview"]


@dataclass
class Shared:
    """Two tenants, and a user who is a developer of both."""

    two: Neighbours
    token: str

    async def call(self, estate: Estate, name: str, message: Any) -> Answer:
        workspace = str(estate.tenant.workspace_id)
        return await self.two.wire.call(name, message, self.token, x_relay_workspace=workspace)

    async def preview(self, estate: Estate) -> str:
        return str((await self.call(estate, "ActionsService.Preview", request(PREVIEW, {}))).reply.id)


@pytest.fixture(scope="module")
async def two(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Neighbours]:
    async with databases.new() as url, neighbours(url, tmp_path_factory.mktemp("data")) as two:
        yield two


@pytest.fixture(scope="module")
async def alice(two: Neighbours) -> Shared:
    for estate in (two.ours, two.theirs):
        await estate.give_role("alice", "developer")
    return Shared(two, two.issuer.token(two.issuer.claims(sub="alice")))


async def test_a_user_of_two_workspaces_has_to_say_which(two: Neighbours, alice: Shared) -> None:
    answer = await two.wire.call("AuthService.WhoAmI", b"", alice.token)
    assert (answer.code, set(answer.violations)) == ("INVALID_ARGUMENT", {"x-relay-workspace"})
    for estate in (two.ours, two.theirs):
        who = await alice.call(estate, "AuthService.WhoAmI", b"")
        assert who.reply.workspace_id == str(estate.tenant.workspace_id)


async def test_what_a_user_previewed_in_one_workspace_is_not_there_in_the_other(two: Neighbours, alice: Shared) -> None:
    preview_id = await alice.preview(two.ours)
    get = actions_pb2.GetPreviewRequest(id=preview_id)
    execute = actions_pb2.ExecuteRequest(preview_id=preview_id, idempotency_key="of-one-user")
    delivered = len(two.receiver.requests)
    for name, message in (("ActionsService.GetPreview", get), ("ActionsService.Execute", execute)):
        answer = await alice.call(two.theirs, name, message)
        assert (answer.code, answer.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
    assert len(two.receiver.requests) == delivered
    assert (await alice.call(two.ours, "ActionsService.GetPreview", get)).code == "OK"
    assert not (await alice.call(two.ours, "ActionsService.Execute", execute)).reply.replayed


async def test_an_idempotency_key_of_one_user_is_another_in_each_workspace(two: Neighbours, alice: Shared) -> None:
    executions = []
    for estate in (two.ours, two.theirs):
        message = actions_pb2.ExecuteRequest(preview_id=await alice.preview(estate), idempotency_key="the-same")
        executions.append((await alice.call(estate, "ActionsService.Execute", message)).reply)
    assert [execution.replayed for execution in executions] == [False, False]
    assert len({execution.id for execution in executions} & set(two.receiver.ids())) == 2


async def test_a_key_of_another_caller_in_the_same_workspace_sees_no_preview(two: Neighbours) -> None:
    message = actions_pb2.GetPreviewRequest(id=two.ours.standing[Kind.PREVIEW])
    assert (await two.wire.call("ActionsService.GetPreview", message, two.ours.tenant.admin)).code == "OK"
    answer = await two.wire.call("ActionsService.GetPreview", message, two.ours.tenant.developer)
    assert (answer.code, answer.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")


async def test_a_new_tenant_finds_nothing_but_what_was_made_with_it(two: Neighbours) -> None:
    tenant = await two.relay.new_tenant()
    async with two.relay.connect(tenant.admin) as client:
        assert [one async for one in client.connections.list()] == []
        assert [one async for one in client.actions.list_executions()] == []
        names = {one.name async for one in client.auth.list_api_keys()}
        events = {event.id async for event in client.audit.list_events()}
    assert names == {"viewer", "bootstrap admin", "bootstrap developer"}
    rows = await two.relay.sql("SELECT id FROM audit_events WHERE workspace_id = $1", tenant.workspace_id)
    assert events
    assert events <= {str(row["id"]) for row in rows}


@pytest.mark.parametrize("method", PAGED, ids=lambda method: method.name)
async def test_a_forged_page_token_goes_no_further_than_the_caller(two: Neighbours, method: Any) -> None:
    """The seal of a token can be had from any token, and whatever stands behind it can be made up."""
    own = {name: two.ours.standing[kind] for name, kind in NAMES[method.name].items() if name == "execution_id"}

    async def page(token: str, size: int) -> Answer:
        message: Any = request(method, own)
        message.page_token, message.page_size = token, size
        return await two.wire.call(method, message, two.ours.tenant.admin)

    first = await page("", 1)
    if first.code == "UNIMPLEMENTED":
        return
    seal = base64.urlsafe_b64decode(first.reply.next_page_token)[:8]
    foreign = await two.theirs.marks() - await two.ours.marks()
    cursors = [
        *two.theirs.standing.values(),
        str(uuid7()),
        "0",
        "zzzz",
        "",
        "\0",
        "a\0b",
        "'",
        "a' OR true --",
        "9" * 40,
    ]
    for cursor in cursors:
        answer = await page(base64.urlsafe_b64encode(seal + cursor.encode()).decode(), 200)
        assert answer.code == "OK" or set(answer.violations) == {"page_token"}, cursor
        told = "".join(reply.SerializeToString().decode("utf-8", "replace") for reply in answer.replies)
        assert not [mark for mark in foreign if mark in told], cursor
