"""What a presented key costs: one hash when it is first seen, a look-up now and then, and nothing in between."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from relay.errors import PermissionDenied, Unauthenticated

from relay_grpc import errors
from relay_grpc.auth import verifier
from relay_grpc.auth.verifier import HASHER, STATUS_TTL, KeyVerifier
from relay_grpc.db import Database
from relay_grpc.principal import PrincipalType
from relay_grpc.telemetry import Metrics
from tests.auth.forgery import forged, mistyped
from tests.harness import Relay

Instance = tuple[KeyVerifier, Callable[[], int], Database]


@asynccontextmanager
async def an_instance(relay: Relay, status_ttl: float = STATUS_TTL) -> AsyncIterator[Instance]:
    """A verifier of its own on the database, the number of hashes it has made, and its connections."""
    metrics = Metrics()
    db = await Database.open(relay.url)
    one = KeyVerifier(db, metrics, status_ttl=status_ttl)
    try:
        yield one, lambda: int(metrics.registry.get_sample_value("relay_key_hashes_total") or 0), db
    finally:
        one.close()
        await db.close()


@pytest.fixture
async def instance(relay: Relay) -> AsyncIterator[Instance]:
    async with an_instance(relay) as made:
        yield made


async def refused(verifier: KeyVerifier, key: str) -> bool:
    """Whether the key is no credential, and for no other reason."""
    try:
        await verifier.verify(key)
    except errors.Unauthenticated:
        return True
    return False


async def test_a_key_becomes_its_principal(relay: Relay, instance: Instance) -> None:
    principal = await instance[0].verify(relay.tenant.viewer)
    assert (principal.type, principal.role) == (PrincipalType.API_KEY, "viewer")
    assert principal.workspace_id == relay.tenant.workspace_id
    assert principal.scopes == {"actions:read", "actions:preview", "connections:read"}
    assert principal.caller == f"key:{principal.id}"


async def test_a_key_is_hashed_once_however_often_it_comes(relay: Relay, instance: Instance) -> None:
    one, hashes, _ = instance
    for _ in range(3):
        await asyncio.gather(*(one.verify(relay.tenant.admin) for _ in range(50)))
        assert hashes() == 1


async def test_a_known_key_needs_no_database_while_its_status_is_fresh(relay: Relay, instance: Instance) -> None:
    one, _, db = instance
    principal = await one.verify(relay.tenant.admin)
    await db.close()
    assert await one.verify(relay.tenant.admin) == principal
    with pytest.raises(errors.DependencyUnavailable):
        await one.verify(relay.tenant.developer)


async def test_a_malformed_key_is_refused_without_the_database_and_without_a_hash(
    relay: Relay, instance: Instance
) -> None:
    one, hashes, db = instance
    await db.close()  # a look-up would be another error
    for key in ("", "x" * 60, mistyped(relay.tenant.admin), relay.tenant.admin[:-1], f"{relay.tenant.admin} "):
        assert await refused(one, key)
    assert hashes() == 0


async def test_an_unknown_id_costs_one_hash_like_a_wrong_secret(relay: Relay, instance: Instance) -> None:
    one, hashes, _ = instance
    unknown, wrong = forged(), forged(relay.tenant.admin.split("_")[2])
    for expected, key in ((1, unknown), (2, wrong), (2, unknown), (2, wrong)):
        assert await refused(one, key)
        assert hashes() == expected


async def test_a_status_that_is_read_again_costs_no_hash(relay: Relay) -> None:
    async with an_instance(relay, status_ttl=0.0) as (one, hashes, _):
        for _ in range(5):
            await one.verify(relay.tenant.admin)
        assert hashes() == 1


async def test_a_revoked_key_is_refused_at_once_here_and_after_the_ttl_elsewhere(relay: Relay) -> None:
    async with (
        relay.connect(relay.tenant.admin) as client,
        an_instance(relay, status_ttl=60.0) as (patient, _, _),
        an_instance(relay, status_ttl=0.0) as (eager, _, _),
    ):
        made = await client.auth.create_api_key("to be revoked", "viewer")
        async with relay.connect(made.secret) as holder:
            assert (await holder.auth.who_am_i()).id == made.id
            assert (await patient.verify(made.secret)).id == made.id
            assert (await eager.verify(made.secret)).id == made.id

            revoked = await client.auth.revoke_api_key(made.id)
            assert revoked.HasField("revoke_time")
            with pytest.raises(Unauthenticated):
                await holder.auth.who_am_i()
        assert await refused(eager, made.secret)
        assert (await patient.verify(made.secret)).id == made.id  # as fresh as it was promised to be
        patient.forget(UUID(made.id))
        assert await refused(patient, made.secret)
        assert (await client.auth.revoke_api_key(made.id)).revoke_time == revoked.revoke_time


async def test_another_instances_revocation_is_noticed_when_the_status_has_aged(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client, an_instance(relay, status_ttl=0.2) as (one, _, _):
        made = await client.auth.create_api_key("aging", "viewer")
        assert (await one.verify(made.secret)).id == made.id
        await client.auth.revoke_api_key(made.id)
        await asyncio.sleep(0.2)
        assert await refused(one, made.secret)


async def test_a_revocation_that_a_look_up_overtook_is_not_believed_away(
    relay: Relay, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _, _ = instance
    hashing, revoked = threading.Event(), threading.Event()

    def slowly(key_hash: str, presented: str) -> bool:
        hashing.set()
        return revoked.wait(30) and HASHER.verify(key_hash, presented)

    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("overtaken", "viewer")
        monkeypatch.setattr(verifier, "_verify", slowly)
        first_use = asyncio.create_task(one.verify(made.secret))
        await asyncio.to_thread(hashing.wait, 30)
        await client.auth.revoke_api_key(made.id)
        one.forget(UUID(made.id))
        revoked.set()
        await first_use  # it was valid when it was looked up
    assert await refused(one, made.secret)


async def test_a_key_can_not_outlive_its_maker(relay: Relay) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    async with relay.connect(relay.tenant.admin) as client:
        maker = await client.auth.create_api_key("maker", "admin", expire_time=ends)
    async with relay.connect(maker.secret) as client:
        for later in (None, ends + timedelta(seconds=1)):
            with pytest.raises(PermissionDenied) as refusal:
                await client.auth.create_api_key("heir", "viewer", expire_time=later)
            assert refusal.value.reason == "CEILING_EXCEEDED"
        heir = await client.auth.create_api_key("heir", "viewer", expire_time=ends)
        assert heir.expire_time.ToDatetime(UTC) == ends


async def test_an_expired_key_is_refused_from_that_moment_on(
    relay: Relay, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return super().now(tz) + timedelta(hours=2)

    one, hashes, _ = instance
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("short", "viewer", expire_time=in_an_hour)
    assert (await one.verify(made.secret)).expires_at == in_an_hour
    monkeypatch.setattr(verifier, "datetime", Later)
    assert await refused(one, made.secret)
    assert hashes() == 1


async def test_the_event_loop_goes_on_while_keys_are_hashed(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = 0
    during: list[int] = []
    verify = verifier._verify

    def watched(*arguments: str) -> bool:
        before = rounds
        result = verify(*arguments)
        during.append(rounds - before)
        return result

    async def go_round() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(verifier, "_verify", watched)
    going = asyncio.create_task(go_round())
    await asyncio.gather(*(refused(instance[0], forged()) for _ in range(4)))
    going.cancel()
    assert len(during) == 4
    assert min(during) > 5


async def test_too_many_new_keys_at_once_are_told_to_come_again(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(verifier, "MAX_WAITING_HASHES", 3)
    monkeypatch.setattr(verifier, "_verify", lambda *_: gate.wait() and False)
    calls = [asyncio.create_task(refused(instance[0], forged())) for _ in range(8)]
    try:
        for first in itertools.islice(asyncio.as_completed(calls), 5):
            with pytest.raises(errors.Overloaded):
                await first
    finally:
        gate.set()
    assert (await asyncio.gather(*calls, return_exceptions=True)).count(True) == 3


async def test_a_caller_that_goes_away_takes_nobody_with_it(relay: Relay, instance: Instance) -> None:
    one, hashes, _ = instance
    first, second = (asyncio.create_task(one.verify(relay.tenant.admin)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).role == "admin"
    assert hashes() == 1


async def test_the_memory_of_proofs_is_bounded(
    relay: Relay, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, hashes, _ = instance
    monkeypatch.setattr(verifier, "CACHE_SIZE", 2)
    await one.verify(relay.tenant.admin)
    await asyncio.gather(*(refused(one, forged()) for _ in range(2)))
    assert hashes() == 3
    await one.verify(relay.tenant.admin)  # it was the oldest, so it was forgotten and is proven anew
    assert hashes() == 4


async def test_the_last_use_of_a_key_is_written_down(relay: Relay, instance: Instance) -> None:
    one, _, _ = instance

    async def last_used(public_id: str) -> Any:
        (row,) = await relay.sql("SELECT last_used_at FROM api_keys WHERE public_id = $1", public_id)
        return row["last_used_at"]

    async with relay.connect(relay.tenant.admin) as client:
        used, unused = [await client.auth.create_api_key(name, "viewer") for name in ("used", "unused")]
    await one.verify(used.secret)
    await refused(one, forged(unused.public_id))
    await one.note_used()
    first = await last_used(used.public_id)
    assert first is not None
    await one.note_used()  # nothing was used since
    assert await last_used(used.public_id) == first
    await one.verify(used.secret)
    await one.note_used()  # within the same minute
    assert await last_used(used.public_id) == first
    await relay.sql(
        "UPDATE api_keys SET last_used_at = now() - interval '2 minutes' WHERE public_id = $1", used.public_id
    )
    await one.verify(used.secret)
    await one.note_used()
    assert await last_used(used.public_id) > first
    assert await last_used(unused.public_id) is None


async def test_the_hashes_are_what_owasp_asks_for(relay: Relay) -> None:
    rows = await relay.sql("SELECT DISTINCT split_part(key_hash, '$', 2), split_part(key_hash, '$', 4) FROM api_keys")
    assert [tuple(row) for row in rows] == [("argon2id", "m=19456,t=2,p=1")]
    assert (HASHER.salt_len, HASHER.hash_len) == (16, 32)
