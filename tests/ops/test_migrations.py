"""A database, and a data folder, that an earlier version made serve this one, with what is in them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from relay import aio

from relay_grpc import datafolder
from relay_grpc.app import serving
from relay_grpc.auth import keys
from relay_grpc.auth.proofs import HASHER
from relay_grpc.db import SCHEMA_REVISION
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.schema import migrate
from tests.harness import settings_for


@pytest.fixture
async def first_version(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    """A database at the first revision."""
    name = f"old_{uuid4().hex}"
    admin = await asyncpg.connect(postgres.url())
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        await asyncio.to_thread(migrate, postgres.url(name), "0001")
        yield postgres.url(name)
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


async def test_a_key_of_the_first_version_works_after_the_migration(first_version: str, data_dir: Path) -> None:
    key = keys.generate(live=False)
    workspace_id = uuid4()
    connection = await asyncpg.connect(first_version)
    try:
        await connection.execute("INSERT INTO workspaces (id, name) VALUES ($1, 'old')", workspace_id)
        await connection.execute(
            """
            INSERT INTO api_keys (id, workspace_id, public_id, lineage_id, key_hash, name, role, scopes, created_by)
            VALUES ($1, $2, $3, $1, $4, 'old', 'admin', '{}', 'bootstrap')
            """,
            uuid4(),
            workspace_id,
            key.public_id,
            HASHER.hash(key.text),
        )
        await asyncio.to_thread(migrate, first_version)
        await asyncio.to_thread(migrate, first_version)  # again: nothing is missing
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == SCHEMA_REVISION
    finally:
        await connection.close()
    async with (
        serving(settings_for(data_dir), first_version) as app,
        aio.connect(str(app.listen), api_key=key.text) as relay,
    ):
        assert (await relay.auth.who_am_i()).workspace_id == str(workspace_id)
        assert [made.name async for made in relay.auth.list_api_keys()] == ["old"]


@pytest.mark.parametrize("missing", [("RELAY_AUDIT_KEYS",), ("RELAY_KEY_PEPPERS", "RELAY_AUDIT_KEYS")])
def test_a_data_folder_of_an_older_version_gets_what_it_lacks_and_keeps_it(
    data_dir: Path, missing: tuple[str, ...]
) -> None:
    path = data_dir / datafolder.KEY_MATERIAL
    old = datafolder.new_key_material()
    for name in missing:
        del old[name]
    datafolder.write(path, old)
    first, second = settings_for(data_dir), settings_for(data_dir)
    assert (first.key_peppers, first.audit_keys) == (second.key_peppers, second.audit_keys)
    assert (len(first.key_peppers), len(first.audit_keys)) == (1, 1)
    kept = datafolder.read(path)
    assert kept
    assert kept.items() >= old.items()


def test_a_data_folder_that_lost_the_key_of_its_secrets_is_not_given_another(data_dir: Path) -> None:
    path = data_dir / datafolder.KEY_MATERIAL
    old = datafolder.new_key_material()
    del old["RELAY_ENCRYPTION_KEYS"]
    datafolder.write(path, old)
    with pytest.raises(datafolder.DataFolderError, match="damaged"):
        settings_for(data_dir)
