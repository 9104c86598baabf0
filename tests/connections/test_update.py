"""UpdateConnection: by mask, by version, and what it does to previews, to the default and to a connection's health."""

from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.duration_pb2 import Duration
from relay.errors import AlreadyExists, Contention, FailedPrecondition, InvalidRequest, NotFound
from relay.v1.actions_pb2 import EXECUTION_STATE_SUCCESS
from relay.v1.connections_pb2 import (
    SIGNATURE_SCHEME_ED25519,
    Connection,
    RetryPolicy,
    WebhookConfiguration,
)

from tests.connections.calls import ELSEWHERE, change, deliver, new
from tests.harness import Receiver, Relay


async def test_a_mask_changes_its_own_fields_alone(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url, headers={"x-a": "1"}, attempt_timeout=timedelta(seconds=3))
    changed = await change(admin, made, "webhook.url", name="not asked for", webhook={"url": ELSEWHERE})
    assert changed.webhook.url == ELSEWHERE
    assert changed.version == 2
    made.webhook.url, made.version = ELSEWHERE, 2
    made.update_time.CopyFrom(changed.update_time)
    assert changed == made
    assert await admin.connections.get(made.id) == changed


async def test_all_of_webhook_is_all_of_its_fields(admin: Any, receiver: Receiver) -> None:
    made = await new(
        admin,
        receiver.url,
        headers={"x-a": "1"},
        attempt_timeout=timedelta(seconds=3),
        retry_delays=[],
        body_signature=True,
    )
    changed = await change(admin, made, "webhook", webhook={"url": ELSEWHERE})
    assert changed.webhook == WebhookConfiguration(url=ELSEWHERE)
    assert not changed.webhook.HasField("retry_policy")
    assert not changed.webhook.HasField("timeout")


@pytest.mark.parametrize(
    ("fields", "values", "version"),
    [
        (["name"], {"name": "another name"}, 1),
        (["enabled"], {}, 1),
        (["default"], {"default": True}, 1),
        (["webhook.url"], {"webhook": {"url": ELSEWHERE}}, 2),
        (["webhook.body_signature"], {"webhook": {"body_signature": True}}, 2),
        (["webhook.headers"], {"webhook": {"headers": {"x-a": "2"}}}, 2),
        (["webhook.headers"], {"webhook": {"headers": {"x-a": ""}}}, 1),
        (["webhook.headers"], {"webhook": {"headers": {"x-a": "1"}}}, 1),
        (["webhook.headers"], {"webhook": {"headers": {"x-a": "", "x-b": "1"}}}, 2),
        (["webhook.headers"], {}, 2),
        (["webhook.retry_policy"], {"webhook": {"retry_policy": RetryPolicy()}}, 2),
        (["webhook.retry_policy"], {}, 1),
        (["webhook.timeout"], {"webhook": {"timeout": Duration(seconds=9)}}, 2),
        (["name", "webhook.timeout"], {"name": "timely", "webhook": {"timeout": Duration(seconds=9)}}, 2),
    ],
)
async def test_the_version_counts_what_changes_deliveries(
    admin: Any, receiver: Receiver, fields: list[str], values: dict[str, Any], version: int
) -> None:
    made = await new(admin, receiver.url, headers={"x-a": "1"})
    preview = await admin.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id)
    changed = await change(admin, made, *fields, **values)
    assert changed.version == version
    if "enabled" in fields:
        await change(admin, made, "enabled", enabled=True)
    if version == 1:
        assert (await admin.actions.execute(preview)).state == EXECUTION_STATE_SUCCESS
    else:
        with pytest.raises(FailedPrecondition) as drifted:
            await admin.actions.execute(preview)
        assert (drifted.value.reason, drifted.value.metadata["fields"]) == ("PREVIEW_DRIFTED", "connection_version")
        assert receiver.requests == []


@pytest.mark.parametrize(
    ("fields", "values", "problem"),
    [
        ([], {}, "update_mask: names no field"),
        (["signing_secret"], {}, "update_mask: 'signing_secret' can't be changed"),
        (["webhook.retry_policy.delays"], {}, "update_mask: 'webhook.retry_policy.delays' can't be changed"),
        (["version", "name"], {"name": "n"}, "update_mask: 'version' can't be changed"),
        (["*"], {}, "update_mask: '*' can't be changed"),
        (["name"], {}, "connection.name: has 1 to 64 characters"),
        (["name"], {"name": "x" * 65}, "connection.name: has 1 to 64 characters"),
        (["webhook"], {}, "connection.webhook.url: is needed"),
        (["webhook.url"], {"webhook": {"url": "http://10.0.0.1/"}}, "connection.webhook.url: the destination is not"),
        (["disabled_reason"], {"disabled_reason": "why"}, "connection.disabled_reason: an enabled connection has none"),
        (
            ["enabled", "disabled_reason"],
            {"enabled": True, "disabled_reason": "why"},
            "connection.disabled_reason: an enabled connection has none",
        ),
        (["webhook.headers"], {"webhook": {"headers": {"x-none": ""}}}, "connection.webhook.headers: a value is empty"),
        (["webhook.headers"], {"webhook": {"headers": {"te": "x"}}}, "connection.webhook.headers: te is set by Relay"),
    ],
)
async def test_what_can_not_be_is_refused_and_changes_nothing(
    admin: Any, receiver: Receiver, fields: list[str], values: dict[str, Any], problem: str
) -> None:
    made = await new(admin, receiver.url)
    with pytest.raises(InvalidRequest, match=problem.replace("*", r"\*")):
        await change(admin, made, *fields, **values)
    assert await admin.connections.get(made.id) == made


