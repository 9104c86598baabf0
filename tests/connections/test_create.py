"""CreateConnection: what it keeps, what it refuses, and that validating makes nothing."""

import re
from datetime import timedelta
from typing import Any

import pytest
from relay.errors import AlreadyExists, InvalidRequest
from relay.v1.actions_pb2 import EXECUTION_STATE_SUCCESS
from relay.v1.connections_pb2 import (
    BREAKER_STATE_CLOSED,
    SIGNATURE_SCHEME_ED25519,
    SIGNATURE_SCHEME_HMAC_SHA256,
)

from tests.connections.calls import deliver
from tests.harness import Receiver, Relay
from tests.processes import ROOT

(VERIFYING,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/connections.md").read_text(), re.DOTALL)


async def test_everything_that_is_set_is_answered_and_goes_along(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook(
        "all of it",
        receiver.url,
        body_signature=True,
        headers={"Authorization": "Bearer of.the.receiver", "X-Tenant": "t"},
        retry_delays=[timedelta(seconds=1), timedelta(hours=24)],
        attempt_timeout=timedelta(seconds=2.5),
    )
    found = await admin.connections.get(made.id)
    assert dict(found.webhook.headers) == {"Authorization": "", "X-Tenant": ""}
    assert [delay.ToTimedelta() for delay in found.webhook.retry_policy.delays] == [
        timedelta(seconds=1),
        timedelta(days=1),
    ]
    assert found.webhook.timeout.ToTimedelta() == timedelta(seconds=2.5)
    assert (found.enabled, found.disabled_reason, found.version) == (True, "", 1)
    assert found.health.breaker_state == BREAKER_STATE_CLOSED
    assert [key.scheme for key in found.signing_keys] == [SIGNATURE_SCHEME_HMAC_SHA256]
    assert not found.signing_keys[0].public_key
    assert not found.signing_keys[0].HasField("expire_time")
    made.ClearField("signing_secret")
    assert made == found
    assert [one for one in [each async for each in admin.connections.list()] if one.id == made.id] == [found]
    assert (await deliver(admin, made.id)).state == EXECUTION_STATE_SUCCESS
    ((headers, _),) = receiver.requests
    assert (headers["authorization"], headers["x-tenant"]) == ("Bearer of.the.receiver", "t")
    assert headers["x-signature"].startswith("sha256=")


async def test_an_empty_retry_policy_is_one_attempt(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("once", receiver.url, retry_delays=[])
    assert made.webhook.HasField("retry_policy")
    assert not made.webhook.retry_policy.delays


async def test_ed25519_tells_the_public_key_and_keeps_the_private_one(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("ed25519", receiver.url, signature_scheme=SIGNATURE_SCHEME_ED25519)
    assert made.signing_secret == ""
    ((key),) = made.signing_keys
    assert key.scheme == SIGNATURE_SCHEME_ED25519
    assert (await deliver(admin, made.id, n=1)).state == EXECUTION_STATE_SUCCESS
    ((headers, body),) = receiver.requests
    names: dict[str, Any] = {}
    exec(VERIFYING, names)  # what the guide gives receivers
    is_genuine = names["is_genuine"]
    assert is_genuine(key.public_key, headers, body)
    assert not is_genuine(key.public_key, headers, body + b" ")
    assert not is_genuine(key.public_key, headers | {"webhook-timestamp": "1"}, body)
    other = await admin.connections.create_webhook("other", receiver.url, signature_scheme=SIGNATURE_SCHEME_ED25519)
    assert not is_genuine(other.signing_keys[0].public_key, headers, body)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"signature_scheme": SIGNATURE_SCHEME_ED25519, "signing_secret": "whsec_" + "A" * 32}, "signing_secret"),
        ({"signature_scheme": SIGNATURE_SCHEME_ED25519, "body_signature": True}, "webhook.body_signature"),
        ({"signing_secret": "whsec_" + "A" * 33}, "signing_secret"),
        ({"headers": {"Host": "elsewhere"}}, "webhook.headers"),
        ({"headers": {"x-empty": ""}}, "webhook.headers"),
        ({"url": ""}, "webhook.url"),
        ({"url": "http://169.254.169.254/"}, "webhook.url"),
    ],
)
@pytest.mark.parametrize("validate_only", [False, True])
async def test_what_can_not_be_is_refused(
    admin: Any, receiver: Receiver, fields: dict[str, Any], field: str, validate_only: bool
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await admin.connections.create_webhook(
            "refused", **{"url": receiver.url, "validate_only": validate_only} | fields
        )
    assert {path for path, _ in refusal.value.violations} == {field}


async def test_validating_checks_everything_and_makes_nothing(relay: Relay, admin: Any, receiver: Receiver) -> None:
    before = await relay.sql("SELECT * FROM connections ORDER BY id")
    secrets = await relay.sql("SELECT * FROM connection_secrets ORDER BY id")
    would_be = await admin.connections.create_webhook(
        "validated", receiver.url, headers={"x-a": "1"}, default=True, validate_only=True
    )
    assert (would_be.id, would_be.signing_secret, len(would_be.signing_keys)) == ("", "", 0)
    assert (would_be.name, would_be.default, dict(would_be.webhook.headers)) == ("validated", True, {"x-a": ""})
    assert await relay.sql("SELECT * FROM connections ORDER BY id") == before
    assert await relay.sql("SELECT * FROM connection_secrets ORDER BY id") == secrets
    (event,) = await relay.sql("SELECT * FROM audit_events WHERE reason = 'VALIDATE_ONLY'")
    assert (event["action"], event["status"], event["target"]) == ("ConnectionsService.CreateConnection", "success", "")
    await admin.connections.create_webhook("taken", receiver.url)
    with pytest.raises(AlreadyExists):
        await admin.connections.create_webhook("taken", receiver.url, validate_only=True)
