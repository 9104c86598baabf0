"""Users who sign in at an issuer: what their roles let them do, in which workspace, and from when until when."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from relay import aio
from relay import errors as client_errors
from relay.v1 import audit_pb2, auth_pb2

from relay_grpc import errors
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.auth import store
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.oidc import TokenVerifier
from relay_grpc.auth.users import UserVerifier
from relay_grpc.auth.verifier import STATUS_TTL
from relay_grpc.db import Database
from relay_grpc.principal import PrincipalType
from relay_grpc.setting_types import OidcIssuer
from relay_grpc.telemetry import Metrics
from tests.auth.issuer import AUDIENCE, Issuer, Provider, issuing, providing
from tests.harness import Databases, Receiver, Relay, Tenant, running, settings_for
from tests.ops.test_cli import Shell
from tests.rpc.wire import Answer, Wire, wired

WHO = "AuthService.WhoAmI"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with providing() as one:
        yield one


@pytest.fixture(scope="module")
async def issuer() -> AsyncIterator[Issuer]:
    async with issuing() as one:
        yield one


@pytest.fixture(scope="module")
async def relay(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, provider: Provider, issuer: Issuer
) -> AsyncIterator[Relay]:
    """A server that trusts both issuers."""
    trusted = f"{provider.url} {AUDIENCE}, {issuer.url} {AUDIENCE}"
    settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_OIDC_ISSUERS=trusted)
    async with databases.new() as url, running(url, settings) as server:
        yield server


@pytest.fixture(scope="module")
async def wire(relay: Relay) -> AsyncIterator[Wire]:
    async with wired(relay, "") as wire:
        yield wire


async def assign(relay: Relay, user: str, role: str, issuer: Issuer | Provider, tenant: Tenant | None = None) -> None:
    async with relay.connect((tenant or relay.tenant).admin) as admin:
        await admin.auth.assign_role(user, role, issuer=issuer.url)


async def remove(relay: Relay, user: str, issuer: Issuer) -> None:
    async with relay.connect(relay.tenant.admin) as admin:
        await admin.auth.remove_role(user, issuer=issuer.url)


async def new_user(relay: Relay, issuer: Issuer, role: str) -> tuple[str, str]:
    """A user with this role in the tenant's workspace, and a token."""
    user = f"user-{uuid4()}"
    await assign(relay, user, role, issuer)
    return user, issuer.token(issuer.claims(sub=user))


def as_user(relay: Relay, token: str, workspace: UUID | None = None) -> Any:
    """A client, to be entered."""
    return aio.connect(str(relay.app.listen), token=token, workspace=str(workspace) if workspace else None)


@asynccontextmanager
async def an_instance(
    url: str, *issuers: Issuer, status_ttl: float = STATUS_TTL
) -> AsyncIterator[tuple[UserVerifier, Database]]:
    """What another instance of Relay checks users with, and its connection."""
    async with AsyncExitStack() as stack:
        metrics, db = Metrics(), await Database.open(url, connections=1)
        stack.push_async_callback(db.close)
        changes = Changes(db, metrics)
        stack.push_async_callback(changes.close)
        egress = Egress(EgressPolicy(allow_loopback=True, https_only=False))
        stack.push_async_callback(egress.close)
        tokens = TokenVerifier([OidcIssuer(url=one.url, audience=AUDIENCE) for one in issuers], egress, metrics)
        stack.callback(tokens.close)
        users = UserVerifier(db, tokens, changes, status_ttl=status_ttl)
        stack.push_async_callback(users.close)
        async with asyncio.timeout(10):
            while not metrics.registry.get_sample_value("relay_changes_listening"):
                await asyncio.sleep(0.01)
        yield users, db


async def role_of(users: UserVerifier, token: str, workspace: UUID | None = None) -> str:
    """The user's role, or why they are refused."""
    try:
        return (await users.verify(token, workspace)).role
    except errors.PermissionDenied as refusal:
        return refusal.reason


