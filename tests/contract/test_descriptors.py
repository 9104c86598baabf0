"""Every method of the API, walked by its descriptor: who is refused, what it costs, what is left in the audit log."""

import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.rpc import error_details_pb2
from relay.v1 import actions_pb2, auth_pb2, connections_pb2, policy_pb2

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.call import Method
from relay_grpc.interceptors.policy import PolicyError, methods
from tests.auth.forgery import forged, mistyped
from tests.contract.requests import fitting
from tests.harness import Databases, Receiver, Relay, running, settings_for
from tests.rpc.wire import METHODS, Answer, Wire, wired

LIMIT = 1_000_000  # of the harness, for both budgets
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
VIEWER = {"actions:read", "actions:preview", "connections:read"}
DEVELOPER = VIEWER | {"actions:execute"}
ADMIN = DEVELOPER | {"actions:recover", "approvals:write", "connections:write", "keys:read", "keys:write"}
ADMIN |= {"roles:read", "roles:write", "audit:read", "audit:export"}
MAY = {"viewer": VIEWER, "developer": DEVELOPER, "admin": ADMIN}


@dataclass(frozen=True)
class Keys:
    bad: dict[str, str]
    reads_connections: auth_pb2.ApiKey
    reads_actions: auth_pb2.ApiKey


@pytest.fixture(scope="module")
async def keys(relay: Relay) -> Keys:
    """bad: one of each kind that is no credential. The others hold the one scope that they are named after."""
    async with relay.connect(relay.tenant.admin) as client:
        revoked = await client.auth.create_api_key("revoked", "viewer")
        expired = await client.auth.create_api_key("expired", "viewer")
        narrowed = [
            await client.auth.create_api_key(scope, "viewer", scopes=[scope])
            for scope in ("connections:read", "actions:read")
        ]
        await client.auth.revoke_api_key(revoked.id)
    await relay.sql("UPDATE api_keys SET expires_at = now() - interval '1 second' WHERE id = $1", expired.id)
    bad = {
        "missing": "",
        "malformed": "secret",
        "mistyped": mistyped(relay.tenant.admin),
        "unknown": forged(),
        "wrong": forged(revoked.public_id),
        "revoked": revoked.secret,
        "expired": expired.secret,
    }
    return Keys(bad, *narrowed)


