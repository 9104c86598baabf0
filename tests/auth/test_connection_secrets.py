"""Signing secrets at rest: encrypted from the first row on, and bound to where they stand."""

import asyncio
import base64
import secrets
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from relay_grpc.connections.secrets import Sealed, Undecryptable, Vault
from relay_grpc.embedded import _programs
from tests.harness import Receiver, Relay

PLACE = {"workspace_id": uuid4(), "connection_id": uuid4(), "secret_id": uuid4()}
SECRET = b"planted-secret" * 3


def new_vault(*ids: str) -> Vault:
    return Vault({id_: secrets.token_bytes(32) for id_ in ids})


def spellings(secret: bytes) -> list[bytes]:
    """The ways in which a secret could stand in a dump."""
    encoded = base64.b64encode(secret)
    return [secret, secret.hex().encode(), encoded, encoded.rstrip(b"="), base64.urlsafe_b64encode(secret)]


def test_what_is_sealed_is_opened_where_it_belongs_and_nowhere_else() -> None:
    vault = new_vault("k1")
    sealed = vault.seal(SECRET, **PLACE)
    assert vault.open(sealed, **PLACE) == SECRET
    for part in PLACE:
        with pytest.raises(Undecryptable, match="does not belong to this key, workspace and connection"):
            vault.open(sealed, **PLACE | {part: uuid4()})


@pytest.mark.parametrize("column", ["wrapped_key", "ciphertext"])
def test_every_changed_or_missing_byte_is_noticed(column: str) -> None:
    vault = new_vault("k1")
    sealed = vault.seal(SECRET, **PLACE)
    value: bytes = getattr(sealed, column)
    for i in range(len(value)):
        with pytest.raises(Undecryptable):
            vault.open(replace(sealed, **{column: value[:i]}), **PLACE)  # type: ignore[arg-type]
    for i in range(len(value)):
        changed = replace(sealed, **{column: value[:i] + bytes([value[i] ^ 1]) + value[i + 1 :]})  # type: ignore[arg-type]
        with pytest.raises(Undecryptable):
            vault.open(changed, **PLACE)


def test_parts_of_two_secrets_do_not_fit_together() -> None:
    vault = new_vault("k1")
    one, other = vault.seal(SECRET, **PLACE), vault.seal(SECRET, **PLACE)
    assert one.ciphertext != other.ciphertext
    with pytest.raises(Undecryptable):
        vault.open(replace(one, wrapped_key=other.wrapped_key), **PLACE)


def test_a_key_that_is_gone_is_named() -> None:
    sealed = new_vault("last-year").seal(SECRET, **PLACE)
    with pytest.raises(Undecryptable, match="no encryption key is called 'last-year' here"):
        new_vault("k1").open(sealed, **PLACE)
    with pytest.raises(Undecryptable, match="does not belong"):
        new_vault("last-year").open(sealed, **PLACE)


def test_the_first_key_encrypts_and_each_decrypts_its_own() -> None:
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    before = Vault({"old": old}).seal(SECRET, **PLACE)
    vault = Vault({"new": new, "old": old})
    assert vault.open(before, **PLACE) == SECRET
    after = vault.seal(SECRET, **PLACE)
    assert (before.encryption_key_id, after.encryption_key_id) == ("old", "new")
    assert Vault({"new": new}).open(after, **PLACE) == SECRET


async def test_no_secret_stands_in_a_dump_of_the_database(relay: Relay, receiver: Receiver) -> None:
    planted = [secrets.token_bytes(24 + i) for i in range(10)]
    async with relay.connect(relay.tenant.admin) as client:
        for i, secret in enumerate(planted):
            text = f"whsec_{base64.b64encode(secret).decode()}"
            await client.connections.create_webhook(f"planted {i}", receiver.url, signing_secret=text)
        made = await client.connections.create_webhook("made", receiver.url)
        key = await client.auth.create_api_key("planted", "developer")
    async with relay.connect(key.secret) as client:
        preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=made.id)
        await client.actions.execute(preview)
    receiver.verify(made.signing_secret)
    dump = await asyncio.create_subprocess_exec(
        _programs() / "pg_dump", relay.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    dumped, _ = await dump.communicate()
    assert dump.returncode == 0
    assert b"planted 9" in dumped  # it is a dump of this database
    planted.append(base64.b64decode(made.signing_secret.removeprefix("whsec_")))
    planted += [one.encode() for one in (key.secret, key.secret.rpartition("_")[2], relay.tenant.admin)]
    (encryption_key,) = relay.settings.encryption_keys
    planted.append(encryption_key.key)
    assert [one for secret in planted for one in spellings(secret) if one in dumped] == []


async def test_a_secret_that_was_moved_signs_nothing(relay: Relay, receiver: Receiver) -> None:
    """A row that somebody with the database's password gave to another connection or workspace: no delivery at all."""
    other = await relay.new_tenant()
    async with relay.connect(relay.tenant.admin) as mine, relay.connect(other.admin) as theirs:
        victim = await mine.connections.create_webhook("victim", receiver.url)
        thief = await theirs.connections.create_webhook("thief", receiver.url)
        await relay.sql("DELETE FROM connection_secrets WHERE connection_id = $1", thief.id)
        await relay.sql(
            "UPDATE connection_secrets SET connection_id = $2, workspace_id = $3 WHERE connection_id = $1",
            victim.id,
            thief.id,
            other.workspace_id,
        )
        preview = await theirs.actions.preview("webhook.send", {"payload": {}}, connection_id=thief.id)
        execution = await theirs.actions.execute(preview)
    assert execution.last_attempt.error == "the connection's signing secret can't be decrypted"
    assert receiver.requests == []
    (row,) = await relay.sql("SELECT * FROM connection_secrets WHERE connection_id = $1", thief.id)
    sealed = Sealed(row["encryption_key_id"], row["wrapped_key"], row["ciphertext"])
    vault = Vault({key.id: key.key for key in relay.settings.encryption_keys})
    place: dict[str, Any] = {
        "workspace_id": other.workspace_id,
        "connection_id": UUID(thief.id),
        "secret_id": row["id"],
    }
    with pytest.raises(Undecryptable):
        vault.open(sealed, **place)
    place |= {"workspace_id": relay.tenant.workspace_id, "connection_id": UUID(victim.id)}
    assert len(vault.open(sealed, **place)) == 32