# Signed in at a real provider


@pytest.mark.parametrize("kind", ["id_token", "access_token"])
async def test_a_user_of_a_real_provider_is_told_who_they_are(relay: Relay, provider: Provider, kind: str) -> None:
    await assign(relay, "alice", "developer", provider)
    async with as_user(relay, (await provider.sign_in("alice"))[kind]) as alice:
        me = await alice.auth.who_am_i()
    assert (me.type, me.id, me.name) == (auth_pb2.PRINCIPAL_TYPE_USER, "alice", "alice@example.com")
    assert (me.workspace_id, me.role) == (str(relay.tenant.workspace_id), "developer")
    assert me.scopes == ["actions:execute", "actions:preview", "actions:read", "connections:read"]
    assert me.expire_time.ToDatetime(UTC) > datetime.now(UTC)


async def test_what_a_user_previewed_nobody_else_executes(
    relay: Relay, provider: Provider, issuer: Issuer, receiver: Receiver
) -> None:
    for name, whose in (("alice", provider), ("bob", provider), ("alice", issuer)):
        await assign(relay, name, "developer", whose)
    async with relay.connect(relay.tenant.admin) as admin:
        connection = await admin.connections.create_webhook("users", receiver.url)
    async with (
        as_user(relay, await provider.token("alice")) as alice,
        as_user(relay, await provider.token("alice")) as alice_later,
        as_user(relay, await provider.token("bob")) as bob,
        as_user(relay, issuer.token()) as namesake,
        relay.connect(relay.tenant.developer) as key,
    ):
        preview = await alice.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        for other in (bob, namesake, key):
            with pytest.raises(client_errors.NotFound):
                await other.actions.get_preview(preview.id)
            with pytest.raises(client_errors.NotFound):
                await other.actions.execute(preview)
        assert receiver.requests == []
        execution = await alice_later.actions.execute(preview)  # the user's, whatever token she comes with
        assert execution.last_attempt.status_code == 200
        assert len(receiver.requests) == 1


async def test_the_audit_log_tells_a_user_from_the_namesake_at_another_issuer(
    relay: Relay, provider: Provider, issuer: Issuer
) -> None:
    for whose in (provider, issuer):
        await assign(relay, "alice", "admin", whose)
    made = {}
    for whose, token in ((provider, await provider.token("alice")), (issuer, issuer.token())):
        async with as_user(relay, token) as alice:
            made[f"{whose.url}#alice"] = await alice.auth.create_api_key("made by a user", "viewer")
    async with relay.connect(relay.tenant.admin) as admin:
        for actor, key in made.items():
            assert (await admin.auth.get_api_key(key.id)).creator == actor
            events = [
                event async for event in admin.audit.list_events(actor_id=actor, action="AuthService.CreateApiKey")
            ]
            assert [event.target for event in events] == [f"apiKeys/{key.id}"]
            assert events[0].actor.type == audit_pb2.ACTOR_TYPE_USER
        assert {one.actor.name async for one in admin.audit.list_events(actor_id=f"{provider.url}#alice")} == {
            "alice@example.com"
        }


async def test_a_key_that_a_user_makes_outlives_the_users_token(relay: Relay, issuer: Issuer) -> None:
    _, token = await new_user(relay, issuer, "admin")
    async with as_user(relay, token) as user:
        made = await user.auth.create_api_key("for good", "viewer")
        assert not made.HasField("expire_time")


# Roles


async def test_a_role_works_at_once_and_stops_at_once(relay: Relay, issuer: Issuer, wire: Wire) -> None:
    for _ in range(10):
        user = f"user-{uuid4()}"
        token = issuer.token(issuer.claims(sub=user))
        for role in ("viewer", "admin", "developer"):
            await assign(relay, user, role, issuer)
            assert (await wire.call(WHO, key=token)).reply.role == role
        await remove(relay, user, issuer)
        assert (await wire.call(WHO, key=token)).reason == "ROLE_MISSING"
        await assign(relay, user, "viewer", issuer)
        assert (await wire.call(WHO, key=token)).reply.role == "viewer"


