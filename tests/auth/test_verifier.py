"""What a presented key costs: nothing when it is known, a MAC or one hash when it is first seen, and little a guess."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from relay.errors import PermissionDenied, Unauthenticated

from relay_grpc import errors
from relay_grpc.auth import hashes as hashing
from relay_grpc.auth import keys, store, verifier
from relay_grpc.auth.proofs import HASHER, matches
from relay_grpc.auth.verifier import Examined, KeyState
from relay_grpc.datafolder import new_key_material
from relay_grpc.principal import PrincipalType
from relay_grpc.setting_types import NamedKey
from tests.auth.forgery import forged, mistyped
from tests.auth.instance import Instance, an_instance
from tests.harness import Relay


@pytest.fixture
async def instance(relay: Relay) -> AsyncIterator[Instance]:
    async with an_instance(relay.url, relay.settings.key_peppers) as made:
        yield made


@pytest.fixture
async def stranger(relay: Relay) -> AsyncIterator[Instance]:
    """An instance that lacks the pepper of every MAC, so that it has to hash."""
    async with an_instance(relay.url, [a_pepper()]) as made:
        yield made


def a_pepper() -> NamedKey:
    made: NamedKey = NamedKey.parse(new_key_material()["RELAY_KEY_PEPPERS"])
    return made


async def a_key(relay: Relay, role: str = "viewer", **options: Any) -> Any:
    async with relay.connect(relay.tenant.admin) as client:
        return await client.auth.create_api_key(uuid4().hex, role, **options)


async def pepper_of(relay: Relay, key: str) -> str | None:
    """The pepper of the key's MAC, as it is stored."""
    (row,) = await relay.sql("SELECT pepper_id FROM api_keys WHERE public_id = $1", keys.public_id_of(key))
    pepper_id: str | None = row["pepper_id"]
    return pepper_id


async def test_a_key_becomes_its_principal(relay: Relay, instance: Instance) -> None:
    principal = await instance.verify(relay.tenant.viewer)
    assert (principal.type, principal.role) == (PrincipalType.API_KEY, "viewer")
    assert principal.workspace_id == relay.tenant.workspace_id
    assert principal.scopes == {"actions:read", "actions:preview", "connections:read"}
    assert principal.caller == f"key:{principal.id}"


async def test_a_key_is_hashed_once_however_often_it_comes(relay: Relay, stranger: Instance) -> None:
    for _ in range(3):
        await asyncio.gather(*(stranger.verify(relay.tenant.admin) for _ in range(50)))
        assert stranger.hashes == 1


async def test_a_key_whose_mac_can_be_checked_is_never_hashed(relay: Relay, instance: Instance) -> None:
    for key in (relay.tenant.admin, relay.tenant.developer, relay.tenant.viewer, (await a_key(relay)).secret):
        await instance.verify(key)
    assert instance.hashes == 0


async def test_a_known_key_needs_no_database_while_its_status_is_fresh(relay: Relay, instance: Instance) -> None:
    principal = await instance.verify(relay.tenant.admin)
    await instance.db.close()
    assert await instance.verify(relay.tenant.admin) == principal
    with pytest.raises(errors.DependencyUnavailable):
        await instance.verify(relay.tenant.developer)


async def test_a_malformed_key_is_refused_without_the_database_and_without_a_hash(
    relay: Relay, instance: Instance
) -> None:
    await instance.db.close()  # a look-up would be another error
    for key in ("", "x" * 60, mistyped(relay.tenant.admin), relay.tenant.admin[:-1], f"{relay.tenant.admin} "):
        assert await instance.refuses(key)
    assert instance.hashes == 0


async def test_an_unknown_id_costs_one_hash_like_a_wrong_secret(relay: Relay, instance: Instance) -> None:
    unknown, wrong = forged(), forged(keys.public_id_of(relay.tenant.admin) or "")
    for expected, key in ((1, unknown), (2, wrong), (2, unknown), (2, wrong)):
        assert await instance.refuses(key)
        assert instance.hashes == expected


async def test_a_guess_that_comes_again_is_read_again_and_never_hashed_again(relay: Relay) -> None:
    async with an_instance(relay.url, relay.settings.key_peppers, status_ttl=0.0) as eager:
        for key in (forged(), forged(keys.public_id_of(relay.tenant.admin) or "")) * 5:
            assert await eager.refuses(key)
        assert eager.hashes == 2


