"""API keys in Postgres. Connection first; the caller owns the transaction, whose workspace confines every query."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

if TYPE_CHECKING:
    from relay_grpc.db import Connection


async def find_key(connection: "Connection", public_id: str) -> asyncpg.Record | None:
    """The key's row in whatever workspace it is; None: there is no such key. For authentication alone."""
    return await connection.fetchrow("SELECT * FROM relay_find_api_key($1)", public_id)


async def insert_key(
    connection: "Connection",
    *,
    id_: UUID,
    workspace_id: UUID,
    public_id: str,
    key_hash: str,
    name: str,
    role: str,
    scopes: Sequence[str],
    created_by: str,
    expires_at: datetime | None,
) -> asyncpg.Record:
    row = await connection.fetchrow(
        """
        INSERT INTO api_keys
          (id, workspace_id, public_id, lineage_id, key_hash, name, role, scopes, created_by, expires_at)
        VALUES ($1, $2, $3, $1, $4, $5, $6, $7, $8, $9)
        RETURNING *
        """,
        id_,
        workspace_id,
        public_id,
        key_hash,
        name,
        role,
        scopes,
        created_by,
        expires_at,
    )
    assert row is not None  # noqa: S101  # INSERT ... RETURNING
    return row


async def list_keys(
    connection: "Connection", workspace_id: UUID, *, before: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """Newest first, those older than `before`."""
    return await connection.fetch(
        """
        SELECT * FROM api_keys
         WHERE workspace_id = $1 AND ($2::uuid IS NULL OR id < $2)
         ORDER BY id DESC LIMIT $3
        """,
        workspace_id,
        before,
        limit,
    )


async def revoke_key(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record | None:
    """The revoked key, with the time of its first revocation; None: there is no such key."""
    return await connection.fetchrow(
        """
        UPDATE api_keys SET revoked_at = coalesce(revoked_at, now())
         WHERE workspace_id = $1 AND id = $2 RETURNING *
        """,
        workspace_id,
        id_,
    )


async def touch_keys(connection: "Connection", ids: Collection[UUID]) -> None:
    """Notes, once a minute at most, that these keys were used. Rows that somebody else holds are left out."""
    await connection.execute(
        """
        UPDATE api_keys SET last_used_at = now()
         WHERE id IN (SELECT id FROM api_keys
                       WHERE id = ANY($1::uuid[])
                         AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')
                         FOR NO KEY UPDATE SKIP LOCKED)
        """,
        list(ids),
    )
