"""API keys, roles and users in Postgres. Connection first; the caller owns the transaction.

Its workspace confines every query but those for authentication, which finds out the workspace.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from relay_grpc import errors
from relay_grpc.principal import NO_LIMITS, Limits

if TYPE_CHECKING:
    from relay_grpc.auth.proofs import SealedKey
    from relay_grpc.db import Connection


async def find_keys(connection: "Connection", public_ids: Collection[str]) -> dict[str, asyncpg.Record]:
    """By public id, those keys that exist, in whatever workspaces they are. For authentication alone.

    role_parent, role_scopes: of a custom role. expires_at: by its own expiry or a rotation, whichever comes first;
    has_expired: that this was before now, by the database's clock.
    """
    rows = await connection.fetch("SELECT * FROM relay_find_api_keys($1)", list(public_ids))
    return {row["public_id"]: row for row in rows}


async def find_user_roles(
    connection: "Connection", users: Collection[tuple[str, str]]
) -> dict[tuple[str, str], list[asyncpg.Record]]:
    """By issuer and user id, the roles of those users that have any, in whatever workspaces. For authentication alone.

    role_parent, role_scopes: of a custom role.
    """
    rows = await connection.fetch(
        "SELECT * FROM relay_find_user_roles($1, $2)", [issuer for issuer, _ in users], [user for _, user in users]
    )
    found: dict[tuple[str, str], list[asyncpg.Record]] = {}
    for row in rows:
        found.setdefault((row["issuer"], row["user_id"]), []).append(row)
    return found


async def insert_key(
    connection: "Connection",
    *,
    id_: UUID,
    workspace_id: UUID,
    public_id: str,
    sealed: "SealedKey",
    name: str,
    role: str,
    scopes: Sequence[str] = (),
    limits: Limits = NO_LIMITS,
    created_by: str,
    expires_at: datetime | None = None,
) -> None:
    """From here to the transaction's end nobody can delete the key's role. Raises NotFound: there is no such role."""
    try:
        await connection.execute(
            """
            INSERT INTO api_keys
              (id, workspace_id, lineage_id, public_id, key_hash, key_mac, pepper_id, name, role, scopes,
               calls_per_minute, executions_per_minute, created_by, expires_at)
            VALUES ($1, $2, $1, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
            """,
            id_,
            workspace_id,
            public_id,
            *sealed,
            name,
            role,
            scopes,
            limits.calls,
            limits.executions,
            created_by,
            expires_at,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise errors.NotFound("role", role) from error


async def get_key(connection: "Connection", workspace_id: UUID, id_: UUID) -> asyncpg.Record:
    """With role_parent and role_scopes, those of a custom role. Raises NotFound."""
    row = await connection.fetchrow(
        """
        SELECT k.*, r.parent AS role_parent, r.scopes AS role_scopes
          FROM api_keys k LEFT JOIN custom_roles r ON r.workspace_id = k.workspace_id AND r.name = k.role
         WHERE k.workspace_id = $1 AND k.id = $2
        """,
        workspace_id,
        id_,
    )
    if row is None:
        raise errors.NotFound("API key", str(id_))
    return row


async def list_keys(
    connection: "Connection", workspace_id: UUID, *, before: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """Rows like those of get_key, newest first, those older than `before`."""
    return await connection.fetch(
        """
        SELECT k.*, r.parent AS role_parent, r.scopes AS role_scopes
          FROM api_keys k LEFT JOIN custom_roles r ON r.workspace_id = k.workspace_id AND r.name = k.role
         WHERE k.workspace_id = $1 AND ($2::uuid IS NULL OR k.id < $2)
         ORDER BY k.id DESC LIMIT $3
        """,
        workspace_id,
        before,
        limit,
    )


async def copy_key(
    connection: "Connection",
    workspace_id: UUID,
    original_id: UUID,
    *,
    id_: UUID,
    public_id: str,
    sealed: "SealedKey",
    created_by: str,
) -> None:
    """A key that may do what the original may, for as long as that was made for, and counts as the same caller."""
    await connection.execute(
        """
        INSERT INTO api_keys
          (id, public_id, key_hash, key_mac, pepper_id, created_by,
           workspace_id, lineage_id, name, role, scopes, calls_per_minute, executions_per_minute, expires_at)
        SELECT $3, $4, $5, $6, $7, $8,
               workspace_id, lineage_id, name, role, scopes, calls_per_minute, executions_per_minute, expires_at
          FROM api_keys WHERE workspace_id = $1 AND id = $2
        """,
        workspace_id,
        original_id,
        id_,
        public_id,
        *sealed,
        created_by,
    )


async def retire_key(connection: "Connection", workspace_id: UUID, id_: UUID, overlap: timedelta) -> bool:
    """Lets a key that works do so for `overlap` more, or until it was to retire already. False: there is none."""
    status = await connection.execute(
        """
        UPDATE api_keys SET retires_at = least(retires_at, clock_timestamp() + $3)
         WHERE workspace_id = $1 AND id = $2
           AND revoked_at IS NULL AND coalesce(least(expires_at, retires_at) > clock_timestamp(), true)
        """,
        workspace_id,
        id_,
        overlap,
    )
    return status == "UPDATE 1"


async def revoke_key(connection: "Connection", workspace_id: UUID, id_: UUID) -> None:
    """Keeps the time of its first revocation, and does nothing where there is no such key."""
    await connection.execute(
        "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE workspace_id = $1 AND id = $2",
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


async def insert_role(
    connection: "Connection", workspace_id: UUID, *, name: str, parent: str, scopes: Sequence[str], created_by: str
) -> asyncpg.Record:
    """Raises AlreadyExists."""
    try:
        row = await connection.fetchrow(
            """
            INSERT INTO custom_roles (workspace_id, name, parent, scopes, created_by)
            VALUES ($1, $2, $3, $4, $5) RETURNING *
            """,
            workspace_id,
            name,
            parent,
            scopes,
            created_by,
        )
    except asyncpg.UniqueViolationError as error:
        raise errors.AlreadyExists(f"a role named {name!r} exists already") from error
    assert row is not None  # noqa: S101  # INSERT ... RETURNING
    return row


async def list_roles(connection: "Connection", workspace_id: UUID, *, after: str, limit: int) -> list[asyncpg.Record]:
    """The workspace's own, by name, those after `after`."""
    return await connection.fetch(
        "SELECT * FROM custom_roles WHERE workspace_id = $1 AND name > $2 ORDER BY name LIMIT $3",
        workspace_id,
        after,
        limit,
    )


async def delete_role(connection: "Connection", workspace_id: UUID, name: str) -> None:
    """Raises NotFound, and FailedPrecondition while a key that was not revoked or a user has it."""
    try:
        status = await connection.execute(
            "DELETE FROM custom_roles WHERE workspace_id = $1 AND name = $2", workspace_id, name
        )
    except asyncpg.ForeignKeyViolationError as error:
        why = (
            "a user has it: assign another role to that user, or remove it"
            if error.constraint_name == "user_roles_custom_role"
            else "a key has it: revoke that key, even if it has expired"
        )
        raise errors.FailedPrecondition(f"the role {name!r} is in use; {why}", reason="ROLE_IN_USE") from error
    if status != "DELETE 1":
        raise errors.NotFound("role", name)


async def assign_role(
    connection: "Connection", *, id_: UUID, workspace_id: UUID, issuer: str, user_id: str, role: str, created_by: str
) -> asyncpg.Record:
    """The user's one role, with role_parent and role_scopes, those of a custom role.

    From here to the transaction's end nobody can delete the role. Raises NotFound: there is no such role.
    """
    try:
        await connection.execute(
            """
            INSERT INTO user_roles (id, workspace_id, issuer, user_id, role, created_by)
            VALUES ($1, $2, $3, $4, $5, $6)
            ON CONFLICT ON CONSTRAINT user_roles_one
            DO UPDATE SET id = excluded.id, role = excluded.role, created_by = excluded.created_by, created_at = now()
            """,
            id_,
            workspace_id,
            issuer,
            user_id,
            role,
            created_by,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise errors.NotFound("role", role) from error
    row = await connection.fetchrow(
        """
        SELECT u.*, r.parent AS role_parent, r.scopes AS role_scopes
          FROM user_roles u LEFT JOIN custom_roles r ON r.workspace_id = u.workspace_id AND r.name = u.role
         WHERE u.workspace_id = $1 AND u.issuer = $2 AND u.user_id = $3
        """,
        workspace_id,
        issuer,
        user_id,
    )
    assert row is not None  # noqa: S101  # it was just written
    return row


async def list_user_roles(
    connection: "Connection", workspace_id: UUID, *, before: UUID | None, limit: int
) -> list[asyncpg.Record]:
    """Newest first, those older than `before`."""
    return await connection.fetch(
        """
        SELECT * FROM user_roles
         WHERE workspace_id = $1 AND ($2::uuid IS NULL OR id < $2)
         ORDER BY id DESC LIMIT $3
        """,
        workspace_id,
        before,
        limit,
    )


async def remove_role(connection: "Connection", workspace_id: UUID, *, issuer: str, user_id: str) -> None:
    """Raises NotFound: the user has no role here."""
    status = await connection.execute(
        "DELETE FROM user_roles WHERE workspace_id = $1 AND issuer = $2 AND user_id = $3",
        workspace_id,
        issuer,
        user_id,
    )
    if status != "DELETE 1":
        raise errors.NotFound("role of user", user_id)


async def set_macs(connection: "Connection", macs: Mapping[UUID, tuple[bytes, str]]) -> None:
    """Stores the MAC and the pepper's id of these keys. Rows that somebody else holds are left out: it costs a hash."""
    await connection.execute(
        """
        UPDATE api_keys k SET key_mac = made.mac, pepper_id = made.pepper_id
          FROM unnest($1::uuid[], $2::bytea[], $3::text[]) AS made(id, mac, pepper_id)
         WHERE k.id = made.id
           AND k.id IN (SELECT id FROM api_keys WHERE id = ANY($1::uuid[]) FOR NO KEY UPDATE SKIP LOCKED)
        """,
        list(macs),
        [mac for mac, _ in macs.values()],
        [pepper_id for _, pepper_id in macs.values()],
    )
