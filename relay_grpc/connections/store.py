"""Connections and their secrets in Postgres. Connection first; the caller owns the transaction."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.connections.secrets import Sealed

if TYPE_CHECKING:
    from relay_grpc.db import Connection


async def insert(
    connection: "Connection",
    *,
    id_: UUID,
    workspace_id: UUID,
    name: str,
    provider: str,
    configuration: Mapping[str, Any],
    default: bool,
) -> asyncpg.Record:
    """The new connection, which takes over being the default when it is to be. Raises AlreadyExists."""
    if default:
        await connection.execute(
            "UPDATE connections SET is_default = false WHERE workspace_id = $1 AND is_default", workspace_id
        )
    try:
        row = await connection.fetchrow(
            """
            INSERT INTO connections (id, workspace_id, name, provider, configuration, is_default)
            VALUES ($1, $2, $3, $4, $5, $6) RETURNING *
            """,
            id_,
            workspace_id,
            name,
            provider,
            json.dumps(configuration),
            default,
        )
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != "connections_name":
            raise errors.Contention("another call is changing the default connection; try again") from error
        raise errors.AlreadyExists(f"a connection named {name!r} exists already") from error
    assert row is not None  # noqa: S101  # INSERT ... RETURNING
    return row


async def insert_secret(
    connection: "Connection", *, id_: UUID, workspace_id: UUID, connection_id: UUID, sealed: Sealed
) -> None:
    await connection.execute(
        """
        INSERT INTO connection_secrets (id, workspace_id, connection_id, encryption_key_id, wrapped_key, ciphertext)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        id_,
        workspace_id,
        connection_id,
        sealed.encryption_key_id,
        sealed.wrapped_key,
        sealed.ciphertext,
    )


async def get(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    """Raises NotFound."""
    row = await connection.fetchrow("SELECT * FROM connections WHERE workspace_id = $1 AND id = $2", workspace_id, id_)
    if row is None:
        raise errors.NotFound("connection", str(id_))
    return row


async def get_default(connection: "Connection", workspace_id: UUID) -> asyncpg.Record | None:
    return await connection.fetchrow("SELECT * FROM connections WHERE workspace_id = $1 AND is_default", workspace_id)


async def list_(
    connection: "Connection", workspace_id: UUID, *, before: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """Newest first, those older than `before`."""
    return await connection.fetch(
        """
        SELECT * FROM connections
         WHERE workspace_id = $1 AND ($2::uuid IS NULL OR id < $2)
         ORDER BY id DESC LIMIT $3
        """,
        workspace_id,
        before,
        limit,
    )