async def test_a_status_that_is_read_again_costs_no_hash(relay: Relay) -> None:
    async with an_instance(relay.url, [a_pepper()], status_ttl=0.0) as eager:
        for _ in range(5):
            await eager.verify(relay.tenant.admin)
        assert eager.hashes == 1


async def test_a_revoked_key_is_refused_at_once_where_it_was_revoked_and_soon_elsewhere(relay: Relay) -> None:
    async with (
        relay.connect(relay.tenant.admin) as client,
        an_instance(relay.url, relay.settings.key_peppers, status_ttl=60.0) as other,
    ):
        made = await client.auth.create_api_key("to be revoked", "viewer")
        async with relay.connect(made.secret) as holder:
            assert (await holder.auth.who_am_i()).id == made.id
            assert (await other.verify(made.secret)).id == made.id
            revoked = await client.auth.revoke_api_key(made.id)
            assert revoked.HasField("revoke_time")
            with pytest.raises(Unauthenticated):
                await holder.auth.who_am_i()
        async with asyncio.timeout(10):  # of the 60 s that it would believe without word of it
            while not await other.refuses(made.secret):
                await asyncio.sleep(0.01)
        assert (await client.auth.revoke_api_key(made.id)).revoke_time == revoked.revoke_time


async def test_a_revocation_that_nobody_told_of_is_noticed_when_the_status_has_aged(relay: Relay) -> None:
    async with an_instance(relay.url, relay.settings.key_peppers, status_ttl=0.5) as deaf:
        await deaf.changes.close()
        made = await a_key(relay)
        assert (await deaf.verify(made.secret)).id == made.id
        read_at = asyncio.get_running_loop().time()
        async with relay.connect(relay.tenant.admin) as client:
            await client.auth.revoke_api_key(made.id)
        while not await deaf.refuses(made.secret):
            assert asyncio.get_running_loop().time() < read_at + 5
            await asyncio.sleep(0.01)
        assert asyncio.get_running_loop().time() >= read_at + 0.5 - 0.1  # and it was believed until then


