"""`relay rewrap`: encryption keys are rotated while deliveries go on, whatever becomes of the command."""

import asyncio
import base64
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from relay.v1.actions_pb2 import EXECUTION_STATE_SUCCESS

from relay_grpc.connections.secrets import Vault
from relay_grpc.ids import uuid7
from tests.connections.calls import deliver
from tests.harness import Databases, Receiver, receiving, running, settings_for
from tests.processes import ROOT

KEYS = {name: secrets.token_bytes(32) for name in ("old", "new", "lost")}


def named(*names: str) -> str:
    """A value of RELAY_ENCRYPTION_KEYS."""
    return ",".join(f"{name}:{base64.b64encode(KEYS[name]).decode()}" for name in names)


@asynccontextmanager
async def serving(url: str, folder: Path, *keys: str) -> AsyncIterator[Any]:
    """A client of a server that has these encryption keys."""
    settings = settings_for(folder, RELAY_ENCRYPTION_KEYS=named(*keys))
    async with running(url, settings) as relay, relay.connect(relay.tenant.admin) as client:
        yield client


async def rewrapping(url: str, folder: Path, keys: str) -> asyncio.subprocess.Process:
    environ = {"PATH": os.environ["PATH"], "DATABASE_URL": url, "RELAY_ENCRYPTION_KEYS": keys}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay_grpc", "rewrap", "--json", "--data-dir", str(folder)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environ,
        cwd=ROOT,
    )


async def rewrap(url: str, folder: Path, keys: str) -> tuple[int | None, Any, str]:
    """Its exit code, what it says as JSON, and what it complains about."""
    process = await rewrapping(url, folder, keys)
    out, err = await process.communicate()
    return process.returncode, json.loads(out), err.decode()


async def count(postgres: Any, key: str) -> int:
    found: int = await postgres.fetchval("SELECT count(*) FROM connection_secrets WHERE encryption_key_id = $1", key)
    return found


async def fill(postgres: Any, connection_id: str, much: int) -> None:
    """Gives a connection secrets that ended, under the key "old": work for the command alone."""
    workspace_id = await postgres.fetchval("SELECT workspace_id FROM connections WHERE id = $1", connection_id)
    vault, rows = Vault({"old": KEYS["old"]}), []
    for _ in range(much):
        id_ = uuid7()
        sealed = vault.seal(
            secrets.token_bytes(32), workspace_id=workspace_id, connection_id=UUID(connection_id), secret_id=id_
        )
        rows.append((id_, workspace_id, connection_id, "old", sealed.wrapped_key, sealed.ciphertext))
    await postgres.executemany(
        """
        INSERT INTO connection_secrets
          (id, workspace_id, connection_id, encryption_key_id, wrapped_key, ciphertext, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, now() - interval '1 day')
        """,
        rows,
    )