@pytest.mark.long
async def test_another_instance_hears_of_a_change_of_role(
    relay: Relay, issuer: Issuer, long: bool, figure: Callable[[str], None]
) -> None:
    late = []
    async with an_instance(relay.url, issuer, status_ttl=60.0) as (users, _):
        for _ in range(100 if long else 10):
            user, token = await new_user(relay, issuer, "admin")
            assert await role_of(users, token) == "admin"
            await assign(relay, user, "viewer", issuer)
            changed = time.monotonic()
            while await role_of(users, token) != "viewer":
                await asyncio.sleep(0.001)
            late.append(time.monotonic() - changed)
            await remove(relay, user, issuer)
            changed = time.monotonic()
            while await role_of(users, token) != "ROLE_MISSING":
                await asyncio.sleep(0.001)
            late.append(time.monotonic() - changed)
    late.sort()
    figure(f"{len(late)} changes noticed after {late[-1] * 1000:.0f} ms at most")
    assert late[len(late) * 99 // 100] < 1.0


async def test_a_role_that_was_taken_away_stops_even_where_nobody_tells_of_it(relay: Relay, issuer: Issuer) -> None:
    async with an_instance(relay.url, issuer, status_ttl=0.5) as (users, _):
        await users._changes.close()
        user, token = await new_user(relay, issuer, "admin")
        assert await role_of(users, token) == "admin"
        await remove(relay, user, issuer)
        assert await role_of(users, token) == "admin"  # as fresh as it was promised to be
        await asyncio.sleep(0.5)
        assert await role_of(users, token) == "ROLE_MISSING"


async def test_a_custom_role_is_what_it_keeps_of_its_parent(relay: Relay, issuer: Issuer, wire: Wire) -> None:
    name = f"reader-{uuid4().hex[:8]}"
    async with relay.connect(relay.tenant.admin) as admin:
        await admin.auth.create_role(name, "admin", ["keys:read", "actions:read"])
    _, token = await new_user(relay, issuer, name)
    me = (await wire.call(WHO, key=token)).reply
    assert (me.role, me.scopes) == (name, ["actions:read", "keys:read"])
    assert (await wire.call("AuthService.ListApiKeys", key=token)).code == "OK"
    refused = await wire.call("AuditService.ListEvents", key=token)
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "SCOPE_MISSING")