async def test_a_revocation_that_a_look_up_overtook_is_not_believed_away(
    relay: Relay, stranger: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing_now, revoked = threading.Event(), threading.Event()

    def slowly(key_hash: str, presented: str) -> bool:
        hashing_now.set()
        return revoked.wait(30) and matches(key_hash, presented)

    async with relay.connect(relay.tenant.admin) as client:
        made = await client.auth.create_api_key("overtaken", "viewer")
        monkeypatch.setattr(hashing, "matches", slowly)
        first_use = asyncio.create_task(stranger.refuses(made.secret))
        await asyncio.to_thread(hashing_now.wait, 30)
        await client.auth.revoke_api_key(made.id)
        stranger.changes.heard(relay.tenant.workspace_id)
        second_use = asyncio.create_task(stranger.refuses(made.secret))
        revoked.set()
    assert await first_use
    assert await second_use
    assert stranger.hashes == 1


@pytest.mark.timeout(20)
async def test_who_comes_in_the_moment_that_a_look_up_ends_looks_again_where_it_was_overtaken(
    relay: Relay, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what has just ended in its hands it would ask for ever, and nobody else would have a turn."""
    lookups = instance.verifier._lookups
    find, public_id = lookups.find, relay.tenant.admin.split("_")[2]
    ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(lookups, "find", lambda _: ended)
    first = asyncio.create_task(instance.verify(relay.tenant.admin))
    early = await find(public_id)
    instance.changes.heard(relay.tenant.workspace_id)
    monkeypatch.setattr(lookups, "find", find)
    ended.set_result(early)
    second = asyncio.create_task(instance.verify(relay.tenant.admin))  # its first step follows the look-up's last one
    assert await second == await first


async def test_a_change_of_one_workspace_is_none_of_anothers_concern(relay: Relay) -> None:
    other = await relay.new_tenant()
    async with an_instance(relay.url, relay.settings.key_peppers, status_ttl=60.0) as one:
        await one.verify(relay.tenant.admin)
        await one.verify(other.admin)
        await one.db.close()
        one.changes.heard(relay.tenant.workspace_id)
        assert await one.verify(other.admin)
        with pytest.raises(errors.DependencyUnavailable):  # it has to look
            await one.verify(relay.tenant.admin)


async def test_a_key_can_not_outlive_its_maker(relay: Relay) -> None:
    ends = datetime.now(UTC) + timedelta(hours=1)
    maker = await a_key(relay, "admin", expire_time=ends)
    async with relay.connect(maker.secret) as client:
        for later in (None, ends + timedelta(seconds=1)):
            with pytest.raises(PermissionDenied) as refusal:
                await client.auth.create_api_key("heir", "viewer", expire_time=later)
            assert refusal.value.reason == "CEILING_EXCEEDED"
        heir = await client.auth.create_api_key("heir", "viewer", expire_time=ends)
        assert heir.expire_time.ToDatetime(UTC) == ends


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and it is two hours later."""

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return super().now(tz) + timedelta(hours=2)

    return lambda: monkeypatch.setattr(verifier, "datetime", Later)


async def test_where_our_clock_is_behind_a_key_ends_by_the_databases(
    relay: Relay, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Earlier":
            return super().now(tz) - timedelta(hours=2)

    monkeypatch.setattr(verifier, "datetime", Earlier)
    made = await a_key(relay)
    assert (await instance.verify(made.secret)).id == made.id
    async with relay.connect(relay.tenant.admin) as client:
        await client.auth.rotate_api_key(made.id, timedelta())
    instance.changes.heard(relay.tenant.workspace_id)
    assert await instance.refuses(made.secret)
    assert (await instance.verifier.examine(made.secret, relay.tenant.workspace_id)).state is KeyState.EXPIRED


async def test_an_expired_key_is_refused_from_that_moment_on(relay: Relay, instance: Instance, later: Any) -> None:
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    made = await a_key(relay, expire_time=in_an_hour)
    assert (await instance.verify(made.secret)).expires_at == in_an_hour
    later()
    assert await instance.refuses(made.secret)


async def test_a_key_that_was_rotated_works_until_it_retires(relay: Relay, instance: Instance, later: Any) -> None:
    made = await a_key(relay)
    await relay.sql("UPDATE api_keys SET retires_at = now() + interval '1 hour' WHERE id = $1", made.id)
    assert (await instance.verify(made.secret)).id == made.id
    later()
    assert await instance.refuses(made.secret)


async def test_the_event_loop_goes_on_while_keys_are_hashed(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = 0
    during: list[int] = []

    def watched(*arguments: str) -> bool:
        before = rounds
        result = matches(*arguments)
        during.append(rounds - before)
        return result

    async def go_round() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(hashing, "matches", watched)
    going = asyncio.create_task(go_round())
    await asyncio.gather(*(instance.refuses(forged()) for _ in range(4)))
    going.cancel()
    assert len(during) == 4
    assert min(during) > 5


async def test_too_many_new_keys_at_once_are_told_to_come_again(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(hashing, "MAX_WAITING_HASHES", 3)
    monkeypatch.setattr(hashing, "matches", lambda *_: gate.wait() and False)
    calls = [asyncio.create_task(instance.refuses(forged(), f"192.0.2.{i}")) for i in range(8)]
    try:
        for first in itertools.islice(asyncio.as_completed(calls), 5):
            with pytest.raises(errors.Overloaded):
                await first
    finally:
        gate.set()
    assert (await asyncio.gather(*calls, return_exceptions=True)).count(True) == 3


async def test_a_caller_that_goes_away_takes_nobody_with_it(relay: Relay, stranger: Instance) -> None:
    first, second = (asyncio.create_task(stranger.verify(relay.tenant.admin)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).role == "admin"
    assert stranger.hashes == 1


async def test_the_memory_of_proofs_is_bounded(
    relay: Relay, stranger: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "MAX_PROOFS", 2)
    for key in (relay.tenant.admin, relay.tenant.developer, relay.tenant.viewer):
        await stranger.verify(key)
    assert stranger.hashes == 3
    await stranger.verify(relay.tenant.viewer)
    assert stranger.hashes == 3
    await stranger.verify(relay.tenant.admin)  # it was the oldest, so it was forgotten and is proven anew
    assert stranger.hashes == 4


async def test_guesses_push_each_other_out_of_memory_and_no_good_key(
    relay: Relay, stranger: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifier, "MAX_REFUSALS", 2)
    await stranger.verify(relay.tenant.admin)
    guesses = [forged() for _ in range(3)]
    for guess in guesses:
        assert await stranger.refuses(guess)
    assert stranger.hashes == 4
    assert await stranger.refuses(guesses[0])
    assert stranger.hashes == 5
    await stranger.verify(relay.tenant.admin)
    assert stranger.hashes == 5


async def test_the_last_use_of_a_key_is_written_down(relay: Relay, instance: Instance) -> None:
    async def last_used(public_id: str) -> Any:
        (row,) = await relay.sql("SELECT last_used_at FROM api_keys WHERE public_id = $1", public_id)
        return row["last_used_at"]

    used, unused = await a_key(relay), await a_key(relay)
    await instance.verify(used.secret)
    await instance.refuses(forged(unused.public_id))
    await instance.verifier.note_used()
    first = await last_used(used.public_id)
    assert first is not None
    await instance.verifier.note_used()  # nothing was used since
    assert await last_used(used.public_id) == first
    await instance.verify(used.secret)
    await instance.verifier.note_used()  # within the same minute
    assert await last_used(used.public_id) == first
    await relay.sql(
        "UPDATE api_keys SET last_used_at = now() - interval '2 minutes' WHERE public_id = $1", used.public_id
    )
    await instance.verify(used.secret)
    await instance.verifier.note_used()
    assert await last_used(used.public_id) > first
    assert await last_used(unused.public_id) is None


async def test_a_use_is_written_down_all_the_same_where_a_first_try_is_cut_off(
    relay: Relay, instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    used = await a_key(relay)
    await instance.verify(used.secret)
    with monkeypatch.context() as patched:
        patched.setattr(store, "touch_keys", hang)
        writing = asyncio.create_task(instance.verifier.note_used())
        await asyncio.wait([writing], timeout=0.2)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    await instance.verifier.note_used()
    (row,) = await relay.sql("SELECT last_used_at FROM api_keys WHERE public_id = $1", used.public_id)
    assert row["last_used_at"] is not None


async def test_the_hashes_are_what_owasp_asks_for(relay: Relay) -> None:
    rows = await relay.sql("SELECT DISTINCT split_part(key_hash, '$', 2), split_part(key_hash, '$', 4) FROM api_keys")
    assert [tuple(row) for row in rows] == [("argon2id", "m=19456,t=2,p=1")]
    assert (HASHER.salt_len, HASHER.hash_len) == (16, 32)


async def test_a_key_without_a_mac_costs_one_hash_ever(relay: Relay) -> None:
    key = (await a_key(relay)).secret
    await relay.sql("UPDATE api_keys SET key_mac = NULL, pepper_id = NULL WHERE public_id = $1", keys.public_id_of(key))
    for expected in (1, 0):
        async with an_instance(relay.url, relay.settings.key_peppers) as restarted:
            await restarted.verify(key)
            await restarted.verifier.note_used()
            assert restarted.hashes == expected
            assert await pepper_of(relay, key) == relay.settings.key_peppers[0].id


async def test_peppers_are_rotated_without_a_hash_and_losing_them_costs_one(relay: Relay) -> None:
    key = (await a_key(relay)).secret
    (first,), second, third = relay.settings.key_peppers, a_pepper(), a_pepper()
    for expected, peppers in ((0, (first, second)), (0, (second, first)), (0, (second,)), (1, (third,)), (0, (third,))):
        async with an_instance(relay.url, peppers) as restarted:
            await restarted.verify(key)
            await restarted.verifier.note_used()
            assert restarted.hashes == expected
            assert await pepper_of(relay, key) == peppers[0].id


async def test_a_pepper_that_another_one_replaced_under_its_id_costs_a_hash_too(relay: Relay) -> None:
    key = (await a_key(relay)).secret
    changed = NamedKey(id=relay.settings.key_peppers[0].id, key=a_pepper().key)
    for expected in (1, 0):
        async with an_instance(relay.url, [changed]) as restarted:
            await restarted.verify(key)
            await restarted.verifier.note_used()
            assert restarted.hashes == expected


async def test_what_could_not_be_written_down_is_written_later(relay: Relay, stranger: Instance) -> None:
    key = (await a_key(relay)).secret
    await stranger.verify(key)
    admin = await asyncpg.connect(relay.url)
    async with admin.transaction():
        await admin.execute("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        await stranger.verifier.note_used()
    await admin.close()
    assert await pepper_of(relay, key) == relay.settings.key_peppers[0].id
    await stranger.verifier.note_used()
    assert await pepper_of(relay, key) not in (None, relay.settings.key_peppers[0].id)


async def test_guesses_from_one_peer_are_throttled_before_any_hash(relay: Relay, instance: Instance) -> None:
    outcomes = await asyncio.gather(*(instance.verify(forged()) for _ in range(300)), return_exceptions=True)
    assert instance.hashes == 10
    assert sum(isinstance(one, errors.Unauthenticated) for one in outcomes) == 10
    throttled = [one for one in outcomes if isinstance(one, errors.Throttled)]
    assert len(throttled) == 290
    assert all(0 < (one.retry_after or 0) <= 60 for one in throttled)
    assert await instance.refuses(forged(), peer="192.0.2.2")


async def test_guesses_at_one_key_are_throttled_wherever_they_come_from(relay: Relay, instance: Instance) -> None:
    public_id = keys.public_id_of(relay.tenant.admin) or ""
    guesses = (instance.verify(forged(public_id), f"192.0.2.{i}") for i in range(100))
    outcomes = await asyncio.gather(*guesses, return_exceptions=True)
    assert instance.hashes == 5
    assert sum(isinstance(one, errors.Throttled) for one in outcomes) == 95


async def test_no_guesser_locks_a_good_key_out(relay: Relay, instance: Instance) -> None:
    public_id = keys.public_id_of(relay.tenant.admin) or ""
    guesses = (instance.verify(forged(public_id if i % 2 else "")) for i in range(100))
    await asyncio.gather(*guesses, return_exceptions=True)
    with pytest.raises(errors.Throttled):
        await instance.verify(forged(public_id))
    assert (await instance.verify(relay.tenant.admin)).role == "admin"
    assert (await instance.verify(relay.tenant.viewer)).role == "viewer"


async def test_good_keys_are_not_too_many_although_all_peppers_are_lost(relay: Relay, stranger: Instance) -> None:
    made = await asyncio.gather(*(a_key(relay) for _ in range(40)))
    principals = await asyncio.gather(*(stranger.verify(key.secret) for key in made))
    assert [one.id for one in principals] == [key.id for key in made]
    assert stranger.hashes == 40


async def test_a_workspace_is_told_how_its_own_keys_stand(relay: Relay, instance: Instance, later: Any) -> None:
    async def state(key: str) -> KeyState:
        return (await instance.verifier.examine(key, relay.tenant.workspace_id)).state

    made, short = await a_key(relay), await a_key(relay, expire_time=datetime.now(UTC) + timedelta(hours=1))
    valid = await instance.verifier.examine(made.secret, relay.tenant.workspace_id)
    assert valid.state is KeyState.VALID
    assert valid.principal
    assert valid.principal.id == made.id
    async with relay.connect(relay.tenant.admin) as client:
        await client.auth.revoke_api_key(made.id)
    assert await state(made.secret) is KeyState.REVOKED  # read anew every time
    assert await state(forged(made.public_id)) is KeyState.NOT_FOUND
    assert await state(short.secret) is KeyState.VALID
    later()
    assert await state(short.secret) is KeyState.EXPIRED
    assert await state(forged(short.public_id)) is KeyState.NOT_FOUND
    assert await state(mistyped(made.secret)) is KeyState.NOT_FOUND
    assert instance.hashes == 0


async def test_another_workspaces_key_is_one_that_does_not_exist(relay: Relay, stranger: Instance) -> None:
    other = await relay.new_tenant()
    nothing = Examined(KeyState.NOT_FOUND)
    for key in (other.admin, forged(keys.public_id_of(other.admin) or ""), forged(), "x"):
        assert await stranger.verifier.examine(key, relay.tenant.workspace_id) == nothing
    assert stranger.hashes == 0
    await stranger.verify(other.admin)  # and it stays so when the key is known
    assert await stranger.verifier.examine(other.admin, relay.tenant.workspace_id) == nothing


async def test_looking_at_a_key_is_no_use_of_it(relay: Relay, instance: Instance) -> None:
    made = await a_key(relay)
    await instance.verifier.examine(made.secret, relay.tenant.workspace_id)
    await instance.verifier.note_used()
    (row,) = await relay.sql("SELECT last_used_at FROM api_keys WHERE public_id = $1", made.public_id)
    assert row["last_used_at"] is None


async def test_a_workspace_that_guesses_at_its_keys_is_throttled_where_only_a_hash_can_tell(
    relay: Relay, stranger: Instance
) -> None:
    workspace_id = relay.tenant.workspace_id
    public_id = keys.public_id_of(relay.tenant.viewer) or ""
    outcomes = await asyncio.gather(
        *(stranger.verifier.examine(forged(public_id), workspace_id) for _ in range(50)), return_exceptions=True
    )
    assert stranger.hashes == 10
    assert sum(isinstance(one, errors.Throttled) for one in outcomes) == 40
    assert (await stranger.verify(relay.tenant.viewer)).role == "viewer"  # its holders are not concerned
