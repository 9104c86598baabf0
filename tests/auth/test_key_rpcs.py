"""The life of a key over the wire: made, looked at, rotated, verified and revoked."""

import asyncio
import random
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from relay.errors import FailedPrecondition, NotFound, Unauthenticated
from relay.v1 import auth_pb2, auth_pb2_grpc

from tests.auth.forgery import forged, mistyped
from tests.harness import Receiver, Relay
from tests.rpc.wire import Wire, wired

CREATE = "AuthService.CreateApiKey"
IN_A_MONTH = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
HOUR = timedelta(hours=1)
# What a rotation does not copy: who the key is, and what happened to it.
OF_ONE_KEY = {"id", "publicId", "creator", "createTime", "lastUsedTime", "secret", "retireTime"}


def seconds(moment: Any) -> float:
    return float(moment.ToDatetime(UTC).timestamp())


async def works(relay: Relay, key: Any) -> bool:
    async with relay.connect(key.secret) as client:
        try:
            return (await client.auth.who_am_i()).id == key.id
        except Unauthenticated:
            return False


async def test_a_key_is_told_in_full_but_its_secret_only_once(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        me = await client.auth.who_am_i()
        made = await client.auth.create_api_key(
            "once",
            "developer",
            scopes=["actions:read", "actions:execute"],
            expire_time=IN_A_MONTH,
            calls_per_minute=60,
            executions_per_minute=5,
        )
        assert made.secret.split("_")[2] == made.public_id
        assert (made.name, made.role, made.creator) == ("once", "developer", me.id)
        assert made.scopes == ["actions:execute", "actions:read"]
        assert made.expire_time.ToDatetime(UTC) == IN_A_MONTH
        assert (made.limits.calls_per_minute, made.limits.executions_per_minute) == (60, 5)
        assert not any(made.HasField(field) for field in ("revoke_time", "last_used_time", "retire_time"))

        secret, made.secret = made.secret, ""
        assert await client.auth.get_api_key(made.id) == made
        assert made in [key async for key in client.auth.list_api_keys()]
        revoked = await client.auth.revoke_api_key(made.id)
        assert revoked.HasField("revoke_time")
        assert await client.auth.get_api_key(made.id) == revoked
        assert secret not in str(revoked)


async def test_a_key_without_limits_has_none_to_tell(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("free", "viewer")
        assert not made.HasField("limits")
        half = await client.auth.create_api_key("half", "viewer", executions_per_minute=5)
        assert (half.limits.calls_per_minute, half.limits.executions_per_minute) == (0, 5)


async def test_a_key_keeps_scopes_of_its_own_role_alone(relay: Relay) -> None:
    async with wired(relay) as wire:
        request = auth_pb2.CreateApiKeyRequest(name="made", role="viewer", scopes=["actions:read", "keys:write"])
        answer = await wire.call(CREATE, request)
        assert (answer.code, set(answer.violations)) == ("INVALID_ARGUMENT", {"scopes"})
        assert "keys:write" in answer.violations["scopes"]
        answer = await wire.call(CREATE, auth_pb2.CreateApiKeyRequest(name="made", role="no-such-role"))
        assert (answer.code, answer.reason) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")
        assert "'no-such-role'" in answer.text


async def test_keys_that_do_not_exist_and_keys_of_others_are_not_found(relay: Relay) -> None:
    async with relay.connect((await relay.new_tenant()).admin) as other:
        theirs = await other.auth.create_api_key("theirs", "viewer")
        async with relay.connect(relay.tenant.admin) as client:
            for id_ in (theirs.id, str(uuid4())):
                for call in (
                    client.auth.get_api_key(id_),
                    client.auth.rotate_api_key(id_, HOUR),
                    client.auth.revoke_api_key(id_),
                ):
                    with pytest.raises(NotFound, match=f"API key '{id_}' does not exist in this workspace"):
                        await call
        assert MessageToDict(await other.auth.get_api_key(theirs.id)).keys().isdisjoint({"revokeTime", "retireTime"})


async def test_a_rotation_copies_everything(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        me = await client.auth.who_am_i()
        await client.auth.create_role("copied", "developer", ["actions:read", "actions:execute"])
        old = await client.auth.create_api_key(
            "rotated",
            "copied",
            scopes=["actions:execute"],
            expire_time=IN_A_MONTH,
            calls_per_minute=60,
            executions_per_minute=5,
        )
        async with relay.connect(old.secret) as holder:
            await holder.auth.who_am_i()
        new = await client.auth.rotate_api_key(old.id, HOUR)
        assert new.id != old.id
        assert new.secret.split("_")[2] == new.public_id != old.public_id
        assert new.creator == me.id
        assert not new.HasField("retire_time")
        was, is_ = ({k: v for k, v in MessageToDict(key).items() if k not in OF_ONE_KEY} for key in (old, new))
        assert is_ == was
        assert new.lineage_id == old.lineage_id == old.id
        retire_time = (await client.auth.get_api_key(old.id)).retire_time
    assert abs(seconds(retire_time) - seconds(new.create_time) - 3600) < 5
    assert await works(relay, old)
    assert await works(relay, new)


async def test_a_rotated_key_works_until_its_overlap_is_over_and_not_after(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        old = await client.auth.create_api_key("overlapping", "viewer")
        await client.auth.rotate_api_key(old.id, timedelta(seconds=1))
        retires = seconds((await client.auth.get_api_key(old.id)).retire_time)
    accepted = []
    async with relay.connect(old.secret) as holder:
        while True:
            began = time.time()
            try:
                await holder.auth.who_am_i()
            except Unauthenticated:
                break
            accepted.append(began)
            await asyncio.sleep(0.02)
    assert accepted
    assert max(accepted) < retires <= time.time()


async def test_without_an_overlap_the_old_key_ends_at_once(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        old = await client.auth.create_api_key("replaced", "viewer")
        assert await works(relay, old)
        new = await client.auth.rotate_api_key(old.id, timedelta())
        assert (await works(relay, old), await works(relay, new)) == (False, True)


async def test_no_overlap_goes_past_the_keys_own_expiry(relay: Relay) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    async with relay.connect(relay.tenant.admin) as client:
        old = await client.auth.create_api_key("expiring", "viewer", expire_time=soon)
        new = await client.auth.rotate_api_key(old.id, timedelta(days=30))
        assert new.expire_time == old.expire_time
        await asyncio.sleep((soon - datetime.now(UTC)).total_seconds())
        assert (await works(relay, old), await works(relay, new)) == (False, False)
        assert (await client.auth.verify_api_key(old.secret)).code == auth_pb2.VERIFICATION_CODE_EXPIRED


async def test_a_second_rotation_can_shorten_an_overlap_and_never_prolongs_it(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        old = await client.auth.create_api_key("twice", "viewer")

        async def retires(overlap: timedelta) -> float:
            await client.auth.rotate_api_key(old.id, overlap)
            return seconds((await client.auth.get_api_key(old.id)).retire_time)

        first = await retires(HOUR)
        assert await retires(timedelta(days=1)) == first
        assert await retires(timedelta(minutes=1)) < first - 3000


@pytest.mark.parametrize("end", ["revoked", "expired", "retired"])
async def test_a_key_that_no_longer_works_is_not_rotated(relay: Relay, end: str) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        key = await client.auth.create_api_key(end, "viewer")
        if end == "revoked":
            await client.auth.revoke_api_key(key.id)
        elif end == "retired":
            await client.auth.rotate_api_key(key.id, timedelta())
        else:
            await relay.sql("UPDATE api_keys SET expires_at = now() WHERE id = $1", UUID(key.id))
        before = await keys_named(relay, end)
        with pytest.raises(FailedPrecondition) as refusal:
            await client.auth.rotate_api_key(key.id, HOUR)
        assert refusal.value.reason == "KEY_INACTIVE"
        assert await keys_named(relay, end) == before


async def keys_named(relay: Relay, name: str) -> list[Any]:
    return await relay.sql("SELECT id, expires_at, retires_at, revoked_at FROM api_keys WHERE name = $1", name)


async def test_of_rotations_at_once_without_an_overlap_one_succeeds(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        key = await client.auth.create_api_key("contended", "viewer")
        ended = await asyncio.gather(
            *(client.auth.rotate_api_key(key.id, timedelta()) for _ in range(5)), return_exceptions=True
        )
    assert sorted(getattr(one, "reason", "made") for one in ended) == ["KEY_INACTIVE"] * 4 + ["made"]
    assert len(await keys_named(relay, "contended")) == 2


async def test_what_the_old_key_previewed_the_new_one_executes(relay: Relay, receiver: Receiver) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        await client.connections.create_webhook("rotation", receiver.url, default=True)
        old = await client.auth.create_api_key("previews", "developer")
        async with relay.connect(old.secret) as holder:
            previews = [await holder.actions.preview("webhook.send", {"payload": {"n": n}}) for n in range(2)]
        stranger = await client.auth.create_api_key("stranger", "developer")
        new = await client.auth.rotate_api_key(old.id, timedelta())
        newer = await client.auth.rotate_api_key(new.id, HOUR)
    async with relay.connect(stranger.secret) as holder:
        with pytest.raises(NotFound):
            await holder.actions.execute(previews[0])
    for key, preview in zip((new, newer), previews, strict=True):
        async with relay.connect(key.secret) as holder:
            assert await holder.actions.get_preview(preview.id) == preview
            execution = await holder.actions.execute(preview)
            assert execution.last_attempt.status_code == 200
    assert len(receiver.requests) == 2


async def test_a_caller_that_goes_away_has_rotated_or_not_and_has_one_event(relay: Relay) -> None:
    chance = random.Random(4711)
    async with relay.connect(relay.tenant.admin) as client:
        victims = [await client.auth.create_api_key("abandoned", "viewer") for _ in range(30)]
        began = time.monotonic()
        await client.auth.rotate_api_key(victims.pop().id, HOUR)
        took = time.monotonic() - began
    async with grpc.aio.insecure_channel(str(relay.app.listen)) as channel:
        stub = auth_pb2_grpc.AuthServiceStub(channel)
        credentials = ("authorization", f"Bearer {relay.tenant.admin}")
        for victim in victims:
            request = auth_pb2.RotateApiKeyRequest(id=victim.id)
            call: Any = stub.RotateApiKey(request, metadata=(credentials, ("x-request-id", victim.id)), timeout=20)
            await asyncio.sleep(chance.uniform(0, 2 * took))
            call.cancel()
    await asyncio.sleep(0.5)  # what was under way ends
    outcomes = set()
    for victim in victims:
        logged = await relay.sql("SELECT status, target, reason FROM audit_events WHERE request_id = $1", victim.id)
        rotated = len(await relay.sql("SELECT FROM api_keys WHERE lineage_id = $1", UUID(victim.id))) == 2
        outcome = ("success", "") if rotated else ("failed", "CANCELLED")
        if rotated or logged:  # a call that never arrived leaves nothing
            assert [(row["status"], row["reason"]) for row in logged] == [outcome]
            assert logged[0]["target"] == f"apiKeys/{victim.id}"
        assert await works(relay, victim) != rotated
        outcomes.add(outcome if logged else None)
    assert {("success", ""), ("failed", "CANCELLED")} <= outcomes, "the moments are spread over the whole of the call"


async def verdict(wire: Wire, presented: str, *asked: str) -> Any:
    request = auth_pb2.VerifyApiKeyRequest(key=presented, scopes=asked)
    return (await wire.call("AuthService.VerifyApiKey", request)).reply


async def test_every_verdict_on_a_key(relay: Relay) -> None:
    other = await relay.new_tenant()
    async with relay.connect(relay.tenant.admin) as client:
        made = {}
        for name in ("valid", "revoked", "expired", "retired", "expired and revoked"):
            made[name] = await client.auth.create_api_key(name, "developer", expire_time=IN_A_MONTH)
        for name in ("revoked", "expired and revoked"):
            await client.auth.revoke_api_key(made[name].id)
        successor = await client.auth.rotate_api_key(made["retired"].id, timedelta())
    for name in ("expired", "expired and revoked"):
        await relay.sql("UPDATE api_keys SET expires_at = now() WHERE id = $1", UUID(made[name].id))
    valid = made["valid"].secret
    not_found = {
        "malformed": "x",
        "long": "x" * 256,
        "mistyped": mistyped(valid),
        "of no key": forged(),
        "wrong secret": forged(valid.split("_")[2]),
        "of another workspace": other.admin,
        "with a prefix": f"Bearer {valid}",
    }
    async with wired(relay, relay.tenant.viewer) as wire:  # whoever is a caller may ask
        for name, presented in not_found.items():
            answer = await verdict(wire, presented, "actions:read")
            assert answer == auth_pb2.VerifyApiKeyResponse(code="VERIFICATION_CODE_NOT_FOUND"), name
        for name, code in (
            ("revoked", "REVOKED"),
            ("expired", "EXPIRED"),
            ("retired", "EXPIRED"),
            ("expired and revoked", "REVOKED"),
        ):
            answer = await verdict(wire, made[name].secret)
            assert answer == auth_pb2.VerifyApiKeyResponse(code=f"VERIFICATION_CODE_{code}"), name

        answer = await verdict(wire, valid)
        assert (answer.code, answer.missing_scopes) == (auth_pb2.VERIFICATION_CODE_VALID, [])
        assert answer.principal == (await wire.call("AuthService.WhoAmI", key=valid)).reply
        assert await verdict(wire, valid, "actions:read", "actions:execute") == answer
        assert (await verdict(wire, successor.secret)).principal.id == successor.id

        lacking = await verdict(wire, valid, "keys:write", "actions:read", "no:such", "audit:read")
        assert lacking.code == auth_pb2.VERIFICATION_CODE_INSUFFICIENT_SCOPES
        assert lacking.missing_scopes == ["audit:read", "keys:write", "no:such"]
        assert lacking.principal == answer.principal


async def test_a_verdict_follows_a_revocation_at_once_and_is_no_use_of_the_key(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client, wired(relay) as wire:
        key = await client.auth.create_api_key("asked about", "viewer")
        assert (await verdict(wire, key.secret)).code == auth_pb2.VERIFICATION_CODE_VALID
        await client.auth.revoke_api_key(key.id)
        assert (await verdict(wire, key.secret)).code == auth_pb2.VERIFICATION_CODE_REVOKED
        assert not (await client.auth.get_api_key(key.id)).HasField("last_used_time")
