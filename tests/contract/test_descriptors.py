"""Every method of the API, walked by its descriptor: whom it refuses, for nothing, and never without a record."""

import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from google.rpc import error_details_pb2
from relay.v1 import auth_pb2

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.call import Method
from tests.auth.forgery import forged, mistyped
from tests.contract.requests import fitting
from tests.harness import Relay
from tests.rpc.wire import METHODS, Wire

EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
VIEWER = {"actions:read", "actions:preview", "connections:read"}
DEVELOPER = VIEWER | {"actions:execute"}
ADMIN = DEVELOPER | {"actions:recover", "approvals:write", "connections:write", "keys:read", "keys:write"}
ADMIN |= {"roles:read", "roles:write", "audit:read", "audit:export"}
MAY = {"viewer": VIEWER, "developer": DEVELOPER, "admin": ADMIN}


@dataclass(frozen=True)
class Keys:
    bad: dict[str, str]
    ended: set[str]
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
        "wrong": forged(relay.tenant.admin.split("_")[2]),
        "revoked": revoked.secret,
        "expired": expired.secret,
    }
    return Keys(bad, {revoked.id, expired.id}, *narrowed)


@EVERY_METHOD
async def test_no_key_and_bad_keys_are_refused_alike_for_nothing_and_counted_in_few_events(
    relay: Relay, wire: Wire, keys: Keys, spent: Any, method: Method
) -> None:
    """One for all that nobody made, and one for each key that has ended, where its workspace sees it."""
    await relay.app.recorder.flush(everything=True)
    begun = time.time() // 60
    answers = [await wire.call(method, key=key) for key in keys.bad.values()]
    assert {(answer.code, answer.reason) for answer in answers} == {("UNAUTHENTICATED", "CREDENTIALS_INVALID")}
    assert len({answer.text for answer in answers}) == 1
    assert await spent() == (0, 0)

    await relay.app.recorder.flush(everything=True)
    rows = await relay.sql(
        "SELECT * FROM audit_events WHERE action = $1 AND reason = 'CREDENTIALS_INVALID'", method.name
    )
    assert sum(row["count"] for row in rows) == len(keys.bad)
    minutes = 1 + time.time() // 60 - begun  # that the calls were in
    assert len(rows) <= minutes * (1 + len(keys.ended))
    assert {(row["workspace_id"], row["status"], row["actor_type"], row["actor_id"]) for row in rows} == {
        (SYSTEM_WORKSPACE, "denied", "unknown", ""),
        *((relay.tenant.workspace_id, "denied", "api_key", id_) for id_ in keys.ended),
    }


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.scopes], ids=lambda one: one.name)
async def test_a_key_without_the_scope_is_refused_at_the_price_of_one_call_and_told_what_it_lacks(
    relay: Relay, wire: Wire, keys: Keys, spent: Any, events_of: Any, method: Method
) -> None:
    key = keys.reads_actions if method.scopes == {"connections:read"} else keys.reads_connections
    request_id = uuid4().hex
    answer = await wire.call(method, key=key.secret, x_request_id=request_id)
    assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "SCOPE_MISSING")
    missing = answer.detail(error_details_pb2.ErrorInfo).metadata["missing_scopes"]
    assert missing == " ".join(sorted(method.scopes))
    assert missing in answer.text
    assert await spent() == (1, 0)

    (event,) = await events_of(request_id)
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
