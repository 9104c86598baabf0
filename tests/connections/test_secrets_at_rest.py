"""Secrets of connections at rest: in no dump and no log, and of no use but where they belong."""

import asyncio
import base64
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from relay import aio
from relay.v1.actions_pb2 import ATTEMPT_OUTCOME_UNSENDABLE, EXECUTION_STATE_SUCCESS
from relay.v1.connections_pb2 import SIGNATURE_SCHEME_ED25519, Connection

from relay_grpc.bootstrap import bootstrap
from relay_grpc.connections.secrets import Sealed, Undecryptable, Vault
from relay_grpc.embedded import EmbeddedPostgres, _programs
from tests.connections.calls import change, deliver, new
from tests.harness import Databases, Receiver, Relay, settings_for
from tests.processes import started

CONNECTIONS = 26  # with four secrets each


def spellings(secret: bytes) -> list[bytes]:
    """The ways in which a secret could have been written down."""
    encoded = base64.b64encode(secret)
    return [secret, secret.hex().encode(), encoded, encoded.rstrip(b"="), base64.urlsafe_b64encode(secret)]


def signing_secret(raw: bytes) -> str:
    return f"whsec_{base64.b64encode(raw).decode()}"


async def plant(client: Any, url: str) -> list[bytes]:
    """Makes, rotates and changes connections; returns every secret that was used on the way, as its bytes."""
    planted = []
    for i in range(CONNECTIONS):
        first, second, value, later = (secrets.token_bytes(24 + i % 8) for _ in range(4))
        made = await client.connections.create_webhook(
            f"planted {i}", url, signing_secret=signing_secret(first), headers={"Authorization": value.hex()}
        )
        await client.connections.rotate_secret(made.id, signing_secret=signing_secret(second))
        webhook = {"headers": {"authorization": "", "x-later": later.hex()}}
        await client.connections.update(Connection(id=made.id, webhook=webhook), ["webhook.headers"])
        assert (await deliver(client, made.id)).state == EXECUTION_STATE_SUCCESS
        planted += [first, second, value, later]
    return planted


