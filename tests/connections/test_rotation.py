"""RotateSecret: what receivers can verify at every moment of it."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import standardwebhooks
from relay import aio
from relay.errors import FailedPrecondition, InvalidRequest, Unavailable
from relay.v1.actions_pb2 import EXECUTION_STATE_SUCCESS
from relay.v1.connections_pb2 import SIGNATURE_SCHEME_ED25519, SIGNATURE_SCHEME_HMAC_SHA256, SigningKey

from relay_grpc.actions import signing
from relay_grpc.bootstrap import bootstrap
from relay_grpc.connections import secret_store
from tests.connections.calls import change, deliver, new
from tests.harness import Databases, Receiver, Relay, settings_for
from tests.processes import started

GIVEN = "whsec_" + "QUJD" * 8


def ends(key: SigningKey) -> bool:
    return key.HasField("expire_time")


async def rotate(client: Any, id_: str, **fields: Any) -> Any:
    return await client.connections.rotate_secret(id_, **fields)


async def test_old_and_new_sign_for_the_overlap(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("overlap", receiver.url)
    rotated = await rotate(admin, made.id)
    assert rotated.signing_secret not in ("", made.signing_secret)
    assert [ends(key) for key in rotated.signing_keys] == [False, True]
    assert rotated.signing_keys[1].id == made.signing_keys[0].id
    lasts = rotated.signing_keys[1].expire_time.ToDatetime() - rotated.signing_keys[0].create_time.ToDatetime()
    assert timedelta(0) <= timedelta(hours=24) - lasts < timedelta(seconds=1)
    assert rotated.version == made.version
    assert (await deliver(admin, made.id)).state == EXECUTION_STATE_SUCCESS
    receiver.verify(made.signing_secret)
    receiver.verify(rotated.signing_secret)
    ((headers, _),) = receiver.requests
    assert headers["webhook-signature"].count("v1,") == 2
    await relay.sql("UPDATE connection_secrets SET expires_at = now() WHERE id = $1", made.signing_keys[0].id)
    receiver.requests.clear()
    assert (await deliver(admin, made.id)).state == EXECUTION_STATE_SUCCESS
    receiver.verify(rotated.signing_secret)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        receiver.verify(made.signing_secret)
    assert [key.id for key in (await admin.connections.get(made.id)).signing_keys] == [rotated.signing_keys[0].id]


async def test_without_overlap_the_old_one_is_gone_at_once(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("no overlap", receiver.url, headers={"x-a": "1"})
    rotated = await rotate(admin, made.id, overlap=timedelta(), signing_secret=GIVEN)
    assert rotated.signing_secret == GIVEN
    assert len(rotated.signing_keys) == 1
    rows = await relay.sql("SELECT kind::text FROM connection_secrets WHERE connection_id = $1 ORDER BY 1", made.id)
    assert [row["kind"] for row in rows] == ["headers", "hmac"]
    await deliver(admin, made.id)
    receiver.verify(GIVEN)


async def test_an_overlap_never_makes_a_secret_last_longer(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("shorter", receiver.url)
    first = await rotate(admin, made.id, overlap=timedelta(hours=1))
    second = await rotate(admin, made.id, overlap=timedelta(days=7))
    ended = {key.id: key.expire_time.ToDatetime() for key in second.signing_keys if ends(key)}
    oldest, newer = made.signing_keys[0].id, first.signing_keys[0].id
    assert ended[oldest] == first.signing_keys[1].expire_time.ToDatetime()
    assert ended[newer] - ended[oldest] > timedelta(days=6)
    third = await rotate(admin, made.id, overlap=timedelta(minutes=1))
    latest = max(key.expire_time.ToDatetime() for key in third.signing_keys if ends(key))
    assert latest - third.signing_keys[0].create_time.ToDatetime() <= timedelta(minutes=1)


async def test_x_signature_is_by_the_newest(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("x-signature", receiver.url, body_signature=True)
    signatures = []
    for _ in range(3):
        receiver.requests.clear()
        await deliver(admin, made.id, same="body")
        ((headers, _),) = receiver.requests
        signatures.append(headers["x-signature"])
        await rotate(admin, made.id)
    assert len(set(signatures)) == 3


async def test_the_newest_is_the_last_rotated_whatever_the_clocks_say(
    admin: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id is made by the clock of the instance that rotates, which may be behind that of the one before."""
    made = await admin.connections.create_webhook("clocks", receiver.url, body_signature=True)
    earlier = UUID(int=UUID(made.signing_keys[0].id).int - (60_000 << 80))
    monkeypatch.setattr(secret_store, "uuid7", lambda: earlier)
    rotated = await rotate(admin, made.id)
    assert [key.id for key in rotated.signing_keys] == [str(earlier), made.signing_keys[0].id]
    await deliver(admin, made.id)
    ((headers, body),) = receiver.requests
    raw = signing.decode_secret(rotated.signing_secret)
    assert headers["x-signature"] == signing.body_signature(raw, body)


