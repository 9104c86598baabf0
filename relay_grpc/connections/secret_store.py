"""The secrets of connections in Postgres, encrypted. Connection first; the caller owns the transaction."""

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from relay_grpc.actions import signing
from relay_grpc.connections.secrets import HEADERS, Sealed, Vault
from relay_grpc.ids import uuid7

if TYPE_CHECKING:
    from relay_grpc.db import Connection


async def insert(
    connection: "Connection", vault: Vault, *, workspace_id: UUID, connection_id: UUID, kind: str, secret: bytes
) -> UUID:
    """Encrypts a secret and keeps it; returns its id. kind: a signing.Scheme, or HEADERS."""
    id_ = uuid7()
    sealed = vault.seal(secret, workspace_id=workspace_id, connection_id=connection_id, secret_id=id_)
    await connection.execute(
        """
        INSERT INTO connection_secrets
          (id, workspace_id, connection_id, kind, public_key, encryption_key_id, wrapped_key, ciphertext)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
        """,
        id_,
        workspace_id,
        connection_id,
        kind,
        signing.public_key(secret) if kind == signing.Scheme.ED25519 else None,
        sealed.encryption_key_id,
        sealed.wrapped_key,
        sealed.ciphertext,
    )
    return id_


async def end_others(
    connection: "Connection", workspace_id: UUID, connection_id: UUID, newest: UUID, overlap: timedelta
) -> None:
    """Lets what signs beside the newest secret do so for `overlap` at most; deletes what signs no more."""
    await connection.execute(
        """
        UPDATE connection_secrets SET expires_at = least(expires_at, now() + $4::interval)
         WHERE workspace_id = $1 AND connection_id = $2 AND kind <> 'headers' AND id <> $3
        """,
        workspace_id,
        connection_id,
        newest,
        overlap,
    )
    await connection.execute(
        "DELETE FROM connection_secrets WHERE workspace_id = $1 AND connection_id = $2 AND expires_at <= now()",
        workspace_id,
        connection_id,
    )


async def get_headers(
    connection: "Connection", vault: Vault, workspace_id: UUID, connection_id: UUID
) -> dict[str, str]:
    """The headers of a connection and their values. Raises Undecryptable."""
    row = await connection.fetchrow(
        """
        SELECT id, encryption_key_id, wrapped_key, ciphertext FROM connection_secrets
         WHERE workspace_id = $1 AND connection_id = $2 AND kind = 'headers'
        """,
        workspace_id,
        connection_id,
    )
    if row is None:
        return {}
    sealed = Sealed(row["encryption_key_id"], row["wrapped_key"], row["ciphertext"])
    opened = vault.open(sealed, workspace_id=workspace_id, connection_id=connection_id, secret_id=row["id"])
    values: dict[str, str] = json.loads(opened)
    return values


async def set_headers(
    connection: "Connection", vault: Vault, workspace_id: UUID, connection_id: UUID, values: Mapping[str, str]
) -> None:
    """Keeps these headers in place of those that are kept."""
    await connection.execute(
        "DELETE FROM connection_secrets WHERE workspace_id = $1 AND connection_id = $2 AND kind = 'headers'",
        workspace_id,
        connection_id,
    )
    if values:
        secret = json.dumps(dict(values)).encode()
        await insert(
            connection, vault, workspace_id=workspace_id, connection_id=connection_id, kind=HEADERS, secret=secret
        )


async def delete_all(connection: "Connection", workspace_id: UUID, connection_id: UUID) -> None:
    await connection.execute(
        "DELETE FROM connection_secrets WHERE workspace_id = $1 AND connection_id = $2", workspace_id, connection_id
    )
