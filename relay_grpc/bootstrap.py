"""Workspaces and their first keys, made on the database itself by its operator, as relay_owner."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from relay_grpc.actions import signing
from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.auth import keys, store
from relay_grpc.auth.proofs import Peppers
from relay_grpc.connections import secret_store
from relay_grpc.connections import store as connections
from relay_grpc.connections.secrets import Sealed, Undecryptable, Vault
from relay_grpc.ids import uuid7
from relay_grpc.owner import as_owner, record
from relay_grpc.settings import Settings

if TYPE_CHECKING:
    from relay_grpc.db import Connection

WEBHOOK_CONNECTION = "WEBHOOK_URL"
ROLES = ("admin", "developer")


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """keys: the text of a new key for each role, empty where the workspace existed and none were asked for."""

    workspace_id: UUID
    keys: dict[str, str] = field(repr=False)


async def bootstrap(
    url: str, settings: Settings, *, workspace: str = "default", new_keys: bool = False
) -> Bootstrapped:
    """Makes the workspace with an admin and a developer key, unless it exists.

    new_keys: make keys although it exists. The first workspace of a database is the bootstrap workspace: it alone gets
    the default connection of WEBHOOK_URL, made or brought up to date. Raises DatabaseUnusable.
    """
    async with as_owner(url) as connection:
        # One bootstrap at a time: two first starts must not make two first workspaces.
        await connection.execute("LOCK TABLE workspaces IN SHARE ROW EXCLUSIVE MODE")
        return await _bootstrap(connection, settings, workspace, new_keys)


async def _bootstrap(connection: "Connection", settings: Settings, workspace: str, new_keys: bool) -> Bootstrapped:
    workspace_id = await connection.fetchval("SELECT id FROM workspaces WHERE name = $1", workspace)
    if workspace_id is None:
        workspace_id, new_keys = uuid7(), True
        await connection.execute("INSERT INTO workspaces (id, name) VALUES ($1, $2)", workspace_id, workspace)
        await record(connection, workspace_id, "operator.CreateWorkspace", f"workspaces/{workspace_id}")
    made: dict[str, str] = {}
    if new_keys:
        for role in ROLES:
            made[role] = await _make_key(connection, workspace_id, role, settings)
    first = await connection.fetchval(
        "SELECT id FROM workspaces WHERE id <> $1 ORDER BY created_at, id LIMIT 1", SYSTEM_WORKSPACE
    )
    if first == workspace_id and settings.webhook_url and settings.actions_signing_secret:
        secret = settings.actions_signing_secret.get_secret_value()
        await _default_connection(connection, workspace_id, settings.webhook_url, secret, settings)
    return Bootstrapped(workspace_id, made)


async def _make_key(connection: "Connection", workspace_id: UUID, role: str, settings: Settings) -> str:
    key, id_ = keys.generate(live=not settings.is_development), uuid7()
    await store.insert_key(
        connection,
        id_=id_,
        workspace_id=workspace_id,
        public_id=key.public_id,
        sealed=Peppers(settings.key_peppers).seal(key.text),
        name=f"bootstrap {role}",
        role=role,
        created_by="bootstrap",
    )
    await record(connection, workspace_id, "operator.CreateApiKey", f"apiKeys/{id_}")
    return key.text


async def _default_connection(
    connection: "Connection", workspace_id: UUID, url: str, secret_text: str, settings: Settings
) -> None:
    """WEBHOOK_URL and ACTIONS_SIGNING_SECRET as a connection of this workspace alone; the rest of it is its users'."""
    secret = (
        signing.decode_secret(secret_text) if secret_text.startswith(signing.SECRET_PREFIX) else secret_text.encode()
    )
    vault = Vault({key.id: key.key for key in settings.encryption_keys})
    # Locked, so that its secrets are not rotated meanwhile; after the default, as by whoever else takes both.
    rows = await connection.fetch(
        """
        SELECT id, name, configuration, is_default FROM connections
         WHERE workspace_id = $1 AND (name = $2 OR is_default) AND deleted_at IS NULL
         ORDER BY is_default DESC FOR NO KEY UPDATE
        """,
        workspace_id,
        WEBHOOK_CONNECTION,
    )
    row = next((row for row in rows if row["name"] == WEBHOOK_CONNECTION), None)
    told = {"url": url, "body_signature": True}
    if row is None:
        id_ = uuid7()
        await connections.insert(
            connection,
            id_=id_,
            workspace_id=workspace_id,
            name=WEBHOOK_CONNECTION,
            provider="independent",
            configuration=told,
            default=True,
        )
    elif await _is_up_to_date(connection, vault, workspace_id, row, told, secret):
        return
    else:
        id_ = row["id"]
        await connection.execute("DELETE FROM connection_secrets WHERE connection_id = $1 AND kind <> 'headers'", id_)
        await connections.clear_default(connection, workspace_id, besides=id_)
        await connection.execute(
            """
            UPDATE connections
               SET configuration = configuration || $2::jsonb, is_default = true, version = version + 1,
                   updated_at = now(), failures = 0, failing_since = NULL, probes = 0, open_until = NULL
             WHERE id = $1
            """,
            id_,
            json.dumps(told),
        )
    await secret_store.insert(
        connection, vault, workspace_id=workspace_id, connection_id=id_, kind=signing.Scheme.HMAC, secret=secret
    )
    await record(connection, workspace_id, "operator.SetDefaultConnection", f"connections/{id_}")


async def _is_up_to_date(
    connection: "Connection",
    vault: Vault,
    workspace_id: UUID,
    target: asyncpg.Record,
    told: Mapping[str, Any],
    secret: bytes,
) -> bool:
    if not told.items() <= json.loads(target["configuration"]).items() or not target["is_default"]:
        return False
    rows = await connection.fetch(
        "SELECT * FROM connection_secrets WHERE connection_id = $1 AND kind <> 'headers'", target["id"]
    )
    try:
        return [
            vault.open(
                Sealed(row["encryption_key_id"], row["wrapped_key"], row["ciphertext"]),
                workspace_id=workspace_id,
                connection_id=target["id"],
                secret_id=row["id"],
            )
            for row in rows
        ] == [secret]
    except Undecryptable:
        return False