@pytest.fixture(autouse=True)
def _at_noon(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the limiter the time stands still, so that no budget refills under a test."""
    monkeypatch.setattr(relay.app.limiter, "_clock", lambda: 43_200.0)


@pytest.fixture
async def spent(relay: Relay) -> Callable[[], Any]:
    """What of the two budgets was spent since the test began: (calls, executions)."""

    async def remaining() -> list[int]:
        subjects = (f"{budget}:{relay.tenant.workspace_id}" for budget in ("calls", "executions"))
        return [(await relay.app.limiter.spend(subject, 0, LIMIT)).remaining for subject in subjects]

    before = await remaining()

    async def since() -> tuple[int, ...]:
        return tuple(then - now for then, now in zip(before, await remaining(), strict=True))

    return since


async def events_of(relay: Relay, request_id: str) -> list[Any]:
    return await relay.sql("SELECT * FROM audit_logs WHERE request_id = $1", request_id)


def test_there_are_47_methods_and_each_has_a_policy() -> None:
    assert len(METHODS) == 47
    assert {method.name for method in METHODS.values() if not method.scopes} == {
        "AuthService.WhoAmI",
        "AuthService.VerifyApiKey",
    }


def file_with(policy: policy_pb2.Policy | None) -> FileDescriptor:
    """A file whose one method has this policy."""
    name = f"t{uuid4().hex}"
    empty = "google.protobuf.Empty"
    file = FileDescriptorProto(
        name=f"{name}.proto", package=name, dependency=["relay/v1/policy.proto", "google/protobuf/empty.proto"]
    )
    method = file.service.add(name="Service").method.add(name="Do", input_type=empty, output_type=empty)
    if policy is not None:
        method.options.Extensions[policy_pb2.policy].CopyFrom(policy)
    return descriptor_pool.Default().AddSerializedFile(file.SerializeToString())


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (None, "has no policy"),
        (policy_pb2.Policy(calls=1), "has no policy"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_SCOPED, calls=1), "needs scopes"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_AUTHENTICATED, scopes=["keys:read"], calls=1), "needs scopes"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_SCOPED, scopes=["keys:all"], calls=1), "keys:all"),
        (policy_pb2.Policy(access=policy_pb2.ACCESS_SCOPED, scopes=["keys:read"]), "costs nothing"),
    ],
    ids=["none", "access", "no scopes", "needless scopes", "unknown scope", "no cost"],
)
def test_a_method_without_a_sound_policy_keeps_the_server_from_starting(policy: Any, complaint: str) -> None:
    file = file_with(policy)
    with pytest.raises(PolicyError, match=complaint) as caught:
        methods([file])
    assert f"{file.package}.Service.Do" in str(caught.value)


def test_a_sound_policy_is_read_as_it_is_written() -> None:
    policy = policy_pb2.Policy(
        access=policy_pb2.ACCESS_SCOPED, scopes=["keys:read", "audit:read"], calls=2, executions=3
    )
    (method,) = methods([file_with(policy)]).values()
    assert (method.scopes, method.calls, method.executions, method.audited) == (
        {"keys:read", "audit:read"},
        2,
        3,
        False,
    )


@EVERY_METHOD
async def test_no_key_and_bad_keys_are_refused_alike_for_nothing_and_counted_in_one_event(
    relay: Relay, wire: Wire, keys: Keys, spent: Any, method: Method
) -> None:
    await relay.app.recorder.flush(everything=True)
    begun = time.time() // 60
    answers = [await wire.call(method, key=key) for key in keys.bad.values()]
    assert {(answer.code, answer.reason) for answer in answers} == {("UNAUTHENTICATED", "CREDENTIALS_INVALID")}
    assert len({answer.text for answer in answers}) == 1
    assert await spent() == (0, 0)

    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql("SELECT * FROM audit_logs WHERE action = $1 AND reason = 'CREDENTIALS_INVALID'", method.name)
    assert sum(row["count"] for row in rows) == len(keys.bad)
    assert len(rows) <= 1 + time.time() // 60 - begun  # one for each minute that the calls were in
    assert {(row["workspace_id"], row["status"], row["actor_type"], row["actor_id"]) for row in rows} == {
        (SYSTEM_WORKSPACE, "denied", "unknown", "")
    }


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.scopes], ids=lambda one: one.name)
async def test_a_key_without_the_scope_is_refused_for_nothing_and_told_what_it_lacks(
    relay: Relay, wire: Wire, keys: Keys, spent: Any, method: Method
) -> None:
    key = keys.reads_actions if method.scopes == {"connections:read"} else keys.reads_connections
    request_id = uuid4().hex
    answer = await wire.call(method, key=key.secret, x_request_id=request_id)
    assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "SCOPE_MISSING")
    missing = answer.detail(error_details_pb2.ErrorInfo).metadata["missing_scopes"]
    assert missing == " ".join(sorted(method.scopes))
    assert missing in answer.text
    assert await spent() == (0, 0)

    (event,) = await events_of(relay, request_id)
    assert (event["workspace_id"], event["action"]) == (relay.tenant.workspace_id, method.name)
    assert (event["status"], event["reason"], event["count"]) == ("denied", "SCOPE_MISSING", 1)
    assert (event["actor_type"], event["actor_id"]) == ("api_key", key.id)
    assert set(event["scopes"]) == method.scopes


@pytest.mark.parametrize("role", MAY)
async def test_each_role_may_call_what_its_scopes_allow(wire: Wire, relay: Relay, role: str) -> None:
    for method in METHODS.values():
        answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR), getattr(relay.tenant, role))
        refused = answer.code == "PERMISSION_DENIED" and answer.reason == "SCOPE_MISSING"
        assert refused == (not method.scopes <= MAY[role]), method.name


@EVERY_METHOD
async def test_a_call_is_charged_its_cost_and_leaves_one_event_where_it_is_audited(
    relay: Relay, wire: Wire, spent: Any, method: Method
) -> None:
    request_id = uuid4().hex
    answer = await wire.call(method, fitting(method.input_type.DESCRIPTOR), x_request_id=request_id)
    assert answer.trailing["x-request-id"] == request_id
    assert await spent() == (method.calls, method.executions)
    budget = "executions" if method.executions else "calls"
    decision = await relay.app.limiter.spend(f"{budget}:{relay.tenant.workspace_id}", 0, LIMIT)
    assert answer.trailing["ratelimit-limit"] == str(LIMIT)
    assert answer.trailing["ratelimit-remaining"] == str(decision.remaining)
    assert answer.trailing["ratelimit-reset"] == str(math.ceil(decision.reset_after))
    assert "retry-after" not in answer.trailing

    expected = ("success", "") if answer.code == "OK" else ("failed", answer.reason)
    events = [(row["status"], row["reason"], row["count"]) for row in await events_of(relay, request_id)]
    assert events == ([(*expected, 1)] if method.audited else [])


@EVERY_METHOD
async def test_a_bad_request_leaves_one_event_where_the_method_is_audited(
    relay: Relay, wire: Wire, method: Method
) -> None:
    request_id = uuid4().hex
    await wire.call(method, b"\xff", x_request_id=request_id)
    events = [(row["action"], row["status"], row["reason"]) for row in await events_of(relay, request_id)]
    assert events == ([(method.name, "failed", "INVALID_REQUEST")] if method.audited else [])


async def test_a_spent_budget_refuses_every_method_and_counts_the_refusals(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    for budget in ("calls", "executions"):
        subject = f"{budget}:{tenant.workspace_id}"
        left = (await relay.app.limiter.spend(subject, 0, LIMIT)).remaining
        await relay.app.limiter.spend(subject, left, LIMIT)
    async with wired(relay, tenant.admin) as wire:
        for method in METHODS.values():
            for _ in range(2):
                answer = await wire.call(method)
                assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "RATE_LIMITED")
            budget = "executions" if method.executions else "calls"
            assert answer.trailing["ratelimit-remaining"] == "0"
            (violation,) = answer.detail(error_details_pb2.QuotaFailure).violations
            assert (violation.quota_metric, violation.quota_value) == (budget, LIMIT)
            assert str(tenant.workspace_id) in violation.subject
            delay = answer.detail(error_details_pb2.RetryInfo).retry_delay.ToTimedelta().total_seconds()
            assert 0 < delay <= 120
            assert delay <= int(answer.trailing["retry-after"]) < delay + 1
    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql(
        "SELECT action, sum(count) FROM audit_logs WHERE workspace_id = $1 AND status = 'denied' "
        "AND reason = 'RATE_LIMITED' AND actor_type = 'api_key' GROUP BY action",
        tenant.workspace_id,
    )
    assert dict(map(tuple, rows)) == dict.fromkeys(METHODS, 2)


async def test_each_audited_method_that_is_built_leaves_one_event_of_its_success(
    relay: Relay, wire: Wire, receiver: Receiver
) -> None:
    done = set()

    async def do(name: str, request: Any) -> Any:
        request_id = uuid4().hex
        reply = (await wire.call(name, request, x_request_id=request_id)).reply
        (event,) = await events_of(relay, request_id)
        assert (event["action"], event["status"], event["reason"]) == (name, "success", "")
        assert event["workspace_id"] == relay.tenant.workspace_id
        done.add(name)
        return reply

    key = await do("AuthService.CreateApiKey", auth_pb2.CreateApiKeyRequest(name="audited", role="viewer"))
    await do("AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=key.id))
    webhook = connections_pb2.WebhookConfiguration(url=receiver.url)
    connection = await do(
        "ConnectionsService.CreateConnection",
        connections_pb2.CreateConnectionRequest(name="audited", webhook=webhook),
    )
    preview_request = actions_pb2.PreviewRequest(action="webhook.send", connection_id=connection.id)
    preview_request.parameters.update({"payload": {}})
    preview = await do("ActionsService.Preview", preview_request)
    await do("ActionsService.Execute", actions_pb2.ExecuteRequest(preview_id=preview.id))
    await do("AuditService.ListEvents", fitting(METHODS["AuditService.ListEvents"].input_type.DESCRIPTOR))
    assert done == {
        method.name
        for method in METHODS.values()
        if method.audited and (await wire.call(method, fitting(method.input_type.DESCRIPTOR))).code != "UNIMPLEMENTED"
    }


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
