"""Roles of a workspace's own, and which user has which."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from relay.errors import AlreadyExists, FailedPrecondition, InvalidRequest, NotFound, RelayError
from relay.v1 import auth_pb2

from relay_grpc.auth import scopes
from tests.harness import Databases, Relay, running, settings_for
from tests.rpc.wire import wired

ISSUER, SECOND = "http://127.0.0.1:9/issuer", "http://127.0.0.1:9/second"


@pytest.fixture(scope="module")
async def relay(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Relay]:
    """A server that knows one issuer; its keys are never read here."""
    settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_OIDC_ISSUERS=f"{ISSUER} relay")
    async with databases.new() as url, running(url, settings) as server:
        yield server


@pytest.fixture
async def client(relay: Relay) -> AsyncIterator[Any]:
    """The admin of a tenant of this test's own."""
    async with relay.connect((await relay.new_tenant()).admin) as client:
        yield client


async def names(client: Any) -> list[str]:
    return [role.name async for role in client.auth.list_roles()]


async def test_the_built_in_roles_are_there_first(client: Any) -> None:
    await client.auth.create_role("accountant", "viewer", ["actions:read"])
    roles = [role async for role in client.auth.list_roles()]
    assert [role.name for role in roles] == ["admin", "developer", "viewer", "accountant"]
    for role in roles[:3]:
        assert (role.parent, role.HasField("create_time")) == ("", False)
        assert role.scopes == sorted(scopes.ROLES[role.name])


async def test_a_role_narrows_a_built_in_one(client: Any) -> None:
    made = await client.auth.create_role("ops", "developer", ["actions:read", "actions:execute"])
    assert (made.name, made.parent, made.scopes) == ("ops", "developer", ["actions:execute", "actions:read"])
    assert made.HasField("create_time")
    assert made in [role async for role in client.auth.list_roles()]
    with pytest.raises(InvalidRequest) as refusal:
        await client.auth.create_role("more", "developer", ["actions:read", "keys:write", "no:such"])
    assert refusal.value.violations == (("scopes", "keys:write, no:such: not of the role developer"),)
    assert await names(client) == ["admin", "developer", "viewer", "ops"]


async def test_a_name_is_taken_once_in_a_workspace(relay: Relay, client: Any) -> None:
    await client.auth.create_role("taken", "viewer", ["actions:read"])
    for name in ("taken", "viewer"):
        with pytest.raises(AlreadyExists, match=name):
            await client.auth.create_role(name, "admin", ["keys:read"])
    async with relay.connect((await relay.new_tenant()).admin) as other:
        await other.auth.create_role("taken", "viewer", ["actions:preview"])
        with pytest.raises(NotFound):
            await other.auth.delete_role("nobody")
    assert [role.scopes async for role in client.auth.list_roles() if role.name == "taken"] == [["actions:read"]]


async def test_a_key_of_a_role_may_do_what_the_role_allows(relay: Relay, client: Any) -> None:
    await client.auth.create_role("reader", "admin", ["keys:read", "audit:read"])
    key = await client.auth.create_api_key("reads", "reader")
    narrowed = await client.auth.create_api_key("reads keys", "reader", scopes=["keys:read"])
    assert (key.role, key.scopes, narrowed.scopes) == ("reader", ["audit:read", "keys:read"], ["keys:read"])
    listed = {one.id: one async for one in client.auth.list_api_keys()}
    assert (listed[key.id].scopes, listed[narrowed.id].scopes) == (key.scopes, narrowed.scopes)
    async with relay.connect(narrowed.secret) as holder:
        me = await holder.auth.who_am_i()
        assert (me.role, me.scopes) == ("reader", ["keys:read"])
        assert [one.id async for one in holder.auth.list_api_keys()]
        with pytest.raises(RelayError) as refusal:
            [_ async for _ in holder.audit.list_events()]
        assert refusal.value.metadata["missing_scopes"] == "audit:read"
    with pytest.raises(InvalidRequest, match="actions:read: not of the role reader"):
        await client.auth.create_api_key("acts", "reader", scopes=["actions:read"])


async def test_another_workspaces_role_does_not_exist(relay: Relay, client: Any) -> None:
    await client.auth.create_role("private", "viewer", ["actions:read"])
    async with relay.connect((await relay.new_tenant()).admin) as other:
        for attempt in (
            other.auth.create_api_key("theirs", "private"),
            other.auth.assign_role("user", "private"),
            other.auth.delete_role("private"),
        ):
            with pytest.raises(NotFound, match="role 'private' does not exist in this workspace"):
                await attempt
        assert "private" not in await names(other)