async def dump(url: str) -> bytes:
    process = await asyncio.create_subprocess_exec(
        _programs() / "pg_dump", url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    dumped, _ = await process.communicate()
    assert process.returncode == 0
    return dumped


async def test_what_is_planted_is_in_nothing_that_is_kept(
    databases: Databases, postgres: EmbeddedPostgres, receiver: Receiver, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    settings = settings_for(tmp_path)
    async with databases.new() as url:
        admin = (await bootstrap(url, settings)).keys["admin"]
        database = await asyncpg.connect(url)
        first_segment = await database.fetchval("SELECT pg_walfile_name(pg_current_wal_lsn())")
        async with (
            started(url, tmp_path, RELAY_LOG_LEVEL="DEBUG") as server,
            aio.connect(server.listen, api_key=admin) as client,
        ):
            planted = await plant(client, receiver.url)
            made = await client.connections.create_webhook("made", receiver.url)
            await client.connections.create_webhook("ed25519", receiver.url, signature_scheme=SIGNATURE_SCHEME_ED25519)
            key = await client.auth.create_api_key("planted", "developer")
        places = {"dump": await dump(url), "log": server.log.read_bytes()}
        await database.execute("CHECKPOINT")
        oid = await database.fetchval("SELECT oid::text FROM pg_database WHERE datname = current_database()")
        await database.close()
        data = postgres._folder / "data"
        segments = sorted(one for one in (data / "pg_wal").iterdir() if one.is_file() and one.name >= first_segment)
        places["write-ahead log"] = b"".join(one.read_bytes() for one in segments if len(one.name) == 24)
        places["tables"] = b"".join(one.read_bytes() for one in sorted((data / "base" / oid).iterdir()))
        places["log of Postgres"] = (postgres._folder / "server.log").read_bytes()
    (encryption_key,) = settings.encryption_keys
    planted += [
        base64.b64decode(made.signing_secret.removeprefix("whsec_")),
        key.secret.encode(),
        key.secret.rpartition("_")[2].encode(),
        admin.encode(),
        encryption_key.key,
    ]
    for place in ("dump", "write-ahead log", "tables"):
        assert b"planted 25" in places[place]  # the search finds what is there
    assert b" DEBUG " in places["log"]
    found = [place for place, text in places.items() for one in planted for form in spellings(one) if form in text]
    assert found == []
    sizes = ", ".join(f"{place} ({len(text) >> 10} KiB)" for place, text in places.items())
    figure(f"{len(planted)} secrets, 0 found in {sizes}")


@pytest.fixture(scope="module")
async def theirs(relay: Relay) -> AsyncIterator[Any]:
    """The admin of another tenant."""
    other = await relay.new_tenant()
    async with relay.connect(other.admin) as client:
        yield client


# What somebody with the database's password may try, with the secret of connection $1 and for connection $2.
MOVE = """
    WITH emptied AS (DELETE FROM connection_secrets WHERE connection_id = $2)
    UPDATE connection_secrets
       SET connection_id = $2, workspace_id = (SELECT workspace_id FROM connections WHERE id = $2)
     WHERE connection_id = $1
"""
RENAME = "UPDATE connection_secrets SET id = gen_random_uuid() WHERE connection_id = $2 AND $1::uuid IS NOT NULL"
MIX = """
    UPDATE connection_secrets
       SET ciphertext = (SELECT ciphertext FROM connection_secrets WHERE connection_id = $1)
     WHERE connection_id = $2
"""


@pytest.mark.long
async def test_a_secret_that_was_moved_signs_nothing(
    relay: Relay, admin: Any, theirs: Any, receiver: Receiver, long: bool, figure: Callable[[str], None]
) -> None:
    """To another workspace, to another connection, under another id, or in part."""
    refused = 0
    for _ in range(25 if long else 3):
        for client, statement in ((theirs, MOVE), (admin, MOVE), (admin, RENAME), (admin, MIX)):
            victim, target = await new(admin, receiver.url), await new(client, receiver.url)
            await relay.sql(statement, victim.id, target.id)
            execution = await deliver(client, target.id)
            assert execution.last_attempt.outcome == ATTEMPT_OUTCOME_UNSENDABLE
            assert execution.last_attempt.error == "a secret of the connection can't be decrypted"
            await client.actions.cancel_execution(execution.id)
            refused += 1
    assert receiver.requests == []
    assert "UNSENDABLE" in {row["reason"] for row in await relay.sql("SELECT reason FROM audit_events")}
    figure(f"{refused} of {refused} moved secrets signed nothing, and each left an event")


async def test_a_moved_header_is_not_sent(relay: Relay, admin: Any, receiver: Receiver) -> None:
    victim = await new(admin, receiver.url, headers={"Authorization": "of the victim's receiver"})
    thief = await new(admin, receiver.url, headers={"Authorization": "mine"})
    await relay.sql("DELETE FROM connection_secrets WHERE connection_id = $1 AND kind = 'headers'", thief.id)
    await relay.sql(
        "UPDATE connection_secrets SET connection_id = $2 WHERE connection_id = $1 AND kind = 'headers'",
        victim.id,
        thief.id,
    )
    execution = await deliver(admin, thief.id)
    assert execution.last_attempt.outcome == ATTEMPT_OUTCOME_UNSENDABLE
    assert receiver.requests == []
    await change(admin, thief, "webhook.headers", webhook={"headers": {"Authorization": "new"}})
    assert (await deliver(admin, thief.id)).state == EXECUTION_STATE_SUCCESS


async def test_a_moved_secret_opens_where_it_was_alone(relay: Relay, admin: Any, receiver: Receiver) -> None:
    made = await new(admin, receiver.url)
    (row,) = await relay.sql("SELECT * FROM connection_secrets WHERE connection_id = $1", made.id)
    vault = Vault({key.id: key.key for key in relay.settings.encryption_keys})
    sealed = Sealed(row["encryption_key_id"], row["wrapped_key"], row["ciphertext"])
    place: dict[str, UUID] = {name: row[name] for name in ("workspace_id", "connection_id")} | {"secret_id": row["id"]}
    assert len(vault.open(sealed, **place)) == 32
    for part in place:
        with pytest.raises(Undecryptable):
            vault.open(sealed, **place | {part: uuid4()})
