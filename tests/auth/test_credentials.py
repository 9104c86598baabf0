"""How a key is presented, and what the key that is made with another may do."""

import pytest
from google.rpc import error_details_pb2
from relay.v1 import auth_pb2

from relay_grpc.auth import scopes
from tests.auth.forgery import forged
from tests.harness import Relay
from tests.rpc.wire import Answer, Wire, wired

CREATE = "AuthService.CreateApiKey"


@pytest.mark.parametrize(
    ("metadata", "accepted"),
    [
        ({"authorization": "Bearer KEY"}, True),
        ({"authorization": "bearer KEY"}, True),
        ({"authorization": "BEARER  KEY"}, True),
        ({"x_api_key": "KEY"}, True),
        ({"authorization": "Basic YTpi", "x_api_key": "KEY"}, True),
        ({"authorization": "Bearer", "x_api_key": "KEY"}, True),
        ({"authorization": "KEY"}, False),
        ({"authorization": "Basic KEY"}, False),
        ({"authorization": "Bearer KEY KEY"}, False),
        ({"authorization": f"Bearer {forged()}", "x_api_key": "KEY"}, False),
        ({"x_api_key": "Bearer KEY"}, False),
        ({"cookie": "KEY"}, False),
    ],
)
async def test_a_key_comes_as_a_bearer_token_or_in_its_own_field(
    relay: Relay, metadata: dict[str, str], accepted: bool
) -> None:
    metadata = {name: value.replace("KEY", relay.tenant.viewer) for name, value in metadata.items()}
    async with wired(relay) as wire:
        answer = await wire.call("AuthService.WhoAmI", key="", **metadata)
    assert answer.code == ("OK" if accepted else "UNAUTHENTICATED")


async def test_the_caller_is_told_who_it_is(relay: Relay) -> None:
    async with relay.connect(relay.tenant.developer) as client:
        me = await client.auth.who_am_i()
    assert (me.type, me.role, me.name) == (auth_pb2.PRINCIPAL_TYPE_API_KEY, "developer", "bootstrap developer")
    assert me.workspace_id == str(relay.tenant.workspace_id)
    assert me.scopes == ["actions:execute", "actions:preview", "actions:read", "connections:read"]
    assert not me.HasField("expire_time")


async def create(wire: Wire, role: str, *kept: str) -> Answer:
    return await wire.call(CREATE, auth_pb2.CreateApiKeyRequest(name="made", role=role, scopes=kept))


async def test_a_key_is_never_given_more_than_its_maker_holds(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        maker = await client.auth.create_api_key("maker", "admin", scopes=["keys:write", "actions:read"])
    assert maker.scopes == ["actions:read", "keys:write"]
    async with wired(relay, maker.secret) as wire:
        for role, kept, missing in (
            ("viewer", (), "actions:preview connections:read"),
            ("viewer", ("actions:preview",), "actions:preview"),
            ("admin", ("keys:write", "keys:read"), "keys:read"),
            ("admin", (), " ".join(sorted(scopes.SCOPES - {"keys:write", "actions:read"}))),
        ):
            answer = await create(wire, role, *kept)
            assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "CEILING_EXCEEDED")
            assert answer.detail(error_details_pb2.ErrorInfo).metadata["missing_scopes"] == missing
        made = (await create(wire, "viewer", "actions:read")).reply
        assert made.scopes == ["actions:read"]
        assert made.creator == maker.id


async def test_a_key_keeps_scopes_of_its_own_role_alone(relay: Relay) -> None:
    async with wired(relay) as wire:
        answer = await create(wire, "viewer", "actions:read", "keys:write")
        assert (answer.code, set(answer.violations)) == ("INVALID_ARGUMENT", {"scopes"})
        answer = await create(wire, "no-such-role")
        assert (answer.code, answer.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")


async def test_the_secret_of_a_key_is_in_no_later_answer(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("once", "viewer")
        assert made.secret.split("_")[2] == made.public_id
        assert not any([key.secret async for key in client.auth.list_api_keys()])
        assert not (await client.auth.revoke_api_key(made.id)).secret


def test_a_role_that_nobody_knows_allows_nothing() -> None:
    assert scopes.effective("owner", []) == scopes.effective("owner", ["keys:read"]) == frozenset()
    assert scopes.effective("viewer", ["keys:write", "actions:read"]) == {"actions:read"}
