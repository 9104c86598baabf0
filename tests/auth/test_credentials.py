"""How a key is presented, and what its role makes of it."""

import pytest
from relay.v1 import auth_pb2

from relay_grpc.auth import scopes
from tests.auth.forgery import forged
from tests.harness import Relay
from tests.rpc.wire import wired


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


def test_a_role_that_nobody_knows_allows_nothing() -> None:
    assert scopes.of_role("owner", None, None) == frozenset()


def test_a_built_in_role_that_shrinks_takes_what_narrows_it_along(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scopes.of_role("own", "viewer", ["actions:read", "connections:read"]) == {"actions:read", "connections:read"}
    monkeypatch.setitem(scopes.ROLES, "viewer", frozenset({"actions:read"}))
    allowed = scopes.of_role("own", "viewer", ["actions:read", "connections:read"])
    assert allowed == {"actions:read"}
    assert scopes.kept(allowed, ["connections:read"]) == frozenset()
    assert scopes.kept(allowed, []) == allowed