@pytest.mark.long
async def test_keys_are_rotated_under_deliveries_and_kills(
    databases: Databases, receiver: Receiver, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    """The steps that docs/connections.md tells. Every delivery succeeds at its first attempt."""
    kills, much = (5, 20_000) if long else (2, 3_000)
    async with databases.new() as url:
        postgres = await asyncpg.connect(url)
        async with serving(url, tmp_path, "old", "new") as client:
            made = [
                await client.connections.create_webhook(f"receiver {i}", receiver.url, headers={"x-n": str(i)})
                for i in range(4)
            ]
        await fill(postgres, made[0].id, much)
        everything = await count(postgres, "old")
        async with serving(url, tmp_path, "new", "old") as client:
            done = asyncio.Event()

            async def delivering(connection: Any) -> int:
                delivered = 0
                while not done.is_set():
                    execution = await deliver(client, connection.id)
                    assert (execution.state, execution.attempt_count) == (EXECUTION_STATE_SUCCESS, 1)
                    delivered += 1
                return delivered

            deliveries = [asyncio.create_task(delivering(each)) for each in made]
            left = []
            for _ in range(kills):
                before = await count(postgres, "old")
                process = await rewrapping(url, tmp_path, named("new", "old"))
                while await count(postgres, "old") == before:
                    assert process.returncode is None
                process.kill()
                await process.wait()
                left.append(await count(postgres, "old"))
            assert sorted(left, reverse=True) == left
            assert left[-1] > 0
            code, said, _ = await rewrap(url, tmp_path, named("new", "old"))
            done.set()
            delivered = sum(await asyncio.gather(*deliveries))
        assert (code, said["left"]) == (0, {})
        assert said["secretsByKey"] == {"new": everything}
        assert said["rewrapped"] <= left[-1]
        assert delivered >= len(made)
        receiver.requests.clear()
        async with serving(url, tmp_path, "new") as client:
            for i, connection in enumerate(made):
                assert (await deliver(client, connection.id)).state == EXECUTION_STATE_SUCCESS
                receiver.verify(connection.signing_secret)
                assert receiver.requests.pop()[0]["x-n"] == str(i)
        rewrapped = await postgres.fetchval(
            "SELECT sum(split_part(note, ' ', 1)::int) FROM audit_events WHERE action = 'operator.RewrapSecrets'"
        )
        assert rewrapped == everything
        await postgres.close()
    figure(f"{everything} secrets, {delivered} deliveries, {kills} kills with {left} left: 0 failed, 0 on the old key")


async def test_what_can_not_be_rewrapped_is_left_and_told(databases: Databases, tmp_path: Path) -> None:
    async with databases.new() as url, receiving() as receiver:
        postgres = await asyncpg.connect(url)
        async with serving(url, tmp_path, "old") as client:
            good, moved, lost = [await client.connections.create_webhook(name, receiver.url) for name in "abc"]
        await postgres.execute(
            "UPDATE connection_secrets SET id = $2 WHERE connection_id = $1", moved.id, moved_to := uuid4()
        )
        await postgres.execute(
            "UPDATE connection_secrets SET encryption_key_id = 'lost' WHERE connection_id = $1", lost.id
        )
        before = await postgres.fetch("SELECT * FROM connection_secrets WHERE connection_id <> $1 ORDER BY id", good.id)
        code, said, err = await rewrap(url, tmp_path, named("new", "old"))
        assert code == 1
        assert said["currentKey"] == "new"
        assert said["rewrapped"] == 1
        assert said["secretsByKey"] == {"lost": 1, "new": 1, "old": 1}
        assert said["left"] == {
            str(moved_to): "the secret does not belong to this key, workspace and connection",
            lost.signing_keys[0].id: "no encryption key is called 'lost' here",
        }
        assert "left as they were, 1: no encryption key is called 'lost' here" in err
        after = await postgres.fetch("SELECT * FROM connection_secrets WHERE connection_id <> $1 ORDER BY id", good.id)
        assert after == before
        code, said, _ = await rewrap(url, tmp_path, named("new", "old"))
        assert (code, said["rewrapped"]) == (1, 0)
        await postgres.close()


async def test_without_a_key_it_says_what_to_do(databases: Databases, tmp_path: Path) -> None:
    async with databases.new() as url:
        process = await rewrapping(url, tmp_path, "")
        _, err = await process.communicate()
    assert process.returncode == 2
    assert b"no RELAY_ENCRYPTION_KEYS: the first of them encrypts from now on" in err


def test_a_rewrapped_secret_has_the_same_ciphertext_under_another_key() -> None:
    place: dict[str, Any] = {"workspace_id": uuid4(), "connection_id": uuid4(), "secret_id": uuid4()}
    sealed = Vault({"old": KEYS["old"]}).seal(b"secret", **place)
    again = Vault({"new": KEYS["new"], "old": KEYS["old"]}).rewrap(sealed, **place)
    assert (again.encryption_key_id, again.ciphertext) == ("new", sealed.ciphertext)
    assert Vault({"new": KEYS["new"]}).open(again, **place) == b"secret"
