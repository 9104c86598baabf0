"""Production mode as managed databases allow it: no superuser, a login that may create roles, keys from outside."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from relay.client import connect

from relay_grpc import datafolder
from relay_grpc.bootstrap import bootstrap
from relay_grpc.db import Database, DatabaseUnusable
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate
from relay_grpc.settings import Settings
from tests.harness import running


@pytest.fixture
async def managed_url(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """An empty database as a provider hands it out: its owner may create roles and is no superuser."""
    name = f"managed_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(f"CREATE ROLE {name} LOGIN CREATEROLE")
    # Roles are the cluster's, and other tests made them first; where this login makes them it needs no grant.
    for role in ("relay_owner", "relay_app", "relay_worker"):
        exists = await admin.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", role)
        if exists:
            await admin.execute(f"GRANT {role} TO {name} WITH ADMIN OPTION")
    await admin.execute(f"CREATE DATABASE {name} OWNER {name}")
    await admin.execute(f"ALTER DATABASE {name} SET synchronous_commit = on")  # off in the tests' server
    yield postgres.url(name).replace("://relay@", f"://{name}@")
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


def production(**environ: str) -> Settings:
    listen = {"RELAY_LISTEN": "127.0.0.1:0", "RELAY_HTTP_LISTEN": "127.0.0.1:0", "RELAY_ENV": "production"}
    return Settings.load(datafolder.new_key_material() | listen | environ)


async def test_the_main_job_without_a_superuser(managed_url: str) -> None:
    settings = production(DATABASE_URL=managed_url, ACTIONS_ENABLED="true")
    await asyncio.to_thread(migrate, managed_url)
    async with running(managed_url, settings) as relay:
        assert relay.tenant.admin.startswith("rk_live_")
        async with relay.connect(relay.tenant.admin) as client:
            connection = await client.connections.create_webhook("out", "https://receiver.invalid/hook", default=True)
            assert connection.signing_secret
            preview = await client.actions.preview("webhook.send", {"payload": {}})
            execution = await client.actions.execute(preview)
            assert execution.attempt_count == 1
            # It was really tried, and .invalid never resolves (RFC 2606).
            assert execution.last_attempt.error


async def test_serving_refuses_a_database_that_was_not_migrated(managed_url: str) -> None:
    with pytest.raises(DatabaseUnusable, match="relay migrate"):
        await Database.open(managed_url)


async def test_serving_refuses_a_role_that_escapes_row_level_security(
    postgres: EmbeddedPostgres, managed_url: str
) -> None:
    await asyncio.to_thread(migrate, managed_url)
    admin = await asyncpg.connect(postgres.url())
    await admin.execute("GRANT relay_owner TO relay_app")
    try:
        with pytest.raises(DatabaseUnusable, match="bypass row level security"):
            await Database.open(managed_url)
    finally:
        await admin.execute("REVOKE relay_owner FROM relay_app")
        await admin.close()


async def test_migrating_twice_changes_nothing(managed_url: str) -> None:
    await asyncio.to_thread(migrate, managed_url)
    await asyncio.to_thread(migrate, managed_url)
    made = await bootstrap(managed_url, production(DATABASE_URL=managed_url))
    assert (await bootstrap(managed_url, production(DATABASE_URL=managed_url))).keys == {}
    assert made.keys


async def test_serve_in_production_from_the_command_line(managed_url: str, tmp_path: Path) -> None:
    await asyncio.to_thread(migrate, managed_url)
    material = datafolder.new_key_material()
    made = await bootstrap(managed_url, production(DATABASE_URL=managed_url))
    env = material | {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DATABASE_URL": managed_url,
        "RELAY_LISTEN": "127.0.0.1:0",
        "RELAY_HTTP_LISTEN": "127.0.0.1:0",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "relay_grpc", "serve", env=env, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    warning, line = [(await asyncio.wait_for(process.stderr.readline(), 60)).decode() for _ in range(2)]
    assert "RELAY_AUDIT_CHECKPOINTS is not set" in warning
    address = line.split("gRPC on ")[1].split(" ")[0]

    def actions_enabled() -> set[bool]:
        with connect(address, api_key=made.keys["admin"]) as client:
            return {action.enabled for action in client.actions.list()}

    assert await asyncio.to_thread(actions_enabled) == {False}  # in production somebody has to say so
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 60) == 0
    assert not list(tmp_path.iterdir())  # production keeps nothing on the disk