async def test_a_known_user_needs_no_database_and_an_unknown_one_a_query_for_all_their_calls(
    relay: Relay, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    find = store.find_user_roles

    async def counted(connection: Any, users: Any) -> Any:
        asked.append(len(users))
        return await find(connection, users)

    monkeypatch.setattr(store, "find_user_roles", counted)
    user, token = await new_user(relay, issuer, "viewer")
    nobody = issuer.token(issuer.claims(sub="nobody"))
    async with an_instance(relay.url, issuer, status_ttl=60.0) as (users, db):
        assert set(await asyncio.gather(*(role_of(users, token) for _ in range(100)))) == {"viewer"}
        assert set(await asyncio.gather(*(role_of(users, nobody) for _ in range(100)))) == {"ROLE_MISSING"}
        assert sum(asked) <= 4  # one each, and perhaps one more for who came while it ran
        await db.close()
        assert (await users.verify(token, relay.tenant.workspace_id)).id == user
        with pytest.raises(errors.DependencyUnavailable):
            await users.verify(nobody, None)


async def test_the_memory_of_users_is_bounded(relay: Relay, issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay_grpc.auth.users.MAX_USERS", 3)
    async with an_instance(relay.url, issuer) as (users, _):
        for _ in range(5):
            _, token = await new_user(relay, issuer, "viewer")
            assert await role_of(users, token) == "viewer"
        assert len(users._known) == 3


# Workspaces


async def test_a_user_with_roles_in_two_workspaces_works_in_the_one_they_name(relay: Relay, issuer: Issuer) -> None:
    one, two = relay.tenant, await relay.new_tenant()
    user = f"user-{uuid4()}"
    token = issuer.token(issuer.claims(sub=user))
    seen = {}
    for tenant, role in ((one, "admin"), (two, "admin")):
        await assign(relay, user, role, issuer, tenant)
        async with relay.connect(tenant.admin) as admin, as_user(relay, token, tenant.workspace_id) as client:
            await client.connections.create_webhook(f"of {tenant.workspace_id}", "https://receiver.example/hook")
            seen[tenant.workspace_id] = [
                {key.id async for key in client.auth.list_api_keys()},
                {connection.id async for connection in client.connections.list()},
                {event.id async for event in client.audit.list_events()},
            ]
            assert seen[tenant.workspace_id][0] == {key.id async for key in admin.auth.list_api_keys()}
            assert (await client.auth.who_am_i()).workspace_id == str(tenant.workspace_id)
    ours, theirs = seen[one.workspace_id], seen[two.workspace_id]
    assert all(ours)
    assert all(theirs)
    assert not any(left & right for left, right in zip(ours, theirs, strict=True))
    async with as_user(relay, token, one.workspace_id) as client:
        for id_ in theirs[1]:
            with pytest.raises(client_errors.NotFound):
                await client.connections.get(id_)


async def test_a_second_workspace_has_to_be_named_and_its_role_works_at_once(
    relay: Relay, issuer: Issuer, wire: Wire
) -> None:
    other = await relay.new_tenant()
    user, token = await new_user(relay, issuer, "viewer")
    assert (await wire.call(WHO, key=token)).reply.workspace_id == str(relay.tenant.workspace_id)
    assert (await wire.call(WHO, key=token, x_relay_workspace=str(other.workspace_id))).reason == "ROLE_MISSING"
    await assign(relay, user, "developer", issuer, other)
    named = await wire.call(WHO, key=token, x_relay_workspace=str(other.workspace_id))
    assert (named.reply.workspace_id, named.reply.role) == (str(other.workspace_id), "developer")
    unnamed = await wire.call(WHO, key=token)
    assert (unnamed.code, list(unnamed.violations)) == ("INVALID_ARGUMENT", ["x-relay-workspace"])
    assert "several" in unnamed.text


async def test_a_role_in_a_second_workspace_works_at_once_where_the_first_is_known(
    relay: Relay, issuer: Issuer
) -> None:
    other = await relay.new_tenant()
    user, token = await new_user(relay, issuer, "viewer")
    async with an_instance(relay.url, issuer, status_ttl=60.0) as (users, _):
        assert await role_of(users, token) == "viewer"
        await assign(relay, user, "developer", issuer, other)
        assert await role_of(users, token, other.workspace_id) == "developer"
        assert await role_of(users, token, relay.tenant.workspace_id) == "viewer"


async def test_without_a_role_every_workspace_answers_alike(relay: Relay, issuer: Issuer, wire: Wire) -> None:
    other = await relay.new_tenant()
    user = f"user-{uuid4()}"
    token = issuer.token(issuer.claims(sub=user))
    texts = set()
    for workspace in (str(relay.tenant.workspace_id), str(other.workspace_id), str(uuid4())):
        answer = await wire.call(WHO, key=token, x_relay_workspace=workspace)
        assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "ROLE_MISSING")
        assert user in answer.text
        assert issuer.url in answer.text
        assert "AssignRole" in answer.text
        texts.add(answer.text.replace(workspace, "ID"))
    assert len(texts) == 1
    assert (await wire.call(WHO, key=token)).reason == "ROLE_MISSING"


@pytest.mark.parametrize("named", ["", "mine", "018f0000-0000-7000-8000-00000000000", "*"])
async def test_a_workspace_is_named_by_its_id(relay: Relay, issuer: Issuer, wire: Wire, named: str) -> None:
    for credential in (relay.tenant.viewer, issuer.token()):
        answer = await wire.call(WHO, key=credential, x_relay_workspace=named)
        assert (answer.code, list(answer.violations)) == ("INVALID_ARGUMENT", ["x-relay-workspace"])


async def test_a_key_is_refused_where_another_workspace_is_meant(relay: Relay, wire: Wire) -> None:
    other = await relay.new_tenant()
    own = await wire.call(WHO, key=other.viewer, x_relay_workspace=str(other.workspace_id).upper())
    assert own.reply.workspace_id == str(other.workspace_id)
    request = auth_pb2.CreateApiKeyRequest(name="never made", role="viewer")
    for workspace in (str(relay.tenant.workspace_id), str(uuid4())):
        answer = await wire.call(
            "AuthService.CreateApiKey", request, other.admin, x_relay_workspace=workspace, x_request_id=workspace
        )
        assert (answer.code, list(answer.violations)) == ("INVALID_ARGUMENT", ["x-relay-workspace"])
        (event,) = await relay.sql("SELECT * FROM audit_events WHERE request_id = $1", workspace)
        assert (event["status"], event["workspace_id"]) == ("failed", other.workspace_id)
    assert await relay.sql("SELECT FROM api_keys WHERE name = 'never made'") == []


# Refusals


async def test_the_field_for_keys_takes_no_token(relay: Relay, issuer: Issuer, wire: Wire) -> None:
    _, token = await new_user(relay, issuer, "viewer")
    assert (await wire.call(WHO, key=token)).code == "OK"
    assert (await wire.call(WHO, x_api_key=token)).code == "UNAUTHENTICATED"
    assert (await wire.call(WHO, authorization=f"Basic {token}")).code == "UNAUTHENTICATED"


async def test_a_refused_token_is_answered_like_a_refused_key(relay: Relay, issuer: Issuer, wire: Wire) -> None:
    _, token = await new_user(relay, issuer, "viewer")
    expired = issuer.token(issuer.claims(exp=int(time.time()) - 60))
    foreign = issuer.token(issuer.claims(aud="other"))
    answers: list[Answer] = [
        await wire.call(WHO, key=credential)
        for credential in (token[:-8] + "A" * 8, expired, foreign, "rk_dev_wrong", "password", "a.b.c")
    ]
    assert {(one.code, one.reason) for one in answers} == {("UNAUTHENTICATED", "CREDENTIALS_INVALID")}
    assert len({one.text for one in answers}) == 1


async def test_refusals_of_users_are_counted_and_not_written_one_by_one(
    relay: Relay, issuer: Issuer, wire: Wire
) -> None:
    nobody = issuer.token(issuer.claims(sub="nobody"))
    await relay.app.recorder.flush(everything=True)
    before = await relay.sql("SELECT id FROM audit_events WHERE reason = 'ROLE_MISSING'")
    for _ in range(20):
        assert (await wire.call("AuthService.ListRoles", key=nobody)).reason == "ROLE_MISSING"
    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql(
        """
        SELECT workspace_id, actor_type, actor_id, status, count FROM audit_events
         WHERE reason = 'ROLE_MISSING' AND action = 'AuthService.ListRoles' AND NOT id = ANY($1)
        """,
        [row["id"] for row in before],
    )
    assert sum(row["count"] for row in rows) == 20
    assert len(rows) <= 2  # or the minute ended
    assert {(row["workspace_id"], row["actor_type"], row["actor_id"], row["status"]) for row in rows} == {
        (UUID(int=0), "user", f"{issuer.url}#nobody", "denied")
    }


async def test_an_issuer_has_to_be_one_that_the_server_knows(relay: Relay, issuer: Issuer) -> None:
    async with relay.connect(relay.tenant.admin) as admin:
        for named in ("", "https://evil.example", f"{issuer.url}/"):
            with pytest.raises(client_errors.InvalidRequest) as refusal:
                await admin.auth.assign_role("alice", "viewer", issuer=named)
            assert [field for field, _ in refusal.value.violations] == ["issuer"]
    async with an_instance(relay.url, issuer) as (users, _):
        assert users.issuer("") == users.issuer(issuer.url) == issuer.url
    async with an_instance(relay.url) as (users, _):
        for named in ("", issuer.url):
            with pytest.raises(errors.InvalidRequest, match="RELAY_OIDC_ISSUERS"):
                users.issuer(named)
        with pytest.raises(errors.Unauthenticated):
            await users.verify(issuer.token(), None)


async def test_an_issuer_that_is_down_keeps_nobody_out_but_its_users(
    databases: Databases, tmp_path: Path, issuer: Issuer
) -> None:
    async with issuing() as gone:
        url, token = gone.url, gone.token()
    trusted = f"{url} {AUDIENCE}, {issuer.url} {AUDIENCE}"
    async with (
        databases.new() as database,
        running(database, settings_for(tmp_path, RELAY_OIDC_ISSUERS=trusted)) as relay,
        wired(relay) as wire,
    ):
        assert (await wire.call(WHO)).reply.role == "admin"
        _, other = await new_user(relay, issuer, "viewer")
        assert (await wire.call(WHO, key=other)).reply.role == "viewer"
        answer = await wire.call(WHO, key=token)
        assert (answer.code, answer.reason) == ("UNAVAILABLE", "DEPENDENCY_UNAVAILABLE")
        assert url in answer.text


async def test_a_principal_of_a_user_is_all_that_later_layers_need(relay: Relay, issuer: Issuer) -> None:
    user, token = await new_user(relay, issuer, "viewer")
    await relay.sql(
        "UPDATE workspaces SET calls_per_minute = 7, executions_per_minute = 3 WHERE id = $1", relay.tenant.workspace_id
    )
    async with an_instance(relay.url, issuer) as (users, _):
        principal = await users.verify(token, None)
    await relay.sql("UPDATE workspaces SET calls_per_minute = NULL, executions_per_minute = NULL")
    assert (principal.type, principal.id, principal.issuer) == (PrincipalType.USER, user, issuer.url)
    assert (principal.actor, principal.caller) == (f"{issuer.url}#{user}", f"user:{issuer.url}#{user}")
    assert (principal.workspace_limits.calls, principal.workspace_limits.executions) == (7, 3)
    assert (principal.limits.calls, principal.limits.executions) == (None, None)


# The command line


async def test_the_commands_take_a_token_and_a_workspace(relay: Relay, issuer: Issuer, tmp_path: Path) -> None:
    other = await relay.new_tenant()
    user, token = await new_user(relay, issuer, "viewer")
    await assign(relay, user, "developer", issuer, other)
    shell = Shell(tmp_path, str(relay.app.listen), relay.tenant.admin)
    workspace = str(other.workspace_id)
    options, unnamed, both, wrong = await asyncio.gather(
        shell("--token", token, "--workspace", workspace, "whoami", "--json", key=""),
        shell("whoami", key="", RELAY_TOKEN=token),
        shell("whoami", RELAY_TOKEN=token),
        shell("whoami", key="", RELAY_TOKEN=token[:-8] + "A" * 8, RELAY_WORKSPACE=workspace),
    )
    assert (options.code, options.json["id"], options.json["role"]) == (0, user, "developer")
    assert (unnamed.code, both.code, wrong.code) == (2, 2, 3)
    assert "x-relay-workspace" in unnamed.err
    assert "RELAY_TOKEN" in both.err
    assert "RELAY_TOKEN" in wrong.err
    assert not any(token in ended.out + ended.err for ended in (options, unnamed, both, wrong))