async def test_ten_sign_at_most(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    for _ in range(9):
        rotated = await rotate(admin, made.id)
    assert len(rotated.signing_keys) == 10
    await deliver(admin, made.id)
    ((headers, _),) = receiver.requests
    assert len(headers["webhook-signature"].split(" ")) == 10
    with pytest.raises(FailedPrecondition) as refusal:
        await rotate(admin, made.id, overlap=timedelta(seconds=1))
    assert refusal.value.reason == "TOO_MANY_SIGNING_KEYS"
    assert len((await rotate(admin, made.id, overlap=timedelta())).signing_keys) == 1


async def test_from_hmac_to_ed25519_and_back(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("both", receiver.url)
    rotated = await rotate(admin, made.id, signature_scheme=SIGNATURE_SCHEME_ED25519)
    assert rotated.signing_secret == ""
    assert [key.scheme for key in rotated.signing_keys] == [SIGNATURE_SCHEME_ED25519, SIGNATURE_SCHEME_HMAC_SHA256]
    await deliver(admin, made.id)
    ((headers, _),) = receiver.requests
    assert [each.partition(",")[0] for each in headers["webhook-signature"].split(" ")] == ["v1a", "v1"]
    receiver.verify(made.signing_secret)
    again = await rotate(admin, made.id, overlap=timedelta())
    assert [key.scheme for key in again.signing_keys] == [SIGNATURE_SCHEME_ED25519]
    assert again.signing_keys[0].public_key not in ("", rotated.signing_keys[0].public_key)
    with pytest.raises(InvalidRequest, match="signing_secret: is made by the server for Ed25519"):
        await rotate(admin, made.id, signing_secret=GIVEN)
    back = await rotate(admin, made.id, signing_secret=GIVEN, signature_scheme=SIGNATURE_SCHEME_HMAC_SHA256)
    assert [key.scheme for key in back.signing_keys] == [SIGNATURE_SCHEME_HMAC_SHA256, SIGNATURE_SCHEME_ED25519]


async def test_x_signature_keeps_its_hmac_secret(admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url, body_signature=True)
    with pytest.raises(InvalidRequest, match="signature_scheme: X-Signature needs an HMAC secret"):
        await rotate(admin, made.id, signature_scheme=SIGNATURE_SCHEME_ED25519)
    await change(admin, made, "webhook.body_signature")
    await rotate(admin, made.id, signature_scheme=SIGNATURE_SCHEME_ED25519)


async def test_rotations_at_one_time_all_count(admin: Any, receiver: Receiver) -> None:
    made = await admin.connections.create_webhook("concurrent", receiver.url)
    answers = await asyncio.gather(*(rotate(admin, made.id) for _ in range(8)))
    found = await admin.connections.get(made.id)
    assert len(found.signing_keys) == 9
    assert [ends(key) for key in found.signing_keys] == [False] + [True] * 8
    await deliver(admin, made.id)
    for secret in (made.signing_secret, *(answer.signing_secret for answer in answers)):
        receiver.verify(secret)


@pytest.mark.long
async def test_every_delivery_during_rotations_verifies(
    admin: Any, receiver: Receiver, long: bool, figure: Callable[[str], None]
) -> None:
    """With an overlap and without one: by a secret that was told to the receiver's people."""
    made = await admin.connections.create_webhook("continuous", receiver.url)
    secrets, rotations = [made.signing_secret], 300 if long else 30

    async def rotating() -> None:
        for i in range(rotations):
            rotated = await rotate(admin, made.id, overlap=timedelta(hours=i % 3))
            secrets.append(rotated.signing_secret)

    async def delivering() -> None:
        while not task.done():
            assert (await deliver(admin, made.id)).state == EXECUTION_STATE_SUCCESS

    task = asyncio.create_task(rotating())
    await asyncio.gather(task, *(delivering() for _ in range(4)))
    keys = [standardwebhooks.Webhook(secret) for secret in secrets]
    for headers, body in receiver.requests:
        assert any(_verifies(key, headers, body) for key in keys)
    assert len(receiver.requests) > 4
    figure(f"{len(receiver.requests)} deliveries during {rotations} rotations, each verified")


def _verifies(key: standardwebhooks.Webhook, headers: dict[str, str], body: bytes) -> bool:
    try:
        key.verify(body, headers)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


async def test_a_crash_in_the_middle_leaves_what_was(databases: Databases, receiver: Receiver, tmp_path: Path) -> None:
    async with databases.new() as url:
        keys = (await bootstrap(url, settings_for(tmp_path))).keys
        async with started(url, tmp_path, RELAY_FAILPOINT="secret.rotating:1") as server:
            async with aio.connect(server.listen, api_key=keys["admin"]) as client:
                made = await client.connections.create_webhook("crash", receiver.url)
                with pytest.raises(Unavailable):
                    await rotate(client, made.id)
            await server.process.wait()
        async with started(url, tmp_path) as server, aio.connect(server.listen, api_key=keys["admin"]) as client:
            found = await client.connections.get(made.id)
            assert found.signing_keys == made.signing_keys
            assert (await deliver(client, made.id)).state == EXECUTION_STATE_SUCCESS
            receiver.verify(made.signing_secret)
            assert len((await rotate(client, made.id)).signing_keys) == 2