async def test_a_role_that_a_key_or_a_user_has_is_not_deleted(client: Any) -> None:
    await client.auth.create_role("used", "viewer", ["actions:read"])

    async def refused() -> str:
        with pytest.raises(FailedPrecondition) as refusal:
            await client.auth.delete_role("used")
        assert refusal.value.reason == "ROLE_IN_USE"
        return str(refusal.value.message)

    keys = [await client.auth.create_api_key("user of a role", "used") for _ in range(2)]
    await client.auth.assign_role("somebody", "used")
    assert "in use" in await refused()
    for key in keys:
        await client.auth.revoke_api_key(key.id)
    assert "a user has it" in await refused()
    await client.auth.assign_role("somebody", "viewer")
    rotated = await client.auth.create_api_key("user of a role", "used")
    successor = await client.auth.rotate_api_key(rotated.id, timedelta())
    await client.auth.revoke_api_key(successor.id)
    assert "a key has it" in await refused(), "one that retired was not revoked"
    await client.auth.revoke_api_key(rotated.id)
    await client.auth.delete_role("used")
    assert "used" not in await names(client)
    assert (await client.auth.get_api_key(rotated.id)).scopes == []
    with pytest.raises(NotFound):
        await client.auth.delete_role("used")


@pytest.mark.parametrize("role", list(scopes.ROLES))
async def test_a_built_in_role_is_none_of_the_workspace(client: Any, role: str) -> None:
    with pytest.raises(NotFound):
        await client.auth.delete_role(role)


async def test_deleting_a_role_never_overtakes_giving_it(relay: Relay, client: Any) -> None:
    """A key or a user that got the role keeps it from being deleted, whoever is first."""
    for round_ in range(15):
        role = f"race-{round_}"
        await client.auth.create_role(role, "viewer", ["actions:read"])
        given = [client.auth.create_api_key("race", role), client.auth.assign_role(f"user {round_}", role)]
        # A key takes the time of a hash before it is written.
        delete = asyncio.create_task(_after(0.002 * round_, client.auth.delete_role(role)))
        ended = await asyncio.gather(*given, delete, return_exceptions=True)
        *had, deleted = [getattr(one, "code", None) and one.code.name for one in ended]
        assert set(had) <= {None, "NOT_FOUND"}
        assert deleted == (None if set(had) == {"NOT_FOUND"} else "FAILED_PRECONDITION")
    assert not await relay.sql(
        """
        SELECT FROM (SELECT workspace_id, role FROM api_keys WHERE revoked_at IS NULL
                     UNION ALL SELECT workspace_id, role FROM user_roles) had
         WHERE role LIKE 'race-%' AND NOT EXISTS (SELECT FROM custom_roles r
                                                   WHERE r.workspace_id = had.workspace_id AND r.name = had.role)
        """
    )


async def _after(seconds: float, work: Any) -> Any:
    await asyncio.sleep(seconds)
    return await work


async def test_a_role_that_widens_under_its_giver_is_not_given(relay: Relay, client: Any) -> None:
    """Between two looks at a role of one name, somebody else deletes it and makes a wider one."""
    clerk = await client.auth.create_api_key("clerk", "admin", scopes=["keys:write", "roles:write", "actions:read"])
    narrow, wide = ["actions:read"], ["actions:read", "audit:read"]
    outcomes = set()
    async with relay.connect(clerk.secret) as weak:
        for round_ in range(15):
            await client.auth.create_role("shifting", "admin", narrow)

            async def widen(after: float) -> None:
                await asyncio.sleep(after)
                await client.auth.delete_role("shifting")
                await client.auth.create_role("shifting", "admin", wide)

            key, user, _ = await asyncio.gather(
                weak.auth.create_api_key("shifting", "shifting"),
                _after(0.002 * round_, weak.auth.assign_role("shifting", "shifting")),
                widen(0.002 * round_),
                return_exceptions=True,
            )
            has = {role.name: set(role.scopes) async for role in client.auth.list_roles()}.get("shifting", set())
            for given in (key, user):
                outcomes.add(getattr(given, "reason", "given"))
                assert isinstance(given, RelayError) or has == set(narrow)
            if not isinstance(key, RelayError):
                assert key.scopes == narrow
                await client.auth.revoke_api_key(key.id)
            if not isinstance(user, RelayError):
                await client.auth.remove_role("shifting")
            if has:
                await client.auth.delete_role("shifting")
    assert outcomes <= {"given", "CEILING_EXCEEDED", "RESOURCE_NOT_FOUND"}