async def test_an_id_that_is_none_and_one_of_nobody(admin: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"connection\.id: should be a UUID"):
        await admin.connections.update(Connection(id="x", name="n"), ["name"])
    with pytest.raises(NotFound):
        await admin.connections.update(Connection(id=str(uuid4()), name="n"), ["name"])


async def test_x_signature_needs_an_hmac_secret(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url, signature_scheme=SIGNATURE_SCHEME_ED25519)
    with pytest.raises(InvalidRequest, match=r"connection\.webhook\.body_signature: X-Signature needs an HMAC secret"):
        await change(admin, made, "webhook.body_signature", webhook={"body_signature": True})


async def test_a_name_that_is_taken(admin: Any, receiver: Receiver) -> None:
    made, other = await new(admin, receiver.url), await new(admin, receiver.url)
    with pytest.raises(AlreadyExists):
        await change(admin, made, "name", name=other.name)
    assert (await change(admin, made, "name", name=made.name)).name == made.name


async def test_a_version_that_it_is_no_longer_at(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    await change(admin, made, "webhook.url", webhook={"url": ELSEWHERE})
    made.webhook.url = receiver.url
    with pytest.raises(Contention, match="at version 2 by now"):
        await admin.connections.update(made, ["webhook.url"])
    made.version = 2
    assert (await admin.connections.update(made, ["webhook.url"])).version == 3


async def test_validating_tells_what_would_be_and_changes_nothing(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url, headers={"x-a": "1"})
    tables = "SELECT * FROM connections c LEFT JOIN connection_secrets s ON s.connection_id = c.id ORDER BY c.id, s.id"
    before = await relay.sql(tables)
    asked = Connection(id=made.id, name="validated", default=True, webhook={"url": ELSEWHERE, "headers": {"x-b": "1"}})
    fields = ["name", "default", "webhook"]
    would_be = await admin.connections.update(asked, fields, validate_only=True)
    assert (would_be.name, would_be.default, would_be.version) == ("validated", True, 2)
    assert would_be.webhook == WebhookConfiguration(url=ELSEWHERE, headers={"x-b": ""})
    assert await relay.sql(tables) == before
    events = await relay.sql("SELECT * FROM audit_events WHERE reason = 'VALIDATE_ONLY'")
    assert [(row["action"], row["target"]) for row in events] == [
        ("ConnectionsService.UpdateConnection", f"connections/{made.id}")
    ]
    asked.version = 7
    with pytest.raises(Contention):
        await admin.connections.update(asked, fields, validate_only=True)


async def test_headers_whose_key_is_gone_are_given_anew(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url, headers={"x-a": "1", "x-b": "2"})
    await relay.sql(
        "UPDATE connection_secrets SET encryption_key_id = 'gone' WHERE connection_id = $1 AND kind = 'headers'",
        made.id,
    )
    with pytest.raises(InvalidRequest, match="can't be decrypted: give all of them anew"):
        await change(admin, made, "webhook.headers", webhook={"headers": {"x-a": "", "x-b": "3"}})
    await change(admin, made, "webhook.headers", webhook={"headers": {"x-a": "4", "x-b": "3"}})
    assert (await deliver(admin, made.id)).state == EXECUTION_STATE_SUCCESS
    ((headers, _),) = receiver.requests
    assert (headers["x-a"], headers["x-b"]) == ("4", "3")


async def test_the_event_names_the_connection(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    await change(admin, made, "name", name=f"renamed {uuid4()}")
    with pytest.raises(InvalidRequest):
        await change(admin, made, "webhook.headers", webhook={"headers": {"te": "x"}})
    events = await relay.sql("SELECT * FROM audit_events WHERE target = $1 ORDER BY id", f"connections/{made.id}")
    assert [(row["action"].partition(".")[2], row["status"], row["reason"]) for row in events] == [
        ("CreateConnection", "success", ""),
        ("UpdateConnection", "success", ""),
        ("UpdateConnection", "failed", "INVALID_REQUEST"),
    ]
    assert events[1]["provider"] == "independent"