async def test_a_user_has_one_role_in_a_workspace(relay: Relay, client: Any) -> None:
    me = await client.auth.who_am_i()
    user = f"user {uuid4()}"
    first = await client.auth.assign_role(user, "viewer")
    assert (first.user_id, first.role, first.issuer, first.creator) == (user, "viewer", ISSUER, me.id)
    second = await client.auth.assign_role(user, "developer", issuer=ISSUER)
    assert (second.role, second.issuer) == ("developer", ISSUER)
    assert second.create_time.ToNanoseconds() > first.create_time.ToNanoseconds()
    assert [one async for one in client.auth.list_role_assignments()] == [second]
    async with relay.connect((await relay.new_tenant()).admin) as other:
        await other.auth.assign_role(user, "admin")
        assert [one async for one in client.auth.list_role_assignments()] == [second]
        await client.auth.remove_role(user)
        assert [one.role async for one in other.auth.list_role_assignments()] == ["admin"]
    assert [one async for one in client.auth.list_role_assignments()] == []
    with pytest.raises(NotFound, match=user):
        await client.auth.remove_role(user)


async def test_the_latest_assignment_is_listed_first(client: Any) -> None:
    for user, role in (("ann", "viewer"), ("bob", "viewer"), ("ann", "admin")):
        await client.auth.assign_role(user, role)
    assert [(one.user_id, one.role) async for one in client.auth.list_role_assignments()] == [
        ("ann", "admin"),
        ("bob", "viewer"),
    ]


async def test_of_assignments_at_once_one_is_left(client: Any) -> None:
    made = await asyncio.gather(*(client.auth.assign_role("popular", role) for role in ["viewer", "admin"] * 5))
    (left,) = [one async for one in client.auth.list_role_assignments()]
    assert left in made


async def test_a_role_that_does_not_exist_is_not_assigned(client: Any) -> None:
    with pytest.raises(NotFound, match="role 'nothing' does not exist"):
        await client.auth.assign_role("user", "nothing")
    assert [one async for one in client.auth.list_role_assignments()] == []


async def test_an_issuer_that_the_server_does_not_know_is_told_so(client: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await client.auth.assign_role("user", "viewer", issuer=SECOND)
    ((field, problem),) = refusal.value.violations
    assert (field, ISSUER in problem) == ("issuer", True)


async def test_with_several_issuers_one_has_to_be_named(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_OIDC_ISSUERS=f"{ISSUER} relay,{SECOND} relay")
    async with running(relay.url, settings) as both, both.connect(both.tenant.admin) as client:
        for call in (client.auth.assign_role("user", "viewer"), client.auth.remove_role("user")):
            with pytest.raises(InvalidRequest) as refusal:
                await call
            assert refusal.value.violations[0][0] == "issuer"
        assert (await client.auth.assign_role("user", "viewer", issuer=SECOND)).issuer == SECOND
        assert (await client.auth.assign_role("user", "admin", issuer=ISSUER)).issuer == ISSUER
        assert [one.role async for one in client.auth.list_role_assignments()] == ["admin", "viewer"]
        # The first server does not know the second issuer any more; its users' roles can still be taken away.
        async with relay.connect(both.tenant.admin) as later:
            await later.auth.remove_role("user", issuer=SECOND)
            assert [one.issuer async for one in later.auth.list_role_assignments()] == [ISSUER]


async def test_a_server_without_issuers_says_what_its_operator_has_to_do(
    relay: Relay, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with running(relay.url, settings_for(tmp_path_factory.mktemp("data"))) as none, wired(none) as wire:
        request = auth_pb2.AssignRoleRequest(user_id="user", role="viewer")
        answer = await wire.call("AuthService.AssignRole", request)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert "RELAY_OIDC_ISSUERS" in answer.violations["issuer"]


async def test_every_change_of_roles_tells_what_it_was_about(relay: Relay, client: Any) -> None:
    await client.auth.create_role("logged", "viewer", ["actions:read"])
    await client.auth.assign_role("logged user", "logged")
    with pytest.raises(FailedPrecondition):
        await client.auth.delete_role("logged")
    await client.auth.remove_role("logged user")
    await client.auth.delete_role("logged")
    events = [event async for event in client.audit.list_events() if "logged" in event.target]
    assert [(event.action.partition(".")[2], event.target, event.reason) for event in reversed(events)] == [
        ("CreateRole", "roles/logged", ""),
        ("AssignRole", f"roleAssignments/{ISSUER}#logged user", ""),
        ("DeleteRole", "roles/logged", "ROLE_IN_USE"),
        ("RemoveRole", f"roleAssignments/{ISSUER}#logged user", ""),
        ("DeleteRole", "roles/logged", ""),
    ]
